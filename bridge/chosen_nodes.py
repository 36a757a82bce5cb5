"""Nodes that a user names in an option: by op, name, module path, a pattern of these, or a function."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from ..errors import OptionError
from ..plugins.registry import op_name as torch_op_name
from .model import origin_of
from .origins import user_frame
from .untranslatable import strip_mark


@dataclass(frozen=True)
class NodeView:
    """What a predicate of ``keep_fp32`` or ``as_plugins`` is shown of a node, or of a call of a torch op.

    Attributes:
        op_type: the ONNX op ("MatMul"), with its domain where it is not a standard one ("trtbridge::f"); of a call the
            torch op ("aten::layer_norm.default").
        name: of the node in the graph, or of the call in the exported program.
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
        """The view of an ONNX node."""
        origin = origin_of(node)
        return cls(op_name(node), node.name, origin.module, origin.file, origin.line)

    @classmethod
    def of_call(cls, node: torch.fx.Node, module: str) -> NodeView:
        """The view of a call in an exported program, made in the module of that path."""
        target = node.target
        op = torch_op_name(target) if isinstance(target, torch._ops.OpOverload) else str(target)
        file, line, _ = user_frame(strip_mark(node.meta.get("stack_trace") or ""))
        return cls(op, node.name, module, file, line)

    def names(self) -> Iterator[str]:
        """What an entry may call it by, what takes in most last."""
        yield self.op_type
        namespace, _, op = self.op_type.partition("::")
        if op and "." in op:  # a torch op, also as it is written in Python, and without its overload
            packet = op.partition(".")[0]
            yield from (f"{namespace}::{packet}", f"{namespace}.{op}", f"{namespace}.{packet}")
        else:  # calls have names that nobody gave them, which may be a module's, too
            yield self.name
        path = self.module
        while path:
            yield path
            path = path.rpartition(".")[0]


Entry = str | Callable[[NodeView], bool]
"""A name, a pattern in the manner of fnmatch, or a function."""


def as_entries(given: Any) -> tuple[Entry, ...]:
    """The entries of an option that takes one or several; a torch op is the entry of its name."""
    several = isinstance(given, (tuple, list, set, frozenset))
    return tuple(_as_entry(entry) for entry in (given if several else (given,)))


def are_entries(given: Any) -> bool:
    """Whether an option's value is one entry or several."""
    several = isinstance(given, (tuple, list, set, frozenset))
    return all(isinstance(entry, str) or callable(entry) for entry in (given if several else (given,)))


def names_of(given: Any) -> list[str]:
    """The entries that are no functions, for a record."""
    return [entry for entry in as_entries(given) if isinstance(entry, str)]


def _as_entry(entry: Any) -> Entry:
    if isinstance(entry, torch._ops.OpOverload):
        return torch_op_name(entry)
    if isinstance(entry, torch._ops.OpOverloadPacket):
        return entry._qualified_op_name
    return entry  # type: ignore[no-any-return]


def fits(entry: Entry, view: NodeView) -> bool:
    """Whether an entry means a node."""
    if callable(entry):
        return bool(entry(view))
    return any(fnmatch.fnmatchcase(name, entry) for name in view.names() if name)


def reason_of(option: str, entry: Entry) -> str:
    """Why a node is among those of an option."""
    return f"{option} names it: {_text(entry)}"


class NothingFitsError(OptionError):
    """An entry of an option means no node.

    Attributes:
        option: its name.
        entry: as `as_entries` gives it.
    """

    def __init__(self, option: str, entry: Entry, views: Iterable[NodeView]) -> None:
        super().__init__(_nothing_fits(option, entry, list(views)))
        self.option, self.entry = option, entry

    def without_it(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of convert() less the entry, for one of several graphs that they are all for."""
        left = tuple(entry for entry in as_entries(options[self.option]) if entry != self.entry)
        return {**options, self.option: left}


def _nothing_fits(option: str, entry: Entry, views: Sequence[NodeView]) -> str:
    if not isinstance(entry, str):
        return f"{option}: {_text(entry)} is true for no node of the graph."
    known = dict.fromkeys(
        name for view in views for name in view.names() if name and (name != view.name or not view.module)
    )
    close = difflib.get_close_matches(entry, known, n=4, cutoff=0.5)
    hint = f" Close are: {', '.join(map(repr, close))}." if close else ""
    return (
        f"{option}: {entry!r} is no op type, node name or module path of the graph.{hint} An entry is such a name, "
        "a pattern of it ('encoder.layers.*.attn'), or a function of op_type, name, module, file and line."
    )


def _text(entry: Entry) -> str:
    return repr(entry if isinstance(entry, str) else getattr(entry, "__name__", entry))


def op_name(node: onnx.NodeProto) -> str:
    """The op of a node, with its domain where it is not a standard one."""
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
