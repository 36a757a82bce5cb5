"""From one graph to a plan: plugin nodes split it into segments, by plugin depth.

The plugin depth of a tensor is the largest number of plugin nodes on any path to it. Segment k holds the ordinary nodes
of depth k, so it reads only from segments up to k and from plugins below k: every segment is convex and the order of
steps follows. Shape arithmetic is cheap and would cross boundaries as tensors whose values the host must know, so each
segment computes what it needs of it again; so it does with what is made of weights alone (a transposed weight), which
the builder folds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from ..errors import UnsupportedOpError
from ..nodes import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE, REASON_KEY
from ..plugins.host_spec import HOST_ATTRIBUTE, HOST_OP_TYPE
from .backends.base import Backend, Segment
from .dims import Shape
from .model import OnnxModel, TensorSpec, iterate_nodes, origin_of
from .plan import Plan, PluginCall

_SHAPE_SOURCES = {"Shape", "Size"}
_SHAPE_ARITHMETIC = {
    "Abs", "Add", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Identity", "Max", "Min",
    "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomUniform"}
# Types that TensorRT has not: casts to and from them beside a plugin node are done by the plugin call.
_PLUGIN_ONLY_TYPES = {
    ir.DataType.DOUBLE, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64, ir.DataType.INT8,
}  # fmt: skip


def partition(model: OnnxModel, host: Backend | None = None, outside: Collection[str] = ()) -> Plan:
    """Split a model at its plugin nodes.

    Args:
        model: after the passes.
        host: the backend whose engines may hold plugins; None keeps every plugin between engines.
        outside: names of plugin nodes that stay between engines all the same: the backend failed over them.

    Returns:
        The plan; a model without plugin nodes is one segment, and one that only forwards its inputs has no step.

    Raises:
        UnsupportedOpError: a plugin node stands inside the body of an If, Loop or Scan node.
    """
    return _Partitioner(model, host, outside).plan()


def is_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node is a plugin node."""
    return node.domain == DOMAIN


@dataclass
class _Partitioner:
    model: OnnxModel
    host: Backend | None
    kept_out: Collection[str]
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)  # by tensor
    shape_like: set[int] = field(default_factory=set)  # by id: nodes that each segment has again
    absorbed: dict[str, tuple[str, ir.DataType]] = field(default_factory=dict)  # output of a cast → (its input, dtype)
    outside: set[int] = field(default_factory=set)  # by id: plugin nodes that run between engines
    hosted: dict[int, PluginCall] = field(default_factory=dict)  # by id: plugin nodes inside engines
    host_refusals: dict[int, str] = field(default_factory=dict)  # by id: why not inside

    def __post_init__(self) -> None:
        graph = self.model.proto.graph
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.graph_outputs = [value.name for value in graph.output]
        self.types = tensor_types(self.model.proto)
        self.reads = {id(node): reads_of(node) for node in self.nodes}
        self.producers = {name: node for node in self.nodes for name in node.output if name}

    def plan(self) -> Plan:
        self._refuse_plugins_in_bodies()
        self._choose_hosts()
        aliases = self._take_out_aliases()
        plugins = [node for node in self.nodes if id(node) in self.outside]
        if plugins:
            self._absorb_casts(plugins)
            self._measure_depths()
        calls = [self._plugin_call(node) for node in plugins]
        results = [aliases.get(name, name) for name in self.graph_outputs]
        wanted = {name for call in calls for name in call.inputs} | set(results)
        by_depth: dict[int, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            if id(node) not in self.outside and node.output[0] not in self.absorbed:
                needed = id(node) not in self.shape_like or wanted.intersection(node.output)
                if needed or not plugins:
                    by_depth.setdefault(self._depth(node), []).append(node)
        groups = {depth: self._with_shape_arithmetic(nodes) for depth, nodes in by_depth.items()}
        for nodes in groups.values():
            made = {name for node in nodes for name in node.output}
            wanted |= {name for node in nodes for name in self.reads[id(node)]} - made
        steps: list[Segment | PluginCall] = []
        home: set[str] = set()  # shape arithmetic may be made in several segments; the first one hands it out
        for depth in sorted({*groups, *(self._depth(node) for node in plugins)}):
            if depth in groups:
                segment = self._segment(
                    f"segment{sum(isinstance(s, Segment) for s in steps)}", groups[depth], wanted, home
                )
                if segment is not None:
                    steps.append(segment)
                    home |= {spec.name for spec in segment.outputs}
            steps += [call for call, node in zip(calls, plugins, strict=True) if self._depth(node) == depth]
        constants = self._constants({name for call in calls for name in call.inputs} | set(results))
        return Plan(
            tuple(steps), self.model.signature, constants, aliases, self.model.source, dict(self.model.data_dims)
        )

    def _refuse_plugins_in_bodies(self) -> None:
        inside = [n for node in self.nodes for body in _bodies(node) for n in iterate_nodes(body) if is_plugin(n)]
        if inside:
            lines = "\n".join(f"  {node.op_type} from {origin_of(node)}" for node in inside)
            raise UnsupportedOpError(
                f"Plugin ops inside the body of a condition or loop cannot run between engine segments:\n{lines}\n"
                "Move them out of torch.cond, while_loop or scan."
            )

    def _choose_hosts(self) -> None:
        """Ask the backend of each plugin node whether its engine can hold it."""
        for node in self.nodes:
            if not is_plugin(node):
                continue
            if self.host is not None:
                call = self._plugin_call(node)
                if node.name in self.kept_out:
                    reason = "the builder failed over it"
                else:
                    reason = self.host.plugin_refusal(call, tuple(self._spec(name) for name in call.inputs))
                if not reason:
                    self.hosted[id(node)] = call
                    continue
                self.host_refusals[id(node)] = reason
            self.outside.add(id(node))

    def _hosted_node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A plugin node as the backend's parser takes it."""
        assert self.host is not None
        call = self.hosted[id(node)]
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.op_type = HOST_OP_TYPE
        spec = self.host.host_spec(call, tuple(self._spec(name) for name in call.inputs))
        made.attribute.append(onnx.helper.make_attribute(HOST_ATTRIBUTE, spec))
        return made

    def _take_out_aliases(self) -> dict[str, str]:
        """Identity nodes that only forward what no engine makes need no engine."""
        made = {name for node in self.nodes if id(node) not in self.outside for name in node.output}
        aliases = {
            node.output[0]: node.input[0]
            for node in self.nodes
            if node.op_type == "Identity"
            and not node.domain
            and node.output[0] in self.graph_outputs
            and node.input[0] not in made
        }
        read = {name for node in self.nodes for name in self.reads[id(node)]}
        aliases = {result: source for result, source in aliases.items() if result not in read}
        self.nodes = [node for node in self.nodes if node.output[0] not in aliases]
        return aliases

    def _absorb_casts(self, plugins: list[onnx.NodeProto]) -> None:
        """Casts beside a plugin node to or from types that TensorRT lacks become part of the plugin call."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in self.reads[id(node)]:
                readers.setdefault(name, []).append(node)
        for node in self.nodes:
            if node.op_type != "Cast" or node.domain:
                continue
            source, target = node.input[0], node.output[0]
            to = _cast_target(node)
            if target in self.graph_outputs:
                continue
            read_by = readers.get(target, ())
            if to in _PLUGIN_ONLY_TYPES and all(id(reader) in self.outside for reader in read_by):
                self.absorbed[target] = (source, to)
        for plugin in plugins:
            for name in plugin.output:
                casts = readers.get(name, [])
                kind = self.types.get(name, (None, None))[0]
                # With more readers than one cast the tensor itself must stay.
                single = len(casts) == 1 and casts[0].op_type == "Cast" and name not in self.graph_outputs
                if kind in _PLUGIN_ONLY_TYPES and single and casts[0].output[0] not in self.graph_outputs:
                    self.absorbed.setdefault(casts[0].output[0], (name, _cast_target(casts[0])))

    def _measure_depths(self) -> None:
        static = set(self.initializers)
        constant = set(static)
        for node in self.nodes:  # topological order
            depth = 0
            for name in self.reads[id(node)]:
                producer = self.producers.get(name)
                if producer is not None:
                    depth = max(depth, self.depths[name] + (id(producer) in self.outside))
            for name in node.output:
                self.depths[name] = depth
            if node.domain or is_plugin(node) or _bodies(node):
                continue
            reads = self.reads[id(node)]
            from_shapes = all(
                name in static or (name in self.producers and id(self.producers[name]) in self.shape_like)
                for name in reads
            )
            of_weights = constant.issuperset(reads) and node.op_type not in _RANDOM
            if of_weights:
                constant.update(node.output)
            if node.op_type in _SHAPE_SOURCES or of_weights or (node.op_type in _SHAPE_ARITHMETIC and from_shapes):
                self.shape_like.add(id(node))

    def _depth(self, node: onnx.NodeProto) -> int:
        return self.depths.get(next(name for name in node.output if name), 0)

    def _with_shape_arithmetic(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """These nodes and the shape arithmetic that they need, in graph order."""
        chosen = {id(node) for node in nodes}
        pending = list(nodes)
        while pending:
            for name in self.reads[id(pending.pop())]:
                producer = self.producers.get(name)
                if producer is not None and id(producer) in self.shape_like and id(producer) not in chosen:
                    chosen.add(id(producer))
                    pending.append(producer)
        return [node for node in self.nodes if id(node) in chosen]

    def _plugin_call(self, node: onnx.NodeProto) -> PluginCall:
        attributes = {attribute.name: attribute.s.decode() for attribute in node.attribute}
        pairs = [self.absorbed.get(name, (name, None)) for name in node.input]
        outputs = list(node.output)
        renamed = {source: target for target, (source, _) in self.absorbed.items() if source in outputs}
        outputs = [renamed.get(name, name) for name in outputs]
        return PluginCall(
            name=node.name or outputs[0],
            op=attributes[OP_ATTRIBUTE],
            call=attributes[CALL_ATTRIBUTE],
            inputs=tuple(name for name, _ in pairs),
            outputs=tuple(outputs),
            input_dtypes=tuple(dtype for _, dtype in pairs),
            output_specs=tuple(self._spec(name) if name else None for name in outputs),
            origin=origin_of(node),
            reason=next((entry.value for entry in node.metadata_props if entry.key == REASON_KEY), ""),
            host_refusal=self.host_refusals.get(id(node), ""),
        )

    def _segment(self, name: str, nodes: list[onnx.NodeProto], wanted: set[str], home: set[str]) -> Segment | None:
        made = {output for node in nodes for output in node.output if output}
        read = list(dict.fromkeys(n for node in nodes for n in self.reads[id(node)]))
        outputs = [n for n in made_in_order(nodes) if n in wanted and n not in home]
        if not outputs:
            return None
        inputs = [n for n in read if n not in made and n not in self.initializers]
        source = self.model.proto
        graph = onnx.GraphProto(name=name)
        graph.node.extend(self._hosted_node(node) if id(node) in self.hosted else node for node in nodes)
        graph.input.extend(self._value_info(n) for n in inputs)
        graph.output.extend(self._value_info(n) for n in outputs)
        used = set(read)
        graph.initializer.extend(t for n, t in self.initializers.items() if n in used)
        outside = {*inputs, *outputs}
        graph.value_info.extend(v for v in source.graph.value_info if v.name in made and v.name not in outside)
        proto = onnx.ModelProto(ir_version=source.ir_version, producer_name="trtbridge", graph=graph)
        proto.functions.extend(source.functions)
        hosted = tuple(self.hosted[id(node)] for node in nodes if id(node) in self.hosted)
        proto.opset_import.extend(o for o in source.opset_import if o.domain != DOMAIN or hosted)
        provenance = {n: origin for n, origin in self.model.provenance.items() if n in made or n in used}
        weights = {n: self.model.weights[n] for n in used if n in self.model.weights}
        return Segment(
            name, proto, weights, tuple(map(self._spec, inputs)), tuple(map(self._spec, outputs)), provenance, hosted
        )

    def _spec(self, name: str) -> TensorSpec:
        dtype, shape = self.types.get(name, (None, None))
        if dtype is None or shape is None:
            raise UnsupportedOpError(
                f"Tensor {name!r} crosses from one segment to the next, but its type or rank is not known "
                f"(made by {self.model.provenance.get(name)})."
            )
        signature = self.model.signature
        return TensorSpec.make(name, dtype, shape, {**signature.dims, **self.model.data_dims}, signature.profiles)

    def _value_info(self, name: str) -> onnx.ValueInfoProto:
        spec = self._spec(name)
        return onnx.helper.make_tensor_value_info(name, int(spec.dtype), list(spec.shape))

    def _constants(self, names: Iterable[str]) -> dict[str, ir.TensorProtocol]:
        found: dict[str, ir.TensorProtocol] = {}
        for name in names:
            if name in self.model.weights:
                found[name] = self.model.weights[name]
            elif name in self.initializers:
                found[name] = ir.serde.deserialize_tensor(self.initializers[name])
        return found


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """The spec of a tensor of a graph, without ranges."""
    sizes = value.type.tensor_type.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in sizes)
    return TensorSpec.make(value.name, ir.DataType(value.type.tensor_type.elem_type), shape, {})


def _cast_target(node: onnx.NodeProto) -> ir.DataType:
    return ir.DataType(next(attribute.i for attribute in node.attribute if attribute.name == "to"))


def made_in_order(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    """The tensors that nodes make, in order."""
    return [name for node in nodes for name in node.output if name]


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH] + [
        g for a in node.attribute for g in a.graphs
    ]


def reads_of(node: onnx.NodeProto) -> list[str]:
    """Tensors that a node reads, those that its bodies capture included."""
    names = [name for name in node.input if name]
    for body in _bodies(node):
        names += _captured(body)
    return names


def _captured(body: onnx.GraphProto) -> list[str]:
    own = {v.name for v in body.input} | {t.name for t in body.initializer} | set(made_in_order(body.node))
    read = [name for node in body.node for name in reads_of(node)] + [v.name for v in body.output]
    return [name for name in read if name not in own]


def tensor_types(proto: onnx.ModelProto) -> Mapping[str, tuple[ir.DataType | None, Shape | None]]:
    """dtype and shape of every tensor that the graph or shape inference knows."""
    known = _declared_types(proto.graph)
    made = set(made_in_order(proto.graph.node))
    if any(known.get(name, (None, None))[1] is None for name in made):
        inferred = _declared_types(onnx.shape_inference.infer_shapes(proto, data_prop=True).graph)
        known = {**inferred, **{name: entry for name, entry in known.items() if entry[1] is not None}}
    for tensor in proto.graph.initializer:
        known.setdefault(tensor.name, (ir.DataType(tensor.data_type), tuple(tensor.dims)))
    return known


def _declared_types(graph: onnx.GraphProto) -> dict[str, tuple[ir.DataType | None, Shape | None]]:
    found: dict[str, tuple[ir.DataType | None, Shape | None]] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        tensor = value.type.tensor_type
        dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
        shape: Shape | None = None
        if tensor.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
        found[value.name] = (dtype, shape)
    return found
