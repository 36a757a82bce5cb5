"""What the ops that ship share: when a Triton kernel runs, on which device, and how wrong arguments are named.

Each of these ops is one module with a reference in plain torch, and a module ``<op>_kernel.py`` beside it that holds
the Triton kernels and imports Triton; it is imported by the first call that needs it, so that importing an op is cheap
and works without Triton. The reference runs on CPUs, for float64, and wherever Triton is missing.

With ``TRITON_INTERPRET=1``, Triton's own switch, kernels run on CPU tensors too, interpreted: that is how they are
tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import InputError

KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""What the kernels read and write; they add up in float32."""


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton was asked to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_kernel(*tensors: torch.Tensor | None) -> bool:
    """Whether a call with these tensors goes to the Triton kernel.

    Args:
        tensors: the floating-point tensors of the call; None stands for an argument that was left out.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not triton_installed() or not all(tensor.dtype in KERNEL_DTYPES for tensor in given):
        return False
    return given[0].device.type == "cuda" or (given[0].device.type == "cpu" and interpreting())


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches kernels there, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is no less than either number: the sizes that blocks of a kernel may have."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def check(condition: bool | torch.SymBool, message: str) -> None:
    """Refuses a call with wrong arguments, from an op or from its fake kernel.

    Args:
        condition: what must hold. While a program is traced it may be symbolic; then it becomes an assertion in it.
        message: what was wrong, in which argument, what was expected.

    Raises:
        InputError: it does not hold.
    """
    if isinstance(condition, torch.SymBool):
        torch._check(condition, lambda: message)
    elif not condition:
        raise InputError(message)


def check_alike(op: str, **tensors: torch.Tensor | None) -> None:
    """Checks that the tensors of a call are on one device and hold real floating-point numbers.

    Raises:
        InputError: they are not; the argument is named.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, leader = next(iter(given.items()))
    for name, tensor in given.items():
        check(tensor.is_floating_point(), f"{op}: {name} is {tensor.dtype}; a floating-point tensor was expected")
        check(tensor.device == leader.device, f"{op}: {name} is on {tensor.device}, but {first} on {leader.device}")
