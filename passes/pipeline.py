"""Passes over an ONNX graph, and the pipeline that runs and checks them."""

from __future__ import annotations

import abc
import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from ..errors import PassError
from . import checks, numbers
from .exchange import Exchange, iterate_stand_ins, stand_in_name
from .surgery import describe, scopes

_log = logging.getLogger("trtbridge.passes")


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


class Refusal(NamedTuple):
    """A near miss: a node that a pass looked at and left as it is."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


class Notes:
    """What a pass knows besides the graph, and where it notes near misses.

    Attributes:
        opset: version of the standard ONNX operators in this model.
    """

    def __init__(self, opset: int, weights: Mapping[str, ir.TensorProtocol], names: set[str]) -> None:
        self.opset = opset
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

    def constant(self, values: np.ndarray, base: str) -> gs.Constant:
        """A new constant with a fresh name."""
        return gs.Constant(self.fresh_name(base), values)

    def variable(self, like: gs.Tensor, base: str, shape: list[int | str | None] | None = None) -> gs.Variable:
        """A new tensor with a fresh name and the dtype of another."""
        return gs.Variable(self.fresh_name(base), dtype=like.dtype, shape=shape)


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        rewrites: how many.
        refusals: near misses.
        seconds: time in the pass itself.
        nodes_before: nodes in the model, those of subgraphs included.
        nodes_after: the same after the pass.
    """

    name: str
    rewrites: int
    refusals: tuple[Refusal, ...]
    seconds: float
    nodes_before: int
    nodes_after: int

    def __str__(self) -> str:
        counts = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.rewrites else "nothing to do"
        return "\n".join(
            [
                f"{self.name}: {self.rewrites} rewrites, {counts}, {self.seconds * 1e3:.0f} ms",
                *(f"  refused {refusal}" for refusal in self.refusals),
            ]
        )


@dataclass(frozen=True)
class PipelineReport:
    """What a pipeline did.

    Attributes:
        passes: one report a pass, in order.
        comparison: whether ONNX Runtime compared the numbers, or why it did not.
        seconds: all of it, checks and conversions included.
    """

    passes: tuple[PassReport, ...]
    comparison: str
    seconds: float

    @property
    def rewrites(self) -> int:
        return sum(report.rewrites for report in self.passes)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.passes), f"{self.seconds:.2f} s in all; numbers: {self.comparison}"])


@dataclass(frozen=True)
class PipelineResult:
    """A rewritten model.

    Attributes:
        proto: the model; initializers over 1024 bytes are stand-ins.
        weights: values of exactly its stand-ins, by initializer name.
        report: what was done.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    report: PipelineReport


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
        found = [index for index, item in enumerate(self.passes) if kind is not None and isinstance(item, kind)]
        if not found:
            has = ", ".join(item.name for item in self.passes) or "none"
            raise PassError(f"The pipeline has no pass {getattr(kind, '__name__', kind)!r}; its passes: {has}.")
        return found

    def run(
        self,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        *,
        check: Mapping[str, np.ndarray] | None = None,
        tolerance: float = 1e-4,
        dump_dir: Path | None = None,
    ) -> PipelineResult:
        """Run all passes, checking the graph after each.

        Args:
            proto: the model, its large initializers as stand-ins. It is not changed.
            weights: values of the stand-ins by initializer name. Read only where a pass needs the numbers.
            check: a value for each input. ONNX Runtime then compares the outputs after every pass; a model that it
                cannot run (one with plugin nodes) or whose numbers are random is not compared, and the report says so.
            tolerance: largest change of an output, relative to its largest magnitude.
            dump_dir: folder where the model after each pass is written (without the weights).

        Raises:
            PassError: the model is broken, a pass failed or broke it, or it changed inputs, outputs or numbers.
        """
        start = time.perf_counter()
        for name in iterate_stand_ins(proto.graph):
            if name not in weights:
                raise PassError(f"Initializer {name!r} is a stand-in, but the weights hold no values for it.")
        exchange = Exchange(proto)
        if fault := checks.graph_fault(exchange.graph):
            raise PassError(f"The model is not valid, before any pass: {fault}.")
        notes = Notes(_opset(proto), weights, exchange.names())
        comparison, expected = _reference(proto, weights, check)
        reports: list[PassReport] = []
        for number, item in enumerate(self.passes, start=1):
            reports.append(_run_one(item, exchange.graph, notes))
            if expected is None and dump_dir is None:
                continue
            current, current_weights = exchange.export(weights)
            if dump_dir is not None:
                dump_dir.mkdir(parents=True, exist_ok=True)
                onnx.save(current, dump_dir / f"{number:02}_{item.name}.onnx")
            if expected is not None and check is not None:
                try:
                    actual = numbers.run(current, current_weights, check)
                except Exception as error:  # ONNX Runtime's errors share no base class.
                    raise PassError(f"{item.name} left a model that ONNX Runtime cannot run: {error}") from error
                changed = numbers.difference(expected, actual, tolerance)
                if changed:
                    raise PassError(f"{item.name} changed the model's numbers: {changed}.")
        result, kept = exchange.export(weights)
        fault = checks.onnx_fault(result)
        if fault and not checks.onnx_fault(proto):
            raise PassError(f"{self._culprit(proto, weights)} left a model that onnx.checker refuses: {fault}")
        report = PipelineReport(tuple(reports), comparison, time.perf_counter() - start)
        return PipelineResult(result, kept, report)

    def _culprit(self, proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> str:
        """The first pass after which onnx.checker refuses the model; found by running all again."""
        exchange = Exchange(proto)
        notes = Notes(_opset(proto), weights, exchange.names())
        for item in self.passes:
            item.apply(exchange.graph, notes)
            if checks.onnx_fault(exchange.export(weights)[0]):
                return item.name
        return "The pipeline"


def _reference(
    proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], check: Mapping[str, np.ndarray] | None
) -> tuple[str, dict[str, np.ndarray] | None]:
    """What the report says of the comparison, and the outputs to compare with if there is one."""
    if check is None:
        return "not compared (not asked for)", None
    reason = numbers.why_not_comparable(proto)
    if reason is None:
        try:
            return "compared by ONNX Runtime after every pass", numbers.run(proto, weights, check)
        except Exception as error:  # ONNX Runtime's errors share no base class.
            reason = f"ONNX Runtime cannot run the model: {error}"
    _log.warning("The passes' numbers are not compared: %s", reason)
    return f"not compared: {reason}", None


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


def _opset(proto: onnx.ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)
