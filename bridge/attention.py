"""The form that attention takes in the graph: what ``convert(attention=...)`` does to a model before it is built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from ..passes import PassReport, Pipeline, RemoveDeadNodes, RepeatHeads
from ..passes.fuse_attention import OPSET, FuseAttention
from ..passes.opset import opset_of, raise_opset
from .attention_blocks import BlockPair, Cutter
from .attention_judge import DECOMPOSED, FUSED, ONE_NODE, REPEATED, Judge, Verdict, make_judge
from .backends.base import Backend, Refusal
from .cache import resolve_cache_dir
from .model import OnnxModel, iterate_nodes, origin_of
from .options import Options

logger = logging.getLogger(__name__)

MODES = ("auto", "fused", "decomposed")
"""Values of the option, beside None for whatever the model has."""

_FLOATS16 = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one kind.

    Attributes:
        kind: type, shapes, mask.
        count: how many.
        form: "fused", "fused, keys and values repeated" (heads that are shared, and that the backend takes as one node
            only so), or "decomposed".
        reason: why.
        fused_ms: latency of one block alone as one node; None where not measured.
        decomposed_ms: likewise in parts.
    """

    kind: str
    count: int
    form: str
    reason: str
    fused_ms: float | None = None
    decomposed_ms: float | None = None

    def __str__(self) -> str:
        times = ""
        if self.fused_ms is not None and self.decomposed_ms is not None:
            times = f" ({self.fused_ms:.4f} ms as one node, {self.decomposed_ms:.4f} ms in parts)"
        return f"{self.count} {self.form}: {self.kind}: {self.reason}{times}"


@dataclass(frozen=True)
class AttentionReport:
    """What became of a model's attention.

    Attributes:
        mode: as asked for.
        groups: the blocks found.
        missed: softmaxes that look like attention and are none that one node can stand for, each with the reason.
        note: why nothing was looked at; "" where it was.
    """

    mode: str
    groups: tuple[BlockGroup, ...] = ()
    missed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def fused(self) -> int:
        """Blocks that are one node, in whatever form."""
        return sum(group.count for group in self.groups if group.form in ONE_NODE)

    @property
    def repeated(self) -> int:
        """Those of them for which keys and values are repeated."""
        return sum(group.count for group in self.groups if group.form == REPEATED)

    @property
    def decomposed(self) -> int:
        """Blocks in parts."""
        return sum(group.count for group in self.groups if group.form == DECOMPOSED)

    @property
    def summary(self) -> str:
        """One line."""
        if self.note:
            return f"attention {self.mode}: {self.note}"
        repeated = f" ({self.repeated} with keys and values repeated)" if self.repeated else ""
        missed = f", {len(self.missed)} not recognized" if self.missed else ""
        return f"attention {self.mode}: {self.fused} blocks as one node{repeated}, {self.decomposed} in parts{missed}"

    def __str__(self) -> str:
        missed: dict[str, list[str]] = {}
        for node, reason in self.missed.items():
            missed.setdefault(reason, []).append(node)
        lines = [self.summary, *(f"  {group}" for group in self.groups)]
        lines += [f"  not recognized: {len(nodes)}: {reason}; {nodes[0]}" for reason, nodes in missed.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "missed": dict(self.missed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionReport:
        groups = tuple(BlockGroup(**group) for group in data["groups"])
        return cls(data["mode"], groups, dict(data["missed"]), data["note"])


@dataclass
class Attention:
    """Gives attention its form, and learns from what is refused.

    Attributes:
        mode: one of `MODES`.
        judge: of single blocks.
        repeated: blocks of the model that the backend refused with heads that are shared, by the node's name, with its
            words.
        refused: blocks of the model that the backend refused as one node, likewise.
        report: on the last model.
        passes: what the pass did to it.
    """

    mode: str
    judge: Judge
    repeated: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    report: AttentionReport | None = None
    passes: tuple[PassReport, ...] = ()
    _made: frozenset[str] = frozenset()
    _shared: frozenset[str] = frozenset()  # nodes of the last model that can still have their keys and values repeated

    @property
    def state(self) -> frozenset[str]:
        """Equal where the same blocks stay in parts."""
        return frozenset((*(f"parts {name}" for name in self.refused), *(f"repeated {name}" for name in self.repeated)))

    def is_open(self, model: OnnxModel) -> bool:
        """Whether there is anything to look at in a model."""
        return not self._no_question(model)

    def apply(self, model: OnnxModel) -> tuple[OnnxModel, list[Refusal]]:
        """The model with its attention in the form chosen.

        Args:
            model: after everything else that changes types.

        Returns:
            The model, and Attention nodes that it came with and that should be in parts: these the caller rewrites.
        """
        self._made, self._shared, self.passes = frozenset(), frozenset(), ()
        native = {node.name: node for node in iterate_nodes(model.proto.graph) if _is_attention(node)}
        if self.mode == "decomposed":
            reason = 'attention="decomposed"'
            self.report = AttentionReport(
                self.mode, _groups([("the model's own node", Verdict(FUSED, reason))] * len(native))
            )
            return model, [_refusal(node, reason) for node in native.values()]
        note = self._no_question(model)
        if note:
            self.report = AttentionReport(self.mode, note=note)
            return model, []
        fused, missed = self._fuse(model, self.refused)
        stays = [("in the whole model", Verdict(DECOMPOSED, reason)) for reason in self._kept_reasons()]
        self.report = AttentionReport(self.mode, _groups(stays), missed)
        found = {node.name: node for node in fused.proto.graph.node if _is_attention(node)}
        if not found:
            return model, []
        verdicts = self._judge(model, fused, found.values())
        parts = {name: verdict.reason for name, (_, verdict) in verdicts.items() if verdict.form == DECOMPOSED}
        unwanted = [_refusal(native[name], reason) for name, reason in parts.items() if name in native]
        own = {name: reason for name, reason in parts.items() if name not in native}
        if own:
            fused, _ = self._fuse(model, {**self.refused, **own})
        repeats = frozenset(name for name, (_, verdict) in verdicts.items() if verdict.form == REPEATED)
        if repeats:
            fused = self._repeat(fused, repeats)
        self._made = frozenset(found.keys() - native.keys() - own.keys())
        self.report = dataclasses.replace(self.report, groups=_groups([*verdicts.values(), *stays]))
        logger.info("%s", self.report.summary)
        logger.debug("%s", self.report)
        return (fused if self._made or repeats else model), unwanted

    @property
    def learned(self) -> dict[str, dict[str, str]]:
        """What was refused so far, JSON-ready: what `recall` takes."""
        return {"repeated": dict(self.repeated), "parts": dict(self.refused)}

    def recall(self, learned: Mapping[str, Mapping[str, str]]) -> None:
        """Begin with what was refused in an earlier conversion of the same model."""
        self.repeated |= learned.get("repeated", {})
        self.refused |= learned.get("parts", {})

    def learn(self, refusals: Sequence[Refusal]) -> list[Refusal]:
        """Repeat keys and values, or leave in parts what was refused so too; what is left is about other nodes."""
        told = {refusal.node: refusal.reason.strip() for refusal in refusals}
        shared = {name: reason for name, reason in told.items() if name in self._shared and name not in self.repeated}
        new = {name: reason for name, reason in told.items() if name in self._made and name not in self.refused}
        new = {name: reason for name, reason in new.items() if name not in shared}
        for name, reason in shared.items():
            logger.info("attention %s has its keys and values repeated: %s", name, reason)
        for name, reason in new.items():
            logger.info("attention %s stays in parts: %s", name, reason)
        self.repeated |= shared
        self.refused |= new
        return [refusal for refusal in refusals if refusal.node not in new and refusal.node not in shared]

    def _kept_reasons(self) -> list[str]:
        """Why blocks stayed in parts in the last run of the pass, of those that the backend had refused."""
        told = set(self.refused.values())
        return [refusal.reason for done in self.passes[:1] for refusal in done.refusals if refusal.reason in told]

    def _no_question(self, model: OnnxModel) -> str:
        """Why the choice is clear without a look at the blocks; "" where it is not."""
        if self.mode != "auto":
            return ""
        if self.judge.backend.name == "onnxruntime":
            return "left as it is: ONNX Runtime fuses what it can itself"
        # Nodes that the model came with are left to the builder, which has its say on each model.
        return "" if _has_half(model.proto) else "left as it is: the kernels for one node are for 16 bits"

    def _fuse(self, model: OnnxModel, keep: Mapping[str, str]) -> tuple[OnnxModel, dict[str, str]]:
        """The model with every block as one node but some, and what is not recognized."""
        raised = raise_opset(model.proto, OPSET) if opset_of(model.proto) < OPSET else model.proto
        if isinstance(raised, str):
            return model, {"the model": raised}
        result = Pipeline((FuseAttention(keep), RemoveDeadNodes())).run(raised, model.weights)
        done = result.report.passes[0]
        self.passes = tuple(result.report.passes)
        missed = {refusal.node: refusal.reason for refusal in done.refusals if refusal.reason not in keep.values()}
        if not done.rewrites:
            return model, missed
        return dataclasses.replace(model, proto=result.proto, weights=result.weights), missed

    def _judge(
        self, model: OnnxModel, fused: OnnxModel, nodes: Iterable[onnx.NodeProto]
    ) -> dict[str, tuple[str, Verdict]]:
        """The kind of each block and its form."""
        cutter = Cutter(model, fused)
        found = {}
        shared = set()
        for node in nodes:
            pair = cutter.cut(node)
            if pair is None:
                found[node.name] = cutter.kind(node), self._unseen()
                continue
            verdict = self._verdict(pair)
            if verdict.form == FUSED and pair.repeated is not None:
                if node.name in self.repeated:
                    verdict = Verdict(REPEATED, f"in the whole model: {self.repeated[node.name]}")
                else:
                    shared.add(node.name)
            found[node.name] = pair.kind, verdict
        self._shared = frozenset(shared)
        return found

    def _repeat(self, model: OnnxModel, names: frozenset[str]) -> OnnxModel:
        """The model with keys and values of some nodes repeated."""
        result = Pipeline((RepeatHeads(names),)).run(model.proto, model.weights)
        self.passes = (*self.passes, *result.report.passes)
        return dataclasses.replace(model, proto=result.proto, weights=result.weights)

    def _verdict(self, pair: BlockPair) -> Verdict:
        return self.judge.judge(pair, measures=self.mode == "auto")

    def _unseen(self) -> Verdict:
        """For a block that cannot be tried alone: whole models that fail name no node, so it takes no risk."""
        reason = "it cannot be cut out of the model and tried alone"
        return Verdict(FUSED if self.mode == FUSED else DECOMPOSED, reason)


def make_attention(options: Options, backend: Backend, may_measure: bool = True) -> Attention | None:
    """What the options say about attention; None where it is left as it is.

    Raises:
        CacheError: the cache folder asked for cannot be written.
    """
    if options.attention is None:
        return None
    folder = resolve_cache_dir(options.cache_dir)
    return Attention(options.attention, make_judge(backend, options.build, folder, may_measure))


def _is_attention(node: onnx.NodeProto) -> bool:
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def _has_half(proto: onnx.ModelProto) -> bool:
    graph = proto.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return any(v.type.tensor_type.elem_type in _FLOATS16 for v in values)


def _groups(found: Iterable[tuple[str, Verdict]]) -> tuple[BlockGroup, ...]:
    counts: dict[tuple[str, Verdict], int] = {}
    for entry in found:
        counts[entry] = counts.get(entry, 0) + 1
    return tuple(
        BlockGroup(kind, count, v.form, v.reason, v.fused_ms, v.decomposed_ms) for (kind, v), count in counts.items()
    )


def _refusal(node: onnx.NodeProto, reason: str) -> Refusal:
    return Refusal(node.name, node.op_type, tuple(node.output), reason, tuple(node.input), origin_of(node))
