"""A comparison as one page: opens from a disk, holds its plots, and asks no network for anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from .. import __version__
from .compare_report import CompareReport, OutputReport, number
from .report_plots import histogram, layers

_STYLE = """
:root { --ink: #1c2430; --soft: #5a6675; --rule: #d9dfe6; --back: #f5f7f9; --card: #fff; --blue: #2b6cb0;
  --good: #1d7a46; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 20px 14px 40px; }
h1 { font-size: 1.5em; margin: 0 0 .4em; }
h2 { font-size: 1.15em; margin: 0; } h3 { font-size: .95em; margin: 0 0 6px; }
h1, h2, p, dd, li, code { overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; margin-top: 14px; }
.head { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; }
.badge { color: #fff; border-radius: 4px; padding: 1px 9px; font-size: .85em; font-weight: 600; white-space: nowrap; }
.good { background: var(--good); } .bad { background: var(--bad); }
.soft { color: var(--soft); } .small { font-size: .88em; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; }
dl.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(145px, 1fr)); gap: 8px 12px;
  margin: 12px 0; }
dl.numbers div { border-left: 3px solid var(--rule); padding-left: 8px; }
dl.numbers dt { color: var(--soft); font-size: .82em; } dl.numbers dd { margin: 0; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); gap: 18px; margin-top: 14px; }
.plots > div { min-width: 0; }
svg { display: block; width: 100%; height: auto; max-width: 640px; }
svg text { font: 11px system-ui, "DejaVu Sans", sans-serif; fill: var(--soft); } svg text.small { font-size: 10px; }
.bar { fill: var(--blue); } .axis { stroke: var(--ink); } .grid { stroke: var(--rule); }
.mark { stroke: var(--bad); stroke-dasharray: 3 3; } .curve { fill: none; stroke: var(--blue); stroke-width: 1.5; }
.dot { fill: var(--blue); } .wrong { fill: var(--bad); }
ul { margin: 8px 0 0; padding-left: 20px; } ul.bad-list { color: var(--bad); background: none; }
.row { margin-top: 7px; } .row .track { background: var(--back); height: 9px; border-radius: 3px; }
.row .fill { height: 9px; border-radius: 3px; background: var(--blue); } .row .fill.over { background: var(--bad); }
.row .line { display: flex; justify-content: space-between; gap: 10px; font-size: .86em; }
.row .line span { overflow-wrap: anywhere; } .row .line span:last-child { white-space: nowrap; }
.whole { white-space: nowrap; }
ol.layers { margin: 10px 0 0; padding-left: 0; list-style: none; }
ol.layers li { border-top: 1px solid var(--rule); padding: 4px 0; }
ol.layers li.wrong-layer { color: var(--bad); }
"""

_MOST_BARS = 12
_MOST_LAYERS = 20


def make_page(report: CompareReport, found_layers: Sequence[Any] = ()) -> str:
    """The page's text.

    Args:
        report: what it shows.
        found_layers: the error layer by layer, as `CompareReport.to_html` takes it.
    """
    parts = [_header(report)]
    if found_layers:
        parts.append(_layers_section(found_layers))
    parts += [_output_section(output, report.own_error(output.label)) for output in report.outputs]
    title = escape(f"{report.actual} against {report.reference}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f'\n<p class="soft small">trtbridge {escape(__version__)}</p>\n</main>\n</body>\n</html>\n'
    )


def _header(report: CompareReport) -> str:
    failed = [output.label for output in report.outputs if not output.ok]
    verdict = "all outputs are within tolerance" if report.ok else f"out of tolerance: {', '.join(failed)}"
    facts = [
        ("Reference", report.reference),
        ("Compared", report.actual),
        ("Inputs", f"{report.inputs} ({report.samples} in all)"),
        ("Verdict", verdict),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<h1>Comparison {_badge(report.ok)}</h1>\n<section><dl class="facts">{rows}</dl></section>'


def _output_section(output: OutputReport, own: OutputReport | None) -> str:
    one, other = output.dtypes
    dtypes = one if one == other else f"{other} against {one}"
    extent = f"{_grouped(output.elements)} values of {output.samples} sample(s)"
    head = (
        f'<div class="head"><h2><code>{escape(output.label)}</code></h2>{_badge(output.ok)}'
        f'<span class="soft">{escape(dtypes)}, {extent}</span></div>'
    )
    parts = [head, _numbers(output), f'<p class="small">Allowed: {escape(str(output.tolerance))}.</p>']
    if own is not None:
        words = f"max absolute error {number(own.max_abs)}, SNR {_decibel(own.snr_db)}"
        place = escape(f"The reference in {own.dtypes[1]} instead of {own.dtypes[0]}")
        parts.append(f'<p class="small">{place}: {words}.</p>')
    if output.worst:
        parts.append(f'<p class="small">Largest error: {escape(output.worst)}.</p>')
    if output.failures:
        more = output.failed_samples - len(output.failures)
        lines = [*output.failures, *([f"and {more} more"] if more > 0 else [])]
        parts.append('<ul class="bad-list small">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
    parts.append(_plots(output))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _numbers(output: OutputReport) -> str:
    pairs = [
        ("max absolute error", number(output.max_abs)),
        ("mean absolute error", number(output.mean_abs)),
        ("max relative error", number(output.max_rel)),
        ("mean relative error", number(output.mean_rel)),
        ("max error / RMS", number(output.max_scaled)),
        ("cosine", f"{output.cosine:.8f}"),
        ("cosine, worst sample", f"{output.least_cosine:.8f}"),
        ("SNR", _decibel(output.snr_db)),
        ("SNR, worst sample", _decibel(output.least_snr_db)),
        ("values that differ", f"{_grouped(output.differing)} of {_grouped(output.elements)}"),
        ("values beyond limits", _grouped(output.beyond)),
    ]
    pairs += [(f"{_percent(share)} of errors within", number(value)) for share, value in output.quantiles]
    pairs += [(f"top-{k} agreement", f"{share:.2%}") for k, share in sorted(output.top_k.items())]
    if any((*output.nans, *output.infs)):
        pairs += [("NaN, reference / compared", f"{output.nans[0]} / {output.nans[1]}")]
        pairs += [("Inf, reference / compared", f"{output.infs[0]} / {output.infs[1]}")]
    return (
        '<dl class="numbers">'
        + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs)
        + "</dl>"
    )


def _plots(output: OutputReport) -> str:
    cells = []
    if output.histogram:
        marks = [(_percent(share), value) for share, value in output.quantiles if share in (0.5, 0.99)]
        picture = histogram(output.histogram, marks, f"Histogram of the absolute error of {output.label}")
        exact = f'<p class="soft small">{_grouped(output.exact)} values are exact.</p>'
        cells.append(f"<div><h3>How large the errors are</h3>{picture}{exact}</div>")
    else:
        cells.append('<div><h3>How large the errors are</h3><p class="soft">All finite values are exact.</p></div>')
    if output.shapes and output.max_abs:
        cells.append(f"<div><h3>Max absolute error by shape of the inputs</h3>{_shape_bars(output)}</div>")
    return f'<div class="plots">{"".join(cells)}</div>'


def _shape_bars(output: OutputReport) -> str:
    groups = sorted(output.shapes, key=lambda group: -group.max_abs)
    most = max((group.max_abs for group in groups if math.isfinite(group.max_abs)), default=0.0)
    rows = []
    for group in groups[:_MOST_BARS]:
        share = 100 * group.max_abs / most if most else 0.0
        words = f"{number(group.max_abs)}, SNR {_decibel(group.snr_db)}"
        count = f"{group.samples} sample(s)" + (f", {group.failures} failed" if group.failures else "")
        rows.append(
            f'<div class="row"><div class="line"><span>{escape(group.shape or "no tensor")}: {count}</span>'
            f'<span>{words}</span></div><div class="track"><div class="fill{" over" if group.failures else ""}" '
            f'style="width:{share:.1f}%"></div></div></div>'
        )
    if len(groups) > _MOST_BARS:
        rows.append(f'<p class="soft small">and {len(groups) - _MOST_BARS} shapes with smaller errors</p>')
    return "".join(rows)


def _layers_section(found: Sequence[Any]) -> str:
    """The error layer by layer: a curve, and the layers that stand out by name."""
    known = [layer for layer in found if _error(layer) is not None]
    if not known:
        return ""
    wrong = [bool(getattr(layer, "wrong", False)) for layer in known]
    errors = [float(_error(layer) or 0.0) for layer in known]
    picture = layers(errors, wrong, "Relative error of each layer")
    listed = [index for index, bad in enumerate(wrong) if bad][:_MOST_LAYERS]
    largest = sorted(range(len(known)), key=lambda index: -errors[index])
    listed += [index for index in largest if index not in listed][: max(0, _MOST_LAYERS // 2 - len(listed))]
    rows = []
    for index in sorted(listed):
        layer = known[index]
        name = str(getattr(layer, "tensor", None) or getattr(layer, "name", "?"))
        op = str(getattr(layer, "op_type", "") or getattr(layer, "op", ""))
        place = str(getattr(layer, "place", "") or "")
        words = " ".join(filter(None, [f"{index + 1}.", op, f"<code>{escape(name)}</code>", escape(place)]))
        why = f"; alone: {escape(layer.wrong)}" if wrong[index] and isinstance(layer.wrong, str) else ""
        kind = ' class="wrong-layer"' if wrong[index] else ""
        rows.append(f'<li{kind}>{words}, <span class="whole">error {number(errors[index])}</span>{why}</li>')
    return (
        '<section><h2>Error by layer</h2><div class="plots">'
        f"<div><h3>Relative error, wrong layers in red</h3>{picture}</div>"
        f'<div><h3>Where it is largest or wrong</h3><ol class="layers small">{"".join(rows)}</ol></div></div></section>'
    )


def _error(layer: Any) -> float | None:
    error: float | None = getattr(layer, "error", None)
    return error


def _badge(ok: bool) -> str:
    return f'<span class="badge {"good" if ok else "bad"}">{"within tolerance" if ok else "out of tolerance"}</span>'


def _decibel(value: float) -> str:
    text = number(value, ".1f")
    return text if text in ("-", "inf", "-inf") else f"{text} dB"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", " ")
