"""Deformable-DETR and Mamba with ops that trtbridge ships, beside the unpatched models.

tests/gpu/plugin_models.py holds the models and the patches; tests/gpu/test_plugin_models.py runs them on engines.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.structure import flatten

pytest.importorskip("transformers")

# transformers warns of what it changes next; that is not our concern here.
pytestmark = pytest.mark.filterwarnings("default", "error:::trtbridge")


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    path = Path(__file__).parents[1] / "gpu" / "plugin_models.py"
    spec = importlib.util.spec_from_file_location("plugin_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(zoo: ModuleType, seed: int, batch: int = 2) -> dict[str, torch.Tensor]:
    pictures = torch.stack([zoo.picture(96, seed + number) for number in range(batch)])
    return {"pixel_values": pictures, "pixel_mask": torch.ones(batch, 96, 96, dtype=torch.long)}


def tokens(seed: int, batch: int = 2, length: int = 13) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))}


def close(got: Any, expected: Any) -> None:
    ours, theirs = flatten(got)[0], flatten(expected)[0]
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


def ops(converted: tb.EngineModule) -> list[str]:
    return [call.op for call in converted.program.plugin_calls]


def test_the_patches_change_no_numbers_and_go_away(zoo: ModuleType) -> None:
    detr, mamba = zoo.deformable_detr(), zoo.mamba()
    cases = [
        (detr, images(zoo, 0), zoo.shipped_deformable_attention),
        (mamba, tokens(0), zoo.shipped_selective_scan),
    ]
    for model, kwargs, patch in cases:
        with torch.no_grad():
            expected = model(**kwargs)
            with patch():
                patched = model(**kwargs)
                with torch.profiler.profile() as profile:
                    model(**kwargs)
            with torch.profiler.profile() as after:
                model(**kwargs)
        close(patched, expected)
        assert any(event.key.startswith("trtbridge::") for event in profile.key_averages())
        assert not any(event.key.startswith("trtbridge::") for event in after.key_averages())


def test_deformable_detr_as_it_is(zoo: ModuleType) -> None:
    model = zoo.deformable_detr()
    converted = tb.convert(model, (), images(zoo, 0), backend="onnxruntime")
    fresh = images(zoo, 5)
    with torch.no_grad():
        close(converted(**fresh), model(**fresh))


def test_deformable_detr_with_the_shipped_op(zoo: ModuleType) -> None:
    model = zoo.deformable_detr()
    with zoo.shipped_deformable_attention():
        converted = tb.convert(model, (), images(zoo, 0), backend="onnxruntime")
    assert ops(converted) == ["trtbridge::deformable_attention.default"] * 4, "two layers of encoder, two of decoder"
    assert len(converted.program.engines) == 5
    fresh = images(zoo, 5)
    with torch.no_grad():
        close(converted(**fresh), model(**fresh))


def test_mamba_as_it_is(zoo: ModuleType) -> None:
    model = zoo.mamba()
    converted = tb.convert(model, (), tokens(0), backend="onnxruntime")
    with torch.no_grad():
        close(converted(**tokens(1)), model(**tokens(1)))


def test_mamba_with_the_shipped_op_takes_any_length(zoo: ModuleType) -> None:
    """The loop over time has the length of the example; the op has any."""
    model = zoo.mamba()
    shapes = {"input_ids": {0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=4, opt=16, max=64)}}
    with zoo.shipped_selective_scan():
        converted = tb.convert(model, (), tokens(0), dynamic_shapes=shapes, backend="onnxruntime")
    assert ops(converted) == ["trtbridge::selective_scan.default"] * 2
    for batch, length in ((2, 13), (1, 5), (4, 64)):
        kwargs = tokens(batch, batch, length)
        with torch.no_grad():
            close(converted(**kwargs), model(**kwargs))


def test_a_converted_model_is_saved_without_the_patch(zoo: ModuleType, tmp_path: Path) -> None:
    model = zoo.mamba()
    with zoo.shipped_selective_scan():
        converted = tb.convert(model, (), tokens(0), backend="onnxruntime")
    tb.save(converted, tmp_path / "mamba.trtb")
    loaded = tb.load(tmp_path / "mamba.trtb")
    assert ops(loaded) == ops(converted)
    with torch.no_grad():
        close(loaded(**tokens(2)), model(**tokens(2)))


@pytest.mark.rtx
def test_mamba_builds_for_tensorrt(zoo: ModuleType) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = zoo.mamba()
    with zoo.shipped_selective_scan():
        converted = tb.convert(model, (), tokens(0), backend="tensorrt_rtx")
    inside = [plugin["op"] for engine in converted.program.engines for plugin in engine.info.get("plugins", ())]
    assert sorted([*ops(converted), *inside]) == ["trtbridge::selective_scan.default"] * 2
    assert all(engine.size_bytes > 1000 for engine in converted.program.engines)
    if torch.cuda.is_available():
        kwargs = {"input_ids": tokens(3)["input_ids"].cuda()}
        with torch.no_grad():
            close(converted(**kwargs), model.cuda()(**kwargs))
