"""A call of a torch op as data: what a plugin node carries, in the graph, in the plan and in a saved program.

The arguments of an op become a JSON template in which ``{"tensor": i}`` stands for the i-th input tensor and
``{"int": i}`` (also ``float``, ``bool``) for a number that comes as a 0-d tensor. Everything else is a constant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import PluginError

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(
    op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: Callable[[Any], bool]
) -> tuple[list[Any], str]:
    """Split a call into its tensors and a JSON template.

    Args:
        op: the torch op; its schema tells dtypes, devices and numbers apart.
        args: positional arguments.
        kwargs: keyword arguments.
        is_tensor: whether a value stands for a tensor (graph values while exporting, real tensors elsewhere).

    Returns:
        The tensors in order and the template.

    Raises:
        PluginError: an argument has no JSON form.
    """
    tensors: list[Any] = []
    schema = {argument.name: argument for argument in op._schema.arguments}
    positional = [argument for argument in op._schema.arguments if not argument.kwarg_only]

    def one(value: Any, kind: str) -> Any:
        if is_tensor(value):
            tensors.append(value)
            number = next(
                (n for s, n in (("SymInt", "int"), ("int", "int"), ("float", "float"), ("bool", "bool")) if kind == s),
                None,
            )
            return {number or "tensor": len(tensors) - 1}
        if isinstance(value, (list, tuple)):
            return [one(part, kind.removesuffix("[]")) for part in value]
        return _constant(value, kind, op)

    def kind_of(argument: Any) -> str:
        # "Optional[List[int]]" → "int[]"
        text = str(argument.real_type)
        while text.startswith("Optional["):
            text = text[len("Optional[") : -1]
        return f"{text[5:-1]}[]" if text.startswith("List[") else text

    template = {
        "args": [one(value, kind_of(argument)) for argument, value in zip(positional, args, strict=False)],
        "kwargs": {name: one(value, kind_of(schema[name])) for name, value in kwargs.items() if name in schema},
    }
    return tensors, json.dumps(template, separators=(",", ":"))


def _constant(value: Any, kind: str, op: torch._ops.OpOverload) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if value == value and abs(value) != float("inf") else {"number": repr(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {name: str(value).removeprefix("torch.")}
    raise PluginError(f"Argument {value!r} ({kind}) of {op} cannot be stored in a plugin node.")


def decode(template: str, tensors: Sequence[torch.Tensor], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, with these tensors; devices become the one that it runs on."""

    def one(data: Any) -> Any:
        if isinstance(data, list):
            return [one(part) for part in data]
        if not isinstance(data, dict):
            return data
        ((tag, value),) = data.items()
        if tag == "tensor":
            return tensors[value]
        if tag in ("int", "float", "bool"):
            return tensors[value].item()
        if tag == "device":
            return device
        if tag == "number":
            return float(value)
        return getattr(torch, value)

    data = json.loads(template)
    return [one(arg) for arg in data["args"]], {name: one(arg) for name, arg in data["kwargs"].items()}
