"""From a plan to a program: every segment built by one backend."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ..errors import BuildError, UnsupportedOpError
from .backends.base import Backend, BuildOptions, Progress
from .dtypes import to_torch
from .plan import Plan, PluginCall
from .program import EngineStep, Program, Step


def build_plan(plan: Plan, backend: Backend, options: BuildOptions, progress: Progress | None = None) -> Program:
    """Build every segment of a plan.

    Raises:
        UnsupportedOpError, BuildError: as `Backend.build`; ``segment`` says which.
    """
    steps: list[Step] = []
    count = len(plan.segments)
    for step in plan.steps:
        if isinstance(step, PluginCall):
            steps.append(step)
            continue
        done = sum(isinstance(made, EngineStep) for made in steps)
        try:
            steps.append(EngineStep(step.name, backend.build(step, options, _share(progress, done, count))))
        except (UnsupportedOpError, BuildError) as error:
            error.segment = step.name
            raise
    left_out = plan.recipes.constants if plan.recipes is not None and options.strip_weights else ()
    constants = {name: snapshot(tensor) for name, tensor in plan.constants.items() if name not in left_out}
    return Program(
        backend.name, tuple(steps), plan.signature, constants, plan.aliases, plan.source, recipes=plan.recipes
    )


def _share(progress: Progress | None, done: int, count: int) -> Progress | None:
    """The progress of one engine as a share of all."""
    if progress is None:
        return None
    report = progress
    return lambda phase, fraction: report(f"build: {phase}", (done + fraction) / count)


def snapshot(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy, so that later changes of the module's weights do not reach the program."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().cpu().clone()
    data = bytearray(tensor.tobytes())
    dtype = to_torch(tensor.dtype)
    shape = tensor.shape.numpy()
    return (
        torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
        if data
        else torch.empty(shape, dtype=dtype)
    )
