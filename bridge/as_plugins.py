"""The option ``as_plugins``: what becomes a plugin because the user wants it to, whatever the backend could do."""

from __future__ import annotations

import logging
from typing import Any

import onnx
import torch

from ..errors import OptionError
from .chosen_nodes import NodeView, NothingFitsError, as_entries, fits, reason_of
from .export import ExportedModule
from .graft import CALL
from .model import iterate_nodes
from .origins import strip_prefix
from .trace import MODULE
from .untranslatable import call_nodes

logger = logging.getLogger(__name__)

OPTION = "as_plugins"


def wanted_calls(source: ExportedModule, as_plugins: Any) -> dict[str, str]:
    """Calls of a traced module that the user wants as plugins, each with the entry that says so.

    Args:
        source: the module.
        as_plugins: one entry or several: torch ops or their names, with or without overload ("aten::layer_norm",
            "aten.layer_norm.default"), module paths, which take in all below, patterns of these in the manner of
            fnmatch, or functions of a `NodeView`.

    Raises:
        OptionError: an entry fits no call, or none of those that it fits can be a plugin.
    """
    entries = as_entries(as_plugins)
    if not entries:
        return {}
    nodes = [node for node in call_nodes(source.program.graph_module) if _is_op(node) and not _does_nothing(node)]
    calls = [(node, NodeView.of_call(node, _module_of(node))) for node in nodes]
    found: dict[str, str] = {}
    for entry in entries:
        chosen = [node.name for node, view in calls if fits(entry, view)]
        if not chosen:
            raise NothingFitsError(OPTION, entry, [view for _, view in calls])
        problems = source.plugin_problems(chosen)
        if len(problems) == len(chosen):
            raise OptionError(f"{OPTION}: {entry!r} means {', '.join(chosen)}: {problems[chosen[0]]}")
        for name, problem in problems.items():
            logger.warning("%s: %r means %s, too, which stays as it is: %s", OPTION, entry, name, problem)
        found |= {name: reason_of(OPTION, entry) for name in chosen if name not in problems}
    return found


def wanted_nodes(proto: onnx.ModelProto, as_plugins: Any) -> dict[str, str]:
    """Nodes of an .onnx file's graph that the user wants as plugins, each with the entry that says so.

    Args:
        proto: the graph as the passes left it.
        as_plugins: one entry or several: op types ("LayerNormalization"), node names, patterns of these, or functions.

    Raises:
        OptionError: an entry fits no node.
    """
    nodes = [NodeView.of(node) for node in iterate_nodes(proto.graph)]
    found: dict[str, str] = {}
    for entry in as_entries(as_plugins):
        chosen = [view.name for view in nodes if fits(entry, view)]
        if not chosen:
            raise NothingFitsError(OPTION, entry, nodes)
        found |= dict.fromkeys(chosen, reason_of(OPTION, entry))
    return found


def _module_of(node: torch.fx.Node) -> str:
    """Path of the innermost module that made a call; "" for the user's own."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return strip_prefix(paths[-1], MODULE) if paths else ""


def _is_op(node: torch.fx.Node) -> bool:
    """Whether a call is of a torch op: Python's own operators work on sizes."""
    return isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) and node.target is not CALL


def _does_nothing(node: torch.fx.Node) -> bool:
    """Whether a call hands on its input: a dropout outside of training."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | node.kwargs
    return "dropout" in node.target._schema.name and given.get("train", given.get("training")) is False
