"""Rules for what writes to, or picks, places that are known only when running."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .refused_fragment import FLOATS, CannotRewriteError, Fragment, need, need_type
from .surgery import is_standard, rank, sizes

_T = onnx.TensorProto
_MOST_ELEMENTS = 1 << 24
"""Of what is compared, which no engine need keep in memory, but which costs time."""

_REDUCTIONS = {"add": ("ReduceSum", "Add"), "mul": ("ReduceProd", "Mul"), "max": ("ReduceMax", "Max"),
               "min": ("ReduceMin", "Min")}  # fmt: skip
_NUMBERS = (*FLOATS, _T.INT32, _T.INT64)


def masked_put(f: Fragment) -> None:
    """NonZero -> Transpose -> ScatterND that writes one value to all places of a mask: a Where.

    ``x[mask] = value``, where value may have the sizes of the axes that the mask does not cover.
    """
    mask = f.node.inputs[0]
    need(f.element(0) == _T.BOOL, "it is not of bools")
    reader = f.node.outputs[0].outputs[0] if len(f.node.outputs[0].outputs) == 1 else None
    if reader is None or not is_standard(reader, "Transpose") or reader.attrs.get("perm") not in (None, [1, 0]):
        raise CannotRewriteError("the number of places depends on values")
    writers = [node for node in reader.outputs[0].outputs if is_standard(node, "ScatterND")]
    need(len(writers) == 1 == len(reader.outputs[0].outputs), "the number of places depends on values")
    scatter = writers[0]
    need(scatter.inputs[1] is reader.outputs[0], "its places are not where something is written")
    need(scatter.attrs.get("reduction", "none") == "none", "what is written is added")
    data, updates = scatter.inputs[0], scatter.inputs[2]
    covered, whole = rank(mask), rank(data)
    moved = False
    if covered is None or whole is None:
        raise CannotRewriteError("the ranks are not known")
    need(_alike(mask, data, covered), "mask and tensor may have other sizes")
    source = updates.inputs[0] if updates.inputs else None
    while source is not None and is_standard(source, "Reshape", "Unsqueeze", "Squeeze"):
        moved = True
        source = source.inputs[0].inputs[0] if source.inputs[0].inputs else None
    if source is None or not is_standard(source, "Expand"):
        raise CannotRewriteError("what is written differs from place to place")
    value = source.inputs[0]
    known = sizes(value)
    if known is None:
        raise CannotRewriteError("the ranks are not known")
    # The value may not vary along the places: it has no such axis, or one of size 1. One number may be moved about.
    rest = whole - covered
    single = all(size == 1 for size in known)
    fits = len(known) <= rest or (len(known) == rest + 1 and known[0] == 1)
    need(single or (fits and not moved), "what is written differs from place to place")
    f.node = scatter
    chosen, written = f.use(mask), f.use(value)
    if single and len(known) > rest:
        written = f.reshape(written, [])
    if whole > covered:
        chosen = f.unsqueeze(chosen, list(range(covered, whole)))
    f.result(f.op("Where", chosen, written, f.use(data)))


def _alike(mask: gs.Tensor, data: gs.Tensor, count: int) -> bool:
    """Whether the mask has the sizes of the tensor's first axes."""
    if mask.shape is None or data.shape is None:
        return False
    pairs = zip(mask.shape, data.shape[:count], strict=True)
    return all(a == b and a is not None for a, b in pairs)


def scatter_elements(f: Fragment) -> None:
    """ScatterElements that adds, multiplies or takes extremes: every place compares itself with all indices."""
    element = need_type(f, 0, _NUMBERS)
    kind = f.attr("reduction", "none")
    need(kind in _REDUCTIONS, "it overwrites, in an order that matters")
    count = f.rank(0)
    axis = int(f.attr("axis", 0)) % count
    data, places = f.fixed(0), f.fixed(1)
    others = [a for a in range(count) if a != axis]
    need(all(data[a] == places[a] for a in others), "its indices cover a part of the other axes")
    need(math.prod(data) * places[axis] <= _MOST_ELEMENTS, f"{data} places for {places} indices are too much work")
    order = [*others, axis]
    size = data[axis]
    indices = f.unsqueeze(f.transpose(_positive(f, f.input(1), f.element(1), size), order), [count - 1])
    updates = f.unsqueeze(f.transpose(f.input(2), order), [count - 1])
    row = f.const(np.arange(size)[:, None], np.int64)
    change = _combined(f, kind, f.op("Equal", indices, row), updates, count, element)
    base = f.transpose(f.input(0), order)
    f.result(f.transpose(f.op(_REDUCTIONS[kind][1], base, change), [order.index(a) for a in range(count)]))


def scatter_nd(f: Fragment) -> None:
    """ScatterND that adds, multiplies or takes extremes, as `scatter_elements` over flat places."""
    element = need_type(f, 0, _NUMBERS)
    kind = f.attr("reduction", "none")
    need(kind in _REDUCTIONS, "it overwrites, in an order that matters")
    data, indices = f.fixed(0), f.fixed(1)
    depth = indices[-1]
    places, inner, count = math.prod(data[:depth]), math.prod(data[depth:]), math.prod(indices[:-1])
    need(min(places, inner, count) > 0, "something of it is empty")
    need(places * inner * count <= _MOST_ELEMENTS, f"{places} places of {inner} for {count} indices are too much work")
    strides = [math.prod(data[axis + 1 : depth]) for axis in range(depth)]
    at = f.reshape(f.input(1), [count, depth])
    at = f.op("Where", f.op("Less", at, f.const(0)), f.op("Add", at, f.const(list(data[:depth]))), at)
    at = f.reduce("ReduceSum", f.op("Mul", at, f.const(strides)), [1])
    # (inner, places, count)
    equal = f.op("Equal", f.reshape(at, [1, 1, count]), f.const(np.arange(places).reshape(1, places, 1)))
    updates = f.unsqueeze(f.transpose(f.reshape(f.input(2), [count, inner]), [1, 0]), [1])
    change = f.transpose(_combined(f, kind, equal, updates, 2, element), [1, 0])
    combined = f.op(_REDUCTIONS[kind][1], f.reshape(f.input(0), [places, inner]), change)
    f.result(f.reshape(combined, data))


def compress(f: Fragment) -> None:
    """Compress by a constant condition: a Gather."""
    need(f.node.inputs[0].name != "", "it has no input")
    at = np.nonzero(f.values(1))[0]
    if "axis" in f.node.attrs:
        f.result(f.op("Gather", f.input(0), f.const(at, np.int64), axis=f.attr("axis")))
    else:
        f.result(f.op("Gather", f.reshape(f.input(0), [-1]), f.const(at, np.int64), axis=0))


def cumulative_product(f: Fragment) -> None:
    """CumProd: after step i each element is the product of the 2^i up to it (Hillis and Steele, 1986)."""
    need_type(f, 0, _NUMBERS)
    axis = int(f.values(1).reshape(()))
    f.result(products(f, axis, bool(f.attr("exclusive", 0)), bool(f.attr("reverse", 0))))


def aten_cumulative_product(f: Fragment) -> None:
    """aten::cumprod."""
    args, kwargs = f.call()
    need(len(args) == 2 and args[0] == {"tensor": 0} and isinstance(args[1], int), "it has other arguments")
    need(kwargs.get("dtype") is None and f.element(0) == f.output_element(), "it changes the type")
    need_type(f, 0, _NUMBERS)
    need(f.rank(0) > 0, "it is a scalar")
    f.result(products(f, args[1], False, False))


def products(f: Fragment, axis: int, exclusive: bool, reverse: bool) -> str:
    """Running products of the first input along an axis."""
    element = f.element(0)
    count = f.rank(0)
    axis %= count
    (size,) = f.fixed(0, [axis])
    x = f.input(0)

    def moved(tensor: str, by: int) -> str:
        """Ones come in at one end, elements fall out at the other."""
        before, after = [0] * count, [0] * count
        (after if reverse else before)[axis] = by
        padded = f.pad(tensor, before, after, 1, element)
        return f.slice(padded, axis, by, size + by) if reverse else f.slice(padded, axis, 0, size)

    if exclusive:
        x = moved(x, 1)
    step = 1
    while step < size:
        x = f.op("Mul", x, moved(x, step))
        step *= 2
    return x if f.nodes else f.op("Identity", x)


def _positive(f: Fragment, indices: str, element: int, size: int) -> str:
    wide = indices if element == _T.INT64 else f.cast(indices, _T.INT64)
    return f.op("Where", f.op("Less", wide, f.const(0)), f.op("Add", wide, f.const(size)), wide)


def _combined(f: Fragment, kind: str, chosen: str, updates: str, axis: int, element: int) -> str:
    """What all updates chosen for a place make together, along an axis."""
    return f.reduce(_REDUCTIONS[kind][0], f.op("Where", chosen, updates, _neutral(f, kind, element)), [axis])


def _neutral(f: Fragment, kind: str, element: int) -> str:
    if kind in ("add", "mul"):
        return f.scalar(0 if kind == "add" else 1, element)
    if element in FLOATS:
        return f.scalar(-math.inf if kind == "max" else math.inf, element)
    limits = np.iinfo(onnx.helper.tensor_dtype_to_np_dtype(element))
    value = limits.min if kind == "max" else limits.max
    return f.const(np.asarray(value, limits.dtype))
