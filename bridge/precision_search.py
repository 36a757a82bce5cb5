"""What must stay in float32 for a model to meet a tolerance, found by measuring."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import torch

from ..errors import TrtBridgeError
from .model import OnnxModel, origin_of
from .precision_report import ModuleError
from .rounding import RoundedModel, narrow_places

logger = logging.getLogger(__name__)

MOST_PARTS = 64
"""A model is searched in at most this many parts: modules of as great a depth as there are no more of."""

_MOST_RELEASES = 32
"""How many parts that were kept are tried in 16 bits again, one by one."""

_MOST_EXTENSIONS = 6
"""How often more is kept when the graph with its casts in place does not meet the tolerance after all."""

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        keep: tensors whose nodes stay in float32, each with the reason.
        parts: all parts, the most sensitive first; empty where nothing had to be searched.
        error: of the mixed model.
        runs: how many runs of the model it took, all samples together.
    """

    keep: Mapping[str, str]
    parts: tuple[ModuleError, ...]
    error: float
    runs: int


def relative_change(mine: Tensors, wanted: Tensors) -> float:
    """The L2 norm of the change of an output over that of the output, of the worst output.

    Where the wanted value is infinite or NaN, having the same is no change. Of a model without floating outputs it is
    the share of the elements that differ.
    """
    floating = [(a, b) for a, b in zip(mine, wanted, strict=True) if b.is_floating_point() or b.is_complex()]
    if not floating:
        return max((float((a != b).double().mean()) for a, b in zip(mine, wanted, strict=True) if b.numel()), default=0)
    worst = 0.0
    for a, b in floating:
        if a.shape != b.shape:
            return math.inf
        a, b = a.double(), b.double()
        usual = torch.isfinite(b)
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool(torch.isfinite(a[usual]).all()) or not bool(same[~usual].all()):
            return math.inf
        change, size = float((a[usual] - b[usual]).norm()), float(b[usual].norm())
        worst = max(worst, change / size if size else math.inf if change else 0.0)
    return worst


def search(
    model: OnnxModel,
    convert: Callable[[Mapping[str, str]], onnx.ModelProto],
    target: str,
    samples: Sequence[Tensors],
    tolerance: float,
) -> Found:
    """The smallest set of parts in float32 with which the outputs meet a tolerance, as far as is found.

    First everything rounds. If that is too much, each part rounds alone, which gives its sensitivity; a bisection over
    the parts so sorted finds how many of the most sensitive ones must stay; then each of these, the least sensitive
    first, is tried in 16 bits again. At last the mixed graph is run as it will be built.

    Args:
        model: in float32; node names are unique.
        convert: the mixed graph, given the tensors whose nodes stay in float32.
        target: "float16" or "bfloat16".
        samples: what it is run on, each a tensor for each input.
        tolerance: largest `relative_change`.

    Raises:
        TrtBridgeError: the model cannot be run in ONNX Runtime.
    """
    wanted = _outputs(RoundedModel(model, {}, target), samples)
    places = narrow_places(model.proto, convert({}))
    whole = RoundedModel(model, places, target)
    error = _worst(whole, samples, wanted, [True])
    runs = 2 * len(samples)
    if error <= tolerance or not places:
        return Found({}, (), error, runs)
    del whole  # it holds a copy of the weights
    parts = list(_parts(model.proto, places).items())
    rounded = RoundedModel(model, places, target, [nodes for _, nodes in parts])
    seeker = _Search(rounded, samples, wanted, tolerance)
    if seeker.error(set()) > tolerance:
        raise TrtBridgeError(
            f"two runs without any rounding differ by {seeker.error(set()):.2g}: its numbers are random"
        )
    alone = [seeker.error({index}) for index in range(len(parts))]
    order = sorted(range(len(parts)), key=lambda index: -alone[index])
    kept = seeker.release(order, seeker.shortest(order))
    del rounded
    runs += seeker.runs

    made = {name: [t for t in node.output if t] for node in model.proto.graph.node for name in [node.name]}

    def keep() -> dict[str, str]:
        return {
            tensor: f"by itself it changes the outputs by {alone[index]:.2g}; all together may by {tolerance:.2g}"
            for index in sorted(kept)
            for node in parts[index][1]
            for tensor in made[node]
        }

    for attempt in range(_MOST_EXTENSIONS + 1):
        final = narrow_places(model.proto, convert(keep()))
        error = _worst(RoundedModel(model, final, target), samples, wanted, [True])
        runs += len(samples)
        rest = [index for index in order if index not in kept]
        if error <= tolerance or not rest:
            break
        # One more, then two, then four: at the end all of them.
        kept |= set(rest if attempt == _MOST_EXTENSIONS - 1 else rest[: 1 << attempt])
    listed = tuple(ModuleError(parts[index][0], len(parts[index][1]), alone[index], index in kept) for index in order)
    logger.info("%d of %d parts stay in float32 for an error of %.2g", len(kept), len(parts), error)
    return Found(keep(), listed, error, runs)


@dataclass
class _Search:
    """Measures sets of parts, each once."""

    model: RoundedModel
    samples: Sequence[Tensors]
    wanted: Sequence[Tensors]
    tolerance: float
    runs: int = 0
    known: dict[frozenset[int], float] = field(default_factory=dict)

    def error(self, rounding: set[int]) -> float:
        """The error where these parts round and no others."""
        key = frozenset(rounding)
        if key not in self.known:
            switches = [index in key for index in range(self.model.groups)]
            self.known[key] = _worst(self.model, self.samples, self.wanted, switches)
            self.runs += len(self.samples)
        return self.known[key]

    def shortest(self, order: Sequence[int]) -> int:
        """How many of the first parts must stay in float32: a bisection, as an error shrinks with each that does."""
        low, high = 0, len(order)  # with none kept it is too large; with all kept there is none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.error(set(order[middle:])) <= self.tolerance else (middle, high)
        return high

    def release(self, order: Sequence[int], count: int) -> set[int]:
        """The first parts, less those that may round after all."""
        kept = set(order[:count])
        for index in list(reversed(order[:count]))[:_MOST_RELEASES]:
            if self.error(set(order) - (kept - {index})) <= self.tolerance:
                kept.discard(index)
        return kept


def _outputs(model: RoundedModel, samples: Sequence[Tensors]) -> list[Tensors]:
    return [model(sample) for sample in samples]


def _worst(
    model: RoundedModel, samples: Sequence[Tensors], wanted: Sequence[Tensors], switches: Sequence[bool]
) -> float:
    return max(
        relative_change(model(sample, switches), outputs) for sample, outputs in zip(samples, wanted, strict=True)
    )


def _parts(proto: onnx.ModelProto, names: Mapping[str, object]) -> dict[str, list[str]]:
    """The nodes by module, or in runs of neighbours where modules do not part them; at most `MOST_PARTS` parts."""
    modules = {node.name: origin_of(node).module for node in proto.graph.node if node.name in names}
    depth = max((path.count(".") + 1 for path in modules.values()), default=1)
    while True:
        parts: dict[str, list[str]] = {}
        for name, path in modules.items():
            parts.setdefault(".".join(path.split(".")[:depth]) or name, []).append(name)
        if len(parts) <= MOST_PARTS:
            return parts
        if depth == 1:
            break
        depth -= 1
    groups = list(parts.items())
    size = -(-len(groups) // MOST_PARTS)
    merged = {}
    for start in range(0, len(groups), size):
        run = groups[start : start + size]
        label = run[0][0] if len(run) == 1 else f"{run[0][0]} to {run[-1][0]}"
        merged[label] = [name for _, nodes in run for name in nodes]
    return merged
