"""Rules for linear maps along axes: Fourier transforms and resizing with antialiasing are products with a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from .refused_fragment import MOST_BYTES, Fragment, need, need_type

_T = onnx.TensorProto


def dft(f: Fragment) -> None:
    """DFT: with fixed length a product with the matrix of the roots of unity."""
    element = need_type(f, 0, (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16))
    rank = f.rank(0)
    axis = int(f.values(2)) if f.has(2) else int(f.attr("axis", 1 if f.opset < 20 else -2))
    axis = axis + rank if axis < 0 else axis
    need(axis < rank - 1, "it goes along the axis of real and imaginary parts")
    (pair,) = f.fixed(0, [rank - 1])
    inverse, onesided = bool(f.attr("inverse", 0)), bool(f.attr("onesided", 0))
    (size,) = f.fixed(0, [axis])
    to_real = inverse and onesided
    length = int(f.values(1)) if f.has(1) else 2 * (size - 1) if to_real else size
    x = f.input(0) if element == _T.FLOAT else f.cast(f.input(0), _T.FLOAT)
    if to_real:
        need(pair == 2 and length > 0, "what it makes real is not complex")
        x = _product(f, x, (rank, axis), _half_spectrum(size, length) / length)
    else:
        factor = 1 / length if inverse else 1.0
        x = fourier(f, x, (rank, axis, pair), (size, length, inverse, onesided, factor))
    f.result(x if element == _T.FLOAT else f.cast(x, element))


def fourier(f: Fragment, x: str, place: tuple[int, int, int], form: tuple[int, int, bool, bool, float]) -> str:
    """X[k] = factor * sum over j of x[j] * exp(-+ 2 pi i j k / length), along one axis.

    Args:
        f: where nodes go.
        x: float32, its last axis holds real parts, or real and imaginary ones.
        place: rank of x, the axis, and the size of its last axis.
        form: size of the axis, length of the transform (x is cut, or padded with zeros), whether the sign is positive,
            whether only the first length // 2 + 1 terms are wanted, and the factor.
    """
    rank, axis, pair = place
    size, length, inverse, onesided, factor = form
    terms = length // 2 + 1 if onesided else length
    need(0 < size * pair * terms * 2 * 4 <= MOST_BYTES, f"a transform of {length} takes too large a matrix")
    used = min(size, length)
    # Products modulo the length, so that the angles are exact.
    angle = 2 * math.pi * (np.outer(np.arange(used), np.arange(terms)) % length) / length
    cos, sin = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    matrix = np.zeros((size, pair, terms, 2))
    matrix[:used, 0, :, 0], matrix[:used, 0, :, 1] = cos, sin
    if pair == 2:
        matrix[:used, 1, :, 0], matrix[:used, 1, :, 1] = -sin, cos
    return _product(f, x, (rank, axis), matrix * factor)


def _half_spectrum(size: int, length: int) -> np.ndarray:
    """(size, 2, length, 1): the real signal of a spectrum's first half, whose other half is its conjugate."""
    used = min(size, length // 2 + 1)
    angle = 2 * math.pi * (np.outer(np.arange(used), np.arange(length)) % length) / length
    twice = np.where((np.arange(used) == 0) | (2 * np.arange(used) == length), 1.0, 2.0)[:, None]
    matrix = np.zeros((size, 2, length, 1))
    matrix[:used, 0, :, 0], matrix[:used, 1, :, 0] = twice * np.cos(angle), -twice * np.sin(angle)
    return matrix


def _product(f: Fragment, x: str, place: tuple[int, int], matrix: np.ndarray) -> str:
    """x times a matrix (size, pair, terms, new pair) over an axis and the last one; place is (rank of x, the axis)."""
    rank, axis = place
    size, pair, terms, new_pair = matrix.shape
    need(matrix.size * 4 <= MOST_BYTES, f"a transform of {size} takes too large a matrix")
    order = [*(a for a in range(rank - 1) if a != axis), axis, rank - 1]
    x = f.reshape(f.transpose(x, order), [*[0] * (rank - 2), size * pair])
    x = f.op("MatMul", x, f.const(matrix.reshape(size * pair, terms * new_pair), np.float32))
    x = f.reshape(x, [*[0] * (rank - 2), terms, new_pair])
    return f.transpose(x, [order.index(a) for a in range(rank)])


def resize(f: Fragment) -> None:
    """Resize with antialiasing: each axis is a product with the matrix of the filter's weights."""
    element = need_type(f, 0, (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16))
    mode = f.attr("mode", "nearest")
    need(f.attr("antialias", 0) == 1 and mode in ("linear", "cubic"), "only antialiasing is written in other ops")
    need(f.attr("keep_aspect_ratio_policy", "stretch") == "stretch", "it keeps the aspect ratio")
    rank = f.rank(0)
    axes = [axis + rank if axis < 0 else axis for axis in f.attr("axes", list(range(rank)))]
    if f.has(3) and f.values(3).size:
        wanted = dict(zip(axes, (int(size) for size in f.values(3)), strict=True))
        scales: dict[int, float | None] = dict.fromkeys(axes)
    else:
        given = {a: float(s) for a, s in zip(axes, f.values(2), strict=True)}
        scales = dict(given)
        moved = [a for a in axes if given[a] != 1]
        wanted = {a: math.floor(size * given[a]) for a, size in zip(moved, f.fixed(0, moved), strict=True)}
    coordinates = _coordinates(f.attr("coordinate_transformation_mode", "half_pixel"))
    cubic = float(f.attr("cubic_coeff_a", -0.75))
    x = f.input(0) if element == _T.FLOAT else f.cast(f.input(0), _T.FLOAT)
    for axis, new in wanted.items():
        (size,) = f.fixed(0, [axis])
        scale = scales[axis] or new / size
        if size == new and scale == 1:
            continue
        need(new > 0, "it makes an empty result")
        need(new * size * 4 <= MOST_BYTES, f"an axis from {size} to {new} takes too large a matrix")
        weights = _filter(size, new, scale, coordinates, cubic if mode == "cubic" else None)
        weights = _within(weights, size, bool(f.attr("exclude_outside", 0)))
        order = [a for a in range(rank) if a != axis] + [axis]
        x = f.op("MatMul", f.transpose(x, order), f.const(weights.T, np.float32))
        x = f.transpose(x, [order.index(a) for a in range(rank)])
    need(bool(f.nodes), "it changes nothing")
    f.result(x if element == _T.FLOAT else f.cast(x, element))


def _coordinates(mode: str) -> Callable[[np.ndarray, int, int, float], np.ndarray]:
    """Where a new element lies among the old ones."""
    need(mode in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"), f"there is no rule for {mode}")
    if mode == "asymmetric":
        return lambda at, size, new, scale: at / scale
    if mode == "align_corners":
        return lambda at, size, new, scale: at * ((size - 1) / (new - 1) if new > 1 else 0.0)
    if mode == "half_pixel":
        return lambda at, size, new, scale: (at + 0.5) / scale - 0.5
    return lambda at, size, new, scale: (at + 0.5) / scale - 0.5 if new > 1 else at * 0.0


def _filter(
    size: int, new: int, scale: float, coordinates: Callable[[np.ndarray, int, int, float], np.ndarray],
    cubic: float | None,
) -> np.ndarray:  # fmt: skip
    """Weights (new, 3 * size) of the old elements and of as many beyond each end.

    The filter is widened where the axis shrinks.
    """
    center = coordinates(np.arange(new, dtype=np.float64), size, new, scale)
    shrink = max(1.0, 1 / scale)
    need(2 * shrink <= size, "the filter is wider than the axis")
    distance = np.abs(np.arange(-size, 2 * size)[None, :] - center[:, None]) / shrink
    if cubic is None:
        return np.asarray(np.maximum(0.0, 1 - distance))
    near = ((cubic + 2) * distance - (cubic + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * cubic - 4 * cubic
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def _within(weights: np.ndarray, size: int, exclude_outside: bool) -> np.ndarray:
    """Weights (new, size) that sum to one; what lies outside counts for the element at the end, or not at all."""
    inside = weights[:, size : 2 * size].copy()
    if not exclude_outside:
        inside[:, 0] += weights[:, :size].sum(axis=1)
        inside[:, -1] += weights[:, 2 * size :].sum(axis=1)
    total = inside.sum(axis=1, keepdims=True)
    need(bool((np.abs(total) > 1e-6).all()), "a new element lies outside of all old ones")
    return np.asarray(inside / total)
