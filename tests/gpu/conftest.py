"""What every GPU test shares: where it may run, on which backends, and the record that the report is made of.

Environment variables:

* ``TRTBRIDGE_GPU_REPORT_JSON``: where the record goes (outcomes, rows of numbers, versions); rewritten after each test,
  so that a process that dies leaves what it had. scripts/gpu_check.py makes docs/gpu-report.md of it.
* ``TRTBRIDGE_GPU_PREBUILT``: folder with programs that scripts/gpu_check.py converted beforehand; without it the model
  tests convert for themselves.
* ``TRTBRIDGE_GPU_TESTS_ON_CPU=1``: a dry run for authors on a machine without a GPU: tiny models, ONNX Runtime, CPU.
  What only makes sense with CUDA is skipped. It finds typing errors, nothing more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.backends import all_statuses

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for helpers.py and zoo.py, which scripts/gpu_check.py runs as well

from calls_model import BATCH, Make, Net, arguments  # noqa: E402
from helpers import DRY_RUN, GPU_BACKENDS, Report, environment, usable_backends  # noqa: E402


def _backends() -> list[Any]:
    """The backends to test; where there is none, one parameter that is skipped with the reason."""
    if usable := usable_backends():
        return list(usable)
    reasons = "; ".join(status.reason for status in all_statuses() if status.name in GPU_BACKENDS)
    if not torch.cuda.is_available():
        reasons = f"torch {torch.__version__} sees no CUDA device (TRTBRIDGE_GPU_TESTS_ON_CPU=1 for a dry run)"
    return [pytest.param("none", marks=pytest.mark.skip(reason=f"no backend can run here: {reasons}"))]


@pytest.fixture(scope="session", params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs here, in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors and modules go."""
    return torch.device("cpu") if DRY_RUN else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(backend: str) -> torch.device:
    """The CUDA device, for tests that are about streams, graphs or memory of one."""
    if DRY_RUN:
        pytest.skip("dry run on a CPU: this is about CUDA alone")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def report(record_property: Callable[[str, object], None], backend: str) -> Report:
    """Adds a row of numbers to the report: ``report("models", model="resnet50", batch=1, ours_ms=0.4)``."""

    def add(table: str, **values: Any) -> None:
        # Properties travel with the test's report, from the workers of pytest-xdist too.
        record_property("row", json.dumps({"table": table, "backend": backend, **values}))

    return add


@pytest.fixture(scope="session")
def eager(device: torch.device) -> Net:
    """The network of calls_model.py, where a file of tests has no other."""
    torch.manual_seed(0)
    return Net().eval().to(device)


@pytest.fixture(scope="session")
def converted(eager: Net, backend: str, device: torch.device) -> tb.EngineModule:
    """The same, converted once for all files."""
    shapes = {"x": {0: BATCH}, "scale": {0: BATCH}}
    return tb.convert(eager, arguments(4, device), dynamic_shapes=shapes, backend=backend)


@pytest.fixture
def make(converted: tb.EngineModule) -> Make:
    """The converted program, running in another way."""

    def again(**options: Any) -> tb.EngineModule:
        runtime = tb.RuntimeOptions.make(options)
        return tb.EngineModule(converted.program, converted.device, options=runtime)

    return again


@pytest.fixture(scope="session", autouse=True)
def _exact_float32() -> Iterator[None]:
    """TF32 off in PyTorch, as it is in engines by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder. The versions of other packages on a GPU machine are not ours to choose, so that
    only warnings that come from trtbridge are errors here; those of others are shown."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default", "error:::trtbridge"))


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("TRTBRIDGE_GPU_REPORT_JSON")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Path(path)), "trtbridge-gpu-recorder")


class _Recorder:
    """Gathers outcomes and rows, and writes them after each test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._record: dict[str, Any] = {"environment": environment(), "tests": {}, "running": []}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if _is_ours(nodeid):
            self._record["running"].append(nodeid)
            self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not _is_ours(report.nodeid):
            return
        known = self._record["tests"].setdefault(report.nodeid, {"outcome": "passed", "words": "", "seconds": 0.0})
        known["seconds"] = round(known["seconds"] + report.duration, 2)
        if report.when == "teardown" and report.nodeid in self._record["running"]:
            self._record["running"].remove(report.nodeid)
        expected = hasattr(report, "wasxfail")
        if report.outcome != "passed" or expected:
            outcome = "xfailed" if expected and report.skipped else "xpassed" if expected else report.outcome
            known |= {"outcome": outcome, "words": _words(report)}
        if report.when == "teardown":
            known["rows"] = [json.loads(str(value)) for name, value in report.user_properties if name == "row"]
        self._write()

    def pytest_sessionfinish(self) -> None:
        self._record["finished"] = True
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".part")
        partial.write_text(json.dumps(self._record, indent=1))
        partial.replace(self._path)


def _is_ours(nodeid: str) -> bool:
    return HERE.name in nodeid.partition("::")[0].split("/")[:-1]


def _words(report: pytest.TestReport) -> str:
    """Why a test was skipped or failed, in short."""
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:1500]
