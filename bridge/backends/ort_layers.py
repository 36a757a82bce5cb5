"""The layers of an ONNX Runtime session: what its optimizer made of the graph, and how long each takes."""

from __future__ import annotations

import bisect
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from ...errors import ExecutionError
from .layers import EngineLayers, Layer, LayerRun

if TYPE_CHECKING:
    from .onnxruntime import OnnxRuntimeExecutable

Open = Callable[[Callable[[Any], None]], "OnnxRuntimeExecutable"]
"""Makes a session; what it is given may change the session's options."""

_OPTIMIZED = "optimized.onnx"
_KERNEL = "_kernel_time"


def optimized_layers(open_session: Open, graph: onnx.GraphProto) -> EngineLayers:
    """The nodes that a session runs, each with the nodes of the graph that went into it.

    Args:
        open_session: makes the session.
        graph: what it is made of.
    """
    with tempfile.TemporaryDirectory(prefix="trtbridge-") as folder:
        open_session(lambda options: _keep_optimized(options, Path(folder)))
        return EngineLayers(_layers(Path(folder), graph), "ONNX Runtime's optimized graph")


class OrtLayerProfiler:
    """A session with ONNX Runtime's own profiler; a `LayerProfiler`.

    Args:
        open_session: makes the session.
        graph: what it is made of.
    """

    def __init__(self, open_session: Open, graph: onnx.GraphProto) -> None:
        folder = Path(tempfile.mkdtemp(prefix="trtbridge-"))
        # Also where a call fails and nobody asks for the times.
        self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

        def prepare(options: Any) -> None:
            _keep_optimized(options, folder)
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "profile")

        self._executable = open_session(prepare)
        self._layers = {layer.name: layer for layer in _layers(folder, graph)}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._executable(inputs)

    def finish(self) -> list[list[LayerRun]]:
        """The layers of each call, in the order in which they began.

        Raises:
            ExecutionError: ONNX Runtime left no profile, or one that was cut off.
        """
        session = self._executable.session
        path = Path(session.end_profiling())
        try:
            events = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ExecutionError(f"ONNX Runtime's profile cannot be read: {error}") from error
        finally:
            self._remove_folder()
        starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
        calls: list[list[dict[str, Any]]] = [[] for _ in starts]
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                calls[bisect.bisect_right(starts, event["ts"]) - 1].append(event)
        return [read_runs(call, self._layers, began) for call, began in zip(calls, starts, strict=True)]


def read_runs(events: Sequence[Mapping[str, Any]], layers: Mapping[str, Layer], began_us: float) -> list[LayerRun]:
    """The layers in the events of one call, in the order in which they began.

    A loop's event lasts as long as its body, whose nodes have events as well: its own time is what is left.

    Args:
        events: of nodes, as ONNX Runtime's profiler writes them.
        layers: known layers by name.
        began_us: when the call began, in the events' time.
    """
    order = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    inside = [0.0] * len(order)  # time of the layers within each
    open_events: list[int] = []
    for index, event in enumerate(order):
        while open_events and _end(order[open_events[-1]]) <= event["ts"]:
            open_events.pop()
        if open_events and _end(event) <= _end(order[open_events[-1]]):
            inside[open_events[-1]] += event["dur"]
        open_events.append(index)
    runs = []
    for event, within in zip(order, inside, strict=True):
        name = event["name"].removesuffix(_KERNEL)
        layer = layers.get(name) or Layer(name, event["args"].get("op_name", ""))
        start_us, span_us = float(event["ts"] - began_us), float(event["dur"])
        runs.append(LayerRun(layer, max(0.0, span_us - within), start_us, span_us))
    return runs


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def _keep_optimized(options: Any, folder: Path) -> None:
    """Let a session write its optimized graph; the weights go into a file beside it, whatever their size."""
    options.optimized_model_filepath = str(folder / _OPTIMIZED)
    key = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(key + "file_name", "weights")
    options.add_session_config_entry(key + "min_size_in_bytes", "1024")


def _layers(folder: Path, graph: onnx.GraphProto) -> tuple[Layer, ...]:
    optimized = onnx.load(folder / _OPTIMIZED, load_external_data=False)
    (folder / "weights").unlink(missing_ok=True)
    (folder / _OPTIMIZED).unlink()
    return tuple(_fused(graph, optimized.graph))


def _fused(graph: onnx.GraphProto, optimized: onnx.GraphProto) -> list[Layer]:
    """The nodes of an optimized graph, with what went into each.

    The optimizer keeps the names of the tensors that it leaves, so that a node that makes one of these computes all
    that lies between it and the next ones before it. What makes a tensor with a new name belongs to its first reader.
    """
    maker = {name: node for node in graph.node for name in node.output if name}
    kept = {name for node in optimized.node for name in (*node.output, _blocked(node))} & maker.keys()
    names = {node.name for node in graph.node}
    parts: dict[str, tuple[str, ...]] = {}  # by tensor of the optimized graph: what its readers are made of
    layers = []
    for node in reversed(optimized.node):
        own = [name for name in (*node.output, _blocked(node)) if name in kept]
        if own:
            nodes = _between(own, maker, kept)
        elif node.name in names:
            nodes = (node.name,)
        else:
            nodes = next((parts[name] for name in node.output if name in parts), ())
        parts.update((name, nodes) for name in node.input if name and name not in kept)
        layers.append(Layer(node.name, node.op_type, nodes))
        layers += [Layer(inner.name, inner.op_type, _same(inner, graph)) for inner in _bodies([node])]
    return layers[::-1]


def _blocked(node: onnx.NodeProto) -> str:
    """The tensor that a node makes in another order of its elements (blocks of channels), "" for other nodes."""
    return str(node.name).removesuffix("_nchwc") if node.name.endswith("_nchwc") else ""


def _between(ends: Sequence[str], maker: dict[str, onnx.NodeProto], kept: set[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    open_names = list(ends)
    while open_names:
        node = maker.get(open_names.pop())
        if node is None or node.name in found:
            continue
        found[node.name] = None
        open_names += [name for name in node.input if name and name not in kept]
    return tuple(found)[::-1]


def _bodies(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """All nodes in the bodies of conditions and loops."""
    found: list[onnx.NodeProto] = []
    for node in nodes:
        for attribute in node.attribute:
            for body in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                found += [*body.node, *_bodies(body.node)]
    return found


def _same(node: onnx.NodeProto, graph: onnx.GraphProto) -> tuple[str, ...]:
    """A node in a body: what was fused there is not looked into."""
    return (node.name,) if node.name and node.name in {inner.name for inner in _bodies(graph.node)} else ()
