"""Export: names, provenance, weights and plugin nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.dtypes import from_torch
from trtbridge.bridge.export import export, trace
from trtbridge.bridge.model import EXTERNAL_LOCATION, Origin
from trtbridge.bridge.trace import quiet
from trtbridge.bridge.untranslatable import Decomposition, blamed_calls


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x)) + x


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.module = torch.nn.LayerNorm(32)  # as DataParallel calls its own; must not confuse the names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.module(x)


def test_every_tensor_has_an_origin() -> None:
    model = export(
        Net(), (torch.randn(2, 5, 32),), dynamic_shapes=({0: tb.Dim("batch", max=4), 1: tb.Dim("seq", max=9)},)
    )
    made = [(node.op_type, name) for node in model.proto.graph.node for name in node.output]
    assert len(made) > 6
    for op_type, name in made:
        origin = model.provenance[name]
        assert origin.file == __file__, (op_type, name)
        assert origin.line > 0
        assert origin.op.startswith("aten.")
    by_op = {op: model.provenance[name] for op, name in made}
    assert by_op["MatMul"].code == "return torch.nn.functional.gelu(self.linear(x)) + x"
    assert by_op["MatMul"].module == "blocks.1.linear"
    assert by_op["MatMul"].module_class == "torch.nn.modules.linear.Linear"
    assert by_op["LayerNormalization"].module == "module"
    assert model.provenance["x"] == Origin(op="input")
    assert model.provenance["blocks.0.linear.weight"].module == "blocks.0.linear.weight"


def test_weights_are_shared_and_named_as_in_the_state_dict() -> None:
    net = Net()
    model = export(net, (torch.randn(2, 5, 32),))
    assert set(model.weights) == {"blocks.0.linear.weight", "blocks.1.linear.weight"}
    state = net.state_dict()
    for name, weight in model.weights.items():
        assert weight.raw.data_ptr() == state[name].data_ptr()  # type: ignore[attr-defined]
    stand_ins = [t for t in model.proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in stand_ins for entry in t.external_data} == {EXTERNAL_LOCATION}
    assert len(model.proto.SerializeToString()) < 20_000


def test_no_weight_is_copied_by_folding() -> None:
    """The exporter's own optimizer stores a transposed copy of every linear weight that a 3-D input meets."""
    model = export(Net(), (torch.randn(2, 5, 32),))
    assert sum(weight.nbytes for weight in model.weights.values()) == 2 * 32 * 32 * 4


def test_symbolic_dims_have_the_users_names() -> None:
    class Widen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([x, x], 1), x[:, None, 1:]

    dims = {0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=4, opt=6, max=10)}
    model = export(Widen(), (torch.randn(1, 6),), dynamic_shapes={"x": dims})
    first, second = model.signature.outputs
    assert first.shape == ("batch", "2*length")
    assert first.ranges == ((1, 2, 4), (8, 12, 20))
    assert second.ranges == ((1, 2, 4), (1, 1, 1), (3, 5, 9))


def test_saved_file_runs_in_onnx_runtime(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = Net().eval(), torch.randn(2, 5, 32)
    export(net, (x,)).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], net(x).detach().numpy(), atol=1e-5)


def test_plugin_nodes_carry_the_call() -> None:
    class Plugins(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values, indices = torch.cummax(x, dim=-1)
            return torch.hypot(values, x), indices, torch.special.bessel_j0(x)

    model = export(Plugins(), (torch.randn(2, 4),))
    plugins = [node for node in model.proto.graph.node if node.domain == "trtbridge"]
    # At the level at which they were called: hypot and bessel_j0, not the prims that they decompose to.
    assert [node.op_type for node in plugins] == ["aten_cummax", "aten_hypot", "aten_special_bessel_j0"]
    calls = {a.name: a.s.decode() for a in plugins[0].attribute}
    assert calls == {"op": "aten::cummax.default", "call": '{"args":[{"tensor":0},-1],"kwargs":{},"outputs":2}'}
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.proto.graph.value_info, *model.proto.graph.output]}
    assert [types[name] for name in plugins[0].output] == [ir.DataType.FLOAT, ir.DataType.INT64]


def test_example_sizes_do_not_become_constants() -> None:
    """An example of batch 1, and one whose two dynamic sizes are equal, still export as dynamic."""

    class Outer(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x[:, None] * y[None]).sum(-1)

    shapes = {"x": {0: tb.Dim("n", max=8)}, "y": {0: tb.Dim("m", max=8)}}
    fast = tb.convert(Outer(), (torch.randn(1, 3), torch.randn(1, 3)), dynamic_shapes=shapes, backend="onnxruntime")
    x, y = torch.randn(8, 3), torch.randn(5, 3)
    torch.testing.assert_close(fast(x, y), Outer()(x, y))


def test_side_effects_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            y[:1].add_(1)
            x = x.clone().mul_(1)  # memory of its own: no side effect
            return x + y + self.calls

    model = Counting()
    fast = tb.convert(model, (torch.zeros(2), torch.zeros(2)), backend="onnxruntime")
    assert "changes its buffers calls" in caplog.text
    assert "changes its inputs y in place" in caplog.text, "through a view, and not x"
    assert model.calls == 0
    y = torch.zeros(2)
    assert fast(torch.zeros(2), y).tolist() == fast(torch.zeros(2), y).tolist() == [2.0, 1.0]
    assert y.tolist() == [0.0, 0.0]


def test_training_flag_means_eval() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(6, 4)
    fast = tb.convert(model, (x,), backend="onnxruntime")
    assert model.training
    assert model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(fast(x), model.eval()(x))


def test_decomposing_is_done_once_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is half of what a translation costs: one for what cannot be translated, one with that as plugins."""
    decompose = torch.export.ExportedProgram.run_decompositions
    done = []

    def count(self: torch.export.ExportedProgram, *args: object, **kwargs: object) -> torch.export.ExportedProgram:
        done.append(1)
        return decompose(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", count)

    class Decomposed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.softplus(x).square() + torch.addcmul(x, x, x)

    model = export(Decomposed(), (torch.randn(2, 4),))
    assert len(done) == 1
    assert not any(node.domain for node in model.proto.graph.node)

    class Untranslatable(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.hypot(torch.special.bessel_j0(x), x) + torch.hypot(x, x + 1)

    done.clear()
    model = export(Untranslatable(), (torch.randn(2, 4),))
    assert len(done) == 2
    assert sum(node.domain == "trtbridge" for node in model.proto.graph.node) == 3


def test_asking_what_can_be_a_plugin_compiles_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles a graph for each GraphModule: with a question for each call that took minutes."""
    traced = trace(Net().eval(), (torch.randn(2, 5, 32),))
    calls = [node.name for node in traced.program.graph.nodes if node.op == "call_function"]

    def refuse(self: torch.fx.GraphModule) -> None:
        raise AssertionError("a graph is compiled")

    monkeypatch.setattr(torch.fx.GraphModule, "recompile", refuse)
    assert traced.plugin_problems(calls) == {}


@pytest.mark.parametrize("shape", [(2, 3, 4, 6, 6), (3, 4, 6, 6)])
def test_a_convolution_over_three_axes_without_bias(shape: tuple[int, ...]) -> None:
    """torchlib's translation has a bias of two axes, which nothing takes."""
    net = torch.nn.Conv3d(3, 8, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1), bias=False).eval()
    x = torch.randn(shape)
    fast = tb.convert(net, (x,), backend="onnxruntime")
    assert not fast.program.plugin_calls
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


class Call(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: 1.0 - x,
        lambda x: 3 - x,
        lambda x: torch.rsub(x, 2.5, alpha=2),
        lambda x: torch.view_as_real(1.0 - torch.complex(x.float(), x.float())),
    ],
    ids=["float", "int", "alpha", "complex"],
)
def test_a_number_less_a_tensor(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2, 3], [4, 0, 1]]).to(dtype)
    net = Call(function)
    converted = tb.convert(net, (x,), backend="onnxruntime")
    assert not converted.program.plugin_calls
    result, expected = converted(x), net(x)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "mean", "logsumexp"])
def test_results_have_the_dtypes_of_torch(reduce: str, dtype: torch.dtype) -> None:
    net = Call(lambda x: getattr(torch, reduce)(x, -1))
    x = torch.tensor([[1, 2, 3], [4, 0, 1]]).to(dtype)
    model = export(net, (x,))
    assert [spec.dtype for spec in model.signature.outputs] == [from_torch(net(x).dtype)]
    assert [out.type.tensor_type.elem_type for out in model.proto.graph.output] == [from_torch(net(x).dtype)]
    onnx.checker.check_model(model.proto, full_check=True)
    result = tb.convert(net, (x,), backend="onnxruntime")(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, net(x))


def test_a_failure_is_blamed_on_the_call_that_a_node_was_made_of() -> None:
    """Nodes of the decomposed program are named anew: its first `sub` was an `rsub`; the program has a `sub`, too."""
    traced = trace(Call(lambda x: (1.0 - x) * (x - 2)), (torch.ones(2, 3),))
    names = {str(node.target): node.name for node in traced.program.graph.nodes if node.op == "call_function"}
    assert names["aten.sub.Tensor"] == "sub"
    with quiet():
        decomposed = traced.program.run_decompositions()
    made_of = {node.name: node.target for node in decomposed.graph.nodes if node.name.startswith("sub")}
    assert list(made_of) == ["sub", "sub_1"]
    error = RuntimeError("Cannot find a compatible OpOverload\n\nWhile executing %sub : call_function")
    blamed = blamed_calls(error, traced.program, 20, Decomposition(decomposed))
    assert blamed == {names["aten.rsub.Scalar"]: "torch.onnx fails on it: Cannot find a compatible OpOverload"}
    blamed = blamed_calls(error, traced.program, 20, Decomposition())
    assert list(blamed) == ["sub"], "where decomposing failed, the names are those of the program"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "function", [lambda x: x.shape[0] - x, lambda x: x.shape[0] / 2 - x], ids=["size", "half a size"]
)
def test_a_size_less_a_tensor(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 2, 3], [4, 0, 1], [5, 5, 5]]).to(dtype)
    net = Call(function)
    converted = tb.convert(net, (x,), dynamic_shapes={"x": {0: tb.Dim("b", 1, 4, 8)}}, backend="onnxruntime")
    assert not converted.program.plugin_calls
    for rows in (3, 2):
        result, expected = converted(x[:rows]), net(x[:rows])
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)
