"""Whole models on the GPU: numbers beside PyTorch's, and latency beside eager."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import DRY_RUN, Report, compare, leaves

import trtbridge as tb

COSINE = {"float32": 0.99999, "float16": 0.999}
ITERATIONS = 3 if DRY_RUN else 50
SECONDS_PER_TIMING = 1.5  # slow models are timed with fewer iterations

Call = Callable[[], Any]

PARAMETERS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}".replace(": ", "-").replace(", ", "-").replace(" ", "-"))
    for case in zoo.CASES
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "dtype"), PARAMETERS)
def test_model(case: zoo.Case, dtype: str, backend: str, device: torch.device, report: Report) -> None:
    if case.missing:
        pytest.skip(f"not installed: {', '.join(case.missing)}")
    module, converted, made = obtain(case, dtype, backend, device)
    seconds = {name: round(value, 2) for name, value in made.seconds.items()}
    facts = {"model": case.name, "dtype": dtype}
    steps = {"segments": made.segments, "plugins": made.plugins, "engine_mib": round(made.engine_mib, 1)}
    report("builds", **facts, **steps, refusal=made.error)
    report("seconds", **facts, **seconds)
    if converted is None:
        if case.may_refuse:
            pytest.xfail(made.error)
        pytest.fail(f"{case.name} did not convert: {made.error}", pytrace=False)
    eager = module.to(device, zoo.DTYPES[dtype])
    rows = [measure(case, dtype, batch, eager, converted, device) for batch in case.batches]
    if dtype != "float32":
        # Weights that were rounded to fp16 do not come back, so the fp32 module is made again.
        exact, _, _ = obtain(case, "float32", backend, device, weights_of=dtype)
        exact.to(device)
        for row in rows:
            row["cosine_fp32"] = cosine_to_exact(case, dtype, row["batch"], exact, converted, device)
    for row in rows:
        report("models", **facts, **row)
    for row in rows:
        assert row["finite"], f"{case.name} {dtype}, batch {row['batch']}: PyTorch's own result is not finite"
        assert row["cosine"] >= COSINE[dtype], f"{case.name} {dtype}, batch {row['batch']}: {row}"
        assert row.get("graph_cosine") is None or row["graph_cosine"] >= COSINE[dtype], f"graph replay: {row}"


def obtain(
    case: zoo.Case, dtype: str, backend: str, device: torch.device, weights_of: str = ""
) -> tuple[torch.nn.Module, tb.EngineModule | None, zoo.Converted]:
    """The float32 module on the CPU, and what became of it: prebuilt where there is such a folder, else made now.

    Args:
        weights_of: take the weights that the program of this dtype was made with, and no program.
    """
    folder = os.environ.get("TRTBRIDGE_GPU_PREBUILT")
    module = case.module()

    def path(suffix: str) -> Path:
        return zoo.artifact(Path(folder or "."), case.name, weights_of or dtype, backend, suffix)

    if folder and path(".json").exists():
        module.load_state_dict(torch.load(path(".pt"), weights_only=True))
        made = zoo.Converted(**json.loads(path(".json").read_text()))
        if weights_of or made.error:
            return module, None, made
        started = time.perf_counter()
        converted = tb.load(path(".trtb"), device)
        made.seconds["load"] = time.perf_counter() - started
        return module, converted, made
    if weights_of:
        return module, None, zoo.Converted(case.name, dtype, backend)
    converted, made = zoo.convert_case(case, dtype, backend, case.module().to(device, zoo.DTYPES[dtype]), device)
    return module, converted, made


@torch.no_grad()
def measure(
    case: zoo.Case, dtype: str, batch: int, eager: torch.nn.Module, converted: tb.EngineModule, device: torch.device
) -> dict[str, Any]:
    """Numbers and latency at one batch size, on inputs that neither export nor build has seen."""
    args, kwargs = case.example(batch, 100 + batch, zoo.DTYPES[dtype], device)
    expected = leaves(eager(*args, **kwargs))
    got = leaves(converted(*args, **kwargs))
    row: dict[str, Any] = {"batch": batch, "finite": all(bool(t.isfinite().all()) for t in expected)}
    row |= compare(got, expected)
    del got
    row["eager_ms"] = latency_ms(lambda: eager(*args, **kwargs), device)
    row["ours_ms"] = latency_ms(lambda: converted(*args, **kwargs), device)
    if device.type == "cuda":
        ours_ms, words, outputs = graph_latency_ms(lambda: converted(*args, **kwargs), device)
        row["ours_graph_ms"] = ours_ms
        if outputs is None:
            row["graph_words"] = words
        else:
            row["graph_cosine"] = compare(leaves(outputs), expected)["cosine"]
        del outputs
        # Last, because a capture that PyTorch refuses half-way is the likeliest of all to leave something behind.
        row["eager_graph_ms"], _, _ = graph_latency_ms(lambda: eager(*args, **kwargs), device)
    return row


@torch.no_grad()
def cosine_to_exact(
    case: zoo.Case, dtype: str, batch: int, exact: torch.nn.Module, converted: tb.EngineModule, device: torch.device
) -> float:
    """Cosine similarity between the engine in ``dtype`` and PyTorch in fp32 on the same inputs."""
    args, kwargs = case.example(batch, 100 + batch, zoo.DTYPES[dtype], device)
    exact_args, exact_kwargs = zoo.cast_inputs((args, kwargs), torch.float32, device)
    got, expected = leaves(converted(*args, **kwargs)), leaves(exact(*exact_args, **exact_kwargs))
    return float(compare(got, expected)["cosine"])


def latency_ms(call: Call, device: torch.device) -> float:
    """Median time of a call that the device is idle before, in milliseconds; by CUDA events where there are any."""
    for _ in range(2 if DRY_RUN else 5):
        call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < ITERATIONS and (len(times) < 5 or time.perf_counter() - started < SECONDS_PER_TIMING):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            before = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - before))
    return statistics.median(times)


def graph_latency_ms(call: Call, device: torch.device) -> tuple[float | None, str, Any]:
    """Time of a replay when the caller captures the call in a CUDA graph of their own.

    Returns:
        Milliseconds, "" and the outputs of a replay; or None, why it cannot be captured, and None.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = call()
        milliseconds = latency_ms(graph.replay, device)
    except Exception as error:  # whatever refuses it: the words go into the report
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {error}"[:500], None
    return milliseconds, "", outputs
