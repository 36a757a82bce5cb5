"""torch.onnx's table of translations, made once: the exporter makes its own anew for every export, in half a second."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

Table = Any
"""torch.onnx's ONNXRegistry, which has no public name."""


def translations(opset: int) -> Table:
    """What torch.onnx translates into an ONNX opset, for those who only read it."""
    # It has translations of those ops alone that torch knows: importing torchvision, say, makes it another one.
    return _made(opset, frozenset(torch._C._dispatch_get_all_op_names()))


@contextlib.contextmanager
def shared_translations(opset: int) -> Iterator[None]:
    """Let exports into an opset take a copy of the table; of several threads one at a time (`one_at_a_time`)."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    table = translations(opset)
    original = ONNXRegistry.__dict__["from_torchlib"]

    def from_torchlib(*args: Any, **kwargs: Any) -> Table:
        if args or kwargs != {"opset_version": opset}:
            return original.__func__(ONNXRegistry, *args, **kwargs)
        copy = ONNXRegistry()
        copy._opset_version = opset
        copy.functions = {target: list(found) for target, found in table.functions.items()}  # the exporter adds to them
        return copy

    setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))  # noqa: B010 (for mypy it is a method)
    try:
        yield
    finally:
        setattr(ONNXRegistry, "from_torchlib", original)  # noqa: B010


@functools.lru_cache(maxsize=4)
def _made(opset: int, ops: frozenset[str]) -> Table:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset_version=opset)
