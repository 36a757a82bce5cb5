"""Weights as inputs of the network: how engines take others where the builder cannot make them refittable.

The weights that may be exchanged are no constants of such a network but inputs of fixed shapes, which the parser takes
in the place of initializers of the same names. The plan then holds none of them; they lie beside it in the engine, as
those of ONNX Runtime's engines do, and on the device in one block that all execution contexts read. So other weights
need neither the library nor a GPU until they run, and what runs takes them in place: its contexts and CUDA graphs stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ...errors import BuildError, ExecutionError, ModelFileError, RefitError
from ...passes.parameters import names_read
from .base import BuildOptions, Engine, Segment
from .flavour import Flavour
from .ort_session import WEIGHTS_PART, is_left_out, pack, stand_ins, unpack

if TYPE_CHECKING:
    import tensorrt as trt

TABLE_PART = "weights.onnx"
"""A graph of nothing but stand-ins: types and shapes of the weights, and where each is in ``weights.bin``."""

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


# Building


def weight_inputs(flavour: Flavour, segment: Segment, options: BuildOptions) -> frozenset[str]:
    """The weights of a segment that are inputs of its network; none where the builder makes engines refittable."""
    if not options.refittable or flavour.refits:
        return frozenset()
    read = names_read(segment.proto.graph)
    # Of an empty weight there is nothing to exchange, and it would have no address.
    own = {tensor.name for tensor in segment.proto.graph.initializer if tensor.name in read and all(tensor.dims)}
    return frozenset(own & segment.refittable)


def with_weight_inputs(proto: onnx.ModelProto, names: frozenset[str]) -> onnx.ModelProto:
    """A graph with initializers as inputs behind its own; the graph itself where there are none."""
    if not names:
        return proto
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    graph = copied.graph
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    told = [value for value in proto.graph.value_info if value.name not in names]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.value_info.extend(told)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        for tensor in proto.graph.initializer
        if tensor.name in names
    )
    return copied


def weight_parts(
    segment: Segment, names: frozenset[str], strip_weights: bool
) -> tuple[dict[str, bytes | memoryview], dict[str, Any]]:
    """What an engine whose weights are inputs has beside its plan, and what its info says of them; nothing without any.

    Args:
        segment: that the engine was built from.
        names: the weights.
        strip_weights: leave their values out.

    Raises:
        BuildError: a weight has no values, or others than its type says.
    """
    if not names:
        return {}, {}
    table = onnx.ModelProto(ir_version=segment.proto.ir_version)
    table.graph.name = "weights"
    for tensor in segment.proto.graph.initializer:
        if tensor.name in names:
            entry = table.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            entry.data_location = onnx.TensorProto.EXTERNAL
    parts = _filled(table, segment.weights, segment.name, names if strip_weights else frozenset())
    size = sum(segment.weights[name].nbytes for name in names)
    return parts, {"refit": "inputs", "weight_input_bytes": size, "stripped": strip_weights}


def exchange_parts(engine: Engine, weights: Mapping[str, ir.TensorProtocol]) -> dict[str, bytes | memoryview]:
    """The parts of `weight_parts` with other weights.

    Raises:
        RefitError: a weight is missing, or has another type or shape.
        ModelFileError: the engine's parts are missing or damaged.
    """
    try:
        return _filled(_read_table(engine), weights, "the engine", frozenset())
    except BuildError as error:
        raise RefitError(str(error)) from error


def _filled(
    table: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], name: str, left_out: frozenset[str]
) -> dict[str, bytes | memoryview]:
    buffer = pack(table, weights, name, lambda phase, fraction: None, left_out, _ALIGNMENT)
    return {TABLE_PART: table.SerializeToString(), WEIGHTS_PART: buffer.data}


def _read_table(engine: Engine) -> onnx.ModelProto:
    if missing := [part for part in (TABLE_PART, WEIGHTS_PART) if part not in engine.parts]:
        raise ModelFileError(f"The engine lacks {' and '.join(missing)}; it has {sorted(engine.parts)}. Convert again.")
    try:
        table: onnx.ModelProto = onnx.ModelProto.FromString(bytes(engine.parts[TABLE_PART]))
        return table
    except Exception as error:  # protobuf's DecodeError
        raise ModelFileError(f"{TABLE_PART} of the engine is damaged: {error}. Convert again.") from error


# Running


class DeviceWeights:
    """The weights of one engine on a device, in one block of memory that all its execution contexts read.

    Args:
        engine: with its weights as inputs.
        device: a CUDA device.
        names: of the loaded engine's inputs and outputs; a weight that is none of them is not read.

    Raises:
        RefitError: the engine was built without weights and has got none.
        ModelFileError: its parts are damaged.
    """

    def __init__(self, engine: Engine, device: torch.device, names: frozenset[str]) -> None:
        host, offsets = weights_on_host(engine)
        with torch.inference_mode(False), torch.no_grad():  # other weights are copied into it, in whatever mode
            self._memory = torch.empty(max(host.numel(), 1), dtype=torch.uint8, device=device)
        self._copy(host)
        base = self._memory.data_ptr()
        self._addresses = {name: base + offset for name, offset in offsets.items() if name in names}
        self._offsets = offsets
        self._streams: set[int] = set()

    def bind(self, context: trt.IExecutionContext) -> None:
        """Give a context the addresses; it must not outlive this object.

        Raises:
            ExecutionError: the library refuses one.
        """
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise ExecutionError(f"The engine does not take the address of its weight {name!r}.")

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Note that work on a stream reads the weights: their memory is not given away before that is done."""
        if stream.cuda_stream not in self._streams:
            self._streams.add(stream.cuda_stream)
            self._memory.record_stream(stream)

    def exchange(self, engine: Engine) -> Callable[[], None]:
        """What puts the weights of another engine here; to be called while nothing reads them.

        Raises:
            RefitError, ModelFileError: it has none, or others than this one.
        """
        host, offsets = weights_on_host(engine)
        if offsets != self._offsets or host.numel() > self._memory.numel():
            raise RefitError("The weights are laid out in another way than those of the engine: load it anew.")
        return lambda: self._copy(host)

    def _copy(self, host: torch.Tensor) -> None:
        with torch.no_grad(), torch.cuda.device(self._memory.device):
            self._memory[: host.numel()].copy_(host)
            torch.cuda.current_stream().synchronize()  # calls come on other streams


def weights_on_host(engine: Engine) -> tuple[torch.Tensor, dict[str, int]]:
    """All weights of an engine whose weights are inputs, and where each begins.

    Returns:
        (bytes,) uint8 on the CPU, which may be the engine's own part; offsets by name, multiples of 256 bytes.

    Raises:
        RefitError: it was built without weights and has got none.
        ModelFileError: its parts are damaged.
    """
    table = _read_table(engine)
    if any(map(is_left_out, stand_ins(table))):
        raise RefitError("The engine was saved without weights, and has got none.")
    part = memoryview(engine.parts[WEIGHTS_PART])
    unpack(table, part, "the engine")  # sees that all are in it
    offsets = {
        tensor.name: next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        for tensor in stand_ins(table)
    }
    # torch warns of memory that it must not write to, such as a file's.
    data = part if not part.readonly else np.array(np.frombuffer(part, np.uint8))
    return torch.frombuffer(data, dtype=torch.uint8) if len(part) else torch.empty(0, dtype=torch.uint8), offsets
