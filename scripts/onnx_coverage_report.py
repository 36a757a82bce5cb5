"""docs/onnx-coverage.md, from the record of a sweep (scripts/onnx_coverage.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTCOMES = ("engine", "mixed", "plugin", "failed")
BACKENDS = {"onnxruntime": "ONNX Runtime", "tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}

_INTRODUCTION = """\
Every node test of ONNX's own backend test suite (`onnx.backend.test`) whose inputs and outputs are float32, float16,
int32, int64 or bool, converted from its .onnx file with `tb.convert(path)`. All inputs stay inputs of the converted
model, axes, shapes and repeats too, which TensorRT itself takes as constants only.

With ONNX Runtime the converted model runs, and its results are compared with those that the case expects: types,
shapes, and values within the case's own tolerances (rtol 1e-3, atol 1e-7), where an error of a millionth of the largest
expected value is rounding, and float16 may be off by two units in the last place. Of cases that draw random numbers,
types and shapes are compared. With TensorRT-RTX the model is parsed and built{ran}.

*engine*: no plugin. *plugin*: nothing but plugins. *mixed*: both. *failed*: it does not convert, or returns something
else."""

Record = Mapping[str, Any]


def write_report(record: Record, path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(record))
    print(f"wrote {path}", flush=True)


def render(record: Record) -> str:
    """The page as Markdown."""
    cases = record["cases"]
    backends = [name for name in BACKENDS if any(name in case["backends"] for case in cases.values())]
    ran = ", and run" if "gpu" in record["environment"] else ""
    environment = ", ".join(f"{name} {version}" for name, version in record["environment"].items())
    lines = [
        "# ONNX coverage", "", "Written by `scripts/onnx_coverage.py`; not edited by hand.", "",
        _INTRODUCTION.format(ran=ran), "", f"With {environment}.", "", "## Totals", "",
        f"| backend | cases | right | share | {' | '.join(OUTCOMES)} |", "|" + "---|" * (4 + len(OUTCOMES)),
    ]  # fmt: skip
    for backend in backends:
        counts = Counter(case["backends"][backend]["outcome"] for case in cases.values() if backend in case["backends"])
        total = sum(counts.values())
        right = total - counts["failed"]
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {BACKENDS[backend]} | {total} | {right} | {100 * right / max(total, 1):.1f} % | {cells} |")
    lines += ["", *_failures(cases, backends), *_table(cases, backends), *_plugins(cases, backends)]
    lines += _bounded(cases, backends)
    lines += ["## Cases of other types", "", "They do not count above.", "", "| reason | cases |", "|---|---|"]
    for reason, count in Counter(record["skipped"].values()).most_common():
        lines.append(f"| {reason} | {count} |")
    return "\n".join(lines) + "\n"


def _failures(cases: Mapping[str, Any], backends: list[str]) -> list[str]:
    rows = [
        f"| {name} | {BACKENDS[backend]} | {found['stage']} | {_cell(found['reason'])} |"
        for name, case in cases.items()
        for backend in backends
        if (found := case["backends"].get(backend, {})).get("outcome") == "failed"
    ]
    if not rows:
        return ["## Failures", "", "None.", ""]
    return ["## Failures", "", "| case | backend | stage | reason |", "|---|---|---|---|", *rows, ""]


def _table(cases: Mapping[str, Any], backends: list[str]) -> list[str]:
    """By op: cases of one node, the expanded ones (a function's body) under the op that they are of."""
    by_op: dict[str, dict[str, Counter[str]]] = {}
    for case in cases.values():
        nodes = case.get("nodes", [])
        op = nodes[0] if len(nodes) == 1 else "(several nodes)"
        for backend in backends:
            if backend in case["backends"]:
                outcomes = by_op.setdefault(op, {}).setdefault(backend, Counter())
                outcomes[case["backends"][backend]["outcome"]] += 1
    lines = [
        "## By op",
        "",
        f"| op | {' | '.join(BACKENDS[b] for b in backends)} |",
        "|" + "---|" * (1 + len(backends)),
    ]
    for op in sorted(by_op):
        cells = [
            ", ".join(f"{by_op[op][b][outcome]} {outcome}" for outcome in OUTCOMES if by_op[op].get(b, {}).get(outcome))
            for b in backends
        ]
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return [*lines, ""]


def _plugins(cases: Mapping[str, Any], backends: list[str]) -> list[str]:
    lines = ["## What became a plugin", "", "In the words of the first case.", "", "| op | backend | cases | why |",
             "|---|---|---|---|"]  # fmt: skip
    for backend in backends:
        reasons: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for case in cases.values():
            for op, reason in case["backends"].get(backend, {}).get("plugins", ()):
                counts[op] += 1
                reasons.setdefault(op, reason)
        lines += [f"| {op} | {BACKENDS[backend]} | {counts[op]} | {_cell(reasons[op])} |" for op in sorted(counts)]
    return [*lines, ""]


def _bounded(cases: Mapping[str, Any], backends: list[str]) -> list[str]:
    names = [n for n, c in cases.items() for b in backends if c["backends"].get(b, {}).get("max_data_size")]
    if not names:
        return []
    return ["## Sizes without a bound", "",
            f"{len(names)} cases have sizes that depend on values of inputs and that nothing bounds; TensorRT needs a "
            "bound, which `max_data_size=4096` gave: " + ", ".join(names) + ".", ""]  # fmt: skip


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]
