"""Bad input: each raises a TrtBridgeError that names the thing and says what to do, and changes nothing."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.backends import get_backend, trt_build
from trtbridge.bridge.backends import tensorrt as tensorrt_backend
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.options import Options
from trtbridge.passes.numbers import run

BATCH = tb.Dim("batch", min=1, opt=2, max=4)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + y


@pytest.fixture(scope="module")
def fast() -> tb.EngineModule:
    args = (torch.randn(2, 8), torch.randn(2, 4))
    return tb.convert(Model(), args, dynamic_shapes={"x": {0: BATCH}, "y": {0: BATCH}}, backend="onnxruntime")


X, Y = torch.ones(2, 8), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X.double(), Y), {}, ["Input x", "expected torch.float32", "got torch.float64", ".to(torch.float32)"]),
        ((X.bool(), Y), {}, ["Input x", "torch.bool"]),
        ((X[0], Y), {}, ["Input x", "expected rank 2", "(8,)"]),
        ((X[None], Y), {}, ["Input x", "expected rank 2", "(1, 2, 8)"]),
        ((torch.ones(5, 8), torch.ones(5, 4)), {}, ["Input x", "batch from 1 to 4", "got 5", "wider tb.Dim"]),
        ((torch.ones(0, 8), torch.ones(0, 4)), {}, ["Input x", "batch from 1 to 4", "got 0"]),
        ((torch.ones(2, 9), Y), {}, ["Input x", "expected size 8 in dimension 1", "(2, 9)", "static"]),
        ((X, torch.ones(3, 4)), {}, ["Input y", "batch is 3", "2 in x"]),
        ((X, Y.double()[:, :3]), {}, ["Input y", "torch.float32"]),
        ((X.to("meta"), Y), {}, ["Input x", "expected it on cpu", "got meta", '.to("cpu")']),
        ((X,), {}, ["x, y", "missing y"]),
        ((X, Y, Y), {}, ["2 argument(s) (x, y)", "got 3"]),
        ((X, Y), {"z": Y}, ["x, y", "unexpected z"]),
        ((X,), {"x": X}, ["'x' is given twice"]),
        (([1.0] * 8, Y), {}, ["Input x", "expected a tensor", "got list"]),
        ((X, 3.0), {}, ["Input y", "expected a tensor", "got float"]),
    ],
)
def test_calls(fast: tb.EngineModule, args: Any, kwargs: Any, words: list[str]) -> None:
    with pytest.raises(tb.InputError) as caught:
        fast(*args, **kwargs)
    for word in words:
        assert word in str(caught.value)
    fast(X, y=Y)  # the next call works


def test_every_bad_input_is_named_at_once(fast: tb.EngineModule) -> None:
    with pytest.raises(tb.InputError, match=r"(?s)Input x: expected torch.float32.*Input y: expected rank 2"):
        fast(X.half(), Y[0])


@pytest.fixture
def unchanged() -> Iterator[Callable[[torch.nn.Module], torch.nn.Module]]:
    """Watches modules: afterwards their weights, dtypes, devices, hooks and training flags are as before."""
    watched: list[tuple[torch.nn.Module, Any]] = []

    def state(module: torch.nn.Module) -> Any:
        parts = [(type(m), m.training, dict(m._forward_hooks), sorted(m.__dict__)) for m in module.modules()]
        tensors = {n: (t.clone(), t.dtype, t.device) for n, t in module.state_dict().items()}
        return parts, tensors

    def watch(module: torch.nn.Module) -> torch.nn.Module:
        module.register_forward_hook(lambda *_: None)
        module.train()
        next(iter(module.children()), module).eval()
        watched.append((module, state(module)))
        return module

    yield watch
    assert watched
    for module, (parts, tensors) in watched:
        now_parts, now_tensors = state(module)
        assert now_parts == parts
        assert now_tensors.keys() == tensors.keys()
        for name, (value, dtype, device) in now_tensors.items():
            assert (dtype, device) == tensors[name][1:]
            assert torch.equal(value, tensors[name][0])


def test_conversion_leaves_the_module_as_found(unchanged: Callable[..., Any]) -> None:
    tb.convert(unchanged(Model()), (X, Y), backend="onnxruntime")


def test_module_that_fails_to_run(unchanged: Callable[..., Any]) -> None:
    with pytest.raises(tb.ExportError, match=r"(?s)cannot trace Model: .*test_bad_input.py\", line \d+") as caught:
        tb.convert(unchanged(Model()), (torch.ones(2, 7), Y), backend="onnxruntime")
    assert "self.norm(self.linear(x))" in str(caught.value)


def test_unsupported_control_flow(unchanged: Callable[..., Any]) -> None:
    class Branch(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x  # a trace must not leave this behind either
            if x.sum() > 0:
                return self.linear(x)
            return x

    model = unchanged(Branch())
    with pytest.raises(tb.ExportError, match="control flow") as caught:
        tb.convert(model, (X,), backend="onnxruntime")
    for word in ("Branch", "if x.sum() > 0:", "torch.where"):
        assert word in str(caught.value)


def test_result_that_hides_its_tensors() -> None:
    class Cache:
        def __init__(self, key: torch.Tensor) -> None:
            self.key = key

    class Caching(Model):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"y": self.linear(x), "cache": Cache(x * 2)}

    with pytest.raises(tb.ExportError, match=r"returns a Cache \(output\['cache'\]\).*register_pytree_node"):
        tb.convert(Caching(), (X,), backend="onnxruntime")


def test_a_size_that_the_module_fixes(unchanged: Callable[..., Any]) -> None:
    class Fixed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).reshape(2, 4)

    with pytest.raises(tb.DynamicShapeError, match=r"(?s)Fixed.*batch.*leave that dimension static"):
        tb.convert(unchanged(Fixed()), (X,), dynamic_shapes={"x": {0: BATCH}}, backend="onnxruntime")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"w": {0: BATCH}}, ["'w'", "'x', 'y'"]),
        ({"x": {2: BATCH}}, ["x", "2", "rank 2"]),
        ({"x": (BATCH,)}, ["x", "1 entries", "rank 2"]),
        ({"x": {0: tb.Dim("batch", min=3, max=4)}}, ["size 2", "dimension 0 of x"]),
        ({"x": {0: BATCH}, "y": {0: tb.Dim("batch", max=9)}}, ["'batch'", "two ranges"]),
        ({"x": {0: torch.export.Dim.AUTO}}, ["dimension 0 of x", "tb.Dim("]),
        ({"x": {0: torch.export.Dim("free")}}, ["free", "no max"]),
        ({"x": {0: 3}}, ["fixes dimension 0 of x at 3", "has 2"]),
        (({0: BATCH},), ["1 entries", "x", "y"]),
        ("batch", ["dict by argument name"]),
    ],
)
def test_dynamic_shapes(shapes: Any, words: list[str]) -> None:
    with pytest.raises(tb.DynamicShapeError) as caught:
        tb.convert(Model(), (X, Y), dynamic_shapes=shapes, backend="onnxruntime")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("make", [lambda: tb.Dim("a b", max=3), lambda: tb.Dim("n", min=0, max=3), lambda: tb.Dim("n")])
def test_dims(make: Callable[[], tb.Dim]) -> None:
    with pytest.raises(tb.DynamicShapeError, match="Dim"):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opsett": 20}, ["'opsett'", "Did you mean 'opset'?"]),
        ({"opset": 9}, ["opset=9", "18 to 25"]),
        ({"tf32": "yes"}, ["tf32='yes'", "True or False"]),
        ({"workspace_bytes": -1}, ["workspace_bytes=-1"]),
        ({"optimization_level": 6}, ["optimization_level=6", "0 to 5"]),
        ({"compute_capabilities": (8.9,)}, ["compute_capabilities", "(8, 9)"]),
        ({"timeout_s": 5.0, "isolate": False}, ["timeout_s", "isolate=False"]),
        ({"passes": ["fold"]}, ["passes", "DEFAULT"]),
        ({"backend": "onnxruntime", "optimization_level": 3}, ["optimization_level", "for TensorRT", "Leave it out"]),
        ({"backend": "onnxruntime", "compute_capabilities": ((8, 9),)}, ["compute_capabilities", "for TensorRT"]),
        ({"backend": "onnxruntime", "timeout_s": 9.0}, ["timeout_s", "for TensorRT"]),
        ({"backend": "tensorflow"}, ["'tensorflow'", "'onnxruntime'"]),
    ],
)
def test_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(tb.OptionError) as caught:
        tb.convert(Model(), (X, Y), **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.rtx
def test_unknown_compute_capability_is_found_before_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("trtbridge.bridge.convert.trace", lambda *_, **__: pytest.fail("exported first"))
    with pytest.raises(tb.OptionError, match=r"cannot build for 5.0; it knows 7.5"):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx", compute_capabilities=((5, 0),))


def test_wrong_arguments_for_forward() -> None:
    with pytest.raises(tb.InputError, match=r"Model.forward.*missing.*'y'"):
        tb.convert(Model(), (X,), backend="onnxruntime")
    with pytest.raises(tb.InputError, match="tuple"):
        tb.convert(Model(), X, backend="onnxruntime")  # type: ignore[arg-type]
    with pytest.raises(tb.ExportError, match="got function"):
        tb.convert(lambda x: x, (X,), backend="onnxruntime")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a model" * 9])
def test_corrupt_onnx_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    graph = "g (float[2,64] x) => (float[2,64] y) { c = Constant <value: tensor = float {1.0}> () y = Add(x, c) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {graph}')
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(model.SerializeToString()))
    with pytest.raises(tb.ModelFileError, match=r"model.onnx.*(damaged|not a valid)"):
        tb.convert(path, backend="onnxruntime")
    with pytest.raises(tb.ModelFileError, match=r"no file .*absent.onnx"):
        tb.convert(tmp_path / "absent.onnx", backend="onnxruntime")


def test_unwritable_cache_folder(tmp_path: Path, unchanged: Callable[..., Any]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(tb.CacheError, match=r"cache folder .*file/below cannot be written.*cache_dir="):
        tb.convert(unchanged(Model()), (X, Y), backend="onnxruntime", cache_dir=blocked / "below")


def test_backend_that_is_not_installed(unchanged: Callable[..., Any]) -> None:
    if FLAVOURS["tensorrt"].is_installed:
        pytest.skip("TensorRT is installed here")
    with pytest.raises(tb.BackendError, match=r"'tensorrt' is not installed.*pip install 'trtbridge\[tensorrt\]'"):
        tb.convert(unchanged(Model()), (X, Y), backend="tensorrt")


def test_tensorrt_without_a_gpu_points_to_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        __version__ = "10.16.1"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(type(FLAVOURS["tensorrt"]), "module", lambda self: Installed)
    with pytest.raises(tb.BackendError, match=r"TensorRT needs a GPU to build.*TensorRT-RTX does not"):
        tb.convert(Model(), (X, Y), backend="tensorrt")


@pytest.mark.rtx
def test_all_refused_nodes_are_named_with_their_lines() -> None:
    pytest.importorskip("tensorrt_rtx")

    class Refused(torch.nn.Module):
        def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bits = torch.bitwise_and(i, 3)
            return bits, torch.nn.functional.fold(x, (4, 4), (2, 2))

    args = (torch.ones(1, 12, 9), torch.arange(3))
    with pytest.raises(tb.UnsupportedOpError) as caught:
        tb.convert(Refused(), args, backend="tensorrt_rtx", fallback=False)
    text = str(caught.value)
    for word in (
        "2 nodes",
        "BitwiseAnd",
        "Col2Im",
        "torch.bitwise_and(i, 3)",
        "functional.fold(x",
        __file__,
        "(1, 12, 9) float",
    ):
        assert word in text
    assert text.count("\n  1. ") == text.count("\n  2. ") == 1
    explanation = tb.explain(Refused(), args, backend="tensorrt_rtx", fallback=False)
    assert not explanation.converts
    assert "Col2Im" in str(explanation)


@pytest.mark.rtx
def test_refusals_behind_the_first_are_found_too() -> None:
    """The parser stops at a NonZero that it cannot import; the ones behind it are still named."""
    pytest.importorskip("tensorrt_rtx")

    class Refused(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = torch.nonzero(x)
            return found.float().tanh(), torch.nonzero(found)

    (refusals,) = tb.explain(Refused(), (torch.ones(3, 3),), backend="tensorrt_rtx", fallback=False).refusals.values()
    assert [refusal.op_type for refusal in refusals] == ["NonZero", "NonZero"]
    assert [refusal.origin.code for refusal in refusals] == [
        "found = torch.nonzero(x)",
        "return found.float().tanh(), torch.nonzero(found)",
    ]


@pytest.mark.rtx
def test_builder_that_dies_ends_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child process is killed as a crash of the library would kill it."""
    pytest.importorskip("tensorrt_rtx")
    real = tensorrt_backend.subprocess.Popen

    def dying(command: list[str], **kwargs: Any) -> Any:
        code = f"import os, signal; os.kill(os.getpid(), signal.{signal.SIGSEGV.name})"
        return real([command[0], "-c", code], **kwargs)

    monkeypatch.setattr(tensorrt_backend.subprocess, "Popen", dying)
    with pytest.raises(tb.BuildError, match=r"took its process down: it was killed by SIGSEGV .*segment0"):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx")


@pytest.mark.rtx
def test_attention_that_crashes_the_builder(tmp_path: Path) -> None:
    """A real crash: opset 23's Attention with one tensor as query, key and value takes the builder's process down.

    Seen in 1.7.1, where the node is written in the ops of its definition; 1.6.1 builds the node itself.
    """
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    crashes = tensorrt_rtx.__version__.startswith("1.7.")
    graph = "g (float16[1,2,16,64] x) => (float16[1,2,16,64] y) { y = Attention(x, x, x) }"
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> {graph}')
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    if crashes:
        with pytest.raises(tb.BuildError, match=r"(?s)took its process down.*same tensor as query, key or value"):
            tb.convert(path, backend="tensorrt_rtx", fallback=False)

    planner = make_planner(path, (), None, None, get_backend("tensorrt_rtx"), Options.make({}))
    program = planner.build()
    assert (len(program.engines), program.plugin_calls) == (1, ())
    assert [site.op for site in planner.rewrites.sites] == ["Attention"] * crashes
    assert all("refuses Attention" in reason for reason in planner.rewrites.sites.values())
    (segment,) = planner.plan().segments
    assert not segment.hosted
    ops = {node.op_type for node in segment.proto.graph.node}
    assert ("Attention" in ops, "Softmax" in ops) == (not crashes, crashes)

    # What the engine was built from, in ONNX Runtime, against the formula.
    x = np.random.default_rng(0).standard_normal((1, 2, 16, 64)).astype(np.float16)
    wide = x.astype(np.float64)
    weights = np.exp(wide @ wide.swapaxes(-1, -2) / 8)
    expected = weights / weights.sum(-1, keepdims=True) @ wide
    (found,) = run(segment.proto, segment.weights, {"x": x}).values()
    np.testing.assert_allclose(found, expected, atol=4e-3)


@pytest.mark.rtx
def test_builder_that_refuses_names_the_lines() -> None:
    """Opset 23 writes attention as one node, for which there is no kernel in float32."""
    pytest.importorskip("tensorrt_rtx")

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, k + 1)

    args = (torch.ones(1, 2, 16, 64), torch.ones(1, 2, 16, 64))
    with pytest.raises(tb.BuildError, match=r"(?s)cannot build segment0.*Attention .*is from .*scaled_dot_product"):
        tb.convert(Attend(), args, backend="tensorrt_rtx", opset=23, fallback=False)
    # With fallback the node is written in the ops of its definition, which the builder takes.
    program = tb.convert(Attend(), args, backend="tensorrt_rtx", opset=23).program
    assert (len(program.engines), program.plugin_calls) == (1, ())
    assert tb.convert(Attend(), args, backend="tensorrt_rtx").program.engines


@pytest.mark.rtx
def test_build_that_takes_too_long() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(tb.BuildError, match=r"longer than timeout_s=0.01"):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx", timeout_s=0.01)


def test_builder_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt_backend, "_scratch_folder", lambda size: str(tmp_path))
    tb.convert(Model(), (X, Y), backend="tensorrt_rtx")
    with pytest.raises(tb.BuildError):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx", timeout_s=0.01)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("trtbridge-")] == []


def test_scratch_folder_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")

    def full(*_: Any) -> Any:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tensorrt_backend, "_write_weights", full)
    with pytest.raises(tb.BuildError, match=r"No space left.*\$TMPDIR"):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx")


def test_device_that_is_not_there() -> None:
    with pytest.raises(tb.BackendError, match=r"runs on CUDA devices only, not on cpu"):
        tb.convert(Model(), (X, Y), backend="tensorrt_rtx", device="cpu")


def test_plugin_that_fails_at_run_time() -> None:
    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return failing_op(x * 2)

    fast = tb.convert(Failing(), (X,), backend="onnxruntime")
    with pytest.raises(tb.ExecutionError, match=r"(?s)_tests::failing.*ValueError: on purpose.*failing_op\(x \* 2\)"):
        fast(X)


@torch.library.custom_op("trtbridge_tests::failing", mutates_args=())
def failing_op(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("on purpose")


@failing_op.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_messages_of_the_child_are_lines_of_json() -> None:
    """What the parent reads is defined by `Outcome`; a field that one side lacks would break every build."""
    outcome = trt_build.Outcome(error="x", version="1")
    assert trt_build.Outcome(**copy.deepcopy(vars(outcome))) == outcome
