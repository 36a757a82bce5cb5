"""Converts ONNX's own backend node tests and writes docs/onnx-coverage.md: what became of each, and why.

    python scripts/onnx_coverage.py --json onnx-coverage.json        all cases, both backends; then the page
    python scripts/onnx_coverage.py --filter '^test_dft' --no-render some; prints what became of them
    python scripts/onnx_coverage.py --json r.json --only-failed      again those that failed, in the same record
    python scripts/onnx_coverage.py --run --jobs 14 --json gpu.json  on a GPU: runs the TensorRT engines too
    python scripts/onnx_coverage.py --render onnx-coverage.json      only the page

Every case whose inputs and outputs are float32, float16, int32, int64 or bool is written to an .onnx file, converted as
`tb.convert(path)` with each backend, and compared with the output that the case expects. All inputs stay inputs, axes
and shapes too. With ONNX Runtime the converted model runs here; with TensorRT-RTX it is built, which needs no GPU.

Cases go to a pool of processes; one that dies or takes too long is an outcome, and the process is replaced. A record is
kept up to date while it runs: started again with the same ``--json``, what is in it already is not done again.
The package must be importable as trtbridge. Exit status: 0 when all cases were tried, whatever became of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_coverage_report import write_report

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("onnxruntime", "tensorrt_rtx")
START_TIMEOUT_S = 300

Record = dict[str, Any]


def main() -> int:
    """Sweep, render, or be a worker, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "onnx-coverage.md", help="the page")
    parser.add_argument("--json", type=Path, help="the record; read first, so that a sweep goes on where it stopped")
    parser.add_argument("--render", type=Path, metavar="JSON", help="only write the page, of this record")
    parser.add_argument("--no-render", action="store_true", help="write no page")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only cases whose name holds this")
    parser.add_argument("--only-failed", action="store_true", help="only cases that failed in the record")
    parser.add_argument("--again", action="store_true", help="do cases that are in the record again")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="for one case on one backend")
    parser.add_argument("--run", action="store_true", help="run TensorRT engines too, on the GPU")
    parser.add_argument("--worker", metavar="SETTINGS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from onnx_coverage_worker import serve

        return serve(json.loads(options.worker))
    if options.render:
        write_report(json.loads(options.render.read_text()), options.out)
        return 0
    record = _sweep(options)
    if not options.no_render:
        write_report(record, options.out)
    return 0


def _sweep(options: argparse.Namespace) -> Record:
    record: Record = {"environment": {}, "cases": {}, "skipped": {}}
    if options.json and options.json.exists():
        record = json.loads(options.json.read_text())
    backends = options.backends.split(",")
    settings = {"run": options.run}
    first = Worker(settings)
    record["environment"], record["skipped"] = first.hello["environment"], first.hello["skipped"]
    wanted = [name for name in first.hello["cases"] if re.search(options.filter, name)]
    jobs: queue.Queue[tuple[str, str]] = queue.Queue()
    for name in wanted:
        known = record["cases"].setdefault(name, {}).setdefault("backends", {})
        for backend in backends:
            failed = known.get(backend, {}).get("outcome") == "failed"
            if (options.again or backend not in known or (options.only_failed and failed)) and (
                not options.only_failed or failed
            ):
                jobs.put((name, backend))
    total, started, lock = jobs.qsize(), time.monotonic(), threading.Lock()

    def work(worker: Worker | None) -> None:
        while True:
            try:
                name, backend = jobs.get_nowait()
            except queue.Empty:
                break
            worker = worker or Worker(settings)
            result = worker.ask({"case": name, "backend": backend, "isolate": False}, options.timeout)
            if result.get("died"):  # once more, so that a crash in the backend is told from one elsewhere
                worker.stop()
                worker = Worker(settings)
                result = worker.ask({"case": name, "backend": backend, "isolate": True}, options.timeout)
            if result.get("died") or result.get("slow"):
                worker.stop()
                worker = None
            with lock:
                record["cases"][name]["nodes"] = first.hello["cases"][name]
                record["cases"][name]["backends"][backend] = result
                done = total - jobs.qsize()
                if result["outcome"] == "failed" or options.filter:
                    words = result.get("reason", "").splitlines() or [""]
                    print(
                        f"{name} {backend}: {result['outcome']} {result.get('stage', '')} {words[0][:160]}", flush=True
                    )
                if done % 25 == 0:
                    print(f"{done} of {total}, {time.monotonic() - started:.0f} s", flush=True)
                    _keep(record, options.json)
        if worker is not None:
            worker.stop()

    threads = [threading.Thread(target=work, args=(first if i == 0 else None,)) for i in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _keep(record, options.json)
    for backend in backends:
        outcomes = [record["cases"][name]["backends"].get(backend, {}).get("outcome", "-") for name in wanted]
        print(backend, {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}, flush=True)
    return record


def _keep(record: Record, path: Path | None) -> None:
    if path is not None:
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1))
        draft.replace(path)


class Worker:
    """A process that converts cases, seen from outside: asked, timed, and stopped.

    Raises:
        SystemExit: it does not start.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # so that its own children can be stopped with it
        )
        self._pending = b""
        self.hello = self._read(time.monotonic() + START_TIMEOUT_S)
        if "cases" not in self.hello:
            self.stop()
            raise SystemExit(f"A worker does not start: {self.hello}. Is trtbridge importable by {sys.executable}?")

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Convert a case; a result with "died" or "slow" means that the process is of no more use."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        return self._read(time.monotonic() + timeout_s)

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"outcome": "failed", "stage": "time", "reason": "took too long", "slow": True}
            data = os.read(descriptor, 1 << 20)
            if not data:
                status = self.process.wait()
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                return {"outcome": "failed", "stage": "crash", "reason": f"the process died with {how}", "died": True}
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
