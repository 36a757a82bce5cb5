"""Optimization profiles: which one takes given sizes. An engine is tuned for each of its profiles alone.

The rule: sizes fit where one profile takes all of them together; what lies between two profiles fits none. Where
several take them, the one whose ``opt`` is nearest is used, and of these the one with the narrowest ranges, and of
these the first. The choice depends on the sizes alone, not on what ran before: the same inputs always meet the same
kernels, so results and times do not hang on the order of calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dims import Range

if TYPE_CHECKING:
    from .model import TensorSpec

Ranges = tuple[Range | None, ...]
"""(min, opt, max) of each dimension of a tensor; None for one that takes every size."""


def fits(sizes: Mapping[str, int], profiles: Sequence[Mapping[str, Range]]) -> bool:
    """Whether some profile takes all sizes of named dims together; a profile need not name all of them."""
    return any(
        all(name not in profile or profile[name][0] <= size <= profile[name][2] for name, size in sizes.items())
        for profile in profiles
    )


def nearest_profile(sizes: Mapping[str, int], profiles: Sequence[Mapping[str, Range]]) -> int | None:
    """Index of the profile that sizes of named dims are run with; None where they fit none."""
    return _nearest(
        [[(size, profile.get(name)) for name, size in sizes.items()] for profile in profiles],
    )


def common_profiles(sides: Sequence[Sequence[Mapping[str, Range]]]) -> tuple[Mapping[str, Range], ...]:
    """What the profiles of several programs have in common, over the dims of the first; what is in one alone falls out.

    Args:
        sides: the profiles of each program; dims of the same name are the same.
    """
    found = [dict(profile) for profile in sides[0]]
    for side in sides[1:]:
        found = [common for mine in found for other in side if (common := _common(mine, other)) is not None]
    return tuple(found)


def _common(mine: Mapping[str, Range], other: Mapping[str, Range]) -> dict[str, Range] | None:
    common = dict(mine)
    for name in mine.keys() & other.keys():
        low, high = max(mine[name][0], other[name][0]), min(mine[name][2], other[name][2])
        if low > high:
            return None
        common[name] = (low, min(max(mine[name][1], low), high), high)
    return common


def describe_profiles(profiles: Sequence[Mapping[str, Range]]) -> list[str]:
    """A line a profile: ``profile 0: batch 1, seq 16 to 64 (tuned for 32)``."""
    return [
        f"profile {index}: " + ", ".join(f"{name} {_text(r)}" for name, r in profile.items())
        for index, profile in enumerate(profiles)
    ]


@dataclass(frozen=True)
class EngineProfiles:
    """The profiles of one engine, in the engine's order, each once.

    Attributes:
        names: of the engine's inputs.
        ranges: for each profile and each input the ranges of its dimensions.
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[Ranges, ...], ...]

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec]) -> EngineProfiles:
        """Those of a segment, by the specs of its inputs: profiles that do not differ in any of them are one."""
        count = max((len(spec.profiles) for spec in inputs), default=0) or 1
        ranges = [tuple(spec.profiles[k] if spec.profiles else spec.ranges for spec in inputs) for k in range(count)]
        return cls(tuple(spec.name for spec in inputs), tuple(dict.fromkeys(ranges)))

    @classmethod
    def from_json(cls, data: Sequence[Mapping[str, Any]]) -> EngineProfiles:
        """Read what `to_json` made; there is at least one profile."""
        names = tuple(data[0])
        ranges = tuple(
            tuple(tuple(None if r is None else (r[0], r[1], r[2]) for r in profile[name]) for name in names)
            for profile in data
        )
        return cls(names, ranges)

    @classmethod
    def of_engine(cls, info: Mapping[str, Any], inputs: Sequence[TensorSpec]) -> EngineProfiles:
        """Those of a built engine: what its info says; engines from before profiles have the one of their inputs."""
        return cls.from_json(info["profiles"]) if info.get("profiles") else cls.of(inputs)

    def to_json(self) -> list[dict[str, Any]]:
        """A dict a profile: input → (min, opt, max) of each dimension."""
        return [
            {
                name: [None if r is None else list(r) for r in sizes]
                for name, sizes in zip(self.names, profile, strict=True)
            }
            for profile in self.ranges
        ]

    def __len__(self) -> int:
        return len(self.ranges)

    def choose(self, shapes: Sequence[Sequence[int]]) -> int | None:
        """Index of the profile that inputs are run with; None where no profile takes them.

        Args:
            shapes: of the inputs, in the order of ``names``.
        """
        candidates = []
        for profile in self.ranges:
            pairs: list[tuple[int, Range | None]] = []
            for shape, sizes in zip(shapes, profile, strict=True):
                if len(shape) != len(sizes):
                    return None
                pairs += zip(shape, sizes, strict=True)
            candidates.append(pairs)
        return _nearest(candidates)

    def describe(self) -> str:
        """All profiles in one line, with the inputs that vary within or between them."""
        varying = [
            i
            for i in range(len(self.names))
            if any(profile[i] != self.ranges[0][i] or _moves(profile[i]) for profile in self.ranges)
        ]
        return "; ".join(
            f"profile {index}: " + ", ".join(f"{self.names[i]} ({', '.join(map(_text, profile[i]))})" for i in varying)
            for index, profile in enumerate(self.ranges)
        )


def _moves(sizes: Ranges) -> bool:
    return any(r is None or r[0] < r[2] for r in sizes)


def _text(span: Range | None) -> str:
    if span is None:
        return "any"
    low, opt, high = span
    return str(low) if low == high else f"{low} to {high} (tuned for {opt})"


def _nearest(candidates: Iterable[Sequence[tuple[int, Range | None]]]) -> int | None:
    """Which list of sizes and ranges fits best."""
    best: tuple[float, float, int] | None = None
    for index, pairs in enumerate(candidates):
        if any(r is not None and not r[0] <= size <= r[2] for size, r in pairs):
            continue
        known = [(max(size, 1), r) for size, r in pairs if r is not None]
        # Twice the tuned size is as far from it as half of it; sizes may be 0 where they depend on data.
        distance = sum(abs(math.log(size / max(r[1], 1))) for size, r in known)
        width = sum(math.log(max(r[2], 1) / max(r[0], 1)) for _, r in known)
        key = (distance, width, index)
        best = key if best is None else min(best, key)
    return None if best is None else best[2]
