"""Errors planted in graphs: localize names the node and the Python line of each, and finds none in right graphs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.model import OnnxModel, origin_of


class Cnn(nn.Module):
    """x: (N, 3, 16, 16) float32 to (N, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.group = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.full((16,), 1.5))
        nn.init.uniform_(self.norm.running_var, 0.1, 0.5)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = nn.functional.leaky_relu(self.norm(x), 0.1)
        x = x + 0.5 * self.group(x)
        x = self.pool(self.down(x))
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = torch.cat([x.amax(dim=(2, 3)), x.mean(dim=(2, 3))], 1)
        x = self.fc(x) * self.scale
        return torch.softmax(x, -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        scores = q @ k.transpose(-1, -2)
        scores = scores * 0.354
        scores = torch.where(mask[:, None, None, :], scores, -1e9)
        mixed = torch.softmax(scores, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = nn.functional.gelu(self.up(self.norm2(x)))
        return x + self.down(hidden)


class Transformer(nn.Module):
    """ids: (N, T) int64, mask: (N, T) bool to (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList([Block(16, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.head.weight[0, 0] = 7e4  # beyond float16

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places.weight[1 : ids.shape[1] + 1]
        for block in self.blocks:
            x = block(x, mask)
        first = self.norm(x)[:, 0]
        return self.head(torch.tanh(first))


class Lstm(nn.Module):
    """x: (N, T, 6) float32 to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.cumsum(1)
        y, _ = self.lstm(x)
        last = y[:, -1]
        return torch.sigmoid(self.head(torch.relu(self.fc(last))))


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "cnn": (Cnn, lambda: (torch.randn(2, 3, 16, 16),)),
    "transformer": (
        Transformer,
        lambda: (torch.randint(0, 50, (2, 7)), torch.arange(7)[None] < torch.tensor([[7], [5]])),
    ),
    "lstm": (Lstm, lambda: (torch.randn(2, 9, 6),)),
}


@dataclasses.dataclass
class Made:
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    graph: OnnxModel


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    found = {}
    for name, (kind, inputs) in MODELS.items():
        torch.manual_seed(1)
        module = kind().eval()
        example = inputs()
        found[name] = Made(module, example, tb.export(module, example))
    return found


pytestmark = pytest.mark.usefixtures("export_once")


# Tools of mutations


class Graph:
    """A copy of an exported graph, to be spoiled."""

    def __init__(self, model: OnnxModel) -> None:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        self.model = dataclasses.replace(model, proto=proto, weights=dict(model.weights))

    def node(self, op_type: str, module: str | None = None, index: int = 0) -> onnx.NodeProto:
        nodes = [node for node in self.model.proto.graph.node if node.op_type == op_type]
        nodes = [node for node in nodes if module is None or origin_of(node).module == module]
        assert len(nodes) > index, (op_type, module, [n.op_type for n in self.model.proto.graph.node])
        return nodes[index]

    def set(self, node: onnx.NodeProto, **attributes: Any) -> onnx.NodeProto:
        kept = [a for a in node.attribute if a.name not in attributes]
        made = [onnx.helper.make_attribute(name, value) for name, value in attributes.items()]
        kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
        del node.attribute[:]
        node.attribute.extend([*kept, *made])
        return node

    def change(self, node: onnx.NodeProto, position: int, change: Callable[[np.ndarray], np.ndarray]) -> onnx.NodeProto:
        """Other values for a constant that a node reads, which no other node then has."""
        name = node.input[position]
        graph = self.model.proto.graph
        if name in self.model.weights:
            array = change(self.model.weights[name].numpy().copy())
        else:
            tensor = next((t for t in graph.initializer if t.name == name), None)
            if tensor is None:
                maker = next(n for n in graph.node if name in n.output)
                assert maker.op_type == "Constant", maker.op_type
                tensor = maker.attribute[0].t
            array = change(onnx.numpy_helper.to_array(tensor).copy())
        changed = f"{name}_changed"
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), changed)
        )
        node.input[position] = changed
        return node


def op(op_type: str, to: str, module: str | None = None) -> Callable[[Graph], onnx.NodeProto]:
    """Another op in place of one."""

    def mutate(graph: Graph) -> onnx.NodeProto:
        node = graph.node(op_type, module)
        node.op_type = to
        return node

    return mutate


def attribute(op_type: str, module: str | None = None, **values: Any) -> Callable[[Graph], onnx.NodeProto]:
    return lambda graph: graph.set(graph.node(op_type, module), **values)


def constant(
    op_type: str, position: int, change: Callable[[np.ndarray], np.ndarray], module: str | None = None
) -> Callable[[Graph], onnx.NodeProto]:
    return lambda graph: graph.change(graph.node(op_type, module), position, change)


def swapped(op_type: str, first: int, second: int, module: str | None = None) -> Callable[[Graph], onnx.NodeProto]:
    def mutate(graph: Graph) -> onnx.NodeProto:
        node = graph.node(op_type, module)
        node.input[first], node.input[second] = node.input[second], node.input[first]
        return node

    return mutate


def _overflowing(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def _one_larger(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] += 1.0
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    assert array.shape[0] == array.shape[1]
    return array.T


# (model, mutation, text of the Python line that localize must name)
MUTATIONS: Mapping[str, tuple[str, Callable[[Graph], onnx.NodeProto], str]] = {
    "padding on the wrong side": ("cnn", attribute("Conv", "stem", pads=[0, 0, 2, 2]), "x = self.stem(x)"),
    "a changed weight": ("cnn", constant("Conv", 1, _one_larger, "down"), "x = self.pool(self.down(x))"),
    "dropped bias of a convolution": ("cnn", constant("Conv", 2, np.zeros_like, "stem"), "x = self.stem(x)"),
    "epsilon of a batch norm": (
        "cnn",
        attribute("BatchNormalization", "norm", epsilon=1e-2),
        "x = nn.functional.leaky_relu(self.norm(x), 0.1)",
    ),
    "slope of a leaky relu": ("cnn", attribute("LeakyRelu", alpha=0.01), "leaky_relu(self.norm(x), 0.1)"),
    "average instead of maximum": ("cnn", op("MaxPool", "AveragePool"), "x = self.pool(self.down(x))"),
    "order of concatenated parts": ("cnn", swapped("Concat", 0, 1), "x = torch.cat("),
    "mean instead of maximum": ("cnn", op("ReduceMax", "ReduceMean"), "x = torch.cat("),
    "axis of a softmax": ("cnn", attribute("Softmax", axis=0), "return torch.softmax(x, -1)"),
    "coordinates of a resize": (
        "cnn",
        attribute("Resize", coordinate_transformation_mode="asymmetric"),
        "nn.functional.interpolate(",
    ),
    "a transposed square weight": ("cnn", constant("Gemm", 1, _transposed, "fc"), "x = self.fc(x) * self.scale"),
    "epsilon of one layer norm": (
        "transformer",
        attribute("LayerNormalization", "blocks.1.norm1", epsilon=1e-3),
        "y = self.norm1(x)",
    ),
    "a transposed attention weight": (
        "transformer",
        constant("MatMul", 1, _transposed, "blocks.0.out"),
        "x = x + self.out(mixed.transpose(1, 2).flatten(2))",
    ),
    "scale of attention": (
        "transformer",
        constant("Mul", 1, lambda a: a * 2, "blocks.1"),
        "scores = scores * 0.354",
    ),
    "a swapped mask": ("transformer", swapped("Where", 1, 2, "blocks.0"), "scores = torch.where("),
    "axis of attention's softmax": (
        "transformer",
        attribute("Softmax", "blocks.0", axis=-2),
        "mixed = torch.softmax(scores, -1) @ v",
    ),
    "approximation of gelu": (
        "transformer",
        attribute("Gelu", "blocks.1", approximate="tanh"),
        "hidden = nn.functional.gelu(",
    ),
    "dropped bias of a linear layer": (
        "transformer",
        lambda graph: graph.change(graph.node("Add", "blocks.0.up"), _bias(graph, "blocks.0.up"), np.zeros_like),
        "hidden = nn.functional.gelu(self.up(",
    ),
    "query and key are one": (
        "transformer",
        lambda graph: _read_instead(graph, "MatMul", "blocks.0.k", 1, graph.node("MatMul", "blocks.0.q").input[1]),
        "self.split(self.k(y))",
    ),
    "the wrong word": (
        "transformer",
        constant("Gather", 0, lambda a: np.roll(a, 1, 0), "words"),
        "x = self.words(ids)",
    ),
    "a weight that float16 cannot hold": (
        "transformer",
        constant("Gemm", 1, _overflowing, "head"),
        "return self.head(torch.tanh(first))",
    ),
    "gates in another order": ("lstm", constant("LSTM", 1, lambda a: np.roll(a, 8, 1), "lstm"), "y, _ = self.lstm(x)"),
    "another recurrent weight": (
        "lstm",
        constant("LSTM", 2, lambda a: a[..., ::-1], "lstm"),
        "self.lstm(x)",
    ),
    "dropped bias of an LSTM": ("lstm", constant("LSTM", 3, np.zeros_like, "lstm"), "y, _ = self.lstm(x)"),
    "a sum that leaves itself out": ("lstm", attribute("CumSum", exclusive=1), "x = x.cumsum(1)"),
    "the step before the last": ("lstm", constant("Gather", 1, lambda a: a - 1), "last = y[:, -1]"),
    "another activation": ("lstm", op("Relu", "Tanh"), "torch.relu(self.fc(last))"),
}


def _bias(graph: Graph, module: str) -> int:
    """Which input of a linear layer's Add is the bias."""
    node = graph.node("Add", module)
    return next(i for i, name in enumerate(node.input) if "bias" in name)


def _read_instead(graph: Graph, op_type: str, module: str, position: int, name: str) -> onnx.NodeProto:
    node = graph.node(op_type, module)
    node.input[position] = name
    return node


def test_there_are_enough_mutations() -> None:
    assert len(MUTATIONS) >= 20
    assert {model for model, _, _ in MUTATIONS.values()} == set(MODELS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_errors_are_found(name: str, made: dict[str, Made]) -> None:
    model, mutate, line = MUTATIONS[name]
    graph = Graph(made[model].graph)
    node = mutate(graph)
    report = tb.localize(made[model].module, graph.model, made[model].inputs)
    assert report.suspect is not None, str(report)
    assert report.suspect.stage == "given graph"
    assert (report.suspect.op_type, report.suspect.node) == (node.op_type, node.name), str(report)
    assert line in report.suspect.origin.code, str(report)
    source, start = inspect.getsourcelines(type(made[model].module).forward)
    if report.suspect.origin.module.startswith("blocks"):
        source, start = inspect.getsourcelines(Block.forward)
    assert line in source[report.suspect.origin.line - start]
    assert report.suspect.origin.file == __file__


@pytest.mark.parametrize("model", MODELS)
def test_right_graphs_raise_no_alarm(model: str, made: dict[str, Made]) -> None:
    report = tb.localize(made[model].module, made[model].graph, made[model].inputs)
    assert not report.found, str(report)
    assert len(report.layers) >= 6
    measured = [layer for layer in report.layers if layer.own_error is not None]
    assert len(measured) == len(report.layers)
    assert max(layer.own_error for layer in measured) < 1e-5
