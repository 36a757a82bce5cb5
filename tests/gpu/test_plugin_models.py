"""Models that need plugins, end to end on the GPU: detection of as many boxes as there are, Deformable-DETR, Mamba.

plugin_models.py makes the models and has the patches with which torch.export takes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import plugin_models as zoo
import pytest
import torch
from helpers import DRY_RUN, Report, compare, leaves

import trtbridge as tb
from trtbridge.bridge.backends import get_backend

DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet", "ssd")
EDGE = 128 if DRY_RUN else 320
HALF_LIMIT = 0.999

pytestmark = pytest.mark.timeout(600)


def edge_of(name: str) -> int:
    return 300 if name == "ssd" else EDGE


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"not installed: {package}")


def convert(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str,
    patch: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    **options: Any,
) -> tuple[tb.EngineModule, dict[str, Any]]:
    """Convert under a patch; the facts are for the report."""
    started = time.perf_counter()
    with patch():
        converted = tb.convert(module, args, kwargs, backend=backend, **options)
    facts = {"convert_s": round(time.perf_counter() - started, 1), **plugins_of(converted)}
    return converted, facts


def plugins_of(converted: tb.EngineModule) -> dict[str, Any]:
    """How many engines, and which plugins between ("segments") and inside them ("engine")."""
    program = converted.program
    between = [call.op for call in program.plugin_calls]
    inside = [plugin["op"] for engine in program.engines for plugin in engine.info.get("plugins", ())]
    ops = sorted({*between, *inside})
    listed = ", ".join(f"{between.count(op) + inside.count(op)} {op.removesuffix('.default')}" for op in ops)
    return {"segments": len(program.engines), "between": len(between), "inside": len(inside), "plugins": listed}


@torch.no_grad()
def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call that the device is idle before, in milliseconds, by the host's clock."""
    times = []
    for index in range(3 + (2 if DRY_RUN else repeats)):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= 3:
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def tf32_agreement(module: torch.nn.Module, images: list[torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The share of detections that PyTorch itself keeps when its convolutions use TF32, as they do by default.

    Random weights make scores so even that rounding alone decides which proposals are kept; an engine in float32 must
    not move more of them than that.
    """
    if images[0].device.type != "cuda":
        return 1.0
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        (rounded,) = module(images)
    return float(zoo.match_detections(rounded, expected)["matched"])


@pytest.mark.parametrize("name", DETECTORS)
def test_detection_model(name: str, backend: str, device: torch.device, report: Report) -> None:
    """The whole of it: image in; boxes, labels, scores and masks out, as many as there are."""
    need("torchvision")
    edge = edge_of(name)
    module = zoo.detection_model(name, edge).to(device)
    example = [zoo.picture(edge).to(device)]
    converted, facts = convert(
        module, (example,), {}, backend, zoo.exportable_detection, max_data_size=zoo.MOST_CANDIDATES
    )
    assert facts["between"] + facts["inside"] >= (1 if name in ("retinanet", "ssd") else 3)
    found, worst = set(), 1.0
    for seed in (0, 1, 2):  # two of them neither export nor build has seen
        images = [zoo.picture(edge, seed).to(device)]
        with torch.no_grad():
            (expected,), (got,) = module(images), converted(images)
        assert got.keys() == expected.keys()
        assert all(got[key].dtype == expected[key].dtype for key in expected)
        agreement = zoo.match_detections(got, expected)
        agreement["matched_tf32"] = tf32_agreement(module, images, expected)
        report("plugin_models", model=name, image=seed, **facts, **agreement)
        assert agreement["expected"] >= 5, "too few detections to compare"
        assert abs(agreement["found"] - agreement["expected"]) <= 0.02 * agreement["expected"] + 1, agreement
        assert agreement["matched"] >= min(0.97, agreement["matched_tf32"]), agreement
        descending = got["scores"][:-1] >= got["scores"][1:] - 1e-6
        assert bool(descending.all()), "detections come with the best first, as PyTorch's do"
        assert agreement.get("mask_error", 0.0) < 1e-2
        found.add(agreement["expected"])
        worst = min(worst, agreement["matched"])
    if name == "faster_rcnn":
        assert len(found) > 1, "the number of boxes depends on the image"
    images = [zoo.picture(edge, 3).to(device)]
    times = {
        "eager_ms": milliseconds(lambda: module(images), device),
        "ours_ms": milliseconds(lambda: converted(images), device),
    }
    report("plugin_model_times", model=name, **{key: round(value, 3) for key, value in times.items()})


@pytest.mark.parametrize("name", DETECTORS)
def test_detection_model_as_it_is(name: str, backend: str, device: torch.device, report: Report) -> None:
    """What torch.export says to the unpatched model, and the largest part that it takes."""
    need("torchvision")
    edge = edge_of(name)
    module = zoo.detection_model(name, edge).to(device)
    example = [zoo.picture(edge).to(device)]
    words = ""
    try:
        torch.export.export(module, (example,), strict=False)
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]
    report("plugin_model_words", model=name, torch_export=words or "takes it whole")
    if name == "ssd":
        return  # its head is converted with the whole
    core = zoo.DetectionCore(module).eval()
    images = torch.stack([zoo.picture(edge, seed) for seed in (4, 5)]).to(device)
    converted, facts = convert(core, (images,), {}, backend)
    with torch.no_grad():
        numbers = compare(leaves(converted(images)), leaves(core(images)))
    report("plugin_model_parts", model=name, **facts, **numbers)
    assert numbers["cosine"] > 0.9999, numbers


def transformer(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[int], dict[str, Any]], Callable[[], AbstractContextManager[None]]]:
    """A model, what makes its arguments from a seed, and the patch that swaps the shipped op in."""
    need("transformers")
    if name == "mamba":
        module = zoo.mamba(small=DRY_RUN)
        length, vocabulary = (24, 64) if DRY_RUN else (64, 1000)

        def tokens(seed: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(seed)
            return {"input_ids": torch.randint(0, vocabulary, (2, length), generator=generator).to(device)}

        return module.to(device, dtype), tokens, zoo.shipped_selective_scan
    module = zoo.deformable_detr(small=DRY_RUN)
    edge = 96 if DRY_RUN else 256

    def images(seed: int) -> dict[str, Any]:
        return {
            "pixel_values": zoo.picture(edge, seed)[None].to(device, dtype),
            "pixel_mask": torch.ones(1, edge, edge, dtype=torch.long, device=device),
        }

    return module.to(device, dtype), images, zoo.shipped_deformable_attention


@pytest.mark.parametrize("shipped", [True, False], ids=["shipped-op", "as-it-is"])
@pytest.mark.parametrize("name", ["deformable_detr", "mamba"])
def test_transformer(name: str, shipped: bool, backend: str, device: torch.device, report: Report) -> None:
    """fp32, beside the unpatched model in PyTorch."""
    module, arguments, patch = transformer(name, device, torch.float32)
    converted, facts = convert(module, (), arguments(0), backend, patch if shipped else contextlib.nullcontext)
    assert (facts["between"] + facts["inside"] > 0) or not shipped
    for seed in (0, 1):
        kwargs = arguments(seed)
        with torch.no_grad():
            expected = module(**kwargs)
        numbers = compare(leaves(converted(**kwargs)), leaves(expected))
        report("plugin_models", model=name, shipped_op=shipped, image=seed, **facts, **numbers)
        assert numbers["cosine"] > 0.9999, numbers
    kwargs = arguments(2)
    times = {
        "eager_ms": milliseconds(lambda: module(**kwargs), device),
        "ours_ms": milliseconds(lambda: converted(**kwargs), device),
    }
    report("plugin_model_times", model=name, shipped_op=shipped, **{k: round(v, 3) for k, v in times.items()})


@pytest.mark.parametrize("name", ["deformable_detr", "mamba"])
def test_transformer_in_half_precision(name: str, backend: str, device: torch.device, report: Report) -> None:
    """fp16 with the shipped op, beside the unpatched model in fp32."""
    module, arguments, patch = transformer(name, device, torch.float32)
    kwargs = arguments(1)
    with torch.no_grad():
        expected = leaves(module(**kwargs))
    module, arguments, patch = transformer(name, device, torch.float16)
    converted, facts = convert(module, (), arguments(1), backend, patch)
    got = leaves(converted(**arguments(1)))
    numbers = compare([t.to(e.dtype) for t, e in zip(got, expected, strict=True)], expected)
    report("plugin_models", model=name, dtype="float16", shipped_op=True, **facts, **numbers)
    assert numbers["cosine"] > HALF_LIMIT, numbers


@pytest.mark.parametrize("host", ["auto", "segments"])
@pytest.mark.parametrize("name", ["deformable_detr", "mamba"])
def test_one_cuda_graph(name: str, host: str, backend: str, cuda: torch.device, report: Report) -> None:
    """A whole call, plugins and all, in one CUDA graph, which then gives right results for other inputs."""
    module, arguments, patch = transformer(name, cuda, torch.float32)
    converted, facts = convert(module, (), arguments(0), backend, patch, plugin_host=host)
    assert get_backend(backend).name == converted.program.backend
    static = arguments(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            converted(**static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = leaves(converted(**static))
    for seed in (1, 2):
        fresh = arguments(seed)
        for key, tensor in fresh.items():
            static[key].copy_(tensor)
        graph.replay()
        with torch.no_grad():
            expected = leaves(module(**fresh))
        numbers = compare(outputs, expected)
        assert numbers["cosine"] > 0.9999, numbers
    replay_ms = milliseconds(graph.replay, cuda)
    call_ms = milliseconds(lambda: converted(**static), cuda)
    eager_ms = milliseconds(lambda: module(**static), cuda)
    rounded = {"eager_ms": round(eager_ms, 3), "ours_ms": round(call_ms, 3), "ours_graph_ms": round(replay_ms, 3)}
    report("plugin_model_times", model=name, shipped_op=True, host=host, **facts, **rounded)
