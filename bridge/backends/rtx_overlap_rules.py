"""Kernels of TensorRT-RTX 1.6.1 that read what the kernel ahead may not have written yet.

It lets kernels begin before the one ahead has ended (programmatic dependent launch); each waits by itself before it
reads. Kernels of convolutions for Hopper wait before they read their image, and not before they read what is added to
the product, or multiplied with it. Where that comes from the kernel right ahead, and other work on the device delays
it, the results are wrong: found with eight threads on an H200, by letting one dependency of a CUDA graph overlap at a
time. docs/runtime.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from .rtx_epilogues import one_axis_more, with_axis
from .rtx_fault_rules import ELEMENTWISE, MOST_AXES, Facts, Instead

_JOINING = ("Add", "Mul", "Sub", "Div", "Max", "Min", "Pow")
_ACTIVATIONS = ("Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Selu", "Softplus", "Swish")
_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_UNKNOWN = [None] * (MOST_AXES + 1)


def operand_apart(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """A convolution and a tensor that was made right ahead of it: joined in a kernel of its own.

    ::

        Add(Conv(x), Conv(y))        Squeeze(Add(Unsqueeze(Conv(x)), Conv(y)))

    Not where the convolution's own image was computed from that tensor by a kernel in between, which has waited for it:
    a residual branch of two convolutions and more. Products of matrices were right with all that was tried.
    """
    instead = Instead({}, [])
    read: dict[str, set[str]] = {}
    for index, node in enumerate(graph.node):
        if node.op_type not in _JOINING or node.domain or len(node.input) != 2:
            continue
        if len(facts.shapes.get(node.output[0], _UNKNOWN)) > MOST_AXES:
            continue
        for position, name in enumerate(node.input):
            other = node.input[1 - position]
            kernels = list(_kernels(name, facts))
            if not _is_made(other, facts) or len(kernels) != 1 or kernels[0].op_type != "Conv":
                continue
            (convolution,) = kernels
            if not _has_waited(convolution, other, facts, read):
                instead.nodes[index] = one_axis_more(node, position)
                break
    return with_axis(instead)


def _is_made(name: str, facts: Facts) -> bool:
    """Whether a tensor is more than a view of an input or a constant."""
    maker = facts.makers.get(name)
    while maker is not None and maker.op_type in _VIEWS and not maker.domain:
        maker = facts.makers.get(maker.input[0])
    return maker is not None and (maker.op_type != "Constant" or bool(maker.domain))


def _kernels(name: str, facts: Facts) -> Iterator[onnx.NodeProto]:
    """The nodes of whose results elementwise ops make a tensor."""
    pending, seen = [name], {name}
    while pending:
        maker = facts.makers.get(pending.pop())
        if maker is None or (maker.op_type == "Constant" and not maker.domain):
            continue
        if (maker.op_type in ELEMENTWISE or maker.op_type in _ACTIVATIONS) and not maker.domain:
            pending += [source for source in maker.input if source not in seen]
            seen.update(maker.input)
        else:
            yield maker


def _has_waited(convolution: onnx.NodeProto, operand: str, facts: Facts, read: dict[str, set[str]]) -> bool:
    """Whether whoever made a convolution's image had read the operand, or the operand needs the convolution itself.

    `read` holds what was found: by node, all that it and those ahead of it have read.
    """
    own = convolution.output[0]
    if any(kernel.output[0] == own or own in _read_by(kernel, facts, read) for kernel in _kernels(operand, facts)):
        return True
    ahead = list(_kernels(convolution.input[0], facts))
    return bool(ahead) and any(operand in _read_by(kernel, facts, read) for kernel in ahead)


def _read_by(node: onnx.NodeProto, facts: Facts, read: dict[str, set[str]]) -> set[str]:
    key = node.output[0]
    if key not in read:
        pending, seen = list(node.input), set(node.input)
        while pending:
            maker = facts.makers.get(pending.pop())
            fresh = [] if maker is None else [name for name in maker.input if name not in seen]
            seen.update(fresh)
            pending += fresh
        read[key] = seen
    return read[key]
