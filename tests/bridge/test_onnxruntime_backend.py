"""The onnxruntime backend: what it builds, what it refuses, and that what it runs is right."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor

import trtbridge as tb
from trtbridge.bridge.backends.base import BuildOptions, Engine, Segment
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeExecutable
from trtbridge.bridge.model import Origin, TensorSpec, make_stand_in
from trtbridge.errors import BackendError, BuildError, ExecutionError, ModelFileError, UnsupportedOpError

CPU = torch.device("cpu")
BACKEND = OnnxRuntimeBackend()


def specs(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    found = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        ranges = tuple((s, s, s) if isinstance(s, int) else (1, 2, 100) for s in shape)
        found.append(TensorSpec(value.name, ir.DataType(tensor.elem_type), shape, ranges))
    return tuple(found)


def segment(
    text: str, weights: Mapping[str, torch.Tensor | ir.TensorProtocol] | None = None, opset: int = 21, **fields: object
) -> Segment:
    """A segment of a textual graph; the weights become stand-ins in the main graph."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "mine" : 1]>\n{text}')
    values = {
        name: TorchTensor(w, name=name) if isinstance(w, torch.Tensor) else w for name, w in (weights or {}).items()
    }
    proto.graph.initializer.extend(make_stand_in(name, value) for name, value in values.items())
    inputs, outputs = specs(proto.graph.input), specs(proto.graph.output)
    return Segment("segment0", proto, values, inputs, outputs, **fields)  # type: ignore[arg-type]


def build(made: Segment) -> Engine:
    assert BACKEND.check(made, BuildOptions()) == []
    return BACKEND.build(made, BuildOptions())


def load(made: Segment) -> OnnxRuntimeExecutable:
    return BACKEND.load(build(made), CPU)


class TestThreads:
    """Sessions leave the cores to torch; what that gains: scripts/bench_cpu.py."""

    @pytest.mark.parametrize("beside_plugins", [False, True])
    def test_spinning(self, beside_plugins: bool) -> None:
        made = segment("g (float[4] x) => (float[4] y) { y = Relu (x) }")
        loaded = BACKEND.load(build(made), CPU, beside_plugins=beside_plugins)
        assert entry(loaded, "session.force_spinning_stop") == "1"
        assert entry(loaded, "session.intra_op.allow_spinning") == ("0" if beside_plugins else None)

    @pytest.mark.parametrize(("entries", "spins"), [((), [None]), ("aten::tanh", ["0", "0"])])
    def test_programs_with_plugins_never_spin(self, entries: Any, spins: list[str | None]) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).eval()
        module = tb.convert(model, (torch.randn(2, 3),), backend="onnxruntime", as_plugins=entries)
        assert module._running is not None
        executables = [each for each in module._running._executables if isinstance(each, OnnxRuntimeExecutable)]
        assert [entry(each, "session.intra_op.allow_spinning") for each in executables] == spins

    @pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 0)])
    def test_one_thread_where_torch_has_one(self, threads: int, expected: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            loaded = load(segment("g (float[4] x) => (float[4] y) { y = Relu (x) }"))
        finally:
            torch.set_num_threads(before)
        assert loaded.session.get_session_options().intra_op_num_threads == expected


def entry(loaded: OnnxRuntimeExecutable, name: str) -> str | None:
    """An entry of a session's options; None where it has none."""
    try:
        return str(loaded.session.get_session_options().get_session_config_entry(name))
    except RuntimeError:
        return None


def test_status() -> None:
    status = BACKEND.status()
    assert (status.name, status.version) == ("onnxruntime", onnxruntime.__version__)
    assert status.can_build
    assert status.can_run
    assert "cpu" in status.devices
    assert status.reason == ""


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    made = segment("g (float[N] x) => (float[N] y) { y = Relu (x) }")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status = BACKEND.status()
    assert not status.can_build
    assert not status.can_run
    assert "pip install onnxruntime" in status.reason
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        BACKEND.check(made, BuildOptions())


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_numbers_match_torch_with_dynamic_shapes(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator).to(dtype)
    bias = torch.randn(64, generator=generator).to(dtype)
    name = ir.tensor_adapters.from_torch_dtype(dtype).name.lower()
    made = segment(
        f"g ({name}[batch, 32] x) => ({name}[batch, 64] y) {{ h = MatMul (x, w) a = Add (h, b) y = Relu (a) }}",
        {"w": weight, "b": bias},
    )
    engine = build(made)
    assert engine.info["widened"] == (dtype in (torch.float16, torch.bfloat16))
    assert engine.info["nodes"] == 3
    run = BACKEND.load(engine, CPU)
    for batch in (1, 7, 0):
        x = torch.randn(batch, 32, generator=generator).to(dtype)
        [y] = run([x])
        expected = (x.double() @ weight.double() + bias.double()).relu()
        assert (y.dtype, y.shape) == (dtype, (batch, 64))
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_integers_booleans_scalars_and_empty_weights() -> None:
    made = segment(
        """g (int64[N] i, bool[N] m, int32 s, uint8[N] u, uint16[N] v) =>
              (int64[N] a, bool[N] b, int32 c, uint8[N] d, int64[K] e, uint16[N] f) {
            a = Where (m, i, n) b = Not (m) c = Add (s, s) d = Identity (u) k = Concat <axis = 0> (i, empty)
            e = Add (k, big) f = Identity (v)
        }""",
        {
            "n": torch.tensor(-1),
            "empty": torch.zeros(0, dtype=torch.int64),
            "big": torch.full((1,), 2**40),
        },
    )
    run = load(made)
    i, m = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    u, v = torch.tensor([0, 128, 255], dtype=torch.uint8), torch.tensor([0, 1, 65535], dtype=torch.uint16)
    a, b, c, d, e, f = run([i, m, torch.tensor(21, dtype=torch.int32), u, v])
    assert a.tolist() == [1, -1, 3]
    assert b.tolist() == [False, True, False]
    assert (c.item(), c.shape, c.dtype) == (42, (), torch.int32)
    assert torch.equal(d, u)
    assert torch.equal(e, i + 2**40)
    assert torch.equal(f, v)


def test_narrow_weights_of_four_and_eight_bits() -> None:
    codes = np.arange(-8, 7, dtype=np.int8)  # an odd count: the last byte is half used
    four = ir.Tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="q")
    eight = torch.linspace(-4, 4, 15).to(torch.float8_e4m3fn)
    made = segment(
        """g (float[15] x) => (float[15] y, float[15] z) {
            s = Constant <value_float = 0.5> ()
            a = DequantizeLinear (q, s) y = Add (x, a)
            b = DequantizeLinear (p, s) z = Add (x, b)
        }""",
        {"q": four, "p": eight},
    )
    x = torch.randn(15)
    y, z = load(made)([x])
    torch.testing.assert_close(y, x + 0.5 * torch.from_numpy(codes))
    torch.testing.assert_close(z, x + 0.5 * eight.float())


def test_types_that_numpy_lacks_at_the_boundary() -> None:
    made = segment(
        "g (float8e4m3fn[N, 3] x, float[N, 3] f) => (float[N, 3] y, float8e4m3fn[N, 3] z, bool[N, 3] b) "
        "{ y = Cast <to = 1> (x) z = Cast <to = 17> (f) b = IsNaN (f) }"
    )
    run = load(made)
    for count in (4, 0):
        x = torch.randn(count, 3)
        y, z, b = run([x.to(torch.float8_e4m3fn), x])
        assert torch.equal(y, x.to(torch.float8_e4m3fn).float())
        assert z.dtype == torch.float8_e4m3fn
        assert torch.equal(z.float(), y)
        assert torch.equal(b, x.isnan())


def test_stand_ins_inside_subgraphs() -> None:
    proto_text = """g (bool c, float[600] x) => (float[600] y) {
        y = If (c) <
            then_branch = a () => (float[600] p) { p = Add (x, w) },
            else_branch = b () => (float[600] q) { q = Mul (x, v) }
        >
    }"""
    w, v = torch.randn(600), torch.randn(600)
    made = segment(proto_text, {"w": w, "v": v})
    branches = {a.name: a.g for a in made.proto.graph.node[0].attribute}
    moved = made.proto.graph.initializer.pop()
    branches["else_branch"].initializer.append(moved)
    before = made.proto.SerializeToString()
    run = load(made)
    assert made.proto.SerializeToString() == before
    x = torch.randn(600)
    torch.testing.assert_close(run([torch.tensor(True), x])[0], x + w)
    torch.testing.assert_close(run([torch.tensor(False), x])[0], x * v)


def test_an_engine_is_a_snapshot() -> None:
    weight = torch.randn(40, 40).t()  # not contiguous
    made = segment("g (float[N, 40] x) => (float[N, 40] y) { y = MatMul (x, w) }", {"w": weight})
    engine = build(made)
    x = torch.randn(3, 40)
    expected = x @ weight
    run = BACKEND.load(engine, CPU)
    weight.zero_()
    torch.testing.assert_close(run([x])[0], expected)
    torch.testing.assert_close(BACKEND.load(engine, CPU)([x])[0], expected)
    saved = replace(engine, parts={name: bytes(part) for name, part in engine.parts.items()})
    torch.testing.assert_close(BACKEND.load(saved, CPU)([x])[0], expected)


def test_optimizers_that_rewrite_weights_under_their_name() -> None:
    """ONNX Runtime moves the transposes into w; a zero-copy `add_initializer` then yields relu(w) here."""
    weight = torch.randn(64, 64)
    made = segment(
        """g (float[64, 64] x) => (float[64, 64] y) {
            t = Transpose <perm = [1, 0]> (x) a = Add (t, w) b = Relu (a) y = Transpose <perm = [1, 0]> (b)
        }""",
        {"w": weight},
    )
    torch.testing.assert_close(load(made)([torch.zeros(64, 64)])[0], weight.t().relu())


def test_parts_are_standard_onnx() -> None:
    weights = {"w": torch.randn(5, 60), "v": torch.randn(5, 60), "u": torch.tensor(2.0)}
    made = segment("g (float[5, 60] x) => (float[5, 60] y) { a = Add (x, w) b = Mul (a, v) y = Mul (b, u) }", weights)
    engine = build(made)
    assert set(engine.parts) == {"model.onnx", "weights.bin"}
    proto = onnx.load_from_string(bytes(engine.parts["model.onnx"]))
    blob = bytes(engine.parts["weights.bin"])
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "weights.bin"
        offset, length = int(entries["offset"]), int(entries["length"])
        assert offset % 64 == 0
        values = np.frombuffer(blob[offset : offset + length], np.float32).reshape(tuple(tensor.dims))
        np.testing.assert_array_equal(values, weights[tensor.name].numpy())
    assert engine.size_bytes == len(engine.parts["model.onnx"]) + len(blob)


def test_outputs_are_fresh() -> None:
    made = segment(
        "g (float[N] x) => (float[N] x, float[N] y, float[300] w, float[N] z) { y = Identity (x) z = Relu (x) }",
        {"w": torch.ones(300)},
    )
    run = load(made)
    x = torch.ones(4)
    first = run([x])
    second = run([x])
    for tensor in first:
        tensor.zero_()
    assert torch.equal(x, torch.ones(4))
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in [*second, *run([x])])


def test_inputs_that_require_grad_or_are_not_contiguous() -> None:
    run = load(segment("g (float[A, B] x) => (float[A, B] y) { y = Neg (x) }"))
    x = torch.randn(3, 4, requires_grad=True)
    [y] = run([x.t()])
    assert not y.requires_grad
    assert torch.equal(y, -x.detach().t())


def test_all_refused_nodes_are_listed() -> None:
    origin = Origin(file="net.py", line=7, code="x = mine.strange(x)", module="block.1", op="mine.strange.default")
    made = segment(
        """g (float[N, 4] x, int16[N, 4] i) => (float[N, 4] y, int16[N, 4] j, float[N, 4] z) {
            a = Relu (x)
            [strange] b = mine.Strange <size = 3> (a)
            [int_relu] j = Relu (i)
            y = Add (a, b)
            c = Constant <value = bool {1}> ()
            z = If (c) <
                then_branch = t () => (float[N, 4] p) { [inner] p = mine.Other (x, w) },
                else_branch = e () => (float[N, 4] q) { q = Neg (b) }
            >
        }""",
        {"w": torch.randn(600)},
        provenance={"b": origin},
    )
    refusals = {refusal.node: refusal for refusal in BACKEND.check(made, BuildOptions())}
    assert set(refusals) == {"strange", "int_relu", "inner"}
    assert refusals["strange"].op_type == "mine::Strange"
    assert refusals["strange"].origin is origin
    assert refusals["strange"].inputs == ("a: (N, 4) float",)
    assert refusals["strange"].outputs == ("b",)
    assert "not a registered function/op" in refusals["strange"].reason
    assert refusals["int_relu"].inputs == ("i: (N, 4) int16",)
    assert "Could not find an implementation" in refusals["int_relu"].reason
    assert refusals["int_relu"].origin == Origin(op="Relu")
    assert refusals["inner"].inputs == ("x: (N, 4) float", "w: (600) float")
    with pytest.raises(UnsupportedOpError, match=r"does not take 3 node\(s\) of segment0") as caught:
        BACKEND.build(made, BuildOptions())
    for word in ("Strange", "Relu", "Other", "net.py", "x = mine.strange(x)", "block.1"):
        assert word in str(caught.value)


def test_refusals_in_functions_and_after_unknown_types() -> None:
    made = segment(
        """g (float[N] x) => (float[N] y) { a = mine.f (x) b = mine.Unknown (a) c = Relu (b) y = mine.Late (c) }
        <domain: "mine", opset_import: ["" : 21, "mine" : 1]>
        f (x) => (y) { h = Neg (x) y = mine.Hidden (h) }"""
    )
    refusals = BACKEND.check(made, BuildOptions())
    assert [r.op_type for r in refusals] == ["mine::Hidden", "mine::Unknown", "mine::Late"]
    assert refusals[1].inputs == ("a: of unknown type",)


def test_types_no_kernel_takes_are_refused() -> None:
    made = segment("g (float[300] x) => (complex64[300] y) { y = Identity (w) }", {"w": torch.ones(300) * 1j})
    [refusal] = BACKEND.check(made, BuildOptions())
    assert refusal.inputs == ("w: (300) complex64",)
    with pytest.raises(UnsupportedOpError, match="complex64"):
        BACKEND.build(made, BuildOptions())


def test_narrow_types_are_not_a_reason_to_refuse() -> None:
    made = segment("g (bfloat16[N] x) => (bfloat16[N] y) { h = Relu (x) y = mine.Odd (h) }")
    [refusal] = BACKEND.check(made, BuildOptions())
    assert refusal.op_type == "mine::Odd"
    assert refusal.inputs == ("h: (N) bfloat16",)


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (missing) }", 21),
        ("g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }", 99),
    ],
)
def test_graphs_that_are_wrong_as_a_whole(text: str, opset: int) -> None:
    made = segment(text, opset=opset)
    with pytest.raises(BuildError, match="does not take segment0"):
        BACKEND.check(made, BuildOptions())
    with pytest.raises(BuildError, match="does not take segment0"):
        BACKEND.build(made, BuildOptions())


def test_weights_that_do_not_fit() -> None:
    text = "g (float[300] x) => (float[300] y) { y = Add (x, w) }"
    made = segment(text, {"w": torch.ones(300)})
    with pytest.raises(BuildError, match="'w' has no values"):
        BACKEND.build(replace(made, weights={}), BuildOptions())
    other = {"w": TorchTensor(torch.ones(200), name="w")}
    with pytest.raises(BuildError, match=r"'w' is FLOAT\[200\], the graph says FLOAT\[300\]"):
        BACKEND.build(replace(made, weights=other), BuildOptions())


def test_check_reads_no_weights() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("read")

    weight = ir.LazyTensor(read, dtype=ir.DataType.FLOAT16, shape=ir.Shape([300]), name="w")
    made = segment("g (float16[300] x) => (float16[300] y) { y = Add (x, w) }", {"w": weight})
    assert BACKEND.check(made, BuildOptions()) == []


def test_progress_is_reported_and_may_stop_the_build() -> None:
    made = segment("g (float[300] x) => (float[300] y) { y = Add (x, w) }", {"w": torch.ones(300)})
    seen: list[tuple[str, float]] = []
    BACKEND.build(made, BuildOptions(), lambda phase, fraction: seen.append((phase, fraction)))
    assert [phase for phase, _ in seen] == sorted((phase for phase, _ in seen), key=["weights", "session"].index)
    assert seen[-1] == ("session", 1.0)

    def stop(phase: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BACKEND.build(made, BuildOptions(), stop)


def test_run_time_errors() -> None:
    run = load(segment("g (float[N, 4] x, int64[K] i) => (float[K, 4] y) { y = Gather <axis = 0> (x, i) }"))
    x = torch.ones(2, 4)
    with pytest.raises(ExecutionError, match=r"segment0 failed in ONNX Runtime: .*out of data bounds"):
        run([x, torch.tensor([7])])
    with pytest.raises(ExecutionError, match=r"segment0.*invalid dimensions"):
        run([torch.ones(2, 5), torch.tensor([0])])
    with pytest.raises(ExecutionError, match=r"'x' must be torch\.float32 on cpu, got torch\.float64 on cpu"):
        run([x.double(), torch.tensor([0])])
    with pytest.raises(ExecutionError, match="takes 2 inputs, got 1"):
        run([x])
    torch.testing.assert_close(run([x, torch.tensor([0])])[0], x[:1])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    unused = "g (float[N] x) => (float[N] y) <float[1] unused = {3}> { y = Relu (x) }"
    run = load(segment(unused))
    with pytest.raises(ExecutionError):
        run([torch.ones(2, 2)])
    BACKEND.check(segment("g (float[N] x) => (float[N] y) { y = mine.F (x) }"), BuildOptions())
    assert capfd.readouterr() == ("", "")


def test_eight_threads() -> None:
    weight = torch.randn(64, 64)
    run = load(segment("g (float[N, 64] x) => (float[N, 64] y) { h = MatMul (x, w) y = Tanh (h) }", {"w": weight}))
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        barrier.wait()
        good = True
        for _ in range(30):
            x = torch.randn(1 + seed, 64, generator=generator)
            good &= torch.allclose(run([x])[0], torch.tanh(x @ weight), atol=1e-4)
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_bound_runs_agree_with_plain_ones() -> None:
    """CUDA runs over bare pointers; here the same code does so on a CPU."""
    made = segment(
        "g (float16[N, 3] x, bool m, int64[0] none) => (float16[N, 3] y, bool b, int64[0] n, float s) "
        "{ h = Add (x, x) y = Where (m, h, x) b = Not (m) n = Identity (none) f = Cast <to = 1> (x) "
        "s = ReduceSum <keepdims = 0> (f) }"
    )
    run = load(made)
    bound = load(made)
    bound._numpy = False
    for count in (5, 0):
        inputs = [torch.randn(count, 3).half(), torch.tensor(True), torch.zeros(0, dtype=torch.int64)]
        for one, other in zip(run(inputs), bound(inputs), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)


def test_load_on_devices_that_cannot_run_it() -> None:
    engine = build(segment("g (float[N] x) => (float[N] y) { y = Relu (x) }"))
    with pytest.raises(BackendError, match="'cpu' and 'cuda', not on 'meta'"):
        BACKEND.load(engine, torch.device("meta"))
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match=r"onnxruntime-gpu.*runs on device 'cpu'"):
            BACKEND.load(engine, torch.device("cuda"))


def test_load_of_damaged_engines() -> None:
    made = segment("g (float[300] x) => (float[300] y) { y = Add (x, w) }", {"w": torch.ones(300)})
    engine = build(made)
    model, weights = bytes(engine.parts["model.onnx"]), engine.parts["weights.bin"]
    with pytest.raises(BackendError, match="built by 'tensorrt'"):
        BACKEND.load(replace(engine, backend="tensorrt"), CPU)
    with pytest.raises(ModelFileError, match=r"lacks weights.bin; it has \['model.onnx'\]"):
        BACKEND.load(replace(engine, parts={"model.onnx": model}), CPU)
    with pytest.raises(ModelFileError, match="'w' needs 1200 bytes"):
        BACKEND.load(replace(engine, parts={"model.onnx": model, "weights.bin": weights[:1000]}), CPU)
    for damaged in (b"", b"\xff" * 100, model[: len(model) // 2]):
        with pytest.raises(ModelFileError, match=r"model\.onnx"):
            BACKEND.load(replace(engine, parts={"model.onnx": damaged, "weights.bin": weights}), CPU)


def test_bindings_that_torch_cannot_hold() -> None:
    engine = build(segment("g (float[N] x) => (float[N] y) { y = Relu (x) }"))
    four = replace(engine.inputs[0], dtype=ir.DataType.INT4)
    with pytest.raises(BackendError, match="'x' is int4"):
        BACKEND.load(replace(engine, inputs=(four,)), CPU)


@pytest.mark.slow
def test_more_than_two_gigabytes() -> None:
    """Weights never enter a proto, and exist at most twice: in the engine and in the session."""
    size, count = 12288, 4
    total_bytes = 4 * size * size * count
    resource = pytest.importorskip("resource")
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    if available is None or int(available[1]) * 1024 < 4 * total_bytes:
        pytest.skip(f"needs {4 * total_bytes >> 30} GiB of free memory, and /proc/meminfo")

    def read(index: int) -> ir.TensorProtocol:
        values = np.zeros((size, size), np.float32)
        np.fill_diagonal(values, index + 1)
        return ir.Tensor(values)

    shape = ir.Shape([size, size])
    weights = {
        f"w{i}": ir.LazyTensor(partial(read, i), dtype=ir.DataType.FLOAT, shape=shape, name=f"w{i}")
        for i in range(count)
    }
    steps = " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(count))
    made = segment(f"g (float[N, {size}] h0) => (float[N, {size}] h{count}) {{ {steps} }}", weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine = build(made)
    assert engine.size_bytes > 2**31
    run = BACKEND.load(engine, CPU)
    x = torch.randn(2, size)
    torch.testing.assert_close(run([x])[0], x * 24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 2.6 * total_bytes
