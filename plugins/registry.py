"""Plugin ops by name: every op that torch knows is one, whether PyTorch's own or registered with torch.library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PluginError
from .calls import decode

DOMAIN = "trtbridge"
"""ONNX domain of plugin nodes."""

OP_ATTRIBUTE = "op"
"""Node attribute with the op's full name ("aten::cummax.default")."""

CALL_ATTRIBUTE = "call"
"""Node attribute with the call's JSON template (`plugins.calls`)."""


def op_name(op: torch._ops.OpOverload) -> str:
    """The full name of an op, as stored: ``namespace::name.overload``."""
    return f"{op.namespace}::{op._schema.name.split('::')[1]}.{op._overloadname}"


def node_type(op: torch._ops.OpOverload) -> str:
    """The ONNX op type of an op's plugin nodes: ``aten_cummax``, with the overload where it is not the default."""
    name = op_name(op).replace("::", "_")
    return name.removesuffix(".default").replace(".", "_")


def find_op(name: str) -> torch._ops.OpOverload:
    """The torch op of a full name.

    Raises:
        PluginError: no such op in this process; its library must be imported first.
    """
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet_name), overload or "default")  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError) as error:
        raise PluginError(
            f"The plugin op {name!r} is not registered in this process. Import the Python module that registers it "
            "(torch.library.custom_op or define/impl) before converting, loading or calling."
        ) from error


def call_op(
    op: torch._ops.OpOverload, template: str, tensors: Sequence[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """Run a plugin op on torch's current stream.

    Args:
        op: the torch op.
        template: the call's JSON template.
        tensors: input tensors.
        device: device that constants of type device become.

    Returns:
        The output tensors, flat.
    """
    args, kwargs = decode(template, tensors, device)
    result = op(*args, **kwargs)
    flat: list[torch.Tensor] = []
    for part in result if isinstance(result, (tuple, list)) else (result,):
        flat += part if isinstance(part, (tuple, list)) else (part,)
    return flat
