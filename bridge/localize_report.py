"""What `localize` found, as objects, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .model import Origin

if TYPE_CHECKING:
    from .repro import Repro

_SHOWN = 12
"""Layers in the printed table where there are many: those around the first wrong one, or the largest errors."""


@dataclass(frozen=True)
class Layer:
    """A tensor of a graph beside the reference's value of it.

    Errors are relative: the L2 norm of the difference over that of the reference (`activations.layer_error`).

    Attributes:
        tensor: its name in the graph.
        op_type: ONNX op of the node that makes it.
        node: name of that node.
        origin: the Python line and module that it comes from.
        precision: its dtype, as torch names it ("float16").
        shape: of the reference's value.
        error: of the whole stage run on the inputs, so it holds what comes from the layers before; None where the stage
            cannot be run.
        own_error: of this layer alone, given the reference's values of what it reads; None where it was not measured.
        inherited: the largest ``error`` among the layers that it reads.
        limit: the largest ``own_error`` that its precision explains.
        wrong: in words how it is beyond that alone, "" if it is not.
        note: what else there is to say.
    """

    tensor: str
    op_type: str
    node: str
    origin: Origin
    precision: str
    shape: tuple[int, ...]
    error: float | None = None
    own_error: float | None = None
    inherited: float = 0.0
    limit: float = 0.0
    wrong: str = ""
    note: str = ""

    @property
    def growth(self) -> float | None:
        """How many times larger its error is than the largest that it reads; None where one is not known or 0."""
        return self.error / self.inherited if self.error is not None and self.inherited else None

    @property
    def place(self) -> str:
        """``net.py:12 (encoder.norm)``, as far as it is known."""
        line = f"{Path(self.origin.file).name}:{self.origin.line}" if self.origin.file else ""
        return " ".join(filter(None, [line, f"({self.origin.module})" if self.origin.module else ""]))

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _plain_dict({**data, "origin": _origin_json(self.origin), "growth": self.growth})


@dataclass(frozen=True)
class Stage:
    """One form of the model, compared with the reference.

    Attributes:
        name: "export", "given graph", "pass FuseGelu", "precision fp16", "engine tensorrt_rtx".
        layers: in the order of the graph.
        output_errors: relative error of each result, by name.
        wrong: in words how results are beyond what rounding adds up to, "" if they are not.
        notes: what could not be done, and why.
    """

    name: str
    layers: tuple[Layer, ...] = ()
    output_errors: Mapping[str, float] = field(default_factory=dict)
    wrong: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "output_errors": _plain(dict(self.output_errors)),
            "wrong": self.wrong,
            "notes": list(self.notes),
            "layers": [layer.to_json() for layer in self.layers],
        }


@dataclass(frozen=True)
class Suspect:
    """The first place where a stage parts from the reference by its own fault.

    Attributes:
        stage: name of the stage.
        layer: the layer whose value is wrong although what it reads is right.
        op_type: ONNX op of the node to blame; the layer's own one where it cannot be told more closely.
        node: name of that node.
        output: the tensor that it makes.
        origin: the Python line and module that it comes from.
        words: how its result is wrong.
        nodes: all nodes between this layer and those before it that were compared: what the repro holds.
        hint: what else is known: a weight that has other values than the module's.
    """

    stage: str
    layer: Layer
    op_type: str
    node: str
    output: str
    origin: Origin
    words: str
    nodes: tuple[str, ...] = ()
    hint: str = ""

    @property
    def as_plugins(self) -> str:
        """What runs in PyTorch instead with ``convert(as_plugins=...)``; "" where that does not go round the mistake.

        The innermost module that the layer is in, else its torch op, else (of a file) the node.
        """
        if not self.stage.startswith(("export", "engine")):
            return ""
        return (self.origin.module or self.origin.op) if self.origin.call else self.node

    def __str__(self) -> str:
        lines = [f"{self.op_type} {self.node!r} in stage {self.stage}: {self.words}", f"  from {self.origin}"]
        if self.as_plugins:
            lines.append(f"  as_plugins={self.as_plugins!r} runs it in PyTorch meanwhile")
        if self.hint:
            lines.append(f"  {self.hint}")
        if len(self.nodes) > 1:
            lines.append(
                f"  among {len(self.nodes)} nodes that make {self.layer.tensor!r}: {', '.join(self.nodes[:8])}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        more = {"origin": _origin_json(self.origin), "layer": self.layer.tensor, "as_plugins": self.as_plugins}
        return _plain_dict(data | more)


@dataclass(frozen=True)
class LocalizeReport:
    """Where a converted model parts from what it was made of.

    Attributes:
        source: what was compared with ("torch Net").
        stages: those that were compared, in order; the search ends at the first that is wrong.
        suspect: the layer to blame; None where no layer is wrong by itself.
        builds: engines that were built for this.
        repro_dir: folder of the standalone repro, where one was written.
    """

    source: str
    stages: tuple[Stage, ...]
    suspect: Suspect | None = None
    builds: int = 0
    repro_dir: Path | None = None
    repro: Repro | None = field(default=None, repr=False, compare=False)

    @property
    def found(self) -> bool:
        """Whether something is wrong: a layer by itself, or the results."""
        return self.suspect is not None or bool(self.stages and self.stages[-1].wrong)

    @property
    def stage(self) -> Stage:
        """The stage that is wrong, else the last one."""
        name = self.suspect.stage if self.suspect is not None else ""
        return next((stage for stage in self.stages if stage.name == name), self.stages[-1])

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of that stage, in order."""
        return self.stage.layers

    @property
    def first(self) -> Layer | None:
        """The layer to blame; where no layer is wrong by itself, the first whose error is beyond that of its dtype."""
        if self.suspect is not None:
            return self.suspect.layer
        return (
            next((a for a in self.layers if a.error is not None and a.error > 10 * a.limit), None)
            if self.found
            else None
        )

    def save_repro(self, folder: str | Path) -> Path:
        """Write the suspect as a standalone repro: model.onnx, inputs.npz, expected.npz and run.py.

        Raises:
            TrtBridgeError: there is no suspect.
            ModelFileError: the folder cannot be written.
        """
        from .repro import no_repro

        if self.repro is None:
            raise no_repro()
        return self.repro.save(Path(folder))

    @property
    def verdict(self) -> str:
        """What was found, in a few lines."""
        if self.suspect is not None:
            return f"first wrong: {self.suspect}"
        if self.found:
            words = (
                f"stage {self.stage.name} is off ({self.stage.wrong}), but no layer is wrong by itself: errors add up"
            )
            first = self.first
            return words + (f"; the first beyond its precision is {first.tensor!r} {first.place}" if first else "")
        return f"nothing wrong in {', '.join(stage.name for stage in self.stages)}"

    def __str__(self) -> str:
        stream = io.StringIO()
        console = Console(file=stream, width=160, highlight=False)
        console.print(Text(f"{self.source} against {', '.join(stage.name for stage in self.stages)}"), soft_wrap=True)
        for stage in self.stages:
            errors = ", ".join(f"{name} {_number(error)}" for name, error in stage.output_errors.items()) or "not run"
            console.print(
                Text(f"stage {stage.name}: {len(stage.layers)} layers, errors of results: {errors}"), soft_wrap=True
            )
            for note in stage.notes:
                console.print(Text(f"  {note}"), soft_wrap=True)
        console.print(self._table())
        console.print(Text(self.verdict), soft_wrap=True)
        if self.repro_dir is not None:
            console.print(Text(f"repro: python {self.repro_dir / 'run.py'}"), soft_wrap=True)
        return stream.getvalue().rstrip()

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("layer", "op", "dtype", "error", "growth", "own error", "from"):
            table.add_column(heading, overflow="fold")
        shown = self._shown()
        for layer in shown:
            style = "bold red" if self.suspect is not None and layer is self.suspect.layer else ""
            growth = "-" if layer.growth is None else f"x{layer.growth:.3g}"
            note = f"  {layer.wrong or layer.note}" if layer.wrong or layer.note else ""
            cells = (
                layer.tensor,
                layer.op_type,
                layer.precision,
                _number(layer.error),
                growth,
                _number(layer.own_error),
            )
            table.add_row(*map(Text, cells), Text(layer.place + note), style=style)
        hidden = len(self.layers) - len(shown)
        if hidden:
            table.add_row(Text(f"... {hidden} more in .layers"))
        return table

    def _shown(self) -> Sequence[Layer]:
        """The layers around the first wrong one; else those of the largest errors, in order."""
        layers = self.layers
        first = self.first
        if len(layers) <= _SHOWN:
            return layers
        if first is not None and first in layers:
            start = max(0, layers.index(first) - _SHOWN // 2)
            return layers[start : start + _SHOWN]
        largest = sorted(layers, key=lambda one: one.error or one.own_error or 0.0, reverse=True)[:_SHOWN]
        return [layer for layer in layers if any(layer is one for one in largest)]

    def to_json(self) -> dict[str, Any]:
        """Everything but the repro's values, JSON-ready: NaN and infinity are texts."""
        return {
            "source": self.source,
            "found": self.found,
            "verdict": self.verdict,
            "builds": self.builds,
            "suspect": None if self.suspect is None else self.suspect.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "repro_dir": None if self.repro_dir is None else str(self.repro_dir),
        }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _origin_json(origin: Origin) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(origin.to_metadata())
    return data


def _plain_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    """Without what JSON has not: infinity and NaN as texts, tuples as lists."""
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
