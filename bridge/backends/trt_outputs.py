"""Outputs whose sizes depend on data: TensorRT asks for their memory while it runs, and then says their shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .flavour import Flavour

if TYPE_CHECKING:
    import tensorrt as trt


class SizedByData:
    """Memory from torch for the outputs of one execution context whose sizes depend on data.

    Args:
        flavour: the library.
        context: TensorRT holds the allocator by its address, so this must live as long.
        outputs: name and dtype of each such output.
        device: where the memory comes from.
    """

    def __init__(
        self, flavour: Flavour, context: trt.IExecutionContext, outputs: dict[str, torch.dtype], device: torch.device
    ) -> None:
        self._dtypes = outputs
        self._device = device
        self._run = _Run(device)
        self._allocator = _allocator_class(flavour.module)(self._run)
        for name in outputs:
            context.set_output_allocator(name, self._allocator)

    def clear(self) -> None:
        """Forget the last run."""
        self._run.memory.clear()
        self._run.shapes.clear()
        self._run.failure = None

    def raise_failure(self) -> None:
        """Raise why there was no memory in the last run, if that was so."""
        failure, self._run.failure = self._run.failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # or it would keep this frame, and the frame it

    def take(self, name: str) -> torch.Tensor | None:
        """An output of the run that has returned; None where TensorRT said no shape."""
        shape = self._run.shapes.get(name)
        if shape is None:
            return None
        dtype = self._dtypes[name]
        size_bytes = dtype.itemsize
        for size in shape:
            size_bytes *= size
        if not size_bytes:
            return torch.empty(shape, dtype=dtype, device=self._device)
        memory = self._run.memory[name]
        tensor = memory[:size_bytes].view(dtype).view(shape)
        # The room is for the largest size: where most of it is unused, it is not kept.
        return tensor.clone() if 2 * size_bytes < memory.numel() else tensor


class _Run:
    """What TensorRT has asked and said in one run. It is apart so that the allocator does not lead back to who has it.

    Attributes:
        memory: of each output.
        shapes: of each output.
        failure: why there was no memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.failure: BaseException | None = None
        self._device = device

    def allocate(self, name: str, size_bytes: int) -> int:
        """Fresh memory for an output, on torch's current stream; its address, 0 where there is none."""
        try:
            memory = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=self._device)
        except BaseException as error:
            self.failure = error
            return 0
        self.memory[name] = memory
        return memory.data_ptr()


@functools.cache
def _allocator_class(load: Callable[[], Any]) -> Callable[[_Run], Any]:
    """The class of allocators, made once for a library: a class is a cycle, and would keep what its methods know."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = load()

    class Allocator(trt.IOutputAllocator):
        def __init__(self, run: _Run) -> None:
            trt.IOutputAllocator.__init__(self)
            self.run = run

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.run.allocate(tensor_name, size)

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.run.allocate(tensor_name, size)

        def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None:
            self.run.shapes[tensor_name] = tuple(shape)

    return Allocator
