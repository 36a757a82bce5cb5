"""Sizes as expressions that TensorRT can compute (`plugins.host_spec`): from sympy, or from sampled values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy

_MOST_DENOMINATOR = 64  # of a factor such as 1.5 in an interpolation


class InexpressibleError(Exception):
    """A size is not a sum, product, whole quotient, maximum or minimum of sizes."""


def from_sympy(expression: Any, names: Mapping[sympy.Symbol, str]) -> int | str:
    """A symbolic size as a number or as text.

    Args:
        expression: what torch's symbolic shapes computed.
        names: the text of each symbol in it.

    Raises:
        InexpressibleError: TensorRT cannot compute it.
    """
    expression = sympy.sympify(expression)
    return int(expression) if expression.is_Integer else _text(expression, names)


def _text(node: Any, names: Mapping[sympy.Symbol, str]) -> str:
    def part(inner: Any) -> str:
        return _text(inner, names)

    kind = type(node).__name__
    if node.is_Integer:
        return str(int(node))
    if node.is_Symbol and node in names:
        return names[node]
    if kind in ("Add", "Mul"):
        numerator, denominator = sympy.fraction(sympy.together(_rational(node)))
        if denominator != 1:  # a whole number all the same, so that rounding down changes nothing
            return f"(({part(numerator)})//({part(denominator)}))"
        return f"({(' + ' if kind == 'Add' else '*').join(map(part, node.args))})"
    if kind in ("Pow", "PowByNatural") and node.args[1].is_Integer and 1 <= node.args[1] <= 4:
        return "(" + "*".join([part(node.args[0])] * int(node.args[1])) + ")"
    if kind in ("FloorDiv", "CleanDiv"):
        return f"({part(node.args[0])}//{part(node.args[1])})"
    if kind == "CeilDiv":
        return f"CeilDiv({part(node.args[0])}, {part(node.args[1])})"
    if kind in ("Mod", "PythonMod"):
        left, right = map(part, node.args)
        return f"({left} - {right}*({left}//{right}))"
    if kind == "ModularIndexing":
        left, middle, right = map(part, node.args)
        return f"(({left}//{middle}) - {right}*(({left}//{middle})//{right}))"
    if kind in ("Max", "Min"):
        return f"{kind}({', '.join(map(part, node.args))})"
    if kind in ("ToFloat", "Identity"):
        return part(node.args[0])
    if kind in ("FloorToInt", "TruncToInt", "floor", "CeilToInt", "ceiling"):
        numerator, denominator = sympy.fraction(sympy.together(_rational(node.args[0])))
        if denominator == 1:
            return part(numerator)
        left, right = part(numerator), part(denominator)
        return f"CeilDiv({left}, {right})" if kind in ("CeilToInt", "ceiling") else f"({left}//{right})"
    raise InexpressibleError(f"{node} is not made of + - * // Max and Min")


def _rational(node: Any) -> Any:
    """A quotient or product with fractional factors as an exact fraction."""
    kind = type(node).__name__
    if kind in ("IntTrueDiv", "FloatTrueDiv"):
        return _rational(node.args[0]) / _rational(node.args[1])
    if kind == "ToFloat":
        return _rational(node.args[0])
    if kind == "Float":
        exact = sympy.nsimplify(node, rational=True)
        if exact.q > _MOST_DENOMINATOR:
            raise InexpressibleError(f"the factor {node} is no simple fraction")
        return exact
    if kind in ("Add", "Mul"):
        return node.func(*map(_rational, node.args))
    return node


def fit(values: Sequence[int], samples: Sequence[Mapping[str, int]]) -> int | str:
    """The size that takes these values for these sizes of the inputs: ``(a*d + b)//c`` of one size ``d``, the lesser or
    the greater of ``d`` and a constant, a constant, or one of the sizes.

    Some fake kernels, those written in C++ with fixed sizes, give numbers where others give symbols.

    Raises:
        InexpressibleError: there is no such expression with small a and c.
    """
    if len(set(values)) == 1:
        return values[0]
    for name in samples[0]:
        points = sorted({(sample[name], value) for sample, value in zip(samples, values, strict=True)})
        if len({size for size, _ in points}) != len(points) or len(points) < 3:
            continue  # not a function of this size alone, or too little is known
        for divisor in range(1, 17):
            for factor in range(1, 33):
                # value == (factor*size + offset)//divisor for all, so offset lies in an interval of each point.
                low = max(divisor * value - factor * size for size, value in points)
                high = min(divisor * value - factor * size + divisor - 1 for size, value in points)
                if low <= high:
                    offset = min(max(low, 0), high)
                    text = name if factor == 1 else f"{factor}*{name}"
                    text = f"({text} {'+' if offset > 0 else '-'} {abs(offset)})" if offset else text
                    return f"({text}//{divisor})" if divisor > 1 else text
        for function, bound, choose in (("Min", max(values), min), ("Max", min(values), max)):
            if all(value == choose(size, bound) for size, value in points):
                return f"{function}({bound}, {name})"
    raise InexpressibleError(f"sizes {sorted(set(values))[:6]} follow no simple rule")
