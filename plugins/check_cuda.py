"""Checks on a GPU: that an op works on the stream it is called on, and inside a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .captures import OwnGraph, capturing, wait_for_device
from .check_report import Finding
from .check_samples import Call, flat_results
from .check_values import Subject, _words

_SLEEP_CYCLES = 200_000_000  # about 0.1 s: far longer than any launch, so that work on another stream overtakes it
_NOT_RUN = "needs a CUDA device; run the check on a machine with a GPU too"


def not_run() -> Iterator[Finding]:
    """What stands in the report where there is no GPU."""
    for check in ("stream", "cuda graph"):
        yield Finding(check, "not run", _NOT_RUN)


def check_stream(subject: Subject) -> Iterator[Finding]:
    """Call the op on a side stream while its inputs are still being written there.

    An op that works on another stream reads the old values; one whose results come on another stream has not written
    them when the side stream reads.
    """
    for call, expected in zip(subject.calls, subject.results, strict=True):
        stale = call.map(lambda _, tensor: torch.zeros_like(tensor))
        subject.run(_stale_indices(call, stale))  # compiles kernels; nothing of it counts
        side = torch.cuda.Stream(subject.device)
        wait_for_device(subject.device)
        with torch.cuda.stream(side):
            torch.cuda._sleep(_SLEEP_CYCLES)
            for old, new in zip(stale.tensors, call.tensors, strict=True):
                old.copy_(new)
            copies = [r.clone() if isinstance(r, torch.Tensor) else r for r in flat_results(stale.run(subject.op))]
        side.synchronize()
        if text := subject.difference(copies, expected):
            todo = "launch on torch.cuda.current_stream(), and wait for every stream of your own before returning"
            yield Finding("stream", "error", f"it does not work on the stream it is called on: {text}; {call}", todo)
            return
    yield Finding("stream", "ok", "works on the stream it is called on")


def check_graph(subject: Subject) -> Iterator[Finding]:
    """Capture a call in a CUDA graph, and replay it with other values."""
    for call, expected in zip(subject.calls, subject.results, strict=True):
        static = call.clone()
        graph = OwnGraph()
        side = torch.cuda.Stream(subject.device)
        side.wait_stream(torch.cuda.current_stream(subject.device))
        try:
            with torch.cuda.stream(side):
                static.run(subject.op)  # compiling and autotuning are no part of the graph, and may wait for the GPU
                with _waiting_raises():
                    static.run(subject.op)
            wait_for_device(subject.device)
            with capturing(graph, subject.device):
                results = flat_results(static.run(subject.op))
        except Exception as error:
            while isinstance(error.__context__, Exception):  # the end of a failed capture fails with less telling words
                error = error.__context__
            todo = (
                "if it can be helped: no .item(), .tolist(), .cpu(), nonzero or branch on values, sizes from shapes "
                "alone; a model with it is otherwise not one CUDA graph"
            )
            yield Finding("cuda graph", "warning", f"it cannot be captured: {_words(error)}; {call}", todo)
            return
        others = _other_values(call)
        wanted = subject.run(others)
        for first, (values, right) in enumerate(((call, expected), (others, wanted))):
            for old, new in zip(static.tensors, values.tensors, strict=True):
                old.copy_(new)
            graph.replay()
            wait_for_device(subject.device)
            if text := subject.difference(results, right):
                when = "other values" if first else "the same values"
                todo = "read values from tensors inside the kernel, never on the host; keep no state between calls"
                yield Finding("cuda graph", "error", f"a replay with {when} is wrong: {text}; {call}", todo)
                return
    yield Finding("cuda graph", "ok", "captured and replayed with other values")


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """Makes torch raise where it waits for the GPU, which ends a capture: kinder than to break one."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _stale_indices(call: Call, stale: Call) -> Call:
    """For the warm-up: zeros where floats were, but integers as they are, since they may be sizes."""
    floats = [tensor.is_floating_point() for tensor in call.tensors]
    zeros = stale.tensors
    return call.map(lambda number, tensor: zeros[number] if floats[number] else tensor)


def _other_values(call: Call) -> Call:
    """The call with its floating-point values in another order; integers may be sizes or sorted, so they stay."""

    def change(_: int, tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.numel() < 2:
            return tensor
        return tensor.reshape(-1).roll(1).reshape(tensor.shape).contiguous()

    return call.map(change)
