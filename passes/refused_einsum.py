"""The rule for Einsum, which TensorRT knows, but not with capital letters."""

from __future__ import annotations

import string

from .refused_fragment import Fragment, need


def einsum(f: Fragment) -> None:
    """Einsum with capital letters: the same with small ones."""
    equation = str(f.attr("equation"))
    capitals = sorted({letter for letter in equation if letter in string.ascii_uppercase})
    free = [letter for letter in string.ascii_lowercase if letter not in equation]
    need(bool(capitals), "its letters are small ones already")
    need(len(capitals) <= len(free), "it has more axes than there are small letters")
    need("->" in equation, "the order of its result's axes follows from its letters")
    names = str.maketrans(dict(zip(capitals, free, strict=False)))
    inputs = [f.input(index) for index in range(len(f.node.inputs))]
    f.result(f.op("Einsum", *inputs, equation=equation.translate(names)))
