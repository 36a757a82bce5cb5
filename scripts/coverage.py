"""Converts every op of PyTorch's OpInfo database and writes docs/op-coverage.md: what became of each, and why.

    python scripts/coverage.py --json coverage.json                      all ops, both backends; then the page
    python scripts/coverage.py --json coverage.json --only-failed        again those that failed, in the same record
    python scripts/coverage.py --filter '^fft' --no-render               some; prints what became of them
    python scripts/coverage.py --run --jobs 14 --json gpu.json           on a GPU: runs the TensorRT engines too
    python scripts/coverage.py --run --jobs 14 --json inside.json --plugins-of gpu.json --plugin-host engine \
        --backends tensorrt_rtx                                          again with plugins inside engines, if any
    python scripts/coverage.py --render coverage.json gpu.json           only the page, of several records

One sample an op, the first that runs eagerly, in float32 (int64 or bool where the op has no float). Each op is
converted with ONNX Runtime, run and compared with eager PyTorch on the CPU; and built with TensorRT-RTX, which needs
no GPU. With ``--run`` the TensorRT engines run too and are compared with eager PyTorch on the GPU.

Ops go to a pool of processes; one that dies or takes too long is an outcome, and the process is replaced. A record is
kept up to date while it runs: started again with the same ``--json``, what is in it already is not done again.
The package must be importable as trtbridge. Exit status: 0 when all ops were tried, whatever became of them.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from coverage_pool import Job, Worker, WorkerError
from coverage_report import overall, write_report

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("onnxruntime", "tensorrt_rtx")

Record = dict[str, Any]


def main() -> int:
    """Sweep or render, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "op-coverage.md", help="the page")
    parser.add_argument("--json", type=Path, help="the record; read first, so that a sweep goes on where it stopped")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON", help="only write the page, of these records")
    parser.add_argument("--no-render", action="store_true", help="write no page")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only ops whose name holds this")
    parser.add_argument("--only-failed", action="store_true", help="only ops that failed in the record")
    parser.add_argument("--plugins-of", type=Path, metavar="JSON", help="only ops that have plugins in that record")
    parser.add_argument("--again", action="store_true", help="do ops that are in the record again")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="for one op on one backend")
    parser.add_argument("--run", action="store_true", help="run TensorRT engines too, on the GPU")
    parser.add_argument("--plugin-host", choices=("auto", "engine", "segments"), help="where plugins run in TensorRT")
    parser.add_argument("--ops-per-process", type=int, default=80, help="then a process is replaced")
    options = parser.parse_args()
    if options.render:
        write_report([json.loads(path.read_text()) for path in options.render], options.out)
        return 0
    record, complete = sweep(options)
    summary: dict[str, int] = {}
    for op in record["ops"].values():
        summary[overall(op)] = summary.get(overall(op), 0) + 1
    say(", ".join(f"{count} {outcome}" for outcome, count in sorted(summary.items())))
    if not options.no_render:
        write_report([record], options.out)
    return int(not complete)


def sweep(options: argparse.Namespace) -> tuple[Record, bool]:
    """All ops that are asked for and not in the record yet; the record is kept on disk as it grows.

    Returns:
        The record, and whether every op has been tried.
    """
    record: Record = {"ops": {}}
    if options.json and options.json.exists():
        record = json.loads(options.json.read_text())
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trtbridge-coverage-") as scratch:
        pool = Pool(options, record, Path(scratch))
        pool.run()
    record["seconds"] = round(record.get("seconds", 0) + time.monotonic() - started)
    pool.keep()
    return record, pool.finished == pool.total


class Pool:
    """Hands ops to processes and gathers what they say.

    Args:
        options: of the command line.
        record: filled.
        scratch: folder for logs and compiled kernels.
    """

    def __init__(self, options: argparse.Namespace, record: Record, scratch: Path) -> None:
        self.options = options
        self.record = record
        self.backends = [name for name in options.backends.split(",") if name]
        convert = {} if options.plugin_host is None else {"plugin_host": options.plugin_host}
        self.settings = {"run": options.run, "convert": convert}
        self.environment = {"OMP_NUM_THREADS": "1", "TRTBRIDGE_CACHE_DIR": str(scratch / "cache"), **os.environ}
        self.scratch = scratch
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.total = self.finished = 0
        self.saved = time.monotonic()

    def run(self) -> None:
        """Start the processes and wait until no op is left."""
        first = self._start(0)
        self.record["environment"] = {
            **first.environment,
            "run": self.options.run,
            "plugin_host": self.options.plugin_host,
            "timeout_s": self.options.timeout,
        }
        names = [name for name in first.ops if re.search(self.options.filter, name)]
        done = self.record["ops"]
        if self.options.plugins_of:
            other = json.loads(self.options.plugins_of.read_text())["ops"]
            names = [name for name in names if name in other and overall(other[name]) in ("plugin", "mixed")]
        if self.options.only_failed:
            names = [name for name in names if name in done and overall(done[name]) == "failed"]
        elif not self.options.again:
            names = [name for name in names if name not in done]
        for name in names:
            self.jobs.put(Job(name, tuple(self.backends)))
        self.total = len(names)
        threads = [
            threading.Thread(target=self._work, args=(number, first if number == 0 else None), daemon=True)
            for number in range(max(1, min(self.options.jobs, self.total)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _start(self, number: int) -> Worker:
        return Worker(self.settings, self.environment, self.scratch / f"worker{number}.log")

    def _work(self, number: int, worker: Worker | None) -> None:
        """One thread: keeps one process busy until nothing is left to do."""
        served = 0
        while True:
            try:
                job = self.jobs.get_nowait()
            except queue.Empty:
                break
            if worker is not None and (served >= self.options.ops_per_process or not worker.usable):
                worker.stop()
                worker, served = None, 0
            result: dict[str, Any] = {"backends": {}}
            while job.backends:
                worker = worker or self._start(number)
                served += 1
                try:
                    worker.ask(job, self.options.timeout, result)
                    break
                except WorkerError as error:
                    worker.stop()
                    worker = None
                    job = job.after(error, result)
            self._keep(job.op, result)
        if worker is not None:
            worker.stop()

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        with self.lock:
            self.record["ops"][name] = result
            self.finished += 1
            parts = [f"{backend}: {_brief(found)}" for backend, found in result["backends"].items()]
            parts = parts or [str(result.get("no_sample") or result.get("no_tensor"))]
            say(f"[{self.finished}/{self.total}] {name}: {'; '.join(parts)}")
            if time.monotonic() - self.saved > 5:
                self.keep()
                self.saved = time.monotonic()

    def keep(self) -> None:
        """Write the record, whole or not at all."""
        path = self.options.json
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.record, indent=1))
        new.replace(path)


def _brief(found: dict[str, Any]) -> str:
    words = f" ({found['stage']}: {found['reason'][:150]})" if "stage" in found else ""
    return f"{found['outcome']}{words}"


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
