"""What a module does beside returning results: an engine does not do it, so the user is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .origins import strip_prefix


def side_effects(program: torch.export.ExportedProgram, labels: Sequence[str], prefix: str) -> list[str]:
    """Sentences, without their subject, about buffers and inputs that the module changes in place.

    Args:
        program: as traced, in-place ops and all.
        labels: how the user would write each input.
        prefix: module path of the user's module in the one that was traced.
    """
    signature = program.graph_signature
    buffers = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    inputs = dict(zip(signature.user_inputs, labels, strict=True))
    changed = {_base(node) for node in program.graph.nodes if _writes_to_first(node)}
    effects = []
    names = sorted(strip_prefix(name, prefix) for given, name in buffers.items() if given in changed)
    if names:
        effects.append(f"changes its buffers {', '.join(names)} when called; converted, they keep their present values")
    names = [label for given, label in inputs.items() if given in changed]
    if names:
        effects.append(f"changes its inputs {', '.join(names)} in place; converted, it leaves them alone")
    return effects


def _writes_to_first(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _base(node: torch.fx.Node) -> str:
    """The placeholder whose memory an in-place op writes to, through views; "" for memory made in between."""
    current = node.args[0] if node.args else None
    while isinstance(current, torch.fx.Node) and current.op == "call_function":
        schema = getattr(current.target, "_schema", None)
        # A view op's first argument carries alias information; an op that makes new memory has none.
        if schema is None or not schema.arguments or schema.arguments[0].alias_info is None or not current.args:
            return ""
        current = current.args[0]
    return current.name if isinstance(current, torch.fx.Node) and current.op == "placeholder" else ""
