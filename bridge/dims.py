"""Named dynamic dimensions with their ranges, and the expressions over them that stand in symbolic shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DynamicShapeError
from ..plugins.sizes import evaluate, names_in

Range = tuple[int, int, int]
"""(min, opt, max) of a size."""

Size = int | str | None
"""One dimension of a shape: a number, an expression over named dims, or None where it depends on data."""

Shape = tuple[Size, ...]


@dataclass(frozen=True, init=False)
class Dim:
    """A named dynamic dimension, as in ``dynamic_shapes={"x": {0: Dim("batch", min=1, opt=8, max=32)}}``.

    The engine accepts every size from ``min`` to ``max`` and is tuned for ``opt``. Inputs that share a Dim (the same
    name) must agree in that size when called. ``2 * dim``, ``dim + 1`` and the like are derived dims.

    ``Dim("batch", profiles=[(1, 1, 1), (8, 16, 32)])`` gives several ranges in place of one: the engine is tuned for
    each alone, takes the sizes in any of them and none between them. Entry k of every Dim with several makes profile k
    of the engine; a Dim with one range has it in all.

    Attributes:
        name: a Python identifier.
        min: smallest size, at least 1; the smallest of all profiles.
        opt: the size that kernels are chosen for; None takes the example's own size, clipped into the range. With
            profiles that of the last one.
        max: largest size; the largest of all profiles.
        profiles: (min, opt, max) of each profile, () where there is but one range.

    Raises:
        DynamicShapeError: the name is no identifier, not ``1 <= min <= opt <= max``, or a range beside profiles.
    """

    name: str
    min: int
    opt: int | None
    max: int
    profiles: tuple[Range, ...]

    def __init__(
        self,
        name: str,
        min: int | None = None,
        opt: int | None = None,
        max: int | None = None,
        profiles: Sequence[Range] = (),
    ) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise DynamicShapeError(f"Dim name {name!r} is not a Python identifier.")
        if isinstance(profiles, (tuple, list)) and not profiles:
            low, high = 1 if min is None else min, 0 if max is None else max
            _check_range(name, low, opt, high)
            ranges: tuple[Range, ...] = ()
        else:
            ranges = _checked_profiles(name, profiles, {"min": min, "opt": opt, "max": max})
            lows, opts, highs = zip(*ranges, strict=True)
            low, opt, high = sorted(lows)[0], opts[-1], sorted(highs)[-1]  # min and max are arguments here
            ranges = ranges if len(ranges) > 1 else ()
        for field, value in (("name", name), ("min", low), ("opt", opt), ("max", high), ("profiles", ranges)):
            object.__setattr__(self, field, value)  # frozen for everyone else

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


def _check_range(name: str, low: Any, opt: Any, high: Any) -> None:
    for field, value in (("min", low), ("opt", opt), ("max", high)):
        if not _is_int(value) and not (field == "opt" and value is None):
            raise DynamicShapeError(f"Dim({name!r}): {field} must be an int, got {value!r}.")
    if not 1 <= low <= (low if opt is None else opt) <= high:
        raise DynamicShapeError(
            f"Dim({name!r}, min={low}, opt={opt}, max={high}): needs 1 <= min <= opt <= max; "
            f'give all three, as in Dim("{name}", min=1, opt=8, max=32).'
        )


def _checked_profiles(name: str, profiles: Any, beside: Mapping[str, int | None]) -> tuple[Range, ...]:
    example = f'as in Dim("{name}", profiles=[(1, 1, 1), (2, 8, 32)])'
    if not isinstance(profiles, (tuple, list)):
        raise DynamicShapeError(f"Dim({name!r}): profiles must be a list of (min, opt, max), {example}.")
    given = [f"{field}={value!r}" for field, value in beside.items() if value is not None]
    if given:
        raise DynamicShapeError(
            f"Dim({name!r}): profiles bring their own ranges: leave {', '.join(given)} out, or give one range alone."
        )
    for index, entry in enumerate(profiles):
        whole = isinstance(entry, (tuple, list)) and len(entry) == 3 and all(map(_is_int, entry))
        if not whole or not 1 <= entry[0] <= entry[1] <= entry[2]:
            raise DynamicShapeError(
                f"Dim({name!r}): profile {index} is {entry!r}; it must be (min, opt, max), whole numbers with "
                f"1 <= min <= opt <= max, {example}."
            )
    return tuple((entry[0], entry[1], entry[2]) for entry in profiles)


def combine_profiles(dims: Iterable[Dim], ranges: Mapping[str, Range]) -> tuple[dict[str, Range], ...]:
    """The ranges of all named dims profile by profile: entry k of every Dim that has several.

    Args:
        dims: with or without profiles.
        ranges: the whole range of each dim that is dynamic, which one without profiles has in all of them.

    Returns:
        One dict by name for each profile; none where no dim has several.

    Raises:
        DynamicShapeError: two Dims have different numbers of profiles.
    """
    several = {dim.name: dim.profiles for dim in dims if len(dim.profiles) > 1 and dim.name in ranges}
    if not several:
        return ()
    (first, count), *others = ((name, len(profiles)) for name, profiles in several.items())
    for name, other in others:
        if other != count:
            raise DynamicShapeError(
                f"Dim {first!r} has {count} profiles and Dim {name!r} has {other}: profile k of the engine is made of "
                "entry k of each, so give them the same number, or one of them a single range for all."
            )
    return tuple({name: several[name][k] if name in several else ranges[name] for name in ranges} for k in range(count))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(value: Any) -> int:
    if not _is_int(value):
        raise DynamicShapeError(f"Derived dims take whole numbers, got {value!r}.")
    return int(value)


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
    exact for expressions monotone in each dim, as those of convolutions, reshapes and concatenations are. A dim that
    may be 0 and that something is divided by counts from 1: no call has a shape where it is 0.
    """
    if isinstance(size, int):
        return (size, size, size)
    if size is None or not names_in(size) <= dims.keys():
        return None
    names = sorted(names_in(size))
    corners = itertools.product(*({dims[name][0], dims[name][2]} for name in names))
    try:
        values = [_evaluate_corner(size, dict(zip(names, corner, strict=True))) for corner in corners]
        opt = _evaluate_corner(size, {name: dims[name][1] for name in names})
    except (DynamicShapeError, ZeroDivisionError):
        return None
    return (min(*values, opt), opt, max(*values, opt))


def _evaluate_corner(size: str, sizes: Mapping[str, int]) -> int:
    try:
        return evaluate_size(size, sizes)
    except ZeroDivisionError:
        return evaluate_size(size, {name: max(1, value) for name, value in sizes.items()})


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
