"""What the records of scripts/bench_passes.py say: where each pass helps, what hurts, and docs/bench-passes.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASE, AGAIN = "default", "default again"
NEWER_OPSET = 24
NEWER, ALL = f"opset {NEWER_OPSET}", f"opset {NEWER_OPSET}, all fusions"
ADDED = "+"
"""What the variants begin with that have a pass more; the others are named for the pass that they lack."""
NOISE = 0.02
"""Least difference of two medians that counts, on top of what converting twice shows."""
SIZE = 0.02
"""Least difference of two engines' sizes that counts."""
ANGLE = 1e-4
"""Least difference of two cosines to eager float32 that counts."""

Row = dict[str, Any]

PURPOSE: Mapping[str, str] = {
    "FoldConstants": "The others read shapes, axes and bounds from constants.",
    "NarrowTypes": "TensorRT has no float64 and no integers of 16 bits, nor unsigned ones.",
    "RemoveNoOps": "What other passes leave, Casts to the same type and Reshapes to the same shape, hides patterns.",
    "RepairTypes": "The parser refuses these types.",
    "RepairRanks": "The parser refuses these ranks.",
    "FuseBatchNorm": "A batch norm is a step less where its convolution has the numbers.",
    "FoldShapes": "Constant shapes are what the merges go by.",
    "MergeCasts": "A type between two Casts may be one that engines lack.",
    "MergeSlices": "Slices of slices are as many copies where the builder does not see through them.",
    "MergeTransposes": "A Transpose is a copy where the builder does not fuse it.",
    "MergeReshapes": "A Reshape between a convolution and what follows keeps the builder from fusing them.",
    "RemoveDeadNodes": "Pools and norms with outputs that nobody reads are refused; what passes leave must go.",
}
"""Why a pass of the default pipeline is there, for the page where no model shows it."""

_LEGEND = f"""\
Every model is converted with the default pipeline, twice, and once less each pass that rewrote something in it. *Time
without it* is a multiple of the time with the default pipeline, above 1 the pass helps; the second conversion gives the
noise, and differences up to that and {NOISE:.0%} do not count. *Size* is that of the engines in the same way. A pass
also helps where a model does not convert without it, has more plugins or segments, or has nodes that the backend
refuses and that are written in other ops. Cosine is that to eager float32. Models in which a pass rewrites nothing are
left out."""

_FUSIONS = f"""\
The same for passes that can be added to the default pipeline: each model in opset {NEWER_OPSET}, attention in parts,
with one pass more, as a multiple of the time without. Below 1 the pass helps. Those that rewrite nothing are left out.
"""


class Verdict(NamedTuple):
    """What a pass does in one model: words, each with what it counts for."""

    helps: tuple[str, ...]
    hurts: tuple[str, ...]


def by_key(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """Rows by model, dtype and variant."""
    return {(row["model"], row["dtype"], row["variant"]): row for row in rows}


def base_of(variant: str) -> str:
    """The variant that another is compared with."""
    return NEWER if variant.startswith((ADDED, ALL)) else BASE


def noise_of(known: Mapping[tuple[str, str, str], Row], model: str, dtype: str) -> float:
    """How far two conversions with the same passes are apart, as a part of the time."""
    one, two = (known.get((model, dtype, variant), {}).get("ms") for variant in (BASE, AGAIN))
    return abs(two / one - 1) if one and two else 0.0


def judge(with_it: Row, without: Row, noise: float) -> Verdict:
    """What a pass does for a model, from the conversion with it and the one without."""
    if with_it["error"] or without["error"]:
        one = f"does not convert without it: {_short(without['error'])}"
        other = f"does not convert with it: {_short(with_it['error'])}"
        if with_it["error"]:
            return Verdict((), () if without["error"] else (other,))
        return Verdict((one,), ())
    helps, hurts = [], []
    for what, less in (
        ("plugin", without["plugins"] - with_it["plugins"]),
        ("segment", without["segments"] - with_it["segments"]),
        ("refused node", _refused(without) - _refused(with_it)),
    ):
        if less:
            words = f"{abs(less)} {what}{'s' * (abs(less) > 1)} {'fewer' if less > 0 else 'more'}"
            (helps if less > 0 else hurts).append(words)
    if "ms" in with_it and "ms" in without:
        ratio = without["ms"] / with_it["ms"]
        if abs(ratio - 1) > NOISE + noise:
            (helps if ratio > 1 else hurts).append(f"{ratio:.3f} of the time without it")
    ratio = without["engine_bytes"] / max(with_it["engine_bytes"], 1)
    # An engine may be smaller because a plugin does its work.
    if abs(ratio - 1) > SIZE and with_it["plugins"] == without["plugins"]:
        (helps if ratio > 1 else hurts).append(f"{ratio:.2f} of the size without it")
    if "cosine" in with_it and "cosine" in without and abs(with_it["cosine"] - without["cosine"]) > ANGLE:
        better = with_it["cosine"] > without["cosine"]
        (helps if better else hurts).append(f"cosine {with_it['cosine']:.5f}, {without['cosine']:.5f} without it")
    return Verdict(tuple(helps), tuple(hurts))


def _refused(row: Row) -> int:
    return int(row["rewrites"].get("RewriteRefused", 0))


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 90 else words[:87] + "..."


def verdict_of(known: Mapping[tuple[str, str, str], Row], row: Row) -> Verdict | None:
    """What the pass does that a row's variant lacks or adds; None for variants that are about no pass."""
    model, dtype, variant = row["model"], row["dtype"], row["variant"]
    base = known.get((model, dtype, base_of(variant)))
    if variant in (BASE, AGAIN, NEWER, ALL) or base is None:
        return None
    pair = (row, base) if variant.startswith(ADDED) else (base, row)
    return judge(*pair, noise_of(known, model, dtype))


def problems(rows: Sequence[Row]) -> list[str]:
    """What is wrong: conversions that failed with the whole pipeline, and passes of it that hurt somewhere."""
    known = by_key(rows)
    wrong = [f"{row['model']}: {row['error']}" for row in rows if row["error"] and row["variant"] in (BASE, AGAIN)]
    for row in rows:
        found = None if row["variant"].startswith(ADDED) else verdict_of(known, row)
        hurts = () if found is None or known[row["model"], row["dtype"], BASE]["error"] else found.hurts
        wrong += [f"{row['variant']} hurts {row['model']} ({row['dtype']}): {words}"
                  for words in hurts if not words.endswith("size without it")]  # fmt: skip
    return wrong


def helped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By pass, as variants name them, where it helps and how."""
    known = by_key(rows)
    found: dict[str, list[str]] = {}
    for row in rows:
        if (verdict := verdict_of(known, row)) is not None:
            words = found.setdefault(row["variant"], [])
            words += [f"{row['model']} ({', '.join(verdict.helps)})"] if verdict.helps else []
    return found


def latest(records: Sequence[Row]) -> list[Row]:
    """The rows of several records; the last that has one counts."""
    return list(by_key([row for record in records for row in record["rows"]]).values())


def render(records: Sequence[Row], out: Path | None) -> str:
    """The tables in Markdown, and the page if it is asked for."""
    rows = latest(records)
    order = list(dict.fromkeys(name for row in rows if row["variant"] == BASE for name in row.get("rewrites", {})))
    order = [name for name in order if name not in ("ConvertPrecision", "RewriteRefused")]
    fusions = sorted({row["variant"] for row in rows if row["variant"].startswith(ADDED)})
    wrong = problems(rows)
    lines = [*_summary(rows, order, fusions), "", "Hurts by more than noise: " + ("; ".join(wrong) or "nothing") + "."]
    lines += ["", "## Less one pass", "", _LEGEND, "", *_table(rows, order, "time without it")]
    if fusions:
        lines += ["", "## With one pass more", "", _FUSIONS, *_table(rows, fusions, "time with it")]
    lines += ["", "## Models", "", *_models(rows)]
    text = "\n".join(lines) + "\n"
    if out is not None:
        about = records[-1].get("environment", {})
        dry = "a dry run of small models: times say nothing"
        no_gpu = (
            f"a CPU ({dry if about.get('dry_run') else 'engines are built there, and not run: no times, no cosines'})"
        )
        where = about.get("device", no_gpu)
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        head = f"Made by `scripts/bench_passes.py` on {where}, {about.get('date', '')}; {versions}."
        out.write_text(f"# Passes: what each is good for\n\n{head}\n\n{text}")
    return text


def _summary(rows: Sequence[Row], order: Sequence[str], fusions: Sequence[str]) -> list[str]:
    where = helped(rows)
    busy = {name for row in rows if row["variant"] == BASE for name, count in row.get("rewrites", {}).items() if count}
    lines = ["| pass | helps | |", "|---|---|---|"]
    for name in order:
        found = where.get(name)
        none = "nowhere here" if found is not None else "not measured" if name in busy else "rewrites nothing here"
        words = "; ".join(found or ()) or none
        lines.append(f"| {name} | {words} | {'' if found else PURPOSE.get(name, '')} |")
    lines += [f"| {name} (not default) | {'; '.join(where.get(name, ())) or 'nowhere here'} | |" for name in fusions]
    return lines


def _table(rows: Sequence[Row], order: Sequence[str], title: str) -> list[str]:
    known = by_key(rows)
    lines = [f"| pass | model | dtype | rewrites | {title} | noise | size | cosine with | without | helps | hurts |",
             "|---|---|---|---:|---:|---:|---:|---:|---:|---|---|"]  # fmt: skip
    for kind in order:
        for row in (row for row in rows if row["variant"] == kind):
            model, dtype = row["model"], row["dtype"]
            base = known.get((model, dtype, base_of(kind)))
            verdict = verdict_of(known, row)
            if base is None or verdict is None:
                continue
            with_it, without = (row, base) if kind.startswith(ADDED) else (base, row)
            time_ = f"{row['ms'] / base['ms']:.3f}" if "ms" in row and "ms" in base else "–"
            size = "–"
            if row.get("engine_bytes") and base.get("engine_bytes"):
                size = f"{row['engine_bytes'] / base['engine_bytes']:.3f}"
            cosines = [f"{one['cosine']:.6f}" if "cosine" in one else "–" for one in (with_it, without)]
            lines.append(
                f"| {kind} | {model} | {dtype} | {with_it.get('rewrites', {}).get(kind.removeprefix(ADDED), '–')} | "
                f"{time_} | ±{noise_of(known, model, dtype):.3f} | {size} | {cosines[0]} | {cosines[1]} | "
                f"{'; '.join(verdict.helps)} | {'; '.join(verdict.hurts)} |"
            )
    return lines


def _models(rows: Sequence[Row]) -> list[str]:
    lines = ["| model | dtype | batch | ms | cosine | engine MiB | segments | plugins | build s | passes s |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        if row["variant"] == BASE and not row["error"]:
            measured = f"{row['batch']} | {row['ms']:.4f} | {row['cosine']:.6f}" if "ms" in row else "– | – | –"
            lines.append(
                f"| {row['model']} | {row['dtype']} | {measured} | "
                f"{row['engine_bytes'] / 2**20:.1f} | {row['segments']} | {row['plugins']} | "
                f"{row['stage_s'].get('build', 0):.1f} | {row['stage_s'].get('passes', 0):.2f} |"
            )
    failed = [row for row in rows if row["variant"] in (NEWER, ALL) and row["error"]]
    lines += ["", *(f"{row['model']}, {row['variant']}: {_short(row['error'])}" for row in failed)] if failed else []
    return lines
