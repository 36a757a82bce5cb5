"""What a profile found: time by layer, by step, by module and by line of Python; prints as tables."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult

from .model import Origin

_WIDTH = 120
"""Columns of the tables where they go into text."""

UNKNOWN = "?"
"""The module path of layers that cannot be traced to a node of the graph."""


@dataclass(frozen=True)
class LayerTime:
    """A layer of an engine.

    Attributes:
        name: as the backend names it.
        kind: of which kind, in the backend's own words.
        segment: name of the engine that it is in.
        time_ms: in milliseconds a call, as the mean over the faster half of the calls; so are all times here.
        nodes: the nodes of the graph that it computes, by name; empty where nobody can tell.
        origin: where it comes from. Several nodes that were fused count where the product among them is (convolution,
            matrix product, attention), else where the last of them is. None where unknown.
        fused_with: module paths of the other nodes in it.
    """

    name: str
    kind: str
    segment: str
    time_ms: float
    nodes: tuple[str, ...] = ()
    origin: Origin | None = None
    fused_with: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module path that its time counts for: "" for the root, `UNKNOWN` where unknown."""
        return UNKNOWN if self.origin is None else module_of(self.origin)


@dataclass(frozen=True)
class StepTime:
    """A segment (an engine) or a plugin call between two.

    Attributes:
        name: of the segment or the plugin's node.
        time_ms: in milliseconds a call; layers were not timed in these calls.
        op: the plugin's op, "" for an engine.
        origin: where the plugin is called; None for an engine.
    """

    name: str
    time_ms: float
    op: str = ""
    origin: Origin | None = None


@dataclass(frozen=True)
class Span:
    """Something that ran from one moment to another in one of the calls kept for the trace.

    Attributes:
        name: of the step or layer, or "call".
        category: "call", "segment", "plugin" or "layer".
        start_us: in microseconds since the first call began.
        duration_us: in microseconds.
        details: more about it: module, line, nodes.
    """

    name: str
    category: str
    start_us: float
    duration_us: float
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleTime:
    """The time of a module with all that is in it.

    Attributes:
        path: module path, "" for what no submodule does, `UNKNOWN` for layers of unknown origin.
        time_ms: its layers and plugin calls, in milliseconds a call.
        layers: how many layers.
        plugins: how many plugin calls between engines.
    """

    path: str
    time_ms: float
    layers: int
    plugins: int = 0


@dataclass(frozen=True)
class LineTime:
    """The time of a line of Python.

    Attributes:
        file, line, code: the line; "" and 0 for layers of unknown origin.
        time_ms: in milliseconds a call.
        layers: how many layers and plugin calls come from it.
    """

    file: str
    line: int
    code: str
    time_ms: float
    layers: int


@dataclass(frozen=True)
class ProfileReport:
    """What ``module.profile()`` returns; prints as tables.

    Attributes:
        source: what was converted.
        backend, device: what ran it, and where.
        inputs: what it was called on, as text.
        iterations: how many calls of each kind were timed.
        call_ms: a whole call as users make it, in milliseconds.
        fastest_ms, slowest_ms: of these calls.
        steps: segments and plugin calls in order, timed one by one in calls of their own.
        layers: of all engines, in order, timed by the backend in calls of their own.
        spans: the last of these calls as they ran, for the trace.
        notes: what to know when reading the numbers.
    """

    source: str
    backend: str
    device: str
    inputs: str
    iterations: int
    call_ms: float
    fastest_ms: float
    slowest_ms: float
    steps: tuple[StepTime, ...]
    layers: tuple[LayerTime, ...]
    spans: tuple[Span, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steps_ms(self) -> float:
        """The sum of all steps; the rest of `call_ms` is checks of arguments, launches and what lies between steps."""
        return sum(step.time_ms for step in self.steps)

    @property
    def parts_ms(self) -> float:
        """The sum of all layers and of all plugins between engines: what tables by module, line and layer divide."""
        return sum(time_ms for _, time_ms, _ in self._parts())

    def layers_ms(self, segment: str) -> float:
        """The sum of an engine's layers."""
        return sum(layer.time_ms for layer in self.layers if layer.segment == segment)

    def by_module(self, depth: int | None = None) -> tuple[ModuleTime, ...]:
        """Time by module, the longest first.

        Args:
            depth: how many names of a path count: 1 puts ``encoder.layer.0.output`` under ``encoder``. None for all.
        """
        found: dict[str, list[float]] = {}
        for path, time_ms, plugin in self._parts():
            names = path.split(".")
            row = found.setdefault(".".join(names[:depth]), [0.0, 0, 0])
            row[0] += time_ms
            row[2 if plugin else 1] += 1
        rows = [ModuleTime(path, row[0], int(row[1]), int(row[2])) for path, row in found.items()]
        return tuple(sorted(rows, key=lambda row: -row.time_ms))

    def by_line(self) -> tuple[LineTime, ...]:
        """Time by line of Python, the longest first."""
        found: dict[tuple[str, int, str], list[float]] = {}
        for origin, time_ms in self._origins():
            known = origin or Origin()
            row = found.setdefault((known.file, known.line, known.code), [0.0, 0])
            row[0] += time_ms
            row[1] += 1
        rows = [LineTime(*place, row[0], int(row[1])) for place, row in found.items()]
        return tuple(sorted(rows, key=lambda row: -row.time_ms))

    def _parts(self) -> Iterator[tuple[str, float, bool]]:
        for layer in self.layers:
            yield layer.module, layer.time_ms, False
        for step in self.steps:
            if step.op:
                yield UNKNOWN if step.origin is None else module_of(step.origin), step.time_ms, True

    def _origins(self) -> Iterator[tuple[Origin | None, float]]:
        for layer in self.layers:
            yield layer.origin, layer.time_ms
        for step in self.steps:
            if step.op:
                yield step.origin, step.time_ms

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        data = {name: value for name, value in vars(self).items() if name not in ("steps", "layers", "spans")}
        data["notes"] = list(self.notes)
        data["steps"] = [_plain(step) for step in self.steps]
        data["layers"] = [_plain(layer) for layer in self.layers]
        data["spans"] = [vars(span) | {"details": dict(span.details)} for span in self.spans]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileReport:
        """The inverse of `to_json`."""
        read = dict(data)
        read["notes"] = tuple(data["notes"])
        read["steps"] = tuple(StepTime(**_read(step)) for step in data["steps"])
        read["layers"] = tuple(LayerTime(**_read(layer)) for layer in data["layers"])
        read["spans"] = tuple(Span(**span) for span in data["spans"])
        return cls(**read)

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the last profiled calls for chrome://tracing and https://ui.perfetto.dev.

        Raises:
            ModelFileError: the file cannot be written.
        """
        from .profile_trace import write_trace

        write_trace(self, path)

    def to_picture(self, path: str | os.PathLike[str], depth: int | None = None, rows: int = 20) -> None:
        """Write bar charts of the modules and of the kinds of layers that take the most time: .png, .svg or .pdf.

        Args:
            path: where to.
            depth: as for `by_module`; None for the one that fills the picture.
            rows: most bars in each.

        Raises:
            OptionError: matplotlib is not installed, or does not know the format.
            ModelFileError: the file cannot be written.
        """
        from .profile_picture import draw

        draw(self, path, depth, rows)

    def tables(self, depth: int | None = None, top: int = 15) -> Group:
        """The tables that print() shows, for a rich console.

        Args:
            depth: of the table by module, as for `by_module`; None for the deepest that is not too long.
            top: most rows of each table; that of modules may have ten more.
        """
        from .profile_tables import render

        return Group(*render(self, depth, top))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.tables()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=_WIDTH, no_color=True, highlight=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def module_of(origin: Origin) -> str:
    """The module path that an origin lies in; for a node of an .onnx file the scopes in its name."""
    if origin.file or not origin.module:
        return origin.module
    return ".".join(origin.module.strip("/").split("/")[:-1])


def fitting_depth(report: ProfileReport, rows: int) -> int:
    """The depth at which a table by module has as many rows as it may have, at most."""
    deepest = max((path.count(".") + 1 for path, _, _ in report._parts()), default=1)
    depths = [depth for depth in range(1, deepest + 1) if len(report.by_module(depth)) <= rows]
    return max(depths, default=1)


def _plain(part: LayerTime | StepTime) -> dict[str, Any]:
    data = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(part).items()}
    return data | {"origin": None if part.origin is None else part.origin.to_metadata()}


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    read = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return read | {"origin": None if data["origin"] is None else Origin.from_metadata(data["origin"])}
