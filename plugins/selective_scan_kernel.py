# mypy: disable-error-code="untyped-decorator, no-untyped-def, misc"
# ruff: noqa: N803
"""The Triton kernel of the selective scan."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _compose(decay_1, add_1, decay_2, add_2):
    """Two steps h → decay h + add, one after the other, as one."""
    return decay_1 * decay_2, add_1 * decay_2 + add_2


@triton.jit
def scan(
    y,
    last,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    DIM,
    STATES,
    LENGTH,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: one channel of one sample, with all its states; all tensors contiguous, shaped as in the op.

    Time goes by in stretches of BLOCK_T. Within one, a parallel scan composes the steps; the state is carried on from
    one to the next. Beyond the end a step is the identity, so that the state stays that after the last step.
    """
    channel = tl.program_id(0).to(tl.int64)  # n * DIM + d
    n = channel // DIM
    d = channel % DIM
    s = tl.arange(0, BLOCK_S)
    steps = tl.arange(0, BLOCK_T)
    is_state = s < STATES
    a = tl.load(A + d * STATES + s, mask=is_state, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(delta_bias + d).to(tl.float32)
    skip = 0.0
    if HAS_D:
        skip = tl.load(D + d).to(tl.float32)
    rows = (n * STATES + s) * LENGTH
    h = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for start in range(0, LENGTH, BLOCK_T):
        t = start + steps
        is_step = t < LENGTH
        x = tl.load(u + channel * LENGTH + t, mask=is_step, other=0.0).to(tl.float32)
        dt = tl.load(delta + channel * LENGTH + t, mask=is_step, other=0.0).to(tl.float32) + bias
        if SOFTPLUS:
            # log(1 + e) loses the digits of a small e; this quotient gives them back (Higham, Accuracy and Stability
            # of Numerical Algorithms, section 1.14.1). From 20 on it is the identity, as in PyTorch.
            e = tl.exp(tl.minimum(dt, 20.0))
            w = 1.0 + e
            rest = w - 1.0
            log1p = tl.where(rest == 0.0, e, tl.log(w) * (e / tl.where(rest == 0.0, 1.0, rest)))
            dt = tl.where(dt > 20.0, dt, log1p)
        dt = tl.where(is_step, dt, 0.0)
        both = is_state[:, None] & is_step[None, :]
        b = tl.load(B + rows[:, None] + t[None, :], mask=both, other=0.0).to(tl.float32)
        c = tl.load(C + rows[:, None] + t[None, :], mask=both, other=0.0).to(tl.float32)
        decay, add = tl.associative_scan((tl.exp(a[:, None] * dt[None, :]), b * (dt * x)[None, :]), 1, _compose)
        states = decay * h[:, None] + add
        out = tl.sum(states * c, axis=0)
        h = tl.sum(tl.where((steps == BLOCK_T - 1)[None, :], states, 0.0), axis=1)
        if HAS_D:
            out += skip * x
        if HAS_Z:
            gate = tl.load(z + channel * LENGTH + t, mask=is_step, other=0.0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + channel * LENGTH + t, out.to(y.dtype.element_ty), mask=is_step)
    tl.store(last + channel * STATES + s, h, mask=is_state)
