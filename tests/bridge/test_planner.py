"""What torch.onnx, ONNX Runtime, the parser or the builder refuse becomes a plugin, that call and no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops.map import map as torch_map

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import trace
from trtbridge.bridge.options import Options


def _module(function: Callable[..., Any]) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    return Model()


def _plugins(module: tb.EngineModule) -> list[str]:
    return [call.op for call in module.program.plugin_calls]


REFUSED_BY_RTX: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], list[str]]] = {
    "Det": (lambda x: torch.linalg.det(x * 2) + 1, (torch.randn(3, 4, 4),), ["aten::linalg_det.default"]),
    "boolean index, of unknown length": (lambda x: x[x > 0] * 2 + 1, (torch.randn(4, 6),), ["aten::index.Tensor"]),
    "TopK of more than 3840, refused by the builder": (lambda x: torch.topk(x, 5000)[0] * 2, (torch.randn(6000),),
                                                       ["aten::topk.default"]),
}  # fmt: skip


@pytest.mark.rtx
@pytest.mark.parametrize("case", REFUSED_BY_RTX)
def test_what_rtx_refuses_becomes_a_plugin(case: str, convert_both: Callable[..., Any]) -> None:
    function, args, plugins = REFUSED_BY_RTX[case]
    on_cpu, built = convert_both(_module(function), [(args, {})])
    assert _plugins(built) == plugins
    assert _plugins(on_cpu) == []
    (call,) = built.program.plugin_calls
    assert call.reason.startswith("tensorrt_rtx refuses ")
    assert call.origin.file == __file__


@pytest.mark.rtx
def test_only_the_refused_call_becomes_a_plugin(convert_both: Callable[..., Any]) -> None:
    """Two calls of one op, of which the builder takes one."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.topk(x, 5000)[0][:7] + torch.topk(x * 2, 7)[0]

    _, built = convert_both(_module(function), [((torch.randn(6000),), {})])
    assert _plugins(built) == ["aten::topk.default"]
    layers = [layer["type"] for engine in built.program.engines for layer in engine.info["layers"]]
    assert layers.count("TOPK") == 1


@pytest.mark.rtx
def test_fallback_can_be_turned_off() -> None:
    pytest.importorskip("tensorrt_rtx")
    function, args, _ = REFUSED_BY_RTX["Det"]
    with pytest.raises(tb.UnsupportedOpError, match=r"Det.*\n.*test_planner\.py"):
        tb.convert(_module(function), args, backend="tensorrt_rtx", fallback=False)


WRONG_EXPORTS: dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[str]]] = {
    "avg_pool2d ignores divisor_override": (
        _module(lambda x: F.avg_pool2d(x, 2, divisor_override=3) * 2),
        (torch.randn(1, 2, 6, 6),),
        ["aten::avg_pool2d.default"],
    ),
    "scatter_reduce drops mean": (
        _module(lambda x, i: torch.zeros(4, 6).scatter_reduce(0, i, x, "mean") * 2),
        (torch.randn(4, 6), torch.randint(0, 4, (4, 6))),
        ["aten::scatter_reduce.two"],
    ),
    "istft is no valid ONNX": (
        _module(lambda x: torch.istft(torch.stft(x, 16, window=torch.ones(16), return_complex=True), 16,
                                      window=torch.ones(16))),
        (torch.randn(2, 64),),
        ["aten::istft.default"],
    ),
    "LSTM with projections fails in ONNX Runtime": (
        torch.nn.LSTM(6, 8, proj_size=4, batch_first=True),
        (torch.randn(2, 3, 6),),
        ["aten::lstm.input"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_EXPORTS)
def test_wrong_exports_are_caught(case: str, assert_same: Callable[..., None]) -> None:
    model, args, plugins = WRONG_EXPORTS[case]
    fast = tb.convert(model, args, backend="onnxruntime")
    assert _plugins(fast) == plugins
    assert "ONNX translation" in fast.program.plugin_calls[0].reason
    assert_same(fast(*args), model(*args))
    with torch.no_grad():
        changed = tuple(t + 0.25 if t.is_floating_point() else t for t in args)
        assert_same(fast(*changed), model(*changed), rtol=1e-3, atol=1e-4)


def test_the_order_of_equal_values_blames_no_call(caplog: pytest.LogCaptureFixture) -> None:
    """Which of equal values a top-k takes is free, and so is all that is read by its indices."""
    table = torch.randn(1, 64, 3)

    def function(x: torch.Tensor) -> torch.Tensor:
        indices = torch.topk(x, 5).indices
        return table.gather(1, (indices * 1).unsqueeze(-1).repeat(1, 1, 3)) * 2

    x = torch.ones(1, 64)
    assert torch.topk(x, 5).indices.tolist() != [[0, 1, 2, 3, 4]], "ONNX Runtime takes the first ones"
    fast = tb.convert(_module(function), (x,), backend="onnxruntime")
    assert not fast.program.plugin_calls
    assert "no single call is to blame" in caplog.text
    x = torch.randn(1, 64)
    torch.testing.assert_close(fast(x), function(x))


def test_results_in_float32_of_a_half_model_are_not_held_to_float32(caplog: pytest.LogCaptureFixture) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(12)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers(x).float()
            return (y - y.mean(0)) * 2  # what is left of the numbers has lost digits

    model, x = Model().half().eval(), torch.randn(8, 64).half()
    fast = tb.convert(model, (x,), backend="onnxruntime")
    assert not fast.program.plugin_calls
    assert "exported graph gives other numbers" not in caplog.text
    exact = fast(x).double()
    with torch.no_grad():
        error = (exact - model(x).double()).norm() / exact.norm()
    assert 1e-3 < float(error) < 3e-2, "more than float32 is held to, or the test says nothing"


def test_truth_checks_leave_the_program() -> None:
    """torch 2.11 cannot trace them again, and no engine makes them; what they check goes with them."""

    def function(x: torch.Tensor) -> torch.Tensor:
        torch._check((x > -100).all().item())
        count = (x > 0).sum().item()
        torch._check(count >= 0)
        torch._check(count <= 24)
        return torch.arange(count, device=x.device) * 2

    traced = trace(_module(function), (torch.randn(4, 6),), {})
    targets = [str(node.target) for node in traced.program.graph.nodes]
    assert targets.count("aten.item.default") == 1
    assert "aten._assert_scalar.default" in targets, "those about the number stay"
    fast = tb.convert(_module(function), (torch.randn(4, 6),), backend="onnxruntime")
    x = torch.randn(4, 6)
    assert torch.equal(fast(x), function(x))


def test_an_unchecked_export_is_as_wrong_as_torchs() -> None:
    """The check is what finds it: without, the number is torch.onnx's own."""
    model, args, _ = WRONG_EXPORTS["avg_pool2d ignores divisor_override"]
    fast = tb.convert(model, args, backend="onnxruntime", check_export=False)
    assert _plugins(fast) == []
    assert (fast(*args) - model(*args)).abs().max() > 0.1


def test_a_check_changes_neither_the_module_nor_the_random_state() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x.mul_(2)
            return x + self.calls

    model, x = Counting(), torch.randn(3)
    before, state = x.clone(), torch.get_rng_state()
    tb.convert(model, (x,), backend="onnxruntime")
    assert torch.equal(x, before)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_check_works_where_torchs_flags_are_frozen() -> None:
    """As torch.testing._internal freezes them for a whole process."""
    code = (
        "import torch, trtbridge as tb\n"
        "torch.backends.disable_global_flags()\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x): return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)\n"
        "fast = tb.convert(M(), (torch.randn(1, 2, 6, 6),), backend='onnxruntime')\n"
        "print([call.op for call in fast.program.plugin_calls])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['aten::avg_pool2d.default']"


def test_random_ops_draw_from_torchs_generator() -> None:
    model = _module(lambda x: (torch.rand_like(x) + torch.randn(x.shape[0], 3), torch.randperm(5), torch.bernoulli(x)))
    x = torch.rand(4, 3)
    fast = tb.convert(model, (x,), dynamic_shapes={"args": ({0: tb.Dim("n", max=9)},)}, backend="onnxruntime")
    x = torch.rand(7, 3)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    for mine, wanted in zip(fast(x), expected, strict=True):
        assert torch.equal(mine, wanted)
    assert not torch.equal(fast(x)[0], expected[0])


@pytest.mark.parametrize(
    ("function", "plugin"),
    [
        (lambda x: torch.cond(x.sum() > 0, lambda y: torch.cummax(y, 0)[0], lambda y: y - 1, (x,)) * 2, True),
        (lambda x: torch.cond(x.sum() > 0, lambda y: y * 3, lambda y: y - 1, (x,)) * 2, False),
        (lambda x: torch_map(lambda row: row.sin() + 1, x) * 2, True),
    ],
    ids=["cond over an unknown op", "cond", "map"],
)
def test_higher_order_ops(function: Callable[..., Any], plugin: bool, tmp_path: Any) -> None:
    model = _module(function)
    x = torch.randn(4, 3)
    fast = tb.convert(model, (x,), backend="onnxruntime")
    assert _plugins(fast) == (["trtbridge::run_program.default"] if plugin else [])
    tb.save(fast, tmp_path / "model.trtb")
    loaded = tb.load(tmp_path / "model.trtb")
    for sign in (1, -1):
        y = x.abs() * sign
        torch.testing.assert_close(fast(y), model(y))
        torch.testing.assert_close(loaded(y), model(y))


def test_functions_that_cannot_be_traced_become_one_call() -> None:
    model = _module(lambda x: {"cov": torch.cov(x), "same": torch.equal(x, x), "pairs": torch.combinations(x[0]) * 2})
    x = torch.randn(4, 3)
    fast = tb.convert(model, (x,), backend="onnxruntime")
    assert _plugins(fast) == ["python::torch.cov", "python::torch.equal", "python::torch.combinations"]
    y = torch.randn(4, 3)
    result, expected = fast(y), model(y)
    torch.testing.assert_close(result["cov"], expected["cov"])
    torch.testing.assert_close(result["pairs"], expected["pairs"])
    assert result["same"] is True


def test_python_control_flow_is_still_an_error() -> None:
    with pytest.raises(tb.ExportError, match="values of a tensor"):
        tb.convert(_module(lambda x: x + 1 if x.sum() > 0 else x), (torch.randn(3),), backend="onnxruntime")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.fft.fft(x),
        lambda x: torch.view_as_real(torch.fft.ifft(torch.polar(x.abs(), x))),
        lambda x: torch.complex(x, x).sgn().conj(),
        lambda x: (torch.linalg.eigvals(x @ x.T).abs().sort().values, torch.fft.rfft2(x).real),
    ],
    ids=["fft", "polar", "sgn of a conjugate", "eigvals"],
)
def test_complex_tensors(function: Callable[..., Any], assert_same: Callable[..., None]) -> None:
    x = torch.randn(4, 6)
    fast = tb.convert(_module(function), (x,), backend="onnxruntime")
    y = torch.randn(4, 6)
    assert_same(fast(y), function(y), rtol=1e-3, atol=1e-4)


def test_complex_arguments(assert_same: Callable[..., None]) -> None:
    model = _module(lambda z: (z * 2, torch.fft.ifft(z).abs()))
    z = torch.randn(3, 4, dtype=torch.complex64)
    fast = tb.convert(model, (z,), dynamic_shapes={"args": ({0: tb.Dim("n", max=8)},)}, backend="onnxruntime")
    z = torch.randn(5, 4, dtype=torch.complex64)
    assert_same(fast(z), model(z))
    with pytest.raises(tb.InputError, match=r"Input args\[0\].*torch.float32"):
        fast(torch.randn(5, 4, dtype=torch.complex128))


NODES = """
<ir_version: 10, opset_import: ["" : 20]>
files (float[N, 3, 3] x) => (float[N] y, int64[2, K] z)
{
    a = Relu(x)
    b = Det(a)
    y = Sqrt(b)
    c = ReduceMax<keepdims: int = 0>(x, axes)
    zero = Constant<value_float: float = 0.0>()
    d = Greater(c, zero)
    z = NonZero(d)
}
"""


@pytest.mark.rtx
def test_nodes_of_a_file_become_plugins(tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = onnx.parser.parse_model(
        NODES.replace("axes", "")
        .replace("(x, )", "(x, ax)")
        .replace("    a = Relu(x)", "    ax = Constant<value_ints: ints = [2]>()\n    a = Relu(x)")
    )
    onnx.save(model, tmp_path / "m.onnx")
    fast = tb.convert(
        tmp_path / "m.onnx",
        dynamic_shapes={"x": {0: tb.Dim("N", min=1, max=8)}},
        backend="tensorrt_rtx",
        plugin_host="segments",
    )
    assert _plugins(fast) == ["trtbridge::onnx_node.default"] * 2
    assert "tensorrt_rtx refuses Det" in str(fast.inspect())
    on_cpu = tb.convert(
        tmp_path / "m.onnx", dynamic_shapes={"x": {0: tb.Dim("N", min=1, max=8)}}, backend="onnxruntime"
    )
    x = torch.eye(3).expand(5, 3, 3) * torch.arange(5.0)[:, None, None]
    result = on_cpu(x)
    y, z = result["y"], result["z"]
    torch.testing.assert_close(y, torch.arange(5.0) ** 1.5)
    assert torch.equal(z, (x.amax(2) > 0).nonzero().T)


@pytest.mark.rtx
def test_a_parser_that_takes_everything_is_asked_once() -> None:
    pytest.importorskip("tensorrt_rtx")
    planner = make_planner(
        _module(lambda x: x.relu()), (torch.randn(2, 3),), None, None, get_backend("tensorrt_rtx"), Options.make({})
    )
    planner.build()
    assert planner.calls == {}
    assert planner.nodes == {}
    assert "check" not in planner.stages.seconds  # one segment: building asks the parser anyway


@pytest.mark.rtx
def test_nothing_is_exported_twice_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One translation of the model as it is, one with the refused call as a plugin."""
    pytest.importorskip("tensorrt_rtx")
    function, args, _ = REFUSED_BY_RTX["Det"]
    planner = make_planner(_module(function), args, None, None, get_backend("tensorrt_rtx"), Options.make({}))
    exports: list[dict[str, str]] = []
    real = type(planner.source).to_onnx  # type: ignore[union-attr]

    def counted(self: Any, plugins: dict[str, str]) -> Any:
        exports.append(dict(plugins))
        return real(self, plugins)

    monkeypatch.setattr(type(planner.source), "to_onnx", counted)
    planner.build()
    assert [list(plugins) for plugins in exports] == [[], ["linalg_det"]]


def test_loading_names_all_plugin_ops_that_are_missing(tmp_path: Any) -> None:
    """Another process, which has not imported what registers them."""
    library = torch.library.Library("trtbridge_tests_planner", "FRAGMENT")
    for name in ("one", "two"):
        library.define(f"{name}(Tensor x) -> Tensor")
        torch.library.impl(library, name, "CompositeExplicitAutograd")(lambda x: x + 1)
        torch.library.register_fake(f"trtbridge_tests_planner::{name}", torch.empty_like, lib=library)
    ops = torch.ops.trtbridge_tests_planner
    x = torch.randn(3)
    fast = tb.convert(_module(lambda x: ops.two(ops.one(x) * 2)), (x,), backend="onnxruntime")
    torch.testing.assert_close(fast(x), (x + 1) * 2 + 1)
    tb.save(fast, tmp_path / "model.trtb")
    code = (
        f"import trtbridge as tb\ntry: tb.load({str(tmp_path / 'model.trtb')!r})\nexcept tb.PluginError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trtbridge_tests_planner::one.default, trtbridge_tests_planner::two.default" in done.stdout
    assert "Import the Python modules" in done.stdout


def test_calls_alike_become_plugins_together() -> None:
    """Attention of rank 3, which torch.onnx does not translate: named one at a time, each would cost an export."""

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x * 2, x)
        return x

    planner = make_planner(
        _module(function), (torch.randn(2, 4, 8),), None, None, get_backend("onnxruntime"), Options.make({})
    )
    program = planner.build()
    assert len(planner.calls) == 3
    assert all("torch.onnx fails on it" in reason for reason in planner.calls.values())
    assert not program.plugin_calls, "there is a rule that writes them in other ops"


def test_an_op_that_the_exporter_fails_over_without_naming_it() -> None:
    model = _module(lambda x: torch.view_as_real(2j - x))
    fast = tb.convert(model, (torch.tensor([1, 2]),), backend="onnxruntime")
    assert _plugins(fast) == ["aten::rsub.Scalar"]
    torch.testing.assert_close(fast(torch.tensor([3, 4])), torch.tensor([[-3.0, 2.0], [-4.0, 2.0]]))


def test_random_tensors_may_be_written_to() -> None:
    """As the flows of VITS do: what is made from random numbers alone is changed in place."""

    def function(x: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(torch.randn(4, 3))
        made[x > 0] = x[x > 0] * 2
        return made

    x = torch.randn(4, 3)
    fast = tb.convert(_module(function), (x,), backend="onnxruntime")
    for sign in (1, -1):
        torch.testing.assert_close(fast(x * sign), function(x * sign))


@pytest.mark.rtx
def test_writes_to_a_tensor_whose_size_depends_on_data(convert_both: Callable[..., Any]) -> None:
    """Idefics2's positions: torch 2.11 fails over a copy of such a size, as the plugin's result is written with."""

    def function(x: torch.Tensor) -> torch.Tensor:
        rows = x[(x > 0).any(-1)]
        made = torch.full((rows.shape[0], 4), 0.5)
        made[rows > 0] = rows[rows > 0]
        return made + 1

    calls = [((torch.randn(5, 4),), {}), ((-torch.rand(5, 4) + torch.eye(5, 4) * 2,), {})]
    _, built = convert_both(_module(function), calls, max_data_size=64)
    assert _plugins(built) == ["aten::index.Tensor", "aten::index.Tensor", "aten::index_put.default"]


def test_views_that_are_written_to_are_no_plugins() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        kept = x * 2
        read = kept[:2] + 1
        kept[1:] = 0
        return kept[:1] + read[:1]

    traced = trace(_module(function), (torch.randn(4, 3),))
    slices = [node.name for node in traced.program.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    problems = traced.plugin_problems(slices)
    assert "is a view" in problems[slices[0]], "what it views is written to later, and what it returns could be"
    assert "is a view" in problems[slices[1]], "it is written to"
    assert problems.keys() == set(slices[:2]), "nothing is written any more"


def test_a_plugin_that_gives_other_numbers_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It is run by torch, so there is nothing to make a plugin of; silence would hide that the numbers differ."""
    library = torch.library.Library("trtbridge_tests_planner", "FRAGMENT")
    library.define("counted(Tensor x) -> Tensor")
    calls: list[int] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x + len(calls)

    torch.library.impl(library, "counted", "CompositeExplicitAutograd")(counted)
    torch.library.register_fake("trtbridge_tests_planner::counted", torch.empty_like, lib=library)
    op = torch.ops.trtbridge_tests_planner.counted
    fast = tb.convert(_module(lambda x: op(x) * 2), (torch.ones(3),), backend="onnxruntime")
    assert _plugins(fast) == ["trtbridge_tests_planner::counted.default"]
    assert "no single call is to blame" in caplog.text
