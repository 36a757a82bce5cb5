"""Inner values of a model: of a traced module call by call, and of an ONNX graph tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from ..errors import TrtBridgeError
from ..nodes import DOMAIN
from ..passes import numbers
from .backends import get_backend
from .backends.base import BuildOptions, Segment
from .build import build_plan
from .dtypes import to_torch
from .export import ExportedModule
from .model import OnnxModel, iterate_nodes
from .partition import partition, spec_of
from .runtime import RunningProgram
from .seeds import seeded

logger = logging.getLogger(__name__)

INDEX_OPS = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "kthvalue", "median", "nanmedian", "mode",
             "cummax", "cummin", "aminmax", "msort"}  # fmt: skip
"""Names of aten ops whose integer results may be any of those of equal values."""

NOT_FINITE = "NaN or infinity in other places"
"""What `excess` says of results that are finite in different places."""

_CPU = torch.device("cpu")
_UNUSUAL = 1e4
"""Values this many times larger than the median are masks and the like."""

_BLOCK = 1 << 15
"""Elements at a time where two tensors are compared: their copies in float64 stay in a processor's cache."""

_SHORTER = {torch.float32, torch.float16, torch.bfloat16}


class Recorder(torch.fx.Interpreter):
    """Runs an exported program, on copies of all that it writes to, and keeps the results of calls.

    Args:
        traced: the module.
        golden: compute in float64, as far as the ops go: those without float64 run in float32, and give float64.

    Attributes:
        wanted: names of the calls whose results are kept.
        values: those results, on the CPU, by name of the call.
        types: shape and dtype of every tensor that each call of the last run gave.
    """

    def __init__(self, traced: ExportedModule, golden: bool = False) -> None:
        super().__init__(traced.program.graph_module, garbage_collect_values=True)
        self.traced = traced
        self.golden = golden
        self.wanted: Collection[str] = ()
        self.values: dict[str, list[torch.Tensor]] = {}
        self.types: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}

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
        if self.golden:
            args = [_as_double(arg) for arg in args]
        with torch.no_grad(), full_float32():
            results = self.run(*args)
        count = len(signature.user_outputs)
        return list(results)[len(results) - count :]

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and "_assert" in str(n.target):
            return None
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_conj():
            value = value.resolve_conj()  # the trace knows nothing of such views
        if n.op == "call_function":
            tensors = tensors_of(value)
            self.types[n.name] = [(tuple(t.shape), t.dtype) for t in tensors]
            if n.name in self.wanted:
                self.values[n.name] = [t.detach().cpu().clone() for t in tensors]
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self.golden:
            return super().call_function(target, args, kwargs)
        wide_args, wide_kwargs = pytree.tree_map(_as_double, (args, kwargs))
        try:
            return super().call_function(target, wide_args, wide_kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            logger.info("%s runs in float32 instead of float64: %s", target, error)
            args, kwargs = pytree.tree_map(_as_single, (args, kwargs))
            return pytree.tree_map(_as_double, super().call_function(target, args, kwargs))


def _as_double(value: Any) -> Any:
    """A float tensor in float64, and float64 for a dtype that is shorter; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _SHORTER else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _SHORTER else value


def _as_single(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
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


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a call's result in order, complex ones as (..., 2) reals."""
    if isinstance(value, torch.Tensor):
        return [torch.view_as_real(value.resolve_conj()) if value.is_complex() else value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def cuda_devices(traced: ExportedModule) -> list[int]:
    """Indices of the CUDA devices that a module is on, for `seeded`."""
    tensors = [*traced.arguments.tensors, *traced.program.state_dict.values()]
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


def relative_error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2 norm of the error over that of the expected values where both are finite; for integers the share that differs.

    1 where shapes differ, or NaN and infinity are in other places.
    """
    a, b = mine.detach().cpu(), wanted.detach().cpu()
    if not wanted.is_floating_point():
        return int((a != b).sum()) / b.numel() if a.shape == b.shape and b.numel() else float(a.shape != b.shape)
    if a.shape != b.shape:
        return 1.0
    size, error, same = *_norms(a, b), True
    if not math.isfinite(size + error):  # asked only now, for looking at every element takes longer than all else here
        finite_a, finite_b = torch.isfinite(a), torch.isfinite(b)
        same = torch.equal(finite_a, finite_b)
        finite = finite_a & finite_b
        size, error = _norms(a[finite], b[finite])
    return max(error / size if size else float(error > 0), 0.0 if same else 1.0)


def _norms(mine: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """L2 norms in float64 of the expected values and of the error, of tensors of one shape.

    Block by block: whole copies in float64 of large tensors take ten times as long, most of it for fresh memory.
    """
    size = error = 0.0
    for one, other in zip(mine.flatten().split(_BLOCK), wanted.flatten().split(_BLOCK), strict=True):
        expected = other.double()
        off = one.double() - expected
        size += float(expected.dot(expected))
        error += float(off.dot(off))
    return math.sqrt(size), math.sqrt(error)


def layer_error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error, or that among the usual values where it is larger.

    A mask of -1e9 would hide whatever happens to the values that it leaves.
    """
    error = relative_error(mine, wanted)
    if mine.shape != wanted.shape or not wanted.is_floating_point() or not wanted.numel():
        return error
    size = wanted.detach().cpu().double().abs()
    usual = size <= _UNUSUAL * float(size[size > 0].median()) if bool((size > 0).any()) else size <= 0
    if bool(usual.all()) or not bool(usual.any()):
        return error
    return max(error, relative_error(mine.detach().cpu()[usual], wanted.detach().cpu()[usual]))


def excess(mine: torch.Tensor, wanted: torch.Tensor, limit: float, floor: float = 1e-5, share: float = 0.02) -> str:
    """How two results differ beyond a limit, "" where they do not.

    Args:
        mine, wanted: the results.
        limit: largest relative error (L2 norm); single values may be ten times as far off, but for one in a hundred.
        floor: absolute error (root mean square) that is nothing: what is left where values cancel out.
        share: of integers and booleans, how many may differ.
    """
    mine, wanted = mine.detach().cpu(), wanted.detach().cpu()
    if mine.shape != wanted.shape:
        return f"shape {tuple(mine.shape)} instead of {tuple(wanted.shape)}"
    if not wanted.numel():
        return ""
    if not wanted.is_floating_point():
        differing = float((mine.double() != wanted.double()).double().mean())
        return f"{differing:.0%} of the values differ" if differing > share else ""
    a, b = mine.double(), wanted.double()
    nans = torch.isnan(a) != torch.isnan(b)
    infinite = (torch.isinf(a) | torch.isinf(b)) & (a != b) & ~torch.isnan(a) & ~torch.isnan(b)
    if bool(nans.any()) or bool(infinite.any()):
        return NOT_FINITE
    finite = torch.isfinite(a) & torch.isfinite(b)
    a, b = a[finite], b[finite]
    error, size = float((a - b).norm()), float(b.norm())
    if error > limit * size and error > floor * max(1, b.numel()) ** 0.5:
        return f"relative error {error / size if size else float('inf'):.2g}"
    # A few huge values hide wrong small ones from the norm.
    usual = b[b != 0].abs().median() if bool((b != 0).any()) else torch.tensor(0.0)
    far = (a - b).abs() > 10 * limit * (b.abs() + usual) + floor
    if int(far.sum()) > 0.01 * b.numel():
        return f"{int(far.sum())} of {b.numel()} values differ by up to {float((a - b).abs()[far].max()):.2g}"
    return ""


def with_outputs(segment: Segment, names: Collection[str]) -> Segment:
    """A segment that hands out inner tensors, too, as far as their types are known."""
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    known = {spec.name for spec in segment.outputs}
    made = {name for node in proto.graph.node for name in node.output}
    types = {value.name: value for value in proto.graph.value_info if value.type.tensor_type.elem_type}
    added = [types[name] for name in names if name in types and name in made and name not in known]
    proto.graph.output.extend(added)
    return dataclasses.replace(segment, proto=proto, outputs=(*segment.outputs, *map(spec_of, added)))


def run_graph(
    model: OnnxModel, feeds: Mapping[str, torch.Tensor], names: Sequence[str], types: Mapping[str, ir.DataType]
) -> dict[str, torch.Tensor]:
    """Run a graph on a CPU and return some of its tensors.

    ONNX Runtime takes the graph as it is, without optimizations, so that float16 is rounded to at every node. One with
    plugin nodes, or with types that ONNX Runtime lacks on a CPU, is split into a plan.

    Args:
        model: the graph; its declared outputs do not count.
        feeds: a tensor for each input, cast here.
        names: which tensors of the main graph; inputs among them come back.
        types: dtype of every tensor that is wanted.

    Raises:
        TrtBridgeError: it cannot be run; the message is that of whatever failed.
    """
    given = {name: feeds[name] for name in names if name in feeds}
    inner = [name for name in dict.fromkeys(names) if name not in given]
    if not inner:
        return given
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    described = {value.name: value for value in (*model.proto.graph.value_info, *model.proto.graph.output)}
    del proto.graph.output[:]
    for name in inner:
        empty = onnx.helper.make_empty_tensor_value_info(name)
        empty.type.tensor_type.elem_type = int(types[name])
        proto.graph.output.append(described.get(name, empty))
    if any(node.domain == DOMAIN for node in iterate_nodes(proto.graph)):
        return given | _run_plan(dataclasses.replace(model, proto=proto), feeds, inner)
    try:
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        del bare.graph.value_info[:]  # shapes that the graph does not have, if it is wrong, are an error in the session
        for value in bare.graph.output:
            value.type.tensor_type.ClearField("shape")
        wanted = {value.name for value in bare.graph.input}
        arrays = {name: to_numpy(tensor) for name, tensor in feeds.items() if name in wanted}
        found = numbers.run(bare, model.weights, arrays)
        return given | {name: from_numpy(np.asarray(found[name])) for name in inner}
    except Exception as error:  # ONNX Runtime's errors have no common base
        try:
            return given | _run_plan(dataclasses.replace(model, proto=proto), feeds, inner)
        except TrtBridgeError:
            raise TrtBridgeError(f"ONNX Runtime cannot run it: {str(error).splitlines()[0][:300]}") from error


def _run_plan(model: OnnxModel, feeds: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Run a graph whose outputs are what is wanted, as a plan of ONNX Runtime."""
    plan = partition(model)
    running = RunningProgram(build_plan(plan, get_backend("onnxruntime"), BuildOptions()), _CPU, None)
    inputs = [feeds[spec.name].to(dtype=to_torch(spec.dtype)) for spec in model.signature.inputs]
    with seeded():
        seen = running.run_all(inputs)
    return {name: seen[plan.aliases.get(name, name)] for name in names}


_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.int8, ml_dtypes.float8_e5m2),
}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values on the CPU, in types of ml_dtypes where NumPy has none."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in _BITS:
        return np.asarray(tensor.numpy())
    bits, dtype = _BITS[tensor.dtype]
    return np.asarray(tensor.view(bits).numpy().view(dtype))


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_numpy`: a copy."""
    for dtype, (bits, short) in _BITS.items():
        if array.dtype == short:
            return torch.from_numpy(array.view(np.int16 if bits == torch.int16 else np.int8).copy()).view(dtype)
    return torch.from_numpy(array.copy(order="C"))
