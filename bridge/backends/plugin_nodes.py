"""Plugin nodes inside a segment: what TensorRT must know of each, and the form in which its parser takes them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from ...errors import PluginError
from ...nodes import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE
from ...plugins.host_spec import HOST_ATTRIBUTE, HOST_OP_TYPE, HostInput, HostOutput, HostSpec, size_tensor
from ...plugins.registry import find_op
from ..dtypes import to_torch
from ..model import TensorSpec
from .base import Segment

if TYPE_CHECKING:
    from ...plugins.derive_host import TensorType
    from ..plan import PluginCall

# plugins.derive_host is imported where it is used: it needs torch's compiler, which takes a second to import, and a
# process that only runs engines does without.


def describe_host(call: PluginCall, inputs: tuple[TensorSpec, ...]) -> HostSpec:
    """What TensorRT must know of a call to keep it inside an engine.

    Args:
        call: the plugin call; its inputs and named outputs are the node's.
        inputs: what its inputs are in the engine, before the casts of the call.

    Raises:
        PluginError: it cannot be kept inside; says why.
    """
    if len(inputs) != len(call.inputs):
        raise PluginError(f"{call.op} has {len(call.inputs)} inputs, and the specs of {len(inputs)} are given")
    found = _derived(
        find_op(call.op),
        call.op,
        call.call,
        tuple(
            _tensor_type(spec, None if cast in (None, spec.dtype) else cast)
            for spec, cast in zip(inputs, call.input_dtypes, strict=True)
        ),
        tuple(
            None if not name or spec is None else _tensor_type(spec)
            for name, spec in zip(call.outputs, call.output_specs, strict=True)
        ),
    )
    if isinstance(found, PluginError):
        raise PluginError(str(found))
    return dataclasses.replace(found, place=str(call.origin))


@functools.lru_cache(1024)
def _derived(
    op: Any, name: str, call: str, inputs: tuple[TensorType, ...], outputs: tuple[TensorType | None, ...]
) -> HostSpec | PluginError:
    """What `derive` gives or raises. A model is planned several times, and has many calls that are alike.

    ``op`` is the torch op itself: one that is registered anew under the same name is another.
    """
    from ...plugins.derive_host import derive

    try:
        return derive(name, call, inputs, outputs)
    except PluginError as error:
        return PluginError(str(error))  # without the frames that it came through


def _tensor_type(spec: TensorSpec, cast: ir.DataType | None = None) -> TensorType:
    from ...plugins.derive_host import TensorType

    return TensorType(to_torch(spec.dtype), spec.shape, spec.ranges, None if cast is None else to_torch(cast))


def is_hosted(node: onnx.NodeProto) -> bool:
    """Whether a node is a plugin node that stays inside its segment."""
    return bool(node.domain == DOMAIN and node.op_type == HOST_OP_TYPE)


def hosted_plugins(segment: Segment) -> list[dict[str, Any]]:
    """The plugin nodes inside a segment, as JSON-ready facts: op, node, place in the user's program, waits."""
    return [
        {
            "op": _text(node, OP_ATTRIBUTE),
            "node": node.name,
            "place": (spec := HostSpec.from_json(_text(node, HOST_ATTRIBUTE))).place,
            "waits": spec.waits,
        }
        for node in segment.proto.graph.node
        if is_hosted(node)
    ]


def make_parseable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose plugin nodes have the outputs that the TensorRT plugin has.

    Outputs that nothing reads go, since the parser takes no unnamed ones, and each size tensor is an output more.
    A graph without plugin nodes is returned as it is.
    """
    if not any(map(is_hosted, proto.graph.node)):
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for index, node in enumerate(result.graph.node):
        if not is_hosted(node):
            continue
        spec = HostSpec.from_json(_text(node, HOST_ATTRIBUTE))
        read = [output.index for output in spec.outputs]
        if any(position >= len(node.output) or not node.output[position] for position in read):
            raise PluginError(f"Plugin node {node.name!r} has outputs {list(node.output)}, its host attribute {read}.")
        named = [node.output[position] for position in read]
        del node.output[:]
        node.output.extend(named)
        node.output.extend(f"{DOMAIN}.{size_tensor(number)}.{index}" for number in range(len(spec.sizes)))
    return result


def require_ops(plugins: list[dict[str, Any]]) -> None:
    """Make sure that the plugin ops inside an engine are registered in this process.

    Raises:
        PluginError: some are not; all of them are named.
    """
    missing: dict[str, None] = {}
    for plugin in plugins:
        try:
            find_op(plugin["op"])
        except PluginError:
            missing[plugin["op"]] = None
    if len(missing) == 1:
        find_op(next(iter(missing)))  # raises again
    if missing:
        raise PluginError(
            f"{len(missing)} plugin ops of this engine are not registered in this process: {', '.join(missing)}. "
            "Import the Python modules that register them before loading it."
        )


def probe_segment() -> Segment:
    """The smallest segment with a plugin node, to ask a parser whether it takes one."""
    x = TensorSpec("x", ir.DataType.FLOAT, (2,), ((2, 2, 2),))
    y = TensorSpec("y", ir.DataType.FLOAT, (2,), ((2, 2, 2),))
    call = '{"args":[{"tensor":0}],"kwargs":{}}'
    op = "aten::clone.default"
    host = HostSpec((HostInput("FLOAT", "", 1),), (HostOutput(0, "FLOAT", (2,)),))
    attributes = {OP_ATTRIBUTE: op, CALL_ATTRIBUTE: call, HOST_ATTRIBUTE: host.to_json()}
    node = onnx.helper.make_node(HOST_OP_TYPE, ["x"], ["y"], "probe", domain=DOMAIN, **attributes)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "probe", values[:1], values[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return Segment("probe", proto, {}, (x,), (y,))


def _text(node: onnx.NodeProto, name: str) -> str:
    found = next((attribute.s for attribute in node.attribute if attribute.name == name), None)
    if found is None:
        raise PluginError(f"Plugin node {node.name!r} has no attribute {name!r}.")
    return bytes(found).decode()
