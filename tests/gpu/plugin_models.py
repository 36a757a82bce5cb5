"""Models that need plugins, and the small patches with which a user swaps ops that trtbridge ships into them.

Two kinds of patch. One makes torch.export take a model whole: torchvision's detection models branch in Python on how
many boxes there are, which no graph can hold; the branching functions become torch ops, so plugins. The other swaps a
slow formulation (a scan unrolled in Python, a gather through grid_sample) for one shipped op. Both are context managers
around convert(): the converted program no longer needs them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import trtbridge.plugins.batched_nms
import trtbridge.plugins.deformable_attention
import trtbridge.plugins.selective_scan  # noqa: F401  the three register ops

EDGE = 128
"""Height and width of the images that detection models see, in pixels."""

MOST_CANDIDATES = 2000
"""More boxes than any of the detection models below chooses among; engines need a bound."""


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a module or class for a while."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


# torchvision's detection models


def _lively(module: torch.nn.Module) -> torch.nn.Module:
    """Give norms, and last layers that start near zero, values that count, so that there are detections to compare."""
    generator = torch.Generator().manual_seed(7)
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            last = name.endswith("bn3")
            torch.nn.init.uniform_(part.weight, *((0.5, 0.7) if last else (0.9, 1.3)), generator=generator)
            torch.nn.init.normal_(part.bias, 0.0, 0.05, generator=generator)
            torch.nn.init.normal_(part.running_mean, 0.0, 0.05, generator=generator)
            torch.nn.init.uniform_(part.running_var, 0.8, 1.2, generator=generator)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_logits.weight", "bbox_reg.weight", "cls_score.weight", "bbox_pred.weight")):
            fan_in = parameter[0].numel()
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
        elif name.endswith("cls_logits.bias"):
            torch.nn.init.zeros_(parameter)
    return module.eval()


def detection_model(name: str, edge: int = EDGE) -> torch.nn.Module:
    """A torchvision detection model in its published structure, for images of one size, with random weights.

    Thresholds are such that random scores leave some tens of detections.

    Args:
        name: "faster_rcnn", "mask_rcnn", "retinanet" or "ssd".
        edge: height and width of the images, but for SSD, which has a size of its own.
    """
    from torchvision.models import detection

    common: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
    proposals = {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 100, "box_score_thresh": 0.25}
    sizes = {"min_size": edge, "max_size": edge}
    torch.manual_seed(0)
    if name == "faster_rcnn":
        model = detection.fasterrcnn_resnet50_fpn(**common, **sizes, **proposals)
    elif name == "mask_rcnn":
        model = detection.maskrcnn_resnet50_fpn(**common, **sizes, **proposals, box_detections_per_img=20)
    elif name == "retinanet":
        model = detection.retinanet_resnet50_fpn_v2(**common, **sizes, score_thresh=0.6, topk_candidates=200)
    elif name == "ssd":
        model = detection.ssd300_vgg16(**common, score_thresh=0.25, topk_candidates=100)
    else:
        raise ValueError(name)
    return _lively(model)


def picture(edge: int, seed: int = 0) -> torch.Tensor:
    """(3, edge, edge) float32 in [0, 1]: soft blobs with noise."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(blobs, size=(edge, edge), mode="bilinear")[0]
    return (smooth + 0.1 * torch.randn(3, edge, edge, generator=generator)).clamp(0, 1)


@functools.cache
def _detection_ops() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Two of torchvision's own functions as torch ops, which is all that a plugin is."""
    from torchvision.models.detection import roi_heads
    from torchvision.ops import poolers

    pool, paste = poolers._multiscale_roi_align, roi_heads.paste_masks_in_image

    @torch.library.custom_op("trtbridge_tests::multiscale_roi_align", mutates_args=())
    def multiscale_roi_align(
        features: list[torch.Tensor],
        boxes: torch.Tensor,
        output_size: list[int],
        sampling_ratio: int,
        scales: list[float],
        levels: list[int],
        canonical: list[int],
    ) -> torch.Tensor:
        mapper = poolers.initLevelMapper(*levels, canonical_scale=canonical[0], canonical_level=canonical[1])
        return pool(features, [boxes], tuple(output_size), sampling_ratio, scales, mapper)

    @multiscale_roi_align.register_fake
    def _(
        features: list[torch.Tensor],
        boxes: torch.Tensor,
        output_size: list[int],
        sampling_ratio: int,
        scales: list[float],
        levels: list[int],
        canonical: list[int],
    ) -> torch.Tensor:
        return features[0].new_empty((boxes.shape[0], features[0].shape[1], *output_size))

    @torch.library.custom_op("trtbridge_tests::paste_masks", mutates_args=())
    def paste_masks(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return paste(masks, boxes, (height, width))

    @paste_masks.register_fake
    def _(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return masks.new_empty((masks.shape[0], 1, height, width))

    return multiscale_roi_align, paste_masks


@contextlib.contextmanager
def exportable_detection() -> Iterator[None]:
    """torchvision's detection models without branches on the number of boxes.

    ``batched_nms``, which takes one of two ways by the number of boxes, becomes ``trtbridge::batched_nms``; pooling
    from a pyramid and pasting of masks, which loop over boxes, become ops around torchvision's own code; decoding of
    boxes no longer asks whether there are any.
    """
    from torchvision.models.detection import _utils, transform
    from torchvision.ops import boxes, poolers

    pool_op, paste_op = _detection_ops()

    def batched_nms(
        boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
    ) -> torch.Tensor:
        return torch.ops.trtbridge.batched_nms(boxes, scores, idxs, iou_threshold)

    def pool(
        features: list[torch.Tensor],
        boxes: list[torch.Tensor],
        output_size: list[int],
        sampling_ratio: int,
        scales: list[float],
        mapper: Any,
    ) -> torch.Tensor:
        (only,) = boxes  # one image a call
        levels = [int(mapper.k_min), int(mapper.k_max)]
        canonical = [int(mapper.s0), int(mapper.lvl0)]
        return pool_op(features, only, list(output_size), sampling_ratio, list(scales), levels, canonical)

    def paste(masks: torch.Tensor, boxes: torch.Tensor, img_shape: tuple[int, int], padding: int = 1) -> torch.Tensor:
        return paste_op(masks, boxes, int(img_shape[0]), int(img_shape[1]))

    def decode(self: Any, rel_codes: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
        decoded = self.decode_single(rel_codes, torch.cat(boxes))
        return decoded.reshape(decoded.shape[0], decoded.shape[1] // 4, 4)

    with (
        replaced(_utils.BoxCoder, decode=decode),
        replaced(boxes, batched_nms=batched_nms),
        replaced(poolers, _multiscale_roi_align=pool),
        replaced(transform, paste_masks_in_image=paste),
    ):
        yield


class DetectionCore(torch.nn.Module):
    """The largest part of any detection model that torch.export takes as it is: from normalized images to the scores
    and offsets of every anchor; all but choosing boxes."""

    def __init__(self, whole: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = whole.backbone
        self.head = whole.head if hasattr(whole, "head") else whole.rpn.head

    def forward(self, images: torch.Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


def match_detections(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How well two sets of detections of one image agree, whatever the order of equal scores.

    Returns:
        ``expected`` and ``found``, numbers of detections; ``matched``, the share of the expected ones that have a
        partner of the same label, with a score within 1e-3 and box corners within 0.1 % of the largest coordinate
        (each partner serves once); ``box_error`` in pixels and ``score_error``, the largest of the matched ones; and
        for masks ``mask_error``, the largest mean difference.
    """
    if not len(expected["boxes"]):
        return {"expected": 0, "found": len(got["boxes"]), "matched": 1.0}
    limit = 1e-3 * float(expected["boxes"].abs().max())
    free = torch.ones(len(got["boxes"]), dtype=torch.bool, device=got["boxes"].device)
    errors: dict[str, float] = {"box_error": 0.0, "score_error": 0.0}
    matched = 0
    for index in range(len(expected["boxes"])):
        box = (got["boxes"] - expected["boxes"][index]).abs().amax(1)
        score = (got["scores"] - expected["scores"][index]).abs()
        fits = free & (got["labels"] == expected["labels"][index]) & (box <= limit) & (score <= 1e-3)
        if not bool(fits.any()):
            continue
        partner = int(torch.where(fits, box, float("inf")).argmin())
        free[partner] = False
        matched += 1
        found = {"box_error": box[partner], "score_error": score[partner]}
        if "masks" in expected:
            found["mask_error"] = (got["masks"][partner] - expected["masks"][index]).abs().mean()
        for name, value in found.items():
            errors[name] = max(errors.get(name, 0.0), float(value))
    return {
        "expected": len(expected["boxes"]),
        "found": len(got["boxes"]),
        "matched": matched / len(expected["boxes"]),
        **errors,
    }


# transformers' Deformable-DETR and Mamba


def deformable_detr(small: bool = True) -> torch.nn.Module:
    """Deformable-DETR for detection with a ResNet of transformers' own, random weights.

    Args:
        small: two layers of width 64 each side; otherwise the published transformer on a ResNet-50.
    """
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    sizes: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}
    transformer: dict[str, Any] = {"num_queries": 300}
    if small:
        sizes |= {"embedding_size": 8, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        transformer = {"num_queries": 12, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
        transformer |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        transformer |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = DeformableDetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=ResNetConfig(**sizes), num_labels=7, **transformer
    )
    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # offsets and weights that start as a fixed pattern get values that depend on the image
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name or "bbox_embed" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@contextlib.contextmanager
def shipped_deformable_attention() -> Iterator[None]:
    """Deformable-DETR with ``trtbridge::deformable_attention`` in place of one grid_sample a level."""
    from transformers.models.deformable_detr import modeling_deformable_detr as modeling

    def forward(
        self: torch.nn.Module,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        return torch.ops.trtbridge.deformable_attention(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )

    with replaced(modeling.MultiScaleDeformableAttention, forward=forward):
        yield


def mamba(small: bool = True) -> torch.nn.Module:
    """A Mamba language model, random weights.

    Args:
        small: two layers of width 32; otherwise four layers of Mamba-130m's width.
    """
    from transformers import MambaConfig, MambaForCausalLM

    sizes: dict[str, int] = {"vocab_size": 1000, "hidden_size": 768, "num_hidden_layers": 4}
    if small:
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**sizes, use_cache=False)).eval()


@contextlib.contextmanager
def shipped_selective_scan() -> Iterator[None]:
    """Mamba with ``trtbridge::selective_scan`` in place of a loop over time that export unrolls."""
    from transformers.models.mamba import modeling_mamba as modeling

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        length = hidden_states.shape[1]
        inner, gate = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        inner = self.act(self.conv1d(inner)[..., :length])
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        step, b, c = torch.split(self.x_proj(inner.transpose(1, 2)), sizes, dim=-1)
        scanned = torch.ops.trtbridge.selective_scan(
            inner,
            self.dt_proj.weight @ step.transpose(1, 2),
            -torch.exp(self.A_log.float()).to(inner.dtype),
            b.transpose(1, 2),
            c.transpose(1, 2),
            self.D,
            gate,
            self.dt_proj.bias,
            True,
        )
        return self.out_proj(scanned.transpose(1, 2))

    with replaced(modeling.MambaMixer, forward=forward):
        yield
