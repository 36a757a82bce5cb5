"""Multi-scale deformable attention, the core of Deformable DETR (https://arxiv.org/abs/2010.04159, equation 3)."""

from __future__ import annotations

import torch

from .triton_support import check, check_alike, on_device_of, power_of_two, use_kernel

OP = "trtbridge::deformable_attention"


@torch.library.custom_op(OP, mutates_args=())
def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """For each query and head the weighted sum of values at a few points on each level of a feature pyramid.

    A point's value is interpolated bilinearly; (0, 0) is the upper left corner of the upper left pixel, (1, 1) the
    lower right corner of the lower right one, and outside of the level everything is zero. Nothing is read back to
    the host, so a CUDA graph can hold the call. Interpolation and sums are in float32, whatever the dtypes.

    Args:
        value: (N, S, heads, head_dim), floating point: all levels, each flattened row by row, one after the other.
        spatial_shapes: (L, 2) integers on the same device: height and width of each level; they add up to S pixels.
        level_start_index: (L,) integers on the same device: where each level begins in S.
        sampling_locations: (N, Q, heads, L, P, 2), floating point: x and y of each point, in units of the level's size.
        attention_weights: (N, Q, heads, L, P), floating point.

    Returns:
        (N, Q, heads * head_dim), value's dtype.

    Raises:
        InputError: shapes, dtypes or devices do not fit each other.
    """
    shape = _output_shape(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if not use_kernel(value, sampling_locations, attention_weights):
        return reference(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    output = value.new_empty(shape)
    if output.numel():
        _launch(output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return output


@deformable_attention.register_fake
def _(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    return value.new_empty(
        _output_shape(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    )


def reference(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """The same in plain torch: level by level, corner by corner. Arguments and result as of the op."""
    n, s, heads, dim = value.shape
    queries, levels, points = attention_weights.shape[1], *attention_weights.shape[3:]
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    output = value.new_zeros((n, heads, queries, dim), dtype=exact)
    pixels = value.to(exact).transpose(1, 2)  # (N, heads, S, dim)
    locations = sampling_locations.to(exact).transpose(1, 2)  # (N, heads, Q, L, P, 2)
    weights = attention_weights.to(exact).transpose(1, 2)
    for level in range(levels if s else 0):
        height, width = spatial_shapes[level, 0], spatial_shapes[level, 1]
        x = locations[..., level, :, 0] * width - 0.5  # (N, heads, Q, P)
        y = locations[..., level, :, 1] * height - 0.5
        near = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = torch.where(near, x, 0), torch.where(near, y, 0)
        left, top = x.floor(), y.floor()
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            inside = near & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights[..., level, :]
            index = level_start_index[level] + row.long() * width + column.long()
            index = torch.where(inside, index, 0).flatten(2)[..., None].expand(-1, -1, -1, dim)
            corner = pixels.gather(2, index).view(n, heads, queries, points, dim)
            # Not `corner * 0`: what was read for a point outside may be infinite.
            output += torch.where(inside[..., None], corner * share[..., None], 0).sum(3)
    return output.transpose(1, 2).reshape(n, queries, heads * dim).to(value.dtype)


def _output_shape(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> tuple[int, int, int]:
    check_alike(OP, value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    for name, tensor, rank, form in (
        ("value", value, 4, "(N, S, heads, head_dim)"),
        ("spatial_shapes", spatial_shapes, 2, "(L, 2)"),
        ("level_start_index", level_start_index, 1, "(L,)"),
        ("sampling_locations", sampling_locations, 6, "(N, Q, heads, L, P, 2)"),
        ("attention_weights", attention_weights, 5, "(N, Q, heads, L, P)"),
    ):
        check(tensor.dim() == rank, f"{OP}: {name} has shape {tuple(tensor.shape)}; {form} was expected")
    for name, tensor in (("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)):
        check(tensor.dtype in (torch.int64, torch.int32), f"{OP}: {name} is {tensor.dtype}; int64 was expected")
        check(tensor.device == value.device, f"{OP}: {name} is on {tensor.device}, but value on {value.device}")
    n, _, heads, dim = value.shape
    queries, levels, points = attention_weights.shape[1], attention_weights.shape[3], attention_weights.shape[4]
    for name, tensor, expected in (
        ("spatial_shapes", spatial_shapes, (levels, 2)),
        ("level_start_index", level_start_index, (levels,)),
        ("attention_weights", attention_weights, (n, queries, heads, levels, points)),
        ("sampling_locations", sampling_locations, (n, queries, heads, levels, points, 2)),
    ):
        for got, wanted in zip(tensor.shape, expected, strict=True):
            check(
                got == wanted,
                f"{OP}: {name} has shape {tuple(tensor.shape)}; beside the others {expected} was expected",
            )
    return n, queries, heads * dim


def _launch(
    output: torch.Tensor,
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> None:
    from .deformable_attention_kernel import attend

    n, s, heads, dim = value.shape
    queries, levels, points = attention_weights.shape[1], *attention_weights.shape[3:]
    block_d = power_of_two(dim)
    # About 512 numbers a program, but fewer where that would leave most of a large GPU idle (a decoder's 300 queries).
    block_q = max(1, 512 // block_d)
    while block_q > 4 and n * heads * -(-queries // block_q) < 1024:
        block_q //= 2
    with on_device_of(value):
        attend[(-(-queries // block_q) * heads * n,)](
            output,
            value.contiguous(),
            spatial_shapes.contiguous(),
            level_start_index.contiguous(),
            sampling_locations.contiguous(),
            attention_weights.contiguous(),
            s,
            queries,
            heads,
            levels,
            DIM=dim,
            POINTS=points,
            BLOCK_Q=block_q,
            BLOCK_D=block_d,
            num_warps=max(1, min(4, block_q * block_d // 128)),
        )
