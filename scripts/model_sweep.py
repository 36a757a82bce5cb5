"""Converts a small model of every timm family and every transformers kind, runs it, and compares it with PyTorch.

    python scripts/model_sweep.py                                   all, on TensorRT-RTX, then docs/model-coverage.md
    python scripts/model_sweep.py --backend onnxruntime --only transformers --filter '^(bert|t5)$' --jobs 2
    python scripts/model_sweep.py --json sweep.json --budget 500    stops starting models after 500 s; again to resume
    python scripts/model_sweep.py --json sweep.json --render        only writes the page
    python scripts/model_sweep.py --localize --filter '^grounding-dino$'     says where each of these parts from PyTorch

Each model runs in a worker process that is killed at its time limit and replaced when it dies; what is known is in the
JSON file at any time, and a model that stands there is not run again (``--again`` says otherwise). Models that failed
before come first, then those never tried, then those that took too long or died, and at the end those that were well;
within each the well-known ones first. So a short time on a machine goes where something is to be learnt. Where the
backend asks for a bound of sizes that depend on data, the model is converted again with ``max_data_size``, and its note
says which. scripts/model_zoo.py makes the models. Exit status: 0 when every model that torch.export takes matches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_sweep_examine import GOOD, Key, Outcome, examine, localize, words_of
from model_sweep_page import cell, page

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("timm", "transformers")
DTYPES = ("float32", "float16")


# Workers


def worker(backend: str, dtype: str) -> None:
    """Reads lines "source<TAB>name", writes an outcome as a line of JSON each. What models print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answers.write(json.dumps({"ready": environment()}) + "\n")
    answers.flush()
    for line in sys.stdin:
        source, name = line.rstrip("\n").split("\t")
        try:
            outcome = examine(source, name, backend, dtype)
        except Exception as error:
            outcome = Outcome(source, name, backend, dtype, "crash", words_of(error))
        answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        answers.flush()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def environment() -> dict[str, str]:
    """Versions, and the machine."""
    import importlib.metadata

    import torch

    found = {"python": platform.python_version(), "machine": f"{os.cpu_count()} CPUs"}
    for package in ("torch", "transformers", "timm", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["machine"] += f", {torch.cuda.get_device_name()}"
    return found


# All models, in the parent


class Workers:
    """Threads that each keep one worker process and hand it one model after the other.

    Args:
        backend, dtype: of all models.
        limit_s: most seconds for one model.
        store: called with each outcome, from any thread.
        command: of a worker; tests put another one here.
    """

    def __init__(
        self,
        backend: str,
        dtype: str,
        limit_s: float,
        store: Callable[[Outcome], None],
        command: Sequence[str] = (),
    ) -> None:
        self._backend, self._dtype, self._limit_s, self._store = backend, dtype, limit_s, store
        self._command = [*(command or (sys.executable, __file__)), "--worker", "--backend", backend, "--dtype", dtype]
        self.environment: dict[str, str] = {}

    def run(self, models: Sequence[tuple[str, str]], jobs: int, deadline: float = float("inf")) -> None:
        """Run all models; none is started after the deadline (on time.monotonic's clock)."""
        pending: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        for model in models:
            pending.put(model)
        threads = [
            threading.Thread(target=self._serve, args=(pending, deadline)) for _ in range(min(jobs, len(models)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, pending: queue.SimpleQueue[tuple[str, str]], deadline: float) -> None:
        process: _Process | None = None
        while time.monotonic() < deadline:
            try:
                source, name = pending.get_nowait()
            except queue.Empty:
                break
            started = time.monotonic()
            if process is None:
                process = _Process(self._command)
                ready = process.answer(120)
                self.environment = (ready or {}).get("ready", self.environment)
            answer = process.ask(f"{source}\t{name}", self._limit_s)
            if answer is None:
                has_died = process.dead
                process.kill()  # waits for what it still has to say
                stage, words = ("crash", process.last_words()) if has_died else ("timeout", f"{self._limit_s:.0f} s")
                process = None
                seconds = {"limit": round(time.monotonic() - started, 1)}
                self._store(Outcome(source, name, self._backend, self._dtype, stage, words, seconds=seconds))
            else:
                self._store(Outcome(**answer))
        if process is not None:
            process.kill()


class _Process:
    """A worker process whose answers are awaited with a time limit."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors: list[str] = []
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", **os.environ},
            start_new_session=True,
        )  # fmt: skip
        self._readers = [threading.Thread(target=t, daemon=True) for t in (self._read_answers, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @property
    def dead(self) -> bool:
        """Whether it ended by itself."""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask(self, line: str, limit_s: float) -> dict[str, Any] | None:
        """Send a line and wait for the answer; None when it does not come."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any] | None:
        """The next answer; None when the process dies or the time passes."""
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def last_words(self) -> str:
        """How it ended and what it wrote last, once it was killed."""
        return f"exit status {self._process.poll()}: " + " | ".join(self._errors[-6:])[-800:]

    def kill(self) -> None:
        """End it, with the child processes that build engines."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):  # a line that it never read
                assert pipe is not None
                pipe.close()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors = [*self._errors[-20:], line.rstrip()]


class Results:
    """The JSON file: outcomes by model, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        data = json.loads(path.read_text()) if path.exists() else {}
        self.environments: dict[str, dict[str, str]] = data.get("environments", {})
        self.outcomes: dict[Key, Outcome] = {o.key: o for o in (Outcome(**one) for one in data.get("outcomes", ()))}

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        with self._lock:
            self.outcomes[outcome.key] = outcome
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        data = {
            "environments": self.environments,
            "outcomes": [dataclasses.asdict(self.outcomes[key]) for key in sorted(self.outcomes)],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(self.path)


# The command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or render, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorrt_rtx", choices=("tensorrt_rtx", "tensorrt", "onnxruntime"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--only", choices=SOURCES, help="default: both")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only models whose name it is found in")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4), help="worker processes")
    parser.add_argument("--limit", type=float, default=120, metavar="S", help="most seconds for a model; default 120")
    parser.add_argument("--budget", type=float, metavar="S", help="start no model after so many seconds")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "build" / "model-sweep.json", help="results; read to resume"
    )
    parser.add_argument("--again", default="", metavar="STAGES", help="run models of these stages again; 'all'")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "model-coverage.md", help="the page")
    parser.add_argument("--no-render", action="store_true", help="write no page")
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--localize", action="store_true", help="only print where the models part from PyTorch")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.backend, options.dtype)
        return 0
    if options.localize:
        for source, name in _models(options):
            print(localize(source, name, options.backend, options.dtype), flush=True)
        return 0
    results = Results(options.json)
    if not options.render:
        _sweep(options, results)
    if not options.no_render:
        options.out.write_text(page([*results.outcomes.values()], results.environments))
    bad = [o for o in results.outcomes.values() if o.stage not in (*GOOD, "no recipe", "torch.export")]
    return 1 if bad else 0


def urgency(stage: str | None) -> int:
    """The order to run in, by what came of a model before (None: never tried), most to be learnt first."""
    if stage is None:
        return 1
    return 3 if stage in GOOD else 2 if stage in ("timeout", "crash") else 0


def _models(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Those that are asked for, by source and name."""
    import model_zoo

    models: list[tuple[str, str]] = []
    for source in [options.only] if options.only else SOURCES:
        try:
            known = model_zoo.names(source)
        except ImportError as error:
            print(f"{source} is not installed ({error}); left out", flush=True)
            continue
        models += [(source, name) for name in known if re.search(options.filter, name)]
    return models


def _sweep(options: argparse.Namespace, results: Results) -> None:
    import model_zoo

    models = _models(options)
    again = options.again.split(",")
    known_outcomes = {key: o for key, o in results.outcomes.items() if "all" not in again and o.stage not in again}
    wanted = [model for model in models if (*model, options.backend, options.dtype) not in known_outcomes]
    before = {key[:2]: o.stage for key, o in results.outcomes.items() if key[2:] == (options.backend, options.dtype)}
    wanted.sort(key=lambda model: (urgency(before.get(model)), *model_zoo.rank(*model)))
    print(f"{len(wanted)} models to run, {len(models) - len(wanted)} known", flush=True)
    started = time.monotonic()
    done = 0

    def store(outcome: Outcome) -> None:
        nonlocal done
        results.add(outcome)
        done += 1
        name = f"{outcome.source} {outcome.name}"
        seconds = f"{outcome.seconds.get('convert', 0):.1f} s, {len(outcome.plugins)} kinds of plugins"
        words = "" if outcome.stage in GOOD else cell(outcome.words, 200)
        print(f"{done}/{len(wanted)} {name}: {outcome.stage} ({seconds}) {words}", flush=True)

    workers = Workers(options.backend, options.dtype, options.limit, store)
    workers.run(wanted, options.jobs, started + options.budget if options.budget else float("inf"))
    if workers.environment:
        results.environments[f"{options.backend} {options.dtype}"] = workers.environment
    results.write()
    print(f"{done} models in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
