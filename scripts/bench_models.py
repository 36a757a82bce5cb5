"""The models of scripts/bench.py, as cases of tests/gpu/zoo.py, and their conversion, several at once.

Those of scripts/bench_passes_models.py, a few more of timm and transformers, and two that are about calls alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_passes_models
import torch
import zoo
from bench_common import BACKEND, DRY_RUN, Example, Row, Settings, program_file, read, run_child, say, write
from torch import nn
from torch.nn import functional as F

import trtbridge as tb

PLUGIN_CALLS = 12
MOST_BATCH = zoo.MAX_BATCH

_BATCH = tb.Dim("batch", min=1, opt=min(8, zoo.MAX_BATCH), max=zoo.MAX_BATCH)


class TwelvePlugins(nn.Module):
    """Residual layers, each with an op in its middle that no parser takes (a running maximum)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(width, width) for _ in range(PLUGIN_CALLS)])
        self.last = nn.ModuleList([nn.Linear(width, width) for _ in range(PLUGIN_CALLS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, last in zip(self.first, self.last, strict=True):
            x = x + 0.5 * last(torch.cummax(F.gelu(first(x)), 1).values)
        return x


def _vector(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randn(batch, 64 if small else 512, generator=generator),), {}


def _distilbert(small: bool) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128} if small else {}
    return DistilBertModel(DistilBertConfig(**sizes))


def _clip_vision(small: bool) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} if small else {}
    )
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=64 if small else 224, patch_size=16))


def _clip_pictures(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (), {"pixel_values": zoo._pictures(batch, 64 if small else 224, generator)}


CASES: tuple[Any, ...] = (
    *bench_passes_models.CASES,
    bench_passes_models.picture_case("regnety_032", "regnety_032"),
    bench_passes_models.picture_case("mixer_b16", "mixer_b16_224"),
    zoo.Case("distilbert", ("transformers",), _distilbert, zoo._tokens(128, 30000), zoo._TOKEN_SHAPES),
    zoo.Case("clip_vision", ("transformers",), _clip_vision, _clip_pictures, {"pixel_values": {0: _BATCH}}),
    zoo.Case("one_linear", (), lambda small: nn.Linear(64 if small else 512, 64), _vector, {"input": {0: _BATCH}}),
    zoo.Case("twelve_plugins", (), lambda small: TwelvePlugins(64 if small else 512), _vector, {"x": {0: _BATCH}}),
)
ABOUT_CALLS = ("one_linear", "twelve_plugins")
"""Those that say nothing beside PyTorch."""
BESIDE = tuple(case.name for case in CASES if case.name not in ABOUT_CALLS)


def case_named(name: str) -> Any:
    """A case by name."""
    return next(case for case in CASES if case.name == name)


def here() -> torch.device:
    """Where models run."""
    return torch.device("cpu") if DRY_RUN else torch.device("cuda", torch.cuda.current_device())


def eager(name: str, settings: Settings) -> nn.Module:
    """The original on the device; the same weights each time."""
    return case_named(name).module().to(here(), zoo.DTYPES[settings.dtype])


def example(name: str, settings: Settings, batch: int = 1, seed: int = 1) -> Example:
    """Arguments on the device."""
    args, kwargs = case_named(name).example(batch, seed, zoo.DTYPES[settings.dtype], here())
    return Example(args, kwargs, here())


def convert_options(name: str) -> dict[str, Any]:
    """Options of convert() for a model, beyond the defaults."""
    if name == "twelve_plugins":
        return {"plugin_host": "segments"}
    return {} if DRY_RUN else {"attention": "auto"}  # one node or parts, whatever is faster on this GPU


def convert(name: str, settings: Settings) -> None:
    """Convert a model; leaves a ``.json`` and, where it went well, a ``.trtb``."""
    case = case_named(name)
    row: Row = {"model": name, "dtype": settings.dtype, "error": ""}
    try:
        given = example(name, settings, min(2, zoo.MAX_BATCH), 0)
        started = time.perf_counter()
        made = tb.convert(
            eager(name, settings), given.args, given.kwargs, dynamic_shapes=case.dynamic_shapes, backend=BACKEND,
            **convert_options(name),
        )  # fmt: skip
        row["convert_s"] = time.perf_counter() - started
        row |= {"engine_bytes": made.program.size_bytes, "segments": len(made.program.engines)}
        row["plugins"] = len(made.program.plugin_calls)
        made.save(program_file(settings, name))
    except Exception as error:  # the words are the finding
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"
    write(program_file(settings, name, ".json"), row)


def forget_failures(names: Iterable[str], settings: Settings) -> None:
    """Let models that did not convert be tried again."""
    for name in names:
        record = program_file(settings, name, ".json")
        if (read(record) or {}).get("error"):
            record.unlink()


def convert_all(names: Sequence[str], settings: Settings, workers: int, limit_s: float) -> dict[str, Row]:
    """Convert what is not in the work folder yet, each in a process of its own; failures are kept there, too."""

    def one(name: str) -> Row:
        record = program_file(settings, name, ".json")
        row = read(record)
        if row is None:
            order = record.with_suffix(".order")
            write(order, settings.to_json())
            problem = run_child(
                [sys.executable, __file__, name, str(order)], limit_s, max(1, (os.cpu_count() or 1) // workers)
            )
            row = read(record)
            if row is None:
                row = {"model": name, "dtype": settings.dtype, "error": f"converting {problem}"}
                write(record, row)
        say(f"{name}: {row['error'].partition(chr(10))[0] or 'converted'}")
        return row

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def main() -> None:
    """Convert one model, as a child of scripts/bench.py."""
    parser = argparse.ArgumentParser(description="Converts one model for scripts/bench.py.")
    parser.add_argument("name", choices=[case.name for case in CASES])
    parser.add_argument("settings", type=Path, help="file of Settings")
    options = parser.parse_args()
    convert(options.name, Settings.from_json(read(options.settings)))


if __name__ == "__main__":
    main()
