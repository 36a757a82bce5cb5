"""Turns of threads on the host: one at a time, never for good."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trtbridge.bridge import turns
from trtbridge.bridge.turns import host_turn


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 30.0)


@pytest.mark.usefixtures("_patient")
def test_one_thread_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with host_turn(0):
                inside.append(number)
                most.append(len(inside))
                time.sleep(1e-4)  # lets go of Python's lock, as a launch does
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1


@pytest.mark.usefixtures("_patient")
def test_a_call_within_a_call_has_its_turn_and_devices_have_their_own() -> None:
    done = threading.Event()

    def other_device() -> None:
        with host_turn(1):
            done.set()

    with host_turn(0), host_turn(0):
        thread = threading.Thread(target=other_device)
        thread.start()
        assert done.wait(10)
    thread.join()


def test_who_waits_for_long_goes_on() -> None:
    """So a plugin may wait for another thread that calls a module."""
    passed = []

    def call() -> None:
        with host_turn(0):
            passed.append(True)

    with host_turn(0):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(10)
        assert passed == [True]
    call()
    assert len(passed) == 2


@pytest.mark.usefixtures("_patient")
def test_a_call_that_fails_gives_its_turn_back() -> None:
    with pytest.raises(ValueError, match="no"), host_turn(0):
        raise ValueError("no")
    done = threading.Event()

    def call() -> None:
        with host_turn(0):
            done.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert done.wait(10)
    thread.join()
