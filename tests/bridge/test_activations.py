"""How far two tensors are apart."""

from __future__ import annotations

import pytest
import torch

from trtbridge.bridge.activations import relative_error

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_error_of_tensors_of_several_blocks(dtype: torch.dtype) -> None:
    wanted = torch.randn(3, 50_000).to(dtype)
    mine = (wanted + 0.01 * torch.randn(3, 50_000)).to(dtype)
    mine[2, -1] += 100  # in the last, incomplete block
    a, b = mine.double(), wanted.double()
    assert relative_error(mine, wanted) == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-9)
    assert relative_error(mine.T, wanted.T) == pytest.approx(relative_error(mine, wanted), rel=1e-9)


@pytest.mark.parametrize(
    ("mine", "wanted", "error"),
    [
        ([2.0], [1.0], 1.0),
        ([], [], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.5, 0.0], [0.0, 0.0], 1.0),
        ([NAN, 3.0], [NAN, 4.0], 0.25),
        ([INF, 4.0], [INF, 4.0], 0.0),
        ([INF, 4.0], [4.0, 4.0], 1.0),
        ([1, 2, 3, 5], [1, 2, 3, 4], 0.25),
        ([True, False], [True, True], 0.5),
        ([1.0], [1.0, 1.0], 1.0),
    ],
)
def test_the_error_of_special_values(mine: list[float], wanted: list[float], error: float) -> None:
    assert relative_error(torch.tensor(mine), torch.tensor(wanted)) == error


def test_a_single_number() -> None:
    assert relative_error(torch.tensor(3.0), torch.tensor(4.0)) == 0.25
