"""docs/model-coverage.md, from what scripts/model_sweep.py found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from model_sweep_examine import GOOD, STAGES, Outcome


def page(found: Sequence[Outcome], environments: Mapping[str, Mapping[str, str]]) -> str:
    """The page in Markdown.

    Args:
        found: what came of each model.
        environments: versions and machine, by backend and dtype.
    """
    lines = [
        "# Models that convert",
        "",
        "A small model of each timm family and each kind of transformers model, with random weights, converted, run",
        "and compared with PyTorch. Written by `python scripts/model_sweep.py`; scripts/model_zoo.py makes the models.",
        "fp32 without TF32. A model matches when every output has a cosine similarity of 0.9999 (fp16: 0.995) and no",
        "element is off by more than 1 % (fp16: 5 %) of the output's largest. The goal is every timm family, and every",
        "transformers kind that torch.export takes; the last column counts match and shapes only, not unstable.",
        "Where TensorRT asks for a bound of sizes that depend on data, the model was converted again with",
        "`max_data_size=1024`, or 64 where that does not build; the bound stands beside the model's name.",
        "",
    ]
    groups = sorted({(o.backend, o.dtype) for o in found})
    lines += ["| backend | dtype | source | " + " | ".join([*STAGES, "of those that torch.export takes"]) + " |"]
    lines += ["| --- | --- | --- |" + " ---: |" * (len(STAGES) + 1)]
    for backend, dtype in groups:
        for source in sorted({o.source for o in found}):
            chosen = [o for o in found if (o.backend, o.dtype, o.source) == (backend, dtype, source)]
            if chosen:
                counts = [sum(o.stage == stage for o in chosen) for stage in STAGES]
                good, taken = (
                    counts[0] + counts[1],
                    len(chosen) - counts[list(STAGES).index("torch.export")] - counts[-1],
                )
                share = f"{good} of {taken} ({100 * good / max(taken, 1):.1f} %)"
                lines.append(f"| {backend} | {dtype} | {source} | " + " | ".join(map(str, counts)) + f" | {share} |")
    lines += ["", *(f"- {name}: {meaning}." for name, meaning in STAGES.items())]
    for backend, dtype in groups:
        machine = environments.get(f"{backend} {dtype}", {})
        lines += ["", f"## {backend}, {dtype}", "", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
        chosen = [o for o in found if (o.backend, o.dtype) == (backend, dtype)]
        lines += _failures([o for o in chosen if o.stage not in (*GOOD, "no recipe")])
        lines += _table([o for o in chosen if o.stage in (*GOOD, "mismatch")])
        rest = [o for o in chosen if o.stage == "no recipe"]
        if rest:
            lines += ["", "No recipe: " + "; ".join(f"{o.name} ({cell(o.words, 90)})" for o in rest) + "."]
    return "\n".join(lines).rstrip() + "\n"


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    ranked = sorted(outcomes, key=lambda o: (-list(STAGES).index(o.stage), o.source, o.name))
    rows = [f"| {o.source} {o.name} | {o.stage} | {cell(o.words, 400)} |" for o in ranked]
    return ["### Failures", "", "| model | stage | words |", "| --- | --- | --- |", *rows, ""]


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    head = ["model", "outcome", "inputs", "parameters", "segments", "plugins", "cosine", "max abs error", "convert s"]
    lines = ["### Converted", "", "| " + " | ".join(head) + " |", "| --- | --- | --- |" + " ---: |" * 6]
    for o in sorted(outcomes, key=lambda o: (o.source, o.name)):
        plugins = ", ".join(f"{count} {op}" for op, count in o.plugins.items())
        numbers = f"{o.cosine:.6f} | {o.max_abs_error:.2g}" if o.cosine is not None else " | "
        name = f"{o.source} {o.name}" + (f" ({o.note})" if o.note and o.note != o.name else "")
        cells = [name, o.stage, o.inputs, f"{o.parameters / 1e6:.1f} M", str(o.segments), plugins]
        lines.append(f"| {' | '.join(map(cell, cells))} | {numbers} | {o.seconds.get('convert', 0):.1f} |")
    return lines


def cell(text: str, width: int = 160) -> str:
    """A text in one line, cut to a width, for a cell of a table."""
    flat = re.sub(r"\s+", " ", text).replace("|", "\\|").strip()
    return flat if len(flat) <= width else flat[: width - 1] + "…"
