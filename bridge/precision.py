"""Precision as an option: what `convert(precision=..., keep_fp32=...)` does to a model before it is built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import onnx

from ..errors import OptionError, TrtBridgeError
from ..passes.convert_precision import ConvertPrecision
from ..passes.fuse_batch_norm import FuseBatchNorm
from ..passes.pipeline import Pipeline
from ..passes.prepare_quantization import PrepareQuantization
from ..passes.reports import PipelineResult
from .backends.base import Backend
from .calibration import calibrate, check_runnable, overflowing
from .chosen_nodes import NodeView, op_name
from .export import ExportedModule
from .keep_fp32 import kept_by_user
from .model import OnnxModel, origin_of
from .narrow_weights import narrow_weights
from .options import Options
from .ort_quantizer import PRODUCTS
from .precision_report import KeptNode, PrecisionReport
from .precision_request import DEFAULT_TOLERANCE, TARGETS, Measurements, PrecisionRequest
from .precision_search import Found, search
from .quantize import Quantized, quantize
from .quantize_probe import refused_products, runner

__all__ = ["NodeView", "PrecisionReport", "Refused", "convert_precision", "kept_by_user", "with_opset"]

logger = logging.getLogger(__name__)

MARGIN = 4.0
"""Values of other inputs than the example may be this many times larger."""

BFLOAT16_OPSET = 22
"""From this opset on convolution and pooling exist for bfloat16."""

_FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_NO_REPORT = PrecisionReport("", 0, (), 0, 0, "")


@dataclass
class Refused:
    """What a backend does not take, learnt while it builds.

    Attributes:
        half: names of nodes that it refuses in 16 bits.
        quantized: names of products that it refuses over 8 bits.
    """

    half: set[str] = field(default_factory=set)
    quantized: set[str] = field(default_factory=set)

    def learn(
        self, nodes: AbstractSet[str], in_half: AbstractSet[str], in_eight: Mapping[str, Iterable[str]], backend: str
    ) -> bool:
        """Let nodes be wider that are refused; first no longer over 8 bits, then no longer in 16.

        Args:
            nodes: names of those that are refused.
            in_half: nodes that work in 16 bits by the precision asked for.
            in_eight: products over 8 bits, and Q/DQ nodes ahead of them, with the products that they are about.
            backend: its name, for the log.

        Returns:
            Whether any of them was not known.
        """
        over = {product for name in nodes for product in in_eight.get(name, ())} - self.quantized
        if over:
            logger.info("%s refuses %s over 8 bits", backend, ", ".join(sorted(over)))
            self.quantized |= over
            return True
        half = nodes & in_half - self.half
        if half:
            logger.info("%s refuses %s in 16 bits: float32 comes next", backend, ", ".join(sorted(half)))
            self.half |= half
        return bool(half)


def with_opset(source: ExportedModule | OnnxModel, options: Options) -> ExportedModule | OnnxModel:
    """A traced module that is exported in an opset whose ops exist for the type, unless the user chose one."""
    if options.precision is None or options.opset is not None or not isinstance(source, ExportedModule):
        return source
    if PrecisionRequest.parse(options.precision).target != "bf16":
        return source
    return dataclasses.replace(source, opset=max(source.opset, BFLOAT16_OPSET))


def convert_precision(
    model: OnnxModel,
    source: ExportedModule | OnnxModel,
    options: Options,
    refused: Refused | None = None,
    measurements: Measurements | None = None,
    backend: Backend | None = None,
) -> tuple[OnnxModel, PrecisionReport]:
    """The model in the precision that the options ask for.

    Args:
        model: after the passes, in float32.
        source: what it was made from; its example is what is measured on, unless ``calibration`` is given.
        options: ``precision`` is set; ``keep_fp32``, ``calibration`` and ``precision_tolerance`` count.
        refused: what the backend has refused so far.
        measurements: of earlier rounds.
        backend: is asked which products it builds over 8 bits; None takes all.

    Raises:
        OptionError: an entry of ``keep_fp32`` fits no node, or the model cannot be measured and has to be.
        InputError: a sample of ``calibration`` does not fit the model.
    """
    assert options.precision is not None
    request = PrecisionRequest.parse(options.precision)
    refused = refused or Refused()
    stage = _Stage(request, options, source, measurements or Measurements())
    keep = kept_by_user(model.proto, options.keep_fp32)
    if request.quantized:
        # By node as well: a convolution that takes in a batch norm makes another tensor.
        keep |= {n.name: keep[t] for n in model.proto.graph.node for t in n.output if t in keep and n.name}
        prepared = Pipeline((FuseBatchNorm(everywhere=True), PrepareQuantization())).run(model.proto, model.weights)
        model = dataclasses.replace(model, proto=prepared.proto, weights=prepared.weights)
    report = dataclasses.replace(_NO_REPORT, precision=options.precision)
    if request.target:
        # What is kept, but for the user and the backend, must not be searched again when the backend refuses more.
        full = keep | dict.fromkeys(refused.half, "the backend refuses it in 16 bits")
        model, report = stage.narrow(model, full, keep)
    if request.quantized:
        left_out = keep | dict.fromkeys(refused.quantized, f"the backend refuses it over {request.quantized}")
        model, report = stage.quantize(model, left_out, report, backend)
    logger.debug("%s", report)
    if report.converted or report.quantized:
        logger.info("%s", report.summary)
    else:
        what = "may be quantized" if request.quantized else "is float32 and may work in 16 bits"
        logger.warning("%s: nothing in the model %s", report.summary, what)
    return model, report


@dataclass(frozen=True)
class _Stage:
    """One conversion's precision.

    Attributes:
        request: what is asked for.
        options: of the conversion.
        source: what the model was made from.
        known: what was measured before.
    """

    request: PrecisionRequest
    options: Options
    source: ExportedModule | OnnxModel
    known: Measurements

    def narrow(
        self, model: OnnxModel, keep: Mapping[str, str], asked: Mapping[str, str]
    ) -> tuple[OnnxModel, PrecisionReport]:
        """The mixed model; ``asked`` is the part of ``keep`` that stays the same in every round."""
        target = TARGETS[str(self.request.target)]
        calibration = "not needed, bfloat16 reaches as far as float32"
        wide: Mapping[str, str] = {}
        if self.request.target == "fp16":
            calibration, wide = self.known.once("range", model, lambda: self._overflowing(model))
        found = Found({}, (), 0.0, 0)
        if self.request.search:
            found = self.known.once("search", model, lambda: self._search(model, target, asked, wide))
        result = _to_16_bits(model, target, {**found.keep, **keep}, wide)
        done = result.report.passes[0]
        converted = narrow_weights(dataclasses.replace(model, proto=result.proto, weights=result.weights))
        reasons = {refusal.node: refusal.reason for refusal in done.refusals}
        report = _report(converted.proto, str(self.options.precision), reasons, done.rewrites, calibration)
        if self.request.search:
            report = dataclasses.replace(
                report, modules=found.parts, error=found.error, tolerance=self._tolerance, runs=found.runs
            )
        return converted, report

    def quantize(
        self, model: OnnxModel, left_out: Mapping[str, str], report: PrecisionReport, backend: Backend | None
    ) -> tuple[OnnxModel, PrecisionReport]:
        """The model with Q/DQ nodes."""
        kind, is_half = str(self.request.quantized), self.request.target is not None
        samples, words = self.known.samples_of(model, self.source, self.options)
        if self.options.calibration is None:
            logger.warning(
                "precision=%r: no calibration= was given, so the ranges are %s; results on other inputs may be poor",
                self.options.precision,
                words,
            )
        try:
            ranges = self.known.once("8-bit range", model, lambda: calibrate(model, *samples))
        except TrtBridgeError as error:
            raise self._unmeasured(error) from error
        refused: Mapping[str, str] = {}
        if backend is not None and backend.name != "onnxruntime":
            ops = {node.op_type for node in model.proto.graph.node} & {*PRODUCTS}
            found = self.known.once(
                "probe",
                model,
                lambda: refused_products(
                    backend, self.options.build, kind, is_half, ops, runner(backend, self.options.build)
                ),
            )
            refused = found
        done: Quantized = quantize(model, ranges, kind, {**refused, **left_out})
        report = dataclasses.replace(
            report, calibration=words, quantized=len(done.products), unquantized=done.unquantized
        )
        return done.model, report

    @property
    def _tolerance(self) -> float:
        given = self.options.precision_tolerance
        return DEFAULT_TOLERANCE if given is None else given

    def _overflowing(self, model: OnnxModel) -> tuple[str, dict[str, str]]:
        """What was measured on, and the tensors that float16 cannot hold."""
        samples, words = self.known.samples_of(model, self.source, self.options)
        try:
            return words, overflowing(calibrate(model, *samples), MARGIN)
        except TrtBridgeError as error:
            logger.warning(
                "precision=%s: what may overflow is not known, for the model cannot be run: %s",
                self.options.precision,
                error,
            )
            return f"not measured: {str(error).splitlines()[0]}", {}

    def _search(self, model: OnnxModel, target: str, keep: Mapping[str, str], wide: Mapping[str, str]) -> Found:
        samples, _ = self.known.samples_of(model, self.source, self.options)

        def convert(more: Mapping[str, str]) -> onnx.ModelProto:
            return _to_16_bits(model, target, {**more, **keep}, wide).proto

        try:
            check_runnable(model)
            found = search(model, convert, target, samples, self._tolerance)
        except TrtBridgeError as error:
            raise self._unmeasured(error) from error
        if found.error > self._tolerance:
            logger.warning(
                "precision=%r: the error is %.2g, above the tolerance of %.2g, with all that may stay in float32",
                self.options.precision,
                found.error,
                self._tolerance,
            )
        return found

    def _unmeasured(self, error: TrtBridgeError) -> OptionError:
        first = str(error).splitlines()[0]
        return OptionError(
            f"precision={self.options.precision!r} measures the model on samples, which fails: {first}\n"
            'Use precision="fp16" or "bf16" with keep_fp32, which need no measurement.'
        )


def _to_16_bits(model: OnnxModel, target: str, keep: Mapping[str, str], wide: Mapping[str, str]) -> PipelineResult:
    return Pipeline((ConvertPrecision(target, keep, wide),)).run(model.proto, model.weights)


def sixteen_bit_nodes(proto: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes that read or make 16-bit floats, casts excepted."""
    graph = proto.graph
    half = {v.name for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.elem_type in _FLOATS}
    half |= {tensor.name for tensor in graph.initializer if tensor.data_type in _FLOATS}
    return frozenset(
        node.name for node in graph.node if node.op_type != "Cast" and not half.isdisjoint((*node.input, *node.output))
    )


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
            kept.append(KeptNode(op_name(node), next(filter(None, node.output), ""), reason, origin_of(node)))
        elif onnx.TensorProto.FLOAT in made:
            following += 1
    return PrecisionReport(precision, converted, tuple(kept), following, casts, calibration)


def _described(node: onnx.NodeProto) -> str:
    """A node as `passes.surgery.describe` writes it in a refusal."""
    name = f" {node.name!r}" if node.name else ""
    return f"{op_name(node)}{name} -> {', '.join(filter(None, node.output)) or 'nothing'}"
