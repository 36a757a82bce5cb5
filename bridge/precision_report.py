"""What `convert(precision=...)` says of what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model import Origin


@dataclass(frozen=True)
class KeptNode:
    """A node that stayed in float32 for a reason of its own.

    Attributes:
        op_type: its op.
        output: the tensor that it makes.
        reason: why.
        origin: the Python line that it comes from.
    """

    op_type: str
    output: str
    reason: str
    origin: Origin


@dataclass(frozen=True)
class ModuleError:
    """What precision="auto" measured of one part of a model.

    Attributes:
        module: path of the nn.Module, or the nodes that are one part where the graph knows no modules.
        nodes: how many of its nodes may work in 16 bits.
        error: of the model's outputs when these nodes alone round to 16 bits: see `PrecisionReport.error`.
        kept: whether it stayed in float32.
    """

    module: str
    nodes: int
    error: float
    kept: bool


@dataclass(frozen=True)
class PrecisionReport:
    """What became of a model's precision.

    Attributes:
        precision: the option's value, "fp16" or "int8+fp16".
        converted: nodes that work in 16 bits now.
        kept: nodes that stayed in float32, each with its reason.
        following: other nodes of float32 values, which take the type of what is around them.
        casts: Cast nodes between float32 and 16 bits.
        calibration: on what the ranges of tensors were measured, or why they were not.
        quantized: products that read values in 8 bits.
        unquantized: other products, each with the reason.
        modules: with "auto" and where it had to search, the parts of the model, the most sensitive first.
        error: with "auto", the L2 norm of an output's change over that of the output, of the worst output and sample;
            rounding to 16 bits is emulated in ONNX Runtime.
        tolerance: the largest error asked for.
        runs: how many runs of the model the search took.
    """

    precision: str
    converted: int
    kept: tuple[KeptNode, ...]
    following: int
    casts: int
    calibration: str
    quantized: int = 0
    unquantized: tuple[KeptNode, ...] = ()
    modules: tuple[ModuleError, ...] = ()
    error: float | None = None
    tolerance: float | None = None
    runs: int = 0

    @property
    def summary(self) -> str:
        """One line."""
        parts = []
        if "+" in self.precision or not self.quantized:
            parts.append(
                f"{self.converted} nodes in 16 bits, {len(self.kept)} kept in float32 and {self.following} around "
                f"them, {self.casts} casts"
            )
        if self.quantized or self.unquantized:
            parts.append(f"{self.quantized} products in 8 bits, {len(self.unquantized)} not")
        parts.append(f"ranges: {self.calibration}")
        if self.error is not None:
            parts.append(f"error {self.error:.2g} of {self.tolerance:.2g} after {self.runs} runs")
        return f"precision {self.precision}: {'; '.join(parts)}"

    def __str__(self) -> str:
        lines = [self.summary]
        kept = [module for module in self.modules if module.kept]
        for module in [*kept, *[m for m in self.modules if not m.kept][: max(3, len(kept))]]:
            place = "float32" if module.kept else "16 bits"
            lines.append(f"  {place}: {module.module}, {module.nodes} nodes; error {module.error:.2g} by itself")
        lines += _grouped(self.kept, "float32") + _grouped(self.unquantized, "not in 8 bits")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        def plain(nodes: tuple[KeptNode, ...]) -> list[dict[str, Any]]:
            return [{**dataclasses.asdict(node), "origin": node.origin.to_metadata()} for node in nodes]

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        modules = [dataclasses.asdict(module) for module in self.modules]
        return {**fields, "kept": plain(self.kept), "unquantized": plain(self.unquantized), "modules": modules}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrecisionReport:
        def nodes(name: str) -> tuple[KeptNode, ...]:
            return tuple(
                KeptNode(**{**node, "origin": Origin.from_metadata(node["origin"])}) for node in data.get(name, ())
            )

        modules = tuple(ModuleError(**module) for module in data.get("modules", ()))
        return cls(**{**data, "kept": nodes("kept"), "unquantized": nodes("unquantized"), "modules": modules})


def _grouped(found: tuple[KeptNode, ...], words: str) -> list[str]:
    """A line for each op and reason. The values in a reason differ from node to node; one without is said once."""
    groups: dict[tuple[str, str], list[KeptNode]] = {}
    for node in found:
        groups.setdefault((node.op_type, node.reason), []).append(node)
    lines = []
    for (op_type, reason), nodes in groups.items():
        places = list(dict.fromkeys(_place(node) for node in nodes))
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        lines.append(f"  {words}: {len(nodes)} {op_type}: {reason}; from {', '.join(places[:3])}{more}")
    return lines


def _place(node: KeptNode) -> str:
    if node.origin.module:
        return node.origin.module
    return f"{node.origin.file}:{node.origin.line}" if node.origin.file else repr(node.output)
