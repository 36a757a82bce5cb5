"""Rules for torch ops that ONNX has no op for, in plugin nodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from .refused_fragment import FLOATS, Fragment, need, need_type
from .refused_transforms import fourier

_T = onnx.TensorProto
_MOST_DENSE_FLOPS = 4e9
"""About what a plugin between two engines costs in time, on a large GPU."""


def histc(f: Fragment) -> None:
    """aten::histc of integers: each bin holds a range of them, so it counts by comparing.

    The bin of v is (v - min) * bins // (max - min), that of max the last one, as CUDA computes it; torch has no CPU
    kernel for integers.
    """
    element = need_type(f, 0, (_T.INT32, _T.INT64))
    given = _given(f, ["self", "bins", "min", "max"], {"bins": 100, "min": 0, "max": 0})
    bins, low, high = given["bins"], given["min"], given["max"]
    need(all(isinstance(n, (int, float)) and n == int(n) for n in (low, high)), "its ends are no whole numbers")
    need(low < high, "its ends are those of the data")
    need(isinstance(bins, int) and 0 < bins <= 4096 and high - low <= 1 << 16, "it has too many bins")
    values = np.arange(int(low), int(high) + 1)
    at = np.minimum((values - int(low)) * bins // (int(high) - int(low)), bins - 1)
    starts = np.asarray([values[at == number].min(initial=int(high) + 1) for number in range(bins)])
    ends = np.asarray([values[at == number].max(initial=int(low) - 1) for number in range(bins)])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    x = f.unsqueeze(f.reshape(f.input(0), [-1]), [1])
    inside = f.op("Not", f.op("Less", x, f.const(starts.astype(dtype))))
    inside = f.op("And", inside, f.op("Not", f.op("Greater", x, f.const(ends.astype(dtype)))))
    f.result(f.cast(f.reduce("ReduceSum", f.cast(inside, _T.INT32), [0]), f.output_element()))


def grouped_mm(f: Fragment) -> None:
    """transformers::grouped_mm_fallback: rows of x (S, K) times the matrix of their group, of weights (G, K, N).

    Rows up to offs[0] belong to group 0, those up to offs[1] to group 1, ...; rows behind all groups give zeros.
    """
    element = need_type(f, 0, FLOATS)
    need(f.rank(0) == 2 and f.rank(1) == 3 and f.rank(2) == 1, "its inputs have other ranks")
    need(f.call()[0] == [{"tensor": 0}, {"tensor": 1}, {"tensor": 2}], "its arguments are not those expected")
    (rows,) = f.fixed(0, [0])
    groups, inner, columns = f.fixed(1)
    # Few rows read their own matrices, many are multiplied by all.
    flops = 2.0 * min(groups, rows) * rows * inner * columns
    need(flops <= _MOST_DENSE_FLOPS, f"{groups} groups of {inner} x {columns} for {rows} rows are too much work")
    ends = f.cast(f.input(2), _T.INT64)
    row = f.const(np.arange(rows)[:, None], np.int64)
    # (S, G): whether a group ends before or at a row; as many as do is the row's group.
    before = f.op("Not", f.op("Less", row, f.unsqueeze(ends, [0])))
    group = f.reduce("ReduceSum", f.cast(before, _T.INT32), [1], keepdims=True)
    x = f.input(0)
    if rows <= groups:
        within = f.op("Min", group, f.const([[groups - 1]], np.int32))
        picked = f.op("Gather", f.input(1), f.squeeze(within, [1]), axis=0)
        product = f.squeeze(f.op("MatMul", f.unsqueeze(x, [1]), picked), [1])
        has = f.op("Less", group, f.const([[groups]], np.int32))
        f.result(f.op("Where", has, product, f.scalar(0, element)))
        return
    product = f.op("MatMul", f.unsqueeze(x, [0]), f.input(1))
    mine = f.op("Equal", f.unsqueeze(group, [0]), f.const(np.arange(groups)[:, None, None], np.int32))
    f.result(f.reduce("ReduceSum", f.op("Where", mine, product, f.scalar(0, element)), [0]))


def attention(f: Fragment) -> None:
    """aten::scaled_dot_product_attention of any rank: softmax(q k^T * scale + mask) v."""
    element = need_type(f, 0, FLOATS)
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    given = _given(f, names, {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
                              "enable_gqa": False})  # fmt: skip
    need(not given["dropout_p"] and not given["enable_gqa"], "it drops, or groups its heads")
    query, key, value = (f.input(given[name]["tensor"]) for name in ("query", "key", "value"))
    rank = f.rank(given["query"]["tensor"])
    need(rank == f.rank(given["key"]["tensor"]) and rank >= 2, "its inputs have several ranks")
    scale = given["scale"]
    if scale is None:
        scale = 1 / math.sqrt(f.fixed(given["query"]["tensor"], [rank - 1])[0])
    need(isinstance(scale, (int, float)) and scale > 0, "its scale is no positive number")
    root = f.scalar(math.sqrt(scale), element)  # on both sides, so that half precision does not overflow
    swapped = f.transpose(key, [*range(rank - 2), rank - 1, rank - 2])
    scores = f.op("MatMul", f.op("Mul", query, root), f.op("Mul", swapped, root))
    if given["is_causal"]:
        (length,), (keys,) = (f.fixed(given[n]["tensor"], [rank - 2]) for n in ("query", "key"))
        visible = f.const(np.tril(np.ones((length, keys), bool)))
        scores = f.op("Where", visible, scores, f.scalar(-math.inf, element))
    if given["attn_mask"] is not None:
        index = given["attn_mask"]["tensor"]
        lowest = f.scalar(-math.inf, element)
        if f.element(index) == _T.BOOL:
            scores = f.op("Where", f.input(index), scores, lowest)
        else:
            need(f.element(index) == element, "its mask has another type")
            scores = f.op("Add", scores, f.input(index))
        # A row that sees nothing gives zeros.
        blind = f.op("Equal", f.reduce("ReduceMax", scores, [rank - 1], keepdims=True), lowest)
        weights = f.op("Where", blind, f.scalar(0, element), f.op("Softmax", scores, axis=-1))
    else:
        weights = f.op("Softmax", scores, axis=-1)
    f.result(f.op("MatMul", weights, value))


def bucketize(f: Fragment) -> None:
    """aten::bucketize, aten::searchsorted: how many boundaries come before each value."""
    given = _given(f, ["a", "b"], {"out_int32": False, "right": False, "side": None, "sorter": None})
    need((given["a"], given["b"]) == ({"tensor": 0}, {"tensor": 1}), "its arguments are not those expected")
    need(given["sorter"] is None, "its boundaries are not in order")
    values, bounds = (1, 0) if "searchsorted" in f.attr("op") else (0, 1)
    need(f.element(values) == f.element(bounds), "values and boundaries have several types")
    need_type(f, values, (*FLOATS, _T.INT32, _T.INT64))
    rank, lines = f.rank(values), f.rank(bounds)
    need(lines == 1 or lines == rank, "boundaries and values have several ranks")
    need(f.opset >= 12, "this opset has no GreaterOrEqual")
    rows = f.unsqueeze(f.input(bounds), [lines - 1]) if lines > 1 else f.input(bounds)
    # Asked the other way round, so that a NaN comes behind all boundaries, as in torch.
    behind = "Greater" if given["right"] or given["side"] == "right" else "GreaterOrEqual"
    before = f.op("Not", f.op(behind, rows, f.unsqueeze(f.input(values), [rank])))
    f.result(f.cast(f.reduce("ReduceSum", f.cast(before, _T.INT32), [rank]), f.output_element()))


def fft(f: Fragment) -> None:
    """aten::fft_{fft,ifft,fft2,ifft2,fftn,ifftn} of float32: one transform an axis."""
    kind = f.attr("op").removeprefix("aten::fft_").removesuffix(".default")
    many = kind.endswith(("2", "n"))
    defaults: dict[str, Any] = {"s": None, "dim": [-2, -1] if kind.endswith("2") else None, "norm": None}
    names = ["self", "s", "dim", "norm"]
    if not many:
        names[1], defaults = "n", {"n": None, "dim": -1, "norm": None}
    given = _given(f, names, defaults)
    is_complex = given["self"] == {"complex": 0}
    need_type(f, 0, (_T.FLOAT,))
    rank = f.rank(0) + (0 if is_complex else 1)
    sizes = given["s"] if many else given["n"]
    lengths = sizes if many or sizes is None else [sizes]
    dims = given["dim"] if many else [given["dim"]]
    if dims is None:
        dims = list(range(rank - 1 - len(lengths), rank - 1)) if lengths else list(range(rank - 1))
    axes = [axis + rank - 1 if axis < 0 else axis for axis in dims]
    need(len(set(axes)) == len(axes), "it has an axis twice")
    known = f.fixed(0, axes)
    lengths = [
        size if n is None or n == -1 else n for n, size in zip(lengths or [None] * len(axes), known, strict=True)
    ]
    need(all(isinstance(n, int) for n in lengths), "its lengths are no numbers")
    inverse = kind.startswith("i")
    power = {None: 1.0 if inverse else 0.0, "backward": 1.0 if inverse else 0.0, "ortho": 0.5,
             "forward": 0.0 if inverse else 1.0}[given["norm"]]  # fmt: skip
    x, pair = (f.input(0), 2) if is_complex else (f.unsqueeze(f.input(0), [rank - 1]), 1)
    for axis, size, length in zip(reversed(axes), reversed(known), reversed(lengths), strict=True):
        x = fourier(f, x, (rank, axis, pair), (size, length, inverse, False, length**-power))
        pair = 2
    f.result(x)


def extreme(f: Fragment) -> None:
    """aten::amax, aten::amin, aten::aminmax, over some axes or all."""
    need_type(f, 0, (*FLOATS, _T.INT32, _T.INT64))
    name = f.attr("op").removeprefix("aten::").removesuffix(".default")
    given = _given(f, ["self", "dim", "keepdim"], {"dim": None, "keepdim": False})
    rank = f.rank(0)
    need(rank > 0, "a scalar is its own extreme")
    axes = given["dim"] if isinstance(given["dim"], list) else [given["dim"]] if given["dim"] is not None else []
    axes = [axis + rank if axis < 0 else axis for axis in axes] or list(range(rank))
    ops = {"amax": ["ReduceMax"], "amin": ["ReduceMin"], "aminmax": ["ReduceMin", "ReduceMax"]}[name]
    for index, op in enumerate(ops):
        f.result(f.reduce(op, f.input(0), axes, bool(given["keepdim"])), index)


def _given(f: Fragment, names: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    args, kwargs = f.call()
    found = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    known = len(args) <= len(names) and found.keys() == {*names, *defaults}
    need(known, "its arguments are not those expected")
    return found
