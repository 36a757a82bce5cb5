"""The one TensorRT plugin that runs any torch op inside an engine (IPluginV3), for TensorRT and TensorRT-RTX.

A node ``trtbridge.TorchOp`` carries the op, its call and a `HostSpec` as text; the ONNX parser finds the creator below
under that name. The process that builds engines needs the text alone and imports no torch. Where an engine runs, the
first call imports `plugins.run_hosted`.

TensorRT prints an exception that leaves a callback and goes on with an error code, or with none at all
(get_fields_to_serialize). So every callback keeps its exception here, and who called TensorRT asks for it with
`PluginHost.take_failure`.
"""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import PluginError
from .host_spec import HOST_ATTRIBUTE, HOST_OP_TYPE, SIZE_DTYPE, HostSpec, Size, build_size, input_size, size_tensor

if TYPE_CHECKING:
    import tensorrt as trt
    import torch

    from .run_hosted import HostedOp

NAMESPACE = "trtbridge"
"""TensorRT namespace of the plugin; the parser takes a node's domain for it, so it is `nodes.DOMAIN`."""

VERSION = "1"

_FIELDS = ("op", "call", HOST_ATTRIBUTE)
_Method = TypeVar("_Method", bound=Callable[..., Any])


class PluginHost:
    """The plugin as registered in this process, and what went wrong in it.

    Attributes:
        creator: TensorRT's handle; the registry does not own it.
        device: where tensors are, None for the current CUDA device. Tests without a GPU run nodes on the CPU.
    """

    def __init__(self) -> None:
        self.creator: Any = None
        self.device: torch.device | None = None
        self._failures: list[tuple[int, BaseException]] = []
        self._lock = threading.Lock()

    def keep_failure(self, error: BaseException) -> None:
        """Remember an exception of a callback that runs in this thread."""
        with self._lock:
            self._failures.append((threading.get_ident(), error))

    def take_failure(self) -> BaseException | None:
        """The first exception since the last call of this in this thread; later ones follow from it."""
        own = threading.get_ident()
        with self._lock:
            found = [error for thread, error in self._failures if thread == own]
            self._failures = [entry for entry in self._failures if entry[0] != own]
        return found[0] if found else None


def describe_failure(error: BaseException) -> str:
    """An exception of a callback with its traceback, for a process that cannot raise it to the caller."""
    return "".join(traceback.format_exception(error)).strip()


@functools.cache
def plugin_host(load: Callable[[], Any]) -> PluginHost:
    """Register the plugin with TensorRT, once in a process.

    Args:
        load: gives TensorRT's Python module; the same callable for the same library.

    Raises:
        PluginError: TensorRT does not take it.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = load()
    host = PluginHost()
    host.creator = _make_creator(load, host)
    if not trt.get_plugin_registry().register_creator(host.creator, NAMESPACE):
        raise PluginError(f"{trt.__name__} has a plugin {NAMESPACE}::{HOST_OP_TYPE} already, and refuses another.")
    return host


def _guarded(method: _Method) -> _Method:
    @functools.wraps(method)
    def guarded(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except BaseException as error:
            self.host.keep_failure(error)
            raise

    return guarded  # type: ignore[return-value]


def _make_creator(load: Callable[[], Any], host: PluginHost) -> trt.IPluginCreatorV3One:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = load()
    plugin_class = _make_plugin_class(load)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.host = host
            self.name = HOST_OP_TYPE
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            # Only fields named here are handed over from the node's attributes.
            self.field_names = trt.PluginFieldCollection(  # type: ignore[assignment]  # two names for one thing
                [trt.PluginField(name, b"", trt.PluginFieldType.CHAR) for name in _FIELDS]
            )

        @_guarded
        def create_plugin(
            self, name: str, field_collection: trt.PluginFieldCollection_, phase: trt.TensorRTPhase
        ) -> trt.IPluginV3:
            texts = {field.name: bytes(field.data).rstrip(b"\0").decode() for field in field_collection}
            missing = [field for field in _FIELDS if not texts.get(field)]
            if missing:
                raise PluginError(f"Plugin node {name!r} lacks {', '.join(missing)}: made by another trtbridge?")
            return plugin_class(host, texts, phase == trt.TensorRTPhase.RUNTIME)

    return Creator()


def _make_plugin_class(load: Callable[[], Any]) -> Callable[[PluginHost, dict[str, str], bool], trt.IPluginV3]:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = load()

    class TorchOp(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One plugin node. The engine has one of them a layer, and each execution context a clone of it."""

        def __init__(self, host: PluginHost, texts: dict[str, str], running: bool) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.host = host
            self.texts = texts
            self.running = running
            self.spec = HostSpec.from_json(texts[HOST_ATTRIBUTE])
            self.hosted: HostedOp | None = None
            self.plugin_name = HOST_OP_TYPE
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.num_outputs = len(self.spec.outputs) + len(self.spec.sizes)
            self.timing_cache_id = ""  # without one no time is kept from one build to the next
            self.metadata_string = texts["op"]

        def clone(self) -> trt.IPluginV3:
            # Without a guard: nothing here fails, and TensorRT ends the process if it does.
            return TorchOp(self.host, self.texts, self.running)

        def get_capability_interface(self, type: trt.PluginCapabilityType) -> Any:
            return self

        @_guarded
        def get_output_data_types(self, input_types: Sequence[trt.DataType]) -> list[trt.DataType]:
            expected = [one.dtype for one in self.spec.inputs]
            given = [dtype.name for dtype in input_types]
            if given != expected:
                raise PluginError(
                    f"The plugin node of {self.texts['op']} gets inputs of types {given} inside the engine, and was "
                    f"made for {expected}.\n  called at {self.spec.place}"
                )
            names = [output.dtype for output in self.spec.outputs] + [SIZE_DTYPE] * len(self.spec.sizes)
            return [trt.DataType.__members__[name] for name in names]

        @_guarded
        def get_output_shapes(
            self,
            inputs: Sequence[trt.DimsExprs],
            shape_inputs: Sequence[trt.DimsExprs],
            expr_builder: trt.IExprBuilder,
        ) -> list[trt.DimsExprs]:
            ranks = [len(shape) for shape in inputs]
            if ranks != [one.axes for one in self.spec.inputs]:
                raise PluginError(f"The plugin node of {self.texts['op']} gets inputs of ranks {ranks}.")
            names = {input_size(i, axis): shape[axis] for i, shape in enumerate(inputs) for axis in range(len(shape))}
            builder = _Expressions(expr_builder, self.texts["op"])

            def build(size: Size) -> trt.IDimensionExpr:
                return build_size(size, names, builder)

            first = len(self.spec.outputs)
            for index, size in enumerate(self.spec.sizes):
                names[size_tensor(index)] = expr_builder.declare_size_tensor(
                    first + index, build(size.usual), build(size.most)
                )
            shapes = [trt.DimsExprs(list(map(build, output.shape))) for output in self.spec.outputs]
            return shapes + [trt.DimsExprs(0) for _ in self.spec.sizes]

        @_guarded
        def supports_format_combination(
            self, pos: int, in_out: Sequence[trt.DynamicPluginTensorDesc], num_inputs: int
        ) -> bool:
            names = [one.dtype for one in self.spec.inputs] + [one.dtype for one in self.spec.outputs]
            names += [SIZE_DTYPE] * len(self.spec.sizes)
            desc = in_out[pos].desc
            return desc.format == trt.TensorFormat.LINEAR and desc.type.name == names[pos]

        def configure_plugin(
            self,
            in_: Sequence[trt.DynamicPluginTensorDesc],
            /,
            out: Sequence[trt.DynamicPluginTensorDesc],
        ) -> None:
            """Nothing to choose: one format, and the op finds its own way at each call."""

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one only."""

        def get_workspace_size(
            self,
            in_: Sequence[trt.DynamicPluginTensorDesc],
            /,
            out: Sequence[trt.DynamicPluginTensorDesc],
        ) -> int:
            return 0  # the op takes scratch memory from torch

        def on_shape_change(self, in_: Sequence[trt.PluginTensorDesc], /, out: Sequence[trt.PluginTensorDesc]) -> None:
            """Shapes come with each call."""

        @_guarded
        def attach_to_context(self, resource_context: trt.IPluginResourceContext) -> trt.IPluginV3:
            return self.clone()

        @_guarded
        def get_fields_to_serialize(self) -> trt.PluginFieldCollection_:
            # Kept on the plugin: TensorRT reads the memory after this returns.
            self.kept = [self.texts[name].encode() + b"\0" for name in _FIELDS]
            self.fields = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, data, trt.PluginFieldType.CHAR)
                    for name, data in zip(_FIELDS, self.kept, strict=True)
                ]
            )
            return self.fields  # type: ignore[return-value]

        @_guarded
        def enqueue(
            self,
            input_desc: Sequence[trt.PluginTensorDesc],
            output_desc: Sequence[trt.PluginTensorDesc],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if not self.running:
                return  # the builder times its only choice: the values do not matter, and the op may not be known there
            if self.hosted is None:
                from .run_hosted import HostedOp

                self.hosted = HostedOp(self.texts["op"], self.texts["call"], self.spec)
            device = self.host.device or _current_device()
            shapes = [tuple(desc.dims) for desc in input_desc]
            self.hosted.run(shapes, inputs, outputs, device, stream)

    class _Expressions:
        """TensorRT's expressions, as `build_size` makes them."""

        def __init__(self, builder: trt.IExprBuilder, op: str) -> None:
            self.builder = builder
            self.op = op

        def constant(self, value: int) -> trt.IDimensionExpr:
            return self.builder.constant(value)

        def apply(self, operation: str, left: trt.IDimensionExpr, right: trt.IDimensionExpr) -> trt.IDimensionExpr:
            made: trt.IDimensionExpr | None = self.builder.operation(
                trt.DimensionOperation.__members__[operation], left, right
            )
            if made is None:  # TensorRT would follow the null pointer
                raise PluginError(f"TensorRT cannot compute an output size of {self.op}: {operation} is refused.")
            return made

    return TorchOp


def _current_device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device())
