# ruff: noqa: N803, N806
"""The selective scan of Mamba (https://arxiv.org/abs/2312.00752, algorithm 2): a state-space model whose parameters
depend on the input."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .triton_support import check, check_alike, on_device_of, power_of_two, use_kernel

OP = "trtbridge::selective_scan"
STATE_OP = "trtbridge::selective_scan_with_state"

_ARGUMENTS = (
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
    "Tensor? delta_bias=None, bool delta_softplus=False)"
)


@torch.library.custom_op(OP, mutates_args=(), schema=f"{_ARGUMENTS} -> Tensor")
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """Runs a state-space model over a sequence, each channel with a state of its own, in float32.

    With Δ = delta + delta_bias, through softplus if asked for, and the state h starting at zero, at each time t::

        h = exp(Δ_t A) h + Δ_t B_t u_t
        y_t = C_t · h + D u_t              and then, with a gate, y_t silu(z_t)

    Args:
        u: (N, dim, L), floating point, as all others are.
        delta: (N, dim, L).
        A: (dim, state).
        B: (N, state, L).
        C: (N, state, L).
        D: (dim,), or None for zeros.
        z: (N, dim, L), or None for no gate.
        delta_bias: (dim,), or None for zeros.
        delta_softplus: whether Δ goes through softplus.

    Returns:
        (N, dim, L), u's dtype.

    Raises:
        InputError: shapes, dtypes or devices do not fit each other.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0]


@selective_scan.register_fake
def _(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    _check(u, delta, A, B, C, D, z, delta_bias)
    return u.new_empty(u.shape)


@torch.library.custom_op(STATE_OP, mutates_args=(), schema=f"{_ARGUMENTS} -> (Tensor, Tensor)")
def selective_scan_with_state(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `selective_scan`, with the state after the last step as well: (N, dim, state) float32 (float64 for such u)."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@selective_scan_with_state.register_fake
def _(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    return u.new_empty(u.shape), _new_state(u, A)


def reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selective_scan_with_state` in plain torch: step by step."""
    state = _new_state(u, A).zero_()
    exact = state.dtype
    x, step, b, c = u.to(exact), delta.to(exact), B.to(exact), C.to(exact)
    if delta_bias is not None:
        step = step + delta_bias.to(exact)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    y = torch.empty_like(x)
    for t in range(u.shape[2]):
        decay = torch.exp(step[:, :, t, None] * A.to(exact))  # (N, dim, state)
        state = decay * state + (step[:, :, t] * x[:, :, t])[..., None] * b[:, None, :, t]
        y[:, :, t] = (state * c[:, None, :, t]).sum(2)
    if D is not None:
        y = y + D.to(exact)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(exact))
    return y.to(u.dtype).contiguous(), state


def _new_state(u: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=exact)


def _check(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
) -> None:
    check_alike(OP, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    check(u.dim() == 3, f"{OP}: u has shape {tuple(u.shape)}; (N, dim, L) was expected")
    check(A.dim() == 2, f"{OP}: A has shape {tuple(A.shape)}; (dim, state) was expected")
    (n, dim, length), state = u.shape, A.shape[1]
    expected: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("delta", delta, (n, dim, length)),
        ("A", A, (dim, state)),
        ("B", B, (n, state, length)),
        ("C", C, (n, state, length)),
        ("D", D, (dim,)),
        ("z", z, (n, dim, length)),
        ("delta_bias", delta_bias, (dim,)),
    )
    for name, tensor, wanted in expected:
        if tensor is not None:
            words = f"{OP}: {name} has shape {tuple(tensor.shape)}; beside u {tuple(u.shape)}, {wanted} was expected"
            check(tensor.dim() == len(wanted), words)
            for got, size in zip(tensor.shape, wanted, strict=True):
                check(got == size, words)


def _scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    n, dim, length = u.shape
    states = A.shape[1]
    if not use_kernel(u, delta, A, B, C, D, z, delta_bias) or not n * dim * length * states:
        return reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    from .selective_scan_kernel import scan

    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = _new_state(u, A)
    u, delta, A, B, C = (tensor.contiguous() for tensor in (u, delta, A, B, C))
    # One channel a program, its states and a stretch of time in registers: 2048 numbers in four warps.
    block_s = power_of_two(states)
    block_t = min(power_of_two(length, 16), max(16, min(256, 2048 // block_s)))
    with on_device_of(u):
        scan[(n * dim,)](
            y,
            last,
            u,
            delta,
            A,
            B,
            C,
            u if D is None else D.contiguous(),
            u if z is None else z.contiguous(),
            u if delta_bias is None else delta_bias.contiguous(),
            dim,
            states,
            length,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=delta_bias is not None,
            SOFTPLUS=delta_softplus,
            BLOCK_S=block_s,
            BLOCK_T=block_t,
            num_warps=4 if block_s * block_t >= 1024 else 1,
        )
    return y, last
