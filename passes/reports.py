"""What passes and pipelines say of what they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import onnx
import onnx_ir as ir


class Refusal(NamedTuple):
    """A near miss: a node that a pass looked at and left as it is."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        rewrites: how many.
        refusals: near misses.
        seconds: time in the pass itself.
        nodes_before: nodes in the model, those of subgraphs included.
        nodes_after: the same after the pass.
    """

    name: str
    rewrites: int
    refusals: tuple[Refusal, ...]
    seconds: float
    nodes_before: int
    nodes_after: int

    def then(self, later: PassReport) -> PassReport:
        """Both runs of one pass in one report; the near misses are those of the later run."""
        rewrites, seconds = self.rewrites + later.rewrites, self.seconds + later.seconds
        return PassReport(self.name, rewrites, later.refusals, seconds, self.nodes_before, later.nodes_after)

    def __str__(self) -> str:
        counts = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.rewrites else "nothing to do"
        return "\n".join(
            [
                f"{self.name}: {self.rewrites} rewrites, {counts}, {self.seconds * 1e3:.0f} ms",
                *(f"  refused {refusal}" for refusal in self.refusals),
            ]
        )


@dataclass(frozen=True)
class PipelineReport:
    """What a pipeline did.

    Attributes:
        passes: one report a pass, in order.
        comparison: whether ONNX Runtime compared the numbers, or why it did not.
        seconds: all of it, checks and conversions included.
    """

    passes: tuple[PassReport, ...]
    comparison: str
    seconds: float

    @property
    def rewrites(self) -> int:
        return sum(report.rewrites for report in self.passes)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.passes), f"{self.seconds:.2f} s in all; numbers: {self.comparison}"])


@dataclass(frozen=True)
class PipelineResult:
    """A rewritten model.

    Attributes:
        proto: the model; initializers over 1024 bytes are stand-ins.
        weights: values of exactly its stand-ins, by initializer name.
        report: what was done.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    report: PipelineReport
