"""scripts/bench_turns.py: its table has all ways, of stand-ins and of a model's calls; and the one thread it tries."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import trtbridge
from trtbridge.bridge import turns

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_turns.py"
WAYS = ("no turns", "a turn each call", "as it is", "one thread for calls")


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("bench_turns_one_thread")


@pytest.mark.parametrize("of_model", [False, True])
def test_all_ways_are_measured(of_model: bool, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--threads", "3", "--calls", "60", "--rounds", "1"]
    command += ["--model", "twelve_plugins", "--work", str(tmp_path)] if of_model else []
    environment = {**os.environ, "TRTBRIDGE_GPU_TESTS_ON_CPU": "1"} if of_model else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    crowds = ["3 threads, one module", "3 threads, a module each"] if of_model else ["3 threads"]
    assert [row[:2] for row in rows] == [[way, kind] for way in WAYS for kind in ("one thread", *crowds)]
    assert all(float(row[2]) > 0 for row in rows)
    assert all(float(row[3]) == 1.0 for row in rows if row[1] == "one thread")


def test_a_model_needs_a_folder() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "twelve_plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model needs --work DIR" in done.stderr


def test_one_thread_does_what_is_asked_for_at_once(one_thread: Any) -> None:
    """Never two things at a time, and whoever asks gets what came of it."""
    one = one_thread.OneThread()
    busy: list[int] = []

    def work(number: int) -> int:
        busy.append(number)
        assert busy == [number]
        time.sleep(1e-4)
        busy.remove(number)
        if number % 10 == 3:
            raise ValueError(str(number))
        return number

    def ask(thread: int) -> None:
        for number in range(thread, 400, 8):
            if number % 10 == 3:
                with pytest.raises(ValueError, match=f"^{number}$"):
                    one.call(lambda number=number: work(number))
            else:
                assert one.call(lambda number=number: work(number)) == number

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert one.handed_over > 200, "nearly all ask while another one is at it"
    handed = one.handed_over
    assert one.call(threading.get_ident) == threading.get_ident(), "whoever is alone does it himself"
    assert one.handed_over == handed


@pytest.mark.parametrize("inference", [False, True])
def test_whole_calls_are_handed_over_with_their_mode(inference: bool, one_thread: Any) -> None:
    one = one_thread.OneThread()
    module = trtbridge.convert(torch.nn.Linear(4, 4), (torch.randn(2, 4),), backend="onnxruntime", device="cpu")
    given = torch.randn(2, 4)
    with torch.inference_mode(inference):
        expected = module(given)

        def ask(_: int) -> bool:
            with torch.inference_mode(inference):
                result = module(given)
                return torch.equal(result, expected) and result.is_inference() == expected.is_inference()

        with one_thread.whole_calls(one), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(200)))
    assert one.handed_over


def test_one_thread_is_called_within_a_call_and_does_not_stop_who_waits_for_another(
    one_thread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.05)
    one = one_thread.OneThread()

    def waits() -> int:
        """For a call of another thread, as a plugin may."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(one.call, lambda: 1).result(10) + one.call(lambda: 1)

    def fails() -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
            pool.submit(one.call, lambda: 1 // 0).result(10)

    assert one.call(waits) == 2
    one.call(fails)
    assert not one.handed_over, "who has waited for long does it himself"
    began, end = threading.Event(), threading.Event()

    def busy() -> None:
        began.set()
        end.wait(10)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.call, busy)
        began.wait(10)
        monkeypatch.setattr(turns, "PATIENCE_S", 10.0)
        second = pool.submit(one.call, waits)
        while not one._queue:
            time.sleep(1e-3)
        monkeypatch.setattr(turns, "PATIENCE_S", 0.05)
        end.set()
        assert second.result(10) == 2
        first.result(10)
    assert one.handed_over == 1
    assert one.call(lambda: 3) == 3
    assert one.handed_over == 1, "nobody is at it"


def test_what_one_thread_does_is_over_when_who_asked_is_interrupted(one_thread: Any) -> None:
    one = one_thread.OneThread()
    began, over = threading.Event(), threading.Event()

    def first() -> None:
        began.set()
        time.sleep(0.1)

    def slow() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)
        time.sleep(0.2)
        over.set()

    # As Ctrl-C does, which a process in the background ignores.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            waited = pool.submit(one.call, first)
            began.wait(10)
            with pytest.raises(KeyboardInterrupt):
                one.call(slow)
            assert over.is_set()
            waited.result(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert one.call(lambda: 4) == 4
