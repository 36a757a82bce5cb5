"""Whether the ONNX graph means what the module means: both are run on the example, on real numbers.

Some translations are silently wrong (avg_pool2d's divisor_override, scatter_reduce's mean) and some make graphs that no
runtime takes, so the plan is run with ONNX Runtime before anything is built. Where the results differ, the first call
whose own results differ is to blame.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..errors import TrtBridgeError
from .activations import INDEX_OPS, Recorder, cuda_devices, excess, relative_error, with_outputs
from .backends import get_backend
from .backends.base import BuildOptions, Segment
from .build import build_plan
from .export import ExportedModule
from .model import OnnxModel, origin_of
from .plan import Plan
from .program import Program
from .runtime import RunningProgram
from .seeds import seeded

logger = logging.getLogger(__name__)

_LIMIT_BYTES = 2 << 30
"""Weights above this are not checked: the check holds a second copy of them."""

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative error (L2 norm) by dtype: far above rounding, far below a wrong formula."""

_GROWTH = 20
"""A call is to blame where its error is this many times that of what it reads: others only pass an error on."""

_CPU = torch.device("cpu")


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
    interpreter = Recorder(traced)
    with seeded(cuda_devices(traced)):
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
    with seeded():
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


def differ(mine: torch.Tensor, wanted: torch.Tensor, coarsest: torch.dtype = torch.float32) -> str:
    """How two results differ beyond rounding, "" where they do not.

    Args:
        mine, wanted: the results.
        coarsest: the dtype whose rounding they may hold: a result in float32 is no better than the half precision that
            it was computed from.
    """
    return excess(mine, wanted, max(_TOLERANCE.get(dtype, 1e-1) for dtype in (wanted.dtype, coarsest)))


def _coarsest(traced: ExportedModule) -> torch.dtype:
    """The float dtype of the least precision among a module's weights and arguments."""
    tensors = [*traced.program.state_dict.values(), *traced.program.constants.values(), *traced.arguments.tensors]
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.dtype in _TOLERANCE}
    return max(dtypes, key=lambda dtype: _TOLERANCE[dtype], default=torch.float32)


def _build(plan: Plan, extra: Mapping[str, Sequence[str]] | None = None) -> Program:
    """The plan with ONNX Runtime engines; ``extra`` names inner tensors that segments hand out too."""
    if extra:
        steps = [with_outputs(s, extra.get(s.name, ())) if isinstance(s, Segment) else s for s in plan.steps]
        plan = dataclasses.replace(plan, steps=tuple(steps))
    return build_plan(plan, get_backend("onnxruntime"), BuildOptions())


def _first_wrong_call(
    recorder: Recorder, model: OnnxModel, plan: Plan, inputs: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Compare every call's results with the graph's, in order; the first that differs is the wrong one.

    Which tensor of the graph holds a call's result is not recorded, so a call counts as right where any tensor that it
    made and that others read has the expected values.
    """
    calls = [(onnx_node, origin_of(onnx_node).call) for onnx_node in model.proto.graph.node]
    made = {name: call for onnx_node, call in calls for name in onnx_node.output if name}
    outside: dict[str, dict[str, None]] = {}  # call → tensors that other calls read, or that are results, each once
    results = {value.name for value in model.proto.graph.output}
    for onnx_node, call in calls:
        for name in onnx_node.input:
            if name in made and made[name] and made[name] != call:
                outside.setdefault(made[name], {})[name] = None
    for name in results & made.keys():
        outside.setdefault(made[name], {})[name] = None
    outside.pop("", None)
    recorder.wanted = set(outside)
    with seeded(cuda_devices(recorder.traced)):
        recorder.run_example()
    interesting = {name for names in outside.values() for name in names}
    per_segment = {
        segment.name: [name for node in segment.proto.graph.node for name in node.output if name in interesting]
        for segment in plan.segments
    }
    try:
        running = RunningProgram(_build(plan, per_segment), _CPU, None)
        with seeded():
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
        index_op = targets[call].split(".")[1] in INDEX_OPS if "." in targets[call] else False
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
        if pairs and own > _GROWTH * before and all(differ(a, b, coarsest) for a, b in pairs):
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
