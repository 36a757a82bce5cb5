"""Ops that torch.onnx cannot translate become plugin nodes, through a translation table made on the fly."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import evaluator

from ..plugins.calls import encode
from ..plugins.registry import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE, node_type, op_name
from .dtypes import to_torch

logger = logging.getLogger(__name__)

_TENSOR_TYPES = tuple(
    f"tensor({name})"
    for name in (
        "float", "float16", "bfloat16", "double", "bool", "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64", "float8e4m3fn", "float8e5m2", "complex64", "complex128",
    )
)  # fmt: skip
_NO_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")


def find_untranslatable(program: torch.export.ExportedProgram, opset: int) -> set[torch._ops.OpOverload]:
    """Ops of an exported program that the exporter neither translates nor decomposes: users' custom ops among them."""
    from torch.onnx._internal.exporter import _registration  # no public view of the registry exists

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    decompositions = torch.export.default_decompositions()
    found = set()
    for op in _ops_of(program):
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        if not registry.is_registered(op) and op not in decompositions and not composite:
            found.add(op)
    return found


def blamed_ops(error: BaseException, program: torch.export.ExportedProgram) -> set[torch._ops.OpOverload]:
    """The ops of the program that an export failure is about: those called, not what they decompose to.

    The exporter's message names an op of the decomposed graph; its ``from_node`` history names the call that the user
    wrote.
    """
    named: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        named |= {f"{name.replace('::', '.')}.{overload}" for name, overload in _NO_FUNCTION.findall(str(cause))}
        cause = cause.__cause__
    if not named:
        return set()
    called = {str(op): op for op in _ops_of(program)}
    found = {called[name] for name in named if name in called}
    if len(found) < len(named):
        from torch.onnx._internal.exporter import _decomp, _registration

        registry = _registration.ONNXRegistry.from_torchlib()
        table = _decomp.create_onnx_friendly_decomposition_table(
            set(_decomp.get_onnx_implemented_overloads(registry)) | set(found)
        )
        originals = {n.name: n.target for n in _call_nodes(program) if isinstance(n.target, torch._ops.OpOverload)}
        for node in _call_nodes(program.run_decompositions(table)):
            if str(node.target) in named:
                history = [source.name for source in _history(node)]
                found |= {originals[name] for name in history if name in originals}
    return found


def translation_table(
    ops: Iterable[torch._ops.OpOverload], program: torch.export.ExportedProgram
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """A ``custom_translation_table`` that turns each op into a plugin node."""
    counts: dict[Any, set[int]] = {}
    for node in _call_nodes(program):
        value = node.meta.get("val")
        counts.setdefault(node.target, set()).add(len(value) if isinstance(value, (tuple, list)) else 1)
    return {op: _translator(op, max(counts.get(op, {1}))) for op in ops}


def _translator(op: torch._ops.OpOverload, outputs: int) -> Callable[..., Any]:
    schema = _node_schema(op, outputs)
    arguments = list(op._schema.arguments)

    def translate(*args: Any, **kwargs: Any) -> Any:
        by_name = {argument.name: argument for argument in arguments}
        restored = [_restore(value, argument) for value, argument in zip(args, arguments, strict=False)]
        restored_kwargs = {name: _restore(value, by_name[name]) for name, value in kwargs.items() if name in by_name}
        tensors, call = encode(op, restored, restored_kwargs, lambda value: isinstance(value, ir.Value))
        return evaluator.default().eval(  # type: ignore[attr-defined]
            schema, tensors, {OP_ATTRIBUTE: op_name(op), CALL_ATTRIBUTE: call}
        )

    return translate


def _restore(value: Any, argument: Any) -> Any:
    """Undo the exporter's own encoding of dtypes (as ONNX numbers), devices, layouts and formats (as text)."""
    kind = str(argument.real_type)
    if "ScalarType" in kind and isinstance(value, int):
        return None if value < 0 else to_torch(ir.DataType(value))
    if "Device" in kind and isinstance(value, str):
        return torch.device(value)
    if ("Layout" in kind or "MemoryFormat" in kind) and isinstance(value, str):
        return getattr(torch, value.removeprefix("torch."))
    return value


def _node_schema(op: torch._ops.OpOverload, outputs: int) -> onnx.defs.OpSchema:
    """A schema that fixes a plugin node's number of outputs; never registered, so nothing global changes."""
    schema = onnx.defs.OpSchema
    variadic = schema.FormalParameter(
        "inputs", "T", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False, min_arity=0
    )
    return schema(
        node_type(op),
        DOMAIN,
        1,
        inputs=[variadic],
        outputs=[schema.FormalParameter(f"output{i}", f"T{i}") for i in range(outputs)],
        type_constraints=[(name, list(_TENSOR_TYPES), "") for name in ("T", *(f"T{i}" for i in range(outputs)))],
        attributes=[
            schema.Attribute(OP_ATTRIBUTE, schema.AttrType.STRING),
            schema.Attribute(CALL_ATTRIBUTE, schema.AttrType.STRING),
        ],
    )


def _call_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [node for module in modules for node in module.graph.nodes if node.op == "call_function"]


def _ops_of(program: torch.export.ExportedProgram) -> set[torch._ops.OpOverload]:
    return {node.target for node in _call_nodes(program) if isinstance(node.target, torch._ops.OpOverload)}


def _history(node: torch.fx.Node) -> list[Any]:
    sources, pending = [], list(node.meta.get("from_node", ()))
    while pending:
        source = pending.pop()
        sources.append(source)
        pending += source.from_node
    return sources
