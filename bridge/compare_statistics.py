"""Statistics of the error of one output over many samples, in memory that does not grow with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .tolerances import Tolerance, default_tolerance

QUANTILES = (0.5, 0.9, 0.99, 0.999)
"""Of the absolute error."""

_CHUNK = 1 << 20
"""Elements that are widened to float64 at a time."""

_MOST_SHAPES = 50
_MOST_FAILURES = 10
_PER_DECADE = 64  # bins of the sketch: each 3.7 % wide
_LOWEST, _DECADES = -45, 90
_PER_BAR = 16  # bins of the sketch in one bar of the histogram: four bars a decade


class Sketch:
    """How often errors of each size were seen, in bins of equal width on a logarithmic scale.

    Quantiles are exact to half a bin, 1.8 %. Sizes below 1e-45 count as 1e-45.
    """

    def __init__(self) -> None:
        self.zeros = 0
        self._bins = torch.zeros(_DECADES * _PER_DECADE, dtype=torch.int64)

    def add(self, errors: torch.Tensor) -> None:
        """Count errors: float64, not negative, finite."""
        nonzero = errors[errors > 0]
        self.zeros += errors.numel() - nonzero.numel()
        places = ((nonzero.log10() - _LOWEST) * _PER_DECADE).floor().long().clamp_(0, len(self._bins) - 1)
        self._bins += torch.bincount(places, minlength=len(self._bins))

    def quantile(self, share: float) -> float:
        """The error that this share of the elements does not exceed; NaN where none was counted."""
        total = self.zeros + int(self._bins.sum())
        if not total:
            return math.nan
        rank = max(1, math.ceil(share * total)) - self.zeros
        if rank <= 0:
            return 0.0
        place = int(torch.searchsorted(self._bins.cumsum(0), rank))
        return float(10 ** (_LOWEST + (place + 0.5) / _PER_DECADE))

    def bars(self) -> list[tuple[float, int]]:
        """(log10 of the lower edge, count) of quarters of decades, from the first that holds errors to the last."""
        counts = self._bins.reshape(-1, _PER_BAR).sum(1)
        used = counts.nonzero().reshape(-1).tolist()
        if not used:
            return []
        edges = range(used[0], used[-1] + 1)
        return [(_LOWEST + place * _PER_BAR / _PER_DECADE, int(counts[place])) for place in edges]


@dataclass
class ShapeError:
    """The error for inputs of one shape.

    Attributes:
        samples: how many.
        failures: how many of them were out of tolerance.
        max_abs: largest absolute error.
        error, signal: sums of squares of error and reference.
    """

    samples: int = 0
    failures: int = 0
    max_abs: float = 0.0
    error: float = 0.0
    signal: float = 0.0


@dataclass
class _Sample:
    """The sums over one sample."""

    count: int = 0
    beyond: int = 0
    misplaced: int = 0  # NaN or infinity where the other has something else
    error: float = 0.0
    signal: float = 0.0
    power: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    place: int = 0


@dataclass
class OutputStatistics:
    """The errors of one output, sample after sample.

    Attributes:
        label: how a user would write the output.
        given: the tolerance that was asked for; None for the default by dtype.
        computed_in: the coarsest dtype in which either side computes, as `tolerances.dtype_name` has it.
        top_k: for which k the agreement of the k largest along the last dimension is counted.
    """

    label: str
    given: Tolerance | None = None
    computed_in: str = ""
    top_k: tuple[int, ...] = ()
    tolerance: Tolerance | None = None
    dtypes: tuple[str, str] = ("", "")
    samples: int = 0
    failed_samples: int = 0
    failures: list[str] = field(default_factory=list)
    elements: int = 0
    beyond: int = 0
    differing: int = 0
    nans: list[int] = field(default_factory=lambda: [0, 0])
    infs: list[int] = field(default_factory=lambda: [0, 0])
    misplaced: int = 0
    finite: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    max_rel: float = 0.0
    sum_rel: float = 0.0
    rel_count: int = 0
    max_scaled: float = 0.0
    worst: str = ""
    error: float = 0.0
    signal: float = 0.0
    power: float = 0.0
    product: float = 0.0
    least_cosine: float = math.inf
    least_snr_db: float = math.inf
    sketch: Sketch = field(default_factory=Sketch)
    shapes: dict[str, ShapeError] = field(default_factory=dict)
    top_hits: dict[int, float] = field(default_factory=dict)
    top_rows: int = 0

    def add(self, index: int, shape: str, reference: torch.Tensor, actual: torch.Tensor) -> str:
        """Take in one sample.

        Args:
            index: of the sample.
            shape: of its inputs, as text: what errors are grouped by.
            reference, actual: the two results, on a CPU, neither complex.

        Returns:
            Why the sample is out of tolerance, "" where it is within.
        """
        self.samples += 1
        names = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (reference, actual))
        self.dtypes = (names[0], names[1])
        if self.tolerance is None:
            self.tolerance = self.given or self._default(reference, actual)
        if reference.shape != actual.shape:
            words = f"shape {tuple(actual.shape)} instead of {tuple(reference.shape)}"
            self._note(index, shape, words, _Sample())
            return words
        sample = self._measure(index, reference, actual, self.tolerance)
        self._count_top(reference, actual)
        words = self._judge(sample, self.tolerance)
        self._note(index, shape, words, sample)
        return words

    def _default(self, reference: torch.Tensor, actual: torch.Tensor) -> Tolerance:
        """By dtype; that of a float where one of the two is one."""
        floats = [tensor.dtype for tensor in (reference, actual) if tensor.is_floating_point()]
        if not floats:
            return default_tolerance(reference.dtype, self.computed_in)
        one = default_tolerance(floats[0], self.computed_in)
        other = default_tolerance(floats[-1], self.computed_in)
        return max(one, other, key=lambda tolerance: tolerance.rtol)

    def _measure(self, index: int, reference: torch.Tensor, actual: torch.Tensor, limits: Tolerance) -> _Sample:
        sample = _Sample(count=reference.numel())
        for wanted, _ in _chunks(reference, reference):
            finite = wanted[torch.isfinite(wanted)]
            sample.signal += float(finite.square().sum())
        rms = math.sqrt(sample.signal / max(1, sample.count))
        sample.signal = 0.0
        offset = 0
        for wanted, got in _chunks(reference, actual):
            finite = torch.isfinite(wanted) & torch.isfinite(got)
            error = torch.where(finite, (got - wanted).abs(), 0.0)
            for side, values in enumerate((wanted, got)):
                self.nans[side] += int(torch.isnan(values).sum())
                self.infs[side] += int(torch.isinf(values).sum())
            alike = finite | (torch.isnan(wanted) & torch.isnan(got)) | (wanted == got)
            sample.misplaced += int((~alike).sum())
            size = torch.where(finite, wanted.abs(), 0.0)
            allowed = limits.atol + limits.rtol * size + limits.scale * rms
            sample.beyond += int((error > allowed).sum()) + int((~alike).sum())
            self.differing += int((error > 0).sum()) + int((~alike).sum())
            if error.numel() and float(error.max()) > sample.max_abs:
                sample.max_abs, sample.place = float(error.max()), offset + int(error.argmax())
            relative = error[size > 0] / size[size > 0]
            if relative.numel():
                self.max_rel = max(self.max_rel, float(relative.max()))
                self.sum_rel += float(relative.sum())
                self.rel_count += relative.numel()
            self.finite += int(finite.sum())
            self.sum_abs += float(error.sum())
            sample.error += float(error.square().sum())
            sample.signal += float(size.square().sum())
            kept = torch.where(finite, got, 0.0)
            sample.power += float(kept.square().sum())
            sample.product += float((kept * torch.where(finite, wanted, 0.0)).sum())
            self.sketch.add(error[finite])
            offset += wanted.numel()
        if sample.max_abs > self.max_abs:
            self.max_abs = sample.max_abs
            at = [int(i) for i in torch.unravel_index(torch.tensor(sample.place), tuple(reference.shape))]
            mine, theirs = (float(tensor[tuple(at)]) for tensor in (actual, reference))
            self.worst = f"sample {index}, {at}: {mine:.6g} instead of {theirs:.6g}"
        if rms:
            self.max_scaled = max(self.max_scaled, sample.max_abs / rms)
        elif sample.max_abs:
            self.max_scaled = math.inf
        return sample

    def _judge(self, sample: _Sample, limits: Tolerance) -> str:
        """Why a sample is out of tolerance, "" where it is within."""
        words = []
        if sample.misplaced:
            words.append(f"NaN or infinity in other places: {sample.misplaced} of {sample.count} values")
        far = sample.beyond - sample.misplaced
        if far > limits.outliers * sample.count:
            words.append(f"{far} of {sample.count} values beyond, by up to {sample.max_abs:.3g}")
        cosine, snr = cosine_of(sample.product, sample.signal, sample.power), snr_db(sample.signal, sample.error)
        self.least_cosine, self.least_snr_db = min(self.least_cosine, cosine), min(self.least_snr_db, snr)
        # The direction of values that are no larger than what they may be off by is that of noise.
        noise = sample.signal <= limits.atol**2 * max(1, sample.count) and not far
        if limits.cosine is not None and cosine < limits.cosine and not noise:
            words.append(f"cosine {cosine:.6g}")
        if limits.snr_db is not None and snr < limits.snr_db:
            words.append(f"SNR {snr:.1f} dB")
        return ", ".join(words)

    def _note(self, index: int, shape: str, words: str, sample: _Sample) -> None:
        self.elements += sample.count
        self.beyond += sample.beyond
        self.misplaced += sample.misplaced
        self.error += sample.error
        self.signal += sample.signal
        self.power += sample.power
        self.product += sample.product
        if words:
            self.failed_samples += 1
            if len(self.failures) < _MOST_FAILURES:
                self.failures.append(f"sample {index} ({shape}): {words}" if shape else f"sample {index}: {words}")
        key = shape if shape in self.shapes or len(self.shapes) < _MOST_SHAPES else "other shapes"
        group = self.shapes.setdefault(key, ShapeError())
        group.samples += 1
        group.failures += bool(words)
        group.max_abs = max(group.max_abs, sample.max_abs)
        group.error += sample.error
        group.signal += sample.signal

    def _count_top(self, reference: torch.Tensor, actual: torch.Tensor) -> None:
        if not self.top_k or not reference.is_floating_point() or reference.ndim < 2 or reference.shape[-1] < 2:
            return
        wanted, got = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (reference, actual))
        self.top_rows += len(wanted)
        for k in self.top_k:
            most = min(k, wanted.shape[-1])
            mine, theirs = got.topk(most, -1).indices, wanted.topk(most, -1).indices
            shared = (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean(-1)
            self.top_hits[k] = self.top_hits.get(k, 0.0) + float(shared.sum())


def cosine_of(product: float, signal: float, power: float) -> float:
    """Cosine of two vectors from their product and squared norms; 1 for two zeros, 0 where one alone is zero."""
    if not signal or not power:
        return 1.0 if signal == power else 0.0
    return max(-1.0, min(1.0, product / math.sqrt(signal) / math.sqrt(power)))


def snr_db(signal: float, error: float) -> float:
    """``10 log10(signal / error)`` of sums of squares, in dB; infinite without an error."""
    if not error:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(error)) if signal else -math.inf


def _chunks(reference: torch.Tensor, actual: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    wanted, got = reference.detach().reshape(-1), actual.detach().reshape(-1)
    for start in range(0, wanted.numel(), _CHUNK):
        yield wanted[start : start + _CHUNK].double(), got[start : start + _CHUNK].double()
