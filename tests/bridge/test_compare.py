"""compare(): every kind of side, every kind of input, steady memory, and Polygraphy reading what is saved."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polygraphy.comparator import RunResults

import trtbridge as tb
from trtbridge.bridge.compare_report import CompareReport
from trtbridge.bridge.tolerances import default_tolerance


class Net(torch.nn.Module):
    """Two inputs in a dict, three outputs, one of them a number."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 3)
        self.dropout = torch.nn.Dropout(0.5)
        self.factor = factor

    def forward(self, x: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        y = self.dropout(self.layer(x)) * self.factor + batch["ids"].unsqueeze(1)
        return {"y": y, "parts": (x.sum(1), y > 0), "count": x.shape[0]}


class Small(torch.nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.weight) * self.factor


def example(rows: int = 4) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.randn(rows, 6), {"ids": torch.arange(rows)}


BATCH = tb.Dim("batch", min=1, opt=4, max=9)
DIMS = {"x": {0: BATCH}, "batch": {"ids": {0: BATCH}}}


@pytest.fixture(scope="module")
def engine() -> tb.EngineModule:
    return tb.convert(Net(), example(), dynamic_shapes=DIMS, backend="onnxruntime")


@pytest.fixture(scope="module")
def small() -> tb.EngineModule:
    shapes = {"x": {0: tb.Dim("rows", min=1, opt=3, max=64)}}
    return tb.convert(Small(), (torch.randn(3, 4),), dynamic_shapes=shapes, backend="onnxruntime")


def test_a_module_and_its_engine_on_generated_inputs(engine: tb.EngineModule) -> None:
    net = Net().train()
    report = tb.compare(net, engine, samples=6, seed=7)
    assert report.ok
    assert report.samples == 6
    assert net.training, "left as it was found"
    assert report.inputs.startswith("6 random, seed 7 to 12, batch 4/1/9/")
    assert [output.label for output in report.outputs] == ["y", "parts[0]", "parts[1]", "count"]
    assert report.outputs[0].elements == 3 * sum(map(int, report.inputs.rsplit(" ", 1)[1].split("/")))
    assert {shape.shape for shape in report.outputs[0].shapes} >= {"4x6, 4", "1x6, 1", "9x6, 9"}
    report.raise_if_failed()
    assert tb.compare(net, engine, samples=6, seed=7) == report, "the same seed, the same numbers"


def test_a_wrong_engine_is_found(engine: tb.EngineModule) -> None:
    report = tb.compare(Net(factor=1.02), engine, [example(2), example(3)])
    assert not report.ok
    assert [output.ok for output in report.outputs] == [False, True, True, True]
    assert report.outputs[0].failed_samples == 2
    with pytest.raises(tb.AccuracyError, match=r"(?s)y: 2 of 2 sample.*sample 0.*worst: sample.*rtol 0.001") as caught:
        report.raise_if_failed()
    assert caught.value.report is report
    assert "OUT OF TOLERANCE" in str(report)


def test_every_kind_of_side(small: tb.EngineModule, tmp_path: Path) -> None:
    net = Small()
    shapes = {"x": {0: tb.Dim("rows", min=1, opt=3, max=64)}}
    saved, file = tmp_path / "small.trtb", tmp_path / "small.onnx"
    tb.save(small, saved)
    exported = tb.export(net, (torch.randn(3, 4),), dynamic_shapes=shapes)
    exported.save(file)
    sides = {"module": net, "engine": small, "onnx": exported, "file": file, "saved": str(saved)}
    for first, one in sides.items():
        for second, other in sides.items():
            report = tb.compare(one, other, torch.ones(5, 4))
            assert report.ok, (first, second)
            assert report.outputs[0].elements == 20
            assert report.reference != report.actual
    # The ranges of an .onnx file are those of the other side, whichever that is.
    assert "rows 3/1/64" in tb.compare(file, small, samples=3).inputs
    with pytest.raises(tb.InputError, match="without a range"):
        tb.compare(file, file)
    with pytest.raises(tb.InputError, match="neither side tells"):
        tb.compare(net, net)


def test_a_graph_with_plugin_nodes(tmp_path: Path) -> None:
    class Cummax(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(x * 2, 1).values + 1

    exported = tb.export(Cummax(), (torch.randn(2, 5),))
    assert tb.compare(Cummax(), exported, torch.randn(2, 5)).ok
    assert tb.compare(exported, tb.convert(Cummax(), (torch.randn(2, 5),), backend="onnxruntime")).ok


def test_every_kind_of_input(small: tb.EngineModule) -> None:
    net, x = Small(), torch.randn(8, 4)
    data = torch.utils.data.TensorDataset(x, torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    kinds: list[tuple[Any, int, dict[str, Any]]] = [
        (x, 1, {}),
        (x.numpy(), 1, {}),
        ((x,), 1, {}),
        ({"x": x}, 1, {}),
        (((x,), {}), 1, {}),
        ([x, x[:2]], 2, {}),
        ([(x,), {"x": x.numpy()}], 2, {}),
        ((row for row in x.split(2)), 4, {}),
        (loader, 4, {"prepare": lambda batch: batch[0]}),
        (loader, 3, {"prepare": lambda batch: batch[0], "samples": 3}),
    ]
    for inputs, count, options in kinds:
        for one, other in ((net, small), (small, net), (small, small)):
            inputs = (row for row in x.split(2)) if isinstance(inputs, Iterator) else inputs
            report = tb.compare(one, other, inputs, **options)
            assert report.ok
            assert report.samples == count
    assert tb.compare(net, Small(), (x,)).ok, "two modules, neither with a signature"
    with pytest.raises(tb.InputError, match=r"Sample 0 does not fit.*(?s:.*)prepare=lambda"):
        tb.compare(net, small, loader)
    with pytest.raises(tb.InputError, match=r"prepare\(\) failed on sample 0: TypeError"):
        tb.compare(net, small, loader, prepare=lambda batch: batch["image"])
    with pytest.raises(tb.InputError, match="no sample"):
        tb.compare(net, small, [])
    with pytest.raises(tb.InputError, match="inputs is a int"):
        tb.compare(net, small, 3)


def test_a_loader_of_polygraphy(small: tb.EngineModule) -> None:
    from polygraphy.comparator import DataLoader

    report = tb.compare(Small(), small, DataLoader(seed=3, iterations=4))
    assert report.ok
    assert report.samples == 4


def test_half_precision_is_held_against_single(small: tb.EngineModule) -> None:
    half = tb.convert(Small().half(), (torch.randn(3, 4).half(),), backend="onnxruntime")
    report = tb.compare(Small(), half, torch.randn(3, 4))
    assert report.ok
    assert report.outputs[0].tolerance == default_tolerance(torch.float16)
    assert report.outputs[0].dtypes == ("float32", "float16")
    assert report.outputs[0].max_abs > 1e-5
    assert tb.compare(Small().bfloat16(), half).outputs[0].tolerance == default_tolerance(torch.bfloat16)


def test_a_golden_reference() -> None:
    class Long(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)[:, -1]

    x = torch.rand(2, 1000)
    plain, golden = (tb.compare(Long(), Long(), x, golden=word) for word in (None, "float64"))
    assert plain.outputs[0].max_abs == 0
    assert golden.outputs[0].max_abs > 0
    assert golden.outputs[0].dtypes == ("float64", "float32")
    assert "in float64" in golden.reference
    assert plain.baseline == ()
    assert golden.baseline == golden.outputs, "the other side is the module itself"
    assert "the reference in float32 instead of float64: max abs" in str(golden)
    assert "The reference in float32 instead of float64" in golden.to_html()
    assert CompareReport.from_json(json.loads(json.dumps(golden.to_json()))) == golden
    exact = Small().half().float()  # the weights of a half module, computed with in single precision
    half = tb.compare(Small().half(), exact, torch.randn(3, 4).half(), golden="float64")
    assert half.ok
    assert half.baseline[0].max_abs > 100 * half.outputs[0].max_abs, "half precision loses more than single"

    class Stubborn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(1000, 2)

    with pytest.raises(tb.InputError, match="fails in float64"):
        tb.compare(Stubborn(), Stubborn(), x, golden="float64")
    engine = tb.convert(Long(), (x,), backend="onnxruntime")
    with pytest.raises(tb.OptionError, match="torch module"):
        tb.compare(engine, Long(), x, golden="float64")


def test_complex_tensors() -> None:
    class Turn(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z * (0.6 + 0.8j)

    z = torch.randn(3, 4, dtype=torch.complex64)
    engine = tb.convert(Turn(), (z,), backend="onnxruntime")
    for inputs in (z, None):
        report = tb.compare(Turn(), engine, inputs)
        assert report.ok
        assert report.outputs[0].elements == (24 if inputs is not None else 72)


def test_random_modules_draw_the_same_numbers_on_both_sides() -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(4)

    before = torch.get_rng_state()
    report = tb.compare(Noise(), Noise(), [torch.zeros(4), torch.ones(4)])
    assert report.outputs[0].max_abs == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_tolerances(small: tb.EngineModule) -> None:
    x = torch.randn(3, 4)
    off = Small(factor=1.01)
    assert not tb.compare(off, small, x).ok
    assert tb.compare(off, small, x, tolerance=tb.Tolerance(rtol=0.02)).ok
    assert tb.compare(off, small, x, tolerance={"output": tb.Tolerance(rtol=0.02)}).ok
    with pytest.raises(tb.OptionError, match=r"names \['logits'\], but the outputs are \['output'\]"):
        tb.compare(off, small, x, tolerance={"logits": tb.Tolerance()})
    for wrong in ({"tolerance": 1e-3}, {"golden": "float32"}, {"samples": 0}, {"top_k": (0,)}):
        with pytest.raises(tb.OptionError, match=next(iter(wrong))):
            tb.compare(off, small, x, **wrong)  # type: ignore[arg-type]


def test_sides_that_do_not_fit(small: tb.EngineModule, engine: tb.EngineModule) -> None:
    with pytest.raises(tb.InputError, match="return different things"):
        tb.compare(Net(), _Both(), example())
    with pytest.raises(tb.InputError, match="expected size 4"):
        tb.compare(engine, small, example())
    with pytest.raises(tb.InputError, match=r"takes x, batch\['ids'\], but the inputs are x"):
        tb.compare(small, engine, torch.randn(3, 4))
    with pytest.raises(tb.OptionError, match="got int"):
        tb.compare(3, small)  # type: ignore[arg-type]
    with pytest.raises(tb.ModelFileError, match="no file"):
        tb.compare("nowhere.onnx", small)
    with pytest.raises(tb.ModelFileError, match="no file"):
        tb.compare("nowhere.trtb", small)


def test_random_sizes_fit_both_sides(small: tb.EngineModule) -> None:
    def engine(low: int, high: int) -> tb.EngineModule:
        shapes = {"x": {0: tb.Dim("rows", min=low, max=high)}}
        return tb.convert(Small(), (torch.randn(low, 4),), dynamic_shapes=shapes, backend="onnxruntime")

    narrow = engine(5, 8)
    for one, other in ((small, narrow), (narrow, small)):
        assert tb.compare(one, other, samples=3).inputs.endswith("rows 5/5/8")
    with pytest.raises(tb.InputError, match="No size of rows fits both sides: one takes 5 to 8, the other 70 to 80"):
        tb.compare(narrow, engine(70, 80))


class _Both(torch.nn.Module):
    def forward(self, x: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return x, batch["ids"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_engines_that_cannot_run_here_say_so() -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tb.convert(Small(), (torch.randn(3, 4),), backend="tensorrt_rtx")
    with pytest.raises(tb.BackendError, match="cannot be compared here"):
        tb.compare(Small(), engine)


def test_memory_is_flat_over_samples(small: tb.EngineModule) -> None:
    net = Small()
    rows = 64  # 1 KiB of input, and as much for each result

    def samples(count: int, size: int = 4000) -> Iterator[torch.Tensor]:
        for _ in range(count):
            yield torch.randn(rows, 4)
            junk = torch.empty(size)
            del junk

    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        assert tb.compare(net, small, samples(count)).samples == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(5)  # what is loaded and cached once
    few, many = peak(10), peak(110)
    # The results of 100 samples, which NumPy counts here, are 2 x 100 KiB.
    assert many < few + 60_000


def test_no_tensor_of_a_sample_is_kept(small: tb.EngineModule) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    class Watched(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x)
            made.append(weakref.ref(result))
            return result

    def samples() -> Iterator[torch.Tensor]:
        for index in range(50):
            tensor = torch.full((61, 4), float(index))
            made.append(weakref.ref(tensor))
            if index % 10 == 9:
                gc.collect()
                assert sum(ref() is not None for ref in made) <= 4, f"sample {index}"
            yield tensor

    assert tb.compare(Watched(), small, samples()).ok
    assert len(made) == 100


def test_the_report_travels_as_json(engine: tb.EngineModule) -> None:
    report = tb.compare(Net(factor=2.0), engine, samples=2, top_k=True)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert CompareReport.from_json(json.loads(text)) == report
    assert str(CompareReport.from_json(json.loads(text))) == str(report)
    assert json.loads(text)["ok"] is False


@pytest.mark.filterwarnings("ignore:SelectableGroups dict interface:DeprecationWarning")  # of Polygraphy
def test_polygraphy_reads_what_is_saved(
    small: tb.EngineModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(3, 4)
    results, inputs, folder = tmp_path / "results.json", tmp_path / "inputs.json", tmp_path / "folder"
    tb.compare(Small(), small, [x, x * 2], save_outputs=results, save_inputs=inputs)
    read = RunResults.load(str(results))
    assert list(read.keys()) == ["Small in PyTorch on cpu", "Small on onnxruntime"]
    np.testing.assert_allclose(read[0][1][1]["output"], Small()(x * 2).detach().numpy(), rtol=1e-6)
    tb.compare(Small(), small, [x, x * 2], save_outputs=folder)
    assert len(list(folder.iterdir())) == 2
    from polygraphy.tools import main

    for file in (results, inputs):
        assert main(["inspect", "data", str(file), "--show-values"]) == 0
        shown = capsys.readouterr().out
        assert ("Small on onnxruntime" in shown) == (file is results)
        assert "float32" in shown
