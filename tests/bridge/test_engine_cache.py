"""Engines that come from disk: the same as built, never damaged ones, for several processes, within a bound."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx.parser
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge import archive, learned
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions, Engine, Progress, Segment
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend
from trtbridge.bridge.backends.ort_session import MODEL_PART
from trtbridge.bridge.cli import app
from trtbridge.bridge.engine_cache import SUFFIX, CacheReport, EngineCache
from trtbridge.bridge.learned import LearnedFile
from trtbridge.bridge.locks import locked
from trtbridge.bridge.model import TensorSpec, iterate_nodes, origin_of

SHAPES = {"x": {0: tb.Dim("n", max=8)}}


class Net(torch.nn.Module):
    """Two segments with a plugin between them, as ONNX has no cummax."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(16, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(self.layer(x), 1)[0].tanh()


X = torch.linspace(-1, 1, 64).reshape(4, 16)


def _convert(model: torch.nn.Module | None = None, **options: Any) -> tb.EngineModule:
    options = {"backend": "onnxruntime", "cache": True, "dynamic_shapes": SHAPES, **options}
    return tb.convert(model or Net(), (X,), **options)


def _report(module: tb.EngineModule) -> dict[str, Any]:
    found: dict[str, Any] = module.program.info["cache"]
    return found


def _counts(module: tb.EngineModule) -> tuple[int, int]:
    return _report(module)["hits"], _report(module)["misses"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the engines are, in the cache folder of this test."""
    return tmp_path / "cache" / "engines"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


# Hits


def test_a_second_conversion_builds_nothing(folder: Path, assert_same: Callable[..., None]) -> None:
    events: list[tuple[str, float]] = []
    first = _convert()
    assert _counts(first) == (0, 2)
    assert len(_files(folder)) == 2
    assert _report(first)["bytes_written"] == first.program.size_bytes
    second = _convert(progress=lambda *event: events.append(event))
    assert _counts(second) == (2, 0)
    assert _report(second)["bytes_read"] == second.program.size_bytes > 0
    assert _report(second)["problems"] == []
    assert second.inspect() == first.inspect()
    assert_same(second(X), Net()(X))
    assert [name for name, _ in events if name.startswith("build: ")] == ["build: from the cache"] * 2
    assert [fraction for name, fraction in events if name.startswith("build: ")] == [0.5, 1.0]


def test_without_the_option_nothing_is_kept(folder: Path) -> None:
    assert "cache" not in _convert(cache=False).program.info
    assert not folder.exists()


def test_other_weights_and_ranges_are_other_engines(assert_same: Callable[..., None]) -> None:
    _convert()
    other = Net()
    with torch.no_grad():
        other.layer.bias[3] += 1
    changed = _convert(other)
    assert _counts(changed) == (1, 1), "the segment behind the plugin has no weights"
    assert_same(changed(X), other(X))
    assert _counts(_convert(dynamic_shapes={"x": {0: tb.Dim("n", max=9)}})) == (0, 2)
    assert _counts(_convert(tf32=True)) == (0, 2)


def test_places_in_an_engine_from_the_cache_are_those_of_now(tmp_path: Path) -> None:
    def convert(lines_above: int) -> tb.EngineModule:
        path = tmp_path / "placed.py"
        path.write_text(
            "\n" * lines_above
            + "import torch\nclass Placed(torch.nn.Module):\n    def forward(self, x):\n        return x.exp() + 1\n"
        )
        namespace: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), namespace)
        return _convert(namespace["Placed"](), dynamic_shapes=None)

    def lines(module: tb.EngineModule) -> set[int]:
        (engine,) = module.program.engines
        proto = onnx.ModelProto.FromString(bytes(engine.parts[MODEL_PART]))
        return {origin_of(node).line for node in iterate_nodes(proto.graph)}

    assert lines(convert(0)) == {4}
    moved = convert(7)
    assert _counts(moved) == (1, 0)
    assert lines(moved) == {11}


@pytest.mark.rtx
def test_engines_of_tensorrt_rtx_and_what_it_refuses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")

    class Refused(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.topk(x * 2, 5000)[0] + 1

    def convert(**options: Any) -> tb.EngineModule:
        given = {"backend": "tensorrt_rtx", "cache": True, "plugin_host": "segments", **options}
        return tb.convert(Refused(), (torch.ones(6000),), **given)

    first = convert()
    assert _counts(first) == (0, 2)
    assert not _report(first)["learned"]
    assert list(first.program.info["learned"]["calls"]) == ["topk"]
    backend = type(get_backend("tensorrt_rtx"))
    built: list[str] = []
    for name in ("check", "build"):
        monkeypatch.setattr(backend, name, lambda *args, name=name, **_: built.append(name))
    second = convert()
    assert built == [], "neither the parser nor the builder is asked again"
    assert _counts(second) == (2, 0)
    assert _report(second)["learned"]
    assert _report(second)["seconds_saved"] > 0
    assert second.inspect() == first.inspect()
    for ours, theirs in zip(second.program.engines, first.program.engines, strict=True):
        assert {name: bytes(part) for name, part in ours.parts.items()} == {
            name: bytes(part) for name, part in theirs.parts.items()
        }
        assert ours.info == theirs.info


def test_what_was_learned_is_a_hint_that_may_be_stale(assert_same: Callable[..., None]) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)

    x = torch.ones(1, 1, 4, 4)
    options = {"backend": "onnxruntime", "cache": True}
    first = tb.convert(Odd(), (x,), **options)
    (call,) = first.program.info["learned"]["calls"]
    second = tb.convert(Odd(), (x,), **options)
    assert _report(second)["learned"]
    (file,) = Path(os.environ["TRTBRIDGE_CACHE_DIR"], learned.FOLDER).glob("*.json")
    key = file.stem
    # Names that the model does not have, and none of what it needs.
    LearnedFile(file.parent, key).write(
        {"calls": {"gone": "once"}, "nodes": {"gone": "once"}, "rewritten": [["", "gone", "TopK", "once"]]},
        CacheReport(),
    )
    third = tb.convert(Odd(), (x,), **options)
    assert list(third.program.info["learned"]["calls"]) == [call]
    assert_same(third(x), Odd()(x))


def test_what_was_learned_is_kept_by_model_options_and_example() -> None:
    class Wrong(torch.nn.Module):
        def __init__(self, kernel: int = 2) -> None:
            super().__init__()
            self.kernel = kernel

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, self.kernel, divisor_override=3)

    x = torch.ones(1, 1, 4, 4)

    def knew(model: torch.nn.Module, x: torch.Tensor, **options: Any) -> bool:
        options = {"backend": "onnxruntime", "cache": True, **options}
        return bool(_report(tb.convert(model, (x,), **options))["learned"])

    assert not knew(Wrong(), x)
    assert knew(Wrong(), x)
    assert not knew(Wrong(3), x)
    assert not knew(Wrong(), x * 2)
    assert not knew(Wrong(), x, max_data_size=5)
    assert not knew(Wrong(), x, passes=tb.Pipeline(tuple(tb.DEFAULT)[:-1]))
    assert knew(Wrong(), x, isolate=False, timeout_s=None), "how it is built does not matter"


# Damage


def _damage_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _damage_bit(data: bytes) -> bytes:
    at = data.index(b"weights.bin") + 60
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": _damage_cut,
    "empty": lambda data: b"",
    "a bit": _damage_bit,
    "foreign": lambda data: b"this is no zip file" * 100,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_engine_is_removed_and_built_again(
    kind: str, folder: Path, caplog: pytest.LogCaptureFixture, assert_same: Callable[..., None]
) -> None:
    whole = {path.name: path.read_bytes() for path in _files(_filled(folder))}
    for path in _files(folder):
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    again = _convert()
    assert _counts(again) == (0, 2)
    assert_same(again(X), Net()(X))
    assert len(_report(again)["problems"]) == 2
    assert "is removed and built again" in caplog.text
    assert {path.name for path in _files(folder)} == set(whole)
    assert _counts(_convert()) == (2, 0), "what was built took the place of what was damaged"


def _filled(folder: Path) -> Path:
    _convert()
    assert len(_files(folder)) == 2
    return folder


@pytest.mark.parametrize("kind", ["another key", "another format", "a newer version", "a lacking part", "a program"])
def test_a_whole_file_that_is_another_is_not_taken(kind: str, folder: Path, tmp_path: Path) -> None:
    first, second = _files(_filled(folder))
    if kind == "another key":
        first.write_bytes(second.read_bytes())
    elif kind == "a program":
        tb.save(_convert(cache=False), tmp_path / "program.trtb")
        first.write_bytes((tmp_path / "program.trtb").read_bytes())
    else:
        with zipfile.ZipFile(first) as file:
            manifest = json.loads(file.read("manifest.json"))
            parts = {name: file.read(name) for name in manifest.pop("sha256")}
        if kind == "a lacking part":
            parts.pop("weights.bin" if "weights.bin" in parts else MODEL_PART)
        manifest |= {"another format": {"format": "x"}, "a newer version": {"version": 99}}.get(kind, {})
        archive.write_archive(first, manifest, parts)
    again = _convert()
    assert _counts(again) == (1, 1)
    assert len(_report(again)["problems"]) == 1
    assert _counts(_convert()) == (2, 0)


def test_damaged_knowledge_is_removed(tmp_path: Path) -> None:
    file = LearnedFile(tmp_path, "k")
    for content in (b"", b"{", b"[]", b'{"key":"k","sha256":"0","learned":{"calls":{"a":"b"}}}', b"\xff\xfe"):
        file.path.write_bytes(content)
        report = CacheReport()
        assert file.read(report) == {}
        assert len(report.problems) == 1
        assert not file.path.exists()
    file.write({"calls": {"a": "b"}}, report)
    assert file.read(report) == {"calls": {"a": "b"}}
    other = LearnedFile(tmp_path, "other")
    other.path.write_bytes(file.path.read_bytes())
    assert other.read(report) == {}


def test_knowledge_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MOST_FILES", 3)
    for index in range(6):
        file = LearnedFile(tmp_path, f"k{index}")
        file.write({"calls": {"a": "b"}}, CacheReport())
        os.utime(file.path, (index, index))
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["k3", "k4", "k5"]


# Room


SPEC = TensorSpec.make("x", ir.DataType.FLOAT, (2,), {})


class Fake(OnnxRuntimeBackend):
    """Builds engines of a given size at once, and counts."""

    def __init__(self, size: int = 1000) -> None:
        super().__init__()
        self.size = size
        self.builds = 0
        self.pause: Callable[[], object] = lambda: None

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        self.builds += 1
        self.pause()
        parts = {MODEL_PART: segment.proto.SerializeToString(), "weights.bin": bytes(self.size)}
        return Engine(self.name, parts, {}, segment.inputs, segment.outputs)


def _segment(index: int = 0) -> Segment:
    graph = f'<ir_version: 10, opset_import: ["" : 20]> s (float[2] x) => (float[2] y{index}) {{ y{index} = Neg (x) }}'
    return Segment("segment0", onnx.parser.parse_model(graph), {}, (SPEC,), (SPEC,))


def _build(cache: EngineCache, index: int, backend: Fake) -> Engine:
    return cache.build(_segment(index), backend, BuildOptions())


def test_what_was_not_used_for_longest_leaves(tmp_path: Path) -> None:
    backend = Fake(10_000)
    cache = EngineCache(tmp_path, most_bytes=40_000)
    for index in range(3):
        _build(cache, index, backend)
        for path in tmp_path.glob(f"*{SUFFIX}"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))  # as if a second had passed
    assert len(_files(tmp_path)) == 3
    os.utime(next(iter(_files(tmp_path))), None)
    _build(EngineCache(tmp_path, 40_000), 0, backend)  # used again
    assert backend.builds == 3
    _build(cache, 3, backend)
    assert sum(path.stat().st_size for path in _files(tmp_path)) <= 40_000
    assert backend.builds == 4
    fresh = EngineCache(tmp_path, 40_000)
    _build(fresh, 0, backend)
    _build(fresh, 3, backend)
    assert (fresh.report.hits, backend.builds) == (2, 4)


def test_an_engine_beyond_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, most_bytes=5000)
    small, large = Fake(100), Fake(10_000)
    _build(cache, 0, small)
    engine = _build(cache, 1, large)
    assert engine.size_bytes > 10_000
    assert len(_files(tmp_path)) == 1, "and it pushes nothing out"
    assert "larger than cache_size_bytes=5000" in cache.report.problems[0]


def test_a_full_disk_costs_the_cache_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, assert_same: Callable[..., None]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "write_atomically", full)
    monkeypatch.setattr(learned, "write_atomically", full)
    module = _convert()
    assert_same(module(X), Net()(X))
    assert _counts(module) == (0, 2)
    assert all("No space left" in problem for problem in _report(module)["problems"])
    assert len(_report(module)["problems"]) >= 2
    assert _files(folder) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_small_file_system_that_fills_up(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        cache = EngineCache(place / "engines", most_bytes=1 << 30)
        backend = Fake(50_000)
        for index in range(5):
            assert len(_build(cache, index, backend).parts["weights.bin"]) == 50_000
        kept = _files(cache.folder)
        assert 1 <= len(kept) < 5
        assert len(cache.report.problems) == 5 - len(kept)
        left = {path.name for path in cache.folder.iterdir() if path.is_file()}
        assert left == {path.name for path in kept}, "nothing unfinished is left"
        again = EngineCache(place / "engines", most_bytes=1 << 30)
        for index in range(5):
            _build(again, index, backend)
        assert again.report.hits == len(kept)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_folder_that_cannot_be_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file where the folder should be")
    cache = EngineCache(tmp_path / "engines", most_bytes=1 << 20)
    backend = Fake()
    assert _build(cache, 0, backend).size_bytes > 1000
    assert len(cache.report.problems) == 1


def test_options_are_checked() -> None:
    for options in ({"cache": 1}, {"cache_size_bytes": 0}, {"cache_size_bytes": 1.5}):
        with pytest.raises(tb.OptionError, match=next(iter(options))):
            tb.convert(Net(), (X,), backend="onnxruntime", **options)  # type: ignore[arg-type]


# Several at once


def test_threads_that_want_the_same_build_it_once(tmp_path: Path) -> None:
    backend = Fake()
    building = threading.Event()
    backend.pause = lambda: (building.set(), threading.Event().wait(0.5))
    waited: list[str] = []

    def work(first: bool) -> tuple[int, int]:
        cache = EngineCache(tmp_path, 1 << 20)
        if not first:
            assert building.wait(30)
        cache.build(_segment(), backend, BuildOptions(), lambda phase, fraction: waited.append(phase))
        return cache.report.hits, cache.report.misses

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, [True, False, False, False]))
    assert backend.builds == 1
    assert sorted(found) == [(0, 1), (1, 0), (1, 0), (1, 0)]
    assert waited.count("from the cache") == 3


WORKER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, sys.argv[1])
    from test_engine_cache import Fake, _build
    from pathlib import Path
    from trtbridge.bridge.engine_cache import EngineCache
    backend = Fake()
    backend.pause = lambda: (print("building", flush=True), time.sleep(float(sys.argv[3])))
    cache = EngineCache(Path(sys.argv[2]), 1 << 20)
    print("ready", flush=True)
    sys.stdin.readline()
    _build(cache, 0, backend)
    print("hits", cache.report.hits, flush=True)
""")


def _worker(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(folder), str(seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _say(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_build_once_and_a_killed_one_holds_nobody_up(tmp_path: Path) -> None:
    killed, first, second = _worker(tmp_path, 600), _worker(tmp_path, 1), _worker(tmp_path, 1)
    try:
        assert [_say(one) for one in (killed, first, second)] == ["ready"] * 3
        _start(killed)
        assert _say(killed) == "building"
        _start(first)
        _start(second)
        killed.send_signal(signal.SIGKILL)
        outputs = sorted(one.communicate(timeout=60)[0].split("\n")[:-1] for one in (first, second))
        assert outputs == [["building", "hits 0"], ["hits 1"]]
        assert len(_files(tmp_path)) == 1
    finally:
        for process in (killed, first, second):
            process.kill()
            process.communicate()


def test_a_file_system_without_locks_is_gone_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    cache, backend = EngineCache(tmp_path, 1 << 20), Fake()
    _build(cache, 0, backend)
    _build(EngineCache(tmp_path, 1 << 20), 0, backend)
    assert backend.builds == 1
    assert cache.report.problems == []


def test_a_lock_that_is_held_is_waited_for_as_long_as_asked(tmp_path: Path) -> None:
    asked: list[int] = []
    with locked(tmp_path / "a.lock") as held:
        assert held
        with locked(tmp_path / "a.lock", most_s=0.5, waiting=lambda: asked.append(1)) as second:
            assert not second
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / "a.lock", waiting=_interrupt):
            pass
    with locked(tmp_path / "a.lock", most_s=0.5) as third:
        assert third
    assert len(asked) <= 1


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_an_engine_that_is_removed_while_it_is_looked_up_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Fake()
    _build(EngineCache(tmp_path, 1 << 20), 0, backend)
    real = Path.exists

    def exists(path: Path) -> bool:
        found = real(path)
        if path.suffix == SUFFIX:
            path.unlink(missing_ok=True)  # by another process, right after
        return found

    monkeypatch.setattr(Path, "exists", exists)
    cache = EngineCache(tmp_path, 1 << 20)
    _build(cache, 0, backend)
    assert backend.builds == 2
    assert cache.report.problems == []


# For people


def test_list_clear_and_dir(tmp_path: Path, folder: Path) -> None:
    runner = CliRunner()
    _filled(folder)
    _files(folder)[0].write_bytes(b"damaged")
    (folder.parent / "kept.txt").write_text("not ours")
    (folder.parent / "attention.json").write_text("{}")
    listed = runner.invoke(app, ["cache", "list"])
    assert listed.exit_code == 0
    assert "Net segment" in " ".join(listed.output.split())
    assert "cannot be" in listed.output
    assert "2 engine(s)" in listed.output
    assert runner.invoke(app, ["cache", "dir"]).output.strip() == str(folder.parent)
    cleared = runner.invoke(app, ["cache", "clear"])
    assert "removed 2 engine(s)" in cleared.output
    assert _files(folder) == []
    assert not list((folder.parent / learned.FOLDER).glob("*.json"))
    assert not (folder.parent / "attention.json").exists()
    assert (folder.parent / "kept.txt").exists(), "what is not ours stays"
    empty = runner.invoke(app, ["cache", "list", "--cache-dir", str(tmp_path / "other")])
    assert empty.output.strip() == "0 engine(s), 0 bytes"


def test_segments_differ_by_identity_not_by_memory_reused(tmp_path: Path) -> None:
    """Keys are kept by the id of a segment: another segment must never get one of those."""
    cache, backend = EngineCache(tmp_path, 1 << 20), Fake()
    for index in range(20):
        segment = dataclasses.replace(_segment(index))
        cache.build(segment, backend, BuildOptions())
        del segment
    assert (cache.report.misses, cache.report.hits) == (20, 0)
    assert len(_files(tmp_path)) == 20
