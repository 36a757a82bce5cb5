"""TensorRT and TensorRT-RTX: the same API under two module names. All that differs between them stands here.

This is the one place that imports either. Code that uses the API writes

    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()

and is type-checked once against each flavour and version (scripts/typecheck.py puts that flavour's stubs under the name
``tensorrt``). Where a name exists in RTX alone, the function that uses it begins with

    if TYPE_CHECKING and not RTX:
        return

which type checkers of the other runs take as its end and the running program never does.

Nothing here imports torch: the process that builds engines stays small.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import BackendError, OptionError
from ...plugins.capture_gate import GATE

if TYPE_CHECKING:
    import tensorrt as trt

    RTX = False  # for type checkers alone, set by scripts/typecheck.py: true where ``tensorrt`` stands for TensorRT-RTX


logger = logging.getLogger(__name__)


_TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: backend name and Python module.
        title: its name for people.
        extra: what to install it with.
        builds_without_gpu: engines can be compiled ahead of time on any machine.
        jit: kernels are compiled when an engine first runs, and can be kept.
        refits: the builder makes refittable engines (BuilderFlag.REFIT); else weights are inputs (`trt_weights`).
            TensorRT-RTX 1.6.1 refused all such engines that it was asked for, with a GPU (on an H200, words were
            "MyelinCheckException: hfc.cpp:120 target_sm '90' does not have arch kind assigned") and without; 1.7.1 was
            asked without one, and refused too.
    """

    name: str
    title: str
    extra: str
    builds_without_gpu: bool
    jit: bool
    refits: bool

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    def module(self) -> Any:
        """The library's Python module.

        Raises:
            BackendError: it is not installed, or cannot be loaded.
        """
        try:
            return importlib.import_module(self.name)
        except ImportError as error:
            if not self.is_installed:
                raise BackendError(
                    f"The backend {self.name!r} is not installed. Install {self.title} with: "
                    f"pip install 'trtbridge[{self.extra}]'"
                ) from error
            raise BackendError(f"{self.title} is installed but cannot be loaded: {error}") from error


FLAVOURS = {
    "tensorrt": Flavour("tensorrt", "TensorRT", "tensorrt", builds_without_gpu=False, jit=False, refits=True),
    "tensorrt_rtx": Flavour("tensorrt_rtx", "TensorRT-RTX", "rtx", builds_without_gpu=True, jit=True, refits=False),
}


_environment_lock = threading.Lock()
# What TensorRT-RTX's library in this process has read of the environment: it looks once, so this mirrors its state.
_seen_by_library: dict[str, bool] = {}


@contextmanager
def tf32_environment(flavour: Flavour, tf32: bool, in_this_process: bool = True) -> Iterator[None]:
    """Make TensorRT-RTX heed that TF32 is off, while it builds, loads an engine or makes a context.

    RTX 1.6.1 was seen to use TF32 whatever BuilderFlag.TF32 says; only NVIDIA_TF32_OVERRIDE=0 turns it off. It must be
    the same when building and when loading, and the library reads it once a process. The variable is put back, since
    torch's own libraries read it too.

    Args:
        flavour: TensorRT needs none of this.
        tf32: whether the engine may use TF32.
        in_this_process: whether the library runs here rather than in a child that inherits the environment.

    Raises:
        BackendError: an engine with TF32 was loaded in this process before, so that this one cannot be without.
    """
    if not flavour.jit:
        yield
        return
    with _environment_lock:
        seen = _seen_by_library.setdefault(flavour.name, tf32) if in_this_process else tf32
        if seen and not tf32:
            raise BackendError(
                f"{flavour.title} settles TF32 once a process, and an engine with tf32=True was loaded in this one: "
                "load this engine in another process, or convert it with tf32=True too."
            )
        if tf32 and not seen:
            logger.warning("an engine without TF32 was loaded in this process before, so this one computes without too")
        before = os.environ.get(_TF32_VARIABLE)
        if not tf32:
            os.environ[_TF32_VARIABLE] = "0"
        try:
            yield
        finally:
            if before is not None:
                os.environ[_TF32_VARIABLE] = before
            elif not tf32:
                del os.environ[_TF32_VARIABLE]


def find_capabilities(flavour: Flavour, capabilities: Sequence[tuple[int, int]]) -> list[Any]:
    """TensorRT-RTX's ComputeCapability members for compute capabilities such as (8, 9).

    Raises:
        OptionError: TensorRT-RTX knows no such compute capability, or the flavour takes none.
    """
    if not capabilities:
        return []
    if not flavour.jit:
        raise OptionError(
            "compute_capabilities is for TensorRT-RTX; TensorRT builds for the GPU that is present. "
            'Leave it out or use backend="tensorrt_rtx".'
        )
    if TYPE_CHECKING and not RTX:
        return []
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    for major, minor in capabilities:
        if f"SM{major}{minor}" not in known:
            raise OptionError(
                f"compute_capabilities: {flavour.name} {trt.__version__} cannot build for {major}.{minor}; "
                f"it knows {', '.join(f'{n[2:-1]}.{n[-1]}' for n in known)}. On such a GPU leave the option out."
            )
    return [known[f"SM{major}{minor}"] for major, minor in capabilities]


def target_gpus(
    flavour: Flavour, config: trt.IBuilderConfig, capabilities: Sequence[tuple[int, int]], gpu_present: bool
) -> None:
    """Choose the GPUs that an RTX engine is compiled for: those named, else the one present, else all that it knows.

    Raises:
        OptionError: as `find_capabilities`.
    """
    wanted = find_capabilities(flavour, capabilities)
    if not flavour.jit:
        return
    if TYPE_CHECKING and not RTX:
        return
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    if not wanted and gpu_present:
        wanted = [trt.ComputeCapability.CURRENT]
    if wanted:  # without any the engine is portable
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(capability, index)


class JitCache:
    """The kernels that TensorRT-RTX compiles for one engine, as bytes that a later process can start from, and the
    execution contexts that share them.

    Args:
        flavour: TensorRT compiles none; its contexts are made here all the same.
        engine: what the contexts run.
        blob: kernels of an earlier process.
        kernel_specialization: what happens at new sizes, as in `RuntimeOptions`; None for the library's own choice.
    """

    def __init__(
        self, flavour: Flavour, engine: trt.ICudaEngine, blob: bytes | None, kernel_specialization: str | None = None
    ) -> None:
        self._flavour = flavour
        self._engine = engine
        self._config: trt.IRuntimeConfig | None = None
        if not flavour.jit:
            return
        if TYPE_CHECKING and not RTX:
            return
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module()
        self._config = engine.create_runtime_config()
        if kernel_specialization is not None:
            strategies = trt.DynamicShapesKernelSpecializationStrategy.__members__
            strategy = strategies[kernel_specialization.upper()]
            self._config.dynamic_shapes_kernel_specialization_strategy = strategy
        self._cache = self._config.create_runtime_cache()
        if blob:  # a blob of another version is refused by the library itself and simply not used
            self._cache.deserialize(blob)
        self._config.set_runtime_cache(self._cache)

    def __del__(self) -> None:
        # What makes a thing must outlive it, and the bindings do not see to that here: left to Python the engine would
        # be the first to go. The contexts, of which each has this object, are gone.
        for name in ("_cache", "_config"):
            vars(self).pop(name, None)

    def create_context(self, user_managed: bool) -> trt.IExecutionContext | None:
        """An execution context; None where there is no memory for it.

        Args:
            user_managed: its scratch memory is set afterwards, with ``set_device_memory``.
        """
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._flavour.module()
        strategies = trt.ExecutionContextAllocationStrategy
        strategy = strategies.USER_MANAGED if user_managed else strategies.STATIC
        GATE.enter()
        try:
            if self._config is None:
                return self._engine.create_execution_context(strategy)
            # A context keeps what the config said when it was made.
            self._config.set_execution_context_allocation_strategy(strategy)
            return self._engine.create_execution_context(self._config)
        finally:
            GATE.leave()

    def serialize(self) -> bytes:
        """What was compiled so far; empty where there is no such cache."""
        if TYPE_CHECKING and not RTX:
            return b""
        return b"" if self._config is None else bytes(self._cache.serialize())
