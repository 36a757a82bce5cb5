"""The user's arguments made flat, their dynamic dimensions resolved, and examples that torch.export generalizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DynamicShapeError, InputError
from .dims import DerivedDim, Dim, Range, combine_profiles
from .profiles import describe_profiles, fits
from .structure import Structure, child_labels, flatten, leaf_labels

LeafDims = dict[int, DerivedDim]
"""The dynamic dimensions of one tensor: dimension → expression."""


@dataclass(frozen=True)
class Arguments:
    """A call's arguments, flat.

    Attributes:
        tensors: the tensors in order, complex ones as (..., 2) reals.
        structure: of ``(args, kwargs)``.
        labels: how a user would write each tensor's place.
        dims: for each tensor its dynamic dimensions.
        ranges: (min, opt, max) of each named dim.
        parameters: names of the positional arguments' parameters.
        complex_inputs: which tensors were complex.
        profiles: range of each named dim in each profile; () where there is one.
    """

    tensors: tuple[torch.Tensor, ...]
    structure: Structure
    labels: tuple[str, ...]
    dims: tuple[LeafDims, ...]
    ranges: Mapping[str, Range]
    parameters: tuple[str, ...]
    complex_inputs: tuple[int, ...] = ()
    profiles: tuple[Mapping[str, Range], ...] = ()


def collect(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> Arguments:
    """Flatten a call's arguments and resolve ``dynamic_shapes`` against them.

    Raises:
        InputError: the arguments do not fit forward's parameters, or hold no usable tensor.
        DynamicShapeError: dynamic_shapes does not fit the arguments.
    """
    if not isinstance(args, (tuple, list)):
        raise InputError(
            f"args must be a tuple of positional arguments, got {type(args).__name__}; write (x,) for one."
        )
    parameters = _parameter_names(model, tuple(args), kwargs)
    tensors, structure = flatten((tuple(args), dict(kwargs)))
    positional, keyword = structure.children
    names = [*parameters, *keyword.keys]
    parts = [*positional.children, *keyword.children]
    labels = [label for name, part in zip(names, parts, strict=True) for label in leaf_labels(part, name)]
    for label, tensor in zip(labels, tensors, strict=True):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = str(tensor.dtype if tensor.is_quantized else tensor.layout).removeprefix("torch.")
            raise InputError(f"Input {label} is a {kind} tensor; only dense tensors can be engine inputs.")
    complex_inputs = tuple(index for index, tensor in enumerate(tensors) if tensor.is_complex())
    tensors = [torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors]

    leaf_specs: list[Any] = []
    for name, part, spec in zip(names, parts, _top_level(names, len(parameters), dynamic_shapes), strict=True):
        _align(part, spec, name, leaf_specs)
    resolver = _Resolver()
    dims = [resolver.leaf(*leaf) for leaf in zip(labels, tensors, leaf_specs, strict=True)]
    ranges, profiles = resolver.finish()
    return Arguments(
        tuple(tensors), structure, tuple(labels), tuple(dims), ranges, tuple(parameters), complex_inputs, profiles
    )


def _parameter_names(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The parameter each positional argument binds to; ``args[i]`` for those that a ``*args`` takes."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"The arguments do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(len(args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and len(names) < len(args):
            names.append(parameter.name)
    return names


def _top_level(names: Sequence[str], positional: int, dynamic_shapes: Any) -> list[Any]:
    """One entry an argument, from a dict by name or a sequence by position."""
    if dynamic_shapes is None:
        return [None] * len(names)
    if isinstance(dynamic_shapes, Mapping):
        specs = dict(dynamic_shapes)
        for name in names:  # torch.export writes *args as one entry: {"args": (spec, spec)}
            group, bracket, _ = name.partition("[")
            if bracket and group in specs:
                values = specs.pop(group)
                specs |= {f"{group}[{i}]": value for i, value in enumerate(values)}
        unknown = [key for key in specs if key not in names]
        if unknown:
            raise DynamicShapeError(f"dynamic_shapes names {unknown}, but the arguments are {list(names)}.")
        return [specs.get(name) for name in names]
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) not in (positional, len(names)):
            raise DynamicShapeError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for the arguments {list(names)}; "
                'give one for each (None for a static one), or a dict by name such as {"x": {0: dim}}.'
            )
        return [*dynamic_shapes, *[None] * (len(names) - len(dynamic_shapes))]
    raise DynamicShapeError(f"dynamic_shapes must be a dict by argument name or a tuple, got {dynamic_shapes!r}.")


def _align(structure: Structure, spec: Any, label: str, leaf_specs: list[Any]) -> None:
    """Walk a structure and its spec together, leaving one spec a tensor."""
    if structure.kind == "tensor":
        leaf_specs.append(spec)
        return
    labels = child_labels(structure, label)
    if spec is None or spec in ({}, (), []):
        specs: list[Any] = [None] * len(structure.children)
    elif structure.kind == "constant":
        raise DynamicShapeError(f"dynamic_shapes gives {spec!r} for {label}, which is no tensor.")
    elif isinstance(spec, Mapping) and structure.keys:
        unknown = [key for key in spec if key not in structure.keys]
        if unknown:
            raise DynamicShapeError(f"dynamic_shapes for {label} names {unknown}; its keys are {list(structure.keys)}.")
        specs = [spec.get(key) for key in structure.keys]
    elif isinstance(spec, (tuple, list)) and len(spec) == len(structure.children):
        specs = list(spec)
    else:
        raise DynamicShapeError(f"dynamic_shapes for {label} is {spec!r}; it must follow its parts {labels}.")
    for child_label, child, child_spec in zip(labels, structure.children, specs, strict=True):
        _align(child, child_spec, child_label, leaf_specs)


class _Resolver:
    """Gathers the named dims of all tensors and checks that they agree."""

    def __init__(self) -> None:
        self._roots: dict[str, Dim] = {}
        self._sizes: dict[str, tuple[int, str]] = {}  # size in the example, and where it was seen

    def leaf(self, label: str, tensor: torch.Tensor, spec: Any) -> LeafDims:
        if spec is None:
            return {}
        if isinstance(spec, (tuple, list)):
            if len(spec) != tensor.ndim:
                raise DynamicShapeError(
                    f"dynamic_shapes for {label} has {len(spec)} entries, but it has rank {tensor.ndim}."
                )
            spec = dict(enumerate(spec))
        if not isinstance(spec, Mapping):
            raise DynamicShapeError(
                f"dynamic_shapes for {label} is {spec!r}; write {{dimension: Dim}} or one a dimension."
            )
        found: LeafDims = {}
        for axis, entry in spec.items():
            if not isinstance(axis, int) or not -tensor.ndim <= axis < tensor.ndim:
                raise DynamicShapeError(
                    f"dynamic_shapes for {label}: {axis!r} is no dimension of a rank {tensor.ndim} tensor."
                )
            place = f"dimension {axis} of {label}"
            dim = _as_derived(entry, tensor.shape[axis], place)
            if dim is not None:
                self._add(dim, tensor.shape[axis], place)
                if dim.root.min < dim.root.max:  # a range of one size is static
                    found[axis % tensor.ndim] = dim
        return found

    def _add(self, dim: DerivedDim, size: int, place: str) -> None:
        root = dim.root
        known = self._roots.setdefault(root.name, root)
        if known != root:
            raise DynamicShapeError(f"Dim {root.name!r} is given with two ranges: {known} and {root}.")
        value, remainder = divmod(size - dim.offset, dim.scale)
        if remainder or not root.min <= value <= root.max:
            raise DynamicShapeError(f"The example has size {size} in {place}, outside {dim} with {root}.")
        seen, seen_place = self._sizes.setdefault(root.name, (value, place))
        if seen != value:
            raise DynamicShapeError(
                f"Dim {root.name!r} is {seen} in {seen_place} but {value} in {place} of the example."
            )

    def finish(self) -> tuple[dict[str, Range], tuple[dict[str, Range], ...]]:
        ranges = {}
        for name, dim in self._roots.items():
            if dim.min < dim.max:
                ranges[name] = (dim.min, self._sizes[name][0] if dim.opt is None else dim.opt, dim.max)
        profiles = combine_profiles(self._roots.values(), ranges)
        sizes = {name: self._sizes[name][0] for name in ranges}
        if profiles and not fits(sizes, profiles):
            listed = "\n  ".join(describe_profiles(profiles))
            raise DynamicShapeError(
                f"The example has {', '.join(f'{name} {size}' for name, size in sizes.items())}, which no profile "
                f"takes:\n  {listed}"
            )
        return ranges, profiles


def _as_derived(entry: Any, size: int, place: str) -> DerivedDim | None:
    """A dimension's entry as a derived dim: our own types, a fixed size, or a torch.export.Dim."""
    if entry is None:
        return None
    if isinstance(entry, DerivedDim):
        return entry
    if isinstance(entry, Dim):
        return DerivedDim(entry, 1, 0)
    if isinstance(entry, int):
        if entry != size:
            raise DynamicShapeError(f"dynamic_shapes fixes {place} at {entry}, but the example has {size}.")
        return None
    name = getattr(entry, "__name__", None)
    if name is None or not hasattr(entry, "max"):
        raise DynamicShapeError(
            f"dynamic_shapes gives {entry!r} for {place}: an engine needs a range, as in "
            'tb.Dim("batch", min=1, opt=8, max=32).'
        )
    root = getattr(entry, "root", entry)
    # Without a max it is torch's own infinity, which int() refuses.
    if not root.max < 1 << 31:
        raise DynamicShapeError(f"torch.export.Dim {root.__name__!r} for {place} has no max; an engine needs one.")
    own = Dim(root.__name__, min=max(1, int(root.min)), max=int(root.max))
    if root is entry:
        return DerivedDim(own, 1, 0)
    offset = int(entry.fn(0))  # torch's derived dims are linear
    return DerivedDim(own, int(entry.fn(1)) - offset, offset)


def trace_tensors(arguments: Arguments) -> tuple[list[torch.Tensor], list[dict[int, Any] | None]]:
    """Example tensors and torch.export dims that generalize.

    torch.export takes sizes 0 and 1 for constants and may take equal sizes for the same one, so where the example has
    such sizes in dynamic dimensions, other sizes in range are traced; only shapes matter to the trace.
    """
    roots = {dim.root.name: dim.root for leaf in arguments.dims for dim in leaf.values()}
    sizes: dict[str, int] = {}
    fixed = {
        n
        for t, leaf in zip(arguments.tensors, arguments.dims, strict=True)
        for i, n in enumerate(t.shape)
        if i not in leaf
    }
    for name, root in roots.items():
        example = next(
            (tensor.shape[axis] - dim.offset) // dim.scale
            for tensor, leaf in zip(arguments.tensors, arguments.dims, strict=True)
            for axis, dim in leaf.items()
            if dim.root.name == name
        )
        opt = arguments.ranges[name][1]
        wanted = [example, opt, *(n for n in (7, 5, 11, 3, 13, 6, 2)), root.max, max(2, root.min)]
        usable = [n for n in wanted if max(2, root.min) <= n <= root.max]
        taken = set(sizes.values()) | fixed
        sizes[name] = next((n for n in usable if n not in taken), usable[0])
    torch_dims = {name: torch.export.Dim(name, min=root.min, max=root.max) for name, root in roots.items()}
    tensors, specs = [], []
    for tensor, leaf in zip(arguments.tensors, arguments.dims, strict=True):
        spec: dict[int, Any] = {}
        for axis, dim in leaf.items():
            size = dim.scale * sizes[dim.root.name] + dim.offset
            if size != tensor.shape[axis]:
                index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
                tensor = tensor.detach().index_select(axis, index)
            torch_dim = torch_dims[dim.root.name]
            spec[axis] = torch_dim if (dim.scale, dim.offset) == (1, 0) else dim.scale * torch_dim + dim.offset
        tensors.append(tensor)
        specs.append(spec or None)
    return tensors, specs
