"""The option ``keep_fp32``: which nodes a user means."""

from __future__ import annotations

from typing import Any

import onnx

from .chosen_nodes import NodeView, NothingFitsError, as_entries, fits, reason_of
from .model import iterate_nodes


def kept_by_user(proto: onnx.ModelProto, keep_fp32: Any) -> dict[str, str]:
    """The tensors whose nodes the user wants in float32, with the entry that says so.

    Args:
        proto: the graph.
        keep_fp32: one entry or several: op types, node names, module paths (whole components from the left, which take
            in all below), patterns of these in the manner of fnmatch, or functions of a `NodeView`.

    Raises:
        OptionError: an entry fits no node.
    """
    nodes = [(node, NodeView.of(node)) for node in iterate_nodes(proto.graph)]
    found: dict[str, str] = {}
    for entry in as_entries(keep_fp32):
        chosen = [node for node, view in nodes if fits(entry, view)]
        if not chosen:
            raise NothingFitsError("keep_fp32", entry, [view for _, view in nodes])
        for node in chosen:
            found.update((name, reason_of("keep_fp32", entry)) for name in node.output if name)
    return found
