"""Checks of values in an exported program, which no engine makes and some of which torch.onnx stumbles over."""

from __future__ import annotations

import torch

_ITEM = ("aten.item.default", "aten._local_scalar_dense.default")


def drop_truth_checks(program: torch.export.ExportedProgram) -> None:
    """Remove from a program, in place, assertions about the truth of a tensor, as ``torch._check(mask.all().item())``.

    torch.onnx leaves out every assertion, but traces a program with all of them again; torch 2.11 fails to do so where
    a truth value became a number (``Piecewise((1, Eq(u4, 1)), (0, True)) ... is not tracked with proxy``). Those about
    numbers stay, since they are what torch knows of the sizes that are made of them.
    """
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            _drop(module)


def _drop(module: torch.fx.GraphModule) -> None:
    graph = module.graph
    about: dict[torch.fx.Node, bool] = {}  # arithmetic over numbers: whether only truth values went into it
    for node in graph.nodes:
        if str(node.target) in _ITEM:
            fake = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
            about[node] = isinstance(fake, torch.Tensor) and fake.dtype == torch.bool
        elif node.op == "call_function" and not isinstance(node.target, torch._ops.OperatorBase) and node.args:
            about[node] = bool(node.all_input_nodes) and all(about.get(n, False) for n in node.all_input_nodes)
    dropped = False
    for node in reversed(list(graph.nodes)):
        checks = "_assert_scalar" in str(node.target) and all(about.get(n, False) for n in node.all_input_nodes)
        if (checks and node.all_input_nodes) or (about.get(node, False) and not node.users):
            graph.erase_node(node)
            dropped = True
    if dropped:
        module.recompile()
