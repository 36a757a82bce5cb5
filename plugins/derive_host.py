"""Output shapes of a plugin op as expressions, found by running its fake kernel on symbolic shapes.

No op needs a shape function of its own: the fake kernel that torch has anyway is run with one symbol for each size that
varies. What comes out is checked at the corners of the ranges, since a fake kernel may choose between cases by size.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from ..errors import PluginError, TrtBridgeError
from . import sizes as size_language
from .bounds import bound
from .calls import reads_numbers
from .host_spec import (
    HOST_DTYPES,
    MOST_AXES,
    HostInput,
    HostOutput,
    HostSize,
    HostSpec,
    Size,
    evaluate_size,
    input_size,
    size_tensor,
)
from .registry import call_op, find_op
from .size_text import InexpressibleError, fit, from_sympy

Range = tuple[int, int, int]

_FROM_TORCH = {getattr(torch, torch_name): name for name, torch_name in HOST_DTYPES.items()}
_DEVICE = torch.device("cpu")  # of fake tensors: shapes do not depend on it
_LARGEST = 1 << 31  # elements in an axis; a larger bound only says that there is none
_DATA = "?"  # a size that depends on data, among sampled ones


@dataclass(frozen=True)
class TensorType:
    """A tensor at the node.

    Attributes:
        dtype: as it is in the engine.
        shape: a number, an expression over named dims ("2*seq"), or None for a size that depends on data.
        ranges: (min, opt, max) of each dimension, None where unknown.
        cast: dtype that the op takes, None where it is the same.
    """

    dtype: torch.dtype
    shape: tuple[int | str | None, ...]
    ranges: tuple[Range | None, ...]
    cast: torch.dtype | None = None


def derive(
    op_name: str,
    call: str,
    inputs: Sequence[TensorType],
    outputs: Sequence[TensorType | None],
    place: str = "",
) -> HostSpec:
    """What TensorRT must know of a call of an op.

    Args:
        op_name: full name of the op.
        call: JSON template of its arguments.
        inputs: the node's inputs.
        outputs: the node's outputs; None for one that nothing reads. Their ranges bound sizes that depend on data;
            where they are unknown `plugins.bounds` is asked.
        place: where it is called, for errors.

    Raises:
        PluginError: TensorRT cannot run the op inside an engine; says why.
    """
    wanted = [(index, output) for index, output in enumerate(outputs) if output is not None]
    for kind, tensors in (("input", list(enumerate(inputs))), ("output", wanted)):
        for index, tensor in tensors:
            if tensor.dtype not in _FROM_TORCH:
                raise PluginError(f"{kind} {index} is {tensor.dtype}, which TensorRT has no plugin tensors of")
            if len(tensor.shape) > MOST_AXES:
                raise PluginError(f"{kind} {index} has {len(tensor.shape)} axes, and TensorRT takes {MOST_AXES}")
    tracer = _Tracer(op_name, call, inputs)
    shapes = tracer.shapes(len(outputs), [index for index, _ in wanted])
    sizes: list[HostSize] = []
    known: dict[str, int] = {}
    described = []
    for position, (index, output) in enumerate(wanted):
        shape: list[Size] = []
        for axis, size in enumerate(shapes[index]):
            if isinstance(size, _FromData):
                if size.key not in known:
                    known[size.key] = len(sizes)
                    most = _bound_of(output, axis, tracer)
                    sizes.append(HostSize(str(most), f"CeilDiv({most}, 2)", position, axis))
                size = size_tensor(known[size.key])
            shape.append(size)
        if len(shape) > MOST_AXES:
            raise PluginError(f"output {index} has {len(shape)} axes, and TensorRT takes {MOST_AXES}")
        described.append(HostOutput(index, _FROM_TORCH[output.dtype], tuple(shape)))
    hosted = tuple(
        HostInput(_FROM_TORCH[t.dtype], "" if t.cast is None else str(t.cast).removeprefix("torch."), len(t.shape))
        for t in inputs
    )
    return HostSpec(hosted, tuple(described), tuple(sizes), place, bool(sizes) or reads_numbers(call))


def _bound_of(output: TensorType, axis: int, tracer: _Tracer) -> Size:
    spread = output.ranges[axis] if axis < len(output.ranges) else None
    if spread is not None and spread[2] <= _LARGEST:
        return spread[2]
    most = bound(tracer.op_name, tracer.call, [tracer.named_shape(index) for index in range(len(tracer.inputs))])
    if most is None:
        raise PluginError(
            f"the size of axis {axis} of an output depends on data, and no upper bound of it is known: give one "
            "(max_data_size, or a tb.Dim in output_shapes)"
        )
    return most


@dataclass(frozen=True)
class _FromData:
    """A size that depends on data; equal keys are equal sizes."""

    key: str


@dataclass
class _Tracer:
    """Runs one call on fake tensors of chosen sizes."""

    op_name: str
    call: str
    inputs: Sequence[TensorType]
    # Dims that can be chosen, by the text of their size: where they first occur.
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.op = find_op(self.op_name)
        texts = [
            (f"?{index}_{axis}" if size is None else size, (index, axis))
            for index, tensor in enumerate(self.inputs)
            for axis, size in enumerate(tensor.shape)
            if not isinstance(size, int)
        ]
        plain = {text for text, _ in texts if text.isidentifier()}
        for text, where in texts:
            # "2*seq" follows from "seq" where that is a size of its own.
            if text in plain or text.startswith("?") or not size_language.names_in(text) <= plain:
                self.places.setdefault(text, where)

    def shapes(self, count: int, wanted: Sequence[int]) -> dict[int, list[Size | _FromData]]:
        """Shapes of the wanted results, checked against runs with real numbers."""
        samples = list(self._samples())
        runs = []
        for number, sample in enumerate(samples):
            try:
                runs.append((sample, self._run(sample, count, wanted)))
            except PluginError:
                if number == 0:
                    raise  # the sizes that the user gave
        try:
            symbolic = self._symbolic(count, wanted)
        except PluginError:
            if not self.places:
                raise
            symbolic = None
        named = [({input_size(*self.places[text]): n for text, n in sample.items()}, shapes) for sample, shapes in runs]
        found: dict[int, list[Size | _FromData]] = {}
        for index in wanted:
            ranks = {len(shapes[index]) for _, shapes in named}
            if len(ranks) != 1:
                raise PluginError(
                    f"the rank of result {index} is {' or '.join(map(str, sorted(ranks)))} by sizes of the inputs"
                )
            found[index] = [
                self._one(None if symbolic is None else symbolic[index][axis], [(s, r[index][axis]) for s, r in named])
                for axis in range(ranks.pop())
            ]
        return found

    def named_shape(self, index: int) -> tuple[Size, ...]:
        """The shape of an input in names of expressions."""
        return tuple(
            size if isinstance(size, int) else input_size(index, axis)
            for axis, size in enumerate(self.inputs[index].shape)
        )

    def _one(self, symbolic: Size | _FromData | None, sampled: list[tuple[dict[str, int], Any]]) -> Size | _FromData:
        """The symbolic size if the sampled ones bear it out, else one that fits them."""
        values = [value for _, value in sampled]
        if any(value == _DATA for value in values):
            if isinstance(symbolic, _FromData) and all(value == _DATA for value in values):
                return symbolic
            raise PluginError("an output's size depends on data in a way that its fake kernel does not show")
        if len(set(values)) == 1 and len(values) > 1:
            return int(values[0])  # torch does not see that x // (x // 2) is 2
        if isinstance(symbolic, (int, str)) and all(evaluate_size(symbolic, s) == value for s, value in sampled):
            return symbolic
        try:
            return fit(values, [sample for sample, _ in sampled])
        except InexpressibleError as error:
            raise PluginError(f"an output's size is no expression that TensorRT computes: {error}") from error

    def _samples(self) -> Iterator[dict[str, int]]:
        """Sizes to try, the usual ones first: all at opt, at min, at max, then one after the other."""
        ranges = {text: self._range(text) for text in self.places}
        joint = [{text: spread[which] for text, spread in ranges.items()} for which in (1, 0, 2)]
        yield joint[0]
        if not ranges:
            return
        yield from joint[1:]
        for text, (low, opt, high) in ranges.items():
            if text.isidentifier() or text.startswith("?"):
                inner = {low, low + 1, low + 2, (low + high) // 2, (low + high) // 2 + 1, opt + 1, high - 1, high}
                for size in sorted(size for size in inner if low <= size <= high and size != opt):
                    yield {**joint[0], text: size}

    def _range(self, text: str) -> Range:
        index, axis = self.places[text]
        spread = self.inputs[index].ranges[axis]
        return (1, 7, 64) if spread is None else spread

    def _symbolic(self, count: int, wanted: Sequence[int]) -> dict[int, list[Size | _FromData | None]]:
        environment = _environment()
        names: dict[sympy.Symbol, str] = {}
        sizes = {}
        for text, where in self.places.items():
            _, opt, high = self._range(text)
            hint = opt if opt > 1 or high < 2 else 2  # a kernel that treats 1 apart is asked for the common case
            source = ConstantSource(input_size(*where))
            symbol = environment.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            sizes[text] = environment.create_symintnode(symbol, hint=hint, source=source)
            if isinstance(symbol, sympy.Symbol):
                names[symbol] = input_size(*where)
        shapes = self._run(sizes, count, wanted, environment)
        return {index: [_readable(size, names) for size in shape] for index, shape in shapes.items()}

    def _run(
        self, sizes: Mapping[str, Any], count: int, wanted: Sequence[int], environment: ShapeEnv | None = None
    ) -> dict[int, list[Any]]:
        """Shapes of the results with these sizes; without an environment `_DATA` stands for what depends on data."""
        real = environment is None
        mode = FakeTensorMode(shape_env=environment or _environment(), allow_non_fake_inputs=True)
        try:
            with _quiet(), mode, torch.no_grad():
                tensors = [self._fake(index, sizes) for index in range(len(self.inputs))]
                results = call_op(self.op, self.call, tensors, _DEVICE)
        except TrtBridgeError:
            raise
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            how = "these shapes" if real else "symbolic shapes"
            raise PluginError(
                f"its fake kernel fails on {how} ({type(error).__name__}: {first[:200]}); register_fake gives one"
            ) from error
        if len(results) < count:
            raise PluginError(f"the op returns {len(results)} tensors where the node has {count} outputs")
        if not real:
            return {index: list(results[index].shape) for index in wanted}
        return {
            index: [size if isinstance(size, int) else _number(size) for size in results[index].shape]
            for index in wanted
        }

    def _fake(self, index: int, sizes: Mapping[str, Any]) -> torch.Tensor:
        tensor = self.inputs[index]
        named = {text: size for text, size in sizes.items() if text.isidentifier()}
        shape = []
        for axis, size in enumerate(tensor.shape):
            text = f"?{index}_{axis}" if size is None else size
            if isinstance(text, str):
                text = sizes[text] if text in sizes else size_language.evaluate(text, named)
            shape.append(text)
        return torch.empty(shape, dtype=tensor.cast or tensor.dtype, device=_DEVICE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, which come with the real call too, and without torch's log of what fails and is dealt with."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _environment() -> ShapeEnv:
    return ShapeEnv(specialize_zero_one=False, duck_shape=False)


def _number(size: Any) -> int | str:
    expression = size.node.expr
    return int(expression) if expression.is_Integer else _DATA


def _readable(size: Any, names: Mapping[sympy.Symbol, str]) -> Size | _FromData | None:
    """A symbolic size; None where it is no expression that TensorRT computes."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if free_unbacked_symbols(expression):
        # Arithmetic on size tensors is refused by TensorRT: each different expression is a size tensor of its own.
        return _FromData(str(expression))
    try:
        return from_sympy(expression, names)
    except InexpressibleError:
        return None
