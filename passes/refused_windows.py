"""Rules for pooling and for Col2Im: windows are read by constant indices, one axis after the other.

Where an axis has fixed size, the elements of every window are known before running, as an array of indices
(windows, elements). Gather along the axis then puts each window's elements side by side and a reduction takes them away
again. That is exact, whatever the windows: dilated, padded, or of several sizes as in adaptive pooling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx

from .refused_fragment import FLOATS, CannotRewriteError, Fragment, need, need_type

_T = onnx.TensorProto
Windows = Sequence[np.ndarray]
"""For each axis int64 indices (windows, elements); -1 for an element outside."""

_SUMMABLE = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE, _T.INT32, _T.INT64)


def col2im(f: Fragment) -> None:
    """Sum of overlapping blocks: each pixel gathers what is added to it, a slot of zeros where that is less."""
    element = need_type(f, 0, _SUMMABLE)
    image = [int(size) for size in f.values(1)]
    block = [int(size) for size in f.values(2)]
    count = len(image)
    strides, dilations = f.attr("strides", [1] * count), f.attr("dilations", [1] * count)
    pads = f.attr("pads", [0] * 2 * count)
    need(f.rank(0) == 3, "the input has no batch axis")
    # Position in the image of (element of the block, place of the block), axis by axis, row-major in both.
    target: np.ndarray = np.zeros((1, 1), np.int64)
    inside: np.ndarray = np.ones((1, 1), bool)
    for axis in range(count):
        reach = dilations[axis] * (block[axis] - 1) + 1
        places = (image[axis] + pads[axis] + pads[count + axis] - reach) // strides[axis] + 1
        need(places > 0, "no block fits into the image")
        at = (np.arange(block[axis]) * dilations[axis])[:, None] + np.arange(places) * strides[axis] - pads[axis]
        valid = (at >= 0) & (at < image[axis])
        target = (target[:, None, :, None] * image[axis] + at[None, :, None, :]).reshape(len(target) * len(at), -1)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).reshape(len(inside) * len(at), -1)
    sources = target.size
    pixels = math.prod(image)
    flat = np.where(inside, target, pixels).reshape(-1)
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=pixels + 1)[:pixels]
    most = max(1, int(counts.max(initial=1)))
    need(pixels * most * 4 <= 4 << 20, f"its table of {pixels} x {most} indices is too large")
    table = np.full((pixels, most), sources, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for position in range(most):
        rows = np.nonzero(counts > position)[0]
        table[rows, position] = order[starts[rows] + position]
    x = f.reshape(f.input(0), [0, -1, sources])
    if (counts < most).any():
        x = f.pad(x, [0, 0, 0], [0, 0, 1], 0, element)
    if most == 1:
        x = f.op("Gather", x, f.const(table[:, 0]), axis=2)
    else:
        x = f.reduce("ReduceSum", f.op("Gather", x, f.const(table), axis=2), [3])
    f.result(f.reshape(x, [0, 0, *image]))


def max_pool(f: Fragment) -> None:
    """MaxPool with dilations, or whose indices are read."""
    need_type(f, 0, (*FLOATS, _T.INT8, _T.INT32))
    windows = _pool_windows(f)
    rank = f.rank(0)
    if not f.is_read(1):
        f.result(_maximum(f, windows))
        return
    need(f.attr("storage_order", 0) == 0, "its indices are column-major")
    values, local = _maximum_with_index(f, windows)
    f.result(values)
    # ONNX counts through the whole tensor, batch and channels included.
    planes = f.fixed(0, [0, 1])
    offset = np.arange(math.prod(planes)).reshape(*planes, *[1] * (rank - 2)) * math.prod(f.fixed(0, range(2, rank)))
    f.result(f.op("Add", f.cast(local, _T.INT64), f.const(offset, np.int64)), 1)


def average_pool(f: Fragment) -> None:
    """AveragePool with dilations, or with a window that is too large."""
    need_type(f, 0, FLOATS)
    windows = _pool_windows(f)
    # What lies behind the end because of ceil_mode is no padding, and never counts.
    padded = any(f.attr("pads") or ()) or f.attr("auto_pad", "NOTSET").startswith("SAME")
    include = bool(f.attr("count_include_pad", 0)) and padded
    f.result(_mean(f, windows, _counted(f, windows) if include else None))


def lp_pool(f: Fragment) -> None:
    """LpPool of any p: the p-th root of sums of powers."""
    element = need_type(f, 0, FLOATS)
    windows = _pool_windows(f)
    p = int(f.attr("p", 2))
    powers = f.op("Pow", f.op("Abs", f.input(0)), f.scalar(p, element))
    total = _total(f, powers, f.rank(0) - len(windows), windows, element)
    f.result(f.op("Pow", total, f.scalar(1 / p, element)))


def adaptive_average_pool(f: Fragment) -> None:
    """aten::adaptive_avg_pool{1,2,3}d: windows from floor(i*n/m) to ceil((i+1)*n/m)."""
    need_type(f, 0, FLOATS)
    f.result(_mean(f, _adaptive_windows(f), None))


def adaptive_max_pool(f: Fragment) -> None:
    """aten::adaptive_max_pool{1,2,3}d; indices count within one plane."""
    need_type(f, 0, FLOATS)
    windows = _adaptive_windows(f)
    if f.is_read(1):
        values, local = _maximum_with_index(f, windows)
        f.result(f.cast(local, _T.INT64), 1)
    else:
        values = _maximum(f, windows)
    f.result(values)


def _adaptive_windows(f: Fragment) -> Windows:
    args, kwargs = f.call()
    need(not kwargs and len(args) == 2 and args[0] == {"tensor": 0}, "its arguments are not those expected")
    wanted = args[1] if isinstance(args[1], list) else [args[1]]
    need(all(isinstance(size, int) for size in wanted), "its output size is no number")
    rank = f.rank(0)
    # Unbatched input has no batch axis; the pooled axes are the last ones either way.
    known = f.fixed(0, range(rank - len(wanted), rank))
    windows = []
    for size, parts in zip(known, wanted, strict=True):
        starts = [i * size // parts for i in range(parts)]
        ends = [-(-(i + 1) * size // parts) for i in range(parts)]
        longest = max((end - start for start, end in zip(starts, ends, strict=True)), default=0)
        need(longest > 0, "it makes an empty result")
        at = np.asarray(starts)[:, None] + np.arange(longest)
        windows.append(np.where(at < np.asarray(ends)[:, None], at, -1))
    return windows


def _pool_windows(f: Fragment) -> Windows:
    """The windows of a pooling node."""
    kernel = f.attr("kernel_shape")
    count = len(kernel)
    known = f.fixed(0, range(2, f.rank(0)))
    need(len(known) == count, "the kernel has another rank than the input")
    strides, dilations = f.attr("strides") or [1] * count, f.attr("dilations") or [1] * count
    pads = f.attr("pads") or [0] * 2 * count
    mode = f.attr("auto_pad", "NOTSET")
    found = []
    for axis, size in enumerate(known):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        before, after = pads[axis], pads[count + axis]
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            extra = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + reach - size)
            before = extra // 2 if mode == "SAME_UPPER" else extra - extra // 2
            after = extra - before
        elif mode == "VALID":
            before = after = 0
        free = size + before + after - reach
        places = (-(-free // strides[axis]) if f.attr("ceil_mode", 0) else free // strides[axis]) + 1
        if f.attr("ceil_mode", 0) and (places - 1) * strides[axis] >= size + before:
            places -= 1  # a window must not begin in the padding behind
        need(places > 0, "no window fits")
        at = np.arange(places)[:, None] * strides[axis] - before + np.arange(kernel[axis]) * dilations[axis]
        found.append(np.where((at >= 0) & (at < size), at, -1))
    return found


def _counted(f: Fragment, windows: Windows) -> list[np.ndarray]:
    """How many elements each window has, axis by axis, those in the padding included."""
    need(not f.attr("ceil_mode", 0), "with ceil_mode implementations count padding differently")
    return [np.full(len(at), at.shape[1]) for at in windows]


def _gather(f: Fragment, x: str, axis: int, at: np.ndarray) -> str:
    return f.op("Gather", x, f.const(at, np.int32), axis=axis)


def _inside(at: np.ndarray) -> np.ndarray:
    """Windows whose elements outside are others inside, in an order that keeps the first of equal ones first."""
    if (at < 0).all(axis=1).any():
        raise CannotRewriteError("a window lies in the padding")
    first = np.where(at >= 0, at, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    last = at.max(axis=1, keepdims=True)
    leading = np.cumsum(at >= 0, axis=1) == 0
    return np.where(at >= 0, at, np.where(leading, first, last))


def _maximum(f: Fragment, windows: Windows) -> str:
    x = f.input(0)
    for axis, at in enumerate(windows, start=f.rank(0) - len(windows)):
        if at.shape[1] == 1:
            x = f.op("Gather", x, f.const(_inside(at)[:, 0], np.int32), axis=axis)
        else:
            x = f.reduce("ReduceMax", _gather(f, x, axis, _inside(at)), [axis + 1])
    return x


def _maximum_with_index(f: Fragment, windows: Windows) -> tuple[str, str]:
    """Maxima, and the int32 positions of the first of them within the pooled axes.

    It compares rather than taking an ArgMax: which of equal values that takes is not the same everywhere.
    """
    rank, count = f.rank(0), len(windows)
    lead = rank - count
    sizes = f.fixed(0, range(lead, rank))
    need(rank + count <= 8, "its windows would take more than eight axes")
    x = f.input(0)
    for number, at in enumerate(windows):
        x = _gather(f, x, lead + 2 * number, _inside(at))
    places = [lead + 2 * number for number in range(count)]
    inner = [place + 1 for place in places]
    x = f.transpose(x, [*range(lead), *places, *inner])
    axes = list(range(rank, rank + count))
    values = f.reduce("ReduceMax", x, axes, keepdims=True)
    # The position of every element of every window, (windows..., elements...).
    position = np.zeros([1] * 2 * count, np.int64)
    for number, (at, size) in enumerate(zip(windows, sizes, strict=True)):
        shape = [1] * 2 * count
        shape[number], shape[count + number] = at.shape
        position = position * size + _inside(at).reshape(shape)
    large = math.prod(sizes)
    table = f.const(position, np.int32)
    # A NaN is equal to nothing; its position then is that of the last element.
    at_maximum = f.op("Where", f.op("Equal", x, values), table, f.const(large - 1, np.int32))
    return f.squeeze(values, axes), f.reduce("ReduceMin", at_maximum, axes)


def _total(f: Fragment, x: str, lead: int, windows: Windows, element: int) -> str:
    """Sums over windows; elements outside count as zero."""
    rank = lead + len(windows)
    for axis, at in enumerate(windows, start=lead):
        (size,) = f.fixed(0, [axis])
        if len(at) == 1 and np.array_equal(at[at >= 0], np.arange(size)):  # one window over all
            x = f.reduce("ReduceSum", x, [axis], keepdims=True)
            continue
        if (at < 0).any():
            after = [0] * rank
            after[axis] = 1
            x = f.pad(x, [0] * rank, after, 0, element)
            at = np.where(at < 0, size, at)
        x = f.reduce("ReduceSum", _gather(f, x, axis, at), [axis + 1])
    return x


def _mean(f: Fragment, windows: Windows, counts: Sequence[np.ndarray] | None) -> str:
    element = f.element(0)
    total = _total(f, f.input(0), f.rank(0) - len(windows), windows, element)
    counts = counts or [(at >= 0).sum(axis=1) for at in windows]
    number = np.ones((), np.int64)
    for each in counts:
        number = number[..., None] * each
    need(bool((number > 0).all()), "a window lies in the padding")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if number.min() == number.max():
        return f.op("Div", total, f.const(np.asarray(number.min()).astype(dtype)))
    return f.op("Div", total, f.const(number.astype(dtype)))
