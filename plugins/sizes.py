"""Sizes as text: "2*batch + 1", as torch's symbolic shapes print them. Evaluated over ints or torch.SymInts.

Nothing here imports torch at the top: the process that builds engines reads sizes too.
"""

from __future__ import annotations

import ast
import math
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DynamicShapeError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _max(*values: Any) -> Any:
    if all(isinstance(value, (int, float)) for value in values):
        return max(values)
    import torch

    result = values[0]
    for value in values[1:]:
        result = torch.sym_max(result, value)
    return result


def _min(*values: Any) -> Any:
    if all(isinstance(value, (int, float)) for value in values):
        return min(values)
    import torch

    result = values[0]
    for value in values[1:]:
        result = torch.sym_min(result, value)
    return result


# The functions that sympy and torch's symbolic shapes print.
_CALLS: dict[str, Callable[..., Any]] = {
    "Max": _max, "Min": _min, "max": _max, "min": _min, "Abs": abs,
    "floor": math.floor, "ceiling": math.ceil, "ceil": math.ceil, "CeilToInt": math.ceil, "FloorToInt": math.floor,
    "TruncToInt": math.trunc, "trunc": math.trunc, "ToFloat": float, "RoundToInt": round,
    "FloorDiv": operator.floordiv, "CeilDiv": lambda a, b: -(-a // b), "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv,
    "Mod": operator.mod, "PythonMod": operator.mod, "ModularIndexing": lambda a, b, c: a // b % c,
}  # fmt: skip


_PARSING = threading.Lock()
_ATTEMPTS = 5


def parse(expression: str) -> ast.expr:
    """The syntax tree of an expression, whatever other threads do.

    CPython counts the depth of trees that are being made in one place for all threads: with 3.11 two that parse at
    once were seen to get ``SystemError: AST constructor recursion depth mismatch``. So ours take turns; others may
    parse, too.

    Raises:
        SyntaxError: it is no expression.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            with _PARSING:
                return ast.parse(expression, mode="eval").body
        except SystemError:
            continue
    return ast.parse(expression, mode="eval").body


def evaluate(expression: str, sizes: Mapping[str, Any]) -> Any:
    """The value of a size expression ("2*seq + 1", "(batch//2)", "Max(1, seq)") for given sizes of its names.

    Args:
        expression: text as sympy or torch's symbolic shapes print it.
        sizes: ints or torch.SymInts by name.

    Raises:
        KeyError: a name in the expression has no size.
        DynamicShapeError: the text is no size expression.
    """

    try:
        return _value(parse(expression), expression, sizes)
    except SyntaxError as error:
        raise DynamicShapeError(f"{expression!r} is not a shape expression.") from error


def _value(node: ast.expr, expression: str, sizes: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, expression, sizes), _value(right, expression, sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, expression, sizes)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _CALLS:
            return _CALLS[name](*(_value(argument, expression, sizes) for argument in arguments))
    raise DynamicShapeError(f"{expression!r} is not a shape expression that trtbridge can evaluate.")


def names_in(expression: str) -> frozenset[str]:
    """The names that stand in a size expression; empty for a text that is none."""
    try:
        tree = parse(expression)
    except SyntaxError:
        return frozenset()
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)) - called
