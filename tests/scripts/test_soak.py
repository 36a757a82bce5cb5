"""scripts/soak.py: a few seconds of it, and that it notices what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import trtbridge as tb

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its state, with a converted network, and the modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import soak_actions

        yield soak_actions.Soak(tmp_path_factory.mktemp("soak"), 0)
    for name in ("soak_forced", "soak_fast", "soak_actions", "soak_failures"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("handing_over", "more"),
    [("always", []), ("never", ["--without-gate", "--load", '{"max_contexts": 2}'])],
    ids=["always", "never, and more by force"],
)
def test_a_few_seconds(handing_over: str, more: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPTS / "soak.py"), "--minutes", "0.05", "--threads", "2"]
    command += ["--handing-over", handing_over, *more]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")],
        capture_output=True, text=True, env=environment, check=False, timeout=500,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["wrong"] == found["unexpected"] == [], done.stdout + done.stderr
    assert found["calls"] > 0
    assert found["handed_over"] == 0 or handing_over == "always"
    assert found["left"] == 0, "modules are freed without the garbage collector"
    assert done.returncode == int(bool(found["litter"]))
    assert "wrong results: 0" in done.stdout


@pytest.mark.parametrize(("when", "handed"), [("auto", False), ("always", True), ("never", False)])
def test_handing_over(when: str, handed: bool, soak: Any) -> None:
    import soak_forced

    from trtbridge.bridge.host_thread import HostCalls

    calls = HostCalls(107)
    calls((), lambda: None)
    with soak_forced.handing_over(when):
        module = soak.load(soak.file, Random(0))
        soak.check(module, Random(0))
        assert (module._running._host is not None) is handed
        # As if somebody else were at it.
        calls.thread._runner = threading.get_ident() + 1
        calls.thread._busy = True
        calls.thread._begin.put(None)
        other = calls((), threading.get_ident)
    assert (other == threading.get_ident()) is (when == "never")


def test_options_by_force(soak: Any) -> None:
    import soak_forced

    with soak_forced.loads({"max_contexts": 3, "out_of_range": "error"}):
        options = [soak.runtime_options(Random(seed)) for seed in range(5)]
        assert soak.load(soak.file, Random(0))._running._lanes._most == 3
    assert all(found["max_contexts"] == 3 and found["out_of_range"] == "error" for found in options)
    assert {found["share_workspace"] for found in options} == {True, False}, "the others are by chance"
    assert "out_of_range" not in soak.runtime_options(Random(0))


def test_without_gate(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures and enqueues are kept apart, but where a soak forces them not to be."""
    import soak_forced

    from trtbridge.plugins import capture_gate
    from trtbridge.plugins.capture_gate import CaptureGate

    monkeypatch.setattr(capture_gate, "PATIENCE_S", 1000.0)
    gate = CaptureGate()
    log: list[str] = []

    def enqueue() -> None:
        gate.enter()
        log.append("enqueue")
        gate.leave()

    def beside_a_capture() -> None:
        other = threading.Thread(target=enqueue)
        with gate.capture():
            other.start()
            other.join(0.2)
            log.append("end of capture")
        other.join(30)

    with soak_forced.without_gate():
        beside_a_capture()
    beside_a_capture()
    assert log == ["enqueue", "end of capture", "end of capture", "enqueue"]


def test_every_failure_ends_as_it_should(soak: Any) -> None:
    import soak_failures

    pick = Random(1)
    assert soak_failures.bad_shape(soak, pick) in ("InputError", "OutOfRangeError")
    assert soak_failures.wrong_dtype(soak, pick) == "InputError"
    assert soak_failures.failing_plugin(soak, pick) == "ExecutionError"
    endings = {soak_failures.damaged_file(soak, pick) for _ in range(30)}
    assert "ModelFileError" in endings
    assert soak_failures.full_disk(soak, pick).startswith("ModelFileError (")
    assert soak_failures.damaged_cache(soak, pick).startswith("right")
    assert soak_failures.litter(soak) == []
    (soak.work / "forgotten").touch()
    assert soak_failures.litter(soak) == ["forgotten"]
    (soak.work / "forgotten").unlink()


def test_a_pretended_full_disk(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import soak_failures

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError("no mount here")

    monkeypatch.setattr(soak_failures.subprocess, "run", refuse)
    assert soak_failures.full_disk(soak, Random(2)) == "ModelFileError (pretended)"


def test_a_save_that_is_killed(soak: Any) -> None:
    import soak_failures

    assert soak_failures.save_killed(soak, Random(3)).startswith("whole file")


def test_what_must_fail_and_does_not_is_noticed(soak: Any) -> None:
    import soak_failures

    with pytest.raises(soak_failures.NoErrorError, match="no InputError"), soak_failures.must_raise(tb.InputError):
        pass
    with pytest.raises(ValueError, match="other"), soak_failures.must_raise(tb.InputError):
        raise ValueError("other")


def test_a_wrong_result_is_noticed(soak: Any) -> None:
    import soak_actions

    given = soak.arguments(4, Random(4))
    with torch.no_grad():
        right = soak.eager["a"](*given)
    soak.compare(right, given, ("a",))
    soak.compare(right, given, ("b", "a"))
    for wrong in (
        {name: tensor + 0.1 for name, tensor in right.items()},
        {name: tensor[:2] for name, tensor in right.items()},
        {name: tensor * float("nan") for name, tensor in right.items()},
        {"scores": right["scores"]},
    ):
        with pytest.raises(soak_actions.WrongError):
            soak.compare(wrong, given, ("a", "b"))
    with pytest.raises(soak_actions.WrongError, match=r"batch 4: off by .* from weights b"):
        soak.compare(right, given, ("b",))


def test_as_often_as_threads_can(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPTS / "soak_fast.py"), "--seconds", "1"]
    kinds = ["--kinds", "plain,plain,contexts,loads", "--json", str(tmp_path / "found.json")]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, env=environment, check=False, timeout=500
        )

    done = run(*kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["done"]) == {"plain", "contexts", "loads"}
    assert all(count > 0 for count in found["done"].values())
    assert found["wrong"] == []
    assert "no such kind: some" in run("--kinds", "plain,some").stderr


def test_a_wrong_result_of_a_fast_call_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import soak_fast

    fast = soak_fast.Fast(tmp_path, 0)
    assert fast.wrong == []
    fast._expected[2] = fast._expected[2] + 1
    for size in soak_fast.BATCHES:
        fast.call(fast._shared, size)
    assert fast.wrong == ["batch 2: off by 1"]
    monkeypatch.setattr(soak_fast.Fast, "plain", lambda self, pick: 1 // 0)
    soak_fast.worker(fast, "plain", 0, 0.0)
    assert fast.wrong[1:] == ["plain: ZeroDivisionError: integer division or modulo by zero"]
