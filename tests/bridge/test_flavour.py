"""What differs between TensorRT and TensorRT-RTX."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

from trtbridge.bridge.backends import flavour as module
from trtbridge.bridge.backends.flavour import FLAVOURS, JitCache, target_gpus, tf32_environment
from trtbridge.bridge.backends.trt_layers import _Loaded
from trtbridge.bridge.backends.trt_run import _Context
from trtbridge.errors import BackendError, OptionError

RTX = FLAVOURS["tensorrt_rtx"]
VARIABLE = "NVIDIA_TF32_OVERRIDE"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_seen_by_library", {})
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("before", [None, "1"])
def test_tf32_is_off_where_the_library_looks_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    with tf32_environment(RTX, tf32=False):
        assert os.environ[VARIABLE] == "0"
    assert os.environ.get(VARIABLE) == before
    with pytest.raises(ValueError, match="inside"), tf32_environment(RTX, tf32=False):
        raise ValueError("inside")
    assert os.environ.get(VARIABLE) == before
    with tf32_environment(FLAVOURS["tensorrt"], tf32=False):
        assert os.environ.get(VARIABLE) == before


def test_tf32_is_settled_once_a_process(caplog: pytest.LogCaptureFixture) -> None:
    with tf32_environment(RTX, tf32=True):
        assert VARIABLE not in os.environ
    with tf32_environment(RTX, tf32=False, in_this_process=False):
        assert os.environ[VARIABLE] == "0", "a child process reads its own environment"
    with pytest.raises(BackendError, match="once a process"), tf32_environment(RTX, tf32=False):
        pass
    module._seen_by_library.clear()
    with tf32_environment(RTX, tf32=False), caplog.at_level(logging.WARNING):
        pass
    with tf32_environment(RTX, tf32=True), caplog.at_level(logging.WARNING):
        assert "without TF32 was loaded" in caplog.text


@pytest.mark.rtx
def test_compute_capabilities(request: pytest.FixtureRequest) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config: Any = builder.create_builder_config()
    target_gpus(RTX, config, [(8, 9), (12, 0)], gpu_present=False)
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM120
    with pytest.raises(OptionError, match=r"cannot build for 5.0; it knows 7.5, 8.0"):
        target_gpus(RTX, config, [(5, 0)], gpu_present=False)
    with pytest.raises(OptionError, match="for TensorRT-RTX"):
        target_gpus(FLAVOURS["tensorrt"], config, [(8, 9)], gpu_present=True)


class _Told:
    """Tells that it is gone."""

    def __init__(self, name: str, gone: list[str], **parts: object) -> None:
        self._name, self._gone = name, gone
        vars(self).update(parts)

    def __del__(self) -> None:
        self._gone.append(self._name)


@pytest.mark.rtx
def test_what_makes_a_thing_outlives_it() -> None:
    """The bindings keep an engine for its contexts, but not for a runtime config, and no cache for anything."""
    pytest.importorskip("tensorrt_rtx")
    gone: list[str] = []

    def create_runtime_config() -> _Told:
        return _Told("config", gone, create_runtime_cache=lambda: _Told("cache", gone), set_runtime_cache=id)

    jit = JitCache(RTX, _Told("engine", gone, create_runtime_config=create_runtime_config), None)  # type: ignore[arg-type]
    del jit
    assert gone == ["cache", "config", "engine"]


@pytest.mark.parametrize(("kind", "name"), [(_Context, "_context"), (_Loaded, "context")])
def test_contexts_go_ahead_of_what_they_were_made_with(kind: type, name: str) -> None:
    gone: list[str] = []
    owner = object.__new__(kind)
    vars(owner).update({"_jit": _Told("jit", gone), "_watch": _Told("watch", gone), name: _Told("context", gone)})
    del owner
    assert gone == ["context", "jit", "watch"]


@pytest.mark.parametrize("kind", [_Context, _Loaded, JitCache])
def test_what_was_never_made_goes_quietly(kind: type) -> None:
    half = object.__new__(kind)
    del half  # an error in __del__ is a warning, which is an error here
