"""Part of scripts/bench.py: a program beside eager PyTorch, eager in a CUDA graph, torch.compile and Torch-TensorRT.

torch.compile runs in its modes "reduce-overhead" and "max-autotune": both of them use CUDA graphs, and the second tunes
kernels besides, for a minute or more a model ("max-autotune-no-cudagraphs" has none and is not measured). Whatever
compiles comes last, and what was measured before it is written down first: a unit that is killed for time keeps that.
"reduce-overhead" tunes next to nothing by measuring, so it compiles before the unit waits for its turn on the GPU
(TRTBRIDGE_BENCH_LOCK). What "max-autotune" compiles can be compiled ahead by `--prepare MODEL BATCH MODE` of this file,
on another GPU: with TRITON_CACHE_DIR the same and TORCHINDUCTOR_CACHE_DIR another one, so that it is tuned once more.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_common import DRY_RUN, Call, Example, Keep, Row, Settings, alone, capture, in_turns, ours, program_file
from helpers import compare, leaves

BATCHES = (1, models.MOST_BATCH)
BASE = "graph"
"""Our way that the others are multiples of: cuda_graphs=True with fresh results."""
LEAST_COSINE = 0.99
_OURS = ("plain", "graph", "bound")
_UNTUNED = ("reduce-overhead",)
_Make = Callable[[], tuple[Call, Any]]


def units(names: Sequence[str], batches: Sequence[int]) -> list[str]:
    """Models at one batch size, then at the next."""
    return [f"{name} {batch}" for batch in batches for name in names]


def beside(unit: str, settings: Settings, keep: Keep) -> list[Row]:
    """One model at one batch size in every way that there is here."""
    model, batch = unit.rsplit(" ", 1)
    given = models.example(model, settings, int(batch))
    module = models.eager(model, settings)
    torch.backends.cudnn.benchmark = True  # eager's best
    torch.set_grad_enabled(False)
    expected = [tensor.clone() for tensor in leaves(module(*given.args, **given.kwargs))]
    early = {mode: _kept(_inductor, module, given, mode) for mode in settings.inductor if mode in _UNTUNED}
    with suppress(Exception):  # it is tried again, and told, below
        ours(program_file(settings, model), given, _OURS)  # kernels for these sizes are compiled, and kept on disk
    with alone():
        return _in_turn(model, settings, given, keep, expected, _others(module, given, settings, early))


def _in_turn(
    model: str,
    settings: Settings,
    given: Example,
    keep: Keep,
    expected: list[torch.Tensor],
    others: Iterator[tuple[str, _Make]],
) -> list[Row]:
    """Ours, then others, each beside ours as soon as it is there, and all in turns at the end."""
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}

    def add(way: str, make: _Make) -> None:
        row: Row = {"way": way, "error": ""}
        rows[way] = row
        try:
            call, results = make()
            row |= compare(leaves(results), expected)
            calls[way] = call
            timed = in_turns({BASE: calls[BASE], way: call} if BASE in calls else {way: call}, settings)
            row |= timed[way].to_json()
        except Exception as error:  # a way that fails is a finding
            row["error"] = f"{type(error).__name__}: {error}"[:400]
            calls.pop(way, None)
        keep(_with_ratios(rows))

    for way in _OURS:
        add(way, lambda way=way: _ours(model, settings, given, way, rows[way]))
    for way, make in others:
        add(way, make)
    if any(way.startswith("inductor") for way in calls):
        # Its CUDA graphs let go of cuBLAS's workspaces, which a graph that was captured before still writes to.
        calls.pop("eager graph", None)
    if calls:
        for way, timed in in_turns(calls, settings).items():
            rows[way] |= timed.to_json()
    found = _with_ratios(rows)
    keep(found)
    return found


def _with_ratios(rows: dict[str, Row]) -> list[Row]:
    """The rows, with each time as a multiple of ours: also of a unit that is killed later."""
    base = rows.get(BASE, {}).get("ms")
    if base:
        for row in rows.values():
            if "ms" in row:
                row["ratio"] = round(row["ms"] / base, 4)
    return list(rows.values())


def _ours(model: str, settings: Settings, given: Example, way: str, row: Row) -> tuple[Call, Any]:
    one = ours(program_file(settings, model), given, (way,))[way]
    row["refusal"] = one.refusal
    return one.call, one.call()


def _kept(make: Callable[..., tuple[Call, Any]], *args: Any) -> _Make:
    """What a function returns or raises now, as a function."""
    try:
        made = make(*args)
    except Exception as error:
        problem = error

        def fail() -> tuple[Call, Any]:
            raise problem

        return fail
    return lambda: made


def _others(
    module: torch.nn.Module, given: Example, settings: Settings, early: Mapping[str, _Make]
) -> Iterator[tuple[str, _Make]]:
    """Each way of others, quickest to make first; of some modes it was made early."""

    def call() -> Any:
        return module(*given.args, **given.kwargs)

    yield "eager", lambda: (call, call())
    yield "eager graph", lambda: capture(call)
    if importlib.util.find_spec("torch_tensorrt"):
        yield "torch_tensorrt", lambda: _torch_tensorrt(module, given)
    for mode in settings.inductor:
        yield f"inductor {mode}", early.get(mode) or (lambda mode=mode: _inductor(module, given, mode))


def _inductor(module: torch.nn.Module, given: Example, mode: str) -> tuple[Call, Any]:
    how: dict[str, Any] = {"backend": "eager"} if DRY_RUN else {"mode": mode}
    compiled = torch.compile(module, dynamic=False, **how)

    def call() -> Any:
        return compiled(*given.args, **given.kwargs)

    for _ in range(3):  # compiles, warms up, records its CUDA graph
        call()
    return call, [tensor.clone() for tensor in leaves(call())]


def _torch_tensorrt(module: torch.nn.Module, given: Example) -> tuple[Call, Any]:
    """Its ahead-of-time way, with its own CUDA graphs."""
    import torch_tensorrt

    exported = torch.export.export(module, given.args, given.kwargs, strict=False)
    made = torch_tensorrt.dynamo.compile(
        exported, arg_inputs=given.args, kwarg_inputs=given.kwargs, use_explicit_typing=True, min_block_size=1,
        truncate_double=True,
    )  # fmt: skip
    manager = torch_tensorrt.runtime.enable_cudagraphs(made)
    fast = manager.__enter__()  # for the rest of this process

    def call() -> Any:
        return fast(*given.args, **given.kwargs)

    for _ in range(3):
        call()
    return call, [tensor.clone() for tensor in leaves(call())]


def wrong(rows: Sequence[Row]) -> list[str]:
    """Ours that failed or differs from eager. That something else is faster is no fault, and stands in the table."""
    found = []
    for row in rows:
        if row["way"] in _OURS and row.get("error"):
            found.append(f"beside, {row['unit']}, {row['way']}: {row['error']}")
        if row["way"] in _OURS and row.get("cosine", 1.0) < LEAST_COSINE:
            found.append(f"beside, {row['unit']}, {row['way']}: cosine to eager {row['cosine']:.6f}")
    return found


def prepare(model: str, batch: int, mode: str) -> None:
    """Compile a model with torch.compile, for what that leaves in Triton's cache."""
    settings = Settings(Path())
    given = models.example(model, settings, batch)
    with torch.no_grad():
        _inductor(models.eager(model, settings), given, mode)


if __name__ == "__main__":
    _, _, name, size, how = sys.argv  # --prepare MODEL BATCH MODE
    prepare(name, int(size), how)
