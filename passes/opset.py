"""A newer opset for a model, where it means the same."""

from __future__ import annotations

import onnx

CHANGED: dict[str, int] = {"DFT": 20, "GridSample": 20, "GroupNormalization": 21}
"""Ops whose nodes mean something else, or nothing, from an opset on; between 18 and 23 all others only learnt more."""

OLDEST, NEWEST = 18, 23
"""Between which opsets that has been looked at."""


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the standard operators."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def raise_opset(proto: onnx.ModelProto, version: int) -> onnx.ModelProto | str:
    """The model in a newer opset, its nodes unchanged; or words about what would mean something else there.

    Args:
        proto: the model; it is not changed.
        version: at most `NEWEST`.
    """
    has = opset_of(proto)
    if has >= version:
        return proto
    if has < OLDEST or version > NEWEST:
        return f"nodes of opset {has} may mean something else in opset {version}"
    graphs = [proto.graph, *proto.functions]
    while graphs:
        for node in graphs.pop().node:
            if node.domain in ("", "ai.onnx") and has < CHANGED.get(node.op_type, 0) <= version:
                return f"{node.op_type} of opset {has} means something else in opset {version}"
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            graphs += [g for a in node.attribute for g in a.graphs]
    raised = onnx.ModelProto()
    raised.CopyFrom(proto)
    for entry in (*raised.opset_import, *(o for function in raised.functions for o in function.opset_import)):
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    # Opset 23 came with version 11 of the format.
    raised.ir_version = max(raised.ir_version, 11 if version >= 23 else raised.ir_version)
    return raised
