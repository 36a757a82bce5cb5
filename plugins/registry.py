"""Plugin ops by name: every op that torch knows is one, whether PyTorch's own or registered with torch.library."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.overrides import get_ignored_functions, resolve_name

from ..errors import PluginError
from . import torch_note
from .calls import decode, flatten_results, written_inputs
from .shipped import load_shipped

_HOMES = {"onnx_node": "onnx_node", "run_program": "program"}
"""The module of this package that registers an op of the namespace ``trtbridge``, beside those that ship for users."""

_TORCH_RACES = torch.__version__ < "2.13"
_one_at_a_time = threading.RLock()

PYTHON = "python"
"""Namespace of functions of torch that are no ops ("python::torch.cov")."""


def op_name(op: torch._ops.OpOverload) -> str:
    """The full name of an op, as stored: ``namespace::name.overload``."""
    return f"{op.namespace}::{op._schema.name.split('::')[1]}.{op._overloadname}"


def node_type(name: str) -> str:
    """The ONNX op type of an op's plugin nodes: ``aten_cummax``, with the overload where it is not the default."""
    return name.replace("::", "_").removesuffix(".default").replace(".", "_")


@functools.cache
def find_op(name: str) -> Callable[..., Any]:
    """The torch op of a full name, or for ``python::torch.cov`` that function.

    Raises:
        PluginError: no such op in this process; its library must be imported first.
    """
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    try:
        if namespace == PYTHON:
            function: Any = functools.reduce(getattr, rest.split(".")[1:], torch)
            # A name comes from a file, too: nothing but torch's own functions on tensors is called. torch.load and
            # torch.os.system are none.
            if resolve_name(function) != rest or function in get_ignored_functions():
                raise AttributeError(rest)
            return function  # type: ignore[no-any-return]
        if namespace == "trtbridge" and packet_name in _HOMES:
            importlib.import_module(f".{_HOMES[packet_name]}", __package__)
        elif namespace == "trtbridge":
            load_shipped(name)
        return getattr(getattr(getattr(torch.ops, namespace), packet_name), overload or "default")  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError) as error:
        raise PluginError(
            f"The plugin op {name!r} is not registered in this process. Import the Python module that registers it "
            "(torch.library.custom_op or define/impl) before converting, loading or calling."
        ) from error


def stays_out_of_graphs(name: str) -> bool:
    """Whether the author of an op says that no CUDA graph may hold it (``torch.Tag.cudagraph_unsafe``)."""
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    return unsafe is not None and unsafe in getattr(find_op(name), "tags", ())


def _in_turn(op: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Before 2.13 torch loses its note (torch_note.py) wherever two ops of `torch.library.custom_op` run at once."""
    is_custom = isinstance(op, torch._ops.OpOverload) and op._schema.name in OPDEFS
    return _one_at_a_time if _TORCH_RACES and is_custom else nullcontext()


def call_op(
    op: Callable[..., Any], template: str, tensors: Sequence[torch.Tensor], device: torch.device | None
) -> list[torch.Tensor]:
    """Run a plugin op on torch's current stream.

    Args:
        op: the torch op.
        template: the call's JSON template.
        tensors: input tensors.
        device: device that constants of type device become; None leaves them.

    Returns:
        The output tensors, flat (`flatten_results`).
    """
    return torch_note.patiently(lambda: _call_once(op, template, tensors, device))


def _call_once(
    op: Callable[..., Any], template: str, tensors: Sequence[torch.Tensor], device: torch.device | None
) -> list[torch.Tensor]:
    written = written_inputs(template)
    if written:
        tensors = [tensor.clone() if index in written else tensor for index, tensor in enumerate(tensors)]
    args, kwargs = decode(template, tensors, device)
    with _in_turn(op):
        results = flatten_results(op(*args, **kwargs))
    return [*results, *(tensors[index] for index in written)]
