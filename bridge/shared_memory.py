"""Which tensors of an exported program share memory, and which of those are written to."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch

from ..errors import PluginError


def refuse_written_view(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Refuse a call that returns a view of which it matters that it is one.

    A plugin returns a copy. Where the view, what it views, or another view of that is written to later, the copy would
    lack what was written, or what it was written to would.

    Args:
        graph: as torch.export made it, with ops that write to their arguments.
        node: a call of it.

    Raises:
        PluginError: the call is such a view.
    """
    if not _is_view(node):
        return
    family = _family(graph, node)
    later = False
    for other in graph.nodes:
        if later and any(target in family for target in _written(other)):
            raise PluginError(
                f"{node.name} is a view ({node.target}), and {other.name} ({other.target}) writes to the memory it "
                "shares: a plugin would return a copy. Clone the view, or what it views, before writing."
            )
        later |= other is node


def _family(graph: torch.fx.Graph, node: torch.fx.Node) -> set[torch.fx.Node]:
    """The tensors that may share memory with a node's, itself among them."""
    links: dict[torch.fx.Node, set[torch.fx.Node]] = {}
    for other in graph.nodes:
        for source in _sources(other):
            links.setdefault(other, set()).add(source)
            links.setdefault(source, set()).add(other)
    family, pending = {node}, [node]
    while pending:
        for other in links.get(pending.pop(), set()) - family:
            family.add(other)
            pending.append(other)
    return family


def _is_view(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in node.target._schema.returns)


def _sources(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The arguments with which a node's results may share memory."""
    if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node):
        yield node.args[0]
    elif isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        if any(result.alias_info is not None for result in schema.returns):
            yield from _arguments(node, write_only=False)


def _written(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The arguments that a node writes to."""
    if isinstance(node.target, torch._ops.OpOverload):
        yield from _arguments(node, write_only=True)


def _arguments(node: torch.fx.Node, write_only: bool) -> Iterator[torch.fx.Node]:
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or (write_only and not argument.alias_info.is_write):
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, torch.fx.Node):
                yield each
