"""The plots of the report page, as SVG in the page's text: no script, no font, no file beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 360, 210
"""Of every plot, in its own units: one unit is a pixel on a telephone, and more than one on a screen."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 40
_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(exponent: int) -> str:
    """A power of ten as text: 10⁻³."""
    return "10" + str(exponent).translate(_SUPER)


def histogram(bars: Sequence[tuple[float, int]], marks: Sequence[tuple[str, float]], title: str) -> str:
    """How often errors of each size occur.

    Args:
        bars: (log10 of the lower edge, count), a quarter of a decade apart.
        marks: (name, value) of lines to draw, such as quantiles; those that are 0 are left out.
        title: read out where the plot cannot be seen.
    """
    step = 0.25
    low = math.floor(bars[0][0])
    high = max(low + 1, math.ceil(bars[-1][0] + step))
    most = max(count for _, count in bars)

    def x(exponent: float) -> float:
        return _LEFT + (exponent - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(count: float) -> float:
        return HEIGHT - _BOTTOM - count / most * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for exponent, count in bars:
        if count:
            left, top = x(exponent), y(count)
            width, height = max(1.0, x(exponent + step) - left - 1), HEIGHT - _BOTTOM - top
            parts.append(f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
    parts += _decades(low, high, x)
    parts += [
        _text(_LEFT - 5, y(most) + 4, _count(most), "end"),
        _text(_LEFT - 5, y(0), "0", "end"),
        _line(_LEFT, y(0), WIDTH - _RIGHT, y(0), "axis"),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, "absolute error of a value", "middle"),
    ]
    lines = [(name, min(max(x(math.log10(value)), _LEFT), WIDTH - _RIGHT)) for name, value in marks if value > 0]
    parts += [_line(at, _TOP - 2, at, y(0), "mark") for _, at in lines]
    parts += _names_over(lines)
    return _svg(title, parts)


def layers(errors: Sequence[float], wrong: Sequence[bool], title: str) -> str:
    """The error layer by layer, on a logarithmic scale.

    Args:
        errors: relative, in the order of the layers; 0 and what is not finite have lines of their own at the edges.
        wrong: which of them are out of tolerance.
        title: read out where the plot cannot be seen.
    """
    logs = [math.log10(error) for error in errors if error > 0 and math.isfinite(error)]
    low = math.floor(min(logs, default=-8))
    high = max(low + 1, math.ceil(max(logs, default=0)))
    every = _every(high - low)
    ticks = [(float(exponent), power(exponent)) for exponent in range(low, high + 1, every)]
    if any(error <= 0 for error in errors):
        ticks.insert(0, (low - every, "0"))
    if not all(map(math.isfinite, errors)):
        ticks.append((high + every, "∞"))
    bottom, top = ticks[0][0], max(high, ticks[-1][0])

    def x(index: float) -> float:
        return _LEFT + 4 + index / max(1, len(errors) - 1) * (WIDTH - _LEFT - _RIGHT - 8)

    def height(exponent: float) -> float:
        return HEIGHT - _BOTTOM - (exponent - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    def y(error: float) -> float:
        return height(bottom if error <= 0 else math.log10(error) if math.isfinite(error) else top)

    parts = []
    for exponent, words in ticks:
        at = height(exponent)
        parts += [_line(_LEFT, at, WIDTH - _RIGHT, at, "grid"), _text(_LEFT - 5, at + 4, words, "end")]
    points = " ".join(f"{x(i):.1f},{y(error):.1f}" for i, error in enumerate(errors))
    parts.append(f'<polyline class="curve" points="{points}"/>')
    for index, error in enumerate(errors):
        kind = "wrong" if wrong[index] else "dot"
        if wrong[index] or len(errors) <= 60:
            radius = 3.5 if wrong[index] else 2
            parts.append(f'<circle class="{kind}" cx="{x(index):.1f}" cy="{y(error):.1f}" r="{radius}"/>')
    parts += [
        _text(_LEFT + 4, HEIGHT - _BOTTOM + 16, "1", "start"),
        _text(WIDTH - _RIGHT, HEIGHT - _BOTTOM + 16, str(len(errors)), "end"),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, "layer, in the order of the graph", "middle"),
    ]
    return _svg(title, parts)


def _names_over(lines: Sequence[tuple[str, float]]) -> list[str]:
    """The names of marks, (name, x) from left to right, above their lines; of a close pair each on its own side."""
    size = 34  # of a name, in pixels
    if len(lines) == 2 and lines[1][1] - lines[0][1] < size + 4:
        (name, left), (other, right) = lines
        right = min(max(right, _LEFT + size + 6), WIDTH - size)
        left = max(min(left, right - 6), _LEFT + size)
        return [_text(left, _TOP - 4, name, "end", "small"), _text(right, _TOP - 4, other, "start", "small")]
    return [_text(min(max(at, _LEFT + 16), WIDTH - 18), _TOP - 4, name, "middle", "small") for name, at in lines]


def _decades(low: int, high: int, x: object) -> list[str]:
    assert callable(x)
    parts = []
    for exponent in range(low, high + 1, _every(high - low)):
        at = x(exponent)
        anchor = "middle" if at < WIDTH - _RIGHT - 8 else "end"
        parts += [
            _line(at, HEIGHT - _BOTTOM, at, HEIGHT - _BOTTOM + 4, "axis"),
            _text(at, HEIGHT - _BOTTOM + 16, power(exponent), anchor),
        ]
    return parts


def _every(decades: int) -> int:
    """How many decades from one label to the next, so that they stay apart."""
    return max(1, math.ceil(decades / 8))


def _count(count: int) -> str:
    """A count in five characters."""
    for limit, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= limit:
            unit = 10**3 if letter == "k" else limit
            return f"{count / unit:.3g}{letter}"
    return str(count)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{body}</svg>'
