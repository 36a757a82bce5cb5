"""Compares what an op returned with what eager PyTorch returns: by value, by distribution, or by shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from coverage_samples import UNINITIALIZED, Sample, eager
from torch.utils import _pytree as pytree

TOLERANCE = 5e-3  # rtol and atol
RANDOM_VALUES = 4000  # drawn for one distribution, if RANDOM_CALLS suffice for so many
RANDOM_CALLS = 1000
ALPHA = 1e-6  # chance of calling two equal distributions different


class MismatchError(Exception):
    """A converted op returned something else than eager PyTorch."""


class NoTensorError(Exception):
    """Eager PyTorch returns nothing that an engine could return."""


@dataclass(frozen=True)
class Reference:
    """What eager PyTorch returns.

    Attributes:
        sample: the op and its inputs.
        kind: "values", "distribution" (of random ops), or "shapes" (of memory that is not initialized).
        result: of one call.
    """

    sample: Sample
    kind: str
    result: Any

    @classmethod
    def make(cls, sample: Sample) -> Reference:
        """Call the op twice, with different random numbers.

        Raises:
            NoTensorError: the result holds no dense tensor.
        """
        first, second = (call_eagerly(sample, seed) for seed in (0, 1))
        _check_leaves(first)
        if any(part in sample.op for part in UNINITIALIZED):
            return cls(sample, "shapes", first)
        try:
            compare_values(second, first)
        except MismatchError:
            return cls(sample, "distribution", first)
        return cls(sample, "values", first)

    def check(self, converted: Callable[..., Any]) -> float:
        """Compare a converted module.

        Returns:
            The largest absolute difference; of random ops the largest distance of two distribution functions.

        Raises:
            MismatchError: it returns something else.
        """
        torch.manual_seed(2)
        result = converted(*self.sample.inputs())
        if self.kind == "values":
            return compare_values(result, self.result)
        compare_values(result, self.result, only_shapes=True)
        return self._compare_distributions(converted) if self.kind == "distribution" else 0.0

    def _compare_distributions(self, converted: Callable[..., Any]) -> float:
        """The two-sample Kolmogorov-Smirnov test of each output, over the values of many calls.

        Its critical distance at level a is sqrt(-ln(a/2)/2) * sqrt((n+m)/(n*m)); Knuth, TAOCP vol. 2, 3.3.1.
        """
        sizes = [tensor.numel() for tensor in _tensors(self.result)]
        calls = min(RANDOM_CALLS, max(16, math.ceil(RANDOM_VALUES / max(1, min(sizes)))))
        theirs = [_tensors(call_eagerly(self.sample, seed)) for seed in range(calls)]
        torch.manual_seed(3)
        mine = [_tensors(converted(*self.sample.inputs())) for _ in range(calls)]
        largest = 0.0
        for index in range(len(sizes)):
            expected, actual = ([call[index].double().flatten() for call in calls] for calls in (theirs, mine))
            if not sizes[index]:
                continue
            if _varies(expected) and not _varies(actual):
                raise MismatchError(f"output {index} is the same in {calls} calls; it should be random")
            one, other = torch.cat(expected), torch.cat(actual)
            distance = ks_distance(one, other)
            critical = math.sqrt(-math.log(ALPHA / 2) / 2) * math.sqrt((len(one) + len(other)) / len(one) / len(other))
            if distance > critical:
                raise MismatchError(
                    f"output {index} has another distribution: Kolmogorov-Smirnov distance {distance:.3f} over "
                    f"{len(one)} values, mean {other.mean():.4g} and standard deviation {other.std():.4g}, "
                    f"expected {one.mean():.4g} and {one.std():.4g}"
                )
            largest = max(largest, distance)
        return largest


def call_eagerly(sample: Sample, seed: int) -> Any:
    """The op's own result; as tensors of their own, since an engine's outputs share no memory."""
    torch.manual_seed(seed)
    with eager():
        result = sample.module(*sample.inputs())
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), result)


def _check_leaves(result: Any) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    strange = {str(tensor.layout) for tensor in tensors if tensor.layout is not torch.strided or tensor.is_nested}
    strange |= {str(tensor.dtype) for tensor in tensors if tensor.is_quantized}
    if strange:
        raise NoTensorError(f"eager PyTorch returns a tensor that is not dense: {', '.join(sorted(strange))}")
    if not tensors and not any(isinstance(leaf, (bool, int, float)) for leaf in pytree.tree_leaves(result)):
        raise NoTensorError(f"eager PyTorch returns no tensor but {type(result).__name__}")


def compare_values(actual: Any, expected: Any, only_shapes: bool = False) -> float:
    """Compare two nested results: structure, dtypes, shapes and, where asked, values within `TOLERANCE`.

    Returns:
        The largest absolute difference of finite values.

    Raises:
        MismatchError: they differ; the message says where and by how much.
    """
    mine, structure = pytree.tree_flatten(actual)
    theirs, expected_structure = pytree.tree_flatten(expected)
    if structure != expected_structure:
        raise MismatchError(f"returned {structure}, expected {expected_structure}")
    largest = 0.0
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        place = f"output {index}"
        if not isinstance(other, torch.Tensor):
            if type(one) is not type(other):
                raise MismatchError(f"{place} is a {type(one).__name__}, expected a {type(other).__name__}")
            if not isinstance(other, (int, float)):
                continue
            one, other = torch.tensor(one), torch.tensor(other)
        if not isinstance(one, torch.Tensor):
            raise MismatchError(f"{place} is a {type(one).__name__}, expected a tensor")
        if one.dtype != other.dtype or one.shape != other.shape:
            raise MismatchError(
                f"{place} is {one.dtype} of shape {tuple(one.shape)}, expected {other.dtype} {tuple(other.shape)}"
            )
        if not only_shapes:
            largest = max(largest, _compare_leaf(one.detach().cpu(), other.detach().cpu(), place))
    return largest


def _compare_leaf(actual: torch.Tensor, expected: torch.Tensor, place: str) -> float:
    if not expected.numel():
        return 0.0
    kind = torch.complex128 if expected.is_complex() else torch.float64
    one, other = actual.to(kind), expected.to(kind)
    wrong = ~torch.isclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    difference = torch.where(one == other, 0.0, (one - other).abs().double())
    finite = difference[difference.isfinite()]
    largest = finite.max().item() if finite.numel() else 0.0
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise MismatchError(
            f"{place} is wrong in {int(wrong.sum())} of {wrong.numel()} values by up to {largest:.3g}; "
            f"at {where} it is {one[where].item():.6g}, expected {other[where].item():.6g}"
        )
    return largest


def _tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result on the CPU, complex ones as pairs of reals."""
    tensors = [leaf.detach().cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _varies(calls: Sequence[torch.Tensor]) -> bool:
    return any(not torch.equal(calls[0], call) for call in calls[1:])


def ks_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest distance of the empirical distribution functions of two samples.

    Args:
        one: (n,) float64.
        other: (m,) float64.
    """
    one, other = one.sort().values, other.sort().values
    places = torch.cat([one, other])
    distances = [torch.searchsorted(sample, places, right=True) / len(sample) for sample in (one, other)]
    return float((distances[0] - distances[1]).abs().max())
