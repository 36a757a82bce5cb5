"""Conditions on sizes that torch.export could not prove: whether they hold for every size that the user promised.

torch.export refuses a dynamic dimension when the trace rests on a condition that its algebra does not settle, such as
``min(s, 4*s) == s``. The ranges are known here, so the condition is evaluated for every size in them.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import re
from collections.abc import Mapping

from ..errors import DynamicShapeError
from ..plugins.sizes import parse
from .arguments import Arguments
from .dims import Range, evaluate_size

_GUARD = re.compile(r"- Not all values of .* satisfy the generated guard (?P<guard>.*?)\.?$", re.MULTILINE)
_LEAF = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_MOST_CASES = 200_000
_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def guards_always_hold(message: str, arguments: Arguments) -> bool:
    """Whether an error of torch.export is only about conditions that hold for all sizes in range.

    Args:
        message: the error's text.
        arguments: whose dims the conditions are about.
    """
    complaints = [line for line in message.splitlines() if line.strip().startswith("- ")]
    guards = [match["guard"] for match in _GUARD.finditer(message)]
    if not guards or len(guards) != len(complaints):
        return False  # something else is wrong, too

    def size_of(match: re.Match[str]) -> str:
        leaf, axis = int(match[1]), int(match[2])
        dim = arguments.dims[leaf].get(axis)
        return f"({dim})" if dim is not None else str(arguments.tensors[leaf].shape[axis])

    try:
        return all(_holds(_LEAF.sub(size_of, guard), arguments.ranges) for guard in guards)
    except (DynamicShapeError, KeyError, SyntaxError, ZeroDivisionError):
        return False  # a condition that cannot be read is not taken for true


def _holds(guard: str, ranges: Mapping[str, Range]) -> bool:
    tree = parse(guard.strip())
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & ranges.keys())
    spans = [range(ranges[name][0], ranges[name][2] + 1) for name in names]
    if math.prod(len(span) for span in spans) > _MOST_CASES:
        return False
    return all(_truth(tree, dict(zip(names, sizes, strict=True))) for sizes in itertools.product(*spans))


def _truth(node: ast.expr, sizes: Mapping[str, int]) -> bool:
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine(_truth(value, sizes) for value in node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _truth(node.operand, sizes)
    if not isinstance(node, ast.Compare):
        raise DynamicShapeError(f"{ast.unparse(node)!r} is no condition on sizes.")
    values = [evaluate_size(ast.unparse(part), sizes) for part in (node.left, *node.comparators)]
    return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:], strict=False))
