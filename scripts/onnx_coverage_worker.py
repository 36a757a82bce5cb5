"""The process that converts ONNX's node tests (scripts/onnx_coverage.py): a JSON line in, a JSON line out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import trtbridge as tb
from trtbridge.bridge.plan import PluginCall

ELEMENTS = {
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT32, onnx.TensorProto.INT64,
    onnx.TensorProto.BOOL,
}  # fmt: skip
RANDOM = {
    "Bernoulli", "RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Multinomial",
}  # fmt: skip
MAX_DATA_SIZE = 4096
"""Bound for sizes that depend on data and that nothing bounds."""


def serve(settings: Mapping[str, Any]) -> int:
    """Answer requests on the standard input until it ends. What libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)

    def answer(data: Mapping[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    cases, skipped = load_cases()
    ops = {name: [node.op_type for node in case.model.graph.node] for name, case in cases.items()}
    answer({"cases": ops, "skipped": skipped, "environment": _environment()})
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        result = try_case(cases[request["case"]], request["backend"], request["isolate"], settings["run"])
        answer({**result, "seconds": round(time.perf_counter() - started, 2)})
    return 0


def load_cases() -> tuple[dict[str, Any], dict[str, str]]:
    """The cases to convert by name, and why the others are none."""
    cases, skipped = {}, {}
    for case in load_model_tests(kind="node"):
        reason = why_skipped(case.model)
        if reason:
            skipped[case.name] = reason
        else:
            cases[case.name] = case
    return cases, skipped


def why_skipped(model: onnx.ModelProto) -> str:
    """Why a model does not count: what it takes or returns is none of the types; "" where it does."""
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            return f"{kind.removesuffix('_type')} input or output"
        if value.type.tensor_type.elem_type not in ELEMENTS:
            return f"{onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()} input or output"
    return ""


def try_case(case: Any, backend: str, isolate: bool, run: bool) -> dict[str, Any]:
    """Convert a case, and run and compare it where the backend can run here.

    Returns:
        "outcome" (engine, plugin, mixed or failed), and "stage" and "reason" of a failure; "plugins": ops and reasons.
    """
    given, expected = ([_array(value) for value in values] for values in case.data_sets[0])
    fixed = {
        value.name: {
            axis: size
            for axis, (size, dim) in enumerate(zip(array.shape, value.type.tensor_type.shape.dim, strict=False))
            if not dim.HasField("dim_value")
        }
        for value, array in zip(case.model.graph.input, given, strict=False)
    }
    shapes = {name: sizes for name, sizes in fixed.items() if sizes}
    on_gpu = backend != "onnxruntime"
    options: dict[str, Any] = {"isolate": isolate} if on_gpu else {}
    if not on_gpu:
        options["device"] = "cpu"
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        onnx.save(case.model, path)
        try:
            try:
                module = tb.convert(path, dynamic_shapes=shapes, backend=backend, **options)
            except tb.DynamicShapeError:
                # A size that nothing bounds (Range, a live shape): engines need a bound, and the user gives it.
                result["max_data_size"] = options["max_data_size"] = MAX_DATA_SIZE
                module = tb.convert(path, dynamic_shapes=shapes, backend=backend, **options)
        except Exception as error:
            return {**result, "outcome": "failed", "stage": "convert", "reason": _words(error)}
    calls = [step for step in module.program.steps if isinstance(step, PluginCall)]
    engines = len(module.program.steps) - len(calls)
    result["plugins"] = [[_plugin_name(call), str(getattr(call, "reason", ""))[:200]] for call in calls]
    inside = [plugin for engine in module.program.engines for plugin in engine.info.get("plugins", ())]
    result["plugins_inside"] = len(inside)
    result["outcome"] = ("mixed" if engines else "plugin") if calls else "mixed" if inside else "engine"
    if on_gpu and not run:
        return result
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        torch.manual_seed(0)
        found = module(*(torch.from_numpy(array.copy()).to(device) for array in given))
    except Exception as error:
        return {**result, "outcome": "failed", "stage": "run", "reason": _words(error)}
    mine = list(found.values()) if isinstance(found, dict) else [found]
    if problem := compare(case, [tensor.cpu().numpy() for tensor in mine], expected):
        return {**result, "outcome": "failed", "stage": "numbers", "reason": problem}
    return result


def compare(case: Any, mine: list[np.ndarray], expected: list[np.ndarray]) -> str:
    """How results differ from the expected ones, "" where they do not.

    The case's own tolerances hold, but for two things: an absolute error up to a millionth of the largest expected
    value is rounding of float32 (the cases' absolute tolerance is 1e-7 whatever the size of the numbers), and float16
    may be off by two units in the last place. Of random results only type and shape are compared.
    """
    random = draws_random_numbers(case)
    for index, (a, b) in enumerate(zip(mine, expected, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"output {index} is {a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}"
        if random or not b.size:
            continue
        if b.dtype.kind in "biu":
            wrong = a != b
            if np.abs(a.astype(np.float64) - b.astype(np.float64)).max() <= case.atol:
                continue
        else:
            wide = b.astype(np.float64)
            finite = np.abs(wide[np.isfinite(wide)])
            rtol = max(case.rtol, 2 * 2**-10 if b.dtype == np.float16 else 0)
            atol = max(case.atol, 1e-6 * float(finite.max(initial=0)))
            wrong = ~np.isclose(a.astype(np.float64), wide, rtol=rtol, atol=atol, equal_nan=True)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            return f"output {index}: {int(wrong.sum())} of {b.size} values differ, at {at}: {a[at]}, expected {b[at]}"
    return ""


def draws_random_numbers(case: Any) -> bool:
    """Whether a case's result is random: it draws, or drops out in training."""
    ops = {node.op_type for node in case.model.graph.node}
    return bool(ops & RANDOM) or ("Dropout" in ops and case.name.startswith("test_training"))


def _plugin_name(call: PluginCall) -> str:
    """The ONNX op type behind a plugin, or the torch op."""
    if not call.op.startswith("trtbridge::onnx_node"):
        return call.op
    from trtbridge.nodes import decode_nodes

    return "+".join(node.op_type for node in decode_nodes(json.loads(call.call)["args"][0]).graph.node)


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _environment() -> dict[str, str]:
    found = {"onnx": onnx.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("onnxruntime", "tensorrt_rtx"):
        with contextlib.suppress(ImportError):
            found[name] = str(__import__(name).__version__)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
