"""What TensorRT must know of a plugin node to keep it inside an engine: dtypes, and output shapes as expressions.

It stands in the node's ``host`` attribute as JSON, made by `plugins.derive_host` from the op's fake kernel, and is read
by `plugins.tensorrt_v3`, also in the process that builds engines; so nothing here imports torch.

An expression is Python text over the sizes of the node's inputs, ``d<input>_<axis>``, with ``+ - * //``, whole numbers,
``CeilDiv(a, b)``, ``Max(...)`` and ``Min(...)``: what TensorRT's IExprBuilder can compute, and what
`plugins.sizes.evaluate` can.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from ..errors import PluginError
from .sizes import parse

HOST_ATTRIBUTE = "host"
"""Node attribute with the JSON text of a `HostSpec`."""

HOST_OP_TYPE = "TorchOp"
"""ONNX op type of plugin nodes inside a segment, and the name of the one TensorRT plugin that runs them all."""

HOST_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
"""Names of TensorRT's DataType members that plugins take, and torch's names for them."""

MOST_AXES = 8
"""TensorRT's nvinfer1::Dims::MAX_DIMS."""

SIZE_DTYPE = "INT32"
"""Element type of size tensors; TensorRT demands it."""

Size = int | str
"""A number, an expression, or ``"size<k>"`` for the k-th size tensor."""


@dataclass(frozen=True)
class HostInput:
    """An input of the node.

    Attributes:
        dtype: a name in `HOST_DTYPES`.
        cast: torch dtype ("float64") that it is cast to before the call, "" for no cast.
        axes: its rank.
    """

    dtype: str
    cast: str
    axes: int


@dataclass(frozen=True)
class HostOutput:
    """An output of the node.

    Attributes:
        index: which of the op's results, flat, it is.
        dtype: a name in `HOST_DTYPES`; the result is cast to it.
        shape: one entry a dimension.
    """

    index: int
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class HostSize:
    """A size that depends on data: a size tensor, which is one more output of the TensorRT layer.

    Attributes:
        most: expression of its upper bound; a run that exceeds it fails.
        usual: expression of the size that TensorRT tunes for.
        output: position in `HostSpec.outputs` of an output with that size.
        axis: the dimension of it.
    """

    most: str
    usual: str
    output: int
    axis: int


@dataclass(frozen=True)
class HostSpec:
    """A plugin node as TensorRT sees it.

    Attributes:
        inputs: in the node's order.
        outputs: those that something reads, in the node's order.
        sizes: sizes that depend on data.
        place: where the op is called in the user's program, for errors.
        waits: the op reads numbers from tensors or makes sizes from data, so that the host waits for the device and the
            call cannot be captured in a CUDA graph.
    """

    inputs: tuple[HostInput, ...]
    outputs: tuple[HostOutput, ...]
    sizes: tuple[HostSize, ...] = ()
    place: str = ""
    waits: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> HostSpec:
        """Read what `to_json` wrote.

        Raises:
            PluginError: it did not write that.
        """
        try:
            data = json.loads(text)
            return cls(
                inputs=tuple(HostInput(**entry) for entry in data["inputs"]),
                outputs=tuple(HostOutput(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["outputs"]),
                sizes=tuple(HostSize(**entry) for entry in data["sizes"]),
                place=data["place"],
                waits=data["waits"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PluginError(
                f"The host attribute of a plugin node cannot be read ({type(error).__name__}: {error}): it was made by "
                "another version of trtbridge. Convert again."
            ) from error


def input_size(index: int, axis: int) -> str:
    """The name of an input's size in expressions."""
    return f"d{index}_{axis}"


def size_tensor(index: int) -> str:
    """The name of a size tensor in shapes."""
    return f"size{index}"


_Value = TypeVar("_Value")


class Builder(Protocol[_Value]):
    """Makes values of sizes: TensorRT's expressions, or numbers."""

    def constant(self, value: int) -> _Value: ...

    def apply(self, operation: str, left: _Value, right: _Value) -> _Value:
        """``operation`` is one of SUM, SUB, PROD, FLOOR_DIV, CEIL_DIV, MAX, MIN (names of trt.DimensionOperation)."""
        ...


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "SUM", ast.Sub: "SUB", ast.Mult: "PROD", ast.FloorDiv: "FLOOR_DIV",
}  # fmt: skip
_FUNCTIONS = {"CeilDiv": "CEIL_DIV", "Max": "MAX", "Min": "MIN"}


def build_size(size: Size, names: Mapping[str, _Value], builder: Builder[_Value]) -> _Value:
    """A size made with a builder.

    Args:
        size: number or expression.
        names: the values of the names in it.
        builder: makes constants and applies operations.

    Raises:
        PluginError: it is no expression of this kind.
    """

    def value(node: ast.expr) -> _Value:
        match node:
            case ast.Constant(value=int() as number):
                return builder.constant(number)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)):
                return builder.constant(-number)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return builder.apply(_OPERATORS[type(op)], value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=[first, *rest]) if name in _FUNCTIONS:
                result = value(first)
                for argument in rest:
                    result = builder.apply(_FUNCTIONS[name], result, value(argument))
                return result
        raise PluginError(f"{size!r} is not a size that TensorRT can compute.")

    if isinstance(size, int):
        return builder.constant(size)
    try:
        return value(parse(size))
    except SyntaxError as error:
        raise PluginError(f"{size!r} is not a size expression.") from error


class _Numbers:
    _apply: Mapping[str, Callable[[int, int], int]] = {
        "SUM": lambda a, b: a + b, "SUB": lambda a, b: a - b, "PROD": lambda a, b: a * b,
        "FLOOR_DIV": lambda a, b: a // b, "CEIL_DIV": lambda a, b: -(-a // b), "MAX": max, "MIN": min,
    }  # fmt: skip

    def constant(self, value: int) -> int:
        return value

    def apply(self, operation: str, left: int, right: int) -> int:
        return self._apply[operation](left, right)


def evaluate_size(size: Size, sizes: Mapping[str, int]) -> int:
    """The value of a size for given sizes of the inputs.

    Raises:
        PluginError: it is no expression of this kind.
    """
    return build_size(size, sizes, _Numbers())


def input_sizes(shapes: Any) -> dict[str, int]:
    """The value of every name that expressions over these input shapes may use."""
    return {input_size(index, axis): int(size) for index, shape in enumerate(shapes) for axis, size in enumerate(shape)}
