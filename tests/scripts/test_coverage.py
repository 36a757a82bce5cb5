"""scripts/coverage.py: what is compared, what becomes of a process that dies or hangs, and the page."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
PARTS = ("samples", "compare", "pool", "report")

FAKE_WORKER = """
import json, os, sys, time
say = lambda answer: print(json.dumps(answer), flush=True)
say({"ops": ["fine", "crash", "stubborn", "hang", "faulted"], "environment": {"process": os.getpid()}})
for line in sys.stdin:
    request = json.loads(line)
    op = request["op"]
    say({"facts": {"dtype": "float32", "process": os.getpid()}})
    for backend in request["backends"]:
        say({"stage": f"{backend} build"})
        if backend == "b" and (op == "stubborn" or (op == "crash" and not request["isolate"])):
            print("terminate called without an active exception", file=sys.stderr, flush=True)
            os.abort()
        if backend == "b" and op == "hang":
            time.sleep(60)
        say({"backend": backend, "result": {"outcome": "engine", "isolated": request["isolate"]}})
    say({"done": op, "leaving": op == "faulted"})
"""


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The script's modules; ``coverage`` itself runs as a script only, since a library has the same name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield SimpleNamespace(**{name: importlib.import_module(f"coverage_{name}") for name in PARTS})
    for name in PARTS:
        sys.modules.pop(f"coverage_{name}", None)


def _sample(scripts: SimpleNamespace, function: Any, *args: Any, **kwargs: Any) -> Any:
    module = scripts.samples.OpModule(function, args, kwargs)
    tensors = tuple(t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    return scripts.samples.Sample("op", torch.float32, module.eval(), tensors)


def test_every_tensor_is_an_input_and_all_else_constant(scripts: SimpleNamespace) -> None:
    seen: list[Any] = []

    def op(tensors: Any, dim: int, *, weights: Any, mode: str) -> torch.Tensor:
        seen.append((tensors, dim, weights, mode))
        return torch.cat(tensors, dim) * weights["w"]

    x, y, w = torch.ones(2, 1), torch.zeros(2, 2), torch.full((3,), 2.0)
    sample = _sample(scripts, op, [x, y], 1, weights={"w": w}, mode="m")
    assert len(sample.tensors) == 3
    other = (torch.full((2, 1), 5.0), torch.ones(2, 2), torch.full((3,), 10.0))
    assert sample.module(*other).tolist() == [[50.0, 10.0, 10.0]] * 2
    (given, dim, weights, mode) = seen[0]
    assert given == [other[0], other[1]]
    assert (dim, mode) == (1, "m")
    assert weights["w"] is other[2]


def test_a_sample_moves_to_another_device_with_its_constants(scripts: SimpleNamespace) -> None:
    for device in ("cpu", torch.device("cpu")):
        sample = _sample(scripts, torch.ones, (2, 3), device=device)
        assert sample.on(torch.device("meta")).module().device.type == "meta"
        assert sample.module().device.type == "cpu"


def test_inputs_keep_strides_and_are_fresh_each_time(scripts: SimpleNamespace) -> None:
    sample = _sample(scripts, torch.Tensor.zero_, torch.ones(3, 2).t())
    (one,) = sample.inputs()
    assert one.stride() == (1, 2)
    sample.module(one)
    assert sample.inputs()[0].sum() == 6


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (torch.ones(2), torch.ones(2, 1), "shape"),
        (torch.ones(2), torch.ones(2).double(), "float64"),
        (torch.ones(2), torch.tensor([1.0, 1.02]), "1 of 2 values by up to 0.02"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), "1 of 1"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "1 of 2"),
        ((torch.ones(1),), torch.ones(1), "returned"),
        ([torch.ones(1)], (torch.ones(1),), "returned"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2.1j]), "1 of 1 values by up to 0.1"),
        (3, 3.0, "int, expected a float"),
        (3.0, 3.1, "1 of 1"),
        (torch.ones(()), 1.0, "Tensor, expected a float"),
    ],
)
def test_differences_are_found(scripts: SimpleNamespace, actual: Any, expected: Any, words: str) -> None:
    with pytest.raises(scripts.compare.MismatchError, match=words):
        scripts.compare.compare_values(actual, expected)


def test_equal_results_pass_with_their_distance(scripts: SimpleNamespace) -> None:
    nan, inf = float("nan"), float("inf")
    expected = {"a": [torch.tensor([1.0, nan, inf])], "b": None, "c": 2, "d": torch.empty(0, 3)}
    actual = {"a": [torch.tensor([1.001, nan, inf])], "b": None, "c": 2, "d": torch.empty(0, 3)}
    assert scripts.compare.compare_values(actual, expected) == pytest.approx(0.001, rel=0.01)


def test_random_ops_are_compared_by_distribution(scripts: SimpleNamespace) -> None:
    reference = scripts.compare.Reference.make(_sample(scripts, torch.randn, 5, 5))
    assert reference.kind == "distribution"
    assert 0 < reference.check(lambda: torch.randn(5, 5)) < 0.1
    frozen = torch.randn(5, 5)
    for wrong, words in (
        (lambda: torch.randn(5, 5) * 1.3, "another distribution"),
        (lambda: torch.randn(5, 5) + 0.2, "another distribution"),
        (lambda: torch.rand(5, 5), "another distribution"),
        (lambda: frozen, "same in"),
        (lambda: torch.randn(5, 6), "shape"),
    ):
        with pytest.raises(scripts.compare.MismatchError, match=words):
            reference.check(wrong)


def test_distance_of_distribution_functions(scripts: SimpleNamespace) -> None:
    distance = scripts.compare.ks_distance
    values = torch.arange(100.0).double()
    assert distance(values, values.flip(0)) == 0
    assert distance(values, values + 25) == pytest.approx(0.25)
    assert distance(values[:50], values[50:]) == 1


def test_a_result_without_dense_tensors_is_none_for_an_engine(scripts: SimpleNamespace) -> None:
    for op in (torch.Tensor.to_sparse, lambda x: "text"):
        with pytest.raises(scripts.compare.NoTensorError):
            scripts.compare.Reference.make(_sample(scripts, op, torch.eye(2)))


DATABASE_CHECK = """
import sys
from types import SimpleNamespace
import torch
from coverage_compare import Reference
from coverage_samples import NoSampleError, database, first_sample

entries = database()
assert len(entries) > 600
for name, dtype in (("cat", torch.float32), ("bitwise_and", torch.int64), ("view_as_real", torch.complex64)):
    sample = first_sample(name, entries[name])
    assert sample.dtype is dtype, sample
    assert Reference.make(sample).kind == "values"
# The database itself would make random ops return the same each time.
for name in ("randn", "bernoulli", "multinomial"):
    assert Reference.make(first_sample(name, entries[name])).kind == "distribution", name
assert Reference.make(first_sample("empty", entries["empty"])).kind == "shapes"
try:
    first_sample("none", SimpleNamespace(supported_dtypes=lambda device: set()))
except NoSampleError:
    print("all well")
"""


def test_the_database_gives_samples_that_run() -> None:
    # In a process of its own: importing torch's tests changes torch's global flags.
    command = [sys.executable, "-c", DATABASE_CHECK]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("all well\n"), done.stderr


@pytest.fixture
def fake_worker(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process that answers, crashes or hangs as the op says."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)
    monkeypatch.setattr(scripts.pool, "WORKER", script)
    worker = scripts.pool.Worker({}, {}, tmp_path / "log")
    yield worker
    worker.stop()


def test_a_process_serves_several_ops(scripts: SimpleNamespace, fake_worker: Any) -> None:
    for op in ("fine", "faulted"):
        assert fake_worker.usable
        result: dict[str, Any] = {"backends": {}}
        fake_worker.ask(scripts.pool.Job(op, ("a", "b")), 30, result)
        assert set(result["backends"]) == {"a", "b"}
        assert result["process"] == fake_worker.environment["process"]
    assert not fake_worker.usable, "it said that it cannot go on"


def test_after_a_crash_the_backend_is_tried_in_isolation(scripts: SimpleNamespace, fake_worker: Any) -> None:
    job, result = scripts.pool.Job("crash", ("a", "b", "c")), {"backends": {}}
    with pytest.raises(scripts.pool.WorkerError, match=r"SIGABRT.*terminate called") as caught:
        fake_worker.ask(job, 30, result)
    assert caught.value.stage == "b build"
    assert set(result["backends"]) == {"a"}
    again = job.after(caught.value, result)
    assert (again.backends, again.isolate) == (("b", "c"), True)
    assert set(result["backends"]) == {"a"}, "no verdict yet"
    given_up = again.after(caught.value, result)
    assert (given_up.backends, given_up.isolate) == (("c",), False)
    assert result["backends"]["b"]["outcome"] == "failed"
    assert "SIGABRT" in result["backends"]["b"]["reason"]


def test_a_backend_that_takes_too_long_is_given_up(scripts: SimpleNamespace, fake_worker: Any) -> None:
    job, result = scripts.pool.Job("hang", ("a", "b", "c")), {"backends": {}}
    with pytest.raises(scripts.pool.WorkerError) as caught:
        fake_worker.ask(job, 1, result)
    fake_worker.stop()
    assert fake_worker.process.poll() is not None
    left = job.after(caught.value, result)
    assert left.backends == ("c",)
    assert result["backends"]["b"] == {"outcome": "failed", "stage": "b build", "reason": "took too long"}


def _record(**ops: Any) -> dict[str, Any]:
    environment = {"date": "d", "python": "3", "versions": {"torch": "2"}, "device": None, "run": False}
    return {"environment": {**environment, "plugin_host": None}, "ops": ops, "seconds": 9}


def _op(ort: str, rtx: str, *plugins: str, reason: str = "why | so") -> dict[str, Any]:
    def one(outcome: str) -> dict[str, Any]:
        words = {"stage": "parser", "reason": reason} if outcome == "failed" else {}
        reasons = {plugin: f"{plugin} has no translation" for plugin in plugins}
        return {"outcome": outcome, "plugins": list(plugins), "reasons": reasons, **words}

    return {"dtype": "float32", "inputs": "float32[2]", "backends": {"onnxruntime": one(ort), "tensorrt_rtx": one(rtx)}}


def test_the_page_counts_and_names_every_op(scripts: SimpleNamespace) -> None:
    record = _record(
        abs=_op("engine", "engine"),
        cummax=_op("plugin", "plugin", "aten::cummax.default"),
        fft=_op("engine", "mixed", "aten::fft.default"),
        det=_op("engine", "failed"),
        sparse={"no_tensor": "sparse", "backends": {}},
        flash={"no_sample": "CUDA only", "backends": {}},
    )
    page = scripts.report.render([record])
    assert "| all | 5 | 1 | 1 | 1 | 2 | **60.0 %** |" in page
    assert "| ONNX Runtime | 5 | 3 | 0 | 1 | 1 | 80.0 % |" in page
    assert "| TensorRT-RTX | 5 | 1 | 1 | 1 | 2 | 60.0 % |" in page
    assert "386" in page
    assert "59.8 %" in page
    assert r"| `det` | float32[2] | TensorRT-RTX | parser | why \| so |" in page
    assert "| `fft` | engine | mixed | `aten::fft.default` | aten::fft.default has no translation |" in page
    assert "## Engine: 1\n\n`abs`" in page
    assert "| `flash` | CUDA only |" in page
    for name in record["ops"]:
        assert page.count(f"`{name}`") == 1


def test_the_page_of_two_runs_lists_an_op_under_its_worst(scripts: SimpleNamespace) -> None:
    page = scripts.report.render(
        [_record(abs=_op("engine", "engine")), _record(abs=_op("engine", "failed", reason="wrong"))]
    )
    assert "## Failed (run 2): 1" in page
    assert "## Engine" not in page
    assert "| 1 | all | 1 | 1 | 0 | 0 | 0 | **100.0 %** |" in page
    assert "| 2 | all | 1 | 0 | 0 | 0 | 1 | **0.0 %** |" in page


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path, page = tmp_path / "record.json", tmp_path / "page.md"

    def sweep(*options: str) -> str:
        command = [sys.executable, str(SCRIPTS / "coverage.py"), "--json", str(path), "--out", str(page), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sweep("--jobs", "1", "--filter", "^(add|cummax)$")
    ops = json.loads(path.read_text())["ops"]
    assert set(ops) == {"add", "cummax"}
    for backend in ("onnxruntime", "tensorrt_rtx"):
        assert ops["add"]["backends"][backend]["outcome"] == "engine"
        assert ops["cummax"]["backends"][backend]["outcome"] == "plugin"
        assert ops["cummax"]["backends"][backend]["plugins"] == ["aten::cummax.default"]
    assert "| all | 2 | 1 | 0 | 1 | 0 | **100.0 %** |" in page.read_text()
    again = sweep("--jobs", "1", "--filter", "^(add|sub)$", "--backends", "onnxruntime")
    assert "[1/1] sub" in again
    assert set(json.loads(path.read_text())["ops"]) == {"add", "cummax", "sub"}
    assert "1] cummax" in sweep("--again", "--plugins-of", str(path), "--backends", "onnxruntime", "--no-render")
