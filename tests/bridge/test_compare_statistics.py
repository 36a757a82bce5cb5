"""Statistics of errors: against NumPy on whole arrays, at the edges, and in constant memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtbridge.bridge import compare_statistics
from trtbridge.bridge.compare_report import OutputReport
from trtbridge.bridge.compare_statistics import OutputStatistics, Sketch
from trtbridge.bridge.tolerances import Tolerance, default_tolerance


def measured(*pairs: tuple[torch.Tensor, torch.Tensor], **options: object) -> OutputReport:
    found = OutputStatistics("output", **options)  # type: ignore[arg-type]
    for index, (reference, actual) in enumerate(pairs):
        found.add(index, str(tuple(reference.shape)), reference, actual)
    return OutputReport.of(found)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_against_numpy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_statistics, "_CHUNK", chunk)
    pairs = []
    for size in (3, 11, 40):
        reference = torch.randn(size, 4, dtype=torch.float64)
        pairs.append((reference, reference + 1e-3 * torch.randn_like(reference) ** 3))
    report = measured(*pairs, given=Tolerance(rtol=1.0, atol=1.0))
    wanted, got = (np.concatenate([np.asarray(pair[i]).ravel() for pair in pairs]) for i in (0, 1))
    error = np.abs(got - wanted)
    assert report.elements == wanted.size
    assert report.differing == int((error > 0).sum())
    assert report.max_abs == pytest.approx(error.max())
    assert report.mean_abs == pytest.approx(error.mean())
    assert report.max_rel == pytest.approx((error / np.abs(wanted)).max())
    assert report.mean_rel == pytest.approx((error / np.abs(wanted)).mean())
    assert report.cosine == pytest.approx(wanted @ got / np.linalg.norm(wanted) / np.linalg.norm(got), rel=1e-12)
    assert report.snr_db == pytest.approx(10 * np.log10((wanted**2).sum() / (error**2).sum()))
    per_sample = [10 * math.log10(float((w**2).sum() / ((w - g) ** 2).sum())) for w, g in pairs]
    assert report.least_snr_db == pytest.approx(min(per_sample))
    for share, value in report.quantiles:
        assert value == pytest.approx(np.quantile(error, share, method="inverted_cdf"), rel=0.02)
    assert sum(count for _, count in report.histogram) == int((error > 0).sum())
    assert [shape.samples for shape in report.shapes] == [1, 1, 1]


def test_the_place_of_the_worst_value() -> None:
    reference = torch.zeros(2, 3, 4)
    actual = reference.clone()
    actual[1, 2, 3] = 0.5
    report = measured((reference, reference), (reference, actual))
    assert report.worst == "sample 1, [1, 2, 3]: 0.5 instead of 0"
    assert not report.ok
    assert report.failed_samples == 1
    assert report.cosine == 0.0
    assert report.snr_db == -math.inf


def test_equal_values_are_perfect() -> None:
    x = torch.randn(5, 5)
    report = measured((x, x.clone()), given=Tolerance(cosine=1.0 - 1e-12, snr_db=300.0))
    assert report.ok
    assert (report.max_abs, report.differing, report.exact) == (0.0, 0, 25)
    assert report.snr_db == math.inf
    assert report.cosine == pytest.approx(1.0)
    assert dict(report.quantiles)[0.99] == 0.0
    assert report.histogram == ()


@pytest.mark.parametrize(
    ("wanted", "got", "misplaced"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0),
        ([1.0, math.nan], [1.0, 2.0], 1),
        ([1.0, 2.0], [1.0, math.nan], 1),
        ([math.inf, 1.0], [math.inf, 1.0], 0),
        ([math.inf, 1.0], [-math.inf, 1.0], 1),
        ([65504.0, 1.0], [math.inf, 1.0], 1),
    ],
)
def test_nan_and_infinity_must_be_in_the_same_places(wanted: list[float], got: list[float], misplaced: int) -> None:
    report = measured((torch.tensor(wanted), torch.tensor(got)), given=Tolerance(rtol=1.0, atol=1e9, outliers=1.0))
    assert report.misplaced == misplaced
    assert report.ok == (misplaced == 0)
    assert report.nans == (sum(map(math.isnan, wanted)), sum(map(math.isnan, got)))
    assert report.infs == (sum(map(math.isinf, wanted)), sum(map(math.isinf, got)))
    if misplaced:
        assert "NaN or infinity in other places" in report.failures[0]


def test_each_limit_is_kept_by_itself() -> None:
    reference = torch.tensor([100.0, 1.0, 0.0, -50.0])
    actual = reference + torch.tensor([0.5, 0.0, 0.01, 0.0])
    assert not measured((reference, actual), given=Tolerance(rtol=0.01)).ok  # nothing is allowed at 0
    assert measured((reference, actual), given=Tolerance(rtol=0.01, atol=0.02)).ok
    assert not measured((reference, actual), given=Tolerance(atol=0.02)).ok
    assert measured((reference, actual), given=Tolerance(scale=0.01)).ok  # 1 % of 55.9
    assert not measured((reference, actual), given=Tolerance(scale=0.001)).ok
    assert measured((reference, actual), given=Tolerance(atol=0.02, outliers=0.25)).ok
    wide = {"rtol": 1.0, "atol": 1.0}
    assert not measured((reference, -reference), given=Tolerance(**wide, scale=9.0, cosine=0.0)).ok
    assert measured((reference, actual), given=Tolerance(**wide, snr_db=40.0)).ok
    assert not measured((reference, actual), given=Tolerance(**wide, snr_db=60.0)).ok


def test_the_direction_of_noise_does_not_count() -> None:
    noise = 1e-7 * torch.randn(100)
    report = measured((noise, -noise), given=default_tolerance(torch.float32))
    assert report.cosine == pytest.approx(-1.0)
    assert report.ok


def test_other_shapes_fail() -> None:
    report = measured((torch.zeros(2, 3), torch.zeros(3, 2)))
    assert not report.ok
    assert "shape (3, 2) instead of (2, 3)" in report.failures[0]


def test_empty_and_scalar_outputs() -> None:
    assert measured((torch.zeros(0, 3), torch.zeros(0, 3))).ok
    assert measured((torch.tensor(3.0), torch.tensor(3.0))).ok
    assert not measured((torch.tensor(3), torch.tensor(4))).ok


def test_integers_and_booleans() -> None:
    reference = torch.arange(1000)
    actual = reference.clone()
    actual[:5] += 1
    report = measured((reference, actual))
    assert (report.ok, report.differing, report.max_abs) == (False, 5, 1.0)
    assert measured((reference, actual), computed_in="float16").ok  # half a percent, computed in half precision
    flags = reference % 2 == 0
    assert measured((flags, flags.clone())).ok
    assert not measured((flags, ~flags)).ok


def test_the_tolerance_is_that_of_the_coarser_side() -> None:
    x = torch.randn(50)
    report = measured((x, x.half()))
    assert report.tolerance == default_tolerance("float16")
    assert report.dtypes == ("float32", "float16")
    assert measured((x, x.clone()), computed_in="bfloat16").tolerance == default_tolerance("bfloat16")


def test_agreement_of_the_largest_values() -> None:
    reference = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1.0, 2, 3, 4, 5, 6, 7]])
    actual = reference.clone()
    actual[0, 0] = 7.5  # was first, is second
    actual[1, 0] = 5.5  # was last, is third: drives 3 out of the five
    report = measured((reference, actual), top_k=(1, 5))
    assert report.top_k == {1: 0.5, 5: pytest.approx(0.9)}


def test_shapes_are_grouped_and_bounded() -> None:
    found = OutputStatistics("output")
    for index in range(200):
        found.add(index, f"{index}x1", torch.zeros(1), torch.zeros(1))
    report = OutputReport.of(found)
    assert len(report.shapes) == 51
    assert report.shapes[-1].shape == "other shapes"
    assert report.shapes[-1].samples == 150


def test_a_sketch_holds_extremes() -> None:
    sketch = Sketch()
    assert math.isnan(sketch.quantile(0.5))
    sketch.add(torch.tensor([0.0, 1e-300, 1e300, 1.0], dtype=torch.float64))
    assert sketch.quantile(0.25) == 0.0
    assert sketch.quantile(0.75) == pytest.approx(1.0, rel=0.02)
    assert sketch.quantile(1.0) > 1e44
