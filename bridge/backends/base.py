"""What a backend is: the small protocol between the plan and whatever builds and runs engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import onnx
import onnx_ir as ir
import torch

from ..model import Origin, TensorSpec

if TYPE_CHECKING:
    from ..plan import PluginCall
    from ..runtime_options import RuntimeOptions
    from .layers import EngineLayers, LayerProfiler

Progress = Callable[[str, float], None]
"""``progress(phase, fraction)``: called while an engine builds; fraction in [0, 1]. Raising KeyboardInterrupt stops."""


@dataclass(frozen=True)
class Segment:
    """An ONNX graph for one engine, with its boundary.

    Attributes:
        name: unique in the plan ("segment0").
        proto: the graph; large initializers are external stand-ins, as in `OnnxModel`.
        weights: their values by name.
        inputs: the graph's inputs in order, with ranges.
        outputs: the graph's outputs in order.
        provenance: origin of every tensor in the graph, for errors.
        hosted: the plugin calls that stay inside the engine.
        refittable: the weights that may be exchanged later, of an engine that is built for it.
    """

    name: str
    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provenance: Mapping[str, Origin] = field(default_factory=dict, repr=False)
    hosted: tuple[PluginCall, ...] = ()
    refittable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        tf32: let fp32 matrix products and convolutions use TF32 (about 1e-4 relative error). Off as for torch.matmul.
        optimization_level: TensorRT's builder optimization level, 0 to 5; None takes its default.
        workspace_bytes: most scratch memory that a layer may use, in bytes; None takes the backend's default.
        compute_capabilities: for TensorRT-RTX the GPUs to build for, as (8, 9) for 8.9; empty builds for the GPU that
            is present, or a portable engine where there is none.
        isolate: parse and build in a child process, so that a crash in the backend ends as a BuildError.
        timeout_s: most seconds that one engine may take to build (isolated builds only); None for no limit.
        cache_dir: where TensorRT keeps how long kernels took; None for the default folder.
        refittable: build engines whose weights (`Segment.refittable`) can be exchanged.
        strip_weights: leave those weights out of the engine; it runs once they have been put in.
        weight_streaming_bytes: most device memory for the weights of one engine, the rest is streamed from the host
            while it runs; None keeps all of them on the device.
    """

    tf32: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    isolate: bool = True
    timeout_s: float | None = None
    cache_dir: str | os.PathLike[str] | None = None
    refittable: bool = False
    strip_weights: bool = False
    weight_streaming_bytes: int | None = None


@dataclass(frozen=True)
class Engine:
    """A built segment: opaque bytes and what is known of them.

    Attributes:
        backend: name of the backend that made it and can load it.
        parts: named blobs (for TensorRT ``engine.plan``; for ONNX Runtime ``model.onnx`` and ``weights.bin``).
        info: JSON-ready facts: versions, compute capability, layers (name, type, precision), options used, and
            ``plugins``, those inside the engine (op, node, place in the user's program), and ``stripped``, whether it
            lacks its weights. On TensorRT ``refit`` says how it takes others: "engine", the library exchanges those in
            the plan, or "inputs", they lie beside it (``weight_input_bytes`` of them).
        inputs: binding specs in the order that the executable takes them.
        outputs: binding specs in the order that the executable returns them.
    """

    backend: str
    parts: Mapping[str, bytes | bytearray | memoryview]
    info: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(part) for part in self.parts.values())


@dataclass(frozen=True)
class Refusal:
    """A node that the backend's parser does not take.

    Attributes:
        node: its name in the graph.
        op_type: its ONNX op.
        outputs: its output tensors.
        reason: the backend's own words.
        inputs: its inputs' types and shapes.
        origin: where it comes from.
    """

    node: str
    op_type: str
    outputs: tuple[str, ...]
    reason: str
    inputs: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)

    def __str__(self) -> str:
        inputs = f" with inputs {', '.join(self.inputs)}" if self.inputs else ""
        return f"{self.op_type} (node {self.node!r}){inputs}\n    from {self.origin}\n    {self.reason}"


@dataclass(frozen=True)
class BackendStatus:
    """What a backend can do on this machine.

    Attributes:
        name: the backend.
        version: of its library, "" where not installed.
        can_build: it can build engines here.
        can_run: it can run engines here.
        reason: why not, and what to do; "" where it can do both.
        devices: torch device types that its engines run on here ("cuda", "cpu").
    """

    name: str
    version: str = ""
    can_build: bool = False
    can_run: bool = False
    reason: str = ""
    devices: tuple[str, ...] = ()


class Context(Protocol):
    """An execution context: runs its engine, one call at a time.

    Calling it takes contiguous tensors of the binding dtypes on the executable's device, in the order of
    ``Engine.inputs``, and returns fresh tensors in the order of ``Engine.outputs``. It enqueues on torch's current
    stream, which is never the default one, and may return before the work is done; on a CPU it returns when done. Calls
    on different streams must be put in order by whoever makes them.
    """

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]: ...


class Executable(Protocol):
    """An engine loaded on a device.

    Attributes:
        device: where it runs.
        workspace_bytes: scratch memory that a context needs on the device, in bytes; 0 where it cannot be given any.
    """

    device: torch.device
    workspace_bytes: int

    def new_context(self, workspace: torch.Tensor | None = None) -> Context:
        """A context for one call at a time.

        Args:
            workspace: (``workspace_bytes`` or more,) uint8 on ``device``, scratch memory that it may share with
                contexts that run before or after it; None lets it have its own. It must live as long as the context.

        Raises:
            ExecutionError: there is no memory for it.
        """
        ...


@runtime_checkable
class Exchanging(Protocol):
    """An executable that may take other weights while its contexts, and the CUDA graphs of them, stay."""

    def exchange(self, engine: Engine) -> Callable[[], None] | None:
        """What puts the weights of an engine in the place of its own.

        Args:
            engine: differs in its weights alone from the one that is loaded (`Backend.refit`).

        Returns:
            To be called while no context runs; it waits until it is done. None where the engine must be loaded anew.

        Raises:
            RefitError, ModelFileError: the engine has no such weights, or is damaged.
        """
        ...


class Backend(Protocol):
    """Builds engines from segments and loads them."""

    name: str

    def status(self) -> BackendStatus:
        """What it can do here. Never raises."""
        ...

    def check_options(self, options: BuildOptions) -> None:
        """Refuse, before any work, options that this backend cannot heed.

        Raises:
            OptionError: an option is not for this backend, or has a value that it does not know.
        """
        ...

    def check_runtime(self, options: RuntimeOptions) -> None:
        """Refuse, before any work, run-time options that this backend cannot heed.

        Raises:
            OptionError: an option is not for this backend.
        """
        ...

    def plugin_refusal(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        """Why a plugin call cannot stay inside an engine, in words for people; "" where it can.

        Args:
            call: the call.
            input_specs: its inputs as they are in the engine, in the order of ``call.inputs``.
        """
        ...

    def host_spec(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        """The ``host`` attribute of a plugin node that stays inside an engine; arguments as for `plugin_refusal`.

        Raises:
            PluginError: it cannot stay inside.
        """
        ...

    def builds_apart(self, options: BuildOptions, parse_only: bool) -> bool:
        """Whether segments can be built (or only parsed) at the same time: in processes of their own, and untimed."""
        ...

    def check(self, segment: Segment, options: BuildOptions) -> list[Refusal]:
        """Ask the parser alone: every node that it refuses, empty where it takes all.

        Raises:
            BackendError: not installed, or cannot build here.
            BuildError: the parser died.
        """
        ...

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        """Build an engine.

        Raises:
            BackendError: not installed, or cannot build here.
            UnsupportedOpError: the parser refuses nodes; all of them are named.
            BuildError: the builder failed, died or ran out of time.
        """
        ...

    def refit(self, engine: Engine, weights: Mapping[str, ir.TensorProtocol], device: torch.device) -> Engine:
        """A copy of an engine with other weights.

        Args:
            engine: built by this backend, refittable; it is not changed.
            weights: by name, at least all that the engine may exchange (`Segment.refittable`); read one at a time.
            device: where to work, for backends that need a device for that.

        Raises:
            BackendError: not installed, or cannot work here.
            RefitError: the engine does not take them.
        """
        ...

    def identity(self, options: BuildOptions) -> Mapping[str, Any]:
        """What decides the engines that it builds, beside the graph and the options, JSON-ready.

        Its library's versions, and of this machine what an engine is made for. Where any of it differs, an engine from
        the cache is not taken.
        """
        ...

    def parsed(self, segment: Segment) -> onnx.ModelProto:
        """The graph that its library gets in place of the segment's; the segment's own where that is the same."""
        ...

    def revive(self, engine: Engine, segment: Segment) -> Engine:
        """An engine from the cache, with what it tells of places in the user's program taken from a segment.

        Args:
            engine: was built from a segment that differs from this one in such places at most.
            segment: what an engine is wanted for.
        """
        ...

    def load(
        self,
        engine: Engine,
        device: torch.device,
        cache_dir: Path | None = None,
        options: RuntimeOptions | None = None,
        beside_plugins: bool = False,
    ) -> Executable:
        """Make an engine ready to run on a device.

        Args:
            engine: built by this backend.
            device: where it runs.
            cache_dir: folder for what is compiled at load time (TensorRT-RTX's JIT kernels); None keeps nothing.
            options: how it runs; None for the default.
            beside_plugins: its calls take turns with plugins, which are torch's work.

        Raises:
            BackendError: not installed, no such device, or the engine was built for another GPU or version.
            PluginError: a plugin op inside the engine is not registered in this process.
        """
        ...

    def load_profiler(self, engine: Engine, device: torch.device, cache_dir: Path | None = None) -> LayerProfiler:
        """Load an engine once more, for measuring its layers; arguments as for `load`.

        Raises:
            BackendError, PluginError: as `load`.
        """
        ...

    def layers(self, engine: Engine, device: torch.device) -> EngineLayers | None:
        """What the engine was fused into; None where nobody can tell here.

        Raises:
            BackendError: not installed, or the engine was built for another GPU or version.
        """
        ...
