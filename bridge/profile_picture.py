"""A profile as bar charts, with matplotlib."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelFileError, OptionError
from .atomic import write_atomically
from .profile_report import UNKNOWN, fitting_depth

if TYPE_CHECKING:
    from .profile_report import ProfileReport

_WIDTH_INCHES = 9.0
_BAR_INCHES = 0.24
_HEAD_INCHES = 0.75  # of a chart: its title and its axis
_LONGEST_LABEL = 44  # characters
_COLORS = {"module": "#4c78a8", "step": "#f58518", "kind": "#54a24b"}

_Bars = list[tuple[str, float]]


def draw(report: ProfileReport, path: str | os.PathLike[str], depth: int | None, rows: int) -> None:
    """Write the charts; see `ProfileReport.to_picture`.

    Raises:
        OptionError: matplotlib is not installed, or does not know the format.
        ModelFileError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("Pictures need matplotlib, which is not installed: pip install 'trtbridge[plot]'.") from error
    path = Path(path)
    charts = _charts(report, depth, rows)
    heights = [_HEAD_INCHES + _BAR_INCHES * len(bars) for _, _, bars in charts]
    # A figure of its own, without pyplot: nothing is kept, and no window system is asked for.
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    words = f"{report.source or 'program'} on {report.backend}, {report.device}: {report.call_ms:.3f} ms a call"
    figure.suptitle(f"{words}\n{_shorten(report.inputs, 100)}", fontsize=11, parse_math=False)
    axes = figure.subplots(len(charts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (kind, title, bars) in zip(axes, charts, strict=True):
        _draw_bars(axis, bars, title, _COLORS[kind], report.steps_ms if kind == "step" else report.parts_ms)
    data = io.BytesIO()
    try:
        figure.savefig(data, format=path.suffix.removeprefix(".") or "png", dpi=110, bbox_inches="tight")
    except ValueError as error:
        raise OptionError(f"{path.name}: {error}. Write a .png, .svg or .pdf.") from error
    try:
        write_atomically(path, lambda file: file.write(data.getvalue()))
    except OSError as error:
        raise ModelFileError(f"Cannot write {path}: {error}.") from error


def _charts(report: ProfileReport, depth: int | None, rows: int) -> list[tuple[str, str, _Bars]]:
    """Kind, title and bars of each chart that says something."""
    depth = fitting_depth(report, rows + 8) if depth is None else depth
    names = {"": "(the module itself)", UNKNOWN: "(unknown)"}
    modules = [(names.get(row.path, row.path), row.time_ms) for row in report.by_module(depth)]
    kinds: Counter[str] = Counter()
    for layer in report.layers:
        kinds[layer.kind or "layer"] += layer.time_ms  # type: ignore[assignment]
    for step in report.steps:
        if step.op:
            kinds[f"plugin {step.op}"] += step.time_ms  # type: ignore[assignment]
    charts = [("module", f"by module, depth {depth}", _most(modules, rows))]
    if len(report.steps) > 1:
        steps = [(f"plugin {step.op}" if step.op else step.name, step.time_ms) for step in report.steps]
        charts.append(("step", "by step", steps if len(steps) <= rows else _most(steps, rows)))
    charts.append(("kind", "by kind of layer", _most(list(kinds.items()), min(rows, 12))))
    return charts


def _most(bars: _Bars, rows: int) -> _Bars:
    """The longest bars, and one for the sum of the others."""
    bars = sorted(bars, key=lambda bar: -bar[1])
    if len(bars) <= rows:
        return bars
    rest = bars[rows - 1 :]
    return [*bars[: rows - 1], (f"{len(rest)} others", sum(value for _, value in rest))]


def _draw_bars(axis: Any, bars: _Bars, title: str, color: str, whole_ms: float) -> None:
    places = list(range(len(bars)))
    values = [value for _, value in bars]
    axis.barh(places, values, color=color, height=0.72)
    axis.set_yticks(places, [_shorten(name, _LONGEST_LABEL) for name, _ in bars], fontsize=9, parse_math=False)
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("ms a call", fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.margins(y=0.02)
    axis.set_xlim(0, max([*values, 1e-6]) * 1.25)  # room for the numbers behind the bars
    for place, value in zip(places, values, strict=True):
        share = f" ({value / whole_ms:.1%})" if whole_ms else ""
        axis.annotate(
            f"{value:.3f}{share}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _shorten(text: str, length: int) -> str:
    """The text, with its middle left out where it is too long: module paths differ at their ends."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
