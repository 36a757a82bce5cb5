"""What values the tensors of a model have on its example: the graph measures itself, in one run of ONNX Runtime.

Behind every float tensor stand a few nodes that reduce it to five numbers. So nothing but these numbers is kept, and
the memory is that of one run and a copy of its largest tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from ..errors import TrtBridgeError
from .backends import get_backend
from .backends.base import BuildOptions, Segment
from .build import build_plan
from .model import OnnxModel
from .partition import partition, spec_of
from .runtime import RunningProgram
from .seeds import seeded

logger = logging.getLogger(__name__)

LEAST_NORMAL = 2.0**-14
"""float16's least number of full precision (IEEE 754-2008, binary16)."""

LEAST_KEPT = 2.0**-25
"""What is no larger than half of float16's least number becomes 0."""

MOST_WEIGHT_BYTES = 2 << 30
"""Weights above this are not run: ONNX Runtime holds a second copy of them."""

_FIRST_OPSET = 9
_FLOAT = onnx.TensorProto.FLOAT
_FLOATS = (_FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
# Their results hold no other values than their inputs.
_MOVING = {"Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Identity"}


@dataclass(frozen=True)
class TensorRange:
    """The values that a float32 tensor had.

    Attributes:
        largest: magnitude of the largest finite one.
        subnormal_share: of those that are not 0, the share whose magnitude float16 holds with fewer bits, or not.
        lost_share: of those that are not 0, the share that float16 turns into 0.
        finite: whether none was infinite or NaN.
    """

    largest: float
    subnormal_share: float
    lost_share: float
    finite: bool

    @classmethod
    def of(cls, values: torch.Tensor) -> TensorRange:
        """The range of values that are at hand."""
        magnitude = values.detach().cpu().float().abs()
        finite = torch.isfinite(magnitude)
        magnitude = torch.where(finite, magnitude, 0.0).reshape(-1)
        counts = [float((magnitude > limit).sum()) for limit in (0.0, LEAST_NORMAL, LEAST_KEPT)]
        largest = float(magnitude.max()) if magnitude.numel() else 0.0
        return cls._make(largest, counts, float((~finite).sum()))

    def merged(self, other: TensorRange) -> TensorRange:
        """The range over two samples; the shares are those of the worse one."""
        return TensorRange(
            max(self.largest, other.largest),
            max(self.subnormal_share, other.subnormal_share),
            max(self.lost_share, other.lost_share),
            self.finite and other.finite,
        )

    @classmethod
    def _make(cls, largest: float, counts: Sequence[float], infinite: float) -> TensorRange:
        nonzero, normal, kept = counts
        of = max(nonzero, 1.0)
        return cls(largest, (nonzero - normal) / of, (nonzero - kept) / of, infinite == 0)


def calibrate(model: OnnxModel, *samples: Sequence[torch.Tensor]) -> dict[str, TensorRange]:
    """Run a model on samples and measure its floating tensors, those inside conditions and loops excepted.

    Args:
        model: in float32, or mixed; 16-bit tensors are not rounded. Plugin nodes run as they would between engines.
        samples: each holds a tensor for each input.

    Returns:
        The range of each tensor that a node makes and of each input, by name; tensors that only hold values of others
        in another order are left out.

    Raises:
        TrtBridgeError: ONNX Runtime cannot run the model, or it is too large or too old for that.
    """
    check_runnable(model)
    plan = partition(model)
    measured: dict[str, str] = {}
    steps = tuple(_measuring(step, measured) if isinstance(step, Segment) else step for step in plan.steps)
    program = build_plan(dataclasses.replace(plan, steps=steps), get_backend("onnxruntime"), BuildOptions())
    running = RunningProgram(program, torch.device("cpu"), None)
    found: dict[str, TensorRange] = {}
    for sample in samples:
        tensors = [tensor.detach().cpu() for tensor in sample]
        with seeded():
            seen = running.run_all(tensors)
        ranges = {
            spec.name: TensorRange.of(tensor)
            for spec, tensor in zip(model.signature.inputs, tensors, strict=True)
            if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        }
        for name, numbers in measured.items():
            largest, nonzero, normal, kept, infinite = seen[numbers].double().tolist()
            ranges[name] = TensorRange._make(largest, (nonzero, normal, kept), infinite)
        found = {name: seen.merged(found.get(name, seen)) for name, seen in ranges.items()}
    return found


def check_runnable(model: OnnxModel) -> None:
    """See that a model may be run in ONNX Runtime to measure it.

    Raises:
        TrtBridgeError: it is too large or too old for that.
    """
    if model.weight_bytes > MOST_WEIGHT_BYTES:
        raise TrtBridgeError(f"its weights of {model.weight_bytes / 1e9:.1f} GB would be held twice")
    opset = next((o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    if opset < _FIRST_OPSET:
        raise TrtBridgeError(f"opset {opset} is too old, {_FIRST_OPSET} is the first that can be measured")


def overflowing(ranges: Mapping[str, TensorRange], margin: float) -> dict[str, str]:
    """The tensors that float16 cannot hold, each with the reason.

    Args:
        ranges: of the example.
        margin: how many times larger the values of other inputs may be.
    """
    limit = float(np.finfo(np.float16).max)
    found = {}
    for name, seen in ranges.items():
        if seen.largest * margin > limit:
            found[name] = f"reaches {seen.largest:.3g} on the example"
        elif 0 < seen.largest < LEAST_NORMAL:
            found[name] = f"is {seen.largest:.3g} at most on the example, too small for float16"
    return found


def _measuring(segment: Segment, measured: dict[str, str]) -> Segment:
    """A segment with an output of five numbers for each of its float tensors; `measured` gets their names."""
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    graph = proto.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    constants = {"zero": [0.0], "normal": [LEAST_NORMAL], "kept": [LEAST_KEPT], "infinity": [np.inf]}
    for name, values in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.float32), _own(name)))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), _own("flat")))
    outputs = []
    for node in segment.proto.graph.node:
        if node.op_type in _MOVING and not node.domain:
            continue
        for name in node.output:
            if name and types.get(name) in _FLOATS and name not in measured:
                measured[name] = _own(f"{len(measured)}")
                source = name
                if types[name] != _FLOAT:
                    source = f"{measured[name]}_wide"
                    graph.node.append(onnx.helper.make_node("Cast", [name], [source], to=_FLOAT))
                graph.node.extend(_nodes(source, measured[name]))
                outputs.append(onnx.helper.make_tensor_value_info(measured[name], _FLOAT, [5]))
    graph.output.extend(outputs)
    return dataclasses.replace(segment, proto=proto, outputs=(*segment.outputs, *map(spec_of, outputs)))


def _own(name: str) -> str:
    return f"trtbridge_range_{name}"


def _nodes(source: str, result: str) -> list[onnx.NodeProto]:
    """Largest finite magnitude, counts above three limits, and how many are infinite or NaN, as one (5,) tensor."""
    make = onnx.helper.make_node
    nodes = [
        make("Reshape", [source, _own("flat")], [f"{result}_flat"]),
        # A zero more, so that an empty tensor has a maximum.
        make("Concat", [f"{result}_flat", _own("zero")], [f"{result}_all"], axis=0),
        make("Abs", [f"{result}_all"], [f"{result}_abs"]),
        make("Less", [f"{result}_abs", _own("infinity")], [f"{result}_finite"]),  # not true for NaN
        make("Where", [f"{result}_finite", f"{result}_abs", _own("zero")], [f"{result}_values"]),
        make("ReduceMax", [f"{result}_values"], [f"{result}_largest"]),
        make("Not", [f"{result}_finite"], [f"{result}_4"]),
    ]
    for number, limit in enumerate(("zero", "normal", "kept"), start=1):
        nodes.append(make("Greater", [f"{result}_values", _own(limit)], [f"{result}_{number}"]))
    for number in range(1, 5):
        nodes.append(make("Cast", [f"{result}_{number}"], [f"{result}_float{number}"], to=_FLOAT))
        nodes.append(make("ReduceSum", [f"{result}_float{number}"], [f"{result}_count{number}"]))
    parts = [f"{result}_largest", *(f"{result}_count{number}" for number in range(1, 5))]
    return [*nodes, make("Concat", parts, [result], axis=0)]
