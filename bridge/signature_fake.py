"""What a call of an engine returns, said of its inputs' shapes alone: for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..plugins.sizes import evaluate, names_in
from .dtypes import to_torch
from .model import Signature, TensorSpec

UNBOUNDED = (1 << 63) - 1


def fake_results(signature: Signature, inputs: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Empty tensors with the shapes and dtypes of the results, for inputs that may have symbolic sizes.

    A size that follows the inputs is computed from theirs, symbolic or not. One that depends on data is a new size
    within the bounds of the signature; results that name the same size share it. In torch.export a size of an input
    that the engine restricts is restricted in the exported program too; torch.compile leaves the restriction to the
    call itself, which says more about it than a guard could.

    Args:
        signature: of the engines; complex tensors are (..., 2) reals here.
        inputs: as many as the signature has.
        device: where results are.

    Raises:
        InputError: the number of inputs, a dtype, a rank or a device differs from the signature.
    """
    if len(inputs) != len(signature.inputs):
        raise InputError(f"The engine takes {len(signature.inputs)} tensor(s), got {len(inputs)}.")
    sizes: dict[str, Any] = {}
    for label, spec, tensor in zip(signature.labels, signature.inputs, inputs, strict=True):
        if tensor.dtype != to_torch(spec.dtype) or tensor.ndim != len(spec.shape) or tensor.device != device:
            raise InputError(
                f"Input {label}: expected {spec.type_text} on {device}, "
                f"got {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}."
            )
        _bind(spec, tensor, sizes, signature.dims, torch.compiler.is_exporting())
    unknown: dict[str, Any] = {}
    return [
        torch.empty(
            [_size(spec, axis, sizes, unknown) for axis in range(len(spec.shape))],
            dtype=to_torch(spec.dtype),
            device=device,
        )
        for spec in signature.outputs
    ]


def _bind(
    spec: TensorSpec,
    tensor: torch.Tensor,
    sizes: dict[str, Any],
    dims: Mapping[str, tuple[int, int, int]],
    restrict: bool,
) -> None:
    """Learn the named sizes of an input; with `restrict` also hold it to the spec."""
    for axis, size in enumerate(spec.shape):
        given = tensor.shape[axis]
        if isinstance(size, int):
            if restrict:
                torch._check(given == size)
        elif size is not None:
            (name,) = names_in(size)
            offset = evaluate(size, {name: 0})
            scale = evaluate(size, {name: 1}) - offset
            value = given - offset if scale == 1 else (given - offset) // scale
            known = sizes.setdefault(name, value)
            if restrict:
                low, _, high = dims[name]
                torch._check(value >= low)
                torch._check(value <= high)
                torch._check(given == known * scale + offset)


def _size(spec: TensorSpec, axis: int, sizes: Mapping[str, Any], unknown: dict[str, Any]) -> Any:
    """One size of a result: an int or a SymInt."""
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    if size is not None and names_in(size) <= sizes.keys():
        value = evaluate(size, sizes)
        return torch.sym_int(value) if isinstance(value, (float, torch.SymFloat)) else value
    bounds = spec.ranges[axis]
    low, high = (0, UNBOUNDED) if bounds is None else (bounds[0], bounds[2])
    if size is None or not size.isidentifier():
        return _new_size(low, high)
    if size not in unknown:
        unknown[size] = _new_size(low, high)
    return unknown[size]


def _new_size(low: int, high: int) -> Any:
    """A size that only the call itself will tell."""
    context = torch.library.get_ctx()
    return context.new_dynamic_size(min=low, max=None if high == UNBOUNDED else high)
