"""Where a graph's nodes come from: the exporter's metadata made into one compact `Origin` a node."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import onnx_ir as ir
import torch

from ..nodes import DOMAIN, OP_ATTRIBUTE
from .model import ORIGIN_KEY, Origin
from .untranslatable import marked_call, strip_mark

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n\s*(?P<code>(?!File ")[^\n]*))?')
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent)
_TARGET = re.compile(r"target=([^\]]+)\]")


def user_frame(stack_trace: str, strictly_user: bool = False) -> tuple[str, int, str]:
    """(file, line, code) of the innermost frame of a stack trace that is neither torch's nor ours.

    Where every frame is torch's (a model made of nn.Sequential alone) the innermost one, unless ``strictly_user``;
    ("", 0, "") without frames.
    """
    frames = list(_FRAME.finditer(stack_trace))
    own = [f for f in frames if not f["file"].startswith((_TORCH_FOLDER, "torch/", _OWN_FOLDER, "<"))]
    frames = own or ([] if strictly_user else [f for f in frames if not f["file"].startswith(("torch/", _OWN_FOLDER))])
    if not frames:
        return "", 0, ""
    return frames[-1]["file"], int(frames[-1]["line"]), (frames[-1]["code"] or "").strip()


def compact_origins(graph: ir.Graph, prefix: str) -> None:
    """Replace the exporter's metadata on every node by one `Origin` entry.

    Nodes that the exporter's optimizer made without metadata take the origin of the node that reads them, else of the
    one that they read.

    Args:
        graph: changed in place; its subgraphs too.
        prefix: module path of the user's module inside the one that was traced ("module"), taken off.
    """
    missing: list[ir.Node] = []
    for node in ir.traversal.RecursiveGraphIterator(graph):
        origin = _read(node, prefix)
        for key in [key for key in node.metadata_props if key.startswith("pkg.torch.") or key == "namespace"]:
            del node.metadata_props[key]
        if origin is None:
            missing.append(node)
        else:
            node.metadata_props[ORIGIN_KEY] = origin.to_metadata()
    for node in reversed(missing):  # consumers first, so that chains are filled in one go
        _inherit(node, [use.node for output in node.outputs for use in output.uses()])
    for node in missing:
        _inherit(node, [producer for value in node.inputs if value is not None and (producer := value.producer())])


def _inherit(node: ir.Node, relatives: list[ir.Node]) -> None:
    if ORIGIN_KEY not in node.metadata_props:
        for relative in relatives:
            if ORIGIN_KEY in relative.metadata_props:
                node.metadata_props[ORIGIN_KEY] = relative.metadata_props[ORIGIN_KEY]
                return


def _read(node: ir.Node, prefix: str) -> Origin | None:
    metadata = node.metadata_props
    trace = metadata.get("pkg.torch.onnx.stack_trace", "")
    scopes = _as_list(metadata.get("pkg.torch.onnx.name_scopes", ""))
    classes = _as_list(metadata.get("pkg.torch.onnx.class_hierarchy", ""))
    if not trace and not scopes:
        return None
    call = marked_call(trace)
    file, line, code = user_frame(strip_mark(trace))
    # The last scope is the fx node itself, the last class its op; before it stands the innermost module.
    module = scopes[-2] if len(scopes) > 1 else ""
    module_class = classes[-2] if len(classes) > 1 else ""
    target = _TARGET.search(metadata.get("pkg.torch.onnx.fx_node", ""))
    op = target[1].removeprefix("torch.ops.") if target else (classes[-1] if classes else node.op_type)
    if node.domain == DOMAIN:
        op = node.attributes[OP_ATTRIBUTE].as_string().replace("::", ".")
    return Origin(file, line, code, strip_prefix(module, prefix), module_class, op, call)


def strip_prefix(name: str, prefix: str) -> str:
    """A module path or parameter name without the traced wrapper's own attribute."""
    return "" if name == prefix else name.removeprefix(prefix + ".")


def _as_list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(entry) for entry in value] if isinstance(value, list) else []
