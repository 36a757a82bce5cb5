"""@plugin: what it registers, the fake kernels that it derives, what it refuses; the author's path in a subprocess."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import trtbridge as tb
from trtbridge.plugins import derived_fake
from trtbridge.plugins.authoring import registration
from trtbridge.plugins.derived_fake import launches_kernels, without_launches
from trtbridge.plugins.registry import stays_out_of_graphs

PluginError = tb.PluginError


@tb.plugin("authoring_tests::scaled", samples=[(torch.ones(2, 3), 2.0)])
def scaled(x: torch.Tensor, gain: float = 1.0, offsets: list[int] | None = None) -> torch.Tensor:
    """x times a gain, plus the sum of offsets. More words."""
    return x * gain + sum(offsets or [])


@tb.plugin("authoring_tests::split_rows")
def split_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.repeat(2, 1), x.sum(1).int()


@tb.plugin("authoring_tests::positive")
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@tb.plugin("authoring_tests::numpy_sine")
def numpy_sine(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.sin(x.numpy()))


@tb.plugin("authoring_tests::numpy_twice")
def numpy_twice(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([x.numpy(), x.numpy()]))


@tb.plugin("authoring_tests::numpy_list")
def numpy_list(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(x.numpy() + 1)]


@tb.plugin("authoring_tests::branches")
def branches(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1


@tb.plugin("authoring_tests::needs_even")
def needs_even(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 2:
        raise ValueError("an even number of rows, please")
    return x + 1


@tb.plugin("authoring_tests::from_address")
def from_address(x: torch.Tensor) -> torch.Tensor:
    assert x.data_ptr() != 0  # would be 0 on a fake tensor, and a kernel given it would crash
    return x + 1


@tb.plugin("authoring_tests::no_module", cpu=lambda x: x.repeat(3))
def no_module(x: torch.Tensor) -> torch.Tensor:
    import trtbridge_tests_no_such_module as kernels  # type: ignore[import-not-found]

    return kernels.launch(x)  # type: ignore[no-any-return]


def symbolic(*shape: int) -> tuple[FakeTensorMode, Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True, duck_shape=False))
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(shape))
    return mode, mode.from_tensor(torch.randn(shape), symbolic_context=context)


def test_a_function_becomes_an_op() -> None:
    x = torch.randn(2, 3)
    for call in (scaled, torch.ops.authoring_tests.scaled, torch.ops.authoring_tests.scaled.default):
        assert torch.equal(call(x, 2.0, [1, 2]), x * 2 + 3)
    schema = str(torch.ops.authoring_tests.scaled.default._schema)
    assert schema == "authoring_tests::scaled(Tensor x, float gain=1., SymInt[]? offsets=None) -> Tensor"
    assert scaled.__doc__ is not None
    assert scaled.__doc__.startswith("x times a gain")
    known = registration("authoring_tests::scaled.default")
    assert known is not None
    assert known.samples is not None
    assert registration("aten::relu.default") is None


def test_fake_kernels_come_from_the_code_itself() -> None:
    mode, x = symbolic(4, 5)
    with mode:
        rows, sums = split_rows(x)
        assert rows.shape == (2 * x.shape[0], x.shape[1])
        assert (sums.shape, sums.dtype) == ((x.shape[0],), torch.int32)
        assert scaled(x).shape == x.shape
        (count,) = positive(x).shape
        assert isinstance(count, torch.SymInt)  # depends on data
        assert not isinstance(count, int)


def test_without_data_outputs_are_like_the_first_tensor_and_real_calls_are_checked() -> None:
    mode, x = symbolic(4, 5)
    with mode:
        assert numpy_sine(x).shape == x.shape
        assert numpy_twice(x).shape == x.shape  # wrong, and found out below
        assert from_address(x).shape == x.shape
    real = torch.randn(3)
    torch.testing.assert_close(numpy_sine(real), real.sin())
    assert torch.equal(from_address(real), real + 1)
    with pytest.raises(PluginError, match=r"numpy_twice.*like its first tensor(.|\n)*output 0 is \(6,\)(.|\n)*fake="):
        numpy_twice(real)


def test_where_nothing_can_be_derived_the_error_says_what_to_write() -> None:
    mode, x = symbolic(4, 5)
    with mode:
        with pytest.raises(PluginError, match=r"numpy_list.*needs real data(.|\n)*fake=lambda"):
            numpy_list(x)
        with pytest.raises(PluginError, match=r"branches.*decides by the values(.|\n)*@branches.register_fake"):
            branches(x)
    mode, x = symbolic(3, 5)
    with mode, pytest.raises(PluginError, match=r"ValueError: an even number of rows"):
        needs_even(x)


def test_a_missing_module_of_kernels_leaves_the_cpu_implementation() -> None:
    mode, x = symbolic(4)
    with mode:
        assert no_module(x).shape == (3 * x.shape[0],)
    assert no_module(torch.ones(2)).shape == (6,)


def test_a_fake_kernel_can_be_given_and_given_later() -> None:
    @tb.plugin("authoring_tests::given", fake=lambda x: x.new_empty(x.shape[0], 7))
    def given(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.zeros((x.shape[0], 7), np.float32))

    @tb.plugin("authoring_tests::later")
    def later(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.zeros((x.shape[0], 7), np.float32))

    @later.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], 7)

    mode, x = symbolic(4, 5)
    with mode:
        assert given(x).shape == later(x).shape == (x.shape[0], 7)
    assert given(torch.ones(2, 2)).shape == later(torch.ones(2, 2)).shape == (2, 7)


def test_without_a_cpu_implementation_torch_says_so() -> None:
    @tb.plugin("authoring_tests::elsewhere", cpu=lambda x: x - 1)
    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this one is for CUDA")

    assert torch.equal(elsewhere(torch.ones(2)), torch.zeros(2))
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("authoring_tests::elsewhere", "CUDA")


def test_random_ops_are_tagged() -> None:
    @tb.plugin("authoring_tests::noise", random=True)
    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(x)

    assert torch.Tag.nondeterministic_seeded in torch.ops.authoring_tests.noise.default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.authoring_tests.noise.default.tags


def test_ops_that_no_cuda_graph_may_hold_are_tagged() -> None:
    @tb.plugin("authoring_tests::counted", cuda_graphs=False)
    def counted(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert torch.Tag.cudagraph_unsafe in torch.ops.authoring_tests.counted.default.tags
    assert stays_out_of_graphs("authoring_tests::counted.default")
    assert not stays_out_of_graphs("aten::cummax.default")
    assert not stays_out_of_graphs("python::torch.cov")


def test_the_same_function_may_come_again_another_may_not() -> None:
    def make(number: int) -> Callable[..., Any]:
        @tb.plugin("authoring_tests::again")
        def again(x: torch.Tensor) -> torch.Tensor:
            return x + number

        return again

    assert make(1)(torch.zeros(1)).item() == 1
    assert tb.plugins.find_op("authoring_tests::again.default")(torch.zeros(1)).item() == 1
    assert make(2)(torch.zeros(1)).item() == 2
    assert torch.ops.authoring_tests.again(torch.zeros(1)).item() == 2
    assert tb.plugins.find_op("authoring_tests::again.default")(torch.zeros(1)).item() == 2
    with pytest.raises(PluginError, match=r"registered already, by .*again .*test_authoring.py.*line \d+"):

        @tb.plugin("authoring_tests::again")
        def other(x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert torch.ops.authoring_tests.again(torch.zeros(1)).item() == 2


def test_ops_of_torch_library_are_not_overwritten() -> None:
    torch.library.define("authoring_tests::foreign", "(Tensor x) -> Tensor")
    with pytest.raises(PluginError, match="registered already, with torch"):
        tb.plugin("authoring_tests::foreign")(lambda x: x)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("soft_sign", "namespace::name"),
        ("my-ops::x", "letters, digits"),
        ("a::b.c", "namespace::name"),
        (3, "namespace::name"),
        ("aten::soft_sign", "PyTorch's"),
        ("prims::x", "PyTorch's"),
    ],
)
def test_bad_names(name: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        tb.plugin(name)


def unannotated(x, y):  # type: ignore[no-untyped-def]
    return x


def odd_type(x: torch.Tensor, y: bytes) -> torch.Tensor:
    return x


def no_result(x: torch.Tensor) -> str:
    return ""


@pytest.mark.parametrize("function", [unannotated, odd_type, no_result])
def test_bad_annotations(function: Any) -> None:
    with pytest.raises(PluginError, match=rf"annotations of {function.__name__}\(.*no schema(.|\n)*Annotate"):
        tb.plugin("authoring_tests::bad")(function)


def test_only_functions() -> None:
    with pytest.raises(PluginError, match="goes over a function, not over a type"):
        tb.plugin("authoring_tests::bad")(dict)


# Triton is not installed where these tests run, so its base class of kernels is played by another.


class Kernel:
    """Stands for triton.runtime.jit.KernelInterface."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            raise AssertionError("launched")

        return launch


kernel = Kernel()


def helper(x: torch.Tensor, result: torch.Tensor) -> None:
    kernel[(1,)](x, result, BLOCK=128)


def launching(x: torch.Tensor) -> torch.Tensor:
    result = x.new_empty(x.shape[0], 2)
    [helper(x, result) for _ in range(2)]
    return result


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("triton.runtime.jit")
    module.KernelInterface = Kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", module)


@pytest.mark.usefixtures("_triton")
def test_launches_are_left_out_of_derived_fakes() -> None:
    own = Kernel()

    def closing(x: torch.Tensor) -> torch.Tensor:
        own[(1,)](x)
        return x.new_empty(3)

    x = torch.ones(4, 4)
    for function, shape in ((launching, (4, 2)), (closing, (3,))):
        assert launches_kernels(function)
        assert without_launches(function)(x).shape == shape
        with pytest.raises(AssertionError, match="launched"):
            function(x)
    assert not launches_kernels(unannotated)
    assert without_launches(unannotated) is unannotated


@pytest.mark.usefixtures("_triton")
def test_an_op_of_kernels_alone_has_no_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tb.plugin("authoring_tests::launching")(launching)
    mode, x = symbolic(4, 4)
    with mode:
        assert torch.ops.authoring_tests.launching(x).shape == (x.shape[0], 2)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.authoring_tests.launching(torch.ones(2, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # then Triton runs on the CPU
    tb.plugin("authoring_tests::launching")(launching)
    with pytest.raises(AssertionError, match="launched"):
        torch.ops.authoring_tests.launching(torch.ones(2, 2))


def test_without_triton_nothing_is_searched() -> None:
    if "triton.runtime.jit" not in sys.modules:
        assert derived_fake.kernel_type() is None
        assert without_launches(launching) is launching


def test_importing_the_packages_stays_free_of_torch() -> None:
    code = "import sys, trtbridge, trtbridge.plugins; dir(trtbridge.plugins); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_of_the_package() -> None:
    for name in tb.plugins.__all__:
        assert getattr(tb.plugins, name) is not None
    assert callable(tb.plugins.check)
    assert tb.plugins.plugin is tb.plugin
    with pytest.raises(AttributeError, match="no_such"):
        getattr(tb.plugins, "no_such")  # noqa: B009


AUTHOR = """
import torch
import trtbridge as tb


@tb.plugin("author::soft_sign")
def soft_sign(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    return x / (1 + (gain * x).abs())
"""

USER = """
import sys
import torch
import trtbridge as tb
from my_ops import soft_sign


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)

    def forward(self, x):
        return soft_sign(self.layer(x), 2.0) * 3


net, x = Net().eval(), torch.randn(4, 6)
dims = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
fast = tb.convert(net, (x,), dynamic_shapes=dims, backend=sys.argv[1])
assert [call.op for call in fast.program.plugin_calls] == ["author::soft_sign.default"], fast.program.plugin_calls
for batch in (4, 1, 7):
    x = torch.randn(batch, 6)
    torch.testing.assert_close(fast(x), net(x).detach(), rtol=1e-4, atol=1e-5)
fast.save("net.trtb")
print("converted")
"""


def test_the_authors_path(tmp_path: Path) -> None:
    """A new op in at most 15 lines of a module of one's own runs in a converted model."""
    assert len([line for line in AUTHOR.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_ops.py").write_text(textwrap.dedent(AUTHOR))
    (tmp_path / "use.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "use.py", "onnxruntime"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "converted\n", done.stderr
    load = "import torch, trtbridge as tb; print(tb.load('net.trtb')(torch.ones(2, 6)).shape)"
    missing = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "PluginError" in missing.stderr
    assert "author::soft_sign" in missing.stderr
    found = subprocess.run(
        [sys.executable, "-c", f"import my_ops; {load}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.stdout == "torch.Size([2, 5])\n", found.stderr
