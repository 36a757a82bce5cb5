"""scripts/bench_threads.py: its table has all ways, of stand-ins and of a model's calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import host_thread
from trtbridge.bridge.host_thread import HostCalls

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_threads.py"
WAYS = (
    "each on its own",
    "a lock",
    "woken at the end",
    "last first",
    "one lane",
    "whole calls",
    "whole calls, one lane",
    "as it is",
)


@pytest.mark.parametrize(("of_model", "ways"), [(False, WAYS), (True, WAYS), (False, ("as it is", "a lock"))])
def test_all_ways_that_are_asked_for_are_measured(of_model: bool, ways: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--threads", "3", "--calls", "60", "--rounds", "2"]
    command += ["--model", "twelve_plugins", "--graphs", "--work", str(tmp_path)] if of_model else []
    command += ["--ways", *ways] if ways != WAYS else []
    environment = {**os.environ, "TRTBRIDGE_GPU_TESTS_ON_CPU": "1"} if of_model else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    kinds = ("one module", "a module each") if of_model else ("like an engine", "like twelve plugins")
    assert [row[:2] for row in rows] == [[way, f"3 threads, {kind}"] for way in ways for kind in kinds]
    for _, _, alone, together, beside, longest in rows:
        assert float(alone) > 0 < float(together)
        assert float(longest) > 0
        middle, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", beside).groups())  # type: ignore[union-attr]
        assert low <= middle + 0.01 <= high + 0.02


@pytest.mark.parametrize(("way", "lanes"), [("as it is", 4), ("one lane", 1)])
def test_lanes_of_calls_that_wait(way: str, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_threads

    model = torch.nn.Linear(4, 4)
    module = tb.convert(model, (torch.ones(2, 4),), backend="onnxruntime", device="cpu")
    running, host = module._running, HostCalls(108)
    assert running is not None
    running._host = host
    module(torch.ones(2, 4))
    given = [torch.randn(2, 4) for _ in range(4)]
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(host_thread, "PATIENCE_S", 60.0)
    with bench_threads.WAYS[way](), ThreadPoolExecutor(5) as pool:
        pool.submit(host.thread.call, hold)
        assert begun.wait(60)
        results = [pool.submit(module, x) for x in given]
        deadline = time.monotonic() + 60
        while len(host.thread._queue) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        go.set()
        for x, result in zip(given, results, strict=True):
            torch.testing.assert_close(result.result(60), model(x))
    assert running._lanes.made == lanes


def test_whoever_asked_last_comes_first_unless_another_has_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_threads

    monkeypatch.setattr(bench_threads, "_MOST_WAITED_S", 60.0)
    queue, requests = bench_threads._LastFirst(), [SimpleNamespace() for _ in range(4)]
    for request in requests:
        queue.append(request)
    assert queue.popleft() is requests[3]
    requests[0].since -= 61.0
    assert [queue.popleft() for _ in range(3)] == [requests[0], requests[2], requests[1]]
    host = HostCalls(109)
    with bench_threads.WAYS["last first"]():
        assert isinstance(host.thread._queue, bench_threads._LastFirst)
    assert type(host.thread._queue) is deque


def test_a_model_needs_a_folder() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "twelve_plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model needs --work DIR" in done.stderr
