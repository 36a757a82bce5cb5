"""docs/op-coverage.md, from the records of one or several sweeps (scripts/coverage.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OUTCOMES = ("engine", "mixed", "plugin", "failed")
BACKENDS = {"onnxruntime": "ONNX Runtime", "tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
BASELINE = (386, 645)
"""Ops that a bare torch.onnx.export with TensorRT-RTX's parser and builder gets right, of those tried; measured once
with torch 2.13 and TensorRT-RTX 1.6 on the ops with a float32, int64 or bool sample, numbers in ONNX Runtime."""

_INTRODUCTION = (
    "Every op of PyTorch's OpInfo database (`torch.testing._internal.common_methods_invocations.op_db`), with the "
    "first sample that runs eagerly, in float32 (int64 or bool where the op has no float; complex where it has "
    "neither). The op is a module whose inputs are the sample's tensors; all else is constant. It is converted with "
    "each backend and compared with eager PyTorch, rtol = atol = 5e-3: structure, dtypes, shapes and values; for "
    "random ops the distribution of each output (Kolmogorov-Smirnov over 4000 values or 1000 calls); for uninitialized "
    "memory shape and dtype.",
    "",
    "*engine*: no plugin. *plugin*: nothing but plugin calls. *mixed*: both. *failed*: it does not convert, does not "
    "build, or returns something else.",
)

Record = Mapping[str, Any]


def overall(op: Record) -> str:
    """One op's outcome over all backends: "failed" if one failed, else what the last one made of it.

    "no sample" where the database has none that runs on the machine, or only such without tensors: these ops count
    nowhere.
    """
    if "no_sample" in op:
        return "no sample"
    outcomes = [found["outcome"] for found in op["backends"].values()]
    if "no_tensor" in op or "failed" in outcomes or not outcomes:
        return "failed"
    return str(outcomes[-1])


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(records))
    print(f"wrote {path}", flush=True)


def render(records: Sequence[Record]) -> str:
    """The page as Markdown; the first record orders the ops."""
    lines = ["# Op coverage", ""]
    lines += ["Written by `scripts/coverage.py`; not edited by hand.", ""]
    lines += [*_INTRODUCTION, ""]
    lines += ["## Totals", "", *_totals(records), ""]
    for number, record in enumerate(records, 1):
        lines += _failed(record, _label(number, records))
    lines += _with_plugins(records)
    lines += _engines(records)
    lines += _without_sample(records[0])
    return "\n".join(lines).rstrip() + "\n"


def _label(number: int, records: Sequence[Record]) -> str:
    return f" (run {number})" if len(records) > 1 else ""


def _totals(records: Sequence[Record]) -> list[str]:
    lines = []
    for number, record in enumerate(records, 1):
        where = record["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        ran = f"TensorRT engines run on {where['device']}" if where["run"] else "TensorRT engines built, not run"
        host = f", plugin_host={where['plugin_host']!r}" if where["plugin_host"] else ""
        seconds = f", {record['seconds']} s" if "seconds" in record else ""
        title = f"Run {number}: " if len(records) > 1 else ""
        lines.append(f"- {title}{where['date']}, Python {where['python']}, {versions}; {ran}{host}{seconds}.")
        outside = sum(map(_kept_out, record["ops"].values()))
        if outside:
            lines.append(
                f"  Of those that failed {outside} cannot be inside an engine, as convert() says with the reason; by "
                "default (plugin_host='auto') they run between engines."
            )
    head = ["run"] if len(records) > 1 else []
    lines += ["", *_header([*head, "backend", "ops", *OUTCOMES, "right"])]
    for number, record in enumerate(records, 1):
        first = [str(number)] if head else []
        tried = [op for op in record["ops"].values() if overall(op) != "no sample"]
        rows = {"all": [overall(op) for op in tried]}
        for backend in _backends([record]):
            rows[BACKENDS.get(backend, backend)] = [
                op["backends"].get(backend, {"outcome": "failed"})["outcome"] for op in tried
            ]
        for name, outcomes in rows.items():
            counts = [outcomes.count(outcome) for outcome in OUTCOMES]
            right = len(outcomes) - counts[-1]
            share = f"**{_percent(right, len(outcomes))}**" if name == "all" else _percent(right, len(outcomes))
            lines.append(_row([*first, name, len(outcomes), *counts, share]))
    right, total = BASELINE
    words = "bare torch.onnx.export, parser and builder"
    lines.append(_row([*([""] if head else []), words, total, right, "", "", total - right, _percent(right, total)]))
    return lines


def _kept_out(op: Mapping[str, Any]) -> bool:
    """Whether all that went wrong is that an engine cannot hold the plugin, where it was told to."""
    failed = [found for found in op.get("backends", {}).values() if found["outcome"] == "failed"]
    return bool(failed) and all("plugin(s) inside an engine" in found.get("words", "") for found in failed)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _failed(record: Record, label: str) -> list[str]:
    failed = {name: op for name, op in record["ops"].items() if overall(op) == "failed"}
    if not failed:
        return []
    lines = [f"## Failed{label}: {len(failed)}", "", *_header(["op", "inputs", "backend", "where", "why"])]
    for name, op in sorted(failed.items()):
        if "no_tensor" in op:
            lines.append(_row([f"`{name}`", op.get("inputs", ""), "all", "result", op["no_tensor"]]))
            continue
        words: dict[tuple[str, str], list[str]] = {}
        for backend, found in op["backends"].items():
            if found["outcome"] == "failed":
                words.setdefault((found["stage"], found["reason"]), []).append(BACKENDS.get(backend, backend))
        for (stage, reason), backends in words.items():
            lines.append(_row([f"`{name}`", op.get("inputs", ""), ", ".join(backends), stage, reason]))
    return [*lines, ""]


def _with_plugins(records: Sequence[Record]) -> list[str]:
    """The ops that need a plugin on some backend, with the torch ops that their plugins call, and why."""
    lines: list[str] = []
    for wanted in ("mixed", "plugin"):
        names = [name for name in _names(records) if _worst(records, name) == wanted]
        if not names:
            continue
        backends = [(number, name) for number, record in enumerate(records) for name in _backends([record])]
        titles = [BACKENDS.get(name, name) + _label(number + 1, records) for number, name in backends]
        lines += [f"## {wanted.capitalize()}: {len(names)}", "", *_header(["op", *titles, "plugins", "why"])]
        for name in names:
            cells: list[str] = []
            plugins: set[str] = set()
            reasons: set[str] = set()
            for number, backend in backends:
                found = records[number]["ops"].get(name, {}).get("backends", {}).get(backend, {})
                cells.append(found.get("outcome", ""))
                plugins |= set(found.get("plugins", ()))
                reasons |= {reason[:120] for reason in found.get("reasons", {}).values() if reason}
            listed = ", ".join(f"`{plugin}`" for plugin in sorted(plugins))
            lines.append(_row([f"`{name}`", *cells, listed, "; ".join(sorted(reasons))]))
        lines.append("")
    return lines


def _engines(records: Sequence[Record]) -> list[str]:
    names = [name for name in _names(records) if _worst(records, name) == "engine"]
    return [f"## Engine: {len(names)}", "", ", ".join(f"`{name}`" for name in names), ""] if names else []


def _without_sample(record: Record) -> list[str]:
    found = {name: op["no_sample"] for name, op in record["ops"].items() if "no_sample" in op}
    if not found:
        return []
    lines = [
        f"## Not counted: {len(found)}",
        "",
        "Eager PyTorch runs none of their samples on the CPU, or they have to do with no tensor.",
        "",
    ]
    lines += [*_header(["op", "why"])]
    return [*lines, *(_row([f"`{name}`", words]) for name, words in sorted(found.items())), ""]


def _names(records: Sequence[Record]) -> list[str]:
    return sorted({name for record in records for name in record["ops"]})


def _worst(records: Sequence[Record], name: str) -> str:
    """The outcome that an op is listed under: that furthest from an engine alone."""
    found = {
        result["outcome"] for record in records for result in record["ops"].get(name, {}).get("backends", {}).values()
    }
    if any(overall(record["ops"][name]) == "failed" for record in records if name in record["ops"]):
        return "failed"
    return next((outcome for outcome in ("plugin", "mixed", "engine") if outcome in found), "no sample")


def _backends(records: Iterable[Record]) -> list[str]:
    found = {name for record in records for op in record["ops"].values() for name in op.get("backends", ())}
    return [name for name in BACKENDS if name in found]


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|" + " --- |" * len(titles)]


def _row(cells: Sequence[Any]) -> str:
    texts = [" ".join(str(cell).split()) for cell in cells]
    short = [text if len(text) <= 300 else text[:297] + "..." for text in texts]
    return "| " + " | ".join(text.replace("|", "\\|") for text in short) + " |"
