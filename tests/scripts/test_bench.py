"""scripts/bench.py: a dry run of every part, going on after a stop, what is out of bounds, and the page."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SCRIPT = SCRIPTS / "bench.py"

EVERY_PART = """
import json, sys
from pathlib import Path
import bench, bench_models
from bench_common import Settings
settings = Settings(Path(sys.argv[1]), inductor=("reduce-overhead",), random_calls=20, thread_calls=3, threads=2)
made = bench_models.convert_all(["twelve_plugins", "one_linear"], settings, 1, 300)
rows = []
for part in bench.PARTS:
    for unit in bench.units(part, ["twelve_plugins" if part.name == "floor" else "one_linear"], [2]):
        kept = []
        function = getattr(bench.importlib.import_module(part.module), part.name)
        found = function(unit, settings, kept.append)
        assert part.name == "gpus" or kept[-1] == found, part.name
        rows += [{"part": part.name, "unit": unit, "run": 0, **row} for row in found]
record = {"runs": [{"dry_run": True}], "rows": rows, "made": made}
record["problems"] = bench.wrong(record)
Path(sys.argv[2]).write_text(json.dumps(record))
"""


def environment() -> dict[str, str]:
    path = [str(SCRIPTS), *filter(None, sys.path)]
    return {
        **os.environ,
        "TRTBRIDGE_GPU_TESTS_ON_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


@pytest.fixture(scope="module")
def bench() -> Any:
    """The script as a module, and the modules of its parts beside it; gone in the end."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        patch.syspath_prepend(str(ROOT / "tests" / "gpu"))
        patch.setattr(sys, "path", list(sys.path))
        yield importlib.import_module("bench")
    for name in set(sys.modules) - before:
        if name.startswith("bench") or name in ("zoo", "helpers"):
            del sys.modules[name]


def test_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EVERY_PART, str(tmp_path), str(tmp_path / "record.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["made"]["twelve_plugins"]["error"] == ""
    assert record["made"]["twelve_plugins"]["plugins"] == 12
    rows: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        rows.setdefault(row["part"], {})[row["way"]] = row
    assert list(rows["floor"]) == ["floor", "floor, overlapped", "plain", "graph", "reused", "bound", "overlapped"]
    assert rows["floor"]["floor"]["cosine"] > 0.99999, "the floor computes what a call does"
    assert all(row["ratio"] > 0 for way, row in rows["floor"].items() if not way.startswith("floor"))
    assert all(row["us"] > 0 and row["us_short"] > 0 for row in rows["host"].values())
    assert rows["shapes"]["in turn"]["captures"] == [0] * 4
    assert rows["shapes"]["random"]["calls"] == 20
    assert len(rows["shapes"]["random"]["samples"]) == 20
    assert set(rows["threads"]) == {"one thread", "one module", "one thread, own modules", "own modules"}
    assert rows["threads"]["own modules"]["beside_in_turn"] > 0
    assert {"convert", "load", "cache", "refit"} <= set(rows["life"])
    assert {"plain", "graph", "bound", "eager", "eager graph", "inductor reduce-overhead"} <= set(rows["beside"])
    assert not any(row["error"] for row in rows["beside"].values())
    kinds = {"attention", "convolutions", "products", "norms", "rest", "slowest"}
    assert set(rows["where"]) == {f"{kind} {batch}" for kind in kinds for batch in (1, 4)}
    slowest = rows["where"]["slowest 4"]["layers"]
    assert slowest
    assert slowest == sorted(slowest, key=lambda layer: -layer["ms"])
    assert rows["where"]["products 4"]["ours_ms"] > 0 < rows["where"]["products 4"]["eager_ms"]
    assert rows["where"]["attention 1"]["eager_ms"] == 0, "a linear layer has none"
    sizes = ("as usual", "one size", "a profile for each size")
    others = (*sizes, "attention decomposed", "attention fused", "all fusions", "products in PyTorch")
    for part, ways in (("sizes", sizes), ("lowerings", others)):
        assert list(rows[part]) == [f"{way} {batch}" for batch in (1, 4) for way in ways]
        assert all(row["ms"] > 0 and row["ratio"] > 0 and not row["error"] for row in rows[part].values())
    for part in rows.values():
        for row in part.values():
            assert row.get("cosine", 1.0) > 0.9999, row
            assert row.get("skipped", "named") != "", row
    assert not [problem for problem in record["problems"] if "cosine" in problem or "failed" in problem]


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "r.json"), "--work", str(tmp_path / "work"),
               "--models", "one_linear", "--parts", "host,gpus"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=500)
    assert done.returncode in (0, 1), done.stderr  # times of a busy CPU may be out of bounds
    assert "one_linear: converted" in done.stdout
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["way"] for row in rows[:5]] == ["plain", "graph", "reused", "bound", "overlapped"]
    assert rows[5]["skipped"]


def test_a_run_goes_on_where_it_was(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = importlib.import_module("bench_models")
    measured: list[tuple[str, str]] = []
    settings = bench.Settings(tmp_path, dtype="float32")
    place = tmp_path / "gpt2_float32.json"

    def run_child(command: list[str], limit_s: float, threads: int = 0) -> str:
        """Converts all but gpt2."""
        name = command[2]
        bench.write(tmp_path / f"{name}_float32.json", {"error": "BuildError: no" if name == "gpt2" else ""})
        return ""

    def run_unit(part: str, unit: str, *rest: Any) -> list[dict[str, Any]]:
        measured.append((part, unit))
        if unit == "unet":
            raise KeyboardInterrupt
        return [{"way": "plain", "us": 1.0, "us_short": 1.0}]

    monkeypatch.setattr(models, "run_child", run_child)
    monkeypatch.setattr(bench, "run_unit", run_unit)
    options = argparse.Namespace(
        parts=["host"], models=["one_linear", "gpt2", "unet"], batches=[1], json=tmp_path / "r.json", workers=1,
        convert_timeout=1.0, limit=1.0, again=False,
    )  # fmt: skip

    def rows() -> dict[str, dict[str, Any]]:
        return {row["unit"]: row for row in json.loads(options.json.read_text())["rows"]}

    with pytest.raises(KeyboardInterrupt):  # cases come in the zoo's order: unet, gpt2, one_linear
        bench.bench(options, settings)
    monkeypatch.setattr(
        bench, "run_unit", lambda part, unit, *rest: measured.append((part, unit)) or [{"way": "x", "us": 1.0}]
    )
    assert measured == [("host", "unet")]
    assert bench.bench(options, settings) == 1
    assert measured[1:] == [("host", "unet"), ("host", "one_linear")]
    assert rows()["gpt2"]["failed"] == "did not convert: BuildError: no"
    assert rows()["unet"]["run"] == 0, "a run that wrote nothing left nothing"
    assert bench.bench(options, settings) == 1
    assert len(measured) == 3, "neither what was measured nor what failed is tried again"
    monkeypatch.setattr(models, "run_child", lambda command, *rest: bench.write(place, {"error": ""}) or "")
    options.again = True
    assert bench.bench(options, settings) == 0
    assert measured[3:] == [("host", "gpt2")]
    assert rows()["gpt2"]["run"] == 1


def test_a_unit_that_dies_leaves_what_it_had(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bench.Settings(tmp_path)

    def die(command: list[str], limit_s: float) -> str:
        bench.write(Path(command[-1]), [{"way": "eager", "ms": 1.0}])
        return f"took longer than {limit_s:.0f} s"

    monkeypatch.setattr(bench, "run_child", die)
    rows = bench.run_unit("beside", "resnet50 1", settings, 7.0)
    assert rows == [{"way": "eager", "ms": 1.0}, {"way": "", "failed": "took longer than 7 s"}]


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"device": "a GPU", "date": "today", "versions": {"torch": "2"}, "source": "abc",
             "settings": {"dtype": "float16"}}  # fmt: skip
    return {"runs": [about], "rows": [{"run": 0, **row} for row in rows]}


def floor_row(way: str, ms: float, **more: Any) -> dict[str, Any]:
    row = {"part": "floor", "unit": "net", "way": way, "ms": ms, "low": ms, "high": ms, **more}
    return row | ({"cosine": 1.0} if way == "floor" else {"ratio": ms, "refusal": ""})


def beside_row(unit: str, way: str, ms: float, ours: float) -> dict[str, Any]:
    return {"part": "beside", "unit": unit, "way": way, "ms": ms, "ratio": ms / ours, "cosine": 0.9999, "error": ""}


def test_what_is_out_of_bounds(bench: ModuleType) -> None:
    def problems(*rows: dict[str, Any]) -> list[str]:
        return list(bench.wrong(record_of(list(rows))))

    good = [floor_row("floor", 1.0), floor_row("plain", 2.0), floor_row("bound", 1.01)]
    assert problems(*good) == []
    slow = [floor_row("floor", 1.0), floor_row("plain", 2.0), floor_row("bound", 1.05)]
    assert problems(*slow) == ["floor, net: the fastest way takes 1.050 of the floor's time"]
    lapped = floor_row("overlapped", 1.05)
    assert problems(*good, lapped) == ["floor, net: the overlapped way takes 1.050 of the floor's time"]
    other = floor_row("floor", 1.0) | {"cosine": 0.5}
    assert problems(other) == ["floor, net: its results are not those of a call (cosine 0.500000)"]
    host = {"part": "host", "unit": "one_linear", "way": "graph", "us": 21.0, "us_short": 90.0, "calls": 1000}
    assert problems(host, host | {"way": "plain"}, host | {"unit": "resnet50"}) == [
        "host, one_linear, graph: 21.0 µs a call"
    ]
    turns = {"part": "shapes", "unit": "net", "way": "in turn", "captures": [0, 8, 8], "shapes": 8}
    assert problems(turns) == []
    assert len(problems(turns | {"captures": [0, 8, 9]})) == 1
    crowd = {"part": "threads", "unit": "net", "way": "one module", "cuda_graphs": True, "cosine": 1.0, "ratio": 0.5}
    assert problems(crowd) == ["threads, net, one module, cuda_graphs=True: 0.500 of one thread's throughput"]
    assert problems({**crowd, "ratio": 1.0, "differ": 0.0}) == []
    assert problems({**crowd, "ratio": 1.0, "differ": 0.005}) == [
        "threads, net, one module, cuda_graphs=True: 0.50 % of the results are not what the module gives alone"
    ]
    assert problems({**crowd, "ratio": 1.0, "differ": 0.005, "cuda_graphs": "True, overlapped"}) == []
    assert problems({**crowd, "way": "one thread, own modules"}) == [], "what others are held against"
    assert problems({**crowd, "way": "own modules", "beside_in_turn": 1.0}) == []
    assert problems({**crowd, "way": "own modules", "ratio": 1.0, "beside_in_turn": 0.5}) == [
        "threads, net, own modules, cuda_graphs=True: 0.500 of one thread's throughput"
    ]
    refit = {"part": "life", "unit": "net", "way": "refit", "cosine": 1.0, "ratio": 0.2}
    assert problems(refit) == ["life, net: a refit takes 0.200 of a full convert"]
    left_out = {"part": "life", "unit": "net", "way": "refit", "skipped": "no refit"}
    assert problems(left_out, {"part": "gpus", "unit": "two GPUs", "way": "two GPUs", "skipped": "one GPU"}) == []
    failed = {"part": "beside", "unit": "net 1", "way": "", "failed": "took longer than 3 s"}
    assert problems(failed, beside_row("net 1", "graph", 1.0, 1.0)) == ["beside, net 1: took longer than 3 s"]
    assert problems(beside_row("net 1", "graph", 1.0, 1.0) | {"error": "no"}) == ["beside, net 1, graph: no"]


def test_the_page(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [floor_row("floor", 1.0), floor_row("bound", 1.01)]
    for ways in (
        {"graph": 1.0, "bound": 0.9, "eager": 3.0, "inductor reduce-overhead": 0.9, "inductor max-autotune": 0.8},
    ):
        rows += [beside_row("resnet50 1", way, ms, 1.0) for way, ms in ways.items()]
    rows += [{"part": "beside", "unit": "gpt2 1", "way": "", "failed": "did not convert: BuildError"}]
    rows += [{"part": "where", "unit": "gpt2", "way": "norms 1", "batch": 1, "kind": "norms", "ours_ms": 0.5,
              "eager_ms": 1.0, "call_ms": 2.0}]  # fmt: skip
    layers = [{"op": "conv2d", "module": "block.0", "nodes": 3, "ms": 0.25}]
    rows += [{"part": "where", "unit": "gpt2", "way": "slowest 1", "batch": 1, "of": 9, "layers": layers}]
    rows += [{"part": "lowerings", "unit": "gpt2", "way": f"{way} 1", "lowering": way, "words": "so", "batch": 1,
              "error": "", "ms": ms, "ratio": ms} for way, ms in (("as usual", 1.0), ("one size", 0.9))]  # fmt: skip
    rows += [{"part": "sizes", "unit": "resnet50", "way": f"{way} 1", "lowering": way, "words": "so", "batch": 1,
              "error": "", "ms": ms, "ratio": ms} for way, ms in (("as usual", 1.0), ("one size", 0.5))]  # fmt: skip
    rows += [{"part": "gpus", "unit": "two GPUs", "way": "two GPUs", "skipped": "1 GPU here"}]
    record, out = tmp_path / "record.json", tmp_path / "page.md"
    record.write_text(json.dumps(record_of(rows)))
    command = [sys.executable, str(SCRIPT), "--render", str(record), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1, done.stderr  # gpt2 did not convert
    text = out.read_text()
    assert "- today, a GPU; float16; torch 2; sources `abc`" in text
    assert "| net | 1.0000 | – | – | – | – | 1.0100 (1.010) |" in text
    assert (
        "| resnet50 | 1 | 1.0000 | 0.9000 | – | 3.0000 | – | 0.8000 A | – | 3.00 | **0.80** | 1.60 | 0.999900 |" in text
    )
    assert "Of 1 pairs the engine is slower than inductor in 1; median ratio 0.80." in text
    assert "Of 1 pairs the engine of one size is slower than inductor in 0; median ratio 1.60." in text
    assert "| resnet50 | 1 | 1.0000 (1.000) | 0.5000 (0.500) |" in text
    assert "- gpt2 1: failed: did not convert: BuildError" in text
    assert "- two GPUs, two GPUs: left out: 1 GPU here" in text
    assert "## Many shapes\n\nNot measured." in text
    assert "- beside, gpt2 1: did not convert: BuildError" in text
    assert "| gpt2 | 1 | norms | 0.500 | 1.000 | 2.00 | 2.000 |" in text
    assert "| gpt2 | 1 | 1.0000 (1.000) | 0.9000 (0.900) |" in text
    assert "- *one size*: so" in text
    assert "| gpt2 | 1 | conv2d | block.0 | 3 | 0.2500 |" in text
    assert "![Times beside PyTorch](page.png)" in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    import bench_picture  # `bench` has the scripts in the path

    assert bench_picture.bars(json.loads(record.read_text())) == {
        "resnet50 1": {"eager": 3.0, "inductor": 0.8, "inductor, ours for one size, too": 1.6}
    }


def test_one_unit_at_a_time(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("bench_common")
    lock = tmp_path / "gpu.lock"
    with common.alone():
        assert not lock.exists()
    monkeypatch.setenv("TRTBRIDGE_BENCH_LOCK", str(lock))
    with common.alone(), pytest.raises(Timeout):
        FileLock(lock).acquire(timeout=0.1)
    FileLock(lock).acquire(timeout=0.1).lock.release()


def test_the_later_record_counts(bench: ModuleType) -> None:
    rows = [floor_row("floor", 1.0), floor_row("bound", 1.01), beside_row("gpt2 1", "graph", 1.0, 1.0)]
    merged = bench.merge([record_of(rows), record_of([beside_row("gpt2 1", "eager", 2.0, 1.0)])])
    assert len(merged["runs"]) == 2
    found = [(row["part"], row["way"], row["run"]) for row in merged["rows"]]
    assert found == [("floor", "floor", 0), ("floor", "bound", 0), ("beside", "eager", 1)]


def test_units_and_models(bench: ModuleType) -> None:
    models = importlib.import_module("bench_models")
    assert len(models.BESIDE) >= 15
    assert len({case.name for case in models.CASES}) == len(models.CASES)
    known = {case.name for case in models.CASES}
    for part in bench.PARTS:
        for unit in bench.units(part, [], [1, 32]):
            assert part.name == "gpus" or bench.model_of(part.name, unit) in known
    assert bench.units(bench.part_named("beside"), ["gpt2"], [1, 32]) == ["gpt2 1", "gpt2 32"]
    life = importlib.import_module("bench_life")
    assert life.throughput('words\n{"throughput": 12.5}\nmore\n') == 12.5
    assert life.throughput("words\n[1]\n") is None


def test_a_head_of_zeros_says_something(bench: ModuleType) -> None:
    zoo = importlib.import_module("bench_models").zoo
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    kept = net[0].weight.clone()
    torch.nn.init.zeros_(net[1].weight)
    zoo._lively(net)
    assert torch.equal(net[0].weight, kept)
    assert net[1].weight.any()


def test_a_lowering_without_guards(bench: ModuleType) -> None:
    import onnx

    from trtbridge.bridge.backends.rtx_faults import avoid_faults

    lowerings = importlib.import_module("bench_lowerings")
    text = """<ir_version: 10, opset_import: ["" : 21]>
        net (float[1, 2, 8, 8] x, float[2, 2, 3, 3] a, float[2, 2, 3, 3] b) => (float[1, 2, 6, 6] y)
        { c = Conv(x, a) d = Conv(x, b) y = Add(c, d) }"""
    net = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    guarded = avoid_faults(net)
    assert len(guarded.graph.node) > 3
    with lowerings._no_guards():
        assert avoid_faults(net) is net
    assert avoid_faults(net) == guarded
