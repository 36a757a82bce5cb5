"""Runs a plugin op on raw device addresses: what happens inside an engine when its layer is reached."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import ExecutionError, PluginError, TrtBridgeError
from .host_spec import HOST_DTYPES, SIZE_DTYPE, HostSpec, evaluate_size, input_sizes
from .registry import call_op, find_op

Shape = tuple[int, ...]

_MOST_VIEWS = 256  # addresses inside an engine stay the same, those of its inputs and outputs change with each call


class HostedOp:
    """One plugin node, ready to run; used by one execution context, so by one thread at a time.

    Args:
        op: full name of the torch op.
        call: JSON template of its arguments.
        spec: dtypes and shapes.

    Raises:
        PluginError: the op is not registered in this process.
    """

    def __init__(self, op: str, call: str, spec: HostSpec) -> None:
        self._name = op
        self._op = find_op(op)
        self._call = call
        self._spec = spec
        self._views: dict[tuple[int, Shape, torch.dtype], torch.Tensor] = {}

    def run(
        self,
        input_shapes: Sequence[Shape],
        input_addresses: Sequence[int],
        output_addresses: Sequence[int],
        device: torch.device,
        stream: int = 0,
    ) -> None:
        """Run the op and write its results where the engine wants them.

        Args:
            input_shapes: of each input of the node.
            input_addresses: of contiguous tensors of the dtypes in the spec.
            output_addresses: of the outputs, then of the size tensors; each with room for the largest size.
            device: where all of these are.
            stream: CUDA stream handle that the work is enqueued on.

        Raises:
            ExecutionError: the op failed, or a size that depends on data exceeds its bound.
            PluginError: its results do not have the shapes that its fake kernel promised.
        """
        # TensorRT may hold a 0-d tensor as one of a single element.
        input_shapes = [shape if one.axes else () for shape, one in zip(input_shapes, self._spec.inputs, strict=True)]
        inputs = [
            self.view(address, shape, _torch_dtype(one.dtype), device)
            for address, shape, one in zip(input_addresses, input_shapes, self._spec.inputs, strict=True)
        ]
        with torch.no_grad(), _on(device, stream), _no_autocast(device):
            try:
                arguments = [
                    tensor.to(getattr(torch, one.cast)) if one.cast else tensor
                    for tensor, one in zip(inputs, self._spec.inputs, strict=True)
                ]
                results = call_op(self._op, self._call, arguments, device)
            except TrtBridgeError:
                raise
            except Exception as error:
                shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs]
                raise ExecutionError(
                    f"The plugin op {self._name} failed on inputs {shapes}: {type(error).__name__}: {error}\n"
                    f"  called at {self._spec.place}"
                ) from error
            self._write(results, input_sizes(input_shapes), output_addresses, device)

    def _write(
        self, results: list[torch.Tensor], sizes: dict[str, int], addresses: Sequence[int], device: torch.device
    ) -> None:
        spec = self._spec
        if len(results) <= max((output.index for output in spec.outputs), default=-1):
            raise PluginError(f"The plugin op {self._name} returned {len(results)} tensors, its fake kernel more.")
        for number, size in enumerate(spec.sizes):
            actual = results[spec.outputs[size.output].index].shape[size.axis]
            most = evaluate_size(size.most, sizes)
            if actual > most:
                raise ExecutionError(
                    f"The plugin op {self._name} made a size of {actual}, and the engine has room for {most}: give a "
                    f"larger bound when converting.\n  called at {spec.place}"
                )
            sizes[f"size{number}"] = actual
            address = addresses[len(spec.outputs) + number]
            self.view(address, (), _torch_dtype(SIZE_DTYPE), device).fill_(actual)
        for output, address in zip(spec.outputs, addresses[: len(spec.outputs)], strict=True):
            result = results[output.index]
            promised = tuple(evaluate_size(size, sizes) for size in output.shape)
            if tuple(result.shape) != promised:
                raise PluginError(
                    f"The plugin op {self._name} returned shape {tuple(result.shape)} where its fake kernel says "
                    f"{promised} (result {output.index}). Correct its fake kernel (torch.library.register_fake), or "
                    f'convert with plugin_host="segments".\n  called at {spec.place}'
                )
            self.view(address, promised, _torch_dtype(output.dtype), device).copy_(result)

    def view(self, address: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor on memory of someone else."""
        key = (address, shape, dtype)
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = self._views[key] = _view(address, shape, dtype, device)
        return found


def _view(address: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size_bytes = dtype.itemsize
    for size in shape:
        size_bytes *= size
    if not size_bytes:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        memory = (ctypes.c_char * size_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
    # As bytes: the interface has no name for bfloat16.
    viewed = torch.as_tensor(_CudaBytes(address, size_bytes), device=device)
    if viewed.data_ptr() != address:
        raise ExecutionError(f"Memory at {address:#x} is not on {device}, where the engine runs.")
    return viewed.view(dtype).view(shape)


class _CudaBytes:
    """Device memory as https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html describes it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, HOST_DTYPES[name])
    return dtype


def _on(device: torch.device, stream: int) -> AbstractContextManager[Any]:
    """Make a stream torch's current one; TensorRT may run layers on streams of its own."""
    if device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream == stream:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
