"""``trtbridge::onnx_node``: ONNX nodes as a torch op, for nodes of .onnx files that a backend does not take.

Where torch has the op, it runs there: on the device, in the order of the stream. All else runs in ONNX Runtime on the
CPU, or in the reference implementation of ONNX where ONNX Runtime lacks the op or is known to be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ..nodes import ONNX_NODE_OP, STANDARD_DOMAINS, decode_nodes
from . import (
    onnx_attention,
    onnx_fallback,
    onnx_ops_loss,
    onnx_ops_math,
    onnx_ops_quantized,
    onnx_ops_random,
    onnx_ops_select,
    onnx_ops_vision,
)
from .onnx_call import Implementation, NodeCall, NotHereError

OP = ONNX_NODE_OP.removesuffix(".default")

_MODULES = (
    onnx_ops_math, onnx_ops_select, onnx_ops_vision, onnx_ops_random, onnx_ops_quantized, onnx_ops_loss,
    onnx_attention,
)  # fmt: skip
IMPLEMENTATIONS: Mapping[str, Implementation] = {op: f for module in _MODULES for op, f in module.OPS.items()}
"""Torch implementations of ONNX ops, by op type."""

_FAKES: Mapping[str, Implementation] = {
    **onnx_ops_select.FAKES, **onnx_ops_vision.FAKES, **onnx_ops_random.FAKES, **onnx_attention.FAKES,
}  # fmt: skip

_LIBRARY = torch.library.Library("trtbridge", "FRAGMENT")
_LIBRARY.define(
    "onnx_node(str node, Tensor[] inputs, Device device) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,)
)


def runs_in_torch(node: onnx.NodeProto) -> bool:
    """Whether torch has an op for a node: it then runs on the device, else on the host."""
    return node.domain in STANDARD_DOMAINS and node.op_type in IMPLEMENTATIONS


def _onnx_node(node: str, inputs: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    prepared = _prepare(node)
    if prepared.implementation is not None:
        try:
            return prepared.run(prepared.implementation, inputs, device, keep=True)
        except NotHereError:
            pass
    return onnx_fallback.run(node, inputs, device)


def _fake_onnx_node(node: str, inputs: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    prepared = _prepare(node)
    if prepared.implementation is not None:
        try:
            return prepared.run(_FAKES.get(prepared.op, prepared.implementation), inputs, device, keep=False)
        except NotHereError:
            pass
    known = {str(size): size for tensor in inputs for size in tensor.shape}
    context = torch.library.get_ctx()
    return [
        torch.empty(
            [known[str(size)] if str(size) in known else _new(size, context) for size in sizes],
            dtype=dtype,
            device=device,
        )
        for dtype, sizes in onnx_fallback.infer(node, inputs)
    ]


def _new(size: int | str | None, context: Any) -> Any:
    return size if isinstance(size, int) else context.new_dynamic_size()


torch.library.impl(_LIBRARY, "onnx_node", "CompositeExplicitAutograd")(_onnx_node)
torch.library.register_fake(OP, _fake_onnx_node, lib=_LIBRARY)


class _Prepared:
    """A node's text, read once."""

    def __init__(self, text: str) -> None:
        model = decode_nodes(text)
        self.implementation: Implementation | None = None
        node = model.graph.node[0]
        self.op = node.op_type
        if len(model.graph.node) > 1 or not runs_in_torch(node):
            return
        self.implementation = IMPLEMENTATIONS[node.op_type]
        self.opset = next(opset.version for opset in model.opset_import if opset.domain in STANDARD_DOMAINS)
        self.attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.values = tuple(constants.get(name) for name in node.input)
        places = {value.name: index for index, value in enumerate(model.graph.input)}
        self.places = tuple(places.get(name) for name in node.input)
        named = {name: index for index, name in enumerate(node.output) if name}
        self.outputs = len(node.output)
        self.wanted = [named[value.name] for value in model.graph.output]
        self._tensors: dict[tuple[int, torch.device], torch.Tensor] = {}

    def run(
        self, implementation: Implementation, inputs: Sequence[torch.Tensor], device: torch.device, *, keep: bool
    ) -> list[torch.Tensor]:
        tensors: list[torch.Tensor | None] = []
        for index, (place, value) in enumerate(zip(self.places, self.values, strict=True)):
            if value is not None:
                tensors.append(self._constant(index, value, device, keep))
            else:
                tensors.append(None if place is None else inputs[place])
        call = NodeCall(self.op, self.opset, self.attributes, tuple(tensors), self.values, self.outputs, device)
        result = implementation(call)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        # A result of an op may not share memory with its inputs.
        given = [tensor for tensor in tensors if tensor is not None]
        return [_own(results[index], given) for index in self.wanted]

    def _constant(self, index: int, value: np.ndarray, device: torch.device, keep: bool) -> torch.Tensor:
        if not keep:  # a fake tensor, of one trace only
            return onnx_fallback.to_torch(value).to(device)
        key = (index, device)
        if key not in self._tensors:
            self._tensors[key] = onnx_fallback.to_torch(value).to(device)
        return self._tensors[key]


def _own(tensor: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor:
    if any(tensor is other for other in given) or tensor._is_view():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


@functools.lru_cache(maxsize=1024)
def _prepare(text: str) -> _Prepared:
    return _Prepared(text)
