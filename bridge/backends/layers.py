"""What runs inside an engine: its layers as they were fused, and how long each takes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .rtx_faults import original_name


@dataclass(frozen=True)
class Layer:
    """A layer of a built engine: one node of the graph, or several fused into one.

    Attributes:
        name: as the backend names it.
        kind: of which kind, in the backend's own words ("FusedConv", "runtime_fusion").
        nodes: names of the nodes of the graph that it computes; empty where nobody can tell.
    """

    name: str
    kind: str = ""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineLayers:
    """The layers of one engine.

    Attributes:
        layers: in the order in which they run.
        source: who says so.
        memory_bytes: device memory for activations and scratch space, in bytes; None where nobody says.
    """

    layers: tuple[Layer, ...]
    source: str
    memory_bytes: int | None = None


@dataclass(frozen=True)
class LayerRun:
    """One layer in one call.

    Attributes:
        layer: which.
        time_us: how long it took, without layers inside it (the body of a loop), in microseconds.
        start_us: when it began, in microseconds since the engine did; None where the backend does not tell.
        span_us: from its begin to its end, layers inside it included, in microseconds.
    """

    layer: Layer
    time_us: float
    start_us: float | None = None
    span_us: float = 0.0


class LayerProfiler(Protocol):
    """An engine loaded for measuring alone: each call runs it once, waits, and notes the time of each layer.

    It is called like an `Executable`, from one thread, with inputs that are not empty.
    """

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...

    def finish(self) -> list[list[LayerRun]]:
        """The layers of each call so far, in order; after this it cannot be called any more."""
        ...


_METADATA = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")
_FOREIGN = re.compile(r"\{ForeignNode\[(.+?)\.\.\.(.+?)\]\}")
# What TensorRT puts between and around names: "a + b", "PWN(a, b)", "[Fused: a + b]", "Reformatting CopyNode for
# Input Tensor 0 to a".
_BETWEEN = re.compile(r" \+ |\|\||, |: |[()\[\]{}]| for (?:Input|Output) Tensor \d+ to ")
_MYELIN = re.compile(r"_myl\d+_\d+$")


def nodes_in_metadata(text: str, known: Container[str]) -> tuple[str, ...]:
    """The nodes that a layer's metadata names, in the form in which TensorRT's parser leaves them there.

    Args:
        text: "[ONNX Layer: a][ONNX Layer: b]", with any character between.
        known: names of nodes; those of helpers that we put in count as what they belong to.
    """
    return _known(_METADATA.findall(text), known)


def nodes_in_name(name: str, known: Mapping[str, object]) -> tuple[str, ...]:
    """The nodes that a layer's name is made of; empty where it has names of its own.

    Args:
        name: of a layer in TensorRT's profiler or inspector.
        known: nodes by name, in the order of the graph.
    """
    name = base_name(name)
    if name in known:
        return (name,)
    found: list[str] = []
    order = list(known)
    for first, last in _FOREIGN.findall(name):
        ends = [order.index(end) for end in (original_name(first), original_name(last)) if end in known]
        # One end may be a weight. Two ends and all between them are a guess: the graph is no line.
        found += order[min(ends) : max(ends) + 1] if ends else []
    rest = _FOREIGN.sub(" + ", name)
    return (*found, *(node for node in _known(_BETWEEN.split(rest), known) if node not in found))


def base_name(name: str) -> str:
    """A layer's name without the number that TensorRT's compiler puts behind those of its kernels."""
    return _MYELIN.sub("", name)


def _known(names: Iterable[str], known: Container[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in map(str.strip, names):
        # Products over one input are made one: "a+b".
        for part in (name,) if name in known else name.split("+"):
            found.update((one, None) for one in (part, original_name(part)) if one in known)
    return tuple(found)
