"""Whatever can be compared, as runners of Polygraphy: a torch module, engines of any backend, an ONNX graph, a file.

All runners of one comparison take their inputs under the same labels, those that a user would write (``x``,
``batch['mask']``), and name their outputs so, too. Complex tensors travel as pairs of reals.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER

from ..errors import InputError
from ..plugins.captures import wait_for_device
from .dtypes import to_torch
from .model import Signature
from .module import EngineModule
from .seeds import seeded
from .structure import Structure, flatten, leaf_labels
from .trace import left_as_found

Array = np.ndarray | torch.Tensor

_WIDER = {
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
}
"""What Polygraphy has no name for, and what holds its values."""


@dataclass(frozen=True)
class Layout:
    """How the flat tensors of a call stand in its arguments.

    Attributes:
        labels: how a user would write each.
        structure: of ``(args, kwargs)``.
        complex_inputs: which tensors are pairs of reals for complex ones.
        dtypes: of each tensor as it is fed.
        ranks: of each tensor.
    """

    labels: tuple[str, ...]
    structure: Structure
    complex_inputs: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, signature: Signature) -> Layout:
        """That of a converted module."""
        return cls(
            signature.labels,
            signature.input_structure,
            signature.complex_inputs,
            tuple(to_torch(spec.dtype) for spec in signature.inputs),
            tuple(len(spec.shape) for spec in signature.inputs),
        )

    def call(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with these tensors in them."""
        made = list(tensors)
        for index in self.complex_inputs:
            made[index] = torch.view_as_complex(made[index].contiguous())
        args, kwargs = self.structure.unflatten(made)
        return args, kwargs


class _Runner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """What the runners share: labels in, labels out, no gradient, the same random numbers in every call.

    Args:
        name: unique in a comparison.
        layout: of the call, with the dtypes that it needs.
        fed: dtypes of the arrays that come; None for those of the layout.
    """

    def __init__(self, name: str, layout: Layout, fed: Sequence[torch.dtype] | None = None) -> None:
        super().__init__(name=name)
        self.layout = layout
        # Polygraphy's own loader makes NumPy arrays, which are never bfloat16.
        plain = [torch.float32 if dtype == torch.bfloat16 else dtype for dtype in layout.dtypes]
        self._fed = plain if fed is None else fed

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for label, dtype, rank in zip(self.layout.labels, self._fed, self.layout.ranks, strict=True):
            metadata.add(label, DataType.from_dtype(_WIDER.get(dtype, dtype)), (None,) * rank)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Array]:
        tensors = [
            to_tensor(feed_dict[label]).to(self.device, dtype)
            for label, dtype in zip(self.layout.labels, self.layout.dtypes, strict=True)
        ]
        args, kwargs = self.layout.call(tensors)
        devices = []
        if self.device.type == "cuda":
            devices = [torch.cuda.current_device() if self.device.index is None else self.device.index]
        with seeded(devices), torch.no_grad():
            _wait(self.device)
            started = time.perf_counter()
            result = self.run(args, kwargs)
            _wait(self.device)
            self.inference_time = time.perf_counter() - started
        return name_outputs(result)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        raise NotImplementedError

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call what is compared."""
        raise NotImplementedError


class EngineRunner(_Runner):
    """Runs an EngineModule.

    Args:
        module: what to run.
        name: of the runner.
        feed: how the inputs come, where they come under other labels or in other dtypes than its own.
    """

    def __init__(self, module: EngineModule, name: str = "trtbridge", feed: Layout | None = None) -> None:
        layout, fed = Layout.of(module.program.signature), None
        if feed is not None:
            if not set(layout.labels) <= set(feed.labels):
                layout = dataclasses.replace(layout, labels=feed.labels)
            dtypes = dict(zip(feed.labels, feed.dtypes, strict=True))
            fed = [dtypes[label] for label in layout.labels]
        super().__init__(name, layout, fed)
        self.module = module
        self._own_shapes = feed is None

    def get_input_metadata_impl(self) -> TensorMetadata:
        if not self._own_shapes:
            return super().get_input_metadata_impl()  # the module itself says better what does not fit
        return input_metadata(self.module.program.signature)

    @property
    def device(self) -> torch.device:
        return self.module.device

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self.module(*args, **kwargs)


class ModuleRunner(_Runner):
    """Runs a torch module in eval mode, as it is or a copy of it in float64; it is left as it was found.

    Args:
        module: what to run; inputs go to the device that its weights are on.
        layout: of its inputs as they come.
        name: of the runner.
        golden: run a copy in float64: the reference for what half and single precision lose.
        dtype: what floats are cast to; None leaves them as they come.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        layout: Layout,
        name: str = "torch",
        golden: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        floats = torch.float64 if golden else dtype
        dtypes = tuple(floats if floats is not None and each.is_floating_point else each for each in layout.dtypes)
        super().__init__(name, dataclasses.replace(layout, dtypes=dtypes), layout.dtypes)
        self.module = module
        self.golden = golden
        self._running: torch.nn.Module | None = None
        self._stack: contextlib.ExitStack | None = None

    @property
    def device(self) -> torch.device:
        return module_device(self.module)

    def activate_impl(self) -> None:
        if self.golden:
            try:
                self._running = copy.deepcopy(self.module).double().eval()
            except Exception as error:
                raise InputError(
                    f'golden="float64": {type(self.module).__name__} cannot be copied ({type(error).__name__}: '
                    f"{error}). Compare with a module in float64 of your own instead."
                ) from error
            return
        self._running = self.module
        with contextlib.ExitStack() as stack:
            stack.enter_context(left_as_found(self.module))
            self.module.eval()
            self._stack = stack.pop_all()

    def deactivate_impl(self) -> None:
        self._running = None
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        assert self._running is not None, "a runner is active while it runs"
        with _full_float32():
            try:
                return self._running(*args, **kwargs)
            except Exception as error:
                if not self.golden:
                    raise
                raise InputError(
                    f'golden="float64": {type(self.module).__name__} fails in float64 ({type(error).__name__}: '
                    f"{error}). Perhaps it makes tensors of another dtype inside. Compare without golden."
                ) from error


def input_metadata(signature: Signature) -> TensorMetadata:
    """Names, dtypes and shapes of the inputs, with their bounds, for a loader of Polygraphy's."""
    metadata = TensorMetadata()
    for label, spec in zip(signature.labels, signature.inputs, strict=True):
        dtype = to_torch(spec.dtype)
        dtype = torch.float32 if dtype == torch.bfloat16 else _WIDER.get(dtype, dtype)
        low, high = ([None if r is None else r[side] for r in spec.ranges] for side in (0, 2))
        bounds = {} if None in low else {"min_shape": low, "max_shape": high}
        shape = [size if isinstance(size, int) else None for size in spec.shape]
        metadata.add(label, DataType.from_dtype(dtype), shape, **bounds)
    return metadata


def name_outputs(result: Any) -> OrderedDict[str, Array]:
    """The tensors and numbers of a result by label, on the CPU: ``output``, ``output[1]``, ``logits``."""
    tensors, structure = flatten(result)
    root = "" if structure.keys else "output"
    found: OrderedDict[str, Array] = OrderedDict(
        zip(leaf_labels(structure, root), map(to_array, tensors), strict=True),
    )
    for label, value in structure.constants(root):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[label] = np.asarray(value)
    return found


def to_array(tensor: torch.Tensor) -> Array:
    """A tensor's values on the CPU, as NumPy has them where it can; complex ones as (..., 2) reals."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.cpu().contiguous()
    tensor = tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))
    return tensor if tensor.dtype == torch.bfloat16 else np.asarray(tensor.numpy())


def to_tensor(array: Array) -> torch.Tensor:
    """The inverse of `to_array`."""
    if isinstance(array, torch.Tensor):
        return array
    array = np.asarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def module_device(module: torch.nn.Module) -> torch.device:
    """Where a module's weights are; the CPU for one without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's log off the user's screen: what matters of it is in the report."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # its errors are raised, too
        yield


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, which torch uses for convolutions unless told: its error is no part of a reference."""
    cudnn, before = torch.backends.cudnn, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        wait_for_device(device)
