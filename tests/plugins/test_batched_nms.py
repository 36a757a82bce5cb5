"""Non-maximum suppression: the reference against loops, the ops' registration, and both in converted models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trtbridge as tb
from trtbridge.errors import InputError
from trtbridge.plugins import batched_nms as module
from trtbridge.plugins.batched_nms import batched_nms, batched_nms_padded


def boxes_of(count: int, classes: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random boxes on integer coordinates, where float32 is exact; some scores are equal."""
    low = torch.randint(0, 60, (count, 2))
    boxes = torch.cat([low, low + torch.randint(0, 40, (count, 2))], 1).float() + shift
    return boxes, torch.randint(0, 200, (count,)) / 200.0, torch.randint(0, classes, (count,))


def with_loops(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> list[int]:
    """The definition, box by box, in float32."""
    points = boxes.float().numpy()
    order = sorted(range(len(points)), key=lambda i: (-float(scores[i]), i))
    kept: list[int] = []
    with np.errstate(invalid="ignore"):
        for i in order:
            for j in kept:
                low, high = np.maximum(points[i, :2], points[j, :2]), np.minimum(points[i, 2:], points[j, 2:])
                inter = np.prod(np.maximum(high - low, np.float32(0)))
                areas = [np.prod(points[k, 2:] - points[k, :2]) for k in (i, j)]
                overlap = inter / (areas[0] + areas[1] - inter)
                if classes[i] == classes[j] and overlap > np.float32(threshold):
                    break
            else:
                kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("count", "classes"), [(0, 1), (1, 1), (7, 2), (33, 1), (300, 1), (300, 5)])
def test_it_agrees_with_the_definition(count: int, classes: int, threshold: float) -> None:
    boxes, scores, idxs = boxes_of(count, classes)
    expected = with_loops(boxes, scores, idxs, threshold)
    assert batched_nms(boxes, scores, idxs, threshold).tolist() == expected
    assert batched_nms(boxes, scores, idxs, threshold, 5).tolist() == expected[:5]
    for limit in (0, 5, count, count + 3):
        indices, number = batched_nms_padded(boxes, scores, idxs, threshold, limit)
        cut = expected[:limit]
        assert indices.tolist() == cut + [-1] * (limit - len(cut))
        assert (number.shape, number.dtype, int(number)) == ((), torch.int64, len(cut))


def test_large_coordinates() -> None:
    """Where shifting classes apart by an offset would swallow the boxes' own coordinates."""
    boxes, scores, idxs = boxes_of(100, 1000, shift=2.0**22)
    idxs = idxs * 1_000_000_007
    assert batched_nms(boxes, scores, idxs, 0.4).tolist() == with_loops(boxes, scores, idxs, 0.4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_boxes(dtype: torch.dtype) -> None:
    """Areas of some 10⁶ are beyond float16, so IoU must not be worked out in it."""
    boxes, scores, idxs = boxes_of(200, 2)
    boxes, scores = (boxes * 32).to(dtype), scores.to(dtype)
    expected = with_loops(boxes, scores, idxs, 0.5)
    assert 0 < len(expected) < 200
    assert batched_nms(boxes, scores, idxs, 0.5).tolist() == expected


def test_many_boxes_go_through_in_parts() -> None:
    boxes, scores, idxs = boxes_of(700, 40)
    assert batched_nms(boxes, scores, idxs, 0.2).tolist() == with_loops(boxes, scores, idxs, 0.2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_classes_of_any_integer_type(dtype: torch.dtype) -> None:
    boxes, scores, idxs = boxes_of(50, 3)
    assert torch.equal(batched_nms(boxes, scores, idxs.to(dtype), 0.3), batched_nms(boxes, scores, idxs, 0.3))


def test_registration() -> None:
    """Schemas and fake kernels say what the ops do."""
    utils = ("test_schema", "test_faketensor")
    boxes, scores, idxs = boxes_of(40, 3)
    ops = torch.ops.trtbridge
    torch.library.opcheck(ops.batched_nms.default, (boxes, scores, idxs, 0.5), test_utils=utils)
    torch.library.opcheck(ops.batched_nms.default, (boxes.half(), scores.half(), idxs, 0.5, 7), test_utils=utils)
    torch.library.opcheck(ops.batched_nms_padded.default, (boxes, scores, idxs, 0.5, 7), test_utils=utils)
    assert (module.OP, module.PADDED_OP) == ("trtbridge::batched_nms", "trtbridge::batched_nms_padded")


def test_wrong_arguments_are_named() -> None:
    boxes, scores, idxs = boxes_of(9, 3)
    for call, words in (
        ((boxes[:, :3], scores, idxs, 0.5), "boxes has shape"),
        ((boxes, scores[1:], idxs, 0.5), "scores has shape"),
        ((boxes, scores, idxs[:, None], 0.5), "idxs has shape"),
        ((boxes, scores, idxs.float(), 0.5), r"idxs is torch\.float32"),
        ((boxes.long(), scores, idxs, 0.5), r"boxes is torch\.int64"),
        ((boxes, scores, idxs, 0.5, -1), "max_output is -1"),
    ):
        with pytest.raises(InputError, match=words):
            batched_nms(*call)


class Detector(torch.nn.Module):
    """Keeps the best boxes, as many as there are."""

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor) -> torch.Tensor:
        return torch.ops.trtbridge.batched_nms(boxes * 2, scores.sigmoid(), idxs, 0.5)


class PaddedDetector(torch.nn.Module):
    """Keeps the best 20 boxes."""

    def forward(
        self, boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices, count = torch.ops.trtbridge.batched_nms_padded(boxes * 2, scores.sigmoid(), idxs, 0.5, 20)
        return boxes[indices.clamp(min=0)] * (indices >= 0)[:, None], count


@pytest.mark.parametrize("model", [Detector(), PaddedDetector()])
def test_converted(model: torch.nn.Module) -> None:
    count = tb.Dim("count", min=2, opt=50, max=500)
    fast = tb.convert(
        model, boxes_of(50, 3), dynamic_shapes=({0: count}, {0: count}, {0: count}), backend="onnxruntime"
    )
    for number in (50, 2, 300):
        call = boxes_of(number, 3)
        torch.testing.assert_close(fast(*call), model(*call))
