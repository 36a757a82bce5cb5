"""Random graphs through the default pipeline: the same numbers before and after, and a second run changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st

from trtbridge.passes import DEFAULT, numbers
from trtbridge.passes.exchange import INLINE_LIMIT_BYTES, make_stand_in

T = onnx.TensorProto
FLOATS = (T.FLOAT, T.FLOAT16, T.DOUBLE)
INTEGERS = (T.INT64, T.INT32)
ALL = (*FLOATS, *INTEGERS, T.BOOL)
TOLERANCE = 1e-3
N = 2
"""Size of the dynamic dimension in the runs."""


@dataclass
class Value:
    """A tensor of the graph.

    Attributes:
        shape: sizes in the runs.
        exact: whether its values are whole numbers, that no rounding can move across a threshold.
    """

    name: str
    element: int
    shape: tuple[int, ...]
    exact: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Builder:
    """Draws a graph node by node; every draw gives a valid one."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    counter: itertools.count[int] = field(default_factory=itertools.count)

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def choose(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def pick(self, *elements: int, where: Callable[[Value], bool] = lambda value: True) -> Value | None:
        """An earlier tensor, later ones more often, so that chains grow."""
        fits = [value for value in self.values if value.element in elements and where(value)]
        if not fits:
            return None
        return fits[-1 - min(self.number(0, len(fits) - 1), self.number(0, len(fits) - 1))]

    def constant(self, array: np.ndarray, as_node: bool | None = None) -> str:
        name = f"c{next(self.counter)}"
        tensor = onnx.numpy_helper.from_array(array, name)
        if array.nbytes > INLINE_LIMIT_BYTES:
            self.weights[name] = ir.tensor(array, name=name)
            self.initializers.append(make_stand_in(name, self.weights[name]))
        elif self.flag() if as_node is None else as_node:
            self.nodes.append(onnx.helper.make_node("Constant", [], [name], name=f"n{name}", value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def filled(self, element: int, shape: tuple[int, ...], whole: bool = False) -> Value:
        """A new constant, small numbers; sometimes those that are neutral in arithmetic."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        if element == T.BOOL:
            array = np.full(shape, self.flag())
        else:
            kind = self.choose(("one", "zero", "minus zero", "random", "random"))
            random = np.random.default_rng(self.number(0, 99))
            array = {"one": np.ones(shape), "zero": np.zeros(shape), "minus zero": -np.zeros(shape)}.get(kind)
            if array is None:
                array = random.integers(-3, 4, shape) if whole or element in INTEGERS else random.normal(size=shape)
        return Value(self.constant(np.asarray(array, dtype)), element, shape, whole or element in INTEGERS)

    def add(self, op: str, inputs: list[str], element: int, shape: tuple[int, ...], exact: bool = False,
            count: int = 1, **attributes: Any) -> Value:  # fmt: skip
        outputs = [f"t{next(self.counter)}" for _ in range(count)]
        name = f"n{next(self.counter)}" if self.flag() else ""
        self.nodes.append(onnx.helper.make_node(op, inputs, outputs, name=name, **attributes))
        made = [Value(output, element, shape, exact) for output in outputs]
        self.values += made
        return made[0]


def _unary(b: Builder) -> None:
    if (x := b.pick(*FLOATS)) is None:
        return
    op = b.choose(("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Identity", "Identity", "Softplus", "Erf", "Exp", "Sqrt"))
    if op in ("Exp", "Sqrt"):  # of bounded numbers: what overflows in one order of sums need not in another
        x = b.add("Sigmoid", [x.name], x.element, x.shape)
    exact = x.exact and op in ("Relu", "Neg", "Abs", "Identity")
    b.add(op, [x.name], x.element, x.shape, exact)


def _binary(b: Builder) -> None:
    if (x := b.pick(*FLOATS, *INTEGERS)) is None:
        return
    op = b.choose(("Add", "Sub", "Mul", "Max", "Min"))
    y = b.pick(x.element, where=lambda v: v.shape == x.shape) if b.flag() else None
    if y is None:
        shape = b.choose(({x.shape[k:] for k in range(x.rank + 1)} | {(1,) * x.rank}) or {()})
        y = b.filled(x.element, shape, whole=x.exact)
    if x.element in INTEGERS and op == "Mul":
        op = "Add"  # products of products overflow
    pair = [x.name, y.name] if b.flag() else [y.name, x.name]
    made = b.add(op, pair, x.element, x.shape, x.exact and y.exact)
    if made.element in FLOATS and op == "Mul":  # keeps chains of products small
        b.add("Tanh", [made.name], made.element, made.shape)


def _neutral(b: Builder) -> None:
    if (x := b.pick(*FLOATS, *INTEGERS)) is None:
        return
    op, value = b.choose((("Add", 0), ("Add", -0.0), ("Sub", 0), ("Mul", 1), ("Div", 1), ("Pow", 1)))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(x.element)
    if op == "Pow" and x.element not in (T.FLOAT, T.DOUBLE):
        return
    other = b.constant(np.full((1,) * b.number(0, x.rank), value, dtype))
    b.add(op, [x.name, other], x.element, x.shape, x.exact)


def _cast(b: Builder) -> None:
    if (x := b.pick(*ALL)) is None:
        return
    to = b.choose(ALL)
    if x.element in FLOATS and to not in FLOATS and not x.exact:
        return  # a rounding error could cross a whole number
    if x.element in INTEGERS and to == T.FLOAT16:
        return
    b.add("Cast", [x.name], to, x.shape, x.exact or x.element not in FLOATS, to=to)


def _reshape(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    kind = b.choose(("flat", "keep", "zeros", "merge", "from shape"))
    size = int(np.prod(x.shape))
    match kind:
        case "flat":
            target, asked = (size,), (-1,)
        case "keep":
            target, asked = x.shape, (-1, *x.shape[1:])
        case "zeros":
            target, asked = x.shape, tuple(0 for _ in x.shape)
        case "merge":
            target, asked = (x.shape[0], size // x.shape[0]), (0, -1)
        case _:
            shape = b.add("Shape", [x.name], T.INT64, (x.rank,), True)
            b.add("Reshape", [x.name, shape.name], x.element, x.shape, x.exact)
            return
    b.add("Reshape", [x.name, b.ints(*asked)], x.element, target, x.exact)


def _transpose(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    order = tuple(b.draw(st.permutations(range(x.rank))))
    b.add("Transpose", [x.name], x.element, tuple(x.shape[i] for i in order), x.exact, perm=order)


def _squeeze(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank < 4)) is None:
        return
    axis = b.number(0, x.rank)
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    wide = b.add("Unsqueeze", [x.name, b.ints(axis)], x.element, shape, x.exact)
    if b.flag():
        b.add("Squeeze", [wide.name, b.ints(axis)], x.element, x.shape, x.exact)


def _slice(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    axis = b.number(0, x.rank - 1)
    size = x.shape[axis]
    start, end, step = b.number(0, size - 1), b.choose((size, np.iinfo(np.int64).max, size - 1)), b.choose((1, 1, 2))
    length = len(range(size)[start : min(end, size) : step])
    if not length:
        return
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    inputs = [x.name, b.ints(start), b.ints(end), b.ints(axis)] + ([b.ints(step)] if step > 1 or b.flag() else [])
    b.add("Slice", inputs, x.element, shape, x.exact)


def _concat(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    axis = b.number(0, x.rank - 1)

    def fits(v: Value) -> bool:
        return v.rank == x.rank and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]

    parts = [x] + [p for _ in range(b.number(0, 2)) if (p := b.pick(x.element, where=fits)) is not None]
    shape = (*x.shape[:axis], sum(p.shape[axis] for p in parts), *x.shape[axis + 1 :])
    if int(np.prod(shape)) <= 4000:
        b.add("Concat", [p.name for p in parts], x.element, shape, all(p.exact for p in parts), axis=axis)


def _split(b: Builder) -> None:
    if (x := b.pick(*FLOATS, *INTEGERS, where=lambda v: v.rank > 0 and v.shape[-1] > 1)) is None:
        return
    first = b.number(1, x.shape[-1] - 1)
    sizes = (first, x.shape[-1] - first)
    names = [f"t{next(b.counter)}" for _ in sizes]
    b.nodes.append(onnx.helper.make_node("Split", [x.name, b.ints(*sizes)], names, axis=-1))
    made = [Value(name, x.element, (*x.shape[:-1], size), x.exact) for name, size in zip(names, sizes, strict=True)]
    b.values += made
    if b.flag():
        b.add("Concat", names, x.element, x.shape, x.exact, axis=x.rank - 1)


def _gather(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    axis = b.number(0, x.rank - 1)
    index = [b.number(-x.shape[axis], x.shape[axis] - 1) for _ in range(b.number(1, 3))]
    scalar = b.flag()
    indices = b.constant(np.array(index[0] if scalar else index, np.int64))
    shape = (*x.shape[:axis], *(() if scalar else (len(index),)), *x.shape[axis + 1 :])
    b.add("Gather", [x.name, indices], x.element, shape, x.exact, axis=axis)


def _expand(b: Builder) -> None:
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    if b.flag():
        b.add("Expand", [x.name, b.ints(*(1 for _ in x.shape))], x.element, x.shape, x.exact)
    else:
        repeats = [b.number(1, 2) for _ in x.shape]
        shape = tuple(s * r for s, r in zip(x.shape, repeats, strict=True))
        if int(np.prod(shape)) <= 4000:
            b.add("Tile", [x.name, b.ints(*repeats)], x.element, shape, x.exact)


def _pad(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, *INTEGERS, where=lambda v: v.rank > 0)) is None:
        return
    pads = [b.number(0, 1) for _ in range(2 * x.rank)]
    shape = tuple(s + pads[i] + pads[i + x.rank] for i, s in enumerate(x.shape))
    if int(np.prod(shape)) <= 4000:
        b.add("Pad", [x.name, b.ints(*pads)], x.element, shape, x.exact)


def _shape_arithmetic(b: Builder) -> None:
    """Sizes taken apart and put together again, as exporters write them."""
    if (x := b.pick(*ALL, where=lambda v: v.rank > 0)) is None:
        return
    shape = b.add("Shape", [x.name], T.INT64, (x.rank,), True)
    axis = b.number(0, x.rank - 1)
    size = b.add("Gather", [shape.name, b.constant(np.array(axis, np.int64))], T.INT64, (), True, axis=0)
    if b.flag():
        size = b.add("Mul", [size.name, b.constant(np.array(1, np.int64))], T.INT64, (), True)
    size = b.add("Unsqueeze", [size.name, b.ints(0)], T.INT64, (1,), True)
    parts = [b.ints(-1), size.name] if b.flag() else [size.name, b.ints(-1)]
    target = b.add("Concat", parts, T.INT64, (2,), True, axis=0)
    rest = int(np.prod(x.shape)) // x.shape[axis]
    result = (rest, x.shape[axis]) if parts[1] == size.name else (x.shape[axis], rest)
    b.add("Reshape", [x.name, target.name], x.element, result, x.exact)


def _reduce(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, T.DOUBLE, *INTEGERS, where=lambda v: v.rank > 0)) is None:
        return
    op = b.choose(("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"))
    if op == "ReduceMean" and x.element in INTEGERS:
        op = "ReduceSum"
    axis, keep = b.number(0, x.rank - 1), b.number(0, 1)
    shape = (*x.shape[:axis], *((1,) if keep else ()), *x.shape[axis + 1 :])
    exact = x.exact and op != "ReduceMean"
    if op == "ReduceSum" or b.opset >= 18:
        b.add(op, [x.name, b.ints(axis)], x.element, shape, exact, keepdims=keep)
    else:
        b.add(op, [x.name], x.element, shape, exact, keepdims=keep, axes=[axis])


def _arg_max(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, where=lambda v: v.rank > 0 and v.exact)) is None:
        return
    axis, keep = b.number(0, x.rank - 1), b.number(0, 1)
    shape = (*x.shape[:axis], *((1,) if keep else ()), *x.shape[axis + 1 :])
    b.add("ArgMax", [x.name], T.INT64, shape, True, axis=axis, keepdims=keep)


def _softmax(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, T.DOUBLE, where=lambda v: v.rank > 0)) is None:
        return
    b.add(b.choose(("Softmax", "LogSoftmax")), [x.name], x.element, x.shape, axis=b.number(-x.rank, x.rank - 1))


def _matmul(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, T.DOUBLE, where=lambda v: v.rank > 0)) is None:
        return
    columns, batch = b.choose((1, 3, 40)), b.choose(((), (), (2,)))
    if batch and x.rank != 1:
        batch = ()
    w = b.filled(x.element, (*batch, x.shape[-1], columns))
    b.add("MatMul", [x.name, w.name], x.element, (*batch, *x.shape[:-1], columns))


def _convolution(b: Builder) -> None:
    if (x := b.pick(T.FLOAT, where=lambda v: v.rank == 3 and v.shape[2] >= 3)) is None:
        return
    channels = b.choose((1, 4))
    w = b.filled(T.FLOAT, (channels, x.shape[1], 3))
    bias = [b.filled(T.FLOAT, (channels,)).name] if b.flag() else []
    y = b.add("Conv", [x.name, w.name, *bias], T.FLOAT, (x.shape[0], channels, x.shape[2]), pads=[1, 1])
    if b.flag():
        random = np.random.default_rng(b.number(0, 9))
        parts = [b.constant(random.uniform(0.5, 2, channels).astype(np.float32), False) for _ in range(4)]
        b.add("BatchNormalization", [y.name, *parts], T.FLOAT, y.shape)


def _layer_norm(b: Builder) -> None:
    """In the decomposed form, that a pass may fuse."""
    if (x := b.pick(T.FLOAT, where=lambda v: v.rank > 1 and v.shape[-1] > 2)) is None or b.opset < 18:
        return
    thin, axes = (*x.shape[:-1], 1), b.ints(-1)
    mean = b.add("ReduceMean", [x.name, axes], T.FLOAT, thin)
    centred = b.add("Sub", [x.name, mean.name], T.FLOAT, x.shape)
    two = b.constant(np.array(2, np.float32))
    square = b.add("Pow", [centred.name, two], T.FLOAT, x.shape)
    variance = b.add("ReduceMean", [square.name, axes], T.FLOAT, thin)
    safe = b.add("Add", [variance.name, b.constant(np.array(b.choose((1e-2, 0.1)), np.float32))], T.FLOAT, thin)
    root = b.add("Sqrt", [safe.name], T.FLOAT, thin)
    y = b.add("Div", [centred.name, root.name], T.FLOAT, x.shape)
    y = b.add("Mul", [y.name, b.filled(T.FLOAT, x.shape[-1:]).name], T.FLOAT, x.shape)
    b.add("Add", [y.name, b.filled(T.FLOAT, x.shape[-1:]).name], T.FLOAT, x.shape)


def _gelu(b: Builder) -> None:
    if (x := b.pick(T.FLOAT)) is None:
        return

    def scalar(value: float) -> str:
        return b.constant(np.array(value, np.float32))

    if b.flag():
        inner = b.add("Div", [x.name, scalar(2**0.5)], T.FLOAT, x.shape)
        inner = b.add("Erf", [inner.name], T.FLOAT, x.shape)
        inner = b.add("Add", [inner.name, scalar(1)], T.FLOAT, x.shape)
        inner = b.add("Mul", [x.name, inner.name], T.FLOAT, x.shape)
        b.add("Mul", [inner.name, scalar(0.5)], T.FLOAT, x.shape)
    else:
        gate = b.add("Sigmoid", [x.name], T.FLOAT, x.shape)
        b.add("Mul", [x.name, gate.name], T.FLOAT, x.shape)


def _where(b: Builder) -> None:
    x = b.pick(*FLOATS, *INTEGERS, where=lambda v: v.exact)
    if x is None:
        return
    op = b.choose(("Greater", "Less", "Equal", "GreaterOrEqual"))
    zero = b.constant(np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(x.element)))
    mask = b.add(op, [x.name, zero], T.BOOL, x.shape, True)
    if b.flag():
        mask = b.add("Not", [mask.name], T.BOOL, x.shape, True)
    if x.element in (T.FLOAT, T.DOUBLE, *INTEGERS):
        other = b.filled(x.element, (), whole=True)
        b.add("Where", [mask.name, x.name, other.name], x.element, x.shape, True)


def _reduce_bool(b: Builder) -> None:
    if (x := b.pick(T.BOOL, where=lambda v: v.rank > 0)) is None or b.opset < 20:
        return
    axis = b.number(0, x.rank - 1)
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    b.add(b.choose(("ReduceMax", "ReduceMin")), [x.name, b.ints(axis)], T.BOOL, shape, True)


def _dropout(b: Builder) -> None:
    if (x := b.pick(T.FLOAT)) is not None:
        b.add("Dropout", [x.name], T.FLOAT, x.shape, x.exact)


def _if(b: Builder) -> None:
    """Branches that read tensors of the outer graph; the condition is a constant or is not."""
    if (x := b.pick(T.FLOAT)) is None:
        return
    if b.flag():
        condition = b.constant(np.array(b.flag()))
    else:
        total = b.add("Size", [x.name], T.INT64, (), True)
        condition = b.add("Greater", [total.name, b.constant(np.array(5, np.int64))], T.BOOL, (), True).name

    def branch(kind: str, op: str) -> onnx.GraphProto:
        inner = f"b{next(b.counter)}"
        scale = onnx.numpy_helper.from_array(np.array(b.choose((1.0, 0.5)), np.float32), f"k{next(b.counter)}")
        nodes = [
            onnx.helper.make_node("Mul", [x.name, scale.name], [f"{inner}m"]),
            onnx.helper.make_node(op, [f"{inner}m"], [inner]),
        ]
        result = onnx.helper.make_tensor_value_info(inner, T.FLOAT, None)
        return onnx.helper.make_graph(nodes, kind, [], [result], [scale])

    branches = {f"{kind}_branch": branch(kind, b.choose(("Relu", "Identity", "Neg"))) for kind in ("then", "else")}
    b.add("If", [condition], T.FLOAT, x.shape, **branches)


STEPS = (
    _unary, _binary, _neutral, _cast, _reshape, _transpose, _squeeze, _slice, _concat, _split, _gather, _expand, _pad,
    _shape_arithmetic, _reduce, _arg_max, _softmax, _matmul, _convolution, _layer_norm, _gelu, _where, _reduce_bool,
    _dropout, _if,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A random model with the values it is run on."""

    proto: onnx.ModelProto
    weights: dict[str, ir.TensorProtocol]
    feeds: dict[str, np.ndarray]


@st.composite
def cases(draw: Any) -> Case:
    """A valid model of 1 to 12 steps, each of one or several nodes, with several outputs."""
    opset = draw(st.sampled_from((13, 17, 18, 20, 20, 22)))
    b = Builder(draw, opset)
    inputs, feeds = [], {}
    sizes: list[Any] = []
    for index in range(b.number(1, 2)):
        rank = b.number(1, 3)
        shape = tuple(b.number(1, 4) for _ in range(rank))
        declared: list[Any] = list(shape)
        if b.flag():
            shape, declared = (N, *shape[1:]), ["N", *shape[1:]]
        element = b.choose((T.FLOAT, T.FLOAT, T.FLOAT, T.FLOAT16, T.DOUBLE, T.INT64, T.INT32, T.BOOL))
        value = Value(f"x{index}", element, shape, element not in FLOATS or b.flag())
        random = np.random.default_rng(b.number(0, 99))
        array = random.integers(-3, 4, shape) if value.exact else random.normal(size=shape)
        feeds[value.name] = np.asarray(array).astype(onnx.helper.tensor_dtype_to_np_dtype(element))
        inputs.append(onnx.helper.make_tensor_value_info(value.name, element, declared))
        b.values.append(value)
        sizes += declared
    given = len(b.values)
    for _ in range(b.number(1, 12)):
        b.choose(STEPS)(b)
    hypothesis.assume(len(b.values) > given)
    made = b.values[given:]
    wanted = {v.name for v in (made[-1], *(b.choose(made) for _ in range(b.number(0, 2))))}
    # Sizes that may follow the dynamic one are left open.
    is_dynamic = any(isinstance(size, str) for size in sizes)
    outputs = [
        onnx.helper.make_tensor_value_info(v.name, v.element, [None] * v.rank if is_dynamic else v.shape)
        for v in made
        if v.name in wanted
    ]
    graph = onnx.helper.make_graph(b.nodes, "random", inputs, outputs, b.initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return Case(model, b.weights, feeds)


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(case=cases())
def test_the_default_pipeline_keeps_numbers(case: Case) -> None:
    hypothesis.note(onnx.printer.to_text(case.proto))
    try:
        expected = numbers.run(case.proto, case.weights, case.feeds)
    except Exception as error:  # ONNX Runtime has no kernel for some op in some type
        hypothesis.assume("NOT_IMPLEMENTED" not in str(error) and "Type Error" not in str(error))
        raise
    result = DEFAULT.run(case.proto, case.weights)
    actual = numbers.run(result.proto, result.weights, case.feeds)
    assert list(actual) == list(expected)
    same = {name: value.astype(expected[name].dtype) for name, value in actual.items()}
    assert numbers.difference(expected, same, TOLERANCE) is None
    for before, after in zip(
        (*case.proto.graph.input, *case.proto.graph.output),
        (*result.proto.graph.input, *result.proto.graph.output),
        strict=True,
    ):
        assert before.name == after.name
        known = before.type.tensor_type
        assert known.shape == after.type.tensor_type.shape or not known.HasField("shape")
        narrowed = before.type.tensor_type.elem_type == T.DOUBLE
        assert after.type.tensor_type.elem_type == (T.FLOAT if narrowed else before.type.tensor_type.elem_type)
    assert sum(w.nbytes for w in result.weights.values()) <= sum(w.nbytes for w in case.weights.values()) + (1 << 20)
    again = DEFAULT.run(result.proto, result.weights)
    assert again.proto.SerializeToString(deterministic=True) == result.proto.SerializeToString(deterministic=True)
    assert {name: again.weights[name] is weight for name, weight in result.weights.items()} == dict.fromkeys(
        result.weights, True
    )
    assert again.report.rewrites == 0
