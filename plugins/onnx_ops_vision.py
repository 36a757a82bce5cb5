"""ONNX ops on images: pooling with indices, unpooling, sampling, regions, deformable convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from .onnx_call import (
    Implementation,
    NodeCall,
    NotHereError,
    Result,
    compute_type,
    pad,
    spatial,
    window_pads,
)
from .onnx_resize import resize


def max_pool(call: NodeCall) -> Result:
    """MaxPool of 1 to 3 axes with dilations, any padding, and indices into the flattened input."""
    x = call.tensor(0)
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise NotHereError
    kernel, strides, dilations = spatial(call, rank)
    sizes = x.shape[2:]
    pads = window_pads(call, sizes, kernel, strides, dilations)
    if call.attribute("ceil_mode", 0):
        pads = [
            (begin, end + _ceil_extra(size + begin + end, window, stride, dilation, size + begin))
            for (begin, end), size, window, stride, dilation in zip(
                pads, sizes, kernel, strides, dilations, strict=True
            )
        ]
    dtype = x.dtype
    if not dtype.is_floating_point:
        if dtype.itemsize > 1:
            raise NotHereError
        x = x.float()  # exact for 8 bits
    x = x.to(compute_type(x.dtype, x.device)) if x.device.type == "cpu" else x
    padded = pad(x, pads, -math.inf)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    if call.outputs < 2:
        return pool(padded, kernel, strides, 0, dilations).to(dtype)
    values, places = pool(padded, kernel, strides, 0, dilations, return_indices=True)
    indices = _unpad_indices(places, padded.shape[2:], sizes, [begin for begin, _ in pads])
    if call.attribute("storage_order", 0):
        indices = _column_major(indices, sizes)
    whole = math.prod(sizes)
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * rank)
    return values.to(dtype), indices + planes * whole


def _ceil_extra(padded: Any, window: int, stride: int, dilation: int, last_start: Any) -> Any:
    """How much longer an axis must be for the last window to fit; no window starts in the end's padding."""
    reach = dilation * (window - 1) + 1
    steps = (padded - reach + stride - 1) // stride + 1
    if (steps - 1) * stride >= last_start:
        steps -= 1
    return max((steps - 1) * stride + reach - padded, 0)


def _unpad_indices(
    places: torch.Tensor, padded: Sequence[Any], sizes: Sequence[Any], begins: Sequence[Any]
) -> torch.Tensor:
    """Flat places in padded planes as flat places in the planes themselves."""
    result = torch.zeros_like(places)
    scale: Any = 1
    for axis in reversed(range(len(sizes))):
        result = result + (places % padded[axis] - begins[axis]) * scale
        places = places // padded[axis]
        scale = scale * sizes[axis]
    return result


def _column_major(places: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    parts = []
    for size in reversed(sizes):
        parts.append(places % size)
        places = places // size
    result = torch.zeros_like(places)
    for size, part in zip(reversed(sizes), parts, strict=True):  # the first axis changes fastest
        result = result * size + part
    return result


def max_unpool(call: NodeCall) -> Result:
    """MaxUnpool. Indices count in the shape that the attributes give; a larger output_shape is filled with zeros."""
    x, indices = call.tensor(0), call.tensor(1)
    rank = x.dim() - 2
    kernel, strides, _ = spatial(call, rank)
    pads = call.attribute("pads", [0] * (2 * rank))
    inferred = [
        (size - 1) * stride - pads[axis] - pads[axis + rank] + window
        for axis, (size, stride, window) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    shape = [*x.shape[:2], *inferred]
    flat = torch.zeros(math.prod(shape), dtype=x.dtype, device=x.device)
    result = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(shape)
    if call.has(2):
        target = call.ints(2)
        result = pad(result, [(0, t - s) for t, s in zip(target, shape, strict=True)])
    return result


def col2im(call: NodeCall) -> Result:
    """Col2Im over any number of axes: blocks that overlap are added up."""
    x = call.tensor(0)
    image, block = call.ints(1), call.ints(2)
    rank = len(image)
    ones = [1] * rank
    strides, dilations = call.attribute("strides", ones), call.attribute("dilations", ones)
    pads = call.attribute("pads", [0] * (2 * rank))
    padded = [image[axis] + pads[axis] + pads[axis + rank] for axis in range(rank)]
    steps = [(padded[a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1 for a in range(rank)]
    device = x.device
    # The flat place in the padded image of each (block element, step).
    place = torch.zeros((), dtype=torch.int64, device=device)
    for axis in range(rank):
        inside = torch.arange(block[axis], device=device) * dilations[axis]
        start = torch.arange(steps[axis], device=device) * strides[axis]
        view = [1] * (2 * rank)
        view[axis], view[rank + axis] = block[axis], steps[axis]
        place = place * padded[axis] + (inside[:, None] + start[None, :]).reshape(view)
    count = math.prod(block)
    values = x.to(compute_type(x.dtype, device)).reshape(x.shape[0], x.shape[1] // count, -1)
    canvas = values.new_zeros(values.shape[0], values.shape[1], math.prod(padded))
    filled = canvas.index_add(2, place.reshape(-1), values)
    result = filled.reshape(values.shape[0], values.shape[1], *padded)
    for axis in range(rank):
        result = result.narrow(2 + axis, pads[axis], image[axis])
    return result.to(x.dtype).contiguous()


def grid_sample(call: NodeCall) -> Result:
    """GridSample over two or three axes."""
    x, grid = call.tensor(0), call.tensor(1)
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call.attribute("mode", "linear"), call.attribute("mode", ""))
    if x.dim() not in (4, 5) or (x.dim() == 5 and mode == "bicubic") or not x.is_floating_point():
        raise NotHereError
    work = compute_type(x.dtype, x.device)
    padding = call.attribute("padding_mode", "zeros")
    aligned = bool(call.attribute("align_corners", 0))
    return functional.grid_sample(x.to(work), grid.to(work), mode, padding, aligned).to(x.dtype)


def affine_grid(call: NodeCall) -> Result:
    """AffineGrid over two or three axes."""
    theta = call.tensor(0)
    work = compute_type(theta.dtype, theta.device)
    grid = functional.affine_grid(theta.to(work), call.ints(1), bool(call.attribute("align_corners", 0)))
    return grid.to(theta.dtype)


def center_crop_pad(call: NodeCall) -> Result:
    """CenterCropPad: along each axis the middle, or zeros on both sides."""
    x, target = call.tensor(0), call.ints(1)
    axes = [axis % x.dim() for axis in call.attribute("axes", range(x.dim()))]
    pads = [(0, 0)] * x.dim()
    for axis, size in zip(axes, target, strict=True):
        have = x.shape[axis]
        if have > size:
            x = x.narrow(axis, (have - size) // 2, size)
        elif have < size:
            begin = (size - have) // 2
            pads[axis] = (begin, size - have - begin)
    return pad(x, pads)


def deform_conv(call: NodeCall) -> Result:
    """DeformConv over two axes (arXiv 1811.11168), by the op ``trtbridge::deform_conv2d``."""
    x, weight, offset = call.tensor(0), call.tensor(1), call.tensor(2)
    if x.dim() != 4:
        raise NotHereError
    from . import deformable_convolution  # noqa: F401  its import registers the op

    kernel = list(call.attribute("kernel_shape", weight.shape[2:]))
    ones = [1, 1]
    strides, dilations = list(call.attribute("strides", ones)), list(call.attribute("dilations", ones))
    top, left, bottom, right = call.attribute("pads", [0] * 4)
    if kernel != list(weight.shape[2:]):
        raise NotHereError
    if (top, left) != (bottom, right):
        # Outside of the image is zero, so zeros around it change nothing.
        x, top, left = pad(x, [(top, bottom), (left, right)]), 0, 0
    groups = (int(call.attribute("group", 1)), int(call.attribute("offset_group", 1)))
    return torch.ops.trtbridge.deform_conv2d(  # type: ignore[no-any-return]
        x, weight, offset, call.maybe(4), call.maybe(3), strides, [top, left], dilations, *groups
    )


def roi_align(call: NodeCall) -> Result:
    """RoiAlign (arXiv 1703.06870), average or maximum of bilinear samples.

    The maximum is taken over the four weighted corners of every sample, as the ONNX standard's reference does. Where
    sampling_ratio is 0 each region has as many samples as its size needs: all get the most that any has, and masks.
    """
    x, rois, batch = call.tensor(0), call.tensor(1), call.tensor(2).long()
    height, width = int(call.attribute("output_height", 1)), int(call.attribute("output_width", 1))
    # Before opset 16 there was no half pixel.
    default = "half_pixel" if call.opset >= 16 else "output_half_pixel"
    half = call.attribute("coordinate_transformation_mode", default) == "half_pixel"
    dtype = x.dtype
    x, rois = x.to(compute_type(dtype, x.device)), rois.to(compute_type(rois.dtype, x.device))
    corners = rois * call.attribute("spatial_scale", 1.0) - (0.5 if half else 0.0)
    start = corners[:, :2].flip(1)  # y, x
    extent = corners[:, 2:].flip(1) - start
    if not half:
        extent = extent.clamp(min=1.0)
    ratio = int(call.attribute("sampling_ratio", 0))
    grid = _counts(extent, height, width, ratio)
    most = [ratio, ratio] if ratio > 0 else [max(1, int(m)) for m in grid.amax(0).tolist()] if len(rois) else [1, 1]
    lines = []
    for axis, (size, count) in enumerate(zip((height, width), most, strict=True)):
        bin_size = extent[:, axis] / size
        sample = torch.arange(count, device=x.device, dtype=x.dtype) + 0.5
        offsets = sample[None, :] * (bin_size / grid[:, axis])[:, None]
        bin_start = start[:, axis, None] + torch.arange(size, device=x.device, dtype=x.dtype) * bin_size[:, None]
        lines.append(_line(bin_start[:, :, None] + offsets[:, None, :], x.shape[2 + axis]))
    masks = [torch.arange(most[a], device=x.device)[None, :] < grid[:, a, None] for a in range(2)]
    return _pool(x, batch, lines, masks, grid, call.attribute("mode", "avg") == "max").to(dtype)


def _counts(extent: torch.Tensor, height: int, width: int, ratio: int) -> torch.Tensor:
    """Samples of a bin in y and x, (rois, 2)."""
    if ratio > 0:
        return torch.full_like(extent, ratio)
    return torch.ceil(torch.stack((extent[:, 0] / height, extent[:, 1] / width), 1))


_Line = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _line(at: torch.Tensor, size: Any) -> _Line:
    """Along one axis: lower and upper neighbour and their weights; weights outside of the image are 0."""
    inside = (at >= -1.0) & (at <= size)
    at = at.clamp(min=0)
    low = at.floor().long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    upper = torch.where(low >= size - 1, torch.zeros_like(at), at - low)
    return low, high, (1 - upper) * inside, upper * inside


def _pool(
    x: torch.Tensor, batch: torch.Tensor, lines: Sequence[_Line], masks: Sequence[torch.Tensor], grid: torch.Tensor,
    largest: bool,
) -> torch.Tensor:  # fmt: skip
    rows, columns = lines
    channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None, None, None]
    which = batch[:, None, None, None, None, None]

    def corner(i: int, j: int) -> torch.Tensor:
        """(rois, channels, height, samples, width, samples) weighted values."""
        y, across = rows[i][:, None, :, :, None, None], columns[j][:, None, None, None, :, :]
        weight = rows[i + 2][:, None, :, :, None, None] * columns[j + 2][:, None, None, None, :, :]
        return x[which, channel, y, across] * weight

    mask = masks[0][:, None, None, :, None, None] & masks[1][:, None, None, None, None, :]
    if largest:
        values = torch.stack([corner(i, j) for i in (0, 1) for j in (0, 1)]).amax(0)
        best = torch.where(mask, values, -math.inf).amax((3, 5))
        return torch.where(best == -math.inf, torch.zeros_like(best), best)
    values = corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)
    count = grid.prod(1).clamp(min=1)[:, None, None, None]
    return torch.where(mask, values, torch.zeros_like(values)).sum((3, 5)) / count


def fake_roi_align(call: NodeCall) -> Result:
    """The shape of RoiAlign's result; how many samples it takes depends on data."""
    height, width = int(call.attribute("output_height", 1)), int(call.attribute("output_width", 1))
    x = call.tensor(0)
    return x.new_empty(call.tensor(1).shape[0], x.shape[1], height, width)


OPS: Mapping[str, Implementation] = {
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
    "Col2Im": col2im,
    "GridSample": grid_sample,
    "AffineGrid": affine_grid,
    "CenterCropPad": center_crop_pad,
    "DeformConv": deform_conv,
    "RoiAlign": roi_align,
    "Resize": resize,
}

FAKES: Mapping[str, Implementation] = {"RoiAlign": fake_roi_align}
