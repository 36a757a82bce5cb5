"""ONNX Resize, of all modes: interpolation is separable, so each axis is a product with a small matrix.

The matrices follow the definition in the ONNX standard (Resize, versions 11 to 19): the coordinate of each output
element in the input, the kernel around it, its weights. They are made on the host, once for each node and pair of
sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from .onnx_call import NodeCall, NotHereError, Result, compute_type


def resize(call: NodeCall) -> Result:
    """Resize by scales or sizes; nearest, linear and cubic, with antialiasing."""
    x = call.tensor(0)
    if call.opset < 11 or not x.is_floating_point() or any(not isinstance(size, int) for size in x.shape):
        raise NotHereError
    rank = x.dim()
    axes = [axis % rank for axis in call.attribute("axes", range(rank))]
    by_sizes = call.has(3) and call.tensor(3).numel() > 0
    if by_sizes:
        sizes = dict(zip(axes, call.ints(3), strict=True))
        scales = {axis: size / x.shape[axis] for axis, size in sizes.items()}
        policy = call.attribute("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            common = (min if policy == "not_larger" else max)(scales.values())
            scales = dict.fromkeys(axes, common)
            sizes = {axis: int(common * x.shape[axis] + 0.5) for axis in axes}
    else:
        scales = dict(zip(axes, call.floats(2), strict=True))
        sizes = {axis: math.floor(scale * x.shape[axis]) for axis, scale in scales.items()}
    mode = call.attribute("coordinate_transformation_mode", "half_pixel")
    regions: dict[int, tuple[float, float]] = {}
    if mode == "tf_crop_and_resize":
        given = call.floats(1)
        regions = {axis: (given[i], given[len(axes) + i]) for i, axis in enumerate(axes)}
    kernel = _Kernel(
        call.attribute("mode", "nearest"),
        call.attribute("nearest_mode", "round_prefer_floor"),
        float(call.attribute("cubic_coeff_a", -0.75)),
        bool(call.attribute("antialias", 0)),
    )
    exclude = bool(call.attribute("exclude_outside", 0))
    dtype = x.dtype
    result = x.to(compute_type(dtype, x.device))
    outside = torch.zeros((), dtype=torch.bool, device=x.device)
    for axis in axes:
        scale, size, have = scales[axis], sizes[axis], x.shape[axis]
        region = regions.get(axis)
        if math.isclose(scale, 1.0) and size == have and region in (None, (0.0, 1.0)):
            continue
        # Kept on the device: copying from the host would not do in a CUDA graph. Fake tensors are of one trace only.
        make = _tables.__wrapped__ if isinstance(x, FakeTensor) else _tables
        weights, beyond = make((have, size, scale, mode, kernel, exclude, region), result.dtype, x.device)
        if kernel.mode == "nearest":
            result = result.index_select(axis, weights)
        else:
            result = torch.tensordot(result, weights, dims=([axis], [1])).movedim(-1, axis)
        if beyond is not None:
            shape = [1] * rank
            shape[axis] = size
            outside = outside | beyond.reshape(shape)
    if outside.dim():
        result = result.masked_fill(outside, float(call.attribute("extrapolation_value", 0.0)))
    return result.to(dtype).contiguous() if result is not x else x.clone()


class _Kernel(tuple[str, str, float, bool]):
    """mode, nearest_mode, cubic_coeff_a, antialias: hashable."""

    def __new__(cls, mode: str, nearest: str, cubic: float, antialias: bool) -> _Kernel:
        return super().__new__(cls, (mode, nearest, cubic, antialias))

    @property
    def mode(self) -> str:
        return self[0]

    def weights(self, ratio: float, scale: float) -> np.ndarray:
        """Weights of the elements around a coordinate that lies `ratio` (0, 1] right of the lower neighbour."""
        mode, nearest, a, antialias = self
        if mode == "nearest":
            return np.array(_nearest(nearest)(ratio))
        if not antialias:
            if mode == "linear":
                return np.array([1 - ratio, ratio])
            return np.array([_cubic(distance, a) for distance in (1 + ratio, ratio, 1 - ratio, 2 - ratio)])
        scale = min(scale, 1.0)
        reach = 1 if mode == "linear" else 2
        start = math.floor(-reach / scale) + 1
        distances = (np.arange(start, 2 - start) - ratio) * scale
        if mode == "linear":
            values = np.clip(1 - np.abs(distances), 0, 1)
        else:
            values = np.array([_cubic(abs(distance), a) for distance in distances])
        return np.asarray(values / values.sum())


def _cubic(distance: float, a: float) -> float:
    """Keys' cubic kernel (IEEE TASSP 29, 1981) with parameter a."""
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    if distance < 2:
        return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return 0.0


def _nearest(mode: str) -> Callable[[float], tuple[bool, bool]]:
    """Which of the two neighbours is taken; a whole coordinate has ratio 1 and is the right one."""

    def choose(ratio: float) -> tuple[bool, bool]:
        if ratio == 1:
            return False, True
        left = {
            "round_prefer_floor": ratio <= 0.5, "round_prefer_ceil": ratio < 0.5, "floor": True, "ceil": False,
        }[mode]  # fmt: skip
        return left, not left

    return choose


_Axis = tuple[int, int, float, str, _Kernel, bool, "tuple[float, float] | None"]


@functools.lru_cache(maxsize=256)
def _tables(axis: _Axis, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For nearest the place of each output, else its weights; and which outputs lie beyond the input."""
    weights, beyond = _matrix(*axis)
    nearest = axis[4].mode == "nearest"
    table = torch.from_numpy(weights.argmax(1) if nearest else weights).to(device)
    return table if nearest else table.to(dtype), torch.from_numpy(beyond).to(device) if beyond.any() else None


def _matrix(
    have: int, size: int, scale: float, mode: str, kernel: _Kernel, exclude: bool, region: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (size, have) of one axis, and which outputs lie beyond the input (tf_crop_and_resize)."""
    places = _coordinates(have, size, scale, mode, region)
    beyond = np.zeros(size, bool)
    if mode == "tf_crop_and_resize":
        beyond = (places < 0) | (places > have - 1)
    matrix = np.zeros((size, have))
    for row, place in enumerate(places):
        ratio = 1.0 if place == math.floor(place) else place - math.floor(place)
        weights = kernel.weights(float(ratio), scale).astype(np.float64)
        # The as many elements as weights nearest to the place, the lower ones where two are equally near.
        first = (
            math.ceil(place - len(weights) / 2) if len(weights) % 2 == 0 else math.ceil(place - 0.5) - len(weights) // 2
        )
        near = np.arange(first, first + len(weights))
        if exclude:
            weights = np.where((near < 0) | (near >= have), 0.0, weights)
            weights = weights / (weights.sum() or 1.0)
        np.add.at(matrix[row], np.clip(near, 0, have - 1), weights)
    return matrix, beyond


def _coordinates(have: int, size: int, scale: float, mode: str, region: tuple[float, float] | None) -> np.ndarray:
    """The coordinate in the input of each output element."""
    steps = np.arange(size, dtype=np.float64)
    length = scale * have  # the exact size, which scales may make no whole number
    if mode == "align_corners":
        return np.zeros(size) if length == 1 else steps * (have - 1) / (length - 1)
    if mode == "asymmetric":
        return steps / scale
    if mode == "tf_crop_and_resize":
        assert region is not None
        begin, end = region
        inner = np.full(size, (end - begin) * (have - 1) / 2) if length == 1 else (
            steps * (end - begin) * (have - 1) / (length - 1)
        )  # fmt: skip
        return inner + begin * (have - 1)
    half = (steps + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return np.full(size, -0.5) if length == 1 else half
    if mode == "half_pixel_symmetric":
        return have / 2 * (1 - size / length) + half
    if mode == "half_pixel":
        return half
    raise NotHereError
