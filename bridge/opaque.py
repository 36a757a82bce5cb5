"""Functions of torch that torch.export cannot look into become one call each, run as Python.

torch.cov, torch.allclose or torch.combinations decide by values what they do, so tracing stops inside. Such a function
is found by tracing once more and noting which call of the user's failed; the shapes of its results come from running
the module for real. It is then traced as ``trtbridge::call``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from ..errors import PluginError
from ..plugins.calls import encode, flatten_results
from ..plugins.registry import PYTHON, find_op
from .graft import CALL

_PYTHON_CONTROL = {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__len__",
    "__iter__",
    "__contains__",
    "item",
    "tolist",
}


@dataclass
class Opaque:
    """What is known of functions that cannot be traced.

    Attributes:
        functions: by name ("torch.cov").
        results: for each, in the order of its calls, the value that it returned for the example.
        given: for each call the shapes of the tensors that it got.
        dynamic: the model has dynamic dimensions, so sizes of results may be any.
    """

    dynamic: bool
    functions: set[str] = field(default_factory=set)
    results: dict[str, list[Any]] = field(default_factory=dict)
    given: dict[str, list[list[tuple[int, ...]]]] = field(default_factory=dict)


class TracedOtherwiseError(Exception):
    """A module calls a function with other tensors while it is traced than when it runs."""


class FailureFinder(TorchFunctionMode):
    """Notes the outermost function that raised."""

    def __init__(self) -> None:
        self.failed = ""
        self._depth = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._depth += 1
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if self._depth == 1 and not self.failed:
                self.failed = _name_of(func)
            raise
        finally:
            self._depth -= 1


class ResultRecorder(TorchFunctionMode):
    """Notes what opaque functions return, in a real run of the module."""

    def __init__(self, opaque: Opaque) -> None:
        self.opaque = opaque
        self.opaque.results = {name: [] for name in opaque.functions}
        self.opaque.given = {name: [] for name in opaque.functions}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name_of(func)
        if name not in self.opaque.functions:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            result = func(*args, **(kwargs or {}))
        self.opaque.results[name].append(result)
        self.opaque.given[name].append(_shapes(args, kwargs or {}))
        return result


class OpaqueCaller(TorchFunctionMode):
    """Puts ``trtbridge::call`` in the place of opaque functions, while a module is traced.

    Attributes:
        numbers: ids of tensors that stand for Python numbers among the results, and the type of each.
    """

    def __init__(self, opaque: Opaque) -> None:
        self.opaque = opaque
        self.numbers: dict[int, torch.Tensor] = {}
        self._next = dict.fromkeys(opaque.functions, 0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name not in self._next or self._next[name] >= len(self.opaque.results.get(name, ())):
            return func(*args, **kwargs)
        example = self.opaque.results[name][self._next[name]]
        self._require_the_same(name, self.opaque.given[name][self._next[name]], _shapes(args, kwargs))
        self._next[name] += 1
        tensors: list[torch.Tensor] = []

        def place(value: Any) -> dict[str, Any] | None:
            if isinstance(value, torch.SymInt):
                value = torch.scalar_tensor(value, dtype=torch.int64)  # type: ignore[arg-type]
                tensors.append(value)
                return {"int": len(tensors) - 1}
            if not isinstance(value, torch.Tensor):
                return None
            tensors.append(torch.view_as_real(value) if value.is_complex() else value)
            return {"complex" if value.is_complex() else "tensor": len(tensors) - 1}

        data = json.loads(encode(args, kwargs, place))
        flat = flatten_results(example)
        data["outputs"] = len(flat)
        data["results"] = [
            [["?" if self.opaque.dynamic else size for size in result.shape], str(result.dtype).removeprefix("torch.")]
            for result in flat
        ]
        results = iter(CALL(f"{PYTHON}::{name}", json.dumps(data, separators=(",", ":")), tensors, []))

        def rebuild(leaf: Any) -> Any:
            if leaf is None:
                return None
            result = next(results)
            if isinstance(leaf, torch.Tensor):
                return torch.view_as_complex(result) if leaf.is_complex() else result
            self.numbers[id(result)] = result  # kept alive, so that the id stays its own
            return result

        leaves, spec = pytree.tree_flatten(example)
        return pytree.tree_unflatten([rebuild(leaf) for leaf in leaves], spec)

    def _require_the_same(self, name: str, run: list[tuple[int, ...]], traced: list[tuple[Any, ...]]) -> None:
        """What it returned when the module ran says nothing about a call with other tensors."""

        def same(one: tuple[int, ...], other: tuple[Any, ...]) -> bool:
            return len(one) == len(other) and all(
                a == b for a, b in zip(one, other, strict=True) if type(b) is int and not self.opaque.dynamic
            )

        if len(run) != len(traced) or not all(map(same, run, traced)):
            raise TracedOtherwiseError(
                f"{name} gets tensors of other shapes while the module is traced, {traced}, than when it runs, {run}: "
                "the module does something else while it is traced."
            )


def _shapes(args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The shapes of all tensors among some arguments."""
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def can_be_opaque(name: str) -> bool:
    """Whether a function can be called by its name, and is none by which Python decides what to do."""
    if not name or name.rsplit(".", 1)[-1] in _PYTHON_CONTROL or not name.startswith("torch."):
        return False
    try:
        return callable(find_op(f"{PYTHON}::{name}"))
    except PluginError:
        return False


def _name_of(func: Callable[..., Any]) -> str:
    try:
        return resolve_name(func) or ""
    except Exception:  # of functions that are no part of torch's public API
        return ""
