"""Whether the ONNX graph means what the module means: both are run on the example, on real numbers.

Some translations are silently wrong (avg_pool2d's divisor_override, scatter_reduce's mean) and some make graphs that no
runtime takes, so the plan is run with ONNX Runtime before anything is built. Where the results differ, the first call
whose own results differ is to blame.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch

from ..errors import TrtBridgeError
from .backends import get_backend
from .backends.base import BuildOptions, Segment
from .build import build_plan
from .export import ExportedModule
from .model import OnnxModel, origin_of
from .partition import spec_of
from .plan import Plan
from .program import Program
from .runtime import RunningProgram

logger = logging.getLogger(__name__)

_LIMIT_BYTES = 2 << 30
"""Weights above this are not checked: the check holds a second copy of them."""

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative error (L2 norm) by dtype: far above rounding, far below a wrong formula."""

_GROWTH = 20
"""A call is to blame where its error is this many times that of what it reads: others only pass an error on."""

_CPU = torch.device("cpu")
# Among equal values these may take any.
_INDEX_OPS = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "nanmedian", "mode",
              "cummax", "cummin", "aminmax", "msort"}  # fmt: skip


def find_wrong_calls(traced: ExportedModule, model: OnnxModel, plan: Plan) -> dict[str, str]:
    """Run a plan with ONNX Runtime on the example and compare it with the module.

    Args:
        traced: the module.
        model: the graph, after the passes.
        plan: made from it for ONNX Runtime.

    Returns:
        The reason for each call of the module whose translation is wrong or invalid; empty where all agree or nothing
        can be said.
    """
    if model.weight_bytes > _LIMIT_BYTES:
        logger.info("the export is not checked: weights of %.1f GB", model.weight_bytes / 1e9)
        return {}
    interpreter = _Recorder(traced)
    with torch.random.fork_rng(devices=_cuda_devices(traced)):
        torch.manual_seed(0)
        try:
            expected = interpreter.run_example()
        except Exception as error:
            logger.warning("the export is not checked, for the module fails on its example: %s", error)
            return {}
    try:
        program = _build(plan)
    except TrtBridgeError as error:
        found = _blame_refusals(error)
        if not found:
            logger.warning("the export cannot be checked in ONNX Runtime: %s", error)
        return found
    inputs = [tensor.detach().cpu() for tensor in traced.arguments.tensors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            actual = RunningProgram(program, _CPU, None)(inputs)
        except TrtBridgeError as error:
            found = _blame_words(str(error), model)
            if not found:
                logger.warning("the export cannot be checked in ONNX Runtime: %s", error)
            return found
    coarsest = _coarsest(traced)
    differences = [differ(mine, wanted, coarsest) for mine, wanted in zip(actual, expected, strict=True)]
    wrong = [index for index, words in enumerate(differences) if words]
    if not wrong:
        return {}
    found = _first_wrong_call(interpreter, model, plan, inputs)
    plugins = {call.origin.call for call in plan.plugin_calls}
    found = {call: reason for call, reason in found.items() if call not in plugins}  # these were not translated
    if not found:
        logger.warning(
            "%s: the exported graph gives other numbers than the module for output(s) %s (%s), and no single call is "
            "to blame. If the model draws random numbers or is chaotic that is expected; else compare the results.",
            traced.name,
            ", ".join(map(str, wrong)),
            "; ".join(differences[index] for index in wrong),
        )
    return found


def relative_error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the error over that of the expected values where both are finite; for integers the share that differs.

    1 where shapes differ, or NaN and infinity are in other places.
    """
    a, b = mine.detach().cpu().double(), wanted.detach().cpu().double()
    if not wanted.is_floating_point():
        return float((a != b).double().mean()) if a.shape == b.shape and b.numel() else float(a.shape != b.shape)
    if a.shape != b.shape:
        return 1.0
    finite = torch.isfinite(a) & torch.isfinite(b)
    size = float(b[finite].norm())
    error = float((a[finite] - b[finite]).norm())
    same = bool((torch.isfinite(a) == torch.isfinite(b)).all())
    return max(error / size if size else float(error > 0), 0.0 if same else 1.0)


def differ(mine: torch.Tensor, wanted: torch.Tensor, coarsest: torch.dtype = torch.float32) -> str:
    """How two results differ beyond rounding, "" where they do not.

    Args:
        mine, wanted: the results.
        coarsest: the dtype whose rounding they may hold: a result in float32 is no better than the half precision that
            it was computed from.
    """
    mine, wanted = mine.detach().cpu(), wanted.detach().cpu()
    if mine.shape != wanted.shape:
        return f"shape {tuple(mine.shape)} instead of {tuple(wanted.shape)}"
    if not wanted.numel():
        return ""
    if not wanted.is_floating_point():
        share = float((mine.double() != wanted.double()).double().mean())
        return f"{share:.0%} of the values differ" if share > 0.02 else ""
    a, b = mine.double(), wanted.double()
    nans = torch.isnan(a) != torch.isnan(b)
    infinite = (torch.isinf(a) | torch.isinf(b)) & (a != b) & ~torch.isnan(a) & ~torch.isnan(b)
    if bool(nans.any()) or bool(infinite.any()):
        return "NaN or infinity in other places"
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    error, size = float((a - b).norm()), float(b.norm())
    limit = max(_TOLERANCE.get(dtype, 1e-1) for dtype in (wanted.dtype, coarsest))
    if error > limit * size and error > 1e-5 * max(1, b.numel()) ** 0.5:
        return f"relative error {error / size if size else float('inf'):.2g}"
    # A few huge values hide wrong small ones from the norm.
    usual = b[b != 0].abs().median() if bool((b != 0).any()) else torch.tensor(0.0)
    far = (a - b).abs() > 10 * limit * (b.abs() + usual) + 1e-5
    if int(far.sum()) > 0.01 * b.numel():
        return f"{int(far.sum())} of {b.numel()} values differ by up to {float((a - b).abs()[far].max()):.2g}"
    return ""


def _coarsest(traced: ExportedModule) -> torch.dtype:
    """The float dtype of the least precision among a module's weights and arguments."""
    tensors = [*traced.program.state_dict.values(), *traced.program.constants.values(), *traced.arguments.tensors]
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.dtype in _TOLERANCE}
    return max(dtypes, key=lambda dtype: _TOLERANCE[dtype], default=torch.float32)


class _Recorder(torch.fx.Interpreter):
    """Runs an exported program on its example, on copies of all that it writes to."""

    def __init__(self, traced: ExportedModule) -> None:
        super().__init__(traced.program.graph_module, garbage_collect_values=True)
        self.traced = traced
        self.wanted: set[str] = set()
        self.values: dict[str, Any] = {}

    def run_example(self) -> list[torch.Tensor]:
        """The results for the user's own example."""
        program, signature = self.traced.program, self.traced.program.graph_signature
        users = iter(self.traced.arguments.tensors)
        args: list[Any] = []
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in signature.inputs_to_parameters:
                args.append(program.state_dict[signature.inputs_to_parameters[node.name]].detach())
            elif node.name in signature.inputs_to_buffers:
                name = signature.inputs_to_buffers[node.name]
                held = program.state_dict if name in program.state_dict else program.constants
                args.append(held[name].detach().clone())
            elif node.name in signature.inputs_to_lifted_tensor_constants:
                args.append(program.constants[signature.inputs_to_lifted_tensor_constants[node.name]].detach().clone())
            else:
                args.append(next(users).detach().clone())
        with torch.no_grad(), _full_float32():
            results = self.run(*args)
        count = len(signature.user_outputs)
        return list(results)[len(results) - count :]

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and "_assert" in str(n.target):
            return None
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_conj():
            value = value.resolve_conj()  # the trace knows nothing of such views
        if n.name in self.wanted:
            self.values[n.name] = [t.detach().cpu().clone() for t in _tensors(value)]
        return value


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, which torch uses for convolutions unless told: its error is taken for a wrong translation else."""
    cudnn = torch.backends.cudnn
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        # The context manager works where setting the flag is forbidden (torch.backends.disable_global_flags).
        with cudnn.flags(
            enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [torch.view_as_real(value.resolve_conj()) if value.is_complex() else value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _build(plan: Plan, extra: Mapping[str, Sequence[str]] | None = None) -> Program:
    """The plan with ONNX Runtime engines; ``extra`` names inner tensors that segments hand out too."""
    if extra:
        steps = [_with_outputs(s, extra.get(s.name, ())) if isinstance(s, Segment) else s for s in plan.steps]
        plan = dataclasses.replace(plan, steps=tuple(steps))
    return build_plan(plan, get_backend("onnxruntime"), BuildOptions())


def _with_outputs(segment: Segment, names: Sequence[str]) -> Segment:
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    types = {value.name: value for value in proto.graph.value_info}
    known = {spec.name for spec in segment.outputs}
    added = [types[name] for name in names if name in types and name not in known]
    proto.graph.output.extend(added)
    specs = tuple(map(spec_of, added))
    return dataclasses.replace(segment, proto=proto, outputs=(*segment.outputs, *specs))


def _first_wrong_call(
    recorder: _Recorder, model: OnnxModel, plan: Plan, inputs: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Compare every call's results with the graph's, in order; the first that differs is the wrong one.

    Which tensor of the graph holds a call's result is not recorded, so a call counts as right where any tensor that it
    made and that others read has the expected values.
    """
    calls = [(onnx_node, origin_of(onnx_node).call) for onnx_node in model.proto.graph.node]
    made = {name: call for onnx_node, call in calls for name in onnx_node.output if name}
    outside: dict[str, list[str]] = {}  # call → tensors that other calls read, or that are results
    results = {value.name for value in model.proto.graph.output}
    for onnx_node, call in calls:
        for name in onnx_node.input:
            if name in made and made[name] and made[name] != call:
                outside.setdefault(made[name], []).append(name)
    for name in results & made.keys():
        outside.setdefault(made[name], []).append(name)
    outside.pop("", None)
    recorder.wanted = set(outside)
    with torch.random.fork_rng(devices=_cuda_devices(recorder.traced)):
        torch.manual_seed(0)
        recorder.run_example()
    interesting = {name for names in outside.values() for name in names}
    per_segment = {
        segment.name: [name for node in segment.proto.graph.node for name in node.output if name in interesting]
        for segment in plan.segments
    }
    try:
        running = RunningProgram(_build(plan, per_segment), _CPU, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen = running.run_all(inputs)
    except TrtBridgeError as error:
        logger.info("the intermediate results cannot be had from ONNX Runtime: %s", error)
        return {}
    coarsest = _coarsest(recorder.traced)
    nodes_by_name = {node.name: node for node in recorder.traced.program.graph.nodes}
    targets = {name: str(node.target) for name, node in nodes_by_name.items()}
    errors: dict[str, float] = {}
    for call, node in nodes_by_name.items():
        before = max((errors.get(name, 0.0) for name in _inputs_of(node)), default=0.0)
        if call not in recorder.values or call not in outside:
            errors[call] = before  # not seen, so at least this
            continue
        index_op = targets[call].split(".")[1] in _INDEX_OPS if "." in targets[call] else False
        wanted = [t for t in recorder.values[call] if t.is_floating_point() or not index_op]
        mine = [seen[name] for name in outside[call] if name in seen]
        pairs = [(a, b) for a in mine for b in wanted if a.shape == b.shape and a.dtype == b.dtype]
        if len(wanted) == 1 and not pairs:  # a result of the wrong shape
            pairs = [(seen[name], wanted[0]) for name in outside[call] if name in results and name in seen]
        own = min((relative_error(a, b) for a, b in pairs), default=0.0)
        # Indices that may be others are passed on like an error all the same.
        free = [t for t in recorder.values[call] if index_op and not t.is_floating_point()]
        moved = [relative_error(a, b) for a in mine for b in free if a.shape == b.shape and a.dtype == b.dtype]
        errors[call] = max(own, min(moved, default=0.0))
        if pairs and all(differ(a, b, coarsest) for a, b in pairs) and own > _GROWTH * before:
            reason = f"its ONNX translation is wrong: {differ(*pairs[0], coarsest)} on the example"
            return {call: reason}
    return {}


def _inputs_of(node: torch.fx.Node) -> Iterator[str]:
    """The calls whose results a call reads."""
    for other in node.all_input_nodes:
        if other.target is operator.getitem:
            yield from _inputs_of(other)
        else:
            yield other.name


def _blame_refusals(error: TrtBridgeError) -> dict[str, str]:
    refusals = getattr(error, "refusals", ())
    return {
        refusal.origin.call: f"its ONNX translation is invalid: {refusal.reason.strip().splitlines()[-1][:300]}"
        for refusal in refusals
        if refusal.origin.call
    }


def _blame_words(words: str, model: OnnxModel) -> dict[str, str]:
    """The call of the node that ONNX Runtime's message names: ``... running Expand node. Name:'node_expand_3'``."""
    found = {}
    for node in model.proto.graph.node:
        call = origin_of(node).call
        if call and node.name and f"'{node.name}'" in words:
            found[call] = f"its ONNX translation fails in ONNX Runtime: {words.strip().splitlines()[0][:300]}"
    return found


def _cuda_devices(traced: ExportedModule) -> list[int]:
    tensors = [*traced.arguments.tensors, *traced.program.state_dict.values()]
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
