"""The arguments of a call, bound and checked against a signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError, OutOfRangeError
from ..plugins.sizes import names_in
from .dims import evaluate_size
from .dtypes import to_torch
from .model import Signature, TensorSpec
from .profiles import fits
from .structure import matches

_MOST_ACCEPTED = 4096  # combinations of shapes that are remembered


class InputChecker:
    """Binds the arguments of a call and checks them against a signature, all of them before complaining."""

    def __init__(self, signature: Signature, device: torch.device) -> None:
        self._signature = signature
        self._device = device
        positional, keyword = signature.input_structure.children
        self._positional, self._keyword = positional, keyword
        self._leaves = [
            _Leaf(label, spec, signature, index in signature.complex_inputs)
            for index, (label, spec) in enumerate(zip(signature.labels, signature.inputs, strict=True))
        ]
        # Where every argument is a tensor, a call with the shapes of an earlier one is known at a glance.
        kinds = {structure.kind for structure in positional.children}
        self._plain = kinds == {"tensor"} and not keyword.children and not signature.complex_inputs
        self._accepted: set[tuple[torch.Size, ...]] = set()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        if self._plain and not kwargs and len(args) == len(self._leaves) and self._is_known(args):
            return list(args)
        tensors = self.flatten(args, kwargs)
        problems: list[str] = []
        sizes: dict[str, tuple[int, str]] = {}
        only_sizes = True
        for leaf, tensor in zip(self._leaves, tensors, strict=True):
            problem = leaf.check_kind(tensor, self._device)
            if problem:
                only_sizes = False
            else:
                problem = leaf.check_sizes(tensor.shape, sizes)
            if problem:
                problems.append(problem)
        profiles = self._signature.profiles
        if profiles and not problems and not fits({name: size for name, (size, _) in sizes.items()}, profiles):
            problems.append(self._no_profile(sizes))
        if problems:
            raise (OutOfRangeError if only_sizes else InputError)("\n".join(problems))
        if len(self._accepted) == _MOST_ACCEPTED:
            self._accepted.clear()
        self._accepted.add(tuple([tensor.shape for tensor in tensors]))
        return tensors

    def _is_known(self, args: tuple[Any, ...]) -> bool:
        """Whether these are tensors of the right kinds, and of shapes that were checked before."""
        device = self._device
        for tensor, leaf in zip(args, self._leaves, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != leaf.dtype or tensor.device != device:
                return False
        return tuple([tensor.shape for tensor in args]) in self._accepted

    def _no_profile(self, sizes: Mapping[str, tuple[int, str]]) -> str:
        given = " and ".join(f"{name} {size} (in {place})" for name, (size, place) in sizes.items())
        profiles = "\n  ".join(self._signature.describe_profiles())
        return (
            f"No profile takes {given}; sizes fit where one profile holds all of them:\n  {profiles}\n"
            'Convert with a profile that does, or with out_of_range="eager" for the original to run on such sizes.'
        )

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What stands in a call where the signature has tensors, complex ones as (..., 2) reals; not checked further.

        Raises:
            InputError: the call has another structure, or other fixed values.
        """
        tensors: list[Any] = []
        values = self._bind(args, kwargs)
        structures = [*self._positional.children, *self._keyword.children]
        names = [*self._signature.parameters, *self._keyword.keys]
        for name, value, structure in zip(names, values, structures, strict=True):
            matches(value, structure, name, tensors)
        for index in self._signature.complex_inputs:
            if isinstance(tensors[index], torch.Tensor) and tensors[index].is_complex():
                tensors[index] = torch.view_as_real(tensors[index].resolve_conj())
        return tensors

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The values of all arguments in order; positional ones may come by name."""
        parameters, keys = self._signature.parameters, self._keyword.keys
        if len(args) == len(parameters) and len(kwargs) == len(keys) and all(key in kwargs for key in keys):
            return [*args, *(kwargs[key] for key in keys)]
        names = [*parameters, *keys]
        if len(args) > len(names):
            raise InputError(f"Takes {len(names)} argument(s) ({', '.join(names)}), got {len(args)}.")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"Argument {name!r} is given twice, by position and by name.")
            given[name] = value
        missing = [name for name in names if name not in given]
        extra = [name for name in given if name not in names]
        if missing or extra:
            raise InputError(
                f"Takes the arguments that it was converted with: {', '.join(names)};"
                + (f" missing {', '.join(missing)}" if missing else "")
                + (f" unexpected {', '.join(extra)}: convert with an example of it to use it" if extra else "")
                + "."
            )
        return [given[name] for name in names]


class _Leaf:
    """The checks of one input tensor."""

    def __init__(self, label: str, spec: TensorSpec, signature: Signature, is_complex: bool) -> None:
        self.label = label if not is_complex else f"{label} (complex, seen as pairs of reals)"
        self.spec = spec
        self.dtype = to_torch(spec.dtype)
        self.fixed = tuple((axis, size) for axis, size in enumerate(spec.shape) if isinstance(size, int))
        self.named: list[tuple[int, str, int, int]] = []  # axis, dim, scale, offset
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                (name,) = names_in(size)
                offset = evaluate_size(size, {name: 0})
                self.named.append((axis, name, evaluate_size(size, {name: 1}) - offset, offset))
        self.dims = signature.dims

    def check_kind(self, tensor: Any, device: torch.device) -> str:
        """What is wrong with a tensor beside its sizes, or ""."""
        if not isinstance(tensor, torch.Tensor):
            return f"Input {self.label}: expected a tensor {self._expected()}, got {type(tensor).__name__}."
        if tensor.dtype != self.dtype:
            return f"Input {self.label}: expected {self.dtype}, got {tensor.dtype}; convert it with .to({self.dtype})."
        if tensor.device != device:
            return f'Input {self.label}: expected it on {device}, got {tensor.device}; move it with .to("{device}").'
        shape = tensor.shape
        if len(shape) != len(self.spec.shape):
            rank = len(self.spec.shape)
            return f"Input {self.label}: expected rank {rank} {self._expected()}, got shape {tuple(shape)}."
        return ""

    def check_sizes(self, shape: torch.Size, sizes: dict[str, tuple[int, str]]) -> str:
        """What is wrong with the sizes of a tensor, or "". Those of named dims are gathered over all inputs."""
        for axis, size in self.fixed:
            if shape[axis] != size:
                return (
                    f"Input {self.label}: expected size {size} in dimension {axis} {self._expected()}, got shape "
                    f"{tuple(shape)}; that dimension was static in convert(): give it a tb.Dim in dynamic_shapes."
                )
        for axis, name, scale, offset in self.named:
            value, remainder = divmod(shape[axis] - offset, scale)
            low, _, high = self.dims[name]
            if remainder or not low <= value <= high:
                return (
                    f"Input {self.label}: dimension {axis} is {self.spec.shape[axis]} with {name} from {low} to "
                    f"{high}, got {shape[axis]} in shape {tuple(shape)}; convert with a wider tb.Dim to take it."
                )
            seen, place = sizes.setdefault(name, (value, self.label))
            if seen != value:
                where = f"{value} in dimension {axis}, but {seen} in {place}"
                return f"Input {self.label}: {name} is {where}; they must agree."
        return ""

    def _expected(self) -> str:
        return f"of {self.spec.type_text}"
