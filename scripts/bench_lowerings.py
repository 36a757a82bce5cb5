"""Parts of scripts/bench.py: other ways to convert a model, each beside the usual one.

For all models what it brings that sizes are known, as torch.compile knows them there; for those that something else is
faster on, other lowerings. Each is a conversion of its own, called by `EngineModule.bind`, so that nothing but the
engine is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import bench_models as models
import torch
from bench_beside import BATCHES, LEAST_COSINE
from bench_common import BACKEND, Call, Keep, Row, Settings, alone, in_turns
from bench_passes import ALL, pipeline_of
from helpers import compare, leaves

import trtbridge as tb

SIZE_MODELS = models.BESIDE
LOWERING_MODELS = ("unet", "resnet50", "convnext_tiny", "vit_base_patch16", "bert_base")
BASE = "as usual"
ONE_SIZE = "one size"
PROFILES = "a profile for each size"
GUARDS = "without guards"


@dataclass(frozen=True)
class Lowering:
    """One way to convert.

    Attributes:
        words: what it is, for the page.
        options: of tb.convert, beside the usual ones.
        one_size: for the example's sizes alone.
        profiles: a profile for each batch size that is measured.
        around: to be around the conversion.
        overlap: kernels of its graph may overlap.
        rtx: of TensorRT-RTX alone.
        in_torch: for models that call it, a torch op that runs as a plugin, by PyTorch's own kernels.
    """

    words: str
    options: Callable[[], Mapping[str, Any]] = dict
    one_size: bool = False
    profiles: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    overlap: bool | None = None
    rtx: bool = False
    in_torch: str = ""


@contextmanager
def _no_guards() -> Iterator[None]:
    """Convolutions take what is added to them, as TensorRT-RTX fuses them: wrong beside other work now and then."""
    from trtbridge.bridge.backends import rtx_faults
    from trtbridge.bridge.backends.rtx_fault_rules import Instead

    with mock.patch.object(rtx_faults, "operand_apart", return_value=Instead({}, [])):
        yield


LOWERINGS = {
    BASE: Lowering('`attention="auto"`, all sizes from batch 1 to 32 in one profile'),
    ONE_SIZE: Lowering("an engine for this batch alone", one_size=True),
    PROFILES: Lowering("one engine with a `tb.Dim` whose profiles are single sizes (docs/shapes.md)", profiles=True),
    "attention decomposed": Lowering("as products and a softmax", lambda: {"attention": "decomposed"}),
    "attention fused": Lowering("one node", lambda: {"attention": "fused"}),
    "all fusions": Lowering("norms, activations and rotary embeddings as one node, too (docs/passes.md)",
                            lambda: {"passes": pipeline_of(ALL)}),
    "attention in PyTorch": Lowering("plugins (`as_plugins`), and so flash attention",
                                     in_torch="aten::scaled_dot_product_attention"),
    "norms in PyTorch": Lowering("plugins", in_torch="aten::layer_norm"),
    "convolutions in PyTorch": Lowering("plugins, and so cuDNN's", in_torch="aten::conv2d"),
    "products in PyTorch": Lowering("linear layers as plugins, and so cuBLAS's", in_torch="aten::linear"),
    "builder level 5": Lowering("`optimization_level=5`", lambda: {"optimization_level": 5}, rtx=True),
    GUARDS: Lowering("sums fused into convolutions and kernels that overlap: wrong now and then beside other work "
                     "(docs/runtime.md), so only to know what right results cost",
                     around=_no_guards, overlap=True, rtx=True),
}  # fmt: skip


AT_ONCE = 4
"""Conversions at once: they trace one after the other and build side by side."""


def sizes(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """What knowing the sizes brings, at batch 1 and the largest."""
    return _measured(model, models.eager(model, settings), settings, keep, (BASE, ONE_SIZE, PROFILES))


def lowerings(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Each way at batch 1 and the largest, in turns with the usual one."""
    eager = models.eager(model, settings)
    called = _ops_of(model, eager, settings)
    ways = [way for way, lowering in LOWERINGS.items()
            if not (lowering.rtx and BACKEND != "tensorrt_rtx")
            and (not lowering.in_torch or lowering.in_torch in called)]  # fmt: skip
    return _measured(model, eager, settings, keep, ways)


def _measured(model: str, eager: torch.nn.Module, settings: Settings, keep: Keep, names: Sequence[str]) -> list[Row]:
    ways = {name: LOWERINGS[name] for name in names}
    made = _converted(model, eager, settings, ways)
    rows: list[Row] = []
    for batch in BATCHES:
        given = models.example(model, settings, batch)
        with torch.no_grad():
            expected = [tensor.clone() for tensor in leaves(eager(*given.args, **given.kwargs))]
        calls: dict[str, Call] = {}
        for way, lowering in ways.items():
            row: Row = {"way": f"{way} {batch}", "lowering": way, "words": lowering.words, "batch": batch, "error": ""}
            rows.append(row)
            try:
                call = made[way, batch if lowering.one_size else 0].result().bind(*given.args, **given.kwargs)
                row |= compare(leaves(call()), expected)
                calls[way] = call
            except Exception as error:  # a way that fails is a finding
                row["error"] = f"{type(error).__name__}: {error}"[:400]
            keep(rows)
        with alone():
            timed = in_turns(calls, settings)
        for row in rows:
            if row["batch"] == batch and row["lowering"] in timed:
                row |= timed[row["lowering"]].to_json()
                if BASE in timed:
                    row["ratio"] = round(row["ms"] / timed[BASE].ms, 4)
        keep(rows)
        calls.clear()
        gc.collect()
    return rows


def _converted(
    model: str, eager: torch.nn.Module, settings: Settings, ways: Mapping[str, Lowering]
) -> dict[tuple[str, int], Future[tb.EngineModule]]:
    """Every way's conversion, ended: by way and batch where it is for one size, else by way and 0."""
    jobs = [(way, batch) for way, lowering in ways.items() for batch in (BATCHES if lowering.one_size else (0,))]
    done: dict[tuple[str, int], Future[tb.EngineModule]] = {}
    for apart in (False, True):  # what changes the package for all threads is done when nothing else is
        with ThreadPoolExecutor(1 if apart else AT_ONCE) as pool:
            for way, batch in jobs:
                if (ways[way].around is not nullcontext) is apart:
                    done[way, batch] = pool.submit(_convert, model, eager, settings, ways[way], batch)
    return done


def _ops_of(model: str, eager: torch.nn.Module, settings: Settings) -> set[str]:
    """The torch ops that a model calls, without their overloads, as convert() finds them."""
    given = models.example(model, settings, BATCHES[0])
    program = torch.export.export(eager, given.args, given.kwargs, strict=False)
    return {node.target._schema.name for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def _convert(model: str, eager: torch.nn.Module, settings: Settings, lowering: Lowering, batch: int) -> tb.EngineModule:
    """One conversion; `batch`: the only one that it is for, 0 for all."""
    options = {**models.convert_options(model), **lowering.options()}
    if lowering.in_torch:
        options["as_plugins"] = lowering.in_torch
    if not batch:
        options["dynamic_shapes"] = models.case_named(model).dynamic_shapes
    if lowering.profiles:
        options["dynamic_shapes"] = _with_profiles(options["dynamic_shapes"])
    given = models.example(model, settings, batch or BATCHES[0])
    with lowering.around():
        return tb.convert(
            eager, given.args, given.kwargs, backend=BACKEND, cuda_graphs=True, overlap_kernels=lowering.overlap,
            **options,
        )  # fmt: skip


def _with_profiles(shapes: Mapping[str, Mapping[int, tb.Dim]]) -> dict[str, dict[int, tb.Dim]]:
    """The same, with a profile for each batch size instead of a range."""
    alone = tb.Dim("batch", profiles=[(batch, batch, batch) for batch in BATCHES])
    return {
        name: {axis: alone if dim.name == alone.name else dim for axis, dim in axes.items()}
        for name, axes in shapes.items()
    }


def lowerings_wrong(rows: Sequence[Row]) -> list[str]:
    """Ways that fail or differ from eager."""
    found = []
    for row in rows:
        if row.get("error"):
            found.append(f"{row['part']}, {row['unit']}, {row['way']}: {row['error']}")
        elif row.get("cosine", 1.0) < LEAST_COSINE:
            found.append(f"{row['part']}, {row['unit']}, {row['way']}: cosine to eager {row['cosine']:.6f}")
    return found
