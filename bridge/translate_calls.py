"""How torch.onnx translates ``trtbridge::call``: into a plugin node, with one translation for every op."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import evaluator

from ..nodes import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE
from ..plugins.registry import node_type
from .graft import CALL

_TENSOR_TYPES = tuple(
    f"tensor({name})"
    for name in (
        "float", "float16", "bfloat16", "double", "bool", "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64", "float8e4m3fn", "float8e5m2", "complex64", "complex128",
    )
)  # fmt: skip


def call_translation() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` that makes plugin nodes of ``trtbridge::call``."""
    return {CALL: _translate}


def _translate(op: str, template: str, tensors: Sequence[Any], numbers: Sequence[Any] = ()) -> list[Any]:
    outputs = json.loads(template)["outputs"]
    # Numbers that the graph computes are values here; those known by now are constants.
    inputs = [value if isinstance(value, ir.Value) else np.array(value, np.int64) for value in (*tensors, *numbers)]
    made = evaluator.default().eval(  # type: ignore[attr-defined]
        _node_schema(node_type(op), len(inputs), outputs), inputs, {OP_ATTRIBUTE: op, CALL_ATTRIBUTE: template}
    )
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _node_schema(name: str, inputs: int, outputs: int) -> onnx.defs.OpSchema:
    """A schema that fixes a plugin node's number of outputs; never registered, so nothing global changes."""
    schema = onnx.defs.OpSchema
    variadic = schema.FormalParameter(
        "inputs", "T", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False, min_arity=1
    )
    return schema(
        name,
        DOMAIN,
        1,
        inputs=[variadic] if inputs else [],
        outputs=[schema.FormalParameter(f"output{i}", f"T{i}") for i in range(outputs)],
        type_constraints=[
            (name, list(_TENSOR_TYPES), "") for name in (*(["T"] if inputs else []), *(f"T{i}" for i in range(outputs)))
        ],
        attributes=[
            schema.Attribute(OP_ATTRIBUTE, schema.AttrType.STRING),
            schema.Attribute(CALL_ATTRIBUTE, schema.AttrType.STRING),
        ],
    )
