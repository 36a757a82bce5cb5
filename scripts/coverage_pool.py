"""A process that converts ops (scripts/coverage_worker.py), seen from outside: asked, timed, and stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "coverage_worker.py"
START_TIMEOUT_S = 300


@dataclass(frozen=True)
class Job:
    """An op to convert.

    Attributes:
        op: its name.
        backends: still to do.
        isolate: let the backend build in a process of its own, so that its crash is an error there. Slower, so only
            the second time, after a crash.
    """

    op: str
    backends: tuple[str, ...]
    isolate: bool = False

    def after(self, error: WorkerError, result: dict[str, Any]) -> Job:
        """What is left to do after the process died or was stopped; what is given up is noted in the result."""
        left = tuple(name for name in self.backends if name not in result["backends"])
        if not left:
            return dataclasses.replace(self, backends=())
        if error.crashed and not self.isolate:
            return dataclasses.replace(self, backends=left, isolate=True)
        result["backends"][left[0]] = {"outcome": "failed", "stage": error.stage, "reason": str(error)}
        return dataclasses.replace(self, backends=left[1:], isolate=False)


class WorkerError(Exception):
    """The process died, or was too slow.

    Attributes:
        stage: what it did.
        crashed: whether it died by itself.
    """

    def __init__(self, message: str, stage: str, crashed: bool) -> None:
        super().__init__(message)
        self.stage = stage
        self.crashed = crashed


class Worker:
    """A running process.

    Args:
        settings: JSON-ready, for all ops: "run", and options of convert().
        environment: environment variables.
        log: where what it prints goes.

    Raises:
        SystemExit: it does not start.
    """

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                start_new_session=True,  # so that its own children can be stopped with it
            )
        assert self.process.stdout is not None
        self._pending = b""
        self.usable = True
        try:
            hello = self._read(time.monotonic() + START_TIMEOUT_S, "start")
        except WorkerError as error:
            self.stop()
            raise SystemExit(f"A worker does not start: {error}\n{log.read_text(errors='replace')[-3000:]}") from None
        self.ops: list[str] = hello["ops"]
        self.environment: dict[str, Any] = hello["environment"]

    def ask(self, job: Job, timeout_s: float, result: dict[str, Any]) -> None:
        """Convert an op; what is known goes to the result as it comes.

        Raises:
            WorkerError: the process died, or one backend took too long.
        """
        assert self.process.stdin is not None
        request = {"op": job.op, "backends": job.backends, "isolate": job.isolate}
        stage = "start"
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words(), stage, crashed=True) from None
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._read(deadline, stage)
            if "stage" in answer:
                stage = answer["stage"]
            if "facts" in answer:
                result |= answer["facts"]
            if "backend" in answer:
                result["backends"][answer["backend"]] = answer["result"]
                deadline = time.monotonic() + timeout_s
            if "done" in answer:
                self.usable = not answer["leaving"]
                return

    def _read(self, deadline: float, stage: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerError("took too long", stage, crashed=False)
            data = os.read(descriptor, 1 << 20)
            if not data:
                self.process.wait()
                raise WorkerError(self._last_words(), stage, crashed=True)
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self.process.poll()
        how = f"signal {signal.Signals(-status).name}" if status is not None and status < 0 else f"status {status}"
        text = self.log.read_text(errors="replace")[-4000:]
        fatal = [line for line in text.splitlines() if "terminate called" in line or "Error" in line or "error" in line]
        return f"the process died with {how}" + (f": {fatal[-1].strip()[:200]}" if fatal else "")

    def stop(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
