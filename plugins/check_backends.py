"""A check of the whole way: a model of one op, through every backend that can build here.

The only place in ``plugins`` that needs ``bridge``, which itself rests on ``plugins``; so it is imported when the check
runs, and an author who never runs it pays nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree

from ..errors import TrtBridgeError
from .check_report import Finding
from .check_samples import Call, flat_results
from .check_shapes import Symbolic, _other_sizes
from .check_values import Subject, _words


class OneOp(torch.nn.Module):
    """A module of one op: the tensors of a call come in as a list, everything else is fixed."""

    def __init__(self, op: torch._ops.OpOverload, call: Call) -> None:
        super().__init__()
        self.op = op
        leaves, self.spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
        self.constants = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]

    def forward(self, tensors: list[torch.Tensor]) -> Any:
        """Call the op with these tensors in order."""
        waiting = iter(tensors)
        leaves = [next(waiting) if constant is None else constant[0] for constant in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(*args, **kwargs)


def check_backends(subjects: Sequence[Subject], names: Sequence[str] | None) -> Iterator[Finding]:
    """Convert a model of the op with every backend, and run it where that is possible.

    Args:
        subjects: the op on the devices it runs on.
        names: backends to try; None for those that are installed.
    """
    from ..bridge.backends import all_statuses
    from ..bridge.options import Options

    hosted = "plugin_host" in {option.name for option in dataclasses.fields(Options)}
    for status in all_statuses():
        if names is not None and status.name not in names:
            continue
        check = f"backend {status.name}"
        if not status.can_build:
            if names is not None:
                yield Finding(check, "not run", status.reason)
            continue
        kind = "cpu" if status.name == "onnxruntime" else "cuda"
        subject = next((s for s in subjects if s.device.type == kind), None)
        if subject is None and status.can_run:
            yield Finding(check, "not run", f"the op has no calls that run on {kind}")
            continue
        # Without a GPU, engines for one are built from tensors on the CPU, and not run.
        for host in ("segments", "engine") if hosted and status.name != "onnxruntime" else ("",):
            yield from _convert(subject or subjects[0], status.name, host, status.can_run, check)


def _convert(subject: Subject, backend: str, host: str, runs: bool, check: str) -> Iterator[Finding]:
    from ..bridge.convert import convert

    call = subject.calls[0]
    where = f", plugin {'inside the engine' if host == 'engine' else 'between segments'}" if host else ""
    options: dict[str, Any] = {"plugin_host": host} if host else {}
    module = OneOp(subject.op, call)
    symbolic, dynamic = _dynamic_shapes(subject, call)
    try:
        converted = convert(module, (call.tensors,), dynamic_shapes=dynamic, backend=backend, **options)
    except TrtBridgeError as error:
        if host == "engine":
            yield Finding(check, "note", f"not inside an engine: {_words(error)}; it runs between segments")
        else:
            sizes = " with dynamic shapes" if dynamic else ""
            yield Finding(check, "error", f"a model of this op does not convert{sizes}{where}: {_words(error)}")
        return
    shapes = "static" if dynamic is None else "dynamic"
    if not runs:
        yield Finding(check, "not run", f"built, {shapes} shapes{where}; running it needs a GPU")
        return
    calls = [call, *(_resized(symbolic) if dynamic is not None and symbolic is not None else [])]
    for one in calls:
        try:
            expected = subject.run(one)
        except Exception:
            continue  # the op refuses that size, as check_dynamic says
        try:
            got = flat_results(converted(one.tensors))
        except TrtBridgeError as error:
            yield Finding(check, "error", f"the converted model fails{where}: {_words(error)}; {one}")
            return
        if text := subject.difference(got, expected):
            yield Finding(check, "error", f"the converted model gives something else{where}: {text}; {one}")
            return
    yield Finding(check, "ok", f"a model of this op converts and runs, {shapes} shapes{where}")


def _dynamic_shapes(subject: Subject, call: Call) -> tuple[Symbolic | None, Any]:
    """Dims for the sizes that the fake kernel leaves free, as dynamic_shapes; None where there are none.

    An op that asks more of its sizes than to be equal to each other is converted with static ones: its author knows
    the ranges, and this check does not.
    """
    from ..bridge.dims import Dim

    try:
        symbolic = Symbolic.run(subject.op, call)
    except Exception:
        return None, None
    free = all(isinstance(e, sympy.Symbol) or e.is_Integer for shape in symbolic.inputs for e in shape)
    if not symbolic.sizes or symbolic.guards or not free:
        return symbolic, None
    dims = {
        symbol: Dim(f"d{index}", min=2, opt=size, max=4 * size + 4)
        for index, (symbol, size) in enumerate(symbolic.sizes.items())
    }
    shapes = [
        {axis: dims[expression] for axis, expression in enumerate(shape) if isinstance(expression, sympy.Symbol)}
        for shape in symbolic.inputs
    ]
    return symbolic, {"tensors": shapes}


def _resized(symbolic: Symbolic) -> list[Call]:
    limit = {symbol: 4 * size + 4 for symbol, size in symbolic.sizes.items()}
    return [
        symbolic.resized(sizes)
        for sizes in _other_sizes(symbolic)
        if all(2 <= size <= limit[symbol] for symbol, size in sizes.items())
    ][:2]
