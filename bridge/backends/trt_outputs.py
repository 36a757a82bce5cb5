"""Outputs whose sizes depend on data: TensorRT asks for their memory while it runs, and then says their shapes."""

from __future__ import annotations

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
        self._memory: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.failure: BaseException | None = None
        self._allocator = _make_allocator(flavour, self)
        for name in outputs:
            context.set_output_allocator(name, self._allocator)

    def allocate(self, name: str, size_bytes: int) -> int:
        """Fresh memory for an output of this run, on torch's current stream; its address, 0 where there is none."""
        try:
            memory = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=self._device)
        except BaseException as error:
            self.failure = error
            return 0
        self._memory[name] = memory
        return memory.data_ptr()

    def notify(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape that an output has."""
        self._shapes[name] = shape

    def clear(self) -> None:
        """Forget the last run."""
        self._memory.clear()
        self._shapes.clear()
        self.failure = None

    def take(self, name: str) -> torch.Tensor | None:
        """An output of the run that has returned; None where TensorRT said no shape."""
        shape = self._shapes.get(name)
        if shape is None:
            return None
        dtype = self._dtypes[name]
        size_bytes = dtype.itemsize
        for size in shape:
            size_bytes *= size
        if not size_bytes:
            return torch.empty(shape, dtype=dtype, device=self._device)
        tensor = self._memory[name][:size_bytes].view(dtype).view(shape)
        # The room is for the largest size: where most of it is unused, it is not kept.
        return tensor.clone() if 2 * size_bytes < self._memory[name].numel() else tensor


def _make_allocator(flavour: Flavour, owner: SizedByData) -> Any:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return owner.allocate(tensor_name, size)

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return owner.allocate(tensor_name, size)

        def notify_shape(self, tensor_name: str, shape: trt.Dims) -> None:
            owner.notify(tensor_name, tuple(shape))

    return Allocator()
