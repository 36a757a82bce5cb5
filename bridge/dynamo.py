"""``torch.compile(model, backend="trtbridge", options={...})``: each graph that dynamo finds becomes engines.

The backend is found by its entry point, ``torch_dynamo_backends`` in pyproject.toml. A graph is converted when it is
first called, so that conversion sees real values and its errors are the caller's own. Weights, which dynamo passes as
inputs, become part of the engine. Whatever cannot be an engine, or may not be one, runs in PyTorch and says why.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import BackendError, DynamicShapeError, InputError, OptionError
from .chosen_nodes import NothingFitsError
from .convert import convert
from .dynamo_graph import ClosedGraph, Inputs, Shapes, number_in, read_inputs, why_not, without_dims
from .module import EngineModule
from .options import Options

_SINGLE_SIZE = re.compile(r"^\s*(\w+) = (\d+)$", re.MULTILINE)
"""What torch.export suggests for a dimension that cannot vary."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileOptions:
    """What ``options=`` of torch.compile may hold beside the options of `convert`.

    Attributes:
        on_failure: "eager" runs a graph that cannot be an engine in PyTorch, with one warning in the log; "raise"
            raises the error when the graph is called.
        max_size: largest size of dimensions that dynamo made dynamic without a bound; None for eight times the size
            that was seen first, but at least 64. `torch._dynamo.mark_dynamic(x, 0, min=1, max=32)` bounds one alone.
        check_weights: look at every call whether a weight was changed or replaced, which an engine would not notice.
            False saves that time, some 0.1 µs a weight.
        backend: "auto", "tensorrt", "tensorrt_rtx" or "onnxruntime"; "auto" is ONNX Runtime for tensors on a CPU.
    """

    on_failure: str = "eager"
    max_size: int | None = None
    check_weights: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.on_failure not in ("eager", "raise"):
            raise OptionError(f'on_failure={self.on_failure!r}: must be "eager" or "raise".')
        size = self.max_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2):
            raise OptionError(f"max_size={size!r}: must be a size from 2 on.")
        if not isinstance(self.check_weights, bool):
            raise OptionError(f"check_weights={self.check_weights!r}: must be True or False.")

    @classmethod
    def split(cls, given: Mapping[str, Any]) -> tuple[CompileOptions, dict[str, Any]]:
        """These options, and those that are convert()'s.

        Raises:
            OptionError: one is unknown or impossible.
        """
        own = {field.name for field in fields(cls)}
        for name in ("args", "kwargs", "dynamic_shapes"):
            if name in given:
                raise OptionError(
                    f"torch.compile finds {name} by itself; leave it out of options. "
                    "torch._dynamo.mark_dynamic(x, 0, min=1, max=32) makes a dimension dynamic."
                )
        rest = {name: value for name, value in given.items() if name not in own}
        try:
            Options.make(rest)
        except OptionError as error:
            raise OptionError(f"{error} torch.compile takes these as well: {', '.join(sorted(own))}.") from None
        return cls(**{name: value for name, value in given.items() if name in own}), rest


def trtbridge_backend(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as dynamo calls it.

    Args:
        graph: what dynamo found.
        example_inputs: its inputs.
        options: those of `convert` and of `CompileOptions`.
        mode: none.

    Returns:
        What runs instead of the graph. Wrong options raise `OptionError` when it is called: raised here, the error
        would come out of dynamo as a BackendCompilerFailed.
    """
    try:
        if mode is not None:
            raise OptionError(f'backend="trtbridge" has no modes, got mode={mode!r}; see tb.Options for its options.')
        own, rest = CompileOptions.split(options or {})
    except (OptionError, TypeError) as error:
        kind, words = type(error), str(error)  # the error itself would keep the frames that it has passed

        def complain(*_: Any) -> Any:
            raise kind(words)

        return complain
    return CompiledGraph(graph, read_inputs(graph, own.max_size), own, rest)


class CompiledGraph:
    """One of dynamo's graphs: engines from its first call on, or PyTorch with the reason."""

    def __init__(
        self, graph: torch.fx.GraphModule, inputs: Inputs, own: CompileOptions, options: Mapping[str, Any]
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._own = own
        self._options = options
        self._lock = threading.Lock()
        self._engine: EngineModule | None = None
        self._eager = False
        self._said: set[str] = set()
        self._numbers: dict[int, int | float] = {}
        self._weights: list[tuple[int, weakref.ref[torch.Tensor], int, int]] = []
        nodes = sum(node.op.startswith("call_") for node in graph.graph.nodes)
        self._placeholders = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self._name = (
            f"the graph of {nodes} call(s) at {inputs.place}" if inputs.place else f"a graph of {nodes} call(s)"
        )

    def __call__(self, *inputs: Any) -> Any:
        engine = self._engine or self._convert(inputs)
        if engine is None:
            return self._graph(*inputs)
        if self._own.check_weights and self._weights_changed(inputs):
            self._leave("a weight was changed or replaced after the engine was built: compile the model again")
            return self._graph(*inputs)
        for place, number in self._numbers.items():
            if number_in(inputs[place]) != number:
                return self._not_now(inputs, InputError(f"{self._placeholders[place]} is fixed at {number}"))
        try:
            return engine(*[inputs[place] for place in self._inputs.tensors])
        except InputError as error:
            # Sizes outside the engine's range; dynamo's guards have seen to all else.
            return self._not_now(inputs, error)

    def _not_now(self, inputs: Sequence[Any], error: InputError) -> Any:
        """Run one call in PyTorch, or raise the error."""
        if self._own.on_failure == "raise":
            try:
                raise error
            finally:
                del error  # or it would keep this frame, and the frame it
        self._say(
            f"for this call, since the engine does not take it: {error}\n"
            "options={'max_size': N} or torch._dynamo.mark_dynamic(x, dim, min=, max=) set the range of a size"
        )
        return self._graph(*inputs)

    def _convert(self, inputs: Sequence[Any]) -> EngineModule | None:
        if self._eager:
            return None
        with self._lock:
            if self._engine is not None or self._eager:
                return self._engine
            reason = self._inputs.problem or why_not(self._graph, self._inputs, inputs)
            if reason:
                self._leave(reason)
                return None
            tensors = tuple(inputs[place].detach() for place in self._inputs.tensors)
            weights = {place: inputs[place] for place in self._inputs.weights}
            numbers = {place: number_in(inputs[place]) for place in self._inputs.numbers}
            device = tensors[0].device
            backend = self._own.backend
            if backend == "auto" and device.type == "cpu":
                backend = "onnxruntime"  # an engine of another backend could be built for a CPU, but not run there
            start = time.perf_counter()
            closed = ClosedGraph(self._graph, self._inputs, weights, numbers)
            try:
                engine = self._built(closed, tensors, {"device": device, **self._options}, backend)
            except OptionError:
                raise
            except Exception as error:
                if self._own.on_failure == "raise":
                    raise
                self._leave(f"{type(error).__name__}: {error}")
                return None
            seconds = time.perf_counter() - start
            logger.info("%s became %s in %.1f s", self._name, engine.extra_repr(), seconds)
            self._weights = [(p, weakref.ref(w), _version(w), w.data_ptr()) for p, w in weights.items()]
            self._numbers = numbers
            self._engine = engine
            return engine

    def _built(
        self, graph: ClosedGraph, tensors: tuple[torch.Tensor, ...], options: Mapping[str, Any], backend: str
    ) -> EngineModule:
        """Convert, without what is meant for another of dynamo's graphs."""
        while True:
            try:
                return _convert(graph, tensors, self._inputs.shapes, options, backend)
            except NothingFitsError as error:
                logger.warning("trtbridge: for %s an entry is left out: %s", self._name, error)
                options = error.without_it(options)

    def _weights_changed(self, inputs: Sequence[Any]) -> bool:
        for place, known, version, pointer in self._weights:
            given: torch.Tensor = inputs[place]
            if known() is not given or _version(given) != version or given.data_ptr() != pointer:
                return True
        return False

    def _leave(self, reason: str) -> None:
        """Run in PyTorch from now on.

        Raises:
            BackendError: that is not wanted.
        """
        self._engine = None
        if self._own.on_failure == "raise":
            raise BackendError(f"{self._name} cannot run as an engine (on_failure='raise'): {reason}.")
        self._eager = True
        self._say(f"because {reason}")

    def _say(self, reason: str) -> None:
        kind = reason.partition(":")[0]
        if kind not in self._said:  # once a graph and reason
            self._said.add(kind)
            logger.warning("trtbridge: %s runs in PyTorch %s.", self._name, reason.rstrip("."))


def _convert(
    graph: ClosedGraph,
    tensors: tuple[torch.Tensor, ...],
    shapes: Shapes,
    options: Mapping[str, Any],
    backend: str,
) -> EngineModule:
    """Convert; dimensions that dynamo holds for dynamic, but that have one possible size, become static."""
    while True:
        try:
            return convert(graph, tensors, dynamic_shapes=shapes, backend=backend, **options)
        except DynamicShapeError as error:
            single = dict(_SINGLE_SIZE.findall(str(error)))
            fewer = without_dims(shapes, single)
            if fewer == shapes:
                raise
            logger.info("dimensions of one possible size: %s", ", ".join(f"{k} = {v}" for k, v in single.items()))
            shapes = fewer


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; inference tensors do not count that."""
    return -1 if tensor.is_inference() else tensor._version
