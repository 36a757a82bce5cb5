"""The option ``keep_fp32``: which nodes a user means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from ..errors import OptionError
from .model import iterate_nodes, origin_of


@dataclass(frozen=True)
class NodeView:
    """What a predicate of ``keep_fp32`` is shown of a node.

    Attributes:
        op_type: the ONNX op ("MatMul"), with its domain where it is not a standard one ("trtbridge::f").
        name: of the node in the graph.
        module: path of the nn.Module that it comes from, "" for the root and for an .onnx file.
        file: Python file, "" where unknown.
        line: line in it, 0 where unknown.
    """

    op_type: str
    name: str
    module: str
    file: str
    line: int

    @classmethod
    def of(cls, node: onnx.NodeProto) -> NodeView:
        origin = origin_of(node)
        return cls(op_name(node), node.name, origin.module, origin.file, origin.line)


def kept_by_user(proto: onnx.ModelProto, keep_fp32: Any) -> dict[str, str]:
    """The tensors whose nodes the user wants in float32, with the entry that says so.

    Args:
        proto: the graph.
        keep_fp32: one entry or several: op types, node names, module paths (whole components from the left, which take
            in all below), patterns of these in the manner of fnmatch, or functions of a `NodeView`.

    Raises:
        OptionError: an entry fits no node.
    """
    if isinstance(keep_fp32, str) or callable(keep_fp32):
        keep_fp32 = (keep_fp32,)
    nodes = [(node, NodeView.of(node)) for node in iterate_nodes(proto.graph)]
    found: dict[str, str] = {}
    for entry in keep_fp32:
        reason = f"keep_fp32 names it: {entry if isinstance(entry, str) else getattr(entry, '__name__', entry)!r}"
        chosen = [node for node, view in nodes if _fits(entry, view)]
        if not chosen:
            raise OptionError(_no_match(entry, [view for _, view in nodes]))
        for node in chosen:
            found.update((name, reason) for name in node.output if name)
    return found


def _fits(entry: str | Callable[[NodeView], bool], view: NodeView) -> bool:
    if not isinstance(entry, str):
        return bool(entry(view))
    return any(fnmatch.fnmatchcase(text, entry) for text in (view.op_type, view.name, *_paths(view.module)) if text)


def _paths(module: str) -> Iterator[str]:
    """A module's path and those of the modules that it is in."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _no_match(entry: Any, views: Iterable[NodeView]) -> str:
    if not isinstance(entry, str):
        return f"keep_fp32: {getattr(entry, '__name__', entry)!r} is true for no node of the graph."
    known = dict.fromkeys(
        text for view in views for text in (view.op_type, *_paths(view.module), view.name if not view.module else "")
    )
    close = difflib.get_close_matches(entry, [text for text in known if text], n=4, cutoff=0.5)
    hint = f" Close are: {', '.join(map(repr, close))}." if close else ""
    return (
        f"keep_fp32: {entry!r} is no op type, node name or module path of the graph.{hint} An entry is such a name, "
        "a pattern of it ('encoder.layers.*.attn'), or a function of op_type, name, module, file and line."
    )


def op_name(node: onnx.NodeProto) -> str:
    """The op of a node, with its domain where it is not a standard one."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
