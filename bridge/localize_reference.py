"""What layers are compared with: a traced module call by call, or an .onnx file's graph tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import onnx_ir as ir
import torch

from ..errors import TrtBridgeError
from .activations import INDEX_OPS, Recorder, cuda_devices, run_graph
from .export import ExportedModule
from .model import OnnxModel
from .partition import tensor_types
from .seeds import seeded
from .untranslatable import random_calls

logger = logging.getLogger(__name__)

OUTPUT = "output:"
"""Keys of the reference's results: ``output:0``. Other keys are ``call:index``, or a tensor's name in a graph."""

_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

Type = tuple[tuple[int, ...], torch.dtype]


class Reference(Protocol):
    """Values to compare with, on the example, by key."""

    @property
    def words(self) -> str:
        """What it is."""
        ...

    @property
    def inputs(self) -> Sequence[torch.Tensor]:
        """The example, on the CPU."""
        ...

    @property
    def types(self) -> Mapping[str, Type]:
        """Shape and dtype of every value that can be had."""
        ...

    def values(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Some of the values, on the CPU."""
        ...

    def is_free(self, key: str) -> bool:
        """Whether a value may rightly be another: indices of equal values, random numbers."""
        ...

    @property
    def is_random(self) -> bool:
        """Whether results are others in every run."""
        ...


@dataclass(frozen=True)
class TorchReference:
    """A traced module, run on its example.

    Attributes:
        traced: the module.
        golden: compute in float64.
    """

    traced: ExportedModule
    golden: bool = False

    @property
    def words(self) -> str:
        return f"torch {self.traced.name}" + (" in float64" if self.golden else "")

    @property
    def inputs(self) -> Sequence[torch.Tensor]:
        return [tensor.detach().cpu() for tensor in self.traced.arguments.tensors]

    @cached_property
    def types(self) -> Mapping[str, Type]:
        recorder = Recorder(self.traced, self.golden)
        outputs = self._run(recorder)
        found = {f"{call}:{i}": kind for call, kinds in recorder.types.items() for i, kind in enumerate(kinds)}
        return found | {f"{OUTPUT}{i}": (tuple(t.shape), t.dtype) for i, t in enumerate(outputs)}

    def values(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        recorder = Recorder(self.traced, self.golden)
        recorder.wanted = {key.rpartition(":")[0] for key in keys}
        outputs = self._run(recorder)
        found = {f"{OUTPUT}{i}": tensor.detach().cpu() for i, tensor in enumerate(outputs)}
        found |= {f"{c}:{i}": t for c, tensors in recorder.values.items() for i, t in enumerate(tensors)}
        return {key: found[key] for key in keys}

    def is_free(self, key: str) -> bool:
        call = key.rpartition(":")[0]
        if call in self._random:
            return True
        target = self._targets.get(call, "")
        return target.split(".")[1:2] != [] and target.split(".")[1] in INDEX_OPS and not _is_float(self.types[key])

    @property
    def is_random(self) -> bool:
        return bool(self._random)

    @cached_property
    def _random(self) -> Collection[str]:
        return random_calls(self.traced.program).keys()

    @cached_property
    def _targets(self) -> Mapping[str, str]:
        return {node.name: str(node.target) for node in self.traced.program.graph.nodes}

    def _run(self, recorder: Recorder) -> list[torch.Tensor]:
        with seeded(cuda_devices(self.traced)):
            try:
                return recorder.run_example()
            except Exception as error:
                raise TrtBridgeError(f"{self.words} fails on the inputs: {error}") from error


class GraphReference:
    """A graph, run by ONNX Runtime.

    Args:
        model: the graph, before any pass.
        inputs: a tensor for each of its inputs, on the CPU.
    """

    def __init__(self, model: OnnxModel, inputs: Sequence[torch.Tensor]) -> None:
        self.model = model
        self.inputs = inputs

    @property
    def words(self) -> str:
        return f"{self.model.source} in ONNX Runtime"

    @cached_property
    def types(self) -> Mapping[str, Type]:
        found: dict[str, Type] = {}
        for name, batch in self._batches(list(self._dtypes)):
            found[name] = (tuple(batch.shape), batch.dtype)
        return found | {f"{OUTPUT}{i}": found[name] for i, name in enumerate(self._outputs)}

    def values(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        names = {k: self._outputs[int(k.removeprefix(OUTPUT))] if k.startswith(OUTPUT) else k for k in keys}
        seen = run_graph(self.model, self._feeds, list(dict.fromkeys(names.values())), self._dtypes)
        return {key: seen[name] for key, name in names.items()}

    def is_free(self, key: str) -> bool:
        return key in self._free

    @cached_property
    def _free(self) -> Collection[str]:
        ops = {"TopK", "ArgMax", "ArgMin", "MaxPool", "Unique"}
        integers = (ir.DataType.INT64, ir.DataType.INT32)
        return {
            name
            for node in self.model.proto.graph.node
            for name in node.output
            if node.op_type in _RANDOM or (node.op_type in ops and self._dtypes.get(name) in integers)
        }

    @property
    def is_random(self) -> bool:
        return any(node.op_type in _RANDOM for node in self.model.proto.graph.node)

    @property
    def _feeds(self) -> dict[str, torch.Tensor]:
        return {spec.name: t for spec, t in zip(self.model.signature.inputs, self.inputs, strict=True)}

    @cached_property
    def _outputs(self) -> list[str]:
        return [value.name for value in self.model.proto.graph.output]

    @cached_property
    def _dtypes(self) -> dict[str, ir.DataType]:
        made = {name for node in self.model.proto.graph.node for name in node.output}
        types = tensor_types(self.model.proto)
        return {name: dtype for name, (dtype, _) in types.items() if dtype is not None and name in made}

    def _batches(self, names: Sequence[str], count: int = 64) -> list[tuple[str, torch.Tensor]]:
        """Every tensor's shape, few tensors held at a time."""
        found = []
        for start in range(0, len(names), count):
            seen = run_graph(self.model, self._feeds, names[start : start + count], self._dtypes)
            found += [(name, torch.empty(t.shape, dtype=t.dtype, device="meta")) for name, t in seen.items()]
        return found


def _is_float(kind: Type) -> bool:
    return kind[1].is_floating_point
