"""A torch op as a TensorRT plugin: its shapes as expressions, and its run on raw addresses. No TensorRT is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import CeilToInt, FloorDiv, Mod

from trtbridge.errors import ExecutionError, PluginError
from trtbridge.nodes import DOMAIN
from trtbridge.plugins.calls import encode
from trtbridge.plugins.derive_host import TensorType, derive
from trtbridge.plugins.host_spec import HostSpec, build_size, evaluate_size, input_sizes
from trtbridge.plugins.run_hosted import HostedOp
from trtbridge.plugins.size_text import InexpressibleError, fit, from_sympy
from trtbridge.plugins.tensorrt_v3 import NAMESPACE, PluginHost, _guarded, describe_failure

CPU = torch.device("cpu")
RANGES = {"batch": (1, 4, 16), "seq": (2, 6, 128), "width": (8, 20, 200)}


class Input:
    """Stands for the i-th input in a call."""

    def __init__(self, index: int) -> None:
        self.index = index


X, Y = Input(0), Input(1)


def make_call(*args: Any, **kwargs: Any) -> str:
    return encode(args, kwargs, lambda value: {"tensor": value.index} if isinstance(value, Input) else None)


def tensor(*shape: int | str | None, dtype: torch.dtype = torch.float32, cast: torch.dtype | None = None) -> TensorType:
    ranges = tuple((s, s, s) if isinstance(s, int) else RANGES.get(s or "") for s in shape)
    return TensorType(dtype, shape, ranges, cast)


def output(dtype: torch.dtype = torch.float32) -> TensorType:
    return TensorType(dtype, (), ())


CASES: dict[str, tuple[str, str, list[TensorType], list[TensorType | None], list[tuple[Any, ...]]]] = {
    "same shape": (
        "aten::cummax.default", make_call(X, 1), [tensor("batch", "seq")], [output(), output(torch.int64)],
        [("d0_0", "d0_1"), ("d0_0", "d0_1")],
    ),
    "unread output": (
        "aten::cummax.default", make_call(X, 1), [tensor("batch", "seq")], [None, output(torch.int64)],
        [("d0_0", "d0_1")],
    ),
    "all fixed": ("aten::histc.default", make_call(X, 10), [tensor(3, 4)], [output()], [(10,)]),
    "0-d": ("aten::linalg_det.default", make_call(X), [tensor(3, 3)], [output()], [()]),
    "pooling": (
        "aten::avg_pool2d.default", make_call(X, [3, 3], [2, 2], [1, 1]), [tensor("batch", 3, "seq", "width")],
        [output()], [("d0_0", 3, "(1 + ((-1 + d0_2)//2))", "(1 + ((-1 + d0_3)//2))")],
    ),
    "derived dim": (
        "aten::cat.default", make_call([X, Y], 1), [tensor("batch", "seq"), tensor("batch", "2*seq")], [output()],
        [("d0_0", "(3*d0_1)")],
    ),
    "a kernel without symbols": (
        "aten::fft_rfft.default", make_call(X), [tensor("batch", "seq")], [output()],
        [("d0_0", "((d0_1 + 2)//2)", 2)],
    ),
    "minimum": (
        "aten::linalg_qr.default", make_call(X), [tensor("batch", "seq", 4)], [output(), output()],
        [("d0_0", "d0_1", "Min(4, d0_1)"), ("d0_0", "Min(4, d0_1)", 4)],
    ),
    "no input": ("aten::arange.default", make_call(5), [], [output(torch.int64)], [(5,)]),
    "broadcast from a size of one": (
        "aten::hypot.default", make_call(X, Y), [tensor("batch", "seq"), tensor("seq")], [output()],
        [("d0_0", "d0_1")],
    ),
    "data": ("aten::nonzero.default", make_call(X), [tensor("batch", "seq")], [output(torch.int64)], [("size0", 2)]),
    "unknown before": (
        "aten::cumsum.default", make_call(X, 0), [tensor(None, 4)], [output()], [("d0_0", 4)],
    ),
}  # fmt: skip


def _is_same(mine: Any, wanted: Any) -> bool:
    """Whether two sizes are: versions of torch write them in other words."""
    if mine == wanted or not (
        isinstance(mine, str) and isinstance(wanted, str) and "d0_1" in mine and "d0_1" in wanted
    ):
        return bool(mine == wanted)
    return all(evaluate_size(mine, {"d0_1": size}) == evaluate_size(wanted, {"d0_1": size}) for size in range(1, 40))


@pytest.mark.parametrize("name", CASES)
def test_shapes_come_from_the_fake_kernel(name: str) -> None:
    op, call, inputs, outputs, expected = CASES[name]
    spec = derive(op, call, inputs, outputs)
    assert len(spec.outputs) == len(expected)
    for one, shape in zip(spec.outputs, expected, strict=True):
        assert len(one.shape) == len(shape)
        assert all(map(_is_same, one.shape, shape)), (one.shape, shape)
    assert HostSpec.from_json(spec.to_json()) == spec


def test_shapes_hold_over_the_ranges() -> None:
    """For sizes that were not sampled, against the op itself."""
    spec = derive(
        "aten::stft.default",
        make_call(X, 16, return_complex=True, onesided=True),
        [tensor("batch", "width")],
        [output()],
    )
    for shape in [(1, 16), (3, 57), (16, 130), (2, 199)]:
        real = torch.view_as_real(
            torch.stft(torch.zeros(shape), 16, window=torch.ones(16), center=False, return_complex=True)
        )
        assert tuple(evaluate_size(s, input_sizes([shape])) for s in spec.outputs[0].shape) == tuple(real.shape)


def test_sizes_from_data_are_size_tensors_of_their_own() -> None:
    """TensorRT refuses arithmetic on size tensors, so ``n`` and ``n + 1`` are two."""

    @torch.library.custom_op("trtbridge_host_tests::positive", mutates_args=())
    def positive(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = x[x > 0]
        return found, torch.cat([found, found[:0].new_zeros(1)]), found.clone()

    @positive.register_fake
    def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(n), x.new_empty(n + 1), x.new_empty(n)

    op = "trtbridge_host_tests::positive.default"
    bounded = [TensorType(torch.float32, (None,), ((0, 9, most),)) for most in (48, 49, 48)]
    spec = derive(op, make_call(X), [tensor("batch", 3)], bounded)
    assert [one.shape for one in spec.outputs] == [("size0",), ("size1",), ("size0",)]
    assert [(size.most, size.output, size.axis) for size in spec.sizes] == [("48", 0, 0), ("49", 1, 0)]
    assert spec.waits
    with pytest.raises(PluginError, match=r"no upper bound of it is known: give one \(max_data_size"):
        derive(op, make_call(X), [tensor("batch", 3)], [output()] * 3)


def test_bounds_are_taken_from_where_they_are_known() -> None:
    inputs, call = [tensor("batch", "seq")], make_call(X)
    known = TensorType(torch.int64, (None, 2), ((0, 5, 100), (2, 2, 2)))
    assert derive("aten::nonzero.default", call, inputs, [known]).sizes[0].most == "100"
    unknown = TensorType(torch.int64, (None, 2), (None, (2, 2, 2)))
    most = derive("aten::nonzero.default", call, inputs, [unknown]).sizes[0].most
    assert evaluate_size(most, {"d0_0": 5, "d0_1": 7}) == 35


@pytest.mark.parametrize(
    ("op", "call", "inputs", "outputs", "words"),
    [
        ("aten::cummax.default", make_call(X, 0), [tensor(3, dtype=torch.int8)], [output()], "input 0 is torch.int8"),
        ("aten::cummax.default", make_call(X, 0), [tensor(3)], [output(torch.uint8)], "output 0 is torch.uint8"),
        ("aten::cumsum.default", make_call(X, 0), [tensor(*[1] * 9)], [output()], "9 axes"),
        ("aten::unsqueeze.default", make_call(X, 0), [tensor(*[1] * 8)], [output()], "9 axes"),
        ("aten::no_such_op.default", make_call(X), [tensor(3)], [output()], "not registered"),
        ("aten::cummax.default", make_call(X, 0), [tensor(3)], [output()] * 3, "returns 2 tensors"),
        ("aten::mm.default", make_call(X, X), [tensor(3, 4)], [output()], "fake kernel fails on these shapes"),
        ("aten::arange.default", '{"args":[{"int":0}],"kwargs":{}}', [tensor(dtype=torch.int64)],
         [TensorType(torch.int64, (None,), (None,))], "no upper bound"),
        ("aten::im2col.default", make_call(X, [2, 2], [1, 1], [0, 0], [1, 1]), [tensor(1, 1, "seq", "width")],
         [output()], "no expression"),
    ],
)  # fmt: skip
def test_what_cannot_be_hosted_says_why(
    op: str, call: str, inputs: list[TensorType], outputs: list[TensorType | None], words: str
) -> None:
    with pytest.raises(PluginError, match=words):
        derive(op, call, inputs, outputs)


def test_an_op_without_a_fake_kernel_says_so() -> None:
    library = torch.library.Library("trtbridge_host_tests_bare", "DEF")
    library.define("bare(Tensor x) -> Tensor")
    library.impl("bare", torch.clone, "CPU")
    with pytest.raises(PluginError, match="fake kernel"):
        derive("trtbridge_host_tests_bare::bare.default", make_call(X), [tensor(3)], [output()])


def test_a_rank_that_depends_on_sizes_is_refused() -> None:
    with pytest.raises(PluginError, match="rank of result 0 is 1 or 2"):
        derive("aten::squeeze.dim", make_call(X, 0), [tensor("batch", 3)], [output()])


def test_numbers_read_from_tensors_are_noted() -> None:
    call = '{"args":[{"tensor":0},[{"int":1}],[0]],"kwargs":{}}'
    spec = derive("aten::roll.default", call, [tensor("batch", 3), tensor(dtype=torch.int64)], [output()])
    assert spec.waits
    assert spec.outputs[0].shape == ("d0_0", 3)


def test_sympy_as_text() -> None:
    a, b = sympy.symbols("a b", integer=True, positive=True)
    names = {a: "d0_0", b: "d1_2"}
    for expression, value in [
        (sympy.Integer(7), 7),
        (a * b - 3, 51),
        (a**2, 36),
        (FloorDiv(a * b, 4), 13),
        (Mod(b, a), 3),
        (a / 2 + b, 12),
        (CeilToInt(sympy.Float(1.5) * b), 14),
        (sympy.floor(sympy.Float(0.75) * a), 4),
        (sympy.Max(a, b, 2), 9),
    ]:
        assert evaluate_size(from_sympy(expression, names), {"d0_0": 6, "d1_2": 9}) == value, expression
    for refused in (sympy.sqrt(a), sympy.Float(0.123456789) * a, sympy.Symbol("other") + a):
        with pytest.raises(InexpressibleError):
            from_sympy(refused, names)


def test_fit() -> None:
    samples = [{"d0_0": size, "d0_1": 3} for size in (2, 5, 6, 9, 40)]

    def check(rule: Callable[[int], int]) -> None:
        size = fit([rule(sample["d0_0"]) for sample in samples], samples)
        for value in range(2, 41):
            assert evaluate_size(size, {"d0_0": value, "d0_1": 3}) == rule(value)

    check(lambda n: n)
    check(lambda n: 2 * n + 3)
    check(lambda n: n // 2 + 1)
    check(lambda n: 4)
    check(lambda n: min(n, 6))
    check(lambda n: max(n, 6))
    with pytest.raises(InexpressibleError):
        fit([n["d0_0"] ** 2 for n in samples], samples)


def test_only_sizes_are_expressions() -> None:
    for text in ("__import__('os')", "d0_0.real", "d9_9", "d0_0 / 2", "d0_0 +"):
        with pytest.raises(PluginError):
            evaluate_size(text, {"d0_0": 1})

    # As TensorRT builds them: one operation at a time.
    class Recorder:
        def constant(self, value: int) -> str:
            return str(value)

        def apply(self, operation: str, left: str, right: str) -> str:
            return f"{operation}({left},{right})"

    assert build_size("Max(d0_0*2, 3, CeilDiv(d0_0, 4))", {"d0_0": "d"}, Recorder()) == (
        "MAX(MAX(PROD(d,2),3),CEIL_DIV(d,4))"
    )


def run(
    op: str, call: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], spec: HostSpec
) -> list[int]:
    """Run a node on addresses; returns the size tensors."""
    sizes = torch.full((max(1, len(spec.sizes)),), -1, dtype=torch.int32)
    addresses = [t.data_ptr() for t in outputs] + [sizes[i : i + 1].data_ptr() for i in range(len(spec.sizes))]
    HostedOp(op, call, spec).run([tuple(t.shape) for t in inputs], [t.data_ptr() for t in inputs], addresses, CPU)
    return sizes[: len(spec.sizes)].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_run_on_addresses(dtype: torch.dtype) -> None:
    x = torch.randint(-9, 9, (3, 5)).to(dtype)
    spec = derive(
        "aten::cummax.default", make_call(X, 1), [tensor("batch", 5, dtype=dtype)], [output(dtype), output(torch.int64)]
    )
    values, indices = torch.empty_like(x), torch.empty(3, 5, dtype=torch.int64)
    run("aten::cummax.default", make_call(X, 1), [x], [values, indices], spec)
    expected = torch.cummax(x, 1)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_run_casts_to_types_that_tensorrt_lacks() -> None:
    x = torch.tensor([1e-9, 1.0, 2.0])
    op, call = "aten::logsumexp.default", make_call(X, [0])
    spec = derive(op, call, [tensor(3, cast=torch.float64)], [output()])
    assert spec.inputs[0].cast == "float64"
    result = torch.empty(())
    run(op, call, [x], [result], spec)
    assert result == torch.logsumexp(x.double(), 0).float()


def test_run_of_bools_views_and_empty_tensors() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    spec = derive("aten::t.default", make_call(X), [tensor("batch", 2, dtype=torch.bool)], [output(torch.bool)])
    result = torch.empty(2, 2, dtype=torch.bool)
    run("aten::t.default", make_call(X), [mask], [result], spec)
    assert torch.equal(result, mask.t()), "a view is copied in the order of its axes"
    empty = torch.empty(0, 2, dtype=torch.bool)
    run("aten::t.default", make_call(X), [empty], [torch.empty(2, 0, dtype=torch.bool)], spec)


def test_run_writes_size_tensors_and_packs_what_has_that_size() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    op, call = "aten::nonzero.default", make_call(X)
    spec = derive(op, call, [tensor("batch", 3)], [output(torch.int64)])
    room = torch.full((6, 2), -7, dtype=torch.int64)
    assert run(op, call, [x], [room], spec) == [3]
    assert torch.equal(room[:3], x.nonzero())
    assert (room[3:] == -7).all()


def test_run_refuses_to_write_beyond_its_room() -> None:
    op, call = "aten::nonzero.default", make_call(X)
    bounded = TensorType(torch.int64, (None, 1), ((0, 1, 2), (1, 1, 1)))
    spec = derive(op, call, [tensor("seq")], [bounded], place='"model.py", line 7')
    room = torch.full((2, 1), -7, dtype=torch.int64)
    with pytest.raises(ExecutionError, match=r'size of 3, and the engine has room for 2(.|\n)*"model.py", line 7'):
        run(op, call, [torch.ones(3)], [room], spec)
    assert (room == -7).all()


def test_a_wrong_fake_kernel_is_found_before_anything_is_written() -> None:
    @torch.library.custom_op("trtbridge_host_tests::liar", mutates_args=())
    def liar(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x])

    liar.register_fake(torch.empty_like)
    op = "trtbridge_host_tests::liar.default"
    spec = derive(op, make_call(X), [tensor("batch")], [output()])
    with pytest.raises(PluginError, match=r"returned shape \(6,\) where its fake kernel says \(3,\)"):
        run(op, make_call(X), [torch.ones(3)], [torch.empty(3)], spec)


def test_a_failing_op_names_itself_its_inputs_and_its_place() -> None:
    @torch.library.custom_op("trtbridge_host_tests::fails", mutates_args=())
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("on purpose")

    fails.register_fake(torch.empty_like)
    op = "trtbridge_host_tests::fails.default"
    spec = derive(op, make_call(X), [tensor("batch")], [output()], place='"model.py", line 7')
    with pytest.raises(ExecutionError, match=r"trtbridge_host_tests::fails.*\(3,\) torch.float32") as caught:
        run(op, make_call(X), [torch.ones(3)], [torch.empty(3)], spec)
    assert '"model.py", line 7' in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_grad_mode_and_autocast_do_not_reach_the_op() -> None:
    seen: list[tuple[bool, bool]] = []

    @torch.library.custom_op("trtbridge_host_tests::mode", mutates_args=())
    def mode(x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x.clone()

    mode.register_fake(torch.empty_like)
    op = "trtbridge_host_tests::mode.default"
    spec = derive(op, make_call(X), [tensor("batch")], [output()])
    with torch.enable_grad(), torch.autocast("cpu"):
        run(op, make_call(X), [torch.ones(3)], [torch.empty(3)], spec)
    assert seen == [(False, False)]


def test_views_are_made_once_for_an_address() -> None:
    x = torch.ones(4)
    spec = derive("aten::erfinv.default", make_call(X), [tensor(4)], [output()])
    hosted = HostedOp("aten::erfinv.default", make_call(X), spec)
    first = hosted.view(x.data_ptr(), (4,), torch.float32, CPU)
    assert hosted.view(x.data_ptr(), (4,), torch.float32, CPU) is first
    assert hosted.view(x.data_ptr(), (2, 2), torch.float32, CPU).shape == (2, 2)
    x[0] = 5
    assert first[0] == 5
    for offset in range(300):
        hosted.view(x.data_ptr(), (1, 1, 1, offset % 4 + 1, *[1] * (offset // 100)), torch.float32, CPU)
    assert len(hosted._views) <= 256


def test_failures_are_kept_by_thread() -> None:
    host = PluginHost()

    class Callback:
        def __init__(self) -> None:
            self.host = host

        @_guarded
        def enqueue(self, message: str) -> None:
            raise ValueError(message)

    def fail(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Callback().enqueue(message)

    fail("first")
    fail("second")
    other = threading.Thread(target=fail, args=("elsewhere",))
    other.start()
    other.join()
    failure = host.take_failure()
    assert isinstance(failure, ValueError)
    assert str(failure) == "first"
    assert "in enqueue" in describe_failure(failure)
    assert host.take_failure() is None


def test_what_the_builder_imports_knows_no_torch() -> None:
    """The process that builds engines starts fast."""
    code = (
        "import sys, trtbridge.bridge.backends.trt_build, trtbridge.plugins.tensorrt_v3, trtbridge.plugins.host_spec\n"
        "sys.exit(' '.join(name for name in ('torch', 'onnx', 'sympy') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert NAMESPACE == DOMAIN
    source = Path(sys.modules[PluginHost.__module__].__file__ or "").read_text()
    callbacks = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    # The bindings end the process, or go on without a word, where one of these is missing.
    assert callbacks >= {
        "clone", "get_capability_interface", "get_output_data_types", "get_output_shapes",
        "supports_format_combination",
        "configure_plugin", "on_shape_change", "attach_to_context", "get_fields_to_serialize", "enqueue",
        "get_valid_tactics", "set_tactic", "get_workspace_size", "create_plugin",
    }  # fmt: skip
