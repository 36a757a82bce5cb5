"""Sizes that depend on data but are known all the same, since the program asserts what they are equal to."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .dims import Size


def stated_sizes(program: torch.export.ExportedProgram) -> dict[str, Size]:
    """What a program asserts about expressions of data-dependent sizes, as ``u0*u1 + u2 == 32``.

    torch notes such an assertion wherever a tensor meets one of a known size (grids of images that must add up to the
    patches given), or torch._check states it, but goes on to write the expression into shapes. A backend would then
    build for all that it may be by its ranges, for which the node where the two meet fits nothing.

    Args:
        program: traced; its assertions are still in it.

    Returns:
        By the text of an expression with data-dependent symbols its size: a number, or the text of an expression over
        dimensions of the inputs alone.
    """
    found: dict[str, Size] = {}
    for one, other in _equations(program):
        for unknown, known in ((one, other), (other, one)):
            if _symbols(unknown) and not _symbols(known) and isinstance(known, (int, torch.SymInt)):
                found[str(unknown.node.expr)] = known if isinstance(known, int) else str(known.node.expr)
    return found


def tied_symbols(program: torch.export.ExportedProgram) -> frozenset[str]:
    """The symbols of data-dependent sizes that stand in an equation which a program asserts."""
    return frozenset(symbol for sides in _equations(program) for side in sides for symbol in _symbols(side))


def _equations(program: torch.export.ExportedProgram) -> Iterator[tuple[Any, Any]]:
    """Both sides of each equation that is asserted."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        condition = node.args[0]
        if isinstance(condition, torch.fx.Node) and condition.target is operator.eq:
            one, other = (part.meta.get("val") if isinstance(part, torch.fx.Node) else part for part in condition.args)
            yield one, other


def _symbols(size: object) -> set[str]:
    """The data-dependent symbols of a size."""
    return {str(symbol) for symbol in free_unbacked_symbols(size)} if isinstance(size, torch.SymInt) else set()
