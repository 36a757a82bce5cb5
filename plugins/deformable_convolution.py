"""Deformable convolution, version 2 (https://arxiv.org/abs/1811.11168), with the conventions of torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .triton_support import check, check_alike, on_device_of, use_kernel

OP = "trtbridge::deform_conv2d"

_COLUMN_BYTES = 256 << 20
"""Most memory that the gathered columns take at a time; a larger batch goes through in parts."""


@torch.library.custom_op(
    OP,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor offset, Tensor? mask=None, Tensor? bias=None, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, int groups=1, int offset_groups=1) -> Tensor",
)
def deform_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
) -> torch.Tensor:
    """A convolution whose every tap reads where an offset points to, by bilinear interpolation, times a mask.

    Positions and interpolation are in float32; the columns that result are rounded to the input's dtype and multiplied
    by the weight as any convolution is: with PyTorch's own matrix product, under PyTorch's own precision settings.

    Args:
        input: (N, C, H, W), floating point; zero outside of H x W.
        weight: (C_out, C / groups, kernel_h, kernel_w), the input's dtype.
        offset: (N, 2 * offset_groups * kernel_h * kernel_w, H_out, W_out), floating point, in pixels: for each offset
            group and tap first y, then x.
        mask: (N, offset_groups * kernel_h * kernel_w, H_out, W_out), floating point; ones if None.
        bias: (C_out,), the input's dtype; zeros if None.
        stride: in y and x.
        padding: in y and x, on both sides.
        dilation: in y and x.
        groups: groups of channels that are convolved apart.
        offset_groups: groups of input channels that have offsets of their own.

    Returns:
        (N, C_out, H_out, W_out), the input's dtype.

    Raises:
        InputError: shapes, dtypes, devices or options do not fit each other.
    """
    shape = _output_shape(input, weight, offset, mask, bias, stride, padding, dilation, groups, offset_groups)
    if not use_kernel(input, offset, mask):
        return reference(input, weight, offset, mask, bias, stride, padding, dilation, groups, offset_groups)
    output = input.new_empty(shape)
    if not output.numel():
        return output
    n, channels = input.shape[:2]
    taps, pixels = weight.shape[2] * weight.shape[3], shape[2] * shape[3]
    input, offset = input.contiguous(), offset.contiguous()
    mask = None if mask is None else mask.contiguous()
    at_once = max(1, min(n, _COLUMN_BYTES // max(1, channels * taps * pixels * input.element_size())))
    for start in range(0, n, at_once):
        part = slice(start, min(start + at_once, n))
        columns = input.new_empty((part.stop - start, channels * taps, pixels))
        _launch(
            columns, input[part], offset[part], None if mask is None else mask[part],
            (weight.shape[2], weight.shape[3]), stride, padding, dilation, offset_groups, shape[2:],
        )  # fmt: skip
        _multiply(output[part], columns, weight, bias, groups)
    return output


@deform_conv2d.register_fake
def _(
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
) -> torch.Tensor:
    return input.new_empty(
        _output_shape(input, weight, offset, mask, bias, stride, padding, dilation, groups, offset_groups)
    )


def reference(
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
) -> torch.Tensor:
    """The same in plain torch: the columns are gathered corner by corner. Arguments and result as of the op."""
    n, _, height, width = input.shape
    out_channels, _, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    if not n * out_channels * out_h * out_w:
        return input.new_empty((n, out_channels, out_h, out_w))
    exact = torch.float64 if input.dtype == torch.float64 else torch.float32
    taps = kernel_h * kernel_w

    def steps(count: int, step: int) -> torch.Tensor:
        return torch.arange(count, device=input.device, dtype=exact) * step

    # (N, offset_groups, kernel_h, kernel_w, H_out, W_out): where each tap of each output pixel reads.
    offsets = offset.to(exact).view(n, offset_groups, kernel_h, kernel_w, 2, out_h, out_w)
    base_y = steps(out_h, stride[0])[:, None] - padding[0] + steps(kernel_h, dilation[0])[:, None, None, None]
    base_x = steps(out_w, stride[1]) - padding[1] + steps(kernel_w, dilation[1])[:, None, None]
    y, x = base_y + offsets[..., 0, :, :], base_x + offsets[..., 1, :, :]
    near = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(near, y, 0), torch.where(near, x, 0)
    top, left = y.floor(), x.floor()
    planes = input.to(exact).reshape(n, offset_groups, -1, height * width)
    columns = planes.new_zeros((n, offset_groups, planes.shape[2], taps * out_h * out_w))
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = near & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        share = (1 - (y - row).abs()) * (1 - (x - column).abs())
        index = torch.where(inside, row.long() * width + column.long(), 0).flatten(2)[:, :, None]
        corner = planes.gather(3, index.expand_as(columns))
        columns += torch.where(inside.flatten(2)[:, :, None], corner * share.flatten(2)[:, :, None], 0)
    if mask is not None:
        columns *= mask.to(exact).reshape(n, offset_groups, 1, -1)
    columns = columns.view(n, groups, -1, out_h * out_w)
    output = (weight.to(exact).view(groups, out_channels // groups, -1) @ columns).view(n, out_channels, out_h, out_w)
    if bias is not None:
        output += bias.to(exact)[:, None, None]
    return output.to(input.dtype)


def _output_shape(
    input: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
) -> tuple[int, int, int, int]:
    check_alike(OP, input=input, weight=weight, offset=offset, mask=mask, bias=bias)
    for name, tensor, rank in (("input", input, 4), ("weight", weight, 4), ("offset", offset, 4), ("mask", mask, 4)):
        if tensor is not None:
            check(
                tensor.dim() == rank, f"{OP}: {name} has shape {tuple(tensor.shape)}; {rank} dimensions were expected"
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check(tensor.dtype == input.dtype, f"{OP}: {name} is {tensor.dtype}, but the input {input.dtype}")
    check(min(stride) >= 1 and min(dilation) >= 1, f"{OP}: stride {stride} and dilation {dilation} must be positive")
    check(min(padding) >= 0, f"{OP}: padding {padding} must not be negative")
    n, channels = input.shape[:2]
    out_channels, _, kernel_h, kernel_w = weight.shape
    for what, number in (("groups", groups), ("offset_groups", offset_groups)):
        check(
            number >= 1 and channels % number == 0,
            f"{OP}: {what} is {number}; a divisor of the input's {channels} channels was expected",
        )
    check(
        out_channels % groups == 0,
        f"{OP}: weight has {out_channels} filters; a multiple of {groups} groups was expected",
    )
    out_h, out_w = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(
            input.shape[2:], padding, dilation, (kernel_h, kernel_w), stride, strict=True
        )
    )
    expected: tuple[tuple[str, torch.Tensor | None, tuple[int, ...]], ...] = (
        ("weight", weight, (out_channels, channels // groups, kernel_h, kernel_w)),
        ("offset", offset, (n, 2 * offset_groups * kernel_h * kernel_w, out_h, out_w)),
        ("mask", mask, (n, offset_groups * kernel_h * kernel_w, out_h, out_w)),
        ("bias", bias, (out_channels,)),
    )
    for name, tensor, wanted in expected:
        if tensor is not None:
            words = f"{OP}: {name} has shape {tuple(tensor.shape)}; beside the others {wanted} was expected"
            check(tensor.dim() == len(wanted), words)
            for got, size in zip(tensor.shape, wanted, strict=True):
                check(got == size, words)
    return n, out_channels, out_h, out_w


def _launch(
    columns: torch.Tensor,
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    kernel: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int,
    out_size: Sequence[int],
) -> None:
    """Gather the columns: (N, C * kernel_h * kernel_w, H_out * W_out), ordered as the weight's rows are."""
    from .deformable_convolution_kernel import gather_columns

    n, channels, height, width = input.shape
    pixels = out_size[0] * out_size[1]
    per_group = channels // offset_groups
    block_p, block_c, chunk = 128, 4, 32
    grid = (-(-pixels // block_p) * n * offset_groups * kernel[0] * kernel[1], -(-per_group // chunk))
    with on_device_of(input):
        gather_columns[grid](
            columns,
            input,
            offset,
            input if mask is None else mask,
            height,
            width,
            out_size[1],
            pixels,
            per_group,
            offset_groups,
            stride[0],
            stride[1],
            padding[0],
            padding[1],
            dilation[0],
            dilation[1],
            KERNEL_H=kernel[0],
            KERNEL_W=kernel[1],
            HAS_MASK=mask is not None,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            CHUNK=chunk,
            num_warps=4,
        )


def _multiply(
    output: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> None:
    """Weight times columns plus bias, into output."""
    n, out_channels = output.shape[:2]
    filters = weight.reshape(groups, out_channels // groups, -1)
    filters = filters.expand(n, *filters.shape).flatten(0, 1)
    columns = columns.view(n * groups, filters.shape[2], -1)
    result = output.view(n * groups, out_channels // groups, -1)
    if bias is None:
        torch.bmm(filters, columns, out=result)
    else:
        start = bias.view(groups, -1, 1).expand(n, groups, -1, result.shape[2]).flatten(0, 1)
        torch.baddbmm(start, filters, columns, out=result)
