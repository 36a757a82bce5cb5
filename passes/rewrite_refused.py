"""Write nodes that a backend refuses in other ops, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ..nodes import DOMAIN, OP_ATTRIBUTE
from .pipeline import Notes, Pass
from .refused_bytes import join
from .refused_fragment import CannotRewriteError, Fragment
from .refused_rules import RULES, Rule
from .surgery import is_standard, output_ids, redirect, remove_nodes, scopes, set_output

_MARK = "/rewritten/"


@dataclass(frozen=True)
class RewriteRefused(Pass):
    """Write nodes, named one by one, in ops that every backend takes.

    ::

        x -> Col2Im 'n' -> y      x -> Reshape -> Pad -> Gather -> ReduceSum -> Reshape -> y

    For what a backend refuses; a node that it takes is best left as it is, so no node is rewritten but those in
    `nodes`, and this pass is in no default pipeline. The rules (`refused_rules.RULES`) are one an op, for standard ops
    and for torch ops in plugin nodes. Each computes the same: integers and bools bit for bit, floats up to the order in
    which sums are rounded. It refuses (sizes that are not fixed, types, attributes) what it cannot do so, and what
    would take more than 64 nodes or 4 MiB of constants.

    New nodes carry the old node's name with a suffix, which `original_name` takes off.

    Attributes:
        nodes: names of nodes, in the main graph or in subgraphs.
    """

    nodes: frozenset[str] = field(default=frozenset())

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        for scope in scopes(graph):
            outputs = output_ids(scope)
            replaced: dict[int, list[gs.Node]] = {}
            dead: list[gs.Node] = []
            for node in list(scope.nodes):
                if node.name not in self.nodes or id(node) in replaced:
                    continue
                rule = find_rule(node)
                if rule is None:
                    notes.refused(node, "there is no rule for this op")
                    continue
                fragment = Fragment(node, notes, outputs)
                try:
                    rule(fragment)
                    if id(fragment.node) in replaced:
                        raise CannotRewriteError("another rewrite has replaced the node that reads it")
                    new = _splice(fragment, notes)
                except CannotRewriteError as reason:
                    notes.refused(node, str(reason))
                    continue
                replaced[id(fragment.node)] = new
                dead.append(fragment.node)
                count += 1
            if dead:
                scope.nodes = [each for node in scope.nodes for each in (*replaced.get(id(node), ()), node)]
                join(scope.nodes, _MARK)
                makers = [maker for node in dead for tensor in node.inputs for maker in tensor.inputs]
                remove_nodes(scope, dead)
                here = {id(node) for node in scope.nodes}
                remove_nodes(scope, _unread(makers, here, outputs))
        return count


def find_rule(node: gs.Node) -> Rule | None:
    """The rule for a node's op."""
    if node.domain == DOMAIN:
        return RULES.get(node.attrs.get(OP_ATTRIBUTE, ""))
    return RULES.get(node.op) if is_standard(node) else None


def original_name(name: str) -> str:
    """The name of the node that a node was written for; a node's own name where it was there before."""
    return name.partition(_MARK)[0]


def _splice(fragment: Fragment, notes: Notes) -> list[gs.Node]:
    """The nodes of a fragment, linked to the graph's tensors."""
    old = fragment.node
    for index, tensor in enumerate(old.outputs):
        if index not in fragment.results and fragment.is_read(index):
            raise CannotRewriteError(f"{tensor.name!r} is read, and the rewrite does not make it")
    inner = gs.import_onnx(fragment.model())
    made: dict[str, gs.Tensor] = inner.tensors()
    targets = {index: old.outputs[index] for index in fragment.results if old.outputs[index].name}
    _check_results(fragment, targets, made)
    base = targets[min(targets)].name if targets else old.name
    known = {size for tensor in fragment.read.values() for size in tensor.shape or () if isinstance(size, str)}
    for part in scopes(inner):
        for tensor in part.tensors().values():
            if tensor.name and tensor.name not in fragment.read:
                tensor.name = notes.fresh_name(f"{base}{_MARK}{tensor.name}")
                if isinstance(tensor, gs.Variable) and tensor.shape is not None:
                    # Names that inference gives to sizes mean nothing outside.
                    tensor.shape = [size if isinstance(size, int) or size in known else None for size in tensor.shape]
    for name, tensor in fragment.read.items():
        if name in made:
            redirect(made[name], tensor)
    nodes = list(inner.nodes)
    taken: set[int] = set()
    for index, target in targets.items():
        source = fragment.read.get(fragment.results[index]) or made[fragment.results[index]]
        producer = next((node for node in nodes if any(tensor is source for tensor in node.outputs)), None)
        if producer is None or id(source) in taken:
            # An input or a constant, or a tensor that is another result already.
            final = taken_by(source, fragment, targets, made) if id(source) in taken else source
            nodes.append(gs.Node("Identity", inputs=[final], outputs=[gs.Variable(notes.fresh_name(base))]))
            set_output(nodes[-1], 0, target)
            continue
        taken.add(id(source))
        set_output(producer, next(i for i, tensor in enumerate(producer.outputs) if tensor is source), target)
        redirect(source, target)
    for number, node in enumerate(nodes):
        node.name = f"{old.name}{_MARK}{number}"
        for part in (part for value in node.attrs.values() if isinstance(value, gs.Graph) for part in scopes(value)):
            for position, held in enumerate(part.nodes):
                held.name = f"{node.name}/{position}"
    return nodes


def _unread(makers: list[gs.Node], here: set[int], outputs: set[int]) -> list[gs.Node]:
    """Those of some nodes in a graph, and of the nodes that these read from, whose outputs nobody reads any more."""
    gone: dict[int, gs.Node] = {}
    while makers:
        node = makers.pop()
        readers = {id(reader) for tensor in node.outputs for reader in tensor.outputs}
        if id(node) not in here or node.domain == DOMAIN or any(id(tensor) in outputs for tensor in node.outputs):
            continue
        if readers <= gone.keys():
            gone[id(node)] = node
            makers += [maker for tensor in node.inputs for maker in tensor.inputs if id(maker) not in gone]
    return list(gone.values())


def taken_by(
    source: gs.Tensor, fragment: Fragment, targets: Mapping[int, gs.Tensor], made: Mapping[str, gs.Tensor]
) -> gs.Tensor:
    """The output of the old node that an inner tensor has become."""
    return next(targets[i] for i in sorted(targets) if made.get(fragment.results[i]) is source)


def _check_results(fragment: Fragment, targets: Mapping[int, gs.Tensor], made: Mapping[str, gs.Tensor]) -> None:
    """Refuse a rewrite whose results have another rank or fixed size than the node's own."""
    for index, target in targets.items():
        name = fragment.results[index]
        tensor = fragment.read.get(name) or made[name]
        if target.shape is None or tensor.shape is None:
            continue
        alike = len(target.shape) == len(tensor.shape) and all(
            a == b for a, b in zip(target.shape, tensor.shape, strict=True) if isinstance(a, int) and isinstance(b, int)
        )
        if not alike:
            raise CannotRewriteError(f"it would make {target.name!r} of shape {tensor.shape}, not {target.shape}")
