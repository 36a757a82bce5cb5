"""The tables of a `ProfileReport`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .model import Origin
from .profile_report import UNKNOWN, ProfileReport, fitting_depth


def render(report: ProfileReport, depth: int | None, top: int) -> Iterator[RenderableType]:
    """The head, and time by step, by module, by line and by layer."""
    yield Text(f"{report.source or 'program'} on {report.backend}, {report.device}\n{report.inputs}")
    yield Text(
        f"a call: {report.call_ms:.3f} ms (the faster half of {report.iterations}; all took {report.fastest_ms:.3f} to "
        f"{report.slowest_ms:.3f} ms)"
    )
    yield _steps(report, top)
    yield Text("")
    yield _modules(report, fitting_depth(report, top + 10) if depth is None else depth, top + 10)
    yield Text("")
    yield _lines(report, top)
    yield Text("")
    yield _layers(report, top)
    for note in report.notes:
        yield Text(f"note: {note}", style="dim")


def _steps(report: ProfileReport, top: int) -> Table:
    table = _table("step", ("ms", "of the call", "layers", "sum of layers, ms"), "from")
    # In order: which comes when says more than which is longest, unless there are too many.
    shown = report.steps if len(report.steps) <= top else sorted(report.steps, key=lambda step: -step.time_ms)[:top]
    for step in shown:
        layers = [layer for layer in report.layers if layer.segment == step.name] if not step.op else []
        numbers = [_ms(step.time_ms), _share(step.time_ms, report.call_ms)]
        numbers += [str(len(layers)), _ms(report.layers_ms(step.name))] if not step.op else ["", ""]
        name = f"plugin {step.op}" if step.op else step.name
        table.add_row(*map(Text, (name, *numbers, _place(step.origin) if step.op else "")))
    _rest(table, len(report.steps) - len(shown), sum(s.time_ms for s in report.steps if s not in shown), report.call_ms)
    table.add_row(*map(Text, ("all steps", _ms(report.steps_ms), _share(report.steps_ms, report.call_ms))))
    gap = report.call_ms - report.steps_ms
    table.add_row(*map(Text, ("the call's rest", _ms(gap), _share(gap, report.call_ms))))
    return table


def _modules(report: ProfileReport, depth: int, top: int) -> Table:
    table = _table(f"module (depth {depth})", ("ms", "of all", "layers"))
    rows = report.by_module(depth)
    for row in rows[:top]:
        name = {"": "(the module itself)", UNKNOWN: "(unknown)"}.get(row.path, row.path)
        count = f"{row.layers} + {row.plugins} plugin" if row.plugins else str(row.layers)
        table.add_row(*map(Text, (name, _ms(row.time_ms), _share(row.time_ms, report.parts_ms), count)))
    _rest(table, len(rows) - top, sum(row.time_ms for row in rows[top:]), report.parts_ms)
    return table


def _lines(report: ProfileReport, top: int) -> Table:
    table = _table("line", ("ms", "of all", "layers"), "code")
    rows = report.by_line()
    for row in rows[:top]:
        place = _place(Origin(row.file, row.line)) or "(unknown)"
        table.add_row(
            *map(Text, (place, _ms(row.time_ms), _share(row.time_ms, report.parts_ms), str(row.layers), row.code))
        )
    _rest(table, len(rows) - top, sum(row.time_ms for row in rows[top:]), report.parts_ms)
    return table


def _layers(report: ProfileReport, top: int) -> Table:
    table = _table("layer", ("ms", "of all"), "kind", "module", "line")
    rows = sorted(report.layers, key=lambda layer: -layer.time_ms)
    for row in rows[:top]:
        module = (
            "(unknown)" if row.module == UNKNOWN else row.module + f" +{len(row.fused_with)}" * bool(row.fused_with)
        )
        numbers = _ms(row.time_ms), _share(row.time_ms, report.parts_ms)
        table.add_row(*map(Text, (row.name, *numbers, row.kind, module, _place(row.origin))))
    _rest(table, len(rows) - top, sum(row.time_ms for row in rows[top:]), report.parts_ms)
    return table


def _rest(table: Table, count: int, time_ms: float, whole_ms: float) -> None:
    if count > 0:
        table.add_row(*map(Text, (f"{count} more", _ms(time_ms), _share(time_ms, whole_ms))))


def _table(first: str, numbers: Sequence[str], *texts: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=32 if first == "layer" else 24)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        # A line of code may be cut, a place and a path may not.
        table.add_column(name, overflow="fold" if name == "module" else "ellipsis", no_wrap=name != "module")
    return table


def _place(origin: Origin | None) -> str:
    """File and line: the whole path is long, and in the JSON."""
    return f"{PurePath(origin.file).name}:{origin.line}" if origin is not None and origin.file else ""


def _ms(value: float) -> str:
    return f"{value:.3f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
