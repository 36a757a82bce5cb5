# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc"
# ruff: noqa: N803
"""The Triton kernel of deformable convolution: it gathers the columns that are multiplied by the weight."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_columns(
    columns,
    image,
    offset,
    mask,
    HEIGHT,
    WIDTH,
    OUT_WIDTH,
    PIXELS,
    PER_GROUP,
    OFFSET_GROUPS,
    STRIDE_Y,
    STRIDE_X,
    PADDING_Y,
    PADDING_X,
    DILATION_Y,
    DILATION_X,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a block of output pixels, one tap of the kernel, a chunk of one offset group's channels.

    Where it reads is worked out once and used for all channels of the chunk. Neighbouring pixels lie along a row, so
    that reads are nearly contiguous and writes are.

    columns: (N, OFFSET_GROUPS * PER_GROUP, KERNEL_H * KERNEL_W, PIXELS); the others contiguous, shaped as in the op.
    """
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    program = tl.program_id(0)
    blocks = tl.cdiv(PIXELS, BLOCK_P)
    p = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = p < PIXELS
    tap = program // blocks % taps
    sheet = (program // blocks // taps).to(tl.int64)  # n * OFFSET_GROUPS + offset group

    place = (sheet * taps + tap) * PIXELS
    shift_y = tl.load(offset + 2 * place + p, mask=is_pixel, other=0.0).to(tl.float32)
    shift_x = tl.load(offset + 2 * place + PIXELS + p, mask=is_pixel, other=0.0).to(tl.float32)
    y = p // OUT_WIDTH * STRIDE_Y - PADDING_Y + tap // KERNEL_W * DILATION_Y + shift_y
    x = p % OUT_WIDTH * STRIDE_X - PADDING_X + tap % KERNEL_W * DILATION_X + shift_x
    near = is_pixel & (y > -1) & (y < HEIGHT) & (x > -1) & (x < WIDTH)  # false for NaN, too
    y = tl.where(near, y, 0.0)
    x = tl.where(near, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    lower = y - top
    right = x - left
    row = top.to(tl.int32)
    column = left.to(tl.int32)
    factor = tl.full((BLOCK_P,), 1.0, dtype=tl.float32)
    if HAS_MASK:
        factor = tl.load(mask + place + p, mask=is_pixel, other=0.0).to(tl.float32)
    in_top = near & (row >= 0)
    in_bottom = near & (row + 1 < HEIGHT)
    in_left = column >= 0
    in_right = column + 1 < WIDTH
    corner = row * WIDTH + column

    share_00 = ((1 - lower) * (1 - right) * factor)[None, :]
    share_01 = ((1 - lower) * right * factor)[None, :]
    share_10 = (lower * (1 - right) * factor)[None, :]
    share_11 = (lower * right * factor)[None, :]
    read_00 = (in_top & in_left)[None, :]
    read_01 = (in_top & in_right)[None, :]
    read_10 = (in_bottom & in_left)[None, :]
    read_11 = (in_bottom & in_right)[None, :]
    first = tl.program_id(1) * CHUNK
    for step in range(0, CHUNK, BLOCK_C):
        c = first + step + tl.arange(0, BLOCK_C)
        is_channel = (c < PER_GROUP)[:, None]
        channel = sheet * PER_GROUP + c
        source = image + (channel * HEIGHT * WIDTH)[:, None] + corner[None, :]
        total = tl.load(source, mask=read_00 & is_channel, other=0.0).to(tl.float32) * share_00
        total += tl.load(source + 1, mask=read_01 & is_channel, other=0.0).to(tl.float32) * share_01
        total += tl.load(source + WIDTH, mask=read_10 & is_channel, other=0.0).to(tl.float32) * share_10
        total += tl.load(source + WIDTH + 1, mask=read_11 & is_channel, other=0.0).to(tl.float32) * share_11
        target = columns + ((channel * taps + tap) * PIXELS)[:, None] + p[None, :]
        tl.store(target, total.to(columns.dtype.element_ty), mask=is_channel & is_pixel[None, :])
