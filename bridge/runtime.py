"""Runs a program on a device: engines and plugin calls over named tensors, on one stream or as one CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..errors import ExecutionError
from ..plugins.captures import wait_for_device
from ..plugins.driver import DriverError
from ..plugins.streams import OwnStream, own_stream
from .annotation import current_mark
from .backends import get_backend
from .backends.base import Backend, Exchanging, Executable
from .cuda_driver import capture_of, wait_for_ends
from .cuda_graphs import GraphCache
from .graph_capture import Capturer
from .graph_sets import GraphSets, half_is_free
from .host_thread import HostCalls
from .lanes import Lane, LaneMaker, LanePool
from .program import EngineStep, Program
from .runtime_options import RuntimeOptions
from .runtime_steps import RunStep, StepRunner, capture_problem, engine_step, plugin_step, require_ops

logger = logging.getLogger(__name__)


class RunningProgram:
    """A program whose engines are loaded on a device.

    Args:
        program: what to run.
        device: where.
        cache_dir: where compiled kernels are kept.
        backend: what loads the engines; None for the one that the program names.
        options: how calls run.

    Raises:
        BackendError: the backend is missing, or cannot run these engines on that device.
        PluginError: a plugin op is not registered in this process.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        cache_dir: Path | None,
        backend: Backend | None = None,
        options: RuntimeOptions | None = None,
    ) -> None:
        backend = backend or get_backend(program.backend)
        options = options or RuntimeOptions()
        require_ops(program)
        self.device = device
        with torch.inference_mode(False):  # they may be written to later, in whatever mode
            self._constants = {name: tensor.to(device) for name, tensor in program.constants.items()}
        problem = capture_problem(program)
        loading = dataclasses.replace(options, cuda_graphs=False) if problem else options
        has_plugins = bool(program.plugin_calls)
        steps: list[RunStep] = []
        self._executables: list[Executable | None] = []
        for step in program.steps:
            if isinstance(step, EngineStep):
                steps.append(engine_step(step.engine))
                self._executables.append(backend.load(step.engine, device, cache_dir, loading, has_plugins))
            else:
                steps.append(plugin_step(step, device, program.signature.dims))
                self._executables.append(None)
        # What is handed on from here does not lead back to this object: a cycle of references would keep contexts,
        # scratch memory and graphs until Python's garbage collector comes by, which on a quiet host is never.
        self._run = StepRunner(program, steps, self._constants)
        shares = options.share_workspace and device.type == "cuda"
        self._make_lane = LaneMaker(self._executables, device, shares, reads=self._constants)
        # One set of contexts is made now, so that a lack of memory shows when the program is loaded.
        self._lanes = LanePool(self._make_lane, options.max_contexts)
        self._lanes.give(self._lanes.take())
        # Where the host waits for the device within a call, others go on meanwhile.
        self._host = HostCalls(device.index) if device.type == "cuda" and not problem else None
        self._captured: dict[tuple[int, int], Lane] = {}  # by stream and capture of the caller
        self._overlap = options.overlaps(program.backend)
        self._count_lock = threading.Lock()
        self._local = threading.local()
        self._calls = 0
        self._graphs, self.graph_refusal = self._make_graphs(problem, options)
        if options.cuda_graphs is True and self.graph_refusal:
            logger.warning("cuda_graphs=True, but calls run without CUDA graphs: %s", self.graph_refusal)

    # Calls

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on tensors that fit the signature; outputs are fresh.

        On CUDA the work is ordered with torch's current stream, and the call may return before it is done.
        """
        with self._count_lock:
            self._calls += 1
        if self.device.type != "cuda":
            return self._run_in_lane(inputs)
        if torch._C._cuda_getDevice() == self.device.index:  # a third of the time of torch.cuda.current_device()
            return self._call_on_device(inputs)
        with torch.cuda.device(self.device):
            return self._call_on_device(inputs)

    def _call_on_device(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if torch.cuda.is_current_stream_capturing():
            return self._run_in_capture(inputs)
        # Ranges around single steps need the steps: `tb.annotate` sees plain calls.
        graphs = self._graphs if current_mark() is None else None
        if graphs is not None and (outputs := graphs.call(inputs)) is not None:
            return outputs
        caller = torch.cuda.current_stream()
        if caller != torch.cuda.default_stream():
            return self._run_in_lane(inputs, caller)
        # TensorRT synchronizes when given the default stream, so the work goes to one of our own, with events.
        own = self._own_stream()
        own.wait_stream(caller)
        with torch.cuda.stream(own):
            outputs = self._run_in_lane(inputs, own)
        caller.wait_stream(own)
        for tensor in inputs:
            tensor.record_stream(own)  # its memory must not be given away before our stream has read it
        for tensor in outputs:
            tensor.record_stream(caller)
        return outputs

    @torch.no_grad()
    def run_all(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run, wait, and return every tensor that crosses from one step to the next, by name."""
        lane = self._lanes.take()
        try:
            if self.device.type != "cuda":
                return self._run.run_all(inputs, lane)
            with torch.cuda.device(self.device), torch.cuda.stream(self._own_stream()):
                wait_for_device(self.device)
                environment = self._run.run_all(inputs, lane)
                wait_for_device(self.device)
            return environment
        finally:
            self._lanes.give(lane)

    def bind(self, inputs: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """A call that reads these very tensors, whatever they hold by then, and always returns the same tensors.

        Where calls run as CUDA graphs it is a replay and nothing else. Its results are valid until the module's next
        call.
        """
        if self._graphs is not None and (replay := self._graphs.bind(inputs)) is not None:
            return self._bound_replay(replay)
        results: list[torch.Tensor] = []

        def run() -> list[torch.Tensor]:
            fresh = self(inputs)
            if [t.shape for t in results] != [t.shape for t in fresh]:  # the first time, or sizes depend on data
                results[:] = fresh
            with torch.no_grad():
                for target, source in zip(results, fresh, strict=True):
                    if target is not source:
                        target.copy_(source)
            return list(results)

        return run

    # Life

    @contextmanager
    def exclusive(self) -> Iterator[list[Executable | None]]:
        """Wait until no call is under way, keep new ones from beginning, and let go of all contexts and CUDA graphs.

        What happens to the engines inside is seen by the next call: they may be changed in place, or replaced in the
        list that this yields (one entry a step, None for a plugin). Graphs that a caller captured keep their contexts.
        """
        with self._at_rest(keep=False):
            if self._graphs is not None:
                self._graphs.clear()
            yield self._executables

    def exchange(self, program: Program) -> bool:
        """Take the weights of a program in place, where all engines can: contexts and CUDA graphs stay, a caller's too.

        Args:
            program: differs from the one that runs in its weights alone.

        Returns:
            Whether that was done; where not, nothing has changed, and the program must be loaded anew.

        Raises:
            RefitError, ModelFileError: an engine's weights cannot be read; nothing has changed.
        """
        if self.device.type != "cuda":
            return False
        exchanges: list[Callable[[], None]] = []
        for step, executable in zip(program.steps, self._executables, strict=True):
            if isinstance(step, EngineStep):
                done = executable.exchange(step.engine) if isinstance(executable, Exchanging) else None
                if done is None:
                    return False
                exchanges.append(done)
        changed = program.recipes.constants if program.recipes is not None else ()
        with self._at_rest(keep=True), torch.no_grad():
            for exchange in exchanges:
                exchange()
            for name in changed:
                self._constants[name].copy_(program.constants[name])
            torch.cuda.current_stream(self.device).synchronize()
        return True

    @contextmanager
    def _at_rest(self, keep: bool) -> Iterator[None]:
        """No call is under way on the host or on the device, and none begins.

        The device as a whole is not waited for: that is an error while some other stream is captured.
        """
        graphs = self._graphs
        with graphs.held() if graphs is not None else nullcontext(), self._lanes.all_idle(keep) as lanes:
            if graphs is not None:
                graphs.wait()
            for lane in lanes:
                lane.wait()
            yield

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory that one call needs on the device, in bytes."""
        return self._make_lane.workspace_bytes

    def counters(self) -> Mapping[str, int]:
        """What happened since it was loaded and what there is now, for `stats.Stats`, which tells what each means."""
        graphs = self._graphs
        captured = 0 if graphs is None else len(graphs)
        counted = {} if graphs is None else graphs.counters
        replays = counted.get("graph_replays", 0)
        sets = graphs.sets if graphs is not None and captured else 0
        return {
            "calls": self._calls,
            "plain_calls": self._calls - replays,
            "graph_replays": replays,
            "captured_graphs": captured,
            "graph_captures": counted.get("graph_captures", 0),
            "graph_evictions": counted.get("graph_evictions", 0),
            "contexts": self._lanes.made,
            "workspace_bytes": self.workspace_bytes * (self._lanes.made + sets),
        }

    # Parts

    def _run_in_lane(
        self, inputs: Sequence[torch.Tensor], stream: torch.cuda.Stream | None = None
    ) -> list[torch.Tensor]:
        """A plain call, on torch's current stream, which is `stream` where there is CUDA."""
        lane = self._lanes.take()
        try:
            if self._host is None:
                return self._run_in_order(inputs, lane)
            # The lane is the caller's, whoever makes the call: so work of several threads overlaps on the device.
            shapes = tuple(tensor.shape for tensor in inputs)
            return self._host(shapes, lambda: self._run_in_order(inputs, lane), stream)
        finally:
            self._lanes.give(lane)

    def _run_in_order(self, inputs: Sequence[torch.Tensor], lane: Lane) -> list[torch.Tensor]:
        if lane.order is None:
            return self._run(inputs, lane)
        lane.order.enter()
        try:
            return self._run(inputs, lane)
        finally:
            lane.order.leave()

    def _run_in_capture(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run within the capture of a CUDA graph by the caller.

        A replay may come at any time, so the contexts and their scratch memory belong to that graph from now on. Calls
        on one stream of one capture share them: the graph runs them one after the other.
        """
        stream = torch.cuda.current_stream().cuda_stream
        number, graph = capture_of(stream)
        key = (stream, number)
        lane = self._captured.get(key)
        if lane is None:
            # A capture begins with a synchronization, so that nothing of before still runs in the lane.
            lane = self._lanes.keep_idle()
            if lane is None:
                raise ExecutionError(
                    "A CUDA graph capture needs an idle execution context, and none can be made during a capture: "
                    "call the module once with inputs of these shapes, outside the capture, right before it."
                )
            self._captured[key] = lane
        outputs = self._run(inputs, lane)
        if not self._overlap:
            try:
                wait_for_ends(graph)
            except DriverError as error:
                raise ExecutionError(
                    f"The kernels of this call, which overlap, cannot be put in order within the CUDA graph: {error}. "
                    "Its replays would be wrong now and then beside other work on the device (docs/runtime.md); "
                    "overlap_kernels=True leaves them as they are."
                ) from error
        return outputs

    def _bound_replay(self, replay: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            self._calls += 1
            return list(replay())

        return run

    def _make_graphs(self, problem: str, options: RuntimeOptions) -> tuple[GraphSets | None, str]:
        """The graphs of this program, or None and why there are none; `problem` is the program's own reason."""
        if self.device.type != "cuda":
            return None, f"calls on {self.device} have none"
        if not options.cuda_graphs:
            return None, "cuda_graphs=False"
        if problem:
            return None, problem
        # Without a reference to this object, as above.
        run, make_lane, device, overlap = self._run, self._make_lane, self.device, self._overlap

        def make(may_measure: bool) -> GraphCache:
            measures = may_measure and options.cuda_graphs == "auto"
            capturer = Capturer(run, make_lane, device, overlap)
            return GraphCache(capturer, options.max_graphs, measures, not options.reuse_outputs)

        def stream() -> int:
            return torch._C._cuda_getCurrentRawStream(device.index)

        return GraphSets(make, options.parallel_replays, stream, lambda: half_is_free(device)), ""

    def _own_stream(self) -> torch.cuda.Stream:
        own: OwnStream | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = own_stream(self.device)
        stream: torch.cuda.Stream = own.stream
        return stream
