"""Turns of threads on the host: one at a time, never for good, and not while kernels are compiled."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from trtbridge.bridge import turns
from trtbridge.bridge.turns import HostTurns

SHAPES = (1, 3)


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 30.0)


def _known(device: int = 0) -> HostTurns:
    """Of a program that has seen these shapes."""
    made = HostTurns(device)
    with made.turn(SHAPES):
        pass
    return made


def _passes(program: HostTurns, within_s: float, shapes: object = SHAPES) -> bool:
    """Whether another thread has its turn in that time; it is waited for."""
    done = threading.Event()

    def call() -> None:
        with program.turn(shapes):
            done.set()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return done.wait(within_s)


@pytest.mark.usefixtures("_patient")
def test_one_thread_at_a_time_whatever_the_program() -> None:
    programs = [_known(), _known()]
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with programs[number % 2].turn(SHAPES):
                inside.append(number)
                most.append(len(inside))
                time.sleep(1e-4)  # lets go of Python's lock, as a launch does
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1


@pytest.mark.usefixtures("_patient")
def test_a_call_within_a_call_has_its_turn_and_devices_have_their_own() -> None:
    program = _known()
    with program.turn(SHAPES), program.turn(SHAPES):
        assert not _passes(_known(), 0.1)
        assert _passes(_known(device=1), 10)


@pytest.mark.usefixtures("_patient")
def test_nobody_waits_for_a_first_call_with_some_shapes() -> None:
    program = _known()
    with program.turn((7, 7)):
        assert _passes(program, 10)
    with program.turn((7, 7)):
        assert not _passes(program, 0.1)


@pytest.mark.usefixtures("_patient")
def test_a_first_call_with_some_shapes_waits_for_nobody() -> None:
    program = _known()
    with program.turn(SHAPES):
        assert _passes(program, 10, shapes=(8, 8))


def test_who_waits_for_long_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a plugin may wait for another thread that calls a module."""
    monkeypatch.setattr(turns, "PATIENCE_S", 0.05)
    program = _known()
    with program.turn(SHAPES):
        assert _passes(program, 10)
    assert _passes(program, 10), "who went on did not give back what was not his"


@pytest.mark.usefixtures("_patient")
def test_a_call_that_fails_gives_its_turn_back_and_is_no_first_call() -> None:
    program = HostTurns(0)
    with pytest.raises(ValueError, match="no"), program.turn(SHAPES):
        raise ValueError("no")
    with program.turn(SHAPES):
        assert _passes(_known(), 10), "those shapes are new still"
    with pytest.raises(ValueError, match="no"), program.turn(SHAPES):
        raise ValueError("no")
    assert _passes(_known(), 10)


def _order(calls: int, threads: int) -> list[int]:
    """Which thread made each of the calls, all at once and one right after the other in each thread."""
    program = _known()
    order: list[int] = []
    ready = threading.Barrier(threads)

    def work(number: int) -> None:
        ready.wait()
        for _ in range(calls):
            with program.turn(SHAPES):
                order.append(number)
                time.sleep(1e-4)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return order


def _changes(order: list[int]) -> int:
    return sum(one != other for one, other in pairwise(order))


@pytest.mark.usefixtures("_patient")
def test_who_calls_again_at_once_keeps_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing threads takes as long as a call or two on a GPU."""
    monkeypatch.setattr(turns, "TURN_S", 30.0)
    monkeypatch.setattr(turns, "AT_ONCE_S", 0.3)
    # These are 3 changes, and some more where a thread gets no core for long; with turns of one call each there are
    # nearly 199.
    assert _changes(_order(calls=50, threads=4)) < 40


class _Beside:
    """A call in another thread, which waits for its turn when this is made."""

    def __init__(self, program: HostTurns) -> None:
        self.began: list[float] = []

        def call() -> None:
            with program.turn(SHAPES):
                self.began.append(time.perf_counter())

        self.thread = threading.Thread(target=call, daemon=True)
        self.thread.start()
        until = time.monotonic() + 30
        while not program._device._queue and time.monotonic() < until:
            time.sleep(1e-3)
        assert not self.began


@pytest.mark.usefixtures("_patient")
def test_a_turn_has_an_end_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever had it is not the first to have it again."""
    monkeypatch.setattr(turns, "TURN_S", 0.0)
    program = _known()
    for _ in range(2):  # the second time, this thread is one that calls again at once
        with program.turn(SHAPES):
            beside = _Beside(program)
        with program.turn(SHAPES):
            assert beside.began


@pytest.mark.usefixtures("_patient")
def test_a_turn_is_not_kept_for_a_thread_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 30.0)
    monkeypatch.setattr(turns, "AT_ONCE_S", 0.5)
    program = _known()
    with program.turn(SHAPES):
        pass
    with program.turn(SHAPES):  # this thread is one that calls again at once
        beside = _Beside(program)
    with program.turn(SHAPES), program.turn(SHAPES):  # one within the other, as a plugin may call a module
        assert not beside.began, "the turn was kept"
    with program.turn(SHAPES):
        assert not beside.began, "the turn was kept"
    left = time.perf_counter()
    beside.thread.join(10)
    assert beside.began[0] - left > 0.4


def test_turns_come_in_the_order_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who give up in between are passed over."""
    monkeypatch.setattr(turns, "PATIENCE_S", 30.0)
    program = _known()
    order: list[int] = []

    def call(number: int) -> None:
        with program.turn(SHAPES):
            if number != 2:
                order.append(number)
            else:
                assert not order, "it gave up, and goes on beside whoever has the turn"

    crowd = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(6)]
    with program.turn(SHAPES):
        for number, thread in enumerate(crowd):
            monkeypatch.setattr(turns, "PATIENCE_S", 0.01 if number == 2 else 30.0)
            thread.start()
            if number == 2:
                thread.join(10)
                continue
            until = time.monotonic() + 30
            while len(program._device._queue) < number + (number < 2) and time.monotonic() < until:
                time.sleep(1e-3)
    for thread in crowd:
        thread.join(10)
    assert order == [0, 1, 3, 4, 5]
    assert not program._device._queue


@pytest.mark.usefixtures("_patient")
def test_who_stayed_away_lets_go_at_once_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with other work between them are waited for once."""
    monkeypatch.setattr(turns, "TURN_S", 30.0)
    monkeypatch.setattr(turns, "AT_ONCE_S", 0.05)
    program = _known(device=11)
    with program.turn(SHAPES):
        beside = _Beside(program)
    left = time.perf_counter()
    beside.thread.join(10)
    assert beside.began[0] - left > 0.04, "the turn was kept"
    time.sleep(0.06)
    monkeypatch.setattr(turns, "LOOK_S", 30.0)  # only who lets go wakes another one
    with program.turn(SHAPES):
        beside = _Beside(program)
    beside.thread.join(10)
    assert beside.began


@pytest.mark.usefixtures("_patient")
def test_who_gave_the_turn_up_may_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one's beginning was in the way. About half of all turns ended after one call for that."""
    program = _known(device=12)
    monkeypatch.setattr(turns, "TURN_S", 0.0)
    with program.turn(SHAPES):
        beside = _Beside(program)
    beside.thread.join(10)
    monkeypatch.setattr(turns, "AT_ONCE_S", 0.5)
    monkeypatch.setattr(turns, "TURN_S", 30.0)
    time.sleep(0.6)
    with program.turn(SHAPES):
        beside = _Beside(program)
    with program.turn(SHAPES):
        assert not beside.began, "the turn was kept"
    beside.thread.join(10)
    assert beside.began
