"""Files that are damaged, cut short, half-written or made for another machine: what loading and saving make of them."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import atomic
from trtbridge.bridge.archive import read_archive, write_archive
from trtbridge.bridge.atomic import remove_unfinished, write_atomically, write_checked
from trtbridge.bridge.backends import get_backend, tensorrt, timing_cache, trt_build
from trtbridge.bridge.backends.base import BuildOptions, Engine
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.tensorrt import TensorRtBackend
from trtbridge.bridge.backends.trt_fit import made_for, misfit
from trtbridge.bridge.program import FORMAT, FORMAT_VERSION, Program


class Net(torch.nn.Module):
    """An engine, a plugin, another engine, and a constant that the plugin reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(self.layer(x), 1)[0].tanh()


X = torch.linspace(-1, 1, 48).reshape(2, 24)


@pytest.fixture(scope="module")
def program() -> Program:
    return tb.convert(Net(), (X,), backend="onnxruntime").program


def _facts(program: Program) -> Any:
    engines = [
        (engine.info, engine.inputs, engine.outputs, {name: bytes(part) for name, part in engine.parts.items()})
        for engine in program.engines
    ]
    return engines, program.plugin_calls, program.signature, program.aliases, program.info, program.source


def _load(path: Path) -> Program | None:
    """The program; None where the file is refused as it should be. Anything else that is raised fails the test."""
    try:
        return Program.load(path)
    except tb.ModelFileError as error:
        return None if str(path) in str(error) else pytest.fail(f"no path in {error}")


# Damage


def test_a_bit_anywhere_is_noticed_or_does_not_matter(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    program.save(path)
    whole = path.read_bytes()
    expected = _facts(program)
    assert _facts(Program.load(path)) == expected
    # Every byte of the zip's own structures at the end, and every seventh before.
    directory = whole.index(b"PK\x01\x02")
    places = [*range(0, directory, 7), *range(directory, len(whole))]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        loaded = _load(path)
        refused += loaded is None
        assert loaded is None or _facts(loaded) == expected, f"byte {place}"
    assert refused > 0.8 * len(places), "only what the zip format itself does not use may pass"


def test_every_length_but_the_whole_one_is_noticed(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    program.save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 120, len(whole))]:
        path.write_bytes(whole[:length])
        assert _load(path) is None, length


def test_runs_of_noise_are_noticed_or_do_not_matter(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    program.save(path)
    whole, expected = path.read_bytes(), _facts(program)
    generator = random.Random(0)
    for _ in range(300):
        start, size = generator.randrange(len(whole)), generator.choice([1, 2, 4, 8, 64, 1000])
        noise = generator.choice([generator.randbytes(size), bytes(size), b"\xff" * size, whole[:size]])
        path.write_bytes((whole[:start] + noise + whole[start + size :])[: len(whole)])
        loaded = _load(path)
        assert loaded is None or _facts(loaded) == expected


def test_a_manifest_that_was_changed_is_noticed(program: Program, tmp_path: Path) -> None:
    """The zip's own checksums fit; that of the manifest does not."""
    path = tmp_path / "net.trtb"
    program.save(path)
    with zipfile.ZipFile(path) as file:
        comment = file.comment
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        file.comment = comment
        for name, data in parts.items():
            file.writestr(name, data.replace(b'"source": "Net"', b'"source": "Not"'))
    with pytest.raises(tb.ModelFileError, match=r"manifest does not match its checksum"):
        Program.load(path)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no steps": (lambda m: m.pop("steps"), "cannot read.*KeyError.*steps"),
    "a step of another kind": (lambda m: m["steps"].append({"what": 1}), "cannot read"),
    "steps that are none": (lambda m: m.update(steps=5), "cannot read.*TypeError"),
    "a type that there is not": (lambda m: m["steps"][0]["inputs"][0].update(dtype="FLOAT12"), "cannot read.*FLOAT12"),
    "a part that is not there": (lambda m: m["steps"][0].update(parts={"model.onnx": "gone"}), "cannot read.*gone"),
    "a version that is none": (lambda m: m.update(version="new"), "damaged"),
    "a newer version": (lambda m: m.update(version=99), "format version 99; this trtbridge reads up to"),
    "another format": (lambda m: m.update(format="something"), "no trtbridge program"),
    "another backend": (lambda m: m.update(backend="tensorrt_next"), "'tensorrt_next', which this trtbridge does not"),
    "a signature that is none": (lambda m: m.update(signature=[]), "cannot read"),
    "a constant of another size": (lambda m: m["constants"].update(c={"part": "x", "dtype": "FLOAT"}), "cannot read"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_manifests_of_other_versions_are_refused(edit: str, program: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    program.save(path)
    manifest, parts = read_archive(path, FORMAT, FORMAT_VERSION, "program")
    del manifest["sha256"]
    change, words = EDITS[edit]
    change(manifest)
    write_archive(path, manifest, parts)
    with pytest.raises(tb.ModelFileError, match=words):
        Program.load(path)


def test_files_that_are_others(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.trtb", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("manifest.json", b" " * (64 << 20))
    (tmp_path / "text.trtb").write_text("PK, but no zip file" * 50)
    (tmp_path / "folder.trtb").mkdir()
    with zipfile.ZipFile(tmp_path / "other.trtb", "w") as file:
        file.writestr("manifest.json", "[1, 2]")
    for name in ("bomb", "text", "folder", "other"):
        assert _load(tmp_path / f"{name}.trtb") is None
    with pytest.raises(tb.ModelFileError, match="There is no file"):
        tb.load(tmp_path / "absent.trtb")


def test_files_of_before_manifests_had_a_checksum_still_load(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    program.save(path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data.replace(b'"sealed": true,', b""))
    assert _facts(Program.load(path)) == _facts(program)


# Half-written files


KILLED = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from trtbridge.bridge.atomic import write_atomically

    def write(file):
        file.write(b"new" * 100_000)
        file.flush()
        print("half", flush=True)
        time.sleep(600)

    write_atomically(Path(sys.argv[1]), write, durable=True)
""")


@pytest.fixture
def half_written(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A process that stops in the middle of writing over a file."""
    path = tmp_path / "net[1].trtb"
    path.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield path, process
    finally:
        process.kill()
        process.communicate()


def test_a_save_that_is_killed_leaves_the_old_file_and_no_litter(
    half_written: tuple[Path, subprocess.Popen[str]], program: Program
) -> None:
    path, process = half_written
    others = path.with_name("other.trtb")
    program.save(others)
    # One that is alive is left alone: by a save of the same file, and by a sweep of the folder.
    write_atomically(path, lambda file: file.write(b"between"))
    remove_unfinished(path.parent)
    assert len([*path.parent.glob(".*.tmp")]) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == b"between"
    assert len([*path.parent.glob(".*.tmp")]) == 1, "what was half-written is there"
    program.save(others)
    assert len([*path.parent.glob(".*.tmp")]) == 1, "a save of another file does not look at it"
    program.save(path)
    assert sorted(path.parent.glob(".*.tmp")) == []
    assert _facts(Program.load(path)) == _facts(program)


def test_files_that_only_look_alike_stay(tmp_path: Path) -> None:
    names = [".net.trtb-12345678.tmp.txt", "net.trtb-12345678.tmp", ".net.trtb-1234567.tmp", ".other-12345678.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write_atomically(tmp_path / "net.trtb", lambda file: file.write(b"x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "net.trtb"])


def test_without_locks_litter_goes_by_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", none)
    old, young = tmp_path / ".a-00000000.tmp", tmp_path / ".a-00000001.tmp"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    write_atomically(tmp_path / "a", lambda file: file.write(b"y"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "a"]


def test_a_writer_that_is_swept_before_it_has_its_lock_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = atomic.fcntl.flock, []

    def flock(handle: int, flags: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob(".a-*.tmp"))
            swept[0].unlink()
        real(handle, flags)

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    write_atomically(tmp_path / "a", lambda file: file.write(b"y"))
    assert len(swept) == 1
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"y")]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_save_to_a_full_disk_leaves_the_old_file(program: Program, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    size = program.size_bytes
    command = ["mount", "-t", "tmpfs", "-o", f"size={(3 * size // 2 >> 12) + 6 << 12}", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = place / "net.trtb"
        program.save(path)
        before = path.read_bytes()
        large = dataclasses.replace(program, source="x" * 4 * size)
        with pytest.raises(tb.ModelFileError, match=r"Cannot write .*No space left"):
            large.save(path)
        assert path.read_bytes() == before
        assert [one.name for one in place.iterdir()] == ["net.trtb"]
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Made for another machine


def _info(version: str, gpu: Mapping[str, str] | None = None, target: str = "any GPU it supports") -> dict[str, Any]:
    return {"version": version, "gpu": gpu, "target": target, "tf32": False, "plugins": []}


L4 = {"name": "NVIDIA L4", "capability": "8.9"}
H100 = {"name": "H100", "capability": "9.0"}


@pytest.mark.parametrize(
    ("name", "info", "words"),
    [
        ("tensorrt", _info("10.16.1.11", L4), []),
        ("tensorrt", _info("10.16.1.12", L4), []),  # what differs in the build alone is for the library to say
        ("tensorrt", _info("10.13.0.35", L4), ["was built with TensorRT 10.13.0.35, and 10.16.1.11 is installed"]),
        (
            "tensorrt",
            _info("10.16.1.11", H100),
            ["for H100", "9.0", "NVIDIA L4 (8.9)"],
        ),
        ("tensorrt", _info("9.0.0.1", {"name": "H100", "capability": "9.0"}), ["TensorRT 9.0.0.1", "for H100"]),
        ("tensorrt_rtx", _info("10.16.1.11"), []),
        ("tensorrt_rtx", _info("10.16.1.11", target="12.0"), []),  # it knows best where an engine of its runs
        ("tensorrt_rtx", _info("10.16.1.11", H100), []),
        ("tensorrt_rtx", _info("1.7.1.116"), ["was built with TensorRT-RTX 1.7.1.116"]),
        ("tensorrt", {}, []),  # an engine of before there were such facts
    ],
)
def test_what_is_known_not_to_fit_is_said_before_loading(name: str, info: dict[str, Any], words: list[str]) -> None:
    found = misfit(FLAVOURS[name], info, "10.16.1.11", (8, 9), "NVIDIA L4")
    assert bool(found) == bool(words)
    for word in words:
        assert word in found


def _pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
    patch.setattr(torch.cuda, "get_device_name", lambda index=None: "NVIDIA L4")


@pytest.mark.rtx
def test_a_saved_file_says_what_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "net.trtb"
    tb.save(tb.convert(torch.nn.Linear(4, 4), (torch.ones(2, 4),), backend="tensorrt_rtx"), path)
    manifest, parts = read_archive(path, FORMAT, FORMAT_VERSION, "program")
    del manifest["sha256"]
    assert manifest["steps"][0]["info"]["gpu"] is None
    manifest["steps"][0]["info"]["version"] = "1.2.0.1"
    write_archive(path, manifest, parts)
    loaded = tb.load(path)  # to look at it no GPU is needed, and none of this matters
    (engine,) = loaded.program.engines
    _pretend_gpu(monkeypatch)
    with pytest.raises(tb.BackendError, match=r"was built with TensorRT-RTX 1\.2\.0\.1, and .* is installed here"):
        get_backend("tensorrt_rtx").load(engine, torch.device("cuda", 0))


@pytest.mark.rtx
def test_the_librarys_own_words_follow_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = pytest.importorskip("tensorrt_rtx")

    def refuse(*_: Any) -> None:
        raise tb.BackendError("cannot load this engine.")

    monkeypatch.setattr(tensorrt, "TensorRtExecutable", refuse)
    _pretend_gpu(monkeypatch)
    engine = Engine("tensorrt_rtx", {"engine.plan": b"no engine" * 100}, _info(trt.__version__), (), ())
    with pytest.raises(tb.BackendError, match=r"cannot load this engine\. TensorRT-RTX says: MALFORMED_ENGINE\."):
        get_backend("tensorrt_rtx").load(engine, torch.device("cuda", 0))


def test_engines_tell_the_gpu_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FLAVOURS:
        assert made_for(FLAVOURS[name], BuildOptions())["gpu"] is None
        assert made_for(FLAVOURS[name], BuildOptions(compute_capabilities=((8, 9), (12, 0)))) == {
            "target": "8.9, 12.0",
            "gpu": None,
        }
    _pretend_gpu(monkeypatch)
    assert made_for(FLAVOURS["tensorrt"], BuildOptions()) == {"target": "compute capability 8.9", "gpu": L4}


# TensorRT's timing cache, against a stand-in for its library


class Timings:
    """Acts as ITimingCache: lines are entries."""

    def __init__(self, data: bytes) -> None:
        self.entries = set(data.split())

    def combine(self, other: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.entries |= other.entries
        return True

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.entries))


class Config:
    """Acts as IBuilderConfig, on a GPU whose timing caches begin with its name."""

    def __init__(self, gpu: bytes = b"L4") -> None:
        self.gpu = gpu
        self.cache: Timings | None = None

    def create_timing_cache(self, data: bytes) -> Timings | None:
        return None if data == b"unreadable" else Timings(data)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        if cache.entries and self.gpu not in cache.entries:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Timings | None:
        return self.cache


def test_timings_go_from_build_to_build_and_merge(tmp_path: Path) -> None:
    path = timing_cache.timing_file(tmp_path, "10.16.1.11", "NVIDIA L4 (24 GB)")
    assert path == tmp_path / "timing" / "10.16.1.11_NVIDIA_L4_24_GB_.bin"
    first, second = Config(), Config()
    for config in (first, second):
        timing_cache.use_timings(config, path)  # type: ignore[arg-type]
        assert config.cache is not None
        assert config.cache.entries == set()
    for config, entry in ((first, b"conv"), (second, b"matmul")):  # at the same time
        assert config.cache is not None
        config.cache.entries |= {b"L4", entry}
        assert timing_cache.keep_timings(config, path) == ""  # type: ignore[arg-type]
    third = Config()
    timing_cache.use_timings(third, path)  # type: ignore[arg-type]
    assert third.cache is not None
    assert third.cache.entries == {b"L4", b"conv", b"matmul"}


def test_timings_that_do_not_fit_or_are_damaged_are_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "timing" / "a.bin"
    write_checked(path, b"H100 conv")
    whole = path.read_bytes()
    assert timing_cache.read_timings(path) == b"H100 conv"

    def used() -> set[bytes]:
        config = Config()
        timing_cache.use_timings(config, path)  # type: ignore[arg-type]
        assert config.cache is not None
        return config.cache.entries

    assert used() == set(), "of another GPU"
    write_checked(path, b"unreadable")
    assert used() == set()
    for content in (whole[:-1], b"", whole[:40] + b"X" + whole[41:]):
        path.write_bytes(content)
        assert timing_cache.read_timings(path) == b""
    path.write_bytes(whole)
    monkeypatch.setattr(timing_cache, "MOST_BYTES", 10)
    assert timing_cache.read_timings(path) == b""


def test_timings_that_cannot_be_kept_are_a_message(tmp_path: Path) -> None:
    (tmp_path / "timing").write_text("a file where the folder should be")
    config = Config()
    config.cache = Timings(b"L4 conv")
    assert "not kept" in timing_cache.keep_timings(config, tmp_path / "timing" / "a.bin")  # type: ignore[arg-type]


def test_only_tensorrt_on_a_gpu_has_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(cache_dir=tmp_path)
    assert tensorrt._timings(FLAVOURS["tensorrt"], options) == ""
    _pretend_gpu(monkeypatch)
    assert tensorrt._timings(FLAVOURS["tensorrt_rtx"], options) == ""
    version = type("Module", (), {"__version__": "10.16.1.11"})
    monkeypatch.setattr(type(FLAVOURS["tensorrt"]), "module", lambda self: version)
    assert tensorrt._timings(FLAVOURS["tensorrt"], options) == str(tmp_path / "timing" / "10.16.1.11_NVIDIA_L4.bin")
    assert TensorRtBackend("tensorrt").flavour.jit is False


def test_a_build_with_timings_uses_and_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "timing" / "a.bin"
    write_checked(path, b"L4 conv")
    config = Config()

    class Builder:
        def build_serialized_network(self, network: object, config: Config) -> bytes:
            assert config.cache is not None
            assert config.cache.entries == {b"L4", b"conv"}
            config.cache.entries |= {b"gemm"}
            return b"engine"

    job = trt_build.Job("tensorrt", False, [], [], False, None, None, [], True, timings=str(path))
    outcome = trt_build.Outcome()
    assert trt_build._build(Builder(), None, config, job, outcome) == b"engine"  # type: ignore[arg-type]
    assert timing_cache.read_timings(path) == b"L4 conv gemm"
    assert outcome.messages == []
