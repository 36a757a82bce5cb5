"""Which plugin ops there are in this process, beside PyTorch's own."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch

from .registry import find_op, op_name
from .shipped import SHIPPED, load_shipped

TORCH_NAMESPACES = frozenset({
    "_c10d_functional", "_c10d_functional_autograd", "_caffe2", "_dtensor", "_inductor_test", "_native",
    "_quantized", "_test", "aten", "bugs", "c10d", "c10d_functional", "cuda", "cudnn", "debug_mode_ops",
    "debugprims", "export", "flex_lib", "fsdp", "higher_order", "inductor", "inductor_prims", "llvm", "metal",
    "mkl", "mkldnn", "mkldnn_prepacked", "mps", "mtia", "nnapi", "onednn", "onnx", "onnx_symbolic", "prepacked",
    "prim", "prims", "profiler", "quantization", "quantized", "quantized_decomposed", "rngprims", "sparse",
    "static_runtime", "streams", "symm_mem", "tensorexpr", "torch_attn", "triton", "xnnpack",
})  # fmt: skip
"""Namespaces of ops that come with PyTorch."""

_OWN = "trtbridge"  # ops here that do not ship are the package's own machinery


@dataclass(frozen=True)
class OpInfo:
    """A plugin op.

    Attributes:
        name: ``namespace::name``, with the overload where it is not the default.
        schema: arguments and results, as torch writes them.
        description: first sentence of its documentation; "" if it has none.
        shipped: whether it comes with trtbridge.
        place: Python file and line that registered it; "" if not known.
        devices: "cpu" and "cuda", as far as it has kernels for them.
    """

    name: str
    schema: str
    description: str
    shipped: bool
    place: str
    devices: tuple[str, ...]


def list_ops() -> tuple[OpInfo, ...]:
    """The ops that ship, then those registered in this process outside PyTorch's own namespaces, by name."""
    load_shipped()
    found = []
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full_name.partition("::")
        name = full_name.partition(".")[0]
        internal = namespace in TORCH_NAMESPACES or (namespace == _OWN and name not in SHIPPED)
        if rest and not internal and torch._C._dispatch_has_kernel(full_name):
            op = find_op(full_name)
            if isinstance(op, torch._ops.OpOverload):
                found.append(_info(op))
    return tuple(sorted(found, key=lambda op: (not op.shipped, op.name)))


def _info(op: torch._ops.OpOverload) -> OpInfo:
    name = op_name(op).removesuffix(".default")
    definition = torch._library.custom_ops.OPDEFS.get(name)
    function = getattr(definition, "_init_fn", None)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    description = inspect.getdoc(function) or ""
    module = f"{__package__}{SHIPPED[name]}" if name in SHIPPED else ""
    if not description and module:
        description = sys.modules[module].__doc__ or ""
    devices = tuple(
        device
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
        if torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), key)
    )
    place = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return OpInfo(name, str(op._schema), _sentence(description), name in SHIPPED, place, devices)


def _sentence(text: str) -> str:
    """The first sentence of a documentation string, on one line."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")
