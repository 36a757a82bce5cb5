"""Passes over an ONNX graph, and the pipeline that runs and checks them."""

from __future__ import annotations

import abc
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from ..errors import ModelFileError, PassError
from . import checks
from .dump import GraphDump
from .exchange import Exchange, iterate_stand_ins, stand_in_name
from .graph_diff import diff
from .numbers import Runner
from .reports import PassReport, PipelineReport, PipelineResult, Refusal
from .surgery import describe, scopes
from .trust import Comparison

__all__ = ["Notes", "Pass", "PassReport", "Pipeline", "PipelineReport", "PipelineResult", "Refusal"]

_log = logging.getLogger("trtbridge.passes")

_MOST_SWEEPS = 4
"""How often a pass runs at most, should passes undo each other's work."""


class Pass(abc.ABC):
    """One rewrite of a graph. A subclass is a frozen dataclass; its fields are its options.

    A pass is idempotent: a second run rewrites nothing. It refuses what it cannot do exactly, and says why. Its
    docstring draws a graph before and after.

    Attributes:
        after: kinds of passes that must not come later in the same pipeline.
        changes_io: whether it may change the dtypes of the model's inputs and outputs. Names, order and shapes never
            change.
    """

    after: ClassVar[tuple[type[Pass], ...]] = ()
    changes_io: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        """Rewrite a graph in place.

        Args:
            graph: the main graph; `surgery.scopes` gives its subgraphs too.
            notes: the model's weights and names, and where near misses are noted.

        Returns:
            The number of rewrites.
        """

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def tolerance(self) -> float | None:
        """How far it may change an output where numbers are compared, relative to the output's largest magnitude.

        None, for a pass that is exact but for the order of sums: what the comparison itself allows. A pass that
        changes precision says more.
        """
        return None


class Notes:
    """What a pass knows besides the graph, and where it notes near misses.

    Attributes:
        opset: version of the standard ONNX operators in this model.
        ranges: (least, largest) size of named dimensions, whatever profile a call fits; empty where not known.
    """

    def __init__(
        self,
        opset: int,
        weights: Mapping[str, ir.TensorProtocol],
        names: set[str],
        ranges: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.opset = opset
        self.ranges: Mapping[str, tuple[int, int]] = dict(ranges or {})
        self._refusals: dict[Refusal, None] = {}  # In the order in which they came, each once.
        self._weights = weights
        self._names = names
        self._counters: dict[str, Iterator[int]] = {}

    def refused(self, node: gs.Node, reason: str) -> None:
        """Note a node that almost fits and why it is left alone."""
        refusal = Refusal(describe(node), reason)
        if refusal not in self._refusals:
            self._refusals[refusal] = None
            _log.debug("refused %s: %s", *refusal)

    def take_refusals(self) -> tuple[Refusal, ...]:
        """The near misses noted since the last call."""
        taken = tuple(self._refusals)
        self._refusals.clear()
        return taken

    def values(self, tensor: gs.Constant) -> np.ndarray:
        """The values of a constant. For a stand-in this reads the weight, so look at `surgery.nbytes` first.

        Raises:
            PassError: the values are neither in the proto nor among the weights.
        """
        if isinstance(tensor._values, np.ndarray):
            return tensor._values
        key = stand_in_name(tensor)
        if key is not None:
            return self._weights[key].numpy()
        lazy = isinstance(tensor._values, LazyValues) and not isinstance(tensor._values, SparseValues)
        if not lazy or tensor._values.tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise PassError(f"The values of constant {tensor.name!r} are not at hand: sparse, or in another file.")
        return numpy_helper.to_array(tensor._values.tensor)

    def fresh_name(self, base: str) -> str:
        """A name that nothing in the model has, made from `base`; it is taken from now on."""
        counter = self._counters.setdefault(base, itertools.count(1))
        name = base
        while name in self._names:
            name = f"{base}_{next(counter)}"
        self._names.add(name)
        return name

    def constant(self, values: np.ndarray | np.generic, base: str) -> gs.Constant:
        """A new constant with a fresh name."""
        return gs.Constant(self.fresh_name(base), np.asarray(values))

    def variable(self, like: gs.Tensor, base: str, shape: list[int | str | None] | None = None) -> gs.Variable:
        """A new tensor with a fresh name and the dtype of another."""
        return gs.Variable(self.fresh_name(base), dtype=like.dtype, shape=shape)


@dataclass(frozen=True)
class Pipeline:
    """An immutable list of passes.

    Attributes:
        passes: in the order in which they run.

    Raises:
        PassError: something in the list is no pass, or a pass comes before one that it must follow.
    """

    passes: tuple[Pass, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for position, item in enumerate(self.passes):
            if not isinstance(item, Pass):
                raise PassError(f"{item!r} is no pass: give an instance of a subclass of trtbridge.passes.Pass.")
            for later in self.passes[position + 1 :]:
                if isinstance(later, item.after):
                    raise PassError(f"{item.name} must come after {later.name}; swap them in the pipeline.")

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def without(self, kind: type[Pass]) -> Pipeline:
        """This pipeline less all passes of one kind.

        Raises:
            PassError: it has none.
        """
        self._find(kind)
        return Pipeline(tuple(item for item in self.passes if not isinstance(item, kind)))

    def insert(self, new: Pass, *, after: type[Pass] | None = None, before: type[Pass] | None = None) -> Pipeline:
        """This pipeline with one more pass: behind the last of kind `after`, ahead of the first of kind `before`.

        Raises:
            PassError: not exactly one place is given, or this pipeline has no such pass.
        """
        if (after is None) == (before is None):
            raise PassError(f"Say where {new!r} goes: give either after= or before=.")
        position = self._find(after)[-1] + 1 if after is not None else self._find(before)[0]
        return Pipeline((*self.passes[:position], new, *self.passes[position:]))

    def _find(self, kind: type[Pass] | None) -> list[int]:
        if not (isinstance(kind, type) and issubclass(kind, Pass)):
            hint = f"its class, {type(kind).__name__}" if isinstance(kind, Pass) else "the class of a pass"
            raise PassError(f"{kind!r} does not say which pass is meant: give {hint}.")
        found = [index for index, item in enumerate(self.passes) if isinstance(item, kind)]
        if not found:
            has = ", ".join(item.name for item in self.passes) or "none"
            raise PassError(f"The pipeline has no pass {kind.__name__!r}; its passes: {has}.")
        return found

    def run(
        self,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        *,
        check: Mapping[str, np.ndarray] | None = None,
        runner: Runner | None = None,
        tolerance: float = 1e-4,
        dump_dir: Path | None = None,
        ranges: Mapping[str, tuple[int, int]] | None = None,
    ) -> PipelineResult:
        """Run all passes, checking the graph after each, and again until none of them rewrites anything.

        Where a pass fails, breaks the graph or changes its numbers, the model before and after it is written to
        ``dump_dir``, or else to a temporary folder, and the error says where.

        Args:
            proto: the model, its large initializers as stand-ins. It is not changed.
            weights: values of the stand-ins by initializer name. Read only where a pass needs the numbers.
            check: a value for each input. The outputs are then compared after every pass with those before it; a model
                that cannot be run or whose numbers are random is not compared, and the report says so.
            runner: runs models for the comparison; default ONNX Runtime on the CPU, which knows no plugin nodes.
            tolerance: largest change of an output by one pass, relative to its largest magnitude; `Pass.tolerance` goes
                before it.
            dump_dir: folder where the model before all passes and after each is written (`GraphDump`), with a text that
                says what the pass changed. Files of an earlier dump are removed.
            ranges: (least, largest) size of named dimensions, as calls will have them; default not known.

        Raises:
            PassError: the model is broken, a pass failed or broke it, or it changed inputs, outputs or numbers.
            ModelFileError: ``dump_dir`` cannot be written.
        """
        start = time.perf_counter()
        for name in iterate_stand_ins(proto.graph):
            if name not in weights:
                raise PassError(f"Initializer {name!r} is a stand-in, but the weights hold no values for it.")
        exchange = Exchange(proto)
        if fault := checks.graph_fault(exchange.graph):
            raise PassError(f"The model is not valid, before any pass: {fault}.")
        notes = Notes(_opset(proto), weights, exchange.names(), ranges)
        dump = None if dump_dir is None else GraphDump(dump_dir, _size(weights))
        if dump is not None:
            dump.add("00_model", proto, weights)
        comparison = Comparison(proto, weights, check, runner, tolerance)
        reports: dict[int, PassReport] = {}
        quiet = steps = 0
        # What a pass makes may be what one ahead of it looks for, so all go round until none of them finds anything.
        while quiet < len(self.passes) and steps < _MOST_SWEEPS * len(self.passes):
            position = steps % len(self.passes)
            item, is_first = self.passes[position], steps < len(self.passes)
            steps += 1
            try:
                report = _run_one(item, exchange.graph, notes)
                quiet = 0 if report.rewrites else quiet + 1
                reports[position] = report if is_first else reports[position].then(report)
                if (is_first or report.rewrites) and (comparison.is_on or dump is not None):
                    current, current_weights = exchange.export(weights)
                    if dump is not None:
                        dump.add(f"{steps:02}_{item.name}", current, current_weights, str(report))
                    comparison.check(item.name, current, current_weights, item.tolerance)
            except PassError as error:
                saved = self._save(steps, proto, weights, exchange, dump, ranges)
                raise PassError(f"{error}\n{saved}") from (error.__cause__ or error)
        result, kept = exchange.export(weights)
        fault = checks.onnx_fault(result)
        if fault and not checks.onnx_fault(proto):
            raise PassError(self._refused_by_checker(fault, steps, proto, weights, dump, ranges))
        whole = PipelineReport(tuple(reports.values()), comparison.words, time.perf_counter() - start)
        return PipelineResult(result, kept, whole)

    def _refused_by_checker(
        self,
        fault: str,
        steps: int,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        dump: GraphDump | None,
        ranges: Mapping[str, tuple[int, int]] | None,
    ) -> str:
        """Words about the first pass after which onnx.checker refuses the model; found by running all again."""
        exchange = Exchange(proto)
        notes = Notes(_opset(proto), weights, exchange.names(), ranges)
        for step, item in enumerate(self._sequence(steps), start=1):
            item.apply(exchange.graph, notes)
            if first := checks.onnx_fault(exchange.export(weights)[0]):
                saved = self._save(step, proto, weights, exchange, dump, ranges)
                return f"{item.name} left a model that onnx.checker refuses: {first}\n{saved}"
        return f"The pipeline left a model that onnx.checker refuses: {fault}"

    def _sequence(self, steps: int) -> Iterator[Pass]:
        """The passes of the first steps: all of them again and again."""
        return itertools.islice(itertools.cycle(self.passes), steps)

    def _save(
        self,
        step: int,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        broken: Exchange,
        dump: GraphDump | None,
        ranges: Mapping[str, tuple[int, int]] | None,
    ) -> str:
        """Write the model before and after a step, the former by running those ahead of it again; says where."""
        *ahead, last = self._sequence(step)
        name = last.name
        exchange = Exchange(proto)
        notes = Notes(_opset(proto), weights, exchange.names(), ranges)
        for item in ahead:
            item.apply(exchange.graph, notes)
        before, before_weights = exchange.export(weights)
        stem = f"{step:02}_{name}"
        try:
            dump = dump or GraphDump(Path(tempfile.mkdtemp(prefix="trtbridge-passes-")), _size(weights))
            first = dump.write(f"{stem}.before.onnx", before, before_weights)
            try:
                after, after_weights = broken.export(weights)
                text = diff(before, after)
                second = dump.write(f"{stem}.after.onnx", after, after_weights)
            except Exception as error:  # Whatever a graph that is no graph meets.
                return f"The graph before {name} is in {first}; the one after it cannot be written: {error!r}"
            what = dump.write_text(f"{stem}.diff", f"{name}\n\n{text or 'nothing changed'}\n")
        except (ModelFileError, OSError) as error:
            return f"The graphs before and after {name} could not be saved: {error}"
        return f"The graphs before and after {name} are in {first} and {second}; what it changed, in {what}"


def _run_one(item: Pass, graph: gs.Graph, notes: Notes) -> PassReport:
    before = (checks.boundary(graph.inputs), checks.boundary(graph.outputs))
    nodes_before = sum(len(scope.nodes) for scope in scopes(graph))
    notes.take_refusals()
    start = time.perf_counter()
    try:
        rewrites = item.apply(graph, notes)
    except PassError as error:
        raise PassError(f"{item.name}: {error}") from error
    except Exception as error:
        raise PassError(f"{item.name} failed with {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    fault = checks.graph_fault(graph)
    for kind, old, tensors in (("input", before[0], graph.inputs), ("output", before[1], graph.outputs)):
        fault = fault or checks.boundary_fault(kind, old, checks.boundary(tensors), item.changes_io)
    if fault:
        raise PassError(f"{item.name} broke the graph: {fault}.")
    nodes_after = sum(len(scope.nodes) for scope in scopes(graph))
    report = PassReport(item.name, rewrites, notes.take_refusals(), seconds, nodes_before, nodes_after)
    _log.info("%s: %d rewrites, %d refusals, %d -> %d nodes, %.3f s",
              item.name, rewrites, len(report.refusals), nodes_before, nodes_after, seconds)  # fmt: skip
    return report


def _size(weights: Mapping[str, ir.TensorProtocol]) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)
