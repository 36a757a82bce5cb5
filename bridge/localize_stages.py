"""Which pass spoiled a graph, and graphs and calls taken back out of converted modules."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ..errors import TrtBridgeError
from ..passes.pipeline import Pipeline
from ..plugins.sizes import names_in
from .backends.base import Segment
from .backends.ort_session import MODEL_PART, read_parts
from .dims import Dim, evaluate_size
from .dtypes import from_torch
from .model import OnnxModel, Signature, make_stand_in
from .plan import Plan
from .program import EngineStep, Program
from .structure import Structure

logger = logging.getLogger(__name__)

_MOST_SWEEPS = 4


def models_by_pass(model: OnnxModel, passes: Pipeline) -> Iterator[tuple[str, OnnxModel]]:
    """The model after each pass that rewrites something, with the pass's name, until none does.

    Args:
        model: before any pass.
        passes: in order.
    """
    for _ in range(_MOST_SWEEPS):
        busy = False
        for item in passes:
            result = Pipeline((item,)).run(model.proto, model.weights, ranges=model.signature.bounds)
            if result.report.rewrites:
                busy = True
                model = dataclasses.replace(model, proto=result.proto, weights=result.weights)
                yield item.name, model
        if not busy:
            return


def plan_of(program: Program) -> Plan | None:
    """The plan of a program whose engines hold their graphs, as those of ONNX Runtime do; None for others."""
    steps: list[Any] = []
    for step in program.steps:
        if not isinstance(step, EngineStep):
            steps.append(step)
            continue
        if MODEL_PART not in step.engine.parts:
            return None
        proto, weights = read_parts(step.engine, step.name)
        for tensor in proto.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(make_stand_in(tensor.name, weights[tensor.name]))
        steps.append(Segment(step.name, proto, weights, step.engine.inputs, step.engine.outputs))
    constants = {
        name: ir.tensor(tensor.numpy(), dtype=from_torch(tensor.dtype), name=name)
        for name, tensor in program.constants.items()
        if tensor.dtype is not torch.bfloat16
    }
    if len(constants) < len(program.constants):
        return None
    return Plan(tuple(steps), program.signature, constants, program.aliases, program.source)


def model_of(plan: Plan) -> OnnxModel | None:
    """The graph of a plan of one segment and nothing else; None for other plans."""
    if len(plan.steps) != 1 or not plan.segments or plan.aliases:
        return None
    segment = plan.segments[0]
    return OnnxModel(segment.proto, segment.weights, plan.signature, plan.source, plan.data_dims)


def dynamic_shapes_of(signature: Signature) -> dict[str, Any] | None:
    """The ``dynamic_shapes`` with which a module was converted, written by argument name; None where all is fixed."""
    dims = {
        name: Dim(name, profiles=[profile[name] for profile in signature.profiles or (signature.dims,)])
        for name in signature.dims
    }
    if not dims:
        return None
    leaves: list[dict[int, Any]] = []
    for spec in signature.inputs:
        leaf: dict[int, Any] = {}
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                (name,) = names_in(size)
                offset = evaluate_size(size, {name: 0})
                leaf[axis] = dims[name] * (evaluate_size(size, {name: 1}) - offset) + offset
        leaves.append(leaf)
    rest = iter(leaves)
    positional, keyword = (_shapes(child, rest) for child in signature.input_structure.children)
    return dict(zip(signature.parameters, positional or (), strict=False)) | dict(keyword or {})


def _shapes(structure: Structure, leaves: Iterator[dict[int, Any]]) -> Any:
    """The dims of a nested value: nothing for what is no tensor."""
    if structure.kind in ("tensor", "number"):
        return next(leaves) or None
    if not structure.children:
        return None
    parts = [_shapes(child, leaves) for child in structure.children]
    return dict(zip(structure.keys, parts, strict=True)) if structure.keys else tuple(parts)


def check_inputs(signature: Signature, inputs: Sequence[torch.Tensor], what: str) -> None:
    """See that a graph takes as many tensors as there are.

    Raises:
        TrtBridgeError: it does not.
    """
    if len(signature.inputs) != len(inputs):
        names = ", ".join(spec.name for spec in signature.inputs)
        raise TrtBridgeError(
            f"{what} takes {len(signature.inputs)} tensors ({names}), the model was called with {len(inputs)}: "
            "are they the same model?"
        )
