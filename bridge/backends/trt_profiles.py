"""Optimization profiles of TensorRT's execution contexts, while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ...errors import ExecutionError
from ..profiles import EngineProfiles

if TYPE_CHECKING:
    import tensorrt as trt
    import torch


def select_profile(
    context: trt.IExecutionContext,
    profiles: EngineProfiles,
    shapes: Sequence[Sequence[int]],
    stream: torch.cuda.Stream,
    capturing: bool = False,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> bool:
    """Switch a context to the profile that takes given shapes; call it before it is given new shapes.

    TensorRT's rules (NvInferRuntime.h, IExecutionContext): a new context has profile 0; the profile is set before the
    shapes, and all shapes are set anew after a switch; what the switch copies must be done before the next enqueue, so
    it goes to the stream of that. Any number of contexts may have the same profile: sharing them was an option of
    TensorRT 8.6 and is always on since 10.0.

    Args:
        context: idle, used by this thread alone.
        profiles: of its engine.
        shapes: of the inputs, in the order of ``profiles.names``.
        stream: the one that the next enqueue goes to.
        capturing: whether that stream is being captured.
        around: what a switch is made within; TensorRT-RTX 1.6.1 makes its graphs anew and reads the environment again.

    Returns:
        Whether the profile changed: every shape that was set before is void then.

    Raises:
        ExecutionError: no profile takes the shapes, TensorRT refuses the switch, or it would be captured.
    """
    if len(profiles) == 1:
        return False
    index = profiles.choose(shapes)
    if index is None:
        raise ExecutionError(
            f"The engine has no profile for inputs of shapes {[tuple(shape) for shape in shapes]}; it takes "
            f"{profiles.describe()}."
        )
    if index == context.active_optimization_profile:
        return False
    if capturing:
        # What TensorRT updates at the first enqueue after a switch must not become a part of the graph.
        raise ExecutionError(
            f"These inputs need profile {index} and the context has profile {context.active_optimization_profile}, "
            "which cannot change during a CUDA graph capture: call the module once with inputs of these shapes, "
            "outside the capture, right before it."
        )
    try:
        with around():
            switched = context.set_optimization_profile_async(index, stream.cuda_stream)
    except RuntimeError as error:  # what the bindings make of False
        raise ExecutionError(_refused(index, profiles)) from error
    if not switched:
        raise ExecutionError(_refused(index, profiles))
    return True


def _refused(index: int, profiles: EngineProfiles) -> str:
    return f"TensorRT refused to switch to profile {index} of {len(profiles)}; its own words are on standard error."
