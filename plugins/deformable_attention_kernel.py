# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc"
# ruff: noqa: N803
"""The Triton kernel of deformable attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    output,
    value,
    spatial_shapes,
    level_start_index,
    sampling_locations,
    attention_weights,
    S,
    QUERIES,
    HEADS,
    LEVELS,
    DIM: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a block of queries of one head of one sample; all tensors contiguous, shaped as in the op.

    The head varies fastest, so that programs which run together read neighbouring parts of the same pixels.
    """
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(QUERIES, BLOCK_Q)
    q = (program // HEADS) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = (program // HEADS // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    is_query = q < QUERIES
    is_dim = d < DIM

    query = (n * QUERIES + q) * HEADS + head  # (BLOCK_Q,) int64: row of (N, Q, heads)
    pixels = value + (n * S * HEADS + head) * DIM
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for level in range(LEVELS):
        height = tl.load(spatial_shapes + 2 * level).to(tl.int32)
        width = tl.load(spatial_shapes + 2 * level + 1).to(tl.int32)
        start = tl.load(level_start_index + level).to(tl.int32)
        for point in range(POINTS):
            at = (query * LEVELS + level) * POINTS + point
            weight = tl.load(attention_weights + at, mask=is_query, other=0.0).to(tl.float32)
            x = tl.load(sampling_locations + 2 * at, mask=is_query, other=-9.0).to(tl.float32) * width - 0.5
            y = tl.load(sampling_locations + 2 * at + 1, mask=is_query, other=-9.0).to(tl.float32) * height - 0.5
            near = is_query & (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN, too
            x = tl.where(near, x, 0.0)
            y = tl.where(near, y, 0.0)
            left = tl.floor(x)
            top = tl.floor(y)
            right_share = x - left
            lower_share = y - top
            column = left.to(tl.int32)
            row = top.to(tl.int32)
            for corner in tl.static_range(4):
                c = column + corner % 2
                r = row + corner // 2
                pixel = start + r * width + c
                inside = near & (c >= 0) & (c < width) & (r >= 0) & (r < height) & (pixel >= 0) & (pixel < S)
                share = weight
                if corner % 2 == 1:
                    share *= right_share
                else:
                    share *= 1 - right_share
                if corner // 2 == 1:
                    share *= lower_share
                else:
                    share *= 1 - lower_share
                numbers = tl.load(
                    pixels + (pixel.to(tl.int64) * HEADS * DIM)[:, None] + d[None, :],
                    mask=inside[:, None] & is_dim[None, :],
                    other=0.0,
                )
                total += numbers.to(tl.float32) * share[:, None]
    tl.store(
        output + (query * DIM)[:, None] + d[None, :],
        total.to(output.dtype.element_ty),
        mask=is_query[:, None] & is_dim[None, :],
    )
