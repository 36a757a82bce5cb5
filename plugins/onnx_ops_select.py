"""ONNX ops that choose, order and count elements, and many of whose results' sizes depend on data."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .onnx_call import Implementation, NodeCall, Result

_CHUNK_ELEMENTS = 1 << 24
_BLOCK = 1024


def non_zero(call: NodeCall) -> Result:
    """NonZero: (rank, count) int64; for a scalar (0, count)."""
    return torch.nonzero(call.tensor(0)).t()


def compress(call: NodeCall) -> Result:
    """Compress: the slices along an axis, or elements, at which a condition holds; it may be shorter than the axis."""
    x, condition = call.tensor(0), call.tensor(1).reshape(-1)
    if call.attribute("axis") is None:
        x, axis = x.reshape(-1), 0
    else:
        axis = call.axis(x.dim())
    return x.index_select(axis, torch.nonzero(condition.bool()).squeeze(1))


def unique(call: NodeCall) -> Result:
    """Unique: values, index of each one's first place, index of each element's value, counts."""
    x = call.tensor(0)
    axis = call.attribute("axis")
    if x.is_floating_point() and x.dtype in (torch.float16, torch.bfloat16) and x.device.type == "cpu":
        wide = x.float()
    else:
        wide = x
    if axis is None:
        values, inverse, counts = torch.unique(wide.reshape(-1), return_inverse=True, return_counts=True)
        axis = 0
    else:
        axis = axis % x.dim()
        values, inverse, counts = torch.unique(wide, return_inverse=True, return_counts=True, dim=axis)
    inverse, counts = inverse.reshape(-1).long(), counts.long()  # the fake kernel of torch 2.11 gives other types
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not call.attribute("sorted", 1):
        order = torch.argsort(first)
        values, first, counts = values.index_select(axis, order), first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    return values.to(x.dtype), first, inverse, counts


def top_k(call: NodeCall) -> Result:
    """TopK of any K. Among equal values the lower index comes first, which torch.topk does not promise."""
    x = call.tensor(0)
    k = call.ints(1)[0] if call.opset >= 10 else int(call.attribute("k"))
    axis = call.axis(x.dim(), -1)
    largest = bool(call.attribute("largest", 1))
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k).contiguous(), indices.narrow(axis, 0, k).contiguous()


def arg_max(call: NodeCall) -> Result:
    """ArgMax and ArgMin, of a tensor of rank 1 too."""
    x = call.tensor(0)
    axis = call.axis(x.dim())
    keep = bool(call.attribute("keepdims", 1))
    find = torch.argmax if call.op == "ArgMax" else torch.argmin
    if call.attribute("select_last_index", 0):
        return x.shape[axis] - 1 - find(x.flip(axis), dim=axis, keepdim=keep)
    return find(x, dim=axis, keepdim=keep)


def trilu(call: NodeCall) -> Result:
    """Trilu: the upper or lower triangle of the last two axes."""
    keep = torch.triu if call.attribute("upper", 1) else torch.tril
    return keep(call.tensor(0), call.integer(1, 0))


def scatter_elements(call: NodeCall) -> Result:
    """ScatterElements with and without a reduction."""
    x, indices, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    axis = call.axis(x.dim())
    size = x.shape[axis]
    indices = torch.where(indices < 0, indices + size, indices)
    kind = call.attribute("reduction", "none")
    if kind == "none":
        return x.scatter(axis, indices, updates)
    return _reduce(x, axis, indices, updates, kind)


def scatter_nd(call: NodeCall) -> Result:
    """ScatterND with and without a reduction."""
    x, indices, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    depth = indices.shape[-1]
    kind = call.attribute("reduction", "none")
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis in range(depth):
        size = x.shape[axis]
        step = indices[..., axis]
        flat = flat * size + torch.where(step < 0, step + size, step)
    rest = x.shape[depth:]
    inner = 1
    for size in rest:
        inner = inner * size
    rows = 1
    for size in x.shape[:depth]:
        rows = rows * size
    table = x.reshape(rows, inner)
    index = flat.reshape(-1, 1).expand(-1, inner)
    update = updates.reshape(-1, inner)
    result = table.scatter(0, index, update) if kind == "none" else _reduce(table, 0, index, update, kind)
    return result.reshape(x.shape)


def _reduce(x: torch.Tensor, axis: int, index: torch.Tensor, updates: torch.Tensor, kind: str) -> torch.Tensor:
    name = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[kind]
    if x.dtype == torch.bool:
        # Of truth values the sum and the maximum are "or", the product and the minimum "and".
        name = "amax" if kind in ("add", "max") else "amin"
        return x.to(torch.uint8).scatter_reduce(axis, index, updates.to(torch.uint8), name).bool()
    if x.dtype in (torch.float16, torch.bfloat16):  # one rounding at the end
        return x.float().scatter_reduce(axis, index, updates.float(), name).to(x.dtype)
    return x.scatter_reduce(axis, index, updates, name)


def non_max_suppression(call: NodeCall) -> Result:
    """NonMaxSuppression: (count, 3) int64 rows of batch, class and box, by batch, class and falling score.

    Greedy suppression has one fixed point: a box is kept if no kept box of a higher score overlaps it too much. It is
    found by iterating over all boxes at once; the passes are as many as the longest chain of suppressions.
    """
    boxes, scores = call.tensor(0).float(), call.tensor(1).float()
    limit = call.integer(2, 0)
    iou_threshold = call.number(3, 0.0)
    batches, classes, count = scores.shape
    if call.attribute("center_point_box", 0):
        x, y, width, height = boxes.unbind(-1)
        corners = torch.stack((y - height / 2, x - width / 2, y + height / 2, x + width / 2), -1)
    else:
        y1, x1, y2, x2 = boxes.unbind(-1)
        corners = torch.stack(
            (torch.minimum(y1, y2), torch.minimum(x1, x2), torch.maximum(y1, y2), torch.maximum(x1, x2)), -1
        )
    ranked, order = torch.sort(scores.reshape(batches * classes, count), dim=1, descending=True, stable=True)
    candidate = torch.ones_like(ranked, dtype=torch.bool)
    if call.has(4):
        candidate = ranked > call.tensor(4).reshape(())
    # Candidates come first, so the rest of every row needs no look.
    longest = int(candidate.sum(1).max()) if candidate.numel() else 0
    order, candidate = order[:, :longest], candidate[:, :longest]
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, min(longest, _BLOCK) ** 2))
    kept = []
    for start in range(0, batches * classes, rows_at_once):
        part = slice(start, start + rows_at_once)
        batch = torch.arange(batches * classes, device=boxes.device)[part] // classes
        sorted_boxes = corners[batch.unsqueeze(1), order[part]]
        kept.append(_greedy(sorted_boxes, candidate[part], iou_threshold))
    keep = torch.cat(kept) if kept else candidate
    keep = keep & (keep.cumsum(1) <= limit)
    row, place = torch.nonzero(keep).unbind(1)
    return torch.stack((row // classes, row % classes, order[row, place]), 1)


def _greedy(boxes: torch.Tensor, candidate: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which boxes stay; boxes: (rows, boxes, 4) y1, x1, y2, x2 by falling score. In blocks, to bound the memory."""
    keep = candidate.clone()
    count = boxes.shape[1]
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        alive = keep[:, block]
        for first in range(0, start, _BLOCK):
            earlier = slice(first, first + _BLOCK)
            alive = alive & ~(_overlaps(boxes[:, earlier], boxes[:, block], threshold) & keep[:, earlier, None]).any(1)
        hits = torch.triu(_overlaps(boxes[:, block], boxes[:, block], threshold), diagonal=1)  # row: the higher score
        stays = alive
        while True:
            after = alive & ~(hits & stays.unsqueeze(2)).any(1)
            if torch.equal(after, stays):
                break
            stays = after
        keep[:, block] = stays
    return keep


def _overlaps(rows: torch.Tensor, columns: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which pairs of boxes share more than a part `threshold` of their union, (batch, rows, columns)."""
    first, second = rows[:, :, None, :], columns[:, None, :, :]
    shared = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(
        min=0
    )
    shared = shared.prod(-1)
    area_a, area_b = (((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])) for b in (first, second))
    union = area_a + area_b - shared
    solid = (area_a > 0) & (area_b > 0) & (union > 0)
    return solid & (shared / torch.where(union > 0, union, torch.ones_like(union)) > threshold)


def fake_non_max_suppression(call: NodeCall) -> Result:
    """The shape of NonMaxSuppression's result; how many boxes stay depends on data."""
    return torch.empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64, device=call.device)


OPS: Mapping[str, Implementation] = {
    "NonZero": non_zero,
    "Compress": compress,
    "Unique": unique,
    "TopK": top_k,
    "ArgMax": arg_max,
    "ArgMin": arg_max,
    "Trilu": trilu,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "NonMaxSuppression": non_max_suppression,
}

FAKES: Mapping[str, Implementation] = {"NonMaxSuppression": fake_non_max_suppression}
