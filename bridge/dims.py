"""Named dynamic dimensions with their ranges, and the expressions over them that stand in symbolic shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DynamicShapeError
from ..plugins.sizes import evaluate, names_in

Range = tuple[int, int, int]
"""(min, opt, max) of a size."""

Size = int | str | None
"""One dimension of a shape: a number, an expression over named dims, or None where it depends on data."""

Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Dim:
    """A named dynamic dimension, as in ``dynamic_shapes={"x": {0: Dim("batch", min=1, opt=8, max=32)}}``.

    The engine accepts every size from ``min`` to ``max`` and is tuned for ``opt``. Inputs that share a Dim (the same
    name) must agree in that size when called. ``2 * dim``, ``dim + 1`` and the like are derived dims.

    Attributes:
        name: a Python identifier.
        min: smallest size, at least 1.
        opt: the size that kernels are chosen for; None takes the example's own size, clipped into the range.
        max: largest size.

    Raises:
        DynamicShapeError: the name is no identifier, or not ``1 <= min <= opt <= max``.
    """

    name: str
    min: int = 1
    opt: int | None = None
    max: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise DynamicShapeError(f"Dim name {self.name!r} is not a Python identifier.")
        for field, value in (("min", self.min), ("opt", self.opt), ("max", self.max)):
            if not (isinstance(value, int) and not isinstance(value, bool)) and not (field == "opt" and value is None):
                raise DynamicShapeError(f"Dim({self.name!r}): {field} must be an int, got {value!r}.")
        if not 1 <= self.min <= (self.min if self.opt is None else self.opt) <= self.max:
            raise DynamicShapeError(
                f"Dim({self.name!r}, min={self.min}, opt={self.opt}, max={self.max}): needs 1 <= min <= opt <= max; "
                f'give all three, as in Dim("{self.name}", min=1, opt=8, max=32).'
            )

    def __add__(self, other: int) -> DerivedDim:
        return DerivedDim(self, 1, 0) + other

    def __sub__(self, other: int) -> DerivedDim:
        return DerivedDim(self, 1, 0) - other

    def __mul__(self, other: int) -> DerivedDim:
        return DerivedDim(self, 1, 0) * other

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True)
class DerivedDim:
    """``scale * root + offset``: a dimension that follows another one."""

    root: Dim
    scale: int
    offset: int

    def __add__(self, other: int) -> DerivedDim:
        return DerivedDim(self.root, self.scale, self.offset + _whole(other))

    def __sub__(self, other: int) -> DerivedDim:
        return self + -_whole(other)

    def __mul__(self, other: int) -> DerivedDim:
        if _whole(other) < 1:
            raise DynamicShapeError(f"A derived dim can be multiplied by a positive int only, got {other!r}.")
        return DerivedDim(self.root, self.scale * other, self.offset * other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        text = self.root.name if self.scale == 1 else f"{self.scale}*{self.root.name}"
        return text if not self.offset else f"{text} {'+' if self.offset > 0 else '-'} {abs(self.offset)}"


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DynamicShapeError(f"Derived dims take whole numbers, got {value!r}.")
    return value


def evaluate_size(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a shape expression ("2*seq + 1", "(batch//2)", "Max(1, seq)") for given sizes of the named dims.

    Raises:
        KeyError: a name in the expression has no size.
        DynamicShapeError: the text is no shape expression, or its value is not whole.
    """
    result = evaluate(expression, sizes)
    if result != int(result):
        raise DynamicShapeError(f"{expression!r} is {result}, not a whole number, for {dict(sizes)}.")
    return int(result)


def evaluate_range(size: Size, dims: Mapping[str, Range]) -> Range | None:
    """(min, opt, max) of a size; None where it names a dim without a range.

    An expression may fall where a dim grows (``10 - n``), so it is evaluated at every corner of the ranges. That is
    exact for expressions monotone in each dim, as those of convolutions, reshapes and concatenations are.
    """
    if isinstance(size, int):
        return (size, size, size)
    if size is None or not names_in(size) <= dims.keys():
        return None
    names = sorted(names_in(size))
    corners = itertools.product(*({dims[name][0], dims[name][2]} for name in names))
    try:
        values = [evaluate_size(size, dict(zip(names, corner, strict=True))) for corner in corners]
        opt = evaluate_size(size, {name: dims[name][1] for name in names})
    except (DynamicShapeError, ZeroDivisionError):
        return None
    return (min(*values, opt), opt, max(*values, opt))


def evaluate_shape(shape: Sequence[Size], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """A concrete shape for given dim sizes; None where a dimension depends on data."""
    result = []
    for size in shape:
        if isinstance(size, str) and names_in(size) <= sizes.keys():
            size = evaluate_size(size, sizes)
        if not isinstance(size, int):
            return None
        result.append(size)
    return tuple(result)
