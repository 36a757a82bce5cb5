# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc"
# ruff: noqa: N803
"""The Triton kernels of non-maximum suppression: who overlaps whom, as bits; then who is kept."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_overlaps(overlaps, boxes, classes, COUNT, WORDS, THRESHOLD, WORD: tl.constexpr):
    """One program: WORD boxes against WORD boxes, one word for each of the former.

    Only words on and right of the diagonal are written: a box suppresses none before it.

    Args:
        overlaps: (WORDS * WORD, WORDS) int32: bit b of word w in row i tells whether box i, if kept, suppresses box
            j = w * WORD + b: j > i, both of one class, and an intersection over union above THRESHOLD.
        boxes: (COUNT, 4) float32, highest score first.
        classes: (COUNT,) integers.
    """
    if tl.program_id(1) < tl.program_id(0):
        return
    lanes = tl.arange(0, WORD)
    i = tl.program_id(0) * WORD + lanes
    j = tl.program_id(1) * WORD + lanes
    has_i = i < COUNT
    has_j = j < COUNT
    left_i = tl.load(boxes + 4 * i, mask=has_i, other=0.0)
    top_i = tl.load(boxes + 4 * i + 1, mask=has_i, other=0.0)
    right_i = tl.load(boxes + 4 * i + 2, mask=has_i, other=0.0)
    bottom_i = tl.load(boxes + 4 * i + 3, mask=has_i, other=0.0)
    left_j = tl.load(boxes + 4 * j, mask=has_j, other=0.0)
    top_j = tl.load(boxes + 4 * j + 1, mask=has_j, other=0.0)
    right_j = tl.load(boxes + 4 * j + 2, mask=has_j, other=0.0)
    bottom_j = tl.load(boxes + 4 * j + 3, mask=has_j, other=0.0)
    class_i = tl.load(classes + i, mask=has_i, other=0)
    class_j = tl.load(classes + j, mask=has_j, other=0)

    width = tl.minimum(right_i[:, None], right_j[None, :]) - tl.maximum(left_i[:, None], left_j[None, :])
    height = tl.minimum(bottom_i[:, None], bottom_j[None, :]) - tl.maximum(top_i[:, None], top_j[None, :])
    inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_i = (right_i - left_i) * (bottom_i - top_i)
    area_j = (right_j - left_j) * (bottom_j - top_j)
    iou = tl.div_rn(inter, area_i[:, None] + area_j[None, :] - inter)
    hit = (iou > THRESHOLD) & (class_i[:, None] == class_j[None, :]) & (i[:, None] < j[None, :]) & has_j[None, :]
    word = tl.sum(hit.to(tl.int32) << lanes[None, :], axis=1)
    tl.store(overlaps + i.to(tl.int64) * WORDS + tl.program_id(1), word)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def suppress(
    indices,
    kept,
    overlaps,
    order,
    COUNT,
    WORDS,
    LIMIT,
    WORD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The one program: goes through the boxes, WORD at a time, until enough are kept.

    Within a word the fates are settled one by one, on one number; the bits of all boxes that it keeps are then set
    for the words after it at once.

    Args:
        indices: (LIMIT,) int64: becomes the indices of kept boxes; what is beyond their number is left as it is.
        kept: () int64: becomes their number.
        overlaps: what `find_overlaps` wrote.
        order: (COUNT,) int64: index of each box before they were sorted.
    """
    lanes = tl.arange(0, WORD)
    columns = tl.arange(0, BLOCK_W)
    rows = tl.arange(0, ROWS)
    suppressed = tl.zeros((BLOCK_W,), dtype=tl.int32)
    found = tl.zeros((), dtype=tl.int64)
    w = tl.zeros((), dtype=tl.int32)
    while (w < WORDS) & (found < LIMIT):
        first = overlaps + w.to(tl.int64) * WORD * WORDS
        word = tl.sum(tl.where(columns == w, suppressed, 0), axis=0)
        for bit in tl.static_range(WORD):
            others = tl.load(first + bit * WORDS + w)
            word = tl.where((word >> bit) & 1 == 0, word | others, word)
        is_kept = ((word >> lanes) & 1 == 0) & (w * WORD + lanes < COUNT)
        place = found + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        index = tl.load(order + w * WORD + lanes, mask=is_kept, other=0)
        tl.store(indices + place, index, mask=is_kept & (place < LIMIT))
        found += tl.sum(is_kept.to(tl.int32), axis=0)
        for start in range(0, WORD, ROWS):
            row = start + rows
            alive = ((word >> row) & 1 == 0) & (w * WORD + row < COUNT)
            bits = tl.load(
                first + (row * WORDS)[:, None] + columns[None, :],
                mask=alive[:, None] & (columns > w)[None, :] & (columns < WORDS)[None, :],
                other=0,
            )
            suppressed |= tl.reduce(bits, 0, _either)
        w += 1
    tl.store(kept, tl.minimum(found, LIMIT))
