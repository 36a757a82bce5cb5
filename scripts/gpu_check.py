"""Runs tests/gpu on a machine with a GPU and writes docs/gpu-report.md from what came out.

    python scripts/gpu_check.py                                        everything, then docs/gpu-report.md
    python scripts/gpu_check.py --json a.json --no-render -- -k runtime     a part; its record goes to a.json
    python scripts/gpu_check.py --render a.json b.json                 one report of several parts; the last word wins

By parts (--parts): files of tests, most of them spread over processes ("rest" is what no other part names); last, the
models are converted, several at once, each in a process of its own, and measured one after the other, so that nothing
disturbs the clock. What follows ``--`` goes to pytest in every part. With TRTBRIDGE_GPU_TESTS_ON_CPU=1 everything runs
as a dry run on a CPU.

The package must be importable as trtbridge; nothing else is needed. Exit status: 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "gpu"
ZOO = TESTS / "zoo.py"
DRY_RUN = os.environ.get("TRTBRIDGE_GPU_TESTS_ON_CPU") == "1"

Record = dict[str, Any]

PARTS: dict[str, tuple[str, ...]] = {
    "runtime": ("test_runtime.py",),
    "calls": ("test_calls.py", "test_threads.py", "test_calls_memory.py", "test_beside_other_work.py"),
    "plugins": ("test_rtx_faults.py", "test_fallbacks.py", "test_shipped_ops.py", "test_plugin_models.py"),
    "authoring": ("test_authoring.py",),
    "host": ("test_plugin_host.py",),
    "precision": ("test_precision.py",),
    "accuracy": ("test_compare.py", "test_localize.py", "test_attention.py"),
    "rest": (),
    "models": ("test_models.py",),
}
"""Files of tests/gpu by part, in the order in which they run. What no part names belongs to "rest"."""
ALONE = ("calls", "authoring")
"""Parts that take times, or measure memory, and run in one process."""


def files_of(part: str) -> list[str]:
    """The files of a part, as they are there."""
    named = {name for names in PARTS.values() for name in names}
    if part == "rest":
        return sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in named)
    return list(PARTS[part])


def main() -> int:
    """Run or render, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu-report.md", help="the report")
    parser.add_argument("--json", type=Path, help="where the record of this run goes, to render later")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="JSON", help="only write the report, of these records"
    )
    parser.add_argument(
        "--append", type=Path, nargs="+", default=[], metavar="JSON", help="earlier records to put before"
    )
    parser.add_argument("--no-render", action="store_true", help="write no report, only --json")
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help="of %(default)s, separated by commas (default: all)",
    )
    parser.add_argument("--models", default="", help="names, or parts of names, of models, separated by commas")
    parser.add_argument("--workers", type=int, default=6, help="processes at once in the phases without a clock")
    parser.add_argument("--convert-timeout", type=float, default=300, metavar="S", help="for one model")
    parser.add_argument("--part-limit", type=float, default=900, metavar="S", help="a part is ended after so long")
    parser.add_argument("--prebuilt", type=Path, help="keep the converted models here, and use those that are there")
    parser.add_argument("pytest_options", nargs="*", metavar="-- PYTEST OPTIONS")
    options = parser.parse_args()
    if options.render:
        records = [json.loads(path.read_text()) for path in options.render]
        write_report(merge(records), options.out)
        return 0
    with tempfile.TemporaryDirectory(prefix="trtbridge-gpu-") as scratch:
        record = run(options, Path(scratch))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1))
    if not options.no_render:
        earlier = [json.loads(path.read_text()) for path in options.append]
        write_report(merge([*earlier, record]), options.out)
    return int(any(test["outcome"] not in ("passed", "skipped", "xfailed") for test in record["tests"].values()))


def run(options: argparse.Namespace, scratch: Path) -> Record:
    """All phases; the record of each is on disk before the next begins."""
    parts = options.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        raise SystemExit(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    records = []
    # Children find trtbridge where this process would, and keep compiled kernels in a folder that all of them share.
    environment = dict(os.environ, TRTBRIDGE_CACHE_DIR=os.environ.get("TRTBRIDGE_CACHE_DIR", str(scratch / "cache")))

    def keep() -> None:
        if options.json and records:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(merge(records), indent=1))

    many = importlib.util.find_spec("xdist") and options.workers > 1
    spread = ["-n", str(options.workers), "--dist", "worksteal"] if many else []  # tests of a minute are at the end
    for part in (part for part in PARTS if part in parts and part != "models"):
        own = environment
        newest = os.environ.get("GPU_SITE_PLUGINS")  # where the newest parser stands beside an older runtime
        if part == "host" and newest:
            site = os.pathsep.join(filter(None, [newest, environment.get("PYTHONPATH")]))
            own = dict(environment, PYTHONPATH=site)
        workers = [] if part in ALONE else spread
        if files := files_of(part):
            path = scratch / f"{part}.json"
            records.append(run_pytest(files, [*workers, *options.pytest_options], own, path, options.part_limit))
            keep()
    if "models" in parts:
        folder = options.prebuilt or scratch / "prebuilt"
        wanted = [name for name in options.models.split(",") if name]
        prebuild(folder, wanted, options, environment)
        environment["TRTBRIDGE_GPU_PREBUILT"] = str(folder)
        chosen = (
            ["-k", " or ".join(name.replace(": ", "-").replace(", ", "-").replace(" ", "-") for name in wanted)]
            if wanted
            else []
        )
        path = scratch / "models.json"
        records.append(
            run_pytest(files_of("models"), [*chosen, *options.pytest_options], environment, path, options.part_limit)
        )
        keep()
    return merge(records)


def run_pytest(
    files: Sequence[str], options: Sequence[str], environment: Mapping[str, str], path: Path, limit_s: float
) -> Record:
    """Run test files in a pytest of their own; a process that dies, or is ended, leaves the record up to there."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", "--durations=10"]
    command += ["--show-capture=no", *options, *(str(TESTS / name) for name in files)]
    started = time.monotonic()
    child_environment = dict(environment, TRTBRIDGE_GPU_REPORT_JSON=str(path))
    ended = ""
    with subprocess.Popen(command, cwd=ROOT, env=child_environment, start_new_session=True) as child:
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            ended = f"not done: the part was ended after {limit_s:.0f} s"
            say(f"{' '.join(files)}: {ended}")
            os.killpg(child.pid, signal.SIGKILL)  # the workers too
            status = child.wait()
    say(f"{' '.join(files)}: pytest ended with status {status} after {time.monotonic() - started:.0f} s")
    if not path.exists():
        raise SystemExit(f"pytest left no record (status {status}); its words are above")
    record: Record = json.loads(path.read_text())
    for name in record.pop("running"):
        record["tests"].setdefault(name, {"seconds": 0.0, "rows": []})
        found = ("skipped", ended) if ended else ("failed", f"pytest died in it, with status {status}")
        record["tests"][name] |= dict(zip(("outcome", "words"), found, strict=True))
    return record


def prebuild(folder: Path, wanted: Sequence[str], options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Convert the models, several at once; what is there already stays. Failures are recorded as such."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(TESTS))
    import zoo
    from helpers import usable_backends

    def convert(job: tuple[Any, str, str]) -> str:
        case, dtype, backend = job
        place = zoo.artifact(folder, case.name, dtype, backend, ".json")
        if place.exists():
            return f"{case.name} {dtype} {backend}: there already"
        started = time.monotonic()
        command = [sys.executable, str(ZOO), case.name, dtype, backend, str(folder)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=options.convert_timeout, check=False
            )
            problem = f"ended with status {done.returncode}: {done.stderr[-1000:]}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"took longer than {options.convert_timeout:.0f} s"
        if problem:
            place.write_text(json.dumps(vars(zoo.Converted(case.name, dtype, backend, f"converting {problem}"))))
        words = problem or json.loads(place.read_text())["error"].partition("\n")[0] or "converted"
        return f"{case.name} {dtype} {backend}: {words} ({time.monotonic() - started:.0f} s)"

    jobs = [
        (case, dtype, backend)
        for backend in usable_backends()
        for case in zoo.CASES
        for dtype in case.dtypes
        if not case.missing and (not wanted or any(name in case.name for name in wanted))
    ]
    started = time.monotonic()
    threads = str(max(1, (os.cpu_count() or 1) // options.workers))
    environment = {"OMP_NUM_THREADS": threads, **environment}
    # The largest take longest, so they go first.
    jobs.sort(key=lambda job: (job[0].name not in ("vit_base_patch16", "bert_base"), job[1] != "float32"))
    with ThreadPoolExecutor(options.workers) as pool:
        for line in pool.map(convert, jobs):
            say(line)
    say(f"{len(jobs)} conversions took {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def merge(records: Iterable[Record]) -> Record:
    """One record of several; where two ran a test, the later one counts."""
    environments: list[dict[str, Any]] = []
    tests: dict[str, dict[str, Any]] = {}
    for record in records:
        known = record["environments"] if "environments" in record else [record["environment"]]
        numbers = []
        for environment in known:
            same = [i for i, other in enumerate(environments) if _same(environment, other)]
            if not same:
                environments.append(environment)
            numbers.append(same[0] if same else len(environments) - 1)
        for name, test in record["tests"].items():
            if test["outcome"] == "skipped" and tests.get(name, test)["outcome"] != "skipped":
                continue
            tests[name] = {**test, "environment": numbers[test.get("environment", 0)]}
    used = {test["environment"] for test in tests.values()}
    kept = [i for i in range(len(environments)) if i in used]
    for test in tests.values():
        test["environment"] = kept.index(test["environment"])
    return {"environments": [environments[i] for i in kept], "tests": tests}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {**one, "date": ""} == {**other, "date": ""} and one["date"][:10] == other["date"][:10]


# The report

_SECONDS = ("trace", "export", "passes", "verify", "build", "convert", "load")
_COLUMNS: dict[str, dict[str, str]] = {
    "authoring": {
        "op": "op",
        "size": "size",
        "torch_ms": "torch ms",
        "triton_ms": "Triton ms",
        "model_eager_ms": "model, eager ms",
        "model_converted_ms": "converted ms",
        "model_eager_plugin_ms": "with the plugin, eager ms",
        "model_converted_plugin_ms": "converted ms",
    },
    "models": {
        "model": "model",
        "dtype": "dtype",
        "batch": "batch",
        "cosine": "cosine",
        "cosine_fp32": "cosine to fp32",
        "max_abs_error": "max abs error",
        "eager_ms": "eager ms",
        "ours_ms": "ours ms",
        "speedup": "eager / ours",
        "eager_graph_ms": "eager, CUDA graph ms",
        "ours_graph_ms": "ours, CUDA graph ms",
        "graph_words": "no CUDA graph because",
    },
    "builds": {
        "model": "model",
        "dtype": "dtype",
        "trace": "trace s",
        "export": "export s",
        "passes": "passes s",
        "verify": "verify s",
        "build": "build s",
        "convert": "in all s",
        "first_call": "first calls s",
        "load": "load s",
        "engine_mib": "engine MiB",
        "segments": "engines",
        "plugins": "plugin calls",
        "refusal": "refused with",
    },
}
_TITLES = {
    "models": "Numbers and latency",
    "builds": "Conversion",
    "plugins": "Plugins between engines",
    "plugin_models": "Models that need plugins",
    "plugin_model_times": "Models that need plugins: latency",
    "plugin_hosts": "Plugins inside engines and between them, µs a call",
    "plugin_hosts_graph": "CUDA graph replay, plugins inside",
    "authoring": "Authoring",
    "jit cache": "Compiled kernels kept between processes",
    "overhead": "What a call costs the CPU",
    "host time": "Host time of a call, in each way",
    "random shapes": "Memory over calls with random shapes",
    "precision": "Precision: float32 models converted to others, beside PyTorch in float32",
    "digits": "Precision: a classifier of digits",
    "auto": 'Precision: the error that precision="auto" emulated, and that of the engine',
    "localize": "Layer by layer",
}
_NOTES = {
    "models": (
        "Cosine similarity of the flattened outputs with PyTorch eager in the same dtype, in float64, the smallest of "
        "all outputs; *cosine to fp32* is that of the fp16 engine with PyTorch in fp32. TF32 is off in both. The "
        "bounds are 0.99999 in fp32 and 0.999 in fp16. Latency is the median by CUDA events of calls that find the "
        "device idle; *CUDA graph* is a replay of the same call in a graph that the caller captured. Inputs were not "
        "seen before; every engine takes all batch sizes from 1 to 32. Weights are random, but for all_minilm_l6_v2."
    ),
    "builds": (
        "Several models were converted at once, so these seconds are longer than those of one alone. *First calls* are "
        "those with each batch size in the table above, while TensorRT-RTX compiles kernels."
    ),
    "localize": (
        "`tb.localize` on the whole conversion: relative errors (L2 norm) beside PyTorch of the layers marked as "
        "outputs of the engine, of each layer of the graphs alone, and of the results. *mixed* is `precision='fp16'`. "
        "Seconds are those of the whole search, with the conversion and three engines at most."
    ),
}


def write_report(record: Record, path: Path) -> None:
    """Write the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(record))
    say(f"wrote {path}")


def render(record: Record) -> str:
    """The report as Markdown."""
    tests: dict[str, dict[str, Any]] = record["tests"]
    environments: list[dict[str, Any]] = record["environments"]
    counts = dict.fromkeys(("passed", "failed", "xfailed", "skipped"), 0)
    for test in tests.values():
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    lines = ["# GPU report", ""]
    lines += ["Written by `scripts/gpu_check.py` from what `tests/gpu` recorded; not edited by hand.", ""]
    if any(environment["dry_run"] for environment in environments):
        lines += ["**A dry run with tiny models on a CPU: no number here means anything.**", ""]
    for number, environment in enumerate(environments, 1):
        if len(environments) > 1:
            share = sum(test["environment"] == number - 1 for test in tests.values())
            lines += [f"## Run {number}: {share} tests", ""]
        lines += [f"- {label}: {value}" for label, value in _describe(environment)] + [""]
    summary = ", ".join(f"{count} {_OUTCOMES.get(outcome, outcome)}" for outcome, count in counts.items() if count)
    lines += [f"**{summary}.**", ""]
    rows = [row for test in tests.values() for row in test.get("rows", ())]
    backends = {row["backend"] for row in rows}
    others = dict.fromkeys(row["table"] for row in rows if row["table"] not in ("seconds", *_TITLES))
    for table, title in {**_TITLES, **{name: name.replace("_", " ").capitalize() for name in others}}.items():
        found = [dict(row) for row in rows if row["table"] == table]
        if not found:
            continue
        if table == "models":
            for row in found:
                row["speedup"] = round(row["eager_ms"] / row["ours_ms"], 2)
        if table == "builds":
            _add_seconds(found, [row for row in rows if row["table"] == "seconds"])
        lines += [f"## {title}", ""]
        if table in _NOTES:
            lines += [_NOTES[table], ""]
        lines += [*_table(found, _COLUMNS.get(table), with_backend=len(backends) > 1), ""]
    for outcome, title in (("failed", "Failed"), ("error", "Errors"), ("xpassed", "Passed against expectation")):
        lines += _listing(tests, outcome, title)
    lines += _listing(tests, "xfailed", "Expected to fail, and why")
    lines += _listing(tests, "skipped", "Skipped")
    lines += ["## Passed", ""]
    lines += [
        f"- `{_short(name)}` ({test['seconds']} s)" for name, test in tests.items() if test["outcome"] == "passed"
    ]
    return "\n".join(lines).rstrip() + "\n"


_OUTCOMES = {"xfailed": "failed as expected"}


def _describe(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [("date", environment["date"])]
    if "device" in environment:
        facts.append(("device", f"{environment['device']} ({environment['devices']} of them seen)"))
        facts.append(("driver", f"{environment['driver']}; CUDA of torch {environment['cuda']}"))
    facts.append(("host", f"{environment['platform']}, Python {environment['python']}"))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    facts.append(("sources", f"`{environment['source']}` (digest of the package's Python files)"))
    return facts


def _add_seconds(builds: list[dict[str, Any]], seconds: Sequence[Mapping[str, Any]]) -> None:
    by_key = {(row["backend"], row["model"], row["dtype"]): row for row in seconds}
    for row in builds:
        times = by_key.get((row["backend"], row["model"], row["dtype"]), {})
        row |= {name: times[name] for name in _SECONDS if name in times}
        first = [str(value) for name, value in times.items() if name.startswith("first call")]
        row["first_call"] = " + ".join(first)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, with_backend: bool) -> list[str]:
    if columns is None:
        names = list(dict.fromkeys(name for row in rows for name in row if name not in ("table", "backend")))
        columns = {name: name.replace("_", " ") for name in names}
    if with_backend:
        columns = {"backend": "backend", **columns}
    used = {name: title for name, title in columns.items() if any(row.get(name) not in (None, "") for row in rows)}
    lines = ["| " + " | ".join(used.values()) + " |", "|" + " --- |" * len(used)]
    lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in used) + " |" for row in rows]
    return lines


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.startswith("cosine"):
        return f"{value:.7f}"
    if name == "max_abs_error":
        return f"{value:.1e}"
    if isinstance(value, float):
        return f"{value:.3f}" if name.endswith("_ms") else f"{value:g}"
    text = " ".join(str(value).split())
    return (text if len(text) <= 200 else text[:197] + "...").replace("|", "\\|")


def _listing(tests: Mapping[str, Mapping[str, Any]], outcome: str, title: str) -> list[str]:
    found = {name: test for name, test in tests.items() if test["outcome"] == outcome}
    if not found:
        return []
    by_words: dict[str, list[str]] = {}
    for name, test in found.items():
        by_words.setdefault(test["words"].strip(), []).append(_short(name))
    lines = [f"## {title}", ""]
    for words, names in by_words.items():
        lines.append("- " + ", ".join(f"`{name}`" for name in names) + ":")
        lines += ["", "  ```text", *(f"  {line}".rstrip() for line in words.splitlines()), "  ```", ""]
    return lines if lines[-1] == "" else [*lines, ""]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


if __name__ == "__main__":
    sys.exit(main())
