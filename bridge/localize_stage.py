"""One graph against the reference: every layer in the whole run, and every layer alone, given right inputs.

Errors travel: behind a wrong layer all layers are wrong, and rounding adds up without any layer being wrong. So each
layer is also run on the reference's values of what it reads. What is off then is off by its own fault. All layers are
cut apart so in one run of ONNX Runtime, as many at a time as memory allows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ..errors import TrtBridgeError
from .activations import NOT_FINITE, excess, layer_error, run_graph
from .dtypes import to_torch
from .localize_points import Examined, Point
from .localize_reference import Reference
from .localize_report import Layer, Stage, Suspect
from .model import origin_of
from .partition import reads_of
from .repro import Repro
from .tolerances import default_tolerance

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 20
"""Values of the reference that are held at a time."""

_SEEN = 0.3
"""What reads a wrong value is off, too, by this share of what rounding allows; else the value has another form only."""

_OTHER_FORM = 1e-2
"""A value in another form is off by more than this."""

_COARSE = [ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]
_QUANTIZED = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2}


@dataclass(frozen=True)
class Limits:
    """How far values may be off.

    Attributes:
        own: largest relative error of one layer alone; None for what its precision explains.
        tf32: float32 products may be computed in TF32.
    """

    own: float | None = None
    tf32: bool = False

    def layer(self, dtypes: Collection[ir.DataType]) -> float:
        """For a layer alone that computes in some dtypes: a tenth of what adds up over a network, half in 16 bits."""
        if self.own is not None:
            return self.own
        if _QUANTIZED & set(dtypes):
            return 0.5 * default_tolerance("float8").scale
        whole = self.whole(dtypes)
        return whole * (0.1 if whole <= default_tolerance("float32").scale else 0.5)

    def whole(self, dtypes: Collection[ir.DataType]) -> float:
        """For results of a network that computes in some dtypes."""
        coarsest = max((d for d in dtypes if d in _COARSE), key=_COARSE.index, default=ir.DataType.FLOAT)
        coarsest = max(coarsest, ir.DataType.FLOAT, key=_COARSE.index)
        name = str(to_torch(coarsest)).removeprefix("torch.")
        scale = default_tolerance("tf32" if name == "float32" and self.tf32 else name).scale
        return max(scale, self.own or 0.0)


@dataclass(frozen=True)
class GraphCheck:
    """Compares one graph.

    Attributes:
        name: of the stage.
        examined: the graph.
        reference: what it is compared with.
        limits: how far it may be off.
    """

    name: str
    examined: Examined
    reference: Reference
    limits: Limits

    @cached_property
    def keys(self) -> dict[str, str]:
        """For each tensor that can be compared the reference's key."""
        return {point.tensor: point.key for point in self.examined.points}

    @cached_property
    def slices(self) -> dict[str, tuple[list[int], list[str]]]:
        """For each point the nodes between it and those before it, and what they read."""
        return {point.tensor: self.examined.frontier(point.tensor, self.keys) for point in self.examined.points}

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs by name."""
        specs = self.examined.model.signature.inputs
        pairs = zip(specs, self.reference.inputs, strict=True)
        return {spec.name: tensor.to(to_torch(spec.dtype)) for spec, tensor in pairs}

    def run(self) -> Stage:
        """Compare every layer, in the whole run and alone."""
        notes: list[str] = []
        whole = self._whole_errors(notes)
        own: dict[str, tuple[float | None, str]] = {}
        for chunk in self._chunks():
            own |= self._own_errors(chunk)
        layers = tuple(self._layer(point, whole, *own[point.tensor]) for point in self.examined.points)
        results = {value.name for value in self.examined.model.proto.graph.output}
        errors = {name: error for name, (error, _) in whole.items() if name in results}
        results = {name for name in results if not self.is_free(name)}
        wrong = "; ".join(f"{name}: {words}" for name, (_, words) in whole.items() if words and name in results)
        if self.reference.is_random:
            notes.append("the model draws random numbers: its results are not judged, each layer alone is")
            wrong = ""
        return Stage(self.name, layers, errors, wrong, tuple(notes))

    def is_free(self, tensor: str) -> bool:
        """Whether a tensor may rightly have other values than the reference's."""
        return tensor in self.keys and self.reference.is_free(self.keys[tensor])

    def suspects(self, stage: Stage) -> Iterator[Layer]:
        """The layers that are wrong by themselves, in order, less those that only hold a value in another form."""
        wrong = [layer for layer in stage.layers if layer.wrong]
        heard = [layer for layer in wrong if self._is_felt(layer, stage)]
        # A result that is wrong has a reason, even where nothing that reads it can be measured.
        yield from heard or (wrong if stage.wrong else [])

    def blame(self, layer: Layer, before: Examined | None, known: onnx.NodeProto | None = None) -> Suspect:
        """The node of a wrong layer that is wrong.

        Args:
            layer: wrong by itself.
            before: the same model in a form that is right; tensors of the same name hold the same values.
            known: a node that has been found wrong already.
        """
        positions, _ = self.slices[layer.tensor]
        nodes = [self.examined.nodes[index] for index in positions]
        node, words = known, ""
        if node is None and before is not None and len(nodes) > 1:
            node, words = self._first_wrong(layer, nodes, before)
        node = node or self.examined.nodes[self.examined.makers[layer.tensor]]
        own = origin_of(node)
        origin = own if own.file or own.module else layer.origin
        return Suspect(
            stage=self.name,
            layer=layer,
            op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            node=node.name,
            output=next(filter(None, node.output), ""),
            origin=origin,
            words=words or layer.wrong,
            nodes=tuple(one.op_type for one in nodes),
            hint=self._changed_weights(node, before) if before is not None else "",
        )

    def repro(self, layer: Layer) -> Repro:
        """A layer alone, with what it reads and what it should give."""
        model, given = self.examined.cut([layer.tensor], self.keys)
        values = self.reference.values({self.keys[name] for name in given.values() if name in self.keys})
        wanted = self.reference.values({self.keys[layer.tensor]})
        feeds = {new: self._feed(name, values) for new, name in given.items()}
        return Repro(model, feeds, {layer.tensor: wanted[self.keys[layer.tensor]]}, layer.limit, str(layer.origin))

    def limit(self, point: Point) -> float:
        """How far a layer alone may be off."""
        return self.limits.layer(self._slice_dtypes(point.tensor))

    # Errors

    def _whole_errors(self, notes: list[str]) -> dict[str, tuple[float, str]]:
        """For each point the error in a run of the whole graph, and in words how it is off."""
        found: dict[str, tuple[float, str]] = {}
        limit = self.limits.whole(set(self.examined.dtypes.values()))
        for chunk in self._chunks():
            try:
                seen = run_graph(self.examined.model, self.inputs, [p.tensor for p in chunk], self.examined.dtypes)
            except TrtBridgeError as error:
                notes.append(f"the stage cannot be run as a whole: {error}")
                return {}
            values = self.reference.values({point.key for point in chunk})
            for point in chunk:
                mine, wanted = seen[point.tensor], values[point.key]
                words = excess(mine, wanted, limit, 1e-2 * limit)
                found[point.tensor] = layer_error(mine, wanted), words
        return found

    def _own_errors(self, chunk: Sequence[Point]) -> dict[str, tuple[float | None, str]]:
        """For each point the error given right inputs, and how it is beyond the limit."""
        free = {point.tensor: (None, "") for point in chunk if self.reference.is_free(point.key)}
        chunk = [point for point in chunk if point.tensor not in free]
        if not chunk:
            return dict(free)
        model, given = self.examined.cut([point.tensor for point in chunk], self.keys)
        keys = {self.keys[name] for name in given.values() if name in self.keys}
        values = self.reference.values(keys | {point.key for point in chunk})
        feeds = {new: self._feed(name, values) for new, name in given.items()}
        try:
            seen = run_graph(model, feeds, [point.tensor for point in chunk], self.examined.dtypes)
        except TrtBridgeError as error:
            if len(chunk) > 1:  # whichever it is; the others are measured all the same
                middle = len(chunk) // 2
                return dict(free) | self._own_errors(chunk[:middle]) | self._own_errors(chunk[middle:])
            return {**free, chunk[0].tensor: (None, str(error))}
        found: dict[str, tuple[float | None, str]] = dict(free)
        for point in chunk:
            mine, wanted = seen[point.tensor], values[point.key]
            limit = self.limit(point)
            share = 0.02 if limit > 1e-3 else 1e-3
            found[point.tensor] = layer_error(mine, wanted), excess(mine, wanted, limit, 1e-2 * limit, share)
        return found

    def _feed(self, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name not in self.keys:
            return self.inputs[name]
        return values[self.keys[name]].to(to_torch(self.examined.dtypes[name]))

    def _chunks(self) -> Iterator[list[Point]]:
        """The points, as many at a time as may be held with what they read."""
        chunk: list[Point] = []
        held = 0
        for point in self.examined.points:
            names = (point.tensor, *self.slices[point.tensor][1])
            size = sum(_bytes(self.reference.types[self.keys[name]]) for name in names if name in self.keys)
            if chunk and held + size > CHUNK_BYTES:
                yield chunk
                chunk, held = [], 0
            chunk.append(point)
            held += size
        if chunk:
            yield chunk

    def _layer(self, point: Point, whole: Mapping[str, tuple[float, str]], own: float | None, wrong: str) -> Layer:
        reads = self.slices[point.tensor][1]
        return Layer(
            tensor=point.tensor,
            op_type=point.node.op_type,
            node=point.node.name,
            origin=point.origin,
            precision=str(to_torch(self.examined.dtypes[point.tensor])).removeprefix("torch."),
            shape=self.reference.types[point.key][0],
            error=whole[point.tensor][0] if point.tensor in whole else None,
            own_error=own,
            inherited=max((whole[name][0] for name in reads if name in whole), default=0.0),
            limit=self.limit(point),
            wrong=wrong,
            note="may rightly be other values" if self.reference.is_free(point.key) else "",
        )

    def _slice_dtypes(self, tensor: str) -> set[ir.DataType]:
        dtypes = self.examined.dtypes
        names = [tensor]
        for index in self.slices[tensor][0]:
            names += [*self.examined.nodes[index].output, *reads_of(self.examined.nodes[index])]
        found = {dtypes[name] for name in names if name in dtypes}
        kinds = [self.reference.types[self.keys[name]][1] for name in names if name in self.keys]
        return found | {_ir_dtype(kind) for kind in kinds if kind.is_floating_point}

    def _is_felt(self, layer: Layer, stage: Stage) -> bool:
        """Whether a value that is off makes results off, in the whole run.

        A pass may move a Transpose past an op, or scale two factors the other way round: then what the op makes is not
        what the call of the module made, and is right. A small error may be smaller still in the results, so this is
        for large ones.
        """
        own = layer.own_error
        if own is None or own < _OTHER_FORM or layer.error is None or layer.wrong == NOT_FINITE:
            return True
        by_name = {one.tensor: one for one in stage.layers}
        share = _SEEN * min(own, 1.0)
        results = {value.name for value in self.examined.model.proto.graph.output}
        pending, seen = [layer], {layer.tensor}
        while pending:
            one = pending.pop()
            if (one.error or 0.0) <= share * one.limit:
                continue  # right after all
            readers = [by_name[name] for name in self._readers.get(one.tensor, ()) if name in by_name]
            if one.tensor in results or not readers:
                return True
            pending += [reader for reader in readers if reader.tensor not in seen]
            seen.update(reader.tensor for reader in readers)
        return False

    @cached_property
    def _readers(self) -> dict[str, list[str]]:
        """For each point those that read it."""
        found: dict[str, list[str]] = {}
        for tensor, (_, reads) in self.slices.items():
            for name in reads:
                found.setdefault(name, []).append(tensor)
        return found

    # Blame

    def _first_wrong(
        self, layer: Layer, nodes: Sequence[onnx.NodeProto], before: Examined
    ) -> tuple[onnx.NodeProto | None, str]:
        """The first node of a slice whose result is not that of the node of the same name in another graph."""
        inner = [name for node in nodes for name in node.output if name in before.makers]
        dtypes, others = self.examined.dtypes, before.dtypes
        inner = [name for name in inner if name in dtypes and name in others and dtypes[name] == others[name]]
        stops = self.slices[layer.tensor][1]
        values = self.reference.values({self.keys[name] for name in stops if name in self.keys})
        try:
            mine = self._run_slice(self.examined, inner, values)
            theirs = self._run_slice(before, inner, values)
        except (TrtBridgeError, KeyError) as error:
            logger.info("the nodes of %s cannot be told apart: %s", layer.tensor, error)
            return None, ""
        for name in inner:
            if words := excess(mine[name], theirs[name], layer.limit, 1e-2 * layer.limit, 0.0):
                return self.examined.nodes[self.examined.makers[name]], words
        return None, ""

    def _run_slice(
        self, graph: Examined, names: Sequence[str], values: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        stops = {name for name in self.keys if self.keys[name] in values and name in graph.makers}
        model, given = graph.cut(names, stops)
        feeds = {}
        for new, name in given.items():
            known = self.keys.get(name)
            tensor = self.inputs[name] if known is None else values[known]
            feeds[new] = tensor.to(to_torch(graph.dtypes[name]))
        return run_graph(model, feeds, names, graph.dtypes)

    def _changed_weights(self, node: onnx.NodeProto, before: Examined) -> str:
        """In words which weights of a node have other values than in another graph; "" where none has."""
        changed = []
        for name in reads_of(node):
            mine, theirs = weight_of(self.examined, name), weight_of(before, name)
            if mine is not None and theirs is not None and not _equal(mine, theirs):
                changed.append(name)
        return f"its weight {', '.join(changed)} has other values than in the export of the module" if changed else ""


def weight_of(graph: Examined, name: str) -> np.ndarray | None:
    """The values of a constant; None where there is no such constant."""
    if name in graph.model.weights:
        return graph.model.weights[name].numpy()
    for tensor in graph.model.proto.graph.initializer:
        if tensor.name == name and tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
    return None


def _equal(mine: np.ndarray, theirs: np.ndarray) -> bool:
    if mine.shape != theirs.shape:
        return False
    return bool(np.array_equal(mine, theirs.astype(mine.dtype)))  # a weight that was narrowed is no other weight


def _bytes(kind: tuple[tuple[int, ...], torch.dtype]) -> int:
    return int(np.prod(kind[0], dtype=np.int64)) * kind[1].itemsize


def _ir_dtype(dtype: torch.dtype) -> ir.DataType:
    names = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}
    return names.get(dtype, ir.DataType.FLOAT)


def with_note(layer: Layer, note: str) -> Layer:
    """A layer with something more to say."""
    return dataclasses.replace(layer, note=note)
