"""Precision as an option: what `convert(precision=..., keep_fp32=...)` does to a model before it is built."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import OptionError, TrtBridgeError
from ..passes.convert_precision import ConvertPrecision
from ..passes.exchange import stand_in_name
from ..passes.pipeline import Pipeline
from .calibration import calibrate, overflowing
from .cli_run import RandomInputs
from .export import ExportedModule
from .model import OnnxModel, Origin, iterate_nodes, make_stand_in, origin_of
from .options import Options

logger = logging.getLogger(__name__)

TARGETS: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16"}
"""Values of the option, and the type of each."""

MARGIN = 4.0
"""Values of other inputs than the example may be this many times larger."""

BFLOAT16_OPSET = 22
"""From this opset on convolution and pooling exist for bfloat16."""

_FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class NodeView:
    """What a predicate of ``keep_fp32`` is shown of a node.

    Attributes:
        op_type: the ONNX op ("MatMul"), with its domain where it is not a standard one ("trtbridge::f").
        name: of the node in the graph.
        module: path of the nn.Module that it comes from, "" for the root and for an .onnx file.
        file: Python file, "" where unknown.
        line: line in it, 0 where unknown.
    """

    op_type: str
    name: str
    module: str
    file: str
    line: int

    @classmethod
    def of(cls, node: onnx.NodeProto) -> NodeView:
        origin = origin_of(node)
        return cls(_op(node), node.name, origin.module, origin.file, origin.line)


@dataclass(frozen=True)
class KeptNode:
    """A node that stayed in float32 for a reason of its own.

    Attributes:
        op_type: its op.
        output: the tensor that it makes.
        reason: why.
        origin: the Python line that it comes from.
    """

    op_type: str
    output: str
    reason: str
    origin: Origin


@dataclass(frozen=True)
class PrecisionReport:
    """What became of a model's precision.

    Attributes:
        precision: "fp16" or "bf16".
        converted: nodes that work in 16 bits now.
        kept: nodes that stayed in float32, each with its reason.
        following: other nodes of float32 values, which take the type of what is around them.
        casts: Cast nodes between float32 and 16 bits.
        calibration: on what the ranges of tensors were measured, or why they were not.
    """

    precision: str
    converted: int
    kept: tuple[KeptNode, ...]
    following: int
    casts: int
    calibration: str

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"precision {self.precision}: {self.converted} nodes in 16 bits, {len(self.kept)} kept in float32 and "
            f"{self.following} around them, {self.casts} casts; ranges: {self.calibration}"
        )

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[KeptNode]] = {}
        for node in self.kept:
            # The values in a reason differ from node to node; what names none is said once for all.
            groups.setdefault((node.op_type, node.reason), []).append(node)
        lines = [self.summary]
        for (op_type, reason), nodes in groups.items():
            places = list(dict.fromkeys(_place(node) for node in nodes))
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            lines.append(f"  float32: {len(nodes)} {op_type}: {reason}; from {', '.join(places[:3])}{more}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        kept = [
            {"op_type": n.op_type, "output": n.output, "reason": n.reason, "origin": n.origin.to_metadata()}
            for n in self.kept
        ]
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "kept": kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrecisionReport:
        kept = tuple(KeptNode(**{**node, "origin": Origin.from_metadata(node["origin"])}) for node in data["kept"])
        return cls(**{**data, "kept": kept})


def with_opset(source: ExportedModule | OnnxModel, options: Options) -> ExportedModule | OnnxModel:
    """A traced module that is exported in an opset whose ops exist for the type, unless the user chose one."""
    if options.precision != "bf16" or options.opset is not None or not isinstance(source, ExportedModule):
        return source
    return dataclasses.replace(source, opset=max(source.opset, BFLOAT16_OPSET))


def convert_precision(
    model: OnnxModel, source: ExportedModule | OnnxModel, options: Options, refused: Collection[str] = ()
) -> tuple[OnnxModel, PrecisionReport]:
    """The model in mixed precision.

    Args:
        model: after the passes, in float32.
        source: what it was made from; a traced module's example is what ranges are measured on.
        options: ``precision`` is set; ``keep_fp32`` counts.
        refused: names of nodes that the backend refuses in 16 bits.

    Raises:
        OptionError: an entry of ``keep_fp32`` fits no node.
    """
    precision = options.precision
    assert precision is not None
    keep = kept_by_user(model.proto, options.keep_fp32)
    keep |= dict.fromkeys(refused, "the backend refuses it in 16 bits")
    wide: dict[str, str] = {}
    calibration = "not needed, bfloat16 reaches as far as float32"
    if precision == "fp16":
        calibration, wide = _calibrated(model, source)
    item = ConvertPrecision(TARGETS[precision], keep, wide)
    result = Pipeline((item,)).run(model.proto, model.weights)
    done = result.report.passes[0]
    converted = narrow_weights(dataclasses.replace(model, proto=result.proto, weights=result.weights))
    reasons = {refusal.node: refusal.reason for refusal in done.refusals}
    report = _report(converted.proto, precision, reasons, done.rewrites, calibration)
    logger.debug("%s", report)
    if done.rewrites:
        logger.info("%s", report.summary)
    else:
        logger.warning("%s: nothing in the model is float32 and may work in 16 bits", report.summary)
    return converted, report


def sixteen_bit_nodes(proto: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes that read or make 16-bit floats, casts excepted."""
    graph = proto.graph
    half = {v.name for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.elem_type in _FLOATS}
    half |= {tensor.name for tensor in graph.initializer if tensor.data_type in _FLOATS}
    return frozenset(
        node.name for node in graph.node if node.op_type != "Cast" and not half.isdisjoint((*node.input, *node.output))
    )


def _calibrated(model: OnnxModel, source: ExportedModule | OnnxModel) -> tuple[str, dict[str, str]]:
    """What was measured on, and the tensors that float16 cannot hold."""
    try:
        if isinstance(source, ExportedModule):
            words, inputs = "measured on the example", list(source.arguments.tensors)
        else:
            words, inputs = "measured on random inputs", RandomInputs().make(model.signature)
        return words, overflowing(calibrate(model, inputs), MARGIN)
    except TrtBridgeError as error:
        logger.warning("precision=fp16: what may overflow is not known, for the model cannot be run: %s", error)
        return f"not measured: {str(error).splitlines()[0]}", {}


def kept_by_user(proto: onnx.ModelProto, keep_fp32: Any) -> dict[str, str]:
    """The tensors whose nodes the user wants in float32, with the entry that says so.

    Args:
        proto: the graph.
        keep_fp32: one entry or several: op types, node names, module paths (whole components from the left, which take
            in all below), patterns of these in the manner of fnmatch, or functions of a `NodeView`.

    Raises:
        OptionError: an entry fits no node.
    """
    if isinstance(keep_fp32, str) or callable(keep_fp32):
        keep_fp32 = (keep_fp32,)
    nodes = [(node, NodeView.of(node)) for node in iterate_nodes(proto.graph)]
    found: dict[str, str] = {}
    for entry in keep_fp32:
        reason = f"keep_fp32 names it: {entry if isinstance(entry, str) else getattr(entry, '__name__', entry)!r}"
        chosen = [node for node, view in nodes if _fits(entry, view)]
        if not chosen:
            raise OptionError(_no_match(entry, [view for _, view in nodes]))
        for node in chosen:
            found.update((name, reason) for name in node.output if name)
    return found


def _fits(entry: str | Callable[[NodeView], bool], view: NodeView) -> bool:
    if not isinstance(entry, str):
        return bool(entry(view))
    return any(fnmatch.fnmatchcase(text, entry) for text in (view.op_type, view.name, *_paths(view.module)) if text)


def _paths(module: str) -> Iterator[str]:
    """A module's path and those of the modules that it is in."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _no_match(entry: Any, views: Iterable[NodeView]) -> str:
    if not isinstance(entry, str):
        return f"keep_fp32: {getattr(entry, '__name__', entry)!r} is true for no node of the graph."
    known = dict.fromkeys(
        text for view in views for text in (view.op_type, *_paths(view.module), view.name if not view.module else "")
    )
    close = difflib.get_close_matches(entry, [text for text in known if text], n=4, cutoff=0.5)
    hint = f" Close are: {', '.join(map(repr, close))}." if close else ""
    return (
        f"keep_fp32: {entry!r} is no op type, node name or module path of the graph.{hint} An entry is such a name, "
        "a pattern of it ('encoder.layers.*.attn'), or a function of op_type, name, module, file and line."
    )


def narrow_weights(model: OnnxModel) -> OnnxModel:
    """Weights that are only read through a Cast to 16 bits get that type; they are converted each time they are read.

    No second copy of a weight is held, and none in float32 reaches the engines.
    """
    graph = model.proto.graph
    stand_ins = {t.name: t for t in graph.initializer if stand_in_name(t) is not None and t.name in model.weights}
    uses = Counter(name for node in iterate_nodes(graph) for name in node.input)
    uses.update(value.name for value in (*graph.input, *graph.output))
    for node in iterate_nodes(graph):
        for attribute in node.attribute:
            uses.update(value.name for value in attribute.g.output)
    results = {value.name for value in graph.output}
    names: dict[str, str] = {}  # what a cast makes -> the weight
    weights = dict(model.weights)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Cast" or node.domain or node.input[0] not in stand_ins or uses[node.input[0]] != 1:
            continue
        target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if target in _FLOATS and node.output[0] not in results:
            names[node.output[0]] = node.input[0]
            weights[node.input[0]] = _narrowed(weights[node.input[0]], ir.DataType(target))
            del proto.graph.node[index]
    if not names:
        return model
    for node in iterate_nodes(proto.graph):
        if any(name in names for name in node.input):
            node.input[:] = [names.get(name, name) for name in node.input]
    narrowed = set(names.values())
    for tensor in proto.graph.initializer:
        if tensor.name in narrowed:
            tensor.CopyFrom(make_stand_in(tensor.name, weights[tensor.name]))
    types = {name: weights[name].dtype for name in narrowed}
    described = [value for value in proto.graph.value_info if value.name not in names]
    for value in described:
        if value.name in types:
            value.type.tensor_type.elem_type = int(types[value.name])
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in described]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return dataclasses.replace(model, proto=proto, weights=weights)


def _narrowed(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    shape = ir.Shape(weight.shape.numpy())
    return ir.LazyTensor(partial(_convert, weight, dtype), dtype=dtype, shape=shape, name=weight.name)


def _convert(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(weight.numpy().astype(dtype.numpy()), dtype=dtype, name=weight.name)


def _report(
    proto: onnx.ModelProto, precision: str, reasons: Mapping[str, str], converted: int, calibration: str
) -> PrecisionReport:
    graph = proto.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    kept, following, casts = [], 0, 0
    for node in graph.node:
        read = {types.get(name, 0) for name in node.input if name}
        made = {types.get(name, 0) for name in node.output if name}
        reason = reasons.get(_described(node))
        if node.op_type == "Cast" and not node.domain:
            casts += bool(read & _FLOATS and onnx.TensorProto.FLOAT in made)
            casts += bool(made & _FLOATS and onnx.TensorProto.FLOAT in read)
        elif reason is not None:
            kept.append(KeptNode(_op(node), next(filter(None, node.output), ""), reason, origin_of(node)))
        elif onnx.TensorProto.FLOAT in made:
            following += 1
    return PrecisionReport(precision, converted, tuple(kept), following, casts, calibration)


def _described(node: onnx.NodeProto) -> str:
    """A node as `passes.surgery.describe` writes it in a refusal."""
    name = f" {node.name!r}" if node.name else ""
    return f"{_op(node)}{name} -> {', '.join(filter(None, node.output)) or 'nothing'}"


def _op(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _place(node: KeptNode) -> str:
    if node.origin.module:
        return node.origin.module
    return f"{node.origin.file}:{node.origin.line}" if node.origin.file else repr(node.output)
