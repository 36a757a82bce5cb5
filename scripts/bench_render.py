"""docs/bench.md, from a record of scripts/bench.py; bench_picture.py draws its picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Record = Mapping[str, Any]

_TITLES = {
    "floor": "A call beside the floor",
    "host": "What a call costs the host",
    "beside": "Beside PyTorch",
    "sizes": "What it brings that sizes are known",
    "where": "Where the time goes",
    "lowerings": "Other lowerings",
    "shapes": "Many shapes",
    "threads": "Many threads",
    "life": "Convert, cache, file, refit",
    "gpus": "Two GPUs",
}
_WORDS = {
    "floor": (
        "The floor is the same engine in a bare loop: fixed buffers, one CUDA graph, nothing else (of a program with "
        "plugins between engines: a capture of all its steps). Batch 1. *plain*: `cuda_graphs=False`; *graph*: "
        "`cuda_graphs=True`; *reused*: with `reuse_outputs=True`; *bound*: `module.bind(x)`. Milliseconds, with the "
        "multiple of the floor; the fastest way is to stay within 1.02. Kernels of these graphs wait for the end of "
        "the one ahead, as the results of TensorRT-RTX 1.6.1 beside other work need it (docs/runtime.md): *overlapped* "
        "is the graph as the engine makes it, of the floor and of `module.bind(x)` with `overlap_kernels=True`."
    ),
    "host": (
        "Microseconds of wall clock that a call takes the caller, over calls in a row without waiting for the device; "
        "*short*: over 50 calls, so that the device's queue, which holds the host when it is full, cannot fill. The "
        "bound is 20 µs for one input and one result: `one_linear` with a CUDA graph."
    ),
    "beside": (
        'Milliseconds. *ours* is converted with `attention="auto"` and called with `cuda_graphs=True`, fresh results; '
        "*bound* is `module.bind(x)`. *eager graph* is a "
        "replay of eager PyTorch in a CUDA graph, to be held against *bound*: neither copies anything. *inductor* is "
        "`torch.compile`, in the faster of its modes that were measured, all of which use CUDA graphs (A: "
        "`max-autotune`, R: `reduce-overhead`). eager / ours and inductor / ours above 1: ours is faster; **below 1 "
        "the engine is slower**, in bold. Weights are random; cosine is that to eager in the same dtype. *ours* takes "
        "all batch sizes from 1 to 32, and torch.compile makes a program for each (`dynamic=False`): *inductor / one "
        "size* is for an engine of one size, too, which is inductor / ours divided by what the next table has for it "
        "(or the one of other lowerings, where that lacks the model)."
    ),
    "sizes": (
        "Milliseconds of `module.bind(x)`, each way a conversion of its own, and in brackets as a multiple of the "
        "usual one: below 1 it is faster."
    ),
    "where": (
        "Milliseconds a call by kinds of work: in the engine by its own profiler (`module.profile()`; what is fused "
        "into a product or an attention counts there), in eager PyTorch by torch's (kernels alone, without what the "
        "host takes). Both time one thing after the other, so sums are above what a call takes; *call* is a plain one."
    ),
    "lowerings": (
        "Milliseconds of `module.bind(x)`, each way a conversion of its own, and in brackets as a multiple of the "
        "usual one: below 1 it is faster."
    ),
    "shapes": (
        "With `cuda_graphs=True`. *In turn*: eight batch sizes one after the other, round after round; the first call "
        "of a shape is a plain one, its second is captured, so captures end with the second round. *Random*: batch "
        "sizes (and lengths) at random over the whole range; *grown* is what allocated device memory grew by after the "
        "first fifth of the calls."
    ),
    "threads": (
        "Calls a second, all threads together, each on a stream of its own, batch 1; the number of calls is the same. "
        "Cosine is the least of a round in which every result is compared with eager; *other bits*: results that are "
        "not bit by bit what the module gives alone. Replays of one set of graphs take turns on the device: a module "
        "has four sets by itself where streams take turns, with *parallel_replays* as many as there are threads, or "
        "as the row says. *Own modules*: one for each thread; ahead of them one thread that calls these modules in "
        "turn, which costs it more than one module does, and in brackets how many times as many calls they make."
    ),
    "life": (
        "Seconds until there is a module, and of its first call; size of the engines. Each alone on the machine. "
        "A refit is to take a tenth of a convert at most. *Call*: one in milliseconds, waited for, after 30 others; "
        "that of refittable engines may be slower, as kernels cannot be made for their weights."
    ),
    "gpus": "`torchrun` with one process a GPU; two are to give 1.9 times the throughput of one.",
}
_WAYS = ("plain", "graph", "reused", "bound", "overlapped")


def page(record: Record, problems: Sequence[str], picture: str) -> str:
    """The page in Markdown.

    Args:
        record: of scripts/bench.py.
        problems: what is out of bounds.
        picture: file name of the picture, "" where there is none.
    """
    record = _with_one_run_each(record)
    used = sorted({row["run"] for row in record["rows"]})
    lines = ["# What a call costs", "", "Made by `scripts/bench.py`, medians; not edited by hand.", ""]
    lines += [f"- {_about(record['runs'][number])}" for number in used]
    if len(used) > 1:
        lines += ["", f"**Of {len(used)} runs: compare rows of one table only where one run measured it.**"]
    if any(record["runs"][number].get("dry_run") for number in used):
        lines += ["", "**A dry run of small models on a CPU: no number here means anything.**"]
    for part, title in _TITLES.items():
        rows = [row for row in record["rows"] if row["part"] == part]
        if not rows:
            lines += ["", f"## {title}", "", "Not measured."]
            continue
        good = [row for row in rows if not row.get("failed") and not row.get("skipped")]
        lines += ["", f"## {title}", "", _WORDS[part], ""]
        if part == "beside" and picture:
            lines += [f"![Times beside PyTorch]({picture})", ""]
        if good:
            lines += [*(_beside(good, one_size(record)) if part == "beside" else _TABLES[part](good)), ""]
        lines += [
            f"- {row['unit']}, {row['way'] or 'all'}: left out: {row['skipped']}" for row in rows if row.get("skipped")
        ]
        lines += [f"- {row['unit']}: failed: {_one_line(row['failed'])}" for row in rows if row.get("failed")]
        lines += [f"- {row['unit']}, {row['way']}: {_one_line(row['error'])}" for row in rows if row.get("error")]
        numbers = {row["run"] for row in rows}
        if len(used) > 1:
            lines += ["", f"Run {', '.join(str(used.index(number) + 1) for number in sorted(numbers))}."]
    lines += ["", "## Not as it should be", ""]
    lines += [f"- {_one_line(problem)}" for problem in problems] or ["Nothing."]
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def _with_one_run_each(record: Record) -> Record:
    """The record with runs of one day on one kind of machine, with the same sources and settings, as one."""
    same: dict[str, int] = {}
    numbers = [same.setdefault(_about(run | {"date": run.get("date", "")[:10]}), number)
               for number, run in enumerate(record["runs"])]  # fmt: skip
    return {**record, "rows": [{**row, "run": numbers[row["run"]]} for row in record["rows"]]}


def _about(run: Mapping[str, Any]) -> str:
    where = run.get("device") or f"a CPU ({run.get('platform', '')})"
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    settings = run.get("settings", {})
    driver = f", driver {run['driver']}" if "driver" in run else ""
    dtype, source = settings.get("dtype", ""), run.get("source", "")
    return f"{run.get('date', '')}, {where}{driver}; {dtype}; {versions}; sources `{source}`"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return (text if len(text) <= 200 else text[:197] + "...").replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def by_unit(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by their unit and way."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["unit"], {})[row["way"]] = row
    return found


def _ms(row: Row | None) -> str:
    return f"{row['ms']:.4f}" if row and "ms" in row else "–"


def _floor(rows: Sequence[Row]) -> list[str]:
    lines = []
    for unit, ways in by_unit(rows).items():
        cells = [
            f"{_ms(ways.get(way))} ({ways[way]['ratio']:.3f})" if "ratio" in ways.get(way, {}) else "–" for way in _WAYS
        ]
        lines.append([unit, _ms(ways.get("floor")), _ms(ways.get("floor, overlapped")), *cells])
    return _table(["model", "floor", "floor, overlapped", *_WAYS], lines)


def _host(rows: Sequence[Row]) -> list[str]:
    lines = []
    for unit, ways in by_unit(rows).items():
        cells = [f"{ways[way]['us']:.1f} ({ways[way]['us_short']:.1f})" if way in ways else "–" for way in _WAYS]
        lines.append([unit, str(next(iter(ways.values()))["calls"]), *cells])
    return _table(["model", "calls", *(f"{way} µs (short)" for way in _WAYS)], lines)


def fastest_inductor(ways: Mapping[str, Row]) -> tuple[str, Row | None]:
    """The faster mode of torch.compile, with its letter."""
    found = [(row["ms"], name, row) for name, row in ways.items() if name.startswith("inductor") and "ms" in row]
    if not found:
        return "", None
    _, name, row = min(found, key=lambda entry: entry[0])
    return name.split()[-1][0].replace("m", "A").replace("r", "R"), row


def one_size(record: Record) -> dict[str, float]:
    """By model and batch: the time of an engine for that size, as a multiple of one for all sizes."""
    found: dict[str, float] = {}
    for part in ("lowerings", "sizes"):  # the last word wins
        for row in record["rows"]:
            if row["part"] == part and row.get("lowering") == "one size" and "ratio" in row:
                found[f"{row['unit']} {row['batch']}"] = row["ratio"]
    return found


def _beside(rows: Sequence[Row], alone: Mapping[str, float]) -> list[str]:
    lines = []
    beside: dict[str, list[float]] = {"the engine": [], "the engine of one size": []}
    for unit, ways in by_unit(rows).items():
        model, batch = unit.rsplit(" ", 1)
        letter, inductor = fastest_inductor(ways)
        eager = ways.get("eager", {}).get("ratio")
        ours = None if inductor is None else inductor.get("ratio")
        for_size = ours / alone[unit] if ours and unit in alone else None
        for kind, ratio in zip(beside, (ours, for_size), strict=True):
            beside[kind] += [ratio] if ratio else []
        cosine = ways.get("graph", {}).get("cosine")
        times = [_ms(ways.get(way)) for way in ("graph", "bound", "plain", "eager", "eager graph")]
        lines.append([model, batch, *times,
                      f"{_ms(inductor)} {letter}".strip(), _ms(ways.get("torch_tensorrt")),
                      *(_multiple(ratio) for ratio in (eager, ours, for_size)),
                      f"{cosine:.6f}" if cosine is not None else "–"])  # fmt: skip
    head = ["model", "batch", "ours", "bound", "plain", "eager", "eager graph", "inductor", "Torch-TensorRT",
            "eager / ours", "inductor / ours", "inductor / one size", "cosine"]  # fmt: skip
    table = _table(head, lines)
    for kind, ratios in beside.items():
        if ratios:
            slower, middle = sum(ratio < 1 for ratio in ratios), statistics.median(ratios)
            table += [
                "",
                f"Of {len(ratios)} pairs {kind} is slower than inductor in {slower}; median ratio {middle:.2f}.",
            ]
    return table


def _multiple(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


def _where(rows: Sequence[Row]) -> list[str]:
    lines, slowest = [], []
    for row in rows:
        if "layers" in row:
            slowest += [
                [
                    row["unit"],
                    str(row["batch"]),
                    one["op"] or "–",
                    one["module"] or "–",
                    str(one["nodes"]),
                    f"{one['ms']:.4f}",
                ]
                for one in row["layers"]
            ]
            continue
        ratio = f"{row['eager_ms'] / row['ours_ms']:.2f}" if row["ours_ms"] else ""
        times = [f"{row[name]:.3f}" for name in ("ours_ms", "eager_ms")]
        lines.append([row["unit"], str(row["batch"]), row["kind"], *times, ratio, f"{row['call_ms']:.3f}"])
    kinds = _table(["model", "batch", "kind", "ours", "eager", "eager / ours", "call"], lines)
    if not slowest:
        return kinds
    layers = _table(["model", "batch", "op", "module", "nodes", "ms"], slowest)
    return [
        *kinds,
        "",
        "The layers of the engines that take the most, with the nodes that were fused into them:",
        "",
        *layers,
    ]


def _lowerings(rows: Sequence[Row]) -> list[str]:
    ways = {row["lowering"]: row["words"] for row in rows}
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["unit"], str(row["batch"])), {})
        if "ms" in row:
            line[row["lowering"]] = f"{row['ms']:.4f}" + (f" ({row['ratio']:.3f})" if "ratio" in row else "")
    table = [[*names, *(line.get(way, "–") for way in ways)] for names, line in lines.items()]
    about = [f"- *{way}*: {words}" for way, words in ways.items()]
    return [*_table(["model", "batch", *ways], table), "", *about]


def _shapes(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["way"] == "in turn":
            what = f"captures after each round: {', '.join(map(str, row['captures']))}"
            lines.append(
                [row["unit"], f"{row['shapes']} in turn", str(row["shapes"] * len(row["captures"])), what, "", ""]
            )
        else:
            peak = f"{row['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in row else "–"
            what = f"{row['captures']} captures, {row['graphs']} graphs kept, {row['replays']} replays"
            lines.append([row["unit"], "random", str(row["calls"]), what, peak, f"{row['grown_bytes'] / 2**20:.2f}"])
    return _table(["model", "shapes", "calls", "graphs", "peak MiB", "grown MiB"], lines)


def _threads(rows: Sequence[Row]) -> list[str]:
    def beside(row: Row) -> str:
        return f"{row['ratio']:.3f}" + (f" ({row['beside_in_turn']:.3f})" if "beside_in_turn" in row else "")

    lines = [[row["unit"], str(row["cuda_graphs"]), row["way"], str(row["threads"]), f"{row['calls_per_s']:.0f}",
              beside(row), f"{row['cosine']:.6f}", f"{100 * row['differ']:.2f} %" if "differ" in row else ""]
             for row in rows]  # fmt: skip
    head = ["model", "cuda_graphs", "", "threads", "calls a second", "beside one thread", "cosine", "other bits"]
    return _table(head, lines)


def _life(rows: Sequence[Row]) -> list[str]:
    lines = [[row["unit"], row["way"], f"{row['seconds']:.2f}", f"{row['ratio']:.4f}" if "ratio" in row else "–",
              f"{row['first_call_s']:.2f}", f"{row['call_ms']:.3f}" if "call_ms" in row else "–",
              f"{row['bytes'] / 2**20:.1f}", f"{row['cosine']:.6f}"]
             for row in rows]  # fmt: skip
    return _table(["model", "way", "s", "beside convert", "first call s", "call ms", "engines MiB", "cosine"], lines)


def _gpus(rows: Sequence[Row]) -> list[str]:
    lines = [
        [row["way"], f"{row['throughput']:.1f}" if row["throughput"] else "–", f"{row.get('ratio', 1.0):.3f}"]
        for row in rows
    ]
    return _table(["processes", "a second", "beside one"], lines)


_TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "floor": _floor, "host": _host, "sizes": _lowerings, "where": _where, "lowerings": _lowerings, "shapes": _shapes,
    "threads": _threads, "life": _life, "gpus": _gpus,
}  # fmt: skip
