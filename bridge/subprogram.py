"""Conditions and loops as plugins: a call of a higher-order op becomes a call of ``trtbridge::run_program``."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..errors import PluginError
from ..plugins.program import encode_program
from .tracing import one_at_a_time


class _HigherOrderCall(torch.nn.Module):
    """One call of a higher-order op as a module of its tensors."""

    def __init__(self, node: torch.fx.Node, owner: torch.nn.Module) -> None:
        super().__init__()
        self.op = node.target
        self.template: tuple[Any, ...] = node.args
        self.kwargs: dict[str, Any] = dict(node.kwargs)
        self.operands: list[torch.fx.Node] = []
        self.graphs: dict[str, torch.nn.Module] = {}
        for argument in node.all_input_nodes:
            inner = getattr(owner, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(inner, torch.nn.Module):
                self.graphs[argument.name] = inner
            elif isinstance(argument.meta.get("val"), torch.Tensor):
                self.operands.append(argument)
            else:
                raise PluginError(
                    f"{node.target} takes {argument.meta.get('val')!r}, which is no tensor; such a call is no plugin."
                )

    def forward(self, *tensors: torch.Tensor) -> Any:
        values: dict[str, Any] = dict(zip((o.name for o in self.operands), tensors, strict=True)) | self.graphs

        def fill(part: Any) -> Any:
            if isinstance(part, torch.fx.Node):
                return values[part.name]
            if isinstance(part, (tuple, list)):
                return type(part)(fill(entry) for entry in part)
            if isinstance(part, dict):
                return {name: fill(entry) for name, entry in part.items()}
            return part

        assert callable(self.op)
        return self.op(*(fill(part) for part in self.template), **{n: fill(p) for n, p in self.kwargs.items()})


@one_at_a_time
def as_program_call(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    """Replace a call of a higher-order op by one of ``run_program`` with the same results.

    Raises:
        PluginError: the call cannot be exported alone.
    """
    owner = graph.owning_module
    assert owner is not None
    call = _HigherOrderCall(node, owner)
    examples, specs = [], []
    for operand in call.operands:
        fake = operand.meta["val"]
        dynamic = [axis for axis, size in enumerate(fake.shape) if not isinstance(size, int)]
        shape = [_hint(size) if axis in dynamic else size for axis, size in enumerate(fake.shape)]
        examples.append(torch.zeros(shape, dtype=fake.dtype, device=fake.device))
        specs.append(dict.fromkeys(dynamic, torch.export.Dim.AUTO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(call, tuple(examples), dynamic_shapes={"tensors": tuple(specs)}, strict=False)
            text = encode_program(program)
    except Exception as error:
        raise PluginError(f"{node.target} cannot be exported alone: {type(error).__name__}: {error}") from error
    made = graph.call_function(torch.ops.trtbridge.run_program.default, (text, list(call.operands)))
    made.meta = dict(node.meta)
    name = node.name
    node.replace_all_uses_with(made, propagate_meta=False)
    graph.erase_node(node)
    made.name = name
    return made


def _hint(size: Any) -> int:
    """A size for an example: the traced one, but not 0 or 1, which torch.export takes for constants."""
    try:
        return max(2, int(size.node.hint))
    except (TypeError, AttributeError):
        return 4  # depends on data
