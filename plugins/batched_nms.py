"""Greedy non-maximum suppression, class by class; same results as torchvision.ops.batched_nms.

A box is suppressed by one of the same class with a higher score that was not suppressed itself, if their intersection
over union exceeds the threshold. Classes are compared, not shifted apart by an offset as in torchvision's faster
variant, and IoU is worked out in float32, so that large coordinates and float16 boxes do no harm.
"""

from __future__ import annotations

import torch

from .triton_support import check, check_alike, on_device_of, power_of_two, use_kernel

OP = "trtbridge::batched_nms"
PADDED_OP = "trtbridge::batched_nms_padded"

_WORD = 32
"""Boxes whose fates share one int32 of the kernels' bit masks."""


@torch.library.custom_op(
    OP,
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, int? max_output=None) -> Tensor",
)
def batched_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    idxs: torch.Tensor,
    iou_threshold: float,
    max_output: int | None = None,
) -> torch.Tensor:
    """The boxes that are kept. How many there are depends on the data, so the host waits for the GPU.

    Args:
        boxes: (B, 4), floating point: x1, y1, x2, y2 with x1 <= x2 and y1 <= y2.
        scores: (B,), floating point.
        idxs: (B,) integers: the class of each box; zeros for plain non-maximum suppression.
        iou_threshold: boxes that overlap more are suppressed; rounded to float32.
        max_output: no more boxes than that are kept; None for all.

    Returns:
        (K,) int64: indices of the kept boxes, highest score first; of equal scores the lower index first.

    Raises:
        InputError: shapes, dtypes or devices do not fit each other.
    """
    _check(OP, boxes, scores, idxs, max_output)
    limit = boxes.shape[0] if max_output is None else min(max_output, boxes.shape[0])
    indices, count = _padded(boxes, scores, idxs, iou_threshold, limit)
    return indices[: int(count)].clone()


@batched_nms.register_fake
def _(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    idxs: torch.Tensor,
    iou_threshold: float,
    max_output: int | None = None,
) -> torch.Tensor:
    _check(OP, boxes, scores, idxs, max_output)
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


@torch.library.custom_op(
    PADDED_OP,
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold, int max_output) -> (Tensor, Tensor)",
)
def batched_nms_padded(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float, max_output: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batched_nms`, with a result of fixed size: nothing is read back, so a CUDA graph can hold the call.

    Returns:
        (max_output,) int64: indices of the kept boxes, highest score first, then -1; and () int64: how many they are.

    Raises:
        InputError: shapes, dtypes or devices do not fit each other.
    """
    _check(PADDED_OP, boxes, scores, idxs, max_output)
    return _padded(boxes, scores, idxs, iou_threshold, max_output)


@batched_nms_padded.register_fake
def _(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float, max_output: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(PADDED_OP, boxes, scores, idxs, max_output)
    return boxes.new_empty((max_output,), dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)


def reference(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float, max_output: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`batched_nms_padded` in plain torch: box by box; nothing is read back to the host either."""
    order = scores.argsort(descending=True, stable=True)
    exact = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    boxes, idxs = boxes[order].to(exact), idxs[order]
    count = boxes.shape[0]
    keep = torch.ones(count, dtype=torch.bool, device=boxes.device)
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    for start in range(0, count, 256):  # so many rows of the matrix of all pairs at a time, to bound its memory
        rows = slice(start, min(start + 256, count))
        suppresses = (_iou(boxes[rows], boxes[start:]) > threshold) & (idxs[rows, None] == idxs[start:])
        for row in range(rows.stop - start):
            keep[start + row + 1 :] &= ~(suppresses[row, row + 1 :] & keep[start + row])
    # Kept boxes move to the front in their order; what lies beyond the limit goes to a place that is cut off.
    place = torch.where(keep, keep.cumsum(0) - 1, max_output).clamp(max=max_output)
    indices = order.new_full((max_output + 1,), -1).scatter_(0, place, order)
    return indices[:max_output].clone(), keep.sum().clamp(max=max_output)


def _iou(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Intersection over union of all pairs: (R, 4) and (C, 4) give (R, C); NaN where both areas are zero."""
    low = torch.maximum(rows[:, None, :2], columns[None, :, :2])
    high = torch.minimum(rows[:, None, 2:], columns[None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    inter = width * height
    areas = [(some[:, 2] - some[:, 0]) * (some[:, 3] - some[:, 1]) for some in (rows, columns)]
    return inter / (areas[0][:, None] + areas[1][None, :] - inter)


def _check(op: str, boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, max_output: int | None) -> None:
    check_alike(op, boxes=boxes, scores=scores)
    check(boxes.dim() == 2 and boxes.shape[1] == 4, f"{op}: boxes has shape {tuple(boxes.shape)}; (B, 4) was expected")
    for name, tensor in (("scores", scores), ("idxs", idxs)):
        words = (
            f"{op}: {name} has shape {tuple(tensor.shape)}; one number for each of {boxes.shape[0]} boxes was expected"
        )
        check(tensor.dim() == 1, words)
        check(tensor.shape[0] == boxes.shape[0], words)
    is_integer = not (idxs.is_floating_point() or idxs.is_complex() or idxs.dtype == torch.bool)
    check(is_integer, f"{op}: idxs is {idxs.dtype}; integers were expected")
    check(idxs.device == boxes.device, f"{op}: idxs is on {idxs.device}, but boxes on {boxes.device}")
    check(max_output is None or max_output >= 0, f"{op}: max_output is {max_output}; 0 or more was expected")


def _padded(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float, max_output: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_kernel(boxes) or not boxes.shape[0] or not max_output:
        return reference(boxes, scores, idxs, iou_threshold, max_output)
    from .batched_nms_kernel import find_overlaps, suppress

    count = boxes.shape[0]
    words = -(-count // _WORD)
    order = scores.argsort(descending=True, stable=True)
    indices = order.new_full((max_output,), -1)
    kept = order.new_empty(())
    overlaps = torch.empty((words * _WORD, words), dtype=torch.int32, device=boxes.device)
    block_w = power_of_two(words, 16)
    with on_device_of(boxes):
        # No fused multiply-add: IoU is rounded as in the reference, so that both decide borderline cases alike.
        find_overlaps[(words, words)](
            overlaps, boxes[order].float().contiguous(), idxs[order].contiguous(), count, words, iou_threshold,
            WORD=_WORD, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        # One program alone, as each box waits for those before it; it reads 8192 words at a time.
        suppress[(1,)](
            indices, kept, overlaps, order, count, words, max_output,
            WORD=_WORD, BLOCK_W=block_w, ROWS=max(1, min(_WORD, 8192 // block_w)), num_warps=8,
        )  # fmt: skip
    return indices, kept
