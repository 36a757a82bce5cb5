"""scripts/gpu_check.py: no file of tests/gpu and no table of numbers is forgotten."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_belongs_to_one_part(gpu_check: ModuleType) -> None:
    named = [name for part in gpu_check.PARTS for name in gpu_check.files_of(part)]
    assert sorted(named) == FILES, "each file once, and none that is not there"


def test_all_parts_run_each_file_once(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_pytest(files: list[str], *rest: Any) -> dict[str, Any]:
        ran.extend(files)
        return {"environment": {"date": "today"}, "tests": {}}

    monkeypatch.setattr(gpu_check, "run_pytest", run_pytest)
    monkeypatch.setattr(gpu_check, "prebuild", lambda *arguments: None)
    options = argparse.Namespace(
        parts=",".join(gpu_check.PARTS),
        workers=2,
        json=None,
        pytest_options=[],
        models="",
        prebuilt=tmp_path,
        part_limit=9.0,
    )
    gpu_check.run(options, tmp_path)
    assert sorted(ran) == FILES
    options.parts = "runtime,unheard"
    with pytest.raises(SystemExit, match="there is no part unheard"):
        gpu_check.run(options, tmp_path)


def test_a_new_file_is_swept_up(gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_calls.py").touch()
    (tmp_path / "test_new.py").touch()
    monkeypatch.setattr(gpu_check, "TESTS", tmp_path)
    assert gpu_check.files_of("rest") == ["test_new.py"]


def test_a_table_that_nobody_named_is_shown(gpu_check: ModuleType) -> None:
    about = {"dry_run": False, "date": "today", "platform": "p", "python": "3", "versions": {}, "source": "s"}
    rows = [{"table": "new_thing", "backend": "b", "us": 1.5}, {"table": "seconds", "backend": "b", "load": 1.0}]
    test = {"outcome": "passed", "words": "", "seconds": 1, "environment": 0, "rows": rows}
    text = gpu_check.render({"environments": [about], "tests": {"tests/gpu/test_x.py::test_y": test}})
    assert "## New thing\n\n| us |\n| --- |\n| 1.5 |" in text
    assert "## Seconds" not in text


def test_a_part_that_takes_too_long_is_ended_and_its_record_kept(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, marker, record = tmp_path / "python", tmp_path / "alive", tmp_path / "record.json"
    known = {
        "environment": {},
        "tests": {"first": {"outcome": "passed", "seconds": 1, "rows": []}},
        "running": ["second"],
    }
    python.write_text(
        f"#!/bin/sh\necho '{json.dumps(known)}' > $TRTBRIDGE_GPU_REPORT_JSON\n(sleep 30; touch {marker}) &\nwait\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(python))
    found = gpu_check.run_pytest(["test_slow.py"], [], {"PATH": os.environ["PATH"]}, record, 3.0)
    assert found["tests"]["first"]["outcome"] == "passed"
    words = "not done: the part was ended after 3 s"
    assert found["tests"]["second"] == {"seconds": 0.0, "rows": [], "outcome": "skipped", "words": words}
    assert not marker.exists()
