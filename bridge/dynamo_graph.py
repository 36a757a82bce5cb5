"""What dynamo's graphs take: weights, tensors of static or symbolic shapes, numbers; and which cannot be engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .dims import DerivedDim, Dim
from .origins import user_frame

_LEAST_RANGE = 64

Shapes = tuple[Mapping[int, Dim | DerivedDim], ...]
"""For each tensor its dynamic dimensions."""


@dataclass(frozen=True)
class Inputs:
    """The placeholders of a graph, by position.

    Attributes:
        weights: parameters and buffers of modules.
        tensors: all other tensors.
        sizes: numbers that are sizes of tensors: position → (index among tensors, dimension, scale, offset), the
            dimension being scale * number + offset.
        shapes: for each tensor its dynamic dimensions.
        numbers: other numbers; they are fixed at the value of the first call.
        names: for each tensor, what the user calls it.
        problem: why no engine can take these; "" if one can.
        place: Python file and line of the first call in the graph; "" if not known.
    """

    weights: tuple[int, ...]
    tensors: tuple[int, ...]
    sizes: Mapping[int, tuple[int, int, int, int]]
    shapes: Shapes
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    problem: str = ""
    place: str = ""


def read_inputs(graph: torch.fx.GraphModule, max_size: int | None) -> Inputs:
    """Sort a graph's placeholders; must run while dynamo calls the backend, which knows the symbols."""
    weights: list[int] = []
    tensors: list[int] = []
    symbols: dict[int, torch.SymInt] = {}
    numbers: list[int] = []
    shapes: list[dict[int, Dim | DerivedDim]] = []
    names: list[str] = []
    problem = ""
    reader = _DimReader(max_size)
    for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        source = getattr(node, "_dynamo_source", None)
        name = "" if source is None else str(source.name() if callable(source.name) else source.name)
        value = node.meta.get("example_value")
        if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
            numbers.append(place)  # a Python number, such as the epsilon of a normalization, under dynamic=True
        elif isinstance(value, torch.Tensor) and ("._parameters[" in name or "._buffers[" in name):
            weights.append(place)
        elif isinstance(value, torch.Tensor):
            tensors.append(place)
            names.append(name or node.name)
            shape = {axis: reader.read(size) for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
            shapes.append({axis: dim for axis, dim in shape.items() if isinstance(dim, (Dim, DerivedDim))})
            bad = [f"dimension {axis} of {names[-1]} is {value.shape[axis]}" for axis, d in shape.items() if d is None]
            problem = problem or ", ".join(bad)
        elif isinstance(value, torch.SymInt):
            symbols[place] = value
        else:
            problem = problem or f"it takes {name or node.name}, a {type(value).__name__}"
    sizes: dict[int, tuple[int, int, int, int]] = {}
    for place, number in symbols.items():
        found = _find_size(str(number.node.expr), shapes)
        if found is None:
            numbers.append(place)
        else:
            sizes[place] = found
    if not tensors:
        problem = problem or "it takes no tensor but weights"
    return Inputs(
        tuple(weights), tuple(tensors), sizes, tuple(shapes), tuple(numbers), tuple(names), problem, _place(graph)
    )


class _DimReader:
    """Symbolic sizes as named dims, each with a range."""

    def __init__(self, max_size: int | None) -> None:
        self._max_size = max_size
        self._dims: dict[str, Dim] = {}

    def read(self, size: Any) -> Dim | DerivedDim | int | None:
        """For a SymInt a dim, the number that a size turned out to be, or None where no engine can have such a size."""
        node = size.node
        expression = node.expr
        if expression.is_number:
            return int(expression)
        if len(expression.free_symbols) != 1:
            return None
        (symbol,) = expression.free_symbols
        offset = expression.subs(symbol, 0)
        scale = sympy.expand(expression - offset) / symbol
        if not (scale.is_Integer and offset.is_Integer and scale >= 1):
            return None
        dim = self._dim(symbol, node.shape_env)
        if dim is None:
            return None
        return dim if (scale, offset) == (1, 0) else DerivedDim(dim, int(scale), int(offset))

    def _dim(self, symbol: Any, environment: Any) -> Dim | None:
        name = str(symbol)
        if name not in self._dims:
            seen = _hint(symbol, environment)
            bounds = environment.var_to_range.get(symbol)
            low = max(1, _finite(bounds.lower, 1)) if bounds is not None else 1
            high = _finite(bounds.upper, 0) if bounds is not None else 0
            if not high:
                high = max(_LEAST_RANGE, 8 * (seen or low), low) if self._max_size is None else max(self._max_size, low)
            if seen is not None and not low <= seen <= high:
                return None
            self._dims[name] = Dim(name, min=low, max=high)
        return self._dims[name]


def _hint(symbol: Any, environment: Any) -> int | None:
    values = getattr(environment, "backed_var_to_val", None)  # its name from torch 2.10 on
    value = (environment.var_to_val if values is None else values).get(symbol)
    return None if value is None else int(value)


def _finite(bound: Any, otherwise: int) -> int:
    """A bound as a number; torch's own infinity is none."""
    return int(bound) if getattr(bound, "is_Integer", False) and abs(int(bound)) < 1 << 40 else otherwise


def without_dims(shapes: Shapes, names: Collection[str]) -> Shapes:
    """The same with the dimensions of some names static."""
    return tuple({axis: dim for axis, dim in dims.items() if _root(dim).name not in names} for dims in shapes)


def _root(dim: Dim | DerivedDim) -> Dim:
    return dim if isinstance(dim, Dim) else dim.root


def _find_size(name: str, shapes: Sequence[Mapping[int, Dim | DerivedDim]]) -> tuple[int, int, int, int] | None:
    for index, dims in enumerate(shapes):
        for axis, dim in dims.items():
            root, scale, offset = (dim, 1, 0) if isinstance(dim, Dim) else (dim.root, dim.scale, dim.offset)
            if root.name == name:
                return index, axis, scale, offset
    return None


def _place(graph: torch.fx.GraphModule) -> str:
    for node in graph.graph.nodes:
        if node.op.startswith("call_") and node.stack_trace:
            file, line, _ = user_frame(node.stack_trace)
            if file:
                return f"{file}:{line}"
    return ""


class FixedNumber(float):
    """A number where dynamo's graph expects a tensor with one: such a graph begins with its item()."""

    def __new__(cls, value: float) -> Any:
        """The number itself where it is whole: those come as they are."""
        return value if isinstance(value, int) else super().__new__(cls, value)

    def item(self) -> float:
        return float(self)


class ClosedGraph(torch.nn.Module):
    """A graph as a module that holds its weights and takes tensors alone.

    Args:
        graph: dynamo's.
        inputs: what it takes.
        weights: by position, shared and not copied.
        numbers: by position, fixed.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        inputs: Inputs,
        weights: Mapping[int, torch.Tensor],
        numbers: Mapping[int, int | float],
    ) -> None:
        super().__init__()
        self._numbers = numbers
        self._graph = graph
        self._inputs = inputs
        self._names = {}
        placeholders = graph.graph.find_nodes(op="placeholder")
        for place, weight in weights.items():
            self._names[place] = name = placeholders[place].name
            if isinstance(weight, torch.nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Run the graph, node by node, so that each call of the traced program knows the Python line it comes from."""
        given: dict[int, Any] = dict(zip(self._inputs.tensors, tensors, strict=True))
        given |= {place: FixedNumber(number) for place, number in self._numbers.items()}
        for place, name in self._names.items():
            given[place] = getattr(self, name)
        for place, (index, axis, scale, offset) in self._inputs.sizes.items():
            size = tensors[index].shape[axis]
            given[place] = size if (scale, offset) == (1, 0) else (size - offset) // scale
        with torch.fx.traceback.preserve_node_meta():
            return torch.fx.Interpreter(self._graph).run(*[given[place] for place in sorted(given)])


def number_in(value: Any) -> int | float:
    """A number that dynamo passes as it is, or as a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def why_not(graph: torch.fx.GraphModule, inputs: Inputs, given: Sequence[Any]) -> str:
    """Why a graph may not be replaced by an engine for these inputs, since results would not be the same; "" if it may.

    An engine computes fresh results and nothing else: no gradients, nothing written to inputs, no views of them.
    """
    tensors = [given[place] for place in (*inputs.tensors, *inputs.weights)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are on, and an engine has none: call it under torch.inference_mode() or torch.no_grad()"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        return f"its tensors are on {' and '.join(devices)}"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "it takes tensors that are not dense"
    numbers = {place: FixedNumber(number_in(given[place])) for place in inputs.numbers}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad(), mode:  # tensors of inference mode do not count what is written
        fakes = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            if isinstance(v, torch.Tensor) and place not in numbers
            else numbers.get(place, v)
            for place, v in enumerate(given)
        ]
        before = [fake._version if isinstance(fake, torch.Tensor) else 0 for fake in fakes]
        try:
            results = graph(*fakes)
        except Exception as error:
            return f"what it writes to cannot be found out ({type(error).__name__}: {error})"
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    for name, fake, version in zip(names, fakes, before, strict=True):
        if isinstance(fake, torch.Tensor) and fake._version != version:
            return f"it writes to its input {name}"
    pairs = zip(names, fakes, strict=True)
    memory = {fake.untyped_storage()._cdata: name for name, fake in pairs if isinstance(fake, torch.Tensor)}
    for result in results if isinstance(results, (tuple, list)) else [results]:
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata in memory:
            return f"it returns a view of its input {memory[result.untyped_storage()._cdata]}"
    return ""
