"""What a call costs and how long an engine's life is: the measurements of docs/bench.md.

    python scripts/bench.py --json FILE --work DIR [--parts floor,host,...] [--models NAME ...]    measures
    python scripts/bench.py --render FILE ...                   docs/bench.md and docs/bench.png of records
    python scripts/bench.py --list                              parts and their units

Models are converted first, several at once, each in a process of its own. Then each unit (a part with one model) is
measured in a process of its own, one after the other. Conversions stay in --work, and the record is written after each
unit: the same command again goes on where a run was stopped. What failed is tried again with --again.

Parts, with a rough guess at the minutes that each takes on one H100 with 16 cores (nobody has measured it yet), the
conversion of what it needs not counted; a conversion was seen to take 11 to 19 s with 6 at once, so that all 22 models
take 1 to 2 minutes with 8 workers:

    floor     2    our ways of a call beside the same engine in a bare CUDA graph, 5 models
    host      1    host time of a call, 3 models
    shapes    2    eight shapes in turn, 10,000 calls with random shapes, 2 models
    threads   1    8 threads on one module and on 8 modules, 2 models
    life      4    convert, from the cache, from a file, refit, 2 models
    beside   20    eager, eager in a CUDA graph, torch.compile, 20 models at batch 1 and 32; that is with --inductor
                   reduce-overhead; with "max-autotune" as well (the default) 60 or more, so in several sessions
    sizes     5    an engine for one batch size, or with a profile for each, beside one for all, 20 models
    where     2    time by kinds of work, in the engine and in eager PyTorch, and by layers, 5 models
    lowerings 10   other ways to convert a model, each beside the usual one, 5 models at batch 1 and 32
    gpus      3    torchrun on one GPU and on two (a machine with two)

On a GPU the backend is TensorRT-RTX; with TRTBRIDGE_GPU_TESTS_ON_CPU=1 everything is a dry run of small models with
ONNX Runtime, whose times say nothing. Exit status: 0 all within the bounds of the page, 1 something is not, or failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_common import DRY_RUN, ROOT, Row, Settings, alone, read, run_child, say, stem, write

MINUTES_A_UNIT = 8.0


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: as on the command line.
        module: where its function of the same name is: (unit, settings, keep) to rows.
        wrong: name of the function there that tells what is out of bounds.
        models: name of the tuple there of its models, "" for none.
    """

    name: str
    module: str
    wrong: str
    models: str


PARTS = (
    Part("floor", "bench_floor", "floor_wrong", "FLOOR_MODELS"),
    Part("host", "bench_floor", "host_wrong", "HOST_MODELS"),
    Part("shapes", "bench_calls", "shapes_wrong", "SHAPE_MODELS"),
    Part("threads", "bench_calls", "threads_wrong", "THREAD_MODELS"),
    Part("life", "bench_life", "life_wrong", "LIFE_MODELS"),
    Part("beside", "bench_beside", "wrong", ""),
    Part("sizes", "bench_lowerings", "lowerings_wrong", "SIZE_MODELS"),
    Part("where", "bench_where", "where_wrong", "WHERE_MODELS"),
    Part("lowerings", "bench_lowerings", "lowerings_wrong", "LOWERING_MODELS"),
    Part("gpus", "bench_life", "gpus_wrong", ""),
)
CONVERTED = ("floor", "host", "shapes", "threads", "beside", "where")
"""Parts that begin with a converted model."""


def part_named(name: str) -> Part:
    """A part by name."""
    return next(part for part in PARTS if part.name == name)


def model_of(part: str, unit: str) -> str:
    """The model that a unit is about."""
    return unit.rsplit(" ", 1)[0] if part == "beside" else unit


def units(part: Part, models: Sequence[str], batches: Sequence[int]) -> list[str]:
    """The units of a part; with models named, those of these models: also of such as it does not have by itself."""
    import bench_beside
    import bench_life
    import bench_models

    if part.name == "gpus":
        return [bench_life.TWO_GPUS]
    own = bench_models.BESIDE if part.name == "beside" else getattr(importlib.import_module(part.module), part.models)
    names = [case.name for case in bench_models.CASES if any(word in case.name for word in models)] if models else own
    return bench_beside.units(names, batches) if part.name == "beside" else list(names)


# One unit, in a process of its own.


def measure(part: str, unit: str, order: Path, out: Path) -> None:
    """Measure a unit and write its rows, as far as they are known, again and again."""
    settings = Settings.from_json(read(order))
    kept: list[Row] = []

    def keep(rows: list[Row]) -> None:
        kept[:] = rows
        write(out, rows)

    function = getattr(importlib.import_module(part_named(part).module), part)
    try:
        # These compile first, and then wait for their turn by themselves.
        with nullcontext() if part in ("beside", "sizes", "lowerings") else alone():
            keep(function(unit, settings, keep))
    except Exception as error:  # the words are the finding
        traceback.print_exc()
        keep([*kept, {"way": "", "failed": f"{type(error).__name__}: {error}"[:600]}])


def run_unit(part: str, unit: str, settings: Settings, limit_s: float) -> list[Row]:
    """Measure a unit in a child; a child that dies leaves what it had written, and why it died."""
    place = settings.work / f"unit_{part}_{stem(unit)}"
    order, out = place.with_suffix(".order"), place.with_suffix(".rows")
    out.unlink(missing_ok=True)
    write(order, settings.to_json())
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--unit", part, unit, str(order), str(out)]
    problem = run_child(command, limit_s)
    rows: list[Row] = read(out) or []
    if problem and not any(row.get("failed") for row in rows):
        rows.append({"way": "", "failed": problem})
    return rows


# The whole run.


def bench(options: argparse.Namespace, settings: Settings) -> int:
    """Convert, measure, and write the record after each unit."""
    import bench_models
    from helpers import environment

    record: dict[str, Any] = read(options.json) or {"runs": [], "rows": []}
    settings.work.mkdir(parents=True, exist_ok=True)
    jobs = [(part, unit) for name in options.parts for part in [part_named(name)]
            for unit in units(part, options.models, options.batches)]  # fmt: skip
    known = {(row["part"], row["unit"]) for row in record["rows"]}
    if options.again:
        known -= {(row["part"], row["unit"]) for row in record["rows"] if row.get("failed") or row.get("skipped")}
    jobs = [(part, unit) for part, unit in jobs if (part.name, unit) not in known]
    if jobs:
        about = {name: value for name, value in settings.to_json().items() if name != "work"}
        record["runs"].append(environment() | {"settings": about})
    missing = {case.name: case.missing for case in bench_models.CASES if case.missing}
    needed = dict.fromkeys(model_of(part.name, unit) for part, unit in jobs if part.name in CONVERTED)
    if options.again:
        bench_models.forget_failures(needed, settings)
    made = bench_models.convert_all(
        [name for name in needed if name not in missing], settings, options.workers, options.convert_timeout
    )
    for part, unit in jobs:
        started = time.monotonic()
        model = model_of(part.name, unit)
        if model in missing:
            rows: list[Row] = [{"way": "", "skipped": f"not installed: {', '.join(missing[model])}"}]
        elif part.name in CONVERTED and made[model]["error"]:
            rows = [{"way": "", "failed": f"did not convert: {made[model]['error'].partition(chr(10))[0][:400]}"}]
        else:
            rows = run_unit(part.name, unit, settings, options.limit)
        record["rows"] = [row for row in record["rows"] if (row["part"], row["unit"]) != (part.name, unit)]
        record["rows"] += [{"part": part.name, "unit": unit, "run": len(record["runs"]) - 1, **row} for row in rows]
        write(options.json, record)
        words = next((row["failed"] for row in rows if row.get("failed")), "") or rows[0].get("skipped", "measured")
        say(f"{part.name}, {unit}: {words.partition(chr(10))[0][:160]} ({time.monotonic() - started:.0f} s)")
    write(options.json, record)
    problems = wrong(record)
    for problem in problems:
        say(f"not as it should be: {problem}")
    return int(bool(problems))


def merge(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several; where two have a unit, the later one counts."""
    merged: dict[str, Any] = {"runs": [], "rows": []}
    for record in records:
        first = len(merged["runs"])
        merged["runs"] += record["runs"]
        known = {(row["part"], row["unit"]) for row in record["rows"]}
        merged["rows"] = [row for row in merged["rows"] if (row["part"], row["unit"]) not in known]
        merged["rows"] += [{**row, "run": first + row["run"]} for row in record["rows"]]
    return merged


def wrong(record: dict[str, Any]) -> list[str]:
    """All that is out of bounds or failed."""
    found = []
    for part in PARTS:
        rows = [row for row in record["rows"] if row["part"] == part.name]
        found += [f"{part.name}, {row['unit']}: {row['failed'].splitlines()[0]}" for row in rows if row.get("failed")]
        good = [row for row in rows if not row.get("failed") and not (row.get("skipped") and not row["way"])]
        found += getattr(importlib.import_module(part.module), part.wrong)(good)
    return found


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(part.name for part in PARTS)
    parser.add_argument("--json", type=Path, help="the record; a run adds to what is there")
    parser.add_argument("--parts", default=names, help="some of %(default)s")
    parser.add_argument("--models", nargs="+", default=[], help="parts of names (default: those of each part)")
    parser.add_argument("--batches", nargs="+", type=int, default=None, help='of "beside" (default: 1 32)')
    parser.add_argument("--inductor", nargs="*", default=None, help="modes of torch.compile; none to leave it out")
    parser.add_argument("--work", type=Path, help="folder of converted models (default: a temporary one)")
    parser.add_argument("--workers", type=int, default=8, help="conversions at once")
    parser.add_argument("--repeats", type=int, default=None, help="batches of calls of each way")
    parser.add_argument("--convert-timeout", type=float, default=300, metavar="S", help="for one model")
    parser.add_argument("--limit", type=float, default=60 * MINUTES_A_UNIT, metavar="S", help="for one unit")
    parser.add_argument("--again", action="store_true", help="try what failed or was left out once more")
    parser.add_argument("--list", action="store_true", help="tell what there is to measure")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON", help="of several records the last word wins")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench.md", help="the page; its picture beside it")
    parser.add_argument("--unit", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unit:
        measure(options.unit[0], options.unit[1], Path(options.unit[2]), Path(options.unit[3]))
        return 0
    if options.render:
        import bench_picture
        import bench_render

        records = [read(path) for path in options.render]
        if None in records:
            parser.error(f"{options.render[records.index(None)]} is no record")
        record = merge(records)
        problems = wrong(record)
        picture = options.out.with_suffix(".png")
        drawn = bench_picture.draw(record, picture)
        options.out.write_text(bench_render.page(record, problems, picture.name if drawn else ""))
        return int(bool(problems))
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - {part.name for part in PARTS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {names}")
    if options.batches is None:
        import bench_beside

        options.batches = list(bench_beside.BATCHES)
    if options.list:
        for name in options.parts:
            say(f"{name}: {', '.join(units(part_named(name), options.models, options.batches))}")
        return 0
    if options.json is None:
        parser.error("--json FILE is needed")
    if DRY_RUN:
        say("a dry run of small models on a CPU: times say nothing")
    with tempfile.TemporaryDirectory(prefix="trtbridge-bench-") as folder:
        settings = Settings((options.work or Path(folder)).resolve())
        if options.repeats is not None:
            settings = replace(settings, repeats=options.repeats)
        if options.inductor is not None:
            settings = replace(settings, inductor=tuple(options.inductor))
        return bench(options, settings)


if __name__ == "__main__":
    sys.exit(main())
