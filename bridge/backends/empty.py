"""Empty inputs: TensorRT does not run on them, and sizes that depend on data may be 0.

An engine whose inputs can be empty gets around it: results that are empty whenever an input is need no computing; for
others (a sum over nothing) the engine carries the segment's ONNX graph too, which ONNX Runtime runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ...errors import ExecutionError
from ...plugins.sizes import names_in
from ..dims import evaluate_shape
from ..dtypes import to_torch
from ..model import TensorSpec
from .base import BuildOptions, Context, Engine, Exchanging, Executable, Segment
from .onnxruntime import OnnxRuntimeBackend
from .ort_session import MODEL_PART, with_provenance

_PREFIX = "empty."


def can_be_empty(inputs: Sequence[TensorSpec]) -> bool:
    """Whether some input may have no elements."""
    return any(bounds is not None and bounds[0] == 0 for spec in inputs for bounds in spec.ranges)


def empty_parts(segment: Segment, strip_weights: bool = False) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Parts and info that an engine needs beside its plan to take empty inputs; none for most."""
    if not can_be_empty(segment.inputs) or segment.hosted:
        return {}, None
    names = [
        name
        for spec in segment.inputs
        for size, bounds in zip(spec.shape, spec.ranges, strict=True)
        if isinstance(size, str) and bounds is not None and bounds[0] == 0
        for name in names_in(size)
    ]
    static = any(size == 0 for spec in segment.inputs for size in spec.shape)
    # With one size that may be 0 it is enough to see that every result has it as a size.
    if len(set(names)) == 1 and not static and all(names[0] in map(str, spec.shape) for spec in segment.outputs):
        return {}, None
    return _as_parts(OnnxRuntimeBackend().build(segment, BuildOptions(strip_weights=strip_weights)))


def refit_empty(
    engine: Engine, weights: Mapping[str, ir.TensorProtocol]
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """What `empty_parts` added to an engine, with other weights."""
    inner = _inner(engine)
    return ({}, None) if inner is None else _as_parts(OnnxRuntimeBackend().refit(inner, weights, torch.device("cpu")))


def _as_parts(inner: Engine) -> tuple[dict[str, Any], Mapping[str, Any]]:
    return {_PREFIX + name: part for name, part in inner.parts.items()}, inner.info


def _inner(engine: Engine) -> Engine | None:
    """The engine of ONNX Runtime inside one of TensorRT."""
    parts = {n.removeprefix(_PREFIX): p for n, p in engine.parts.items() if n.startswith(_PREFIX)}
    return Engine("onnxruntime", parts, engine.info["empty"], engine.inputs, engine.outputs) if parts else None


def revive_empty_parts(engine: Engine, segment: Segment) -> dict[str, Any]:
    """An engine's parts, with the segment's places in the graph that `empty_parts` added, where it did."""
    parts = dict(engine.parts)
    name = _PREFIX + MODEL_PART
    if name in parts:
        parts[name] = with_provenance(parts[name], segment.proto)
    return parts


class EmptySafe:
    """An executable that takes empty inputs too; an `Executable`.

    Args:
        engine: with what `empty_parts` added.
        executable: runs it on inputs that are not empty.
    """

    def __init__(self, engine: Engine, executable: Executable) -> None:
        self.device = executable.device
        self.workspace_bytes = executable.workspace_bytes
        self._engine = engine
        self._executable = executable
        self._fallback: Context | None = None

    def exchange(self, engine: Engine) -> Callable[[], None] | None:
        """See `Exchanging`."""
        inner = self._executable.exchange(engine) if isinstance(self._executable, Exchanging) else None
        if inner is None:
            return None

        def put() -> None:
            inner()
            self._engine, self._fallback = engine, None

        return put

    def new_context(self, workspace: torch.Tensor | None = None) -> Context:
        context = self._executable.new_context(workspace)

        def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return context(inputs) if all(tensor.numel() for tensor in inputs) else self._run_empty(inputs)

        return run

    def _run_empty(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = {
            size: tensor.shape[axis]
            for spec, tensor in zip(self._engine.inputs, inputs, strict=True)
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str) and size.isidentifier()
        }
        shapes = [evaluate_shape(spec.shape, sizes) for spec in self._engine.outputs]
        if all(shape is not None and 0 in shape for shape in shapes):
            return [
                torch.empty(shape or (), dtype=to_torch(spec.dtype), device=self.device)
                for shape, spec in zip(shapes, self._engine.outputs, strict=True)
            ]
        if self._fallback is None:
            self._fallback = self._load_fallback(inputs)
        return [result.to(self.device) for result in self._fallback([tensor.cpu() for tensor in inputs])]

    def _load_fallback(self, inputs: Sequence[torch.Tensor]) -> Context:
        inner = _inner(self._engine)
        if inner is None:
            shapes = [tuple(tensor.shape) for tensor in inputs]
            raise ExecutionError(
                f"TensorRT does not run on empty tensors, and this engine holds plugins; its inputs are {shapes}. "
                'Convert with plugin_host="segments".'
            )
        return OnnxRuntimeBackend().load(inner, torch.device("cpu")).new_context()
