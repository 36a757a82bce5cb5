"""Compute what does not depend on the inputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from .evaluate import Evaluator
from .exchange import stand_in_name
from .partial_shapes import PartialShapes
from .pipeline import Notes, Pass
from .surgery import (
    adopt_info,
    become,
    bodies,
    element_type,
    is_standard,
    nbytes,
    output_ids,
    redirect,
    release_outputs,
    remove_nodes,
    scopes,
    set_output,
)  # fmt: skip

_NEVER = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout",
    # Folding these would undo a quantization.
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
}  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold nodes whose inputs are constants, and shapes that are fixed.

    ::

        y = Add(x, Sqrt(two))                    y = Add(x, 1.414)
        r = Reshape(x, Concat(Shape(x)[0], 4))   r = Reshape(x, [2, 4])       where x is (2, ?) float
        y = If(true, then=A, else=B)             A's nodes

    Constant nodes become initializers. ``Shape`` folds where what is used of it is known, so a partly dynamic shape
    does too. Numbers come from ONNX Runtime, for types that NumPy lacks from ONNX's reference implementation. Random
    ops, quantization, plugin nodes and the transposes of weights stay. A folded output of the graph keeps its name
    behind an Identity.

    Attributes:
        size_limit_bytes: a result larger than this is folded only if it is no larger than the constants that vanish
            with it, and weights larger than this are never read: the model does not grow, and weights stay shared with
            the torch module.
    """

    size_limit_bytes: int = 1 << 20

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        evaluator = Evaluator(notes.opset)
        shapes = PartialShapes(notes)
        count, names = 0, None
        pending = [graph]
        while pending:
            scope = pending.pop()
            outputs = output_ids(scope)
            result: list[gs.Node] = []
            dead: list[gs.Node] = []
            queue = scope.nodes[::-1]
            while queue:
                node = queue.pop()
                result.append(node)
                if is_standard(node, "If") and isinstance(node.inputs[0], gs.Constant):
                    names = _tensor_names(graph) if names is None else names
                    inlined = _inline_branch(node, outputs, notes, names)
                    queue.extend(reversed(inlined))
                    dead.append(node)
                    count += 1
                    continue
                if bodies(node) or not is_standard(node) or node.op in _NEVER:
                    continue
                if node.op == "Identity":
                    adopt_info(node.outputs[0], node.inputs[0])
                if node.op == "CastLike" and isinstance(node.inputs[0], gs.Constant) and element_type(node.inputs[1]):
                    target = element_type(node.inputs[1])
                    become(node, "Cast", [node.inputs[0]])
                    node.attrs["to"] = target
                    count += 1
                values = self._fold(node, outputs, notes, evaluator, shapes)
                if values is None:
                    continue
                count += 1
                dead.append(node)
                for tensor, value in zip(release_outputs(node), values, strict=True):
                    if tensor.name and (tensor.outputs or id(tensor) in outputs):
                        result.extend(_replace(tensor, value, scope is graph, outputs, notes))
            scope.nodes = result
            remove_nodes(scope, dead)
            pending.extend(body for node in scope.nodes for body in bodies(node))
        return count

    def _fold(
        self, node: gs.Node, outputs: set[int], notes: Notes, evaluator: Evaluator, shapes: PartialShapes
    ) -> list[np.ndarray | gs.Constant] | None:
        """The values of a node's outputs; None where it stays."""
        feeds_output = any(id(tensor) in outputs for tensor in node.outputs)
        if node.op == "Constant":
            value = None if feeds_output else _constant_value(node)
            return None if value is None else [value]
        if node.op == "Identity" and isinstance(node.inputs[0], gs.Constant):
            return None if feeds_output else [node.inputs[0]]
        known = shapes.value(node)
        if known is not None:
            return [known]
        constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
        if not constants or len(constants) < sum(1 for tensor in node.inputs if tensor.name):
            return None
        weights = [tensor for tensor in {id(t): t for t in constants}.values() if stand_in_name(tensor) is not None]
        if weights and node.op == "Transpose":
            # A copy of a weight is saved. And TensorRT-RTX 1.6.1 reads beyond its memory for some products with weights
            # that are transposed already: the Whisper encoder at batch 32 came out with a cosine of 0.86.
            notes.refused(node, "it would copy a weight; the backend folds it")
            return None
        if sum(map(nbytes, weights)) > self.size_limit_bytes:
            notes.refused(node, f"it would copy {sum(map(nbytes, weights)):,} bytes of weights; the backend folds it")
            return None
        vanishing = sum(nbytes(t) for t in {id(t): t for t in constants}.values() if all(n is node for n in t.outputs))
        limit = max(self.size_limit_bytes, vanishing)
        expected = evaluator.predict_bytes(node, notes, limit)
        if expected > limit:
            notes.refused(node, f"its result would have {expected:,} bytes, the limit is {limit:,}")
            return None
        values = evaluator.run(node, [notes.values(t) if isinstance(t, gs.Constant) else None for t in node.inputs])
        if isinstance(values, str):
            notes.refused(node, values)
            return None
        size = sum(value.nbytes for value in values)
        if size > limit:
            notes.refused(node, f"its result has {size:,} bytes, the limit is {limit:,}")
            return None
        return list(values)


def _replace(
    tensor: gs.Variable, value: np.ndarray | gs.Constant, in_main: bool, outputs: set[int], notes: Notes
) -> list[gs.Node]:
    """Let consumers of a folded tensor read its value; the Identity that keeps an output's name, if one must."""
    constant = value if isinstance(value, gs.Constant) else gs.Constant("", value)
    is_output = id(tensor) in outputs
    if not constant.name:
        # Constants of subgraphs move to the main graph, where a sibling's tensor may have the same name.
        constant.name = tensor.name if in_main and not is_output else notes.fresh_name(f"{tensor.name}_value")
    if is_output:
        return [gs.Node("Identity", inputs=[constant], outputs=[tensor])]
    redirect(tensor, constant)
    return []


def _constant_value(node: gs.Node) -> gs.Constant | np.ndarray | None:
    """The value of a Constant node; None for texts and sparse tensors, which stay."""
    match list(node.attrs.items()):
        case [("value", gs.Constant() as tensor)]:
            return gs.Constant("", tensor._values)
        case [("value_float" | "value_floats", number)]:
            return np.array(number, np.float32)
        case [("value_int" | "value_ints", number)]:
            return np.array(number, np.int64)
    return None


def _tensor_names(graph: gs.Graph) -> Counter[str]:
    """How many different tensors have each name: sibling branches may use the same ones."""
    seen = {
        id(tensor): tensor.name
        for scope in scopes(graph)
        for node in scope.nodes
        for tensor in (*node.inputs, *node.outputs)
    }
    return Counter(seen.values())


def _inline_branch(node: gs.Node, outputs: set[int], notes: Notes, names: Counter[str]) -> list[gs.Node]:
    """The nodes of the branch that an If with a constant condition takes, rewired to make the If's outputs."""
    taken = "then_branch" if bool(np.asarray(notes.values(node.inputs[0])).all()) else "else_branch"
    branch = node.attrs.pop(taken)
    own = {id(inner) for inner in branch.nodes}
    for inner in branch.nodes:
        for tensor in (*inner.inputs, *inner.outputs):
            if (
                names[tensor.name] > 1
                and tensor.name
                and (isinstance(tensor, gs.Constant) or any(id(maker) in own for maker in tensor.inputs))
            ):
                names[tensor.name] -= 1
                tensor.name = notes.fresh_name(tensor.name)
    extra: list[gs.Node] = []
    bound: dict[int, gs.Tensor] = {}
    for outer, inner in zip(release_outputs(node), branch.outputs, strict=True):
        if not outer.name:
            continue
        adopt_info(outer, inner)
        maker = next((candidate for candidate in inner.inputs if id(candidate) in own), None)
        if maker is not None and id(inner) not in bound:
            set_output(maker, next(i for i, tensor in enumerate(maker.outputs) if tensor is inner), outer)
            redirect(inner, outer)
            bound[id(inner)] = outer
        elif id(outer) in outputs:
            extra.append(gs.Node("Identity", inputs=[bound.get(id(inner), inner)], outputs=[outer]))
        else:
            redirect(outer, bound.get(id(inner), inner))
    return [*branch.nodes, *extra]
