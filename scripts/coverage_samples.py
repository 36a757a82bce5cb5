"""PyTorch's OpInfo database as modules with example inputs: one sample an op.

An `OpModule` takes every tensor of the sample as an input, those in nested lists too; all else (numbers, strings,
dtypes) it holds as constants. The database lies in torch.testing._internal, where PyTorch's own tests take it from.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)
"""In order of preference; an op with none of these is taken in any dtype that it has."""

UNINITIALIZED = ("empty", "resize_")
"""Parts of names of ops that return memory as they found it: nothing but shape and dtype can be compared."""

SAMPLES_TRIED = 20


class NoSampleError(Exception):
    """The database has no sample of an op that runs here."""


@dataclass(frozen=True)
class Sample:
    """One op with inputs, ready to be converted.

    Attributes:
        op: the op's name in the database, with its variant.
        dtype: of the sample.
        module: calls the op.
        tensors: the module's inputs.
    """

    op: str
    dtype: torch.dtype
    module: torch.nn.Module
    tensors: tuple[torch.Tensor, ...]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Inputs that may be written to, with the strides of the sample's."""
        # deepcopy keeps strides, clone knows sparse tensors
        return tuple(t.clone() if t.layout is not torch.strided else copy.deepcopy(t) for t in self.tensors)

    def on(self, device: torch.device) -> Sample:
        """The same on another device; devices among the op's constants follow."""
        module = copy.copy(self.module)
        assert isinstance(module, OpModule)
        module.leaves = [
            device if isinstance(leaf, torch.device) or (key == "device" and isinstance(leaf, str)) else leaf
            for leaf, key in zip(module.leaves, module.keys, strict=True)
        ]
        return Sample(self.op, self.dtype, module, tuple(tensor.to(device) for tensor in self.tensors))


class OpModule(torch.nn.Module):
    """Calls an op with its inputs in place of the tensors of a sample.

    Args:
        function: the op.
        args: of the sample.
        kwargs: of the sample.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        paths, self.spec = pytree.tree_flatten_with_path((args, kwargs))
        self.leaves: list[Any] = [None if isinstance(leaf, torch.Tensor) else leaf for _, leaf in paths]
        self.keys = [getattr(path[-1], "key", None) if path else None for path, _ in paths]
        self.places = [index for index, (_, leaf) in enumerate(paths) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


def database() -> dict[str, Any]:
    """Every entry by name and variant, in the database's order; from then on this process computes without TF32."""
    # Now, because importing the database forbids further changes of such flags (torch.backends.disable_global_flags).
    torch.backends.cudnn.allow_tf32 = False
    _stand_in_for_expecttest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as database
    # Random ops are called through a function that makes them return the same each time.
    database.wrapper_set_seed = _call  # type: ignore[assignment, attr-defined]
    return {entry.formatted_name: entry for entry in database.op_db}


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _stand_in_for_expecttest() -> None:
    """Let torch.testing._internal be imported without the package expecttest, whose class only tests use."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        module = types.ModuleType("expecttest")
        module.TestCase = type("TestCase", (unittest.TestCase,), {})  # type: ignore[attr-defined]
        sys.modules["expecttest"] = module


def first_sample(name: str, entry: Any) -> Sample:
    """The first sample of an op that runs eagerly on the CPU.

    Raises:
        NoSampleError: there is none; the message says what eager PyTorch said of the first one.
    """
    problem = ""
    for dtype in _dtypes(entry):
        torch.manual_seed(0)
        for raw in list(_samples(entry, dtype)):
            if isinstance(raw, Exception):
                problem = problem or f"{type(raw).__name__}: {raw}"
                break
            args, kwargs = (raw.input, *raw.args), dict(raw.kwargs)
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            module = OpModule(entry.get_op(), args, kwargs)
            try:
                sample = Sample(name, dtype, module.eval(), tuple(tensor.detach() for tensor in tensors))
                with eager():
                    module(*sample.inputs())
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {error}"
                continue
            return sample
    raise NoSampleError(problem or "it has no dtype on the CPU")


def _dtypes(entry: Any) -> list[torch.dtype]:
    supported = entry.supported_dtypes("cpu")
    wanted = [dtype for dtype in DTYPES if dtype in supported]
    return wanted[:1] or sorted(supported, key=str)


def _samples(entry: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The first samples; an error in making one comes out as the last one."""
    samples: Any = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = entry.sample_inputs_func(entry, "cpu", dtype, False)
            yield from itertools.islice(samples, SAMPLES_TRIED)
    except Exception as error:
        yield error
    finally:
        # A generator left to the garbage collector would end while something is traced, and disturb that.
        if hasattr(samples, "close"):
            samples.close()


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """How the reference is computed: no gradients, no warnings on the screen."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
