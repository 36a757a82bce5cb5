"""convert_submodules: a copy of a model in which chosen parts are engines and the rest is as it was."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError, OptionError, TrtBridgeError
from .chosen_nodes import NothingFitsError, as_entries
from .convert import convert
from .dims import Dim
from .module import EngineModule
from .options import Options
from .structure import Structure, flatten
from .trace import left_as_found, to_eval_mode

logger = logging.getLogger(__name__)

Select = str | type[torch.nn.Module] | Callable[[str, torch.nn.Module], bool]


_WITH_ENTRIES = ("as_plugins", "keep_fp32")


@dataclass(frozen=True)
class SubmodulesReport:
    """What became of the chosen submodules.

    Attributes:
        converted: path in the model → its engines.
        skipped: path → why it stayed as it was.
    """

    converted: Mapping[str, EngineModule]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{path}: {module.extra_repr()}" for path, module in self.converted.items()]
        lines += [f"{path}: stays as it is: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_submodules(
    model: torch.nn.Module,
    select: Select | Sequence[Select],
    inputs: tuple[Any, ...] | Sequence[tuple[Any, ...] | Mapping[str, Any]],
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    skip_failures: bool = False,
    backend: str = "auto",
    **options: Any,
) -> torch.nn.Module:
    """Convert parts of a model, each with what it is called with when the model runs.

    The model runs once on each sample, in eval mode and without gradients. A dimension of a submodule's argument that
    differs between its calls becomes a `Dim` from the smallest to the largest size seen; dimensions that have the same
    size in every call share one, so samples should differ wherever dimensions are free. All else is static.

    Args:
        model: left as it is. Its other parameters and buffers are shared with the copy, not copied.
        select: which submodules: a path ("encoder"), a pattern of paths ("encoder.layer.*"), a class, a function of
            (path, module) that says True, or a list of these. Of two, one inside the other, the outer one counts.
        inputs: a tuple of the model's arguments, or a list of samples, each such a tuple or a dict by name.
        dynamic_shapes: path → what `convert` takes as ``dynamic_shapes`` of that submodule, instead of what is seen.
        skip_failures: leave what is not called, or does not convert, as it is.
        backend: as for `convert`.
        options: see `Options`. What ``as_plugins`` and ``keep_fp32`` name is looked for in every submodule, paths from
            it on, and has to be in one.

    Returns:
        The copy. Its attribute ``submodules_report`` is a `SubmodulesReport`. A submodule that the model holds in
        several places is one engine in all of them.

    Raises:
        OptionError: nothing is selected, or an option is unknown.
        InputError: a selected submodule is not called, or is called in ways that no single engine takes.
        TrtBridgeError: as `convert`, with the submodule's path before the message.
    """
    Options.make(options)
    chosen = _choose(model, select)
    unknown = sorted(set(dynamic_shapes or {}) - set(chosen))
    if unknown:
        raise OptionError(f"dynamic_shapes names {unknown}; the chosen submodules are {list(chosen)}.")
    samples = [inputs] if isinstance(inputs, tuple) else list(inputs)
    seen = _watch(model, chosen, samples)
    engines: dict[str, EngineModule] = {}
    skipped: dict[str, str] = {}
    entries = _Entries(options, len(chosen))
    for path, module in chosen.items():
        try:
            args, kwargs = seen[path].example()
            shapes = dynamic_shapes[path] if dynamic_shapes and path in dynamic_shapes else seen[path].dynamic_shapes()
            engines[path] = entries.converted(
                functools.partial(convert, module, args, kwargs, dynamic_shapes=shapes, backend=backend)
            )
        except TrtBridgeError as error:
            if not skip_failures or isinstance(error, OptionError):
                error.args = (f"Submodule {path} ({type(module).__name__}): {error}", *error.args[1:])
                raise
            skipped[path] = f"{type(error).__name__}: {error}"
            logger.warning("%s stays as it is: %s", path, skipped[path])
    if not engines:
        logger.warning("none of the chosen submodules became an engine")
    copied = _copy_with(model, {id(chosen[path]): engine for path, engine in engines.items()})
    copied.submodules_report = SubmodulesReport(engines, skipped)  # type: ignore[assignment]
    return copied


class _Entries:
    """Options whose entries (`as_plugins`, `keep_fp32`) need not mean something in every submodule, but in one.

    Args:
        options: of convert().
        count: submodules that will be converted.
    """

    def __init__(self, options: Mapping[str, Any], count: int) -> None:
        self._options, self._left = options, count
        self._meant: set[tuple[str, Any]] = set()  # option and entry that meant something somewhere

    def converted(self, convert: Callable[..., EngineModule]) -> EngineModule:
        """The next submodule.

        Raises:
            OptionError: it is the last one, and an entry has meant nothing in any.
            TrtBridgeError: as ``convert``.
        """
        self._left -= 1
        options = dict(self._options)
        while True:
            try:
                module = convert(**options)
            except NothingFitsError as error:
                if self._left == 0 and (error.option, error.entry) not in self._meant:
                    raise
                options = error.without_it(options)
            else:
                self._meant |= {
                    (name, entry) for name in _WITH_ENTRIES if name in options for entry in as_entries(options[name])
                }
                return module


def _choose(model: torch.nn.Module, select: Select | Sequence[Select]) -> dict[str, torch.nn.Module]:
    """The outermost chosen submodules by path, in the model's order.

    Raises:
        OptionError: an entry selects nothing, or is no selection at all.
    """
    entries = list(select) if isinstance(select, (list, tuple)) else [select]
    modules = {path: module for path, module in model.named_modules() if path}
    found: set[str] = set()
    for entry in entries:
        if isinstance(entry, str):
            chosen = [entry] if entry in modules else fnmatch.filter(modules, entry)
        elif isinstance(entry, type) and issubclass(entry, torch.nn.Module):
            chosen = [path for path, module in modules.items() if isinstance(module, entry)]
        elif callable(entry) and not isinstance(entry, type):
            chosen = [path for path, module in modules.items() if entry(path, module)]
        else:
            raise OptionError(f"select={entry!r}: must be a path, a class of modules, a function, or a list of these.")
        if not chosen:
            close = difflib.get_close_matches(str(entry), modules, 3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise OptionError(f"select={entry!r} selects no submodule of {type(model).__name__}.{hint}")
        found.update(chosen)
    return {
        path: module
        for path, module in modules.items()
        if path in found and not any(path.startswith(f"{other}.") for other in found)
    }


@dataclass
class _Calls:
    """How one submodule was called.

    Attributes:
        args, kwargs: of its first call, copied.
        structure: of these.
        shapes: of all tensors, a list a call.
        problem: what makes its calls unlike one another.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    structure: Structure | None = None
    shapes: list[list[torch.Size]] = field(default_factory=list)
    problem: str = ""

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors, structure = flatten((args, dict(kwargs)))
        if self.structure is None:
            self.structure = structure
            copies = [tensor.detach().clone() for tensor in tensors]
            self.args, self.kwargs = structure.unflatten(copies)
            self._dtypes = [(tensor.dtype, tensor.ndim, tensor.device) for tensor in tensors]
        elif structure != self.structure:
            self.problem = self.problem or "it is called with other arguments, or other values that are no tensors"
        elif [(tensor.dtype, tensor.ndim, tensor.device) for tensor in tensors] != self._dtypes:
            self.problem = self.problem or "it is called with tensors of other dtypes, ranks or devices"
        self.shapes.append([tensor.shape for tensor in tensors])

    def example(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments of the first call.

        Raises:
            InputError: it was not called, or in ways that differ.
        """
        if self.structure is None:
            raise InputError(
                "the model does not call it on these samples (or calls a method of it, or reads its weights)."
            )
        if self.problem:
            raise InputError(f"{self.problem} in the same run; choose a part of it that is called in one way.")
        return self.args, self.kwargs

    def dynamic_shapes(self) -> tuple[Any, ...] | dict[str, Any] | None:
        """What differs between the calls, as `convert` takes it: nested as the arguments are."""
        names: dict[tuple[int, ...], Dim] = {}
        specs: list[dict[int, Dim]] = []
        for leaf in zip(*self.shapes, strict=True):
            spec: dict[int, Dim] = {}
            for axis, sizes in enumerate(zip(*leaf, strict=True)):
                if len(set(sizes)) > 1:
                    low = max(1, min(sizes))
                    name = f"size{len(names)}"
                    spec[axis] = names.setdefault(sizes, Dim(name, min=low, opt=max(low, sizes[0]), max=max(sizes)))
            specs.append(spec)
        if not names:
            return None
        assert self.structure is not None
        args, kwargs = self.structure.children
        remaining = iter(specs)
        nested = [_nest(child, remaining) for child in (*args.children, *kwargs.children)]
        return tuple(nested)


def _nest(structure: Structure, specs: Any) -> Any:
    """Specs of leaves, nested as the leaves are."""
    if structure.kind == "tensor":
        return next(specs)
    if structure.kind == "constant":
        return None
    parts = [_nest(child, specs) for child in structure.children]
    return dict(zip(structure.keys, parts, strict=True)) if structure.keys else parts


def _watch(model: torch.nn.Module, chosen: Mapping[str, torch.nn.Module], samples: Iterable[Any]) -> dict[str, _Calls]:
    """Run the model on samples and note how the chosen submodules are called."""
    calls = {path: _Calls() for path in chosen}

    def note(path: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            calls[path].add(args, kwargs)

        return hook

    with ExitStack() as stack:
        stack.enter_context(left_as_found(model))
        for path, module in chosen.items():
            stack.callback(module.register_forward_pre_hook(note(path), with_kwargs=True).remove)
        to_eval_mode(model)
        stack.enter_context(torch.no_grad())
        for sample in samples:
            if isinstance(sample, Mapping):
                model(**sample)
            elif isinstance(sample, (tuple, list)):
                model(*sample)
            else:
                kind = type(sample).__name__
                raise InputError(
                    f"inputs must be a tuple of arguments or a list of tuples and dicts, got {kind} in it."
                )
    return calls


def _copy_with(model: torch.nn.Module, replaced: Mapping[int, EngineModule]) -> torch.nn.Module:
    """A deep copy that shares tensors with the model, and has other modules in place of some."""
    memo: dict[int, Any] = dict(replaced)
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)
