"""The layers of a TensorRT engine: its inspector's words, and the times that its profiler reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import BackendError, ExecutionError
from ...plugins.capture_gate import GATE
from ...plugins.tensorrt_v3 import plugin_host
from ..cache import JitCacheFile
from ..dtypes import to_torch
from .base import Engine
from .flavour import Flavour, JitCache, tf32_environment
from .layers import EngineLayers, Layer, LayerRun, base_name, nodes_in_metadata, nodes_in_name
from .plugin_nodes import require_ops
from .rtx_plan import read_plan
from .trt_outputs import SizedByData
from .trt_run import ENGINE_PART
from .trt_weights import TABLE_PART, DeviceWeights

if TYPE_CHECKING:
    import tensorrt as trt

_ALIGNMENT = 256  # bytes, of every address that TensorRT is given
INSPECTOR = "TensorRT's engine inspector"


class _Loaded:
    """An engine on a device with one execution context, apart from those that run calls."""

    def __init__(self, flavour: Flavour, engine: Engine, device: torch.device, cache_dir: Path | None) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        plugins = engine.info.get("plugins", [])
        require_ops(plugins)
        self._host = plugin_host(flavour.module) if plugins else None  # must live as long as the engine
        plan = engine.parts[ENGINE_PART]
        with torch.cuda.device(self.device), tf32_environment(flavour, bool(engine.info.get("tf32"))):
            torch.cuda.set_device(self.device)  # makes torch's context that of this thread, also of a new one
            self._logger = trt.Logger(trt.ILogger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            loaded = self._runtime.deserialize_cuda_engine(plan)
            if loaded is None:
                raise BackendError(
                    f"{flavour.title} {trt.__version__} cannot load this engine on "
                    f"{torch.cuda.get_device_name(index)}: it was built with {engine.info.get('version')} for "
                    f"{engine.info.get('target')}. Convert again on this machine."
                )
            self.engine = loaded
            file = JitCacheFile(cache_dir, plan, f"{flavour.name}-{trt.__version__}") if flavour.jit else None
            self._jit = JitCache(flavour, loaded, file.read() if file else None)
            made = self._jit.create_context(user_managed=False)
        if made is None:
            raise ExecutionError(
                f"{flavour.title} could not make an execution context on {self.device}: it needs "
                f"{loaded.device_memory_size_v2 >> 20} MiB of device memory."
            )
        self.context: trt.IExecutionContext = made

    def __del__(self) -> None:
        vars(self).pop("context", None)  # ahead of what it was made with

    def give_weights(self, engine: Engine) -> DeviceWeights | None:
        """Bind the weights of an engine that has them as inputs; they must live as long as the context runs."""
        if TABLE_PART not in engine.parts:
            return None
        names = frozenset(self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors))
        weights = DeviceWeights(engine, self.device, names)
        weights.bind(self.context)
        return weights

    def inspect(self, flavour: Flavour, nodes: Mapping[str, object]) -> EngineLayers:
        """What the engine's inspector says, for the shapes that the context has now."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module()
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return EngineLayers(read_inspection(text, nodes), INSPECTOR, self.engine.device_memory_size_v2)


def inspect_layers(flavour: Flavour, engine: Engine, device: torch.device, nodes: Mapping[str, object]) -> EngineLayers:
    """Load an engine and ask its inspector.

    Raises:
        BackendError: it cannot be loaded on that device.
    """
    return _Loaded(flavour, engine, device, None).inspect(flavour, nodes)


def read_inspection(text: str, nodes: Mapping[str, object]) -> tuple[Layer, ...]:
    """The layers in what an engine inspector says in JSON.

    Args:
        text: with ``Layers``: objects where the engine was built with detailed profiling, names where it was not.
        nodes: nodes of the graph by name, in order.
    """
    try:
        entries = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):  # no JSON: a release that says something else
        return ()
    return tuple(_read_layer(entry, nodes) for entry in entries)


def _read_layer(entry: Any, nodes: Mapping[str, object]) -> Layer:
    if not isinstance(entry, Mapping):
        return Layer(str(entry), "", nodes_in_name(str(entry), nodes))
    name = str(entry.get("Name", ""))
    found = nodes_in_metadata(str(entry.get("Metadata", "")), nodes) or nodes_in_name(name, nodes)
    return Layer(name, str(entry.get("LayerType", "")), found)


class TrtLayerProfiler:
    """An engine with TensorRT's own profiler; a `LayerProfiler`.

    Args:
        flavour: the library.
        engine: what is loaded.
        device: where.
        cache_dir: folder for compiled kernels.
        nodes: nodes of the graph by name, in order.
    """

    def __init__(
        self,
        flavour: Flavour,
        engine: Engine,
        device: torch.device,
        cache_dir: Path | None,
        nodes: Mapping[str, object],
    ) -> None:
        self._flavour = flavour
        self._nodes = nodes
        self._plan = engine.parts[ENGINE_PART]
        self._loaded = _Loaded(flavour, engine, device, cache_dir)
        self._device = self._loaded.device
        self._weights = self._loaded.give_weights(engine)
        self._inputs = [(spec.name, to_torch(spec.dtype)) for spec in engine.inputs]
        self._outputs = [(spec.name, to_torch(spec.dtype)) for spec in engine.outputs]
        self._reported: list[tuple[str, float]] = []
        self._calls: list[list[tuple[str, float]]] = []
        self._sized: SizedByData | None = None
        context = self._loaded.context
        self._profiler = _make_profiler(flavour, self._reported)  # TensorRT holds it by its address
        context.profiler = self._profiler
        context.enqueue_emits_profile = True  # each enqueue waits, and reports before it returns

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run once and note the layers.

        Raises:
            ExecutionError: TensorRT failed.
        """
        context = self._loaded.context
        if not all(tensor.numel() for tensor in inputs):
            shapes = [tuple(tensor.shape) for tensor in inputs]
            raise ExecutionError(f"TensorRT does not run on empty tensors, so there is nothing to time; got {shapes}.")
        tensors = [t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in inputs]
        for tensor, (name, _) in zip(tensors, self._inputs, strict=True):
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ExecutionError(f"The engine does not take shape {tuple(tensor.shape)} for {name!r}.")
        context.infer_shapes()
        shapes = [tuple(context.get_tensor_shape(name)) for name, _ in self._outputs]
        known = [all(size >= 0 for size in shape) for shape in shapes]
        outputs = [
            torch.empty(shape, dtype=dtype, device=self._device) if is_known else None
            for shape, is_known, (_, dtype) in zip(shapes, known, self._outputs, strict=True)
        ]
        if not all(known) and self._sized is None:
            sized = {name: dtype for (name, dtype), one in zip(self._outputs, known, strict=True) if not one}
            self._sized = SizedByData(self._flavour, context, sized, self._device)
        if self._sized is not None:
            self._sized.clear()
        for bound, (name, _) in zip([*tensors, *outputs], [*self._inputs, *self._outputs], strict=True):
            if bound is not None:
                context.set_tensor_address(name, bound.data_ptr())
        self._reported.clear()
        GATE.enter()
        try:
            works = context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream)
        finally:
            GATE.leave()
        if not works:
            raise ExecutionError("TensorRT failed to run the engine with a profiler; its words are on standard error.")
        self._calls.append(list(self._reported))
        return [self._take(name) if t is None else t for t, (name, _) in zip(outputs, self._outputs, strict=True)]

    def _take(self, name: str) -> torch.Tensor:
        tensor = self._sized.take(name) if self._sized is not None else None
        if tensor is None:
            raise ExecutionError(f"TensorRT ran the engine and gave no shape for its output {name!r}.")
        return tensor

    def finish(self) -> list[list[LayerRun]]:
        """The layers of each call, in the order in which TensorRT reported them; it tells no moments."""
        known = self._loaded.inspect(self._flavour, self._nodes).layers
        if not any(layer.nodes for layer in known) and self._flavour.jit:
            read = read_plan(self._plan, self._nodes)
            known = read.layers if read is not None else known
        found = []
        for call in self._calls:
            layers = match_layers([name for name, _ in call], known, self._nodes)
            found.append([LayerRun(layer, ms * 1e3) for layer, (_, ms) in zip(layers, call, strict=True)])
        return found


def match_layers(names: Sequence[str], known: Sequence[Layer], nodes: Mapping[str, object]) -> list[Layer]:
    """The layers that a profiler reported, each with the nodes that it computes.

    Names need not be unique: the compiler's own say what a kernel does ("__myl_AddReshTran"), and the profiler adds a
    number ("__myl_AddReshTran_myl0_3"). The second of a name in a call is then the second of it in the engine.

    Args:
        names: as reported in one call, in order.
        known: layers of the engine, in order.
        nodes: nodes of the graph by name, for names that the engine's layers do not have.
    """
    waiting: dict[str, list[Layer]] = {}
    for layer in known:
        waiting.setdefault(base_name(layer.name), []).append(layer)
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        base = base_name(name)
        same = waiting.get(base, [])
        match = same[seen[base]] if seen[base] < len(same) else Layer(name)
        seen[base] += 1
        seen[f"={name}"] += 1
        again = seen[f"={name}"]
        shown = f"{name} #{again}" if again > 1 and len(same) > 1 else name
        found.append(Layer(shown, match.kind, match.nodes or nodes_in_name(name, nodes)))
    return found


def _make_profiler(flavour: Flavour, reported: list[tuple[str, float]]) -> trt.IProfiler:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reported.append((layer_name, ms))

    return Profiler()
