"""``@trtbridge.plugin``: a typed function becomes a torch op, its fake kernel and with that a plugin, in one step."""

from __future__ import annotations

import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from ..errors import PluginError
from .derived_fake import DerivedFake, launches_kernels
from .registry import find_op

Function = Callable[..., Any]

Sample = tuple[Any, ...] | Mapping[str, Any]
"""Arguments for one call of an op: positional as a tuple, or by name as a dict."""

Samples = Iterable[Sample] | Callable[[], Iterable[Sample]]

_NAME = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)")
_RESERVED = {"aten", "prim", "prims"}  # PyTorch's own; ops there are decomposed and translated, never opaque


@dataclass(frozen=True)
class Registration:
    """An op that `plugin` registered.

    Attributes:
        name: ``namespace::name``.
        function: the author's function.
        identity: module, qualified name and file of the function: who may replace it.
        samples: example arguments, or a function that makes them; None when the author gave none.
        definition: what torch made of it; held here because torch forgets it else.
    """

    name: str
    function: Function
    identity: tuple[str, ...]
    samples: Samples | None
    definition: CustomOpDef


_registrations: dict[str, Registration] = {}  # the registry of plugins; torch's own lives as long as the process too


def plugin(
    name: str,
    *,
    fake: Function | None = None,
    cpu: Function | None = None,
    samples: Samples | None = None,
    random: bool = False,
    cuda_graphs: bool = True,
) -> Callable[[Function], CustomOpDef]:
    """Register a function as a torch op that runs as a plugin in every converted model.

    The function's annotations are the op's schema: ``torch.Tensor``, ``int``, ``float``, ``bool``, ``str``,
    ``torch.dtype``, ``torch.device``, sequences of these and ``| None``. It returns new tensors: it neither changes its
    arguments nor returns one, and launches its kernels on torch's current stream, as torch and Triton do by themselves.

    An op that is registered with torch.library already is a plugin without this.

    Args:
        name: ``namespace::name``, the namespace your project's.
        fake: takes the same arguments and returns empty outputs of the right shape, dtype and device. Left out, the
            function itself runs on fake tensors, its Triton launches skipped; where it cannot (NumPy, ctypes), outputs
            are taken to be like the first tensor argument, and real calls are checked against that.
        cpu: an implementation for CPU tensors when the function is for CUDA only, so that the op also runs in
            ONNX Runtime, which is how conversions are checked without a GPU.
        samples: example arguments for ``trtbridge plugins check``: tuples of arguments, or dicts by name, or a
            function that returns them.
        random: it draws from torch's random generator, so equal calls give other numbers and must not be merged.
        cuda_graphs: False for a function whose Python code must run at every call, as it counts, reads a file or draws
            numbers elsewhere than from torch: a replay of a CUDA graph repeats its kernels alone. Models with it run
            without CUDA graphs (``torch.Tag.cudagraph_unsafe``).

    Returns:
        A decorator. What it returns is called like the function, and has torch's ``register_fake``, ``register_kernel``
        and ``register_autograd``.

    Raises:
        PluginError: the name is malformed, reserved or taken by other code, or the annotations are no schema. The same
            function (module, qualified name, file) may be registered again, as on a reload or in a notebook; the new
            code then counts.

    Example:
        >>> @plugin("demo::soft_sign")
        ... def soft_sign(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        ...     return x / (1 + (gain * x).abs())
    """
    _check_name(name)

    def register(function: Function) -> CustomOpDef:
        if not isinstance(function, types.FunctionType):
            raise PluginError(
                f"@plugin({name!r}) goes over a function, not over a {type(function).__name__}"
                f"{': put it above @triton.jit code that launches the kernel' if hasattr(function, 'run') else ''}."
            )
        identity = _identity(function)
        _check_free(name, identity)
        derived = DerivedFake(name, [f for f in (function, cpu) if f is not None])
        # Without a CPU implementation the dispatcher says so, where Triton would speak of pointers.
        cuda_only = cpu is not None or (launches_kernels(function) and not _interpreting())
        implementation = function if fake is not None else _checked(function, derived)
        tags = [torch.Tag.nondeterministic_seeded] * random + [torch.Tag.cudagraph_unsafe] * (not cuda_graphs)
        try:
            definition = torch.library.custom_op(
                name,
                implementation,
                mutates_args=(),
                device_types="cuda" if cuda_only else None,
                schema=torch.library.infer_schema(function, mutates_args=()),
                **({"tags": tags} if tags else {}),
            )
        except (ValueError, TypeError, NameError) as error:
            raise PluginError(
                f"The annotations of {function.__qualname__}{_signature(function)} are no schema for {name!r}: "
                f"{error}\n"
                "Annotate every argument and the result: torch.Tensor, int, float, bool, str, torch.dtype, "
                "torch.device, a list or Sequence of these, or one of these | None; results are tensors, lists of "
                "tensors or a tuple of tensors. Types must be importable at the top of the module."
            ) from error
        if cpu is not None:
            definition.register_kernel("cpu", cpu if fake is not None else _checked(cpu, derived))
        definition.register_fake(fake if fake is not None else derived)
        _registrations[name] = Registration(name, function, identity, samples, definition)
        find_op.cache_clear()  # it may hold the op that this one replaces
        functools.update_wrapper(definition, function, updated=())
        return definition

    return register


def registration(name: str) -> Registration | None:
    """What `plugin` registered under a name, with or without ``.default``; None for other ops."""
    return _registrations.get(name.removesuffix(".default"))


def _check_name(name: str) -> None:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise PluginError(
            f'@plugin({name!r}): the name is "namespace::name", both of letters, digits and _, as in "demo::soft_sign".'
        )
    if match[1] in _RESERVED:
        raise PluginError(f"@plugin({name!r}): the namespace {match[1]!r} is PyTorch's; take one of your own.")


def _check_free(name: str, identity: tuple[str, ...]) -> None:
    known = _registrations.get(name)
    if known is not None and known.identity != identity:
        raise PluginError(
            f"{name!r} is registered already, by {_place(known.function)}. Two ops cannot share a name: choose another."
        )
    if known is None and name in torch._C._dispatch_get_all_op_names():
        raise PluginError(
            f"{name!r} is registered already, with torch.library, outside @plugin. It is a plugin as it stands; "
            "for another implementation choose another name."
        )


def _identity(function: types.FunctionType) -> tuple[str, ...]:
    """Whether two functions are versions of one: cells of a notebook have no file that stays."""
    file = "" if function.__module__ == "__main__" else os.path.realpath(function.__code__.co_filename)
    return function.__module__, function.__qualname__, file


def _place(function: Function) -> str:
    code = inspect.unwrap(function).__code__
    return f'{function.__module__}.{function.__qualname__} ("{code.co_filename}", line {code.co_firstlineno})'


def _signature(function: Function) -> str:
    try:
        return str(inspect.signature(function))
    except (ValueError, TypeError):
        return "(...)"


def _checked(function: Function, derived: DerivedFake) -> Function:
    """The function with its real results held against the derived fake kernel, where that had to guess."""

    @functools.wraps(function)
    def implementation(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        derived.check(result, args, kwargs)
        return result

    return implementation


def _interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
