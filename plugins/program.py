"""``trtbridge::run_program``: a part of a model as one plugin op, for conditions and loops that no engine takes.

The part is an exported program, kept as text in the plugin node and saved with it. torch.export's own format is used,
which needs no pickle for graphs; weights do not stand in it, they come in as inputs.
"""

from __future__ import annotations

import base64
import functools
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .calls import flatten_results

OP = "trtbridge::run_program.default"


def encode_program(program: torch.export.ExportedProgram) -> str:
    """An exported program as text."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


@functools.lru_cache(maxsize=64)
def _load(text: str) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(io.BytesIO(base64.b64decode(text)))
        return program.module(check_guards=False) if _takes_check_guards() else program.module()


def ops_of(text: str) -> set[str]:
    """The ops that a program calls, those in the bodies of its conditions and loops too, torch's own left out."""
    loaded = _load(text)
    assert isinstance(loaded, torch.nn.Module)
    graphs = [part.graph for part in loaded.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    names = {str(target).replace(".", "::", 1) for target in targets if isinstance(target, torch._ops.OpOverload)}
    return {name for name in names if not name.startswith(("aten::", "prims::"))}


def _takes_check_guards() -> bool:
    import inspect

    return "check_guards" in inspect.signature(torch.export.ExportedProgram.module).parameters


_LIBRARY = torch.library.Library("trtbridge", "FRAGMENT")
_LIBRARY.define("run_program(str program, Tensor[] inputs) -> Tensor[]")


def _run(program: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    results = flatten_results(_load(program)(*inputs))
    # What only goes through must be a tensor of its own.
    return [r.clone() if r.untyped_storage()._cdata in given else r for r in results]


torch.library.impl(_LIBRARY, "run_program", "CompositeExplicitAutograd")(_run)
torch.library.register_fake("trtbridge::run_program", _run, lib=_LIBRARY)
