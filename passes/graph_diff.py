"""What a pass changed, as text: nodes, initializers and types of tensors that came, went or changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from .exchange import stand_in_name
from .surgery import STANDARD_DOMAINS, type_name

ORIGIN_KEY = "trtbridge.origin"
"""Key of the node metadata entry that says where a node comes from, as JSON."""

_MOST_ELEMENTS = 8
"""Values of a tensor with more elements than this are not written out."""


def diff(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What is different in a model, in the order of the graphs.

    A node is the same node as before where op and name are, or where its first output is. Nodes that only moved,
    documentation and metadata do not count. Linear in the size of the graphs.

    Returns:
        One line a node (``-`` went, ``+`` came, ``~`` changed, with what changed below), initializer and tensor, ""
        where nothing changed.
    """
    found = _Differences()
    _compare_graphs(before.graph, after.graph, "", found)
    imports = [{entry.domain: entry.version for entry in model.opset_import} for model in (before, after)]
    found.other += [f"~ opset of {domain or 'ai.onnx'}: {imports[0].get(domain, 'none')} -> {version}"
                    for domain, version in imports[1].items() if imports[0].get(domain) != version]  # fmt: skip
    sections = (
        ("nodes that went", found.removed), ("nodes that came", found.added), ("nodes that changed", found.changed),
        ("initializers", found.initializers), ("tensors whose type changed", found.tensors), ("other", found.other),
    )  # fmt: skip
    return "\n\n".join("\n".join((f"{title} ({_count(lines)}):", *lines)) for title, lines in sections if lines)


def node_text(node: onnx.NodeProto) -> str:
    """A node in a line: ``Slice 'node_slice' (x, starts, ends) -> y  {mode=1}``."""
    op = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"
    name = f" {node.name!r}" if node.name else ""
    attributes = ", ".join(f"{key}={value}" for key, value in _attributes(node).items())
    inner = sum(len(body.node) for body in _bodies(node).values())
    return (
        f"{op}{name} ({', '.join(node.input)}) -> {', '.join(node.output)}"
        + (f"  {{{attributes}}}" if attributes else "")
        + (f"  with {inner} nodes in subgraphs" if inner else "")
    )


def origin_text(node: onnx.NodeProto) -> str:
    """Where a node comes from: Python file, line, code, module and torch op, as far as its metadata tells; else ""."""
    text = next((entry.value for entry in node.metadata_props if entry.key == ORIGIN_KEY), "")
    try:
        known = json.loads(text)
    except json.JSONDecodeError:
        return text
    if not isinstance(known, dict):
        return text
    place = f'"{known["file"]}", line {known.get("line", 0)}' if known.get("file") else ""
    code = f"`{known['code']}`" if known.get("code") else ""
    module = f"in {known['module']}" if known.get("module") else ""
    op = f"({known['op']})" if known.get("op") else ""
    return " ".join(filter(None, (place, code, module, op)))


@dataclass
class _Differences:
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    initializers: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def _count(lines: Sequence[str]) -> int:
    return sum(not line.startswith("    ") for line in lines)


def _compare_graphs(before: onnx.GraphProto, after: onnx.GraphProto, place: str, found: _Differences) -> None:
    partners = dict(_pairs(before.node, after.node))
    taken = set(partners.values())
    types = [_types(graph) for graph in (before, after)]
    for position, node in enumerate(before.node):
        if position not in taken:
            found.removed += _lines("-", node, place, types[0])
    for position, node in enumerate(after.node):
        if position not in partners:
            found.added += _lines("+", node, place, types[1])
            continue
        old = before.node[partners[position]]
        changes = list(_changes(old, node))
        if changes:
            found.changed += [f"~ {place}{node_text(node)}", *(f"    {change}" for change in changes)]
        bodies = _bodies(old), _bodies(node)
        for name in bodies[0].keys() & bodies[1].keys():
            inner = f"{place}{node.name or node.output[0]}.{name}/"
            _compare_graphs(bodies[0][name], bodies[1][name], inner, found)
    _compare_initializers(before, after, place, found)
    for name, text in types[1].items():
        if name in types[0] and types[0][name] != text:
            found.tensors.append(f"~ {place}{name}: {types[0][name]} -> {text}")


def _pairs(before: Sequence[onnx.NodeProto], after: Sequence[onnx.NodeProto]) -> Iterator[tuple[int, int]]:
    """Positions of the same node: (after, before)."""
    names = [Counter(node.name for node in nodes) for nodes in (before, after)]

    def named(node: onnx.NodeProto) -> tuple[str, str, str] | None:
        unique = node.name and all(count[node.name] == 1 for count in names)
        return (node.domain, node.op_type, node.name) if unique else None

    by_name = {key: position for position, node in enumerate(before) if (key := named(node)) is not None}
    by_output = {node.output[0]: position for position, node in enumerate(before) if node.output and node.output[0]}
    taken: set[int] = set()
    rest: list[int] = []
    for position, node in enumerate(after):
        key = named(node)
        if key is not None and key in by_name:
            taken.add(by_name[key])
            yield position, by_name[key]
        else:
            rest.append(position)
    for position in rest:
        node = after[position]
        partner = by_output.get(node.output[0]) if node.output and node.output[0] else None
        if partner is not None and partner not in taken:
            taken.add(partner)
            yield position, partner


def _lines(sign: str, node: onnx.NodeProto, place: str, types: Mapping[str, str]) -> list[str]:
    known = [f"{name}: {types[name]}" for name in node.output if name in types]
    origin = origin_text(node)
    return [f"{sign} {place}{node_text(node)}", *(f"    {text}" for text in (*known, origin) if text)]


def _changes(before: onnx.NodeProto, after: onnx.NodeProto) -> Iterator[str]:
    if (before.domain, before.op_type) != (after.domain, after.op_type):
        yield f"op: {before.domain or ''}{'::' if before.domain else ''}{before.op_type} -> {after.op_type}"
    for what, old, new in (("inputs", before.input, after.input), ("outputs", before.output, after.output)):
        if list(old) != list(new):
            yield f"{what}: ({', '.join(old)}) -> ({', '.join(new)})"
    attributes = _attributes(before), _attributes(after)
    for name in sorted(attributes[0].keys() | attributes[1].keys()):
        texts = [known.get(name, "absent") for known in attributes]
        if texts[0] != texts[1]:
            yield f"attribute {name}: {texts[0]} -> {texts[1]}"
    inner = [_bodies(node).keys() for node in (before, after)]
    if inner[0] != inner[1]:
        yield f"subgraphs: {', '.join(inner[0]) or 'none'} -> {', '.join(inner[1]) or 'none'}"


def _compare_initializers(before: onnx.GraphProto, after: onnx.GraphProto, place: str, found: _Differences) -> None:
    old, new = ({tensor.name: tensor for tensor in graph.initializer} for graph in (before, after))
    found.initializers += [f"- {place}{name}: {_tensor_text(old[name])}" for name in old if name not in new]
    for name, tensor in new.items():
        if name not in old:
            found.initializers.append(f"+ {place}{name}: {_tensor_text(tensor)}")
        elif tensor != old[name]:
            found.initializers.append(f"~ {place}{name}: {_tensor_text(old[name])} -> {_tensor_text(tensor)}")


def _attributes(node: onnx.NodeProto) -> dict[str, str]:
    """The attributes as text, subgraphs left out."""
    found = {}
    for attribute in node.attribute:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            continue
        if attribute.type == onnx.AttributeProto.TENSOR:
            found[attribute.name] = _tensor_text(attribute.t)
        else:
            text = (
                repr(onnx.helper.get_attribute_value(attribute)) if not attribute.ref_attr_name else "of the function"
            )
            found[attribute.name] = text.removeprefix("b") if attribute.type == onnx.AttributeProto.STRING else text
    return found


def _bodies(node: onnx.NodeProto) -> dict[str, onnx.GraphProto]:
    return {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    return {value.name: text for group in (graph.input, graph.value_info, graph.output) for value in group
            if (text := _type_text(value))}  # fmt: skip


def _type_text(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return ""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return f"{type_name(tensor.elem_type)} of unknown rank"
    sizes = (dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim)
    return f"{type_name(tensor.elem_type)}[{', '.join(sizes)}]"


def _tensor_text(tensor: onnx.TensorProto) -> str:
    text = f"{type_name(tensor.data_type)}[{', '.join(map(str, tensor.dims))}]"
    count = 1
    for size in tensor.dims:
        count *= size
    if count > _MOST_ELEMENTS or stand_in_name(tensor) is not None or tensor.data_location:
        return text
    try:
        return f"{text} {onnx.numpy_helper.to_array(tensor).tolist()}"
    except (ValueError, TypeError):  # a type that this version of onnx cannot turn into NumPy
        return text
