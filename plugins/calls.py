"""A call of a torch op as data: what a plugin node carries, in the graph, in the plan and in a saved program.

The arguments of an op become a JSON template, in which everything that JSON lacks is an object with one tag:

- ``{"tensor": i}``: the i-th input; ``{"complex": i}``: the i-th input, which holds a complex tensor as pairs of reals
- ``{"int": i}``, ``{"float": i}``, ``{"bool": i}``: a number, read from the 0-d i-th input
- ``{"sym": "2*s0 + 1"}``: a size, computed from the shapes of the inputs; ``"symbols": {"s0": [i, axis]}`` says whence
- ``{"dtype": ...}``, ``{"layout": ...}``, ``{"memory_format": ...}``, ``{"device": ...}``: torch's named constants
- ``{"number": "inf"}``: a float that JSON cannot write; ``{"complex_number": [re, im]}``
- ``{"dict": {...}}``: a dict with text keys

``"outputs"`` is the number of results; ``"writes": [i, ...]`` names inputs that the op writes to: it gets copies, which
are results too, after its own; ``"borrowed"`` says that the call reads none of its inputs. A call's results are flat:
nested lists opened, None left out, complex tensors as pairs of reals.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import PluginError
from .sizes import evaluate

_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_INPUT_TAGS = ("tensor", "complex", "int", "float", "bool")


def encode(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    place: Callable[[Any], dict[str, Any] | None],
    symbols: Mapping[str, tuple[int, int]] | None = None,
    number: int | None = None,
) -> str:
    """Write a call's arguments as a JSON template.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        place: gives the tagged object for what comes in through an input (a tensor, a size); None for a constant. It
            is called in the order of the arguments.
        symbols: for each name in a ``{"sym": ...}`` the input and the axis whose size it is.
        number: makes calls with equal arguments differ: ops that draw random numbers must not be merged.

    Raises:
        PluginError: an argument has no JSON form.
    """

    def one(value: Any) -> Any:
        placed = place(value)
        if placed is not None:
            return placed
        if isinstance(value, (list, tuple)):
            return [one(part) for part in value]
        if isinstance(value, Mapping):
            return {"dict": {str(name): one(part) for name, part in value.items()}}
        return _constant(value)

    template: dict[str, Any] = {
        "args": [one(value) for value in args],
        "kwargs": {name: one(value) for name, value in kwargs.items()},
    }
    if symbols:
        template["symbols"] = {name: list(source) for name, source in symbols.items()}
    if number is not None:
        template["number"] = number
    return json.dumps(template, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def _parsed(template: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(template)
    return data


def encode_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], str]:
    """Split a call with real tensors into these tensors and a template.

    Raises:
        PluginError: an argument has no JSON form.
    """
    tensors: list[torch.Tensor] = []

    def place(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, torch.Tensor):
            return None
        tensors.append(torch.view_as_real(value.resolve_conj()) if value.is_complex() else value)
        return {"complex" if value.is_complex() else "tensor": len(tensors) - 1}

    template = encode(args, kwargs, place)
    return tensors, template


def _constant(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        finite = value == value and abs(value) != float("inf")
        return float(value) if finite else {"number": repr(float(value))}
    if isinstance(value, complex):
        return {"complex_number": [repr(value.real), repr(value.imag)]}
    if isinstance(value, int):  # an IntEnum, say
        return int(value)
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, type_ in _NAMED.items():
        if isinstance(value, type_):
            return {name: str(value).removeprefix("torch.")}
    raise PluginError(
        f"An argument of type {type(value).__name__} ({value!r:.100}) cannot be stored in a plugin node: it takes "
        "tensors, numbers, text, None, dtypes, devices, layouts, memory formats, and lists and dicts of these."
    )


def decode(
    template: str, tensors: Sequence[torch.Tensor], device: torch.device | None
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, with these tensors; devices become the one that it runs on (None: stay as they are).

    Tensors may be fake and sizes symbolic.
    """
    data = _parsed(template)
    sizes = {name: tensors[index].shape[axis] for name, (index, axis) in data.get("symbols", {}).items()}

    values = [_decoded(arg, tensors, device, sizes) for arg in data["args"]]
    return values, {name: _decoded(arg, tensors, device, sizes) for name, arg in data["kwargs"].items()}


def _decoded(part: Any, tensors: Sequence[torch.Tensor], device: torch.device | None, sizes: Mapping[str, Any]) -> Any:
    # Not a function within `decode`: one that calls itself is a cycle of references, which would keep the tensors of
    # each call until Python's garbage collector comes by.
    if isinstance(part, list):
        return [_decoded(entry, tensors, device, sizes) for entry in part]
    if not isinstance(part, dict):
        return part
    ((tag, value),) = part.items()
    match tag:
        case "tensor":
            return tensors[value]
        case "complex":
            return torch.view_as_complex(tensors[value].contiguous())
        case "int" | "float" | "bool":
            given: Any = tensors[value]  # while tracing a symbolic number may stand in the place of a tensor
            return given.item() if isinstance(given, torch.Tensor) else given
        case "sym":
            return evaluate(value, sizes)
        case "device":
            return torch.device(value) if device is None else device
        case "number":
            return float(value)
        case "complex_number":
            return complex(float(value[0]), float(value[1]))
        case "dict":
            return {name: _decoded(entry, tensors, device, sizes) for name, entry in value.items()}
        case "dtype" | "layout" | "memory_format":
            return getattr(torch, value)
    raise PluginError(f"A plugin node's template has the unknown tag {tag!r}: made by a newer version of trtbridge?")


def flatten_results(result: Any) -> list[torch.Tensor]:
    """The tensors that a call returned, flat; None left out, numbers as 0-d tensors, complex ones as pairs of reals."""
    if result is None:
        return []
    if isinstance(result, torch.Tensor):
        return [torch.view_as_real(result.resolve_conj()) if result.is_complex() else result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in flatten_results(part)]
    if isinstance(result, (bool, torch.SymBool)):
        return [torch.scalar_tensor(result, dtype=torch.bool)]  # type: ignore[arg-type]
    return [torch.scalar_tensor(result, dtype=torch.int64 if isinstance(result, (int, torch.SymInt)) else None)]


def written_inputs(template: str) -> list[int]:
    """The inputs that the op writes to."""
    return list(_parsed(template).get("writes", ())) if '"writes":' in template else []


def texts(template: str) -> list[str]:
    """The positional arguments that are texts."""
    return [part for part in _parsed(template)["args"] if isinstance(part, str)]


def stated_results(template: str) -> list[tuple[list[Any], torch.dtype]] | None:
    """Shapes ("?" for a size that is not known) and dtypes of the results, of a function that cannot be traced."""
    stated = _parsed(template).get("results")
    return None if stated is None else [(shape, getattr(torch, dtype)) for shape, dtype in stated]


def reads_numbers(template: str) -> bool:
    """Whether a call reads numbers from tensors, so that the host must wait for the device."""
    return any(f'{{"{tag}":' in template for tag in _INPUT_TAGS[2:])
