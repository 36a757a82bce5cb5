"""Which form of attention a backend takes, and which it runs faster: asked once for each kind of block."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch

from ..errors import BuildError, TrtBridgeError, UnsupportedOpError
from ..plugins.capture_gate import GATE
from ..plugins.captures import OwnGraph, capturing
from ..plugins.streams import own_stream
from .atomic import write_atomically
from .attention_blocks import BlockPair
from .backends.base import Backend, BuildOptions, Context, Engine
from .dtypes import to_torch

logger = logging.getLogger(__name__)

FUSED, DECOMPOSED = "fused", "decomposed"
REPEATED = "fused, keys and values repeated"
"""One node for which keys and values are repeated to the number of query heads; only where heads are shared."""

ONE_NODE = (FUSED, REPEATED)

MOST_VERDICTS = 1024
"""Verdicts kept on disk; beyond that the oldest go."""

_FORMAT = 1
_FLOATS16 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_BATCHES, _BATCH_MS = 9, 4.0


@dataclass(frozen=True)
class Verdict:
    """What is known of one kind of block on one backend and GPU.

    Attributes:
        form: `FUSED`, `REPEATED` or `DECOMPOSED`.
        reason: why, in words.
        fused_ms: median latency of the block alone as one node, None where it was not measured.
        decomposed_ms: likewise in parts.
    """

    form: str
    reason: str
    fused_ms: float | None = None
    decomposed_ms: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.fused_ms is not None and self.decomposed_ms is not None


class Clock(Protocol):
    """Times engines that do the same."""

    def __call__(self, backend: Backend, engines: Sequence[Engine]) -> list[float]:
        """Latency of each engine in ms at the sizes that it is tuned for.

        Raises:
            TrtBridgeError: one of them cannot run.
        """
        ...


@dataclass
class Judge:
    """Asks the builder, and the clock where there is one.

    Attributes:
        backend: what builds.
        options: for building.
        folder: where verdicts are kept; None keeps none.
        clock: None where nothing can be timed.
        place: names the GPU; part of what a verdict is kept under.
    """

    backend: Backend
    options: BuildOptions
    folder: Path | None = None
    clock: Clock | None = None
    place: str = ""
    _known: dict[str, Verdict] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The file of verdicts."""
        return None if self.folder is None else self.folder / "attention.json"

    @cached_property
    def _version(self) -> str:
        return self.backend.status().version

    def judge(self, pair: BlockPair, measures: bool = True) -> Verdict:
        """The form for a block.

        Args:
            pair: the block.
            measures: whether the faster form is asked for; else the node, wherever the backend takes it.
        """
        key = self._key(pair, measures)
        if key not in self._known:
            kept = read_verdicts(self.path).get(key)
            if kept is not None:
                logger.debug("attention %s: %s, from %s", pair.kind, kept, self.path)
            verdict, lasts = (kept, False) if kept is not None else self._ask(pair, measures)
            self._known[key] = verdict
            if lasts:
                keep_verdict(self.path, key, verdict)
        return self._known[key]

    def _key(self, pair: BlockPair, measures: bool) -> str:
        build = self.options
        parts = [
            pair.key, self.backend.name, self._version, self.place, build.tf32,
            build.optimization_level, build.workspace_bytes, list(build.compute_capabilities),
            measures and self.clock is not None, measures,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _ask(self, pair: BlockPair, measures: bool) -> tuple[Verdict, bool]:
        """A verdict, and whether it is worth keeping: not where the clock failed, which may work next time."""
        if measures and pair.element not in _FLOATS16:
            return Verdict(DECOMPOSED, "the kernels for the node are for 16 bits"), False
        started = time.perf_counter()
        one, engine, refusal, lasts = self._build_one_node(pair)
        if engine is None:
            return Verdict(DECOMPOSED, refusal), lasts
        engines = [engine]
        if not measures:
            return Verdict(one, _and("asked for, and the backend takes it", refusal)), lasts
        rule = "not measured: in 16 bits a node that the backend takes was the faster form so far"
        ruled = Verdict(one, _and(rule, refusal))
        if self.clock is None:
            return ruled, lasts
        if pair.decomposed is None:
            return dataclasses.replace(ruled, reason=f"{ruled.reason}; its parts cannot be cut out of the model"), lasts
        try:
            engines.append(self.backend.build(pair.decomposed, self.options))
            fused, decomposed = self.clock(self.backend, engines)
        except (TrtBridgeError, RuntimeError) as error:
            logger.warning("attention %s cannot be timed: %s", pair.kind, error)
            return dataclasses.replace(ruled, reason=f"{ruled.reason}; it cannot be timed: {_words(error)}"), False
        form = one if fused <= decomposed else DECOMPOSED
        logger.info(
            "attention %s: %.4f ms as one node, %.4f ms in parts: %s (measured in %.1f s)",
            pair.kind, fused, decomposed, form, time.perf_counter() - started,
        )  # fmt: skip
        return Verdict(form, _and("measured: it is the faster form", refusal), fused, decomposed), lasts

    def _build_one_node(self, pair: BlockPair) -> tuple[str, Engine | None, str, bool]:
        """The first form of one node that the backend takes.

        Returns:
            The form, its engine (None where it takes none), what it says of those that it does not take, and whether
            it would say so again.
        """
        name, words, lasting = self.backend.name, [], True
        for form, segment in ((FUSED, pair.fused), (REPEATED, pair.repeated)):
            if segment is None:
                continue
            try:
                engine = self.backend.build(segment, self.options)
            except (BuildError, UnsupportedOpError) as error:
                lasting &= isinstance(error, UnsupportedOpError) or error.graph_at_fault
                words.append(_words(error))
            else:
                return form, engine, f"{name} does not take it with shared heads: {words[0]}" if words else "", lasting
        return DECOMPOSED, None, f"{name} does not take the node: {_with_repeats(words)}", lasting


def _with_repeats(words: Sequence[str]) -> str:
    """What is said of the node, and of the one with keys and values repeated where there is one."""
    return f"{words[0]}; nor with keys and values repeated: {words[1]}" if len(words) > 1 else words[0]


def _and(reason: str, refusal: str) -> str:
    return f"{reason}; {refusal}" if refusal else reason


def _words(error: Exception) -> str:
    """The line of an error that says most."""
    refusals = getattr(error, "refusals", ())
    text = refusals[0].reason if refusals else str(error)
    return " ".join(text.split())[:300]


def read_verdicts(path: Path | None) -> dict[str, Verdict]:
    """What a file of verdicts holds; nothing where there is none or it is damaged."""
    if path is None or not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
        if data["format"] != _FORMAT:
            return {}
        return {str(key): _verdict(entry) for key, entry in data["verdicts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("%s is not used, and will be written anew: %s", path, error)
        return {}


def _verdict(entry: Mapping[str, Any]) -> Verdict:
    verdict = Verdict(**entry)
    times = (verdict.fused_ms, verdict.decomposed_ms)
    if verdict.form not in (*ONE_NODE, DECOMPOSED) or not all(
        t is None or (isinstance(t, float) and t > 0) for t in times
    ):
        raise ValueError(f"{entry} is no verdict")
    return verdict


def keep_verdict(path: Path | None, key: str, verdict: Verdict) -> None:
    """Add a verdict to a file, of which the oldest go where there are too many."""
    if path is None:
        return
    verdicts = read_verdicts(path)
    verdicts.pop(key, None)
    verdicts[key] = verdict
    kept = dict(list(verdicts.items())[-MOST_VERDICTS:])
    text = json.dumps({"format": _FORMAT, "verdicts": {k: dataclasses.asdict(v) for k, v in kept.items()}}, indent=1)
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:  # a full disk must not fail a conversion
        logger.warning("what was learnt of attention is not kept: %s", error)


def make_judge(backend: Backend, options: BuildOptions, folder: Path | None, may_measure: bool = True) -> Judge:
    """A judge with a clock where engines of this backend can be timed: on the GPU that they are built for."""
    if backend.name == "onnxruntime" or not torch.cuda.is_available():
        return Judge(backend, options, folder)
    here = torch.cuda.get_device_capability()
    place = f"{torch.cuda.get_device_name()} {here}"
    timed = may_measure and (not options.compute_capabilities or here in options.compute_capabilities)
    return Judge(backend, options, folder, cuda_clock if timed else None, place)


def cuda_clock(backend: Backend, engines: Sequence[Engine]) -> list[float]:
    """Median latency of each engine in ms: CUDA graph replays timed by events, the engines in turns."""
    device = torch.device("cuda", torch.cuda.current_device())
    own = own_stream(device)
    stream = own.stream
    values: dict[str, torch.Tensor] = {}
    calls = []
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
        for engine in engines:
            context = backend.load(engine, device).new_context()
            calls.append(_replay(context, [_example(spec, values, device) for spec in engine.inputs], stream))
        counts = [max(1, min(500, round(_BATCH_MS / max(_timed(call, 5, stream), 1e-3)))) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(_BATCHES):
            for index, call in enumerate(calls):
                times[index].append(_timed(call, counts[index], stream))
    return [statistics.median(each) for each in times]


def _example(spec: Any, values: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """A tensor of ordinary numbers at the sizes that an engine is tuned for; the same for both forms."""
    if spec.name not in values:
        shape = [bounds[1] for bounds in spec.ranges]
        dtype = to_torch(spec.dtype)
        generator = torch.Generator(device).manual_seed(0)
        if dtype.is_floating_point:
            values[spec.name] = torch.randn(shape, generator=generator, device=device).to(dtype)
        else:
            values[spec.name] = torch.ones(shape, dtype=dtype, device=device)
    return values[spec.name]


def _replay(context: Context, inputs: list[torch.Tensor], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """A call as a replay of a CUDA graph, which is how the runtime is used where speed counts."""
    for _ in range(3):
        context(inputs)
    stream.synchronize()
    graph = OwnGraph()
    try:
        with GATE.capture():
            with capturing(graph, stream.device, stream=stream):
                held = context(inputs)
            context(inputs)  # as in graph_capture.py
    except (TrtBridgeError, RuntimeError) as error:
        logger.debug("a block is timed without a CUDA graph: %s", error)
        return lambda: context(inputs)

    alive = (context, inputs, held)  # the graph has their addresses alone

    def replay() -> object:
        graph.replay()
        return alive

    return replay


def _timed(call: Callable[[], Any], count: int, stream: torch.cuda.Stream) -> float:
    """Milliseconds a call, from a batch of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream.synchronize()
    begin.record(stream)
    for _ in range(count):
        call()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / count
