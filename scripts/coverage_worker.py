"""Converts ops of the OpInfo database, one after the other, in a process that may die; scripts/coverage.py talks to it.

A request is a JSON line on stdin: ``{"op", "backends", "isolate"}``. Answers are JSON lines on what was stdout: first
``{"ops": [names], "environment": {...}}``; then for each request ``{"facts"}``, ``{"stage"}`` as it goes,
``{"backend", "result"}`` for each backend, and ``{"done"}``. All else that a library prints goes to stderr.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from coverage_compare import MismatchError, NoTensorError, Reference
from coverage_samples import NoSampleError, Sample, database, eager, first_sample

# scripts/ holds coverage.py: another library that looks for the package of that name must not find it.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]

import trtbridge as tb  # noqa: E402
from trtbridge.errors import BuildError, ExecutionError, ExportError, InputError, UnsupportedOpError  # noqa: E402

Send = Callable[[Mapping[str, Any]], None]

STAGES = {
    ExportError: "export",
    UnsupportedOpError: "parser",
    BuildError: "build",
    ExecutionError: "run",
    InputError: "inputs",
    MismatchError: "numbers",
}


def main() -> None:
    """Answer requests until stdin ends."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def send(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    entries = database()
    send({"ops": list(entries), "environment": environment()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _answer(request, entries[request["op"]], options, send)
        except NoSampleError as error:
            send({"facts": {"no_sample": first_line(error)}})
        except NoTensorError as error:
            send({"facts": {"no_tensor": first_line(error)}})
        torch._dynamo.reset()
        send({"done": request["op"], "leaving": not _gpu_works(options)})


def _answer(request: Mapping[str, Any], entry: Any, options: Mapping[str, Any], send: Send) -> None:
    send({"stage": "sample"})
    sample = first_sample(request["op"], entry)
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in sample.tensors)
    send({"facts": {"dtype": str(sample.dtype).removeprefix("torch."), "inputs": shapes}})
    send({"stage": "eager"})
    try:
        reference = Reference.make(sample)
    except NoTensorError as error:
        raise error if sample.tensors else NoSampleError("it takes and returns no tensor") from error
    send({"facts": {"compared": reference.kind}})
    for backend in request["backends"]:
        started = time.perf_counter()
        on_gpu = options["run"] and backend != "onnxruntime"
        here, words_of_eager = _on_gpu(reference, send) if on_gpu else (reference, "")
        check = on_gpu or backend == "onnxruntime"
        result = outcome(here, backend, request["isolate"], check, options["convert"], send)
        result["seconds"] = round(time.perf_counter() - started, 2)
        if words_of_eager:
            result["eager_on_gpu"] = words_of_eager
            if result["outcome"] == "failed":
                result["reason"] += f" (Eager PyTorch fails on the GPU, too: {words_of_eager})"
        send({"backend": backend, "result": result})


def _on_gpu(reference: Reference, send: Send) -> tuple[Reference, str]:
    """The same with the inputs on the GPU, compared with eager PyTorch there.

    Returns:
        What to compare with, and eager PyTorch's words where it fails on the GPU: then its result on the CPU is taken.
    """
    send({"stage": "eager on the GPU"})
    sample = reference.sample.on(torch.device("cuda"))
    try:
        return Reference.make(sample), ""
    except Exception as error:
        return dataclasses.replace(reference, sample=sample), words(error)


def _gpu_works(options: Mapping[str, Any]) -> bool:
    """Whether this process can go on: after a fault in a kernel all that follows fails."""
    if options["run"]:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def outcome(
    reference: Reference, backend: str, isolate: bool, check: bool, options: Mapping[str, Any], send: Send
) -> dict[str, Any]:
    """What becomes of one op on one backend.

    Args:
        reference: the op with eager PyTorch's result.
        backend: its name.
        isolate: build in a child process.
        check: run it too, and compare.
        options: more options of `trtbridge.convert`.
        send: told of each stage.

    Returns:
        JSON-ready: "outcome" ("engine", "plugin", "mixed" or "failed"), and what it consists of, or where and why it
        failed.
    """
    found: dict[str, Any] = {}
    try:
        converted = convert(reference.sample, backend, isolate, options, send)
        found = describe(converted)
        if check:
            send({"stage": "run"})
            with eager():
                found["difference"] = reference.check(converted)
    except Exception as error:
        stage = next((name for kind, name in STAGES.items() if isinstance(error, kind)), type(error).__name__)
        return {**found, "outcome": "failed", "stage": stage, "reason": words(error), "words": str(error)[:2000]}
    return found


def convert(sample: Sample, backend: str, isolate: bool, options: Mapping[str, Any], send: Send) -> tb.EngineModule:
    """Convert one op; the ONNX Runtime backend stays on the CPU, where its reference is."""
    more = dict(options)
    if backend == "onnxruntime":
        more = {"device": "cpu"}
    return tb.convert(
        sample.module,
        sample.inputs(),
        backend=backend,
        isolate=isolate,
        progress=lambda stage, _: send({"stage": stage}),
        **more,
    )


def describe(converted: tb.EngineModule) -> dict[str, Any]:
    """What a converted module consists of."""
    program = converted.program
    hosted = [plugin["op"] for engine in program.engines for plugin in engine.info.get("plugins", ())]
    plugins = sorted({call.op for call in program.plugin_calls}.union(hosted))
    # An engine that holds nothing but plugins is no engine of its own.
    engines = sum(
        len(engine.info.get("layers", "x")) > len(engine.info.get("plugins", ())) for engine in program.engines
    )
    kind = "mixed" if plugins and engines else "plugin" if plugins else "engine"
    reasons = {call.op: call.reason.partition("\n")[0][:200] for call in program.plugin_calls}
    return {"outcome": kind, "engines": engines, "plugins": plugins, "hosted": len(hosted), "reasons": reasons}


def words(error: BaseException) -> str:
    """An error's first line, with its type where it is not one of ours."""
    line = first_line(error)
    return line if isinstance(error, (tb.TrtBridgeError, MismatchError)) else f"{type(error).__name__}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message; with the next ones where it ends in a colon."""
    text = ""
    for line in str(error).splitlines():
        text = f"{text} {line.strip()}".strip()
        if text and not text.endswith(":"):
            break
    return text[:400]


def environment() -> dict[str, Any]:
    """Where this runs."""
    versions = {}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    main()
