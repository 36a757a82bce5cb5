"""Parts of scripts/bench.py: a call beside the floor, and what it costs the host.

The floor is what no runtime can go below: the same engine in a bare loop over fixed buffers, as one CUDA graph. Of a
program with plugins between engines it is a capture of all its steps over fixed buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bench_models as models
import torch
from bench_common import BACKEND, Call, Example, Keep, Row, Settings, capture, host_us, in_turns, ours, program_file
from helpers import compare, leaves

from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.dtypes import to_torch
from trtbridge.bridge.runtime import RunningProgram
from trtbridge.bridge.runtime_options import RuntimeOptions

FLOOR_MODELS = ("resnet50", "vit_base_patch16", "bert_base", "all_minilm_l6_v2", "twelve_plugins")
FLOOR_BOUND = 1.02
"""Most that a call may take of the floor's time."""
HOST_MODELS = ("one_linear", "resnet50", "twelve_plugins")
HOST_BOUND_US = 20.0
"""Most microseconds that a call with one input and one output may take the host, over many calls in a row."""
_SHORT = 50  # calls that fit into the queue of the device, so that it never holds the host


def floor(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Our ways beside the floor, batch 1."""
    given = models.example(model, settings)
    file = program_file(settings, model)
    found = ours(file, given)
    floors: dict[str, Call] = {}
    agreement = {}
    for name, overlap in (("floor", RuntimeOptions().overlaps(BACKEND)), ("floor, overlapped", True)):
        floors[name], outputs = bare_call(found["plain"].module, given, overlap)
        agreement[name] = compare(outputs, leaves(found["plain"].call()))
    times = in_turns({**floors, **{way: one.call for way, one in found.items()}}, settings)
    rows = [{"way": name, **times[name].to_json(), **agreement[name]} for name in floors]
    for way, one in found.items():
        ratio = times[way].ms / times["floor, overlapped" if way == "overlapped" else "floor"].ms
        rows.append({"way": way, **times[way].to_json(), "ratio": round(ratio, 4), "refusal": one.refusal})
    keep(rows)
    return rows


def bare_call(module: Any, given: Example, overlap: bool) -> tuple[Call, list[torch.Tensor]]:
    """The floor of a program.

    Args:
        module: an EngineModule of it.
        given: a call.
        overlap: kernels may overlap.

    Returns:
        A replay over fixed buffers, and the results that it writes, in the order of the program's.
    """
    program, device = module.program, module.device
    # Kernels made for these very sizes, as those of our graphs are; a capture would keep the general ones.
    fast = "eager" if program.backend == "tensorrt_rtx" else None
    options = RuntimeOptions(cuda_graphs=False, kernel_specialization=fast)
    tensors = [tensor.clone() for tensor in module._checker.flatten(given.args, given.kwargs)]
    if len(program.steps) > 1:
        running = RunningProgram(program, device, module._cache_folder, options=options)
        lane = running._make_lane()
        return capture(lambda: running._run(tensors, lane), overlap)
    (engine,) = program.engines
    executable = get_backend(program.backend).load(engine, device, module._cache_folder, options)
    size = executable.workspace_bytes
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    context = executable.new_context(workspace)
    by_name = dict(zip((spec.name for spec in program.signature.inputs), tensors, strict=True))
    fixed = [by_name[spec.name].to(to_torch(spec.dtype)).contiguous() for spec in engine.inputs]
    call, made = capture(lambda: context(fixed), overlap)
    results = dict(zip((spec.name for spec in engine.outputs), made, strict=True)) | by_name
    results |= {name: tensor.to(device) for name, tensor in program.constants.items()}
    outputs = program.signature.outputs
    named = [results[program.aliases.get(spec.name, spec.name)].to(to_torch(spec.dtype)) for spec in outputs]
    return call, named


def host(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Host time of one call in each of our ways, batch 1."""
    file = program_file(settings, model)
    given = models.example(model, settings)
    rows: list[Row] = []
    for way, one in ours(file, given).items():
        many = host_us(one.call, settings.host_calls, settings.repeats)
        few = host_us(one.call, min(_SHORT, settings.host_calls), settings.repeats)
        rows.append({"way": way, "calls": settings.host_calls, "us": round(many, 2), "us_short": round(few, 2),
                     "refusal": one.refusal})  # fmt: skip
        keep(rows)
    return rows


def floor_wrong(rows: Sequence[Row]) -> list[str]:
    """What exceeds its bound, or is not the same result."""
    wrong = []
    for row in rows:
        if row["way"].startswith("floor") and row["cosine"] < 0.999:
            wrong.append(
                f"{row['way']}, {row['unit']}: its results are not those of a call (cosine {row['cosine']:.6f})"
            )
        if row.get("refusal"):
            wrong.append(f"floor, {row['unit']}, {row['way']}: no CUDA graph: {row['refusal']}")
    for unit in dict.fromkeys(row["unit"] for row in rows):
        ratios = {row["way"]: row["ratio"] for row in rows if row["unit"] == unit and "ratio" in row}
        overlapped = ratios.pop("overlapped", 1.0)
        for kind, ratio in (("fastest", min(ratios.values(), default=1.0)), ("overlapped", overlapped)):
            if ratio > FLOOR_BOUND:
                wrong.append(f"floor, {unit}: the {kind} way takes {ratio:.3f} of the floor's time")
    return wrong


def host_wrong(rows: Sequence[Row]) -> list[str]:
    """Ways with a CUDA graph that take the host too long; of a model whose device time cannot hold the host."""
    return [
        f"host, {row['unit']}, {row['way']}: {row['us']:.1f} µs a call"
        for row in rows
        if row["unit"] == "one_linear" and row["way"] != "plain" and row["us"] > HOST_BOUND_US
    ]
