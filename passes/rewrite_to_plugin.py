"""RewriteToPlugin: a pattern of nodes becomes one plugin node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from ..errors import PassError
from ..nodes import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE, make_call, tensor
from .pipeline import Notes, Pass
from .surgery import STANDARD_DOMAINS, bodies, element_type, release_outputs, remove_nodes, scopes

_COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Max", "Min", "Sum"}


class Refused(Exception):  # noqa: N818  it is caught by the pass and noted, never shown as an error
    """Raised by a rewrite's `arguments`: the match is left as it is, for this reason."""


class Match:
    """Nodes that fit a pattern; what `arguments` of a `RewriteToPlugin` reads.

    Tensors and nodes go by the names in the pattern: a node by the name of its first output.
    """

    def __init__(self, nodes: Mapping[str, gs.Node], tensors: Mapping[str, gs.Tensor], notes: Notes) -> None:
        self._nodes = nodes
        self._tensors = tensors
        self._notes = notes
        self.used: list[gs.Tensor] = []

    def __getitem__(self, name: str) -> dict[str, int]:
        """A tensor, to be passed to the op."""
        wanted = self._tensor(name)
        for index, known in enumerate(self.used):
            if known is wanted:
                return tensor(index)
        self.used.append(wanted)
        return tensor(len(self.used) - 1)

    def has(self, name: str) -> bool:
        """Whether an input that the pattern names is given: an op's optional input may be left out in the graph."""
        return bool(self._tensor(name).name)

    def attribute(self, node: str, name: str, default: Any = None) -> Any:
        """An attribute of a matched node, or its default."""
        if node not in self._nodes:
            raise PassError(f"The pattern makes no {node!r}; it makes {', '.join(self._nodes)}.")
        return self._nodes[node].attrs.get(name, default)

    def values(self, name: str) -> np.ndarray:
        """The values of a tensor that must be a constant.

        Raises:
            Refused: it is none.
        """
        found = self._tensor(name)
        if not isinstance(found, gs.Constant):
            raise Refused(f"{found.name!r} is no constant")
        return self._notes.values(found)

    def number(self, name: str) -> int | float | bool:
        """The value of a constant of one element.

        Raises:
            Refused: it is no constant, or has more elements.
        """
        found = self.values(name)
        if found.size != 1:
            raise Refused(f"{self._tensor(name).name!r} has {found.size} elements where one is expected")
        return found.reshape(-1)[0].item()  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """The shape of a tensor, as far as it is known."""
        shape = self._tensor(name).shape
        return None if shape is None else tuple(shape)

    def _tensor(self, name: str) -> gs.Tensor:
        if name not in self._tensors:
            raise PassError(f"The pattern has no tensor {name!r}; it has {', '.join(self._tensors)}.")
        return self._tensors[name]


Arguments = Callable[[Match], "Sequence[Any] | tuple[Sequence[Any], Mapping[str, Any]]"]


@dataclass(frozen=True)
class RewriteToPlugin(Pass):
    """Let a torch op do what a pattern of nodes does.

    ::

        RewriteToPlugin("(x, w) => (y) { g = Sigmoid(x)  s = Mul(x, g)  y = Mul(s, w) }", "my::swish_scale")

            x ─┬─> Sigmoid ─> g ─┐
               └─────────────────┴> Mul ─> s ─┐        becomes    x ─┐
            w ────────────────────────────────┴> Mul ─> y         w ─┴> trtbridge::my_swish_scale {op, call} ─> y

    The pattern is the signature and body of an ONNX function in ONNX's text format. Its inputs may be any tensors,
    weights too, which may have other readers. Attributes in it must be equal in the graph (``Softmax<axis = -1>``),
    others may be any. An input that the pattern leaves out must be left out in the graph. The inputs of Add, Mul and
    the like may come in either order.

    Not rewritten, with the reason noted: matches of which something else reads an inner tensor, or which would stand on
    both sides of another node; matches inside of bodies of If, Loop and Scan; outputs whose type or rank is not known.

    Attributes:
        pattern: ``(inputs) => (outputs) { nodes }``.
        op: "ns::op" or "ns::op.overload", a torch op that is registered where the model is run.
        arguments: makes the op's arguments from a `Match`: a sequence, or a sequence and a dict of keyword arguments.
            They are ``match["x"]`` for a tensor, numbers, texts, lists of these, None, numpy scalars and arrays.
            Default: the pattern's inputs, in order.
        opset: version of the ONNX operators in which the pattern is written, for defaults of attributes.
    """

    pattern: str
    op: str
    arguments: Arguments | None = None
    opset: int = 20

    def __post_init__(self) -> None:
        namespace, separator, name = self.op.partition("::")
        if not (separator and namespace and name):
            raise PassError(f'op={self.op!r}: write the name of a torch op, as "ns::op" or "ns::op.overload".')
        made = {output for node in self._function.node for output in node.output}
        if missing := [name for name in self._function.output if name not in made]:
            raise PassError(f"The pattern returns {missing}, which none of its nodes makes: {self.pattern}")
        anchor = self._nodes[-1]
        if len(_connected(anchor, self._nodes)) < len(self._nodes):
            raise PassError(f"The pattern's nodes are not all connected, so it cannot be found: {self.pattern}")

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.op})"

    @cached_property
    def _function(self) -> onnx.FunctionProto:
        domains = {domain for domain in _domains_in(self.pattern) if domain}
        imports = ", ".join([f'"" : {self.opset}', *(f'"{domain}" : 1' for domain in sorted(domains))])
        try:
            return onnx.parser.parse_function(f'<domain: "pattern", opset_import: [{imports}]> pattern {self.pattern}')
        except onnx.parser.ParseError as error:
            raise PassError(
                f"The pattern {self.pattern!r} is not ONNX text: {error}\n"
                'Write it as "(x, w) => (y) { s = Sigmoid(x)  y = Mul(s, w) }".'
            ) from error

    @cached_property
    def _nodes(self) -> list[onnx.NodeProto]:
        return list(self._function.node)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        outputs = {id(tensor) for tensor in graph.outputs}
        anchor = self._nodes[-1]
        gone: set[int] = set()
        for scope in scopes(graph):
            for node in list(scope.nodes):
                if id(node) in gone or not _same_op(node, anchor):
                    continue
                found = next(self._matches(node), None)
                if found is None or any(id(member) in gone for member in found.nodes.values()):
                    continue
                reason = "it is in the body of a condition or loop" if scope is not graph else (
                    self._obstacle(found, outputs)
                )  # fmt: skip
                plugin: gs.Node | None = None
                if not reason:
                    try:
                        plugin = self._make(found, notes)
                    except Refused as refusal:
                        reason = str(refusal)
                if plugin is None:
                    notes.refused(node, reason)
                    continue
                self._replace(graph, found, plugin)
                gone.update(id(member) for member in found.nodes.values())
                count += 1
        if count and all(imported.domain != DOMAIN for imported in graph.import_domains or []):
            graph.import_domains = [*(graph.import_domains or []), onnx.helper.make_opsetid(DOMAIN, 1)]
        return count

    def _matches(self, node: gs.Node) -> Iterator[_Found]:
        """Every way in which the pattern fits with its last node at this one."""
        yield from _extend(_Found({}, {}), [(self._nodes[-1], node)], self._nodes)

    def _obstacle(self, found: _Found, outputs: set[int]) -> str:
        """Why a match cannot be taken out; "" where it can."""
        members = {id(node) for node in found.nodes.values()}
        results = {id(found.tensors[name]) for name in self._function.output}
        for node in found.nodes.values():
            for made in node.outputs:
                if id(made) in results:
                    if not element_type(made) or made.shape is None:
                        return f"the type or rank of its output {made.name!r} is not known"
                    continue
                if id(made) in outputs:
                    return f"its inner tensor {made.name!r} is an output of the model"
                if others := [reader for reader in made.outputs if id(reader) not in members]:
                    return f"its inner tensor {made.name!r} is read by {others[0].name or others[0].op!r} too"
        if len(results) > 1 and _returns(found, members):
            return "another node reads one of its results and makes one of its inputs"
        return ""

    def _make(self, found: _Found, notes: Notes) -> gs.Node:
        inputs = {name: found.tensors[name] for name in self._function.input if name in found.tensors}
        made = {name: found.tensors[name] for node in self._nodes for name in node.output if name in found.tensors}
        match = Match(found.nodes, {**inputs, **made}, notes)
        given = self.arguments(match) if self.arguments is not None else [match[name] for name in self._function.input]
        args, kwargs = (
            given if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict) else (given, {})
        )
        inner = {id(tensor) for node in found.nodes.values() for tensor in node.outputs}
        for used in match.used:
            if id(used) in inner:
                raise PassError(f"{self.name}: arguments() passes {used.name!r}, which the pattern itself makes.")
        namespace, _, rest = self.op.partition("::")
        packet, _, overload = rest.partition(".")
        attributes = {
            OP_ATTRIBUTE: f"{namespace}::{packet}.{overload or 'default'}",
            CALL_ATTRIBUTE: make_call([_plain(arg) for arg in args], {k: _plain(v) for k, v in kwargs.items()}),
        }
        kind = "_".join(part for part in (namespace, packet, "" if overload == "default" else overload) if part)
        return gs.Node(kind, notes.fresh_name(f"node_{kind}"), attributes, inputs=match.used, outputs=[], domain=DOMAIN)

    def _replace(self, graph: gs.Graph, found: _Found, plugin: gs.Node) -> None:
        results = [found.tensors[name] for name in self._function.output]
        members = list(found.nodes.values())
        places = {id(node): index for index, node in enumerate(graph.nodes)}
        place = max(places[id(node)] for node in members)
        early = any(places.get(id(reader), place) < place for made in results for reader in made.outputs
                    if id(reader) not in {id(node) for node in members})  # fmt: skip
        for node in members:
            release_outputs(node)
        for made in results:
            plugin.outputs.append(made)
        graph.nodes = [*graph.nodes[: place + 1], plugin, *graph.nodes[place + 1 :]]
        remove_nodes(graph, members)
        if early:  # a reader of a first result stood before the last node of the pattern
            graph.toposort()


@dataclass(frozen=True)
class _Found:
    """A match, whole or in the making: by name in the pattern, nodes (of their first output) and tensors."""

    nodes: Mapping[str, gs.Node]
    tensors: Mapping[str, gs.Tensor]

    def bind(self, name: str, found: gs.Tensor) -> _Found | None:
        """This and one more tensor; None where the name already stands for another."""
        known = self.tensors.get(name)
        if known is None:
            return _Found(self.nodes, {**self.tensors, name: found})
        same = known is found or (known.name == found.name and isinstance(known, gs.Constant))
        return self if same else None


def _extend(found: _Found, pending: list[tuple[onnx.NodeProto, gs.Node]], pattern: Sequence[onnx.NodeProto]) -> Iterator[_Found]:  # fmt: skip # noqa: E501
    if not pending:
        unmatched = [node for node in pattern if node.output[0] not in found.nodes]
        if not unmatched:
            yield found
            return
        # What hangs on by an input alone: the other readers of a matched tensor.
        for template in unmatched:
            shared = next((name for name in template.input if name in found.tensors), None)
            if shared is None:
                continue
            for reader in {id(node): node for node in found.tensors[shared].outputs}.values():
                yield from _extend(found, [(template, reader)], pattern)
            return
        return
    (template, node), *rest = pending
    key = template.output[0]
    if key in found.nodes:
        if found.nodes[key] is node:
            yield from _extend(found, rest, pattern)
        return
    if not _same_op(node, template) or any(node is taken for taken in found.nodes.values()):
        return
    base: _Found | None = _Found({**found.nodes, key: node}, found.tensors)
    for index, name in enumerate(template.output):
        if name and base is not None:
            base = base.bind(name, node.outputs[index]) if index < len(node.outputs) else None
    if base is None:
        return
    makers = {name: other for other in pattern for name in other.output if name}
    for order in _orders(template, node):
        bound: _Found | None = base
        more = list(rest)
        for name, given in zip(template.input, order, strict=True):
            if bound is None:
                break
            if not name:
                bound = bound if not given.name else None
                continue
            bound = bound.bind(name, given)
            if name in makers:
                if not given.inputs:
                    bound = None
                    break
                more.append((makers[name], given.inputs[0]))
        if bound is not None:
            yield from _extend(bound, more, pattern)


def _orders(template: onnx.NodeProto, node: gs.Node) -> Iterator[list[gs.Tensor]]:
    given = list(node.inputs)
    while len(given) > len(template.input) and not given[-1].name:
        given.pop()
    while len(given) < len(template.input):
        given.append(gs.Variable.empty())
    if len(given) != len(template.input):
        return
    yield given
    if template.op_type in _COMMUTATIVE and len(given) == 2:
        yield given[::-1]


def _same_op(node: gs.Node, template: onnx.NodeProto) -> bool:
    domains = STANDARD_DOMAINS if template.domain in STANDARD_DOMAINS else (template.domain,)
    if node.op != template.op_type or node.domain not in domains or bodies(node):
        return False
    return all(_same_attribute(node.attrs.get(a.name), onnx.helper.get_attribute_value(a)) for a in template.attribute)


def _same_attribute(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, bytes):
        wanted = wanted.decode()
    if isinstance(wanted, float) and isinstance(given, (int, float)):
        return math.isclose(given, wanted, rel_tol=1e-6)
    if isinstance(given, (list, tuple)):
        return list(given) == list(wanted)
    return bool(given == wanted)


def _returns(found: _Found, members: set[int]) -> bool:
    """Whether a way leads from the match, through other nodes, back into it."""
    pending = [
        r for node in found.nodes.values() for made in node.outputs for r in made.outputs if id(r) not in members
    ]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in members:
            return True
        if id(node) not in seen:
            seen.add(id(node))
            pending += [reader for made in node.outputs for reader in made.outputs]
    return False


def _connected(anchor: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> set[str]:
    reached = {anchor.output[0]}
    names = {*anchor.input, *anchor.output} - {""}
    for _ in nodes:
        for node in nodes:
            if node.output[0] not in reached and names & {*node.input, *node.output}:
                reached.add(node.output[0])
                names |= {*node.input, *node.output} - {""}
    return reached


def _domains_in(pattern: str) -> Iterator[str]:
    for word in pattern.replace("(", " ").replace("<", " ").split():
        if "." in word and not word[0].isdigit() and word.replace(".", "").replace("_", "").isalnum():
            yield word.rpartition(".")[0]


def _plain(value: Any) -> Any:
    """An argument as JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": repr(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str, dict)):
        return value
    raise PassError(
        f"Argument {value!r} has no form that a plugin node can hold; use numbers, texts, lists and tensors."
    )
