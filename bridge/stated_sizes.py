"""Sizes that depend on data but are known all the same, since the program asserts what they are equal to."""

from __future__ import annotations

import operator

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
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        condition = node.args[0]
        if not isinstance(condition, torch.fx.Node) or condition.target is not operator.eq:
            continue
        one, other = (part.meta.get("val") if isinstance(part, torch.fx.Node) else part for part in condition.args)
        for unknown, known in ((one, other), (other, one)):
            if _depends_on_data(unknown) and not _depends_on_data(known) and isinstance(known, (int, torch.SymInt)):
                found[str(unknown.node.expr)] = known if isinstance(known, int) else str(known.node.expr)
    return found


def _depends_on_data(size: object) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))
