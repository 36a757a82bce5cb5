"""What must hold before and after every pass. All of it is linear in the size of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from .exchange import stand_in_name
from .surgery import STANDARD_DOMAINS, bodies, describe, element_type, type_name

Boundary = tuple[tuple[str, int, tuple[Any, ...] | None], ...]
"""Name, element type and shape of each input or output."""


def boundary(tensors: Sequence[gs.Tensor]) -> Boundary:
    """What must stay the same about inputs or outputs."""
    return tuple(
        (tensor.name, element_type(tensor), None if tensor.shape is None else tuple(tensor.shape)) for tensor in tensors
    )


def boundary_fault(kind: str, before: Boundary, after: Boundary, dtypes_may_change: bool) -> str | None:
    """What is wrong with the inputs (`kind` is "input") or outputs after a pass; None if nothing is.

    A type or size that was not known before may be known after.
    """
    names_before, names_after = [item[0] for item in before], [item[0] for item in after]
    if names_before != names_after:
        return f"the model's {kind}s are {names_after}, they were {names_before}"
    for (name, element, shape), (_, element_after, shape_after) in zip(before, after, strict=True):
        if not _agrees(shape, shape_after):
            return f"{kind} {name!r} has shape {shape_after}, it had {shape}"
        if element not in (element_after, 0) and not dtypes_may_change:
            return f"{kind} {name!r} is {type_name(element_after)}, it was {type_name(element)}"
    return None


def _agrees(before: tuple[Any, ...] | None, after: tuple[Any, ...] | None) -> bool:
    """Whether a shape is the one before, or says more where that said nothing."""
    if before is None or after is None:
        return before is None
    return len(before) == len(after) and all(old in (new, None) for old, new in zip(before, after, strict=True))


def graph_fault(graph: gs.Graph) -> str | None:
    """What is wrong with the structure of a graph; None if nothing is.

    Names are unique, every tensor is made before it is read (subgraphs see what their outer graph has made so far),
    the links from tensors to producers are right, outputs exist, and every domain in use is imported.
    """
    domains = {imported.domain for imported in graph.import_domains or []}
    if not domains.isdisjoint(STANDARD_DOMAINS):
        domains.update(domain for domain in STANDARD_DOMAINS if domain is not None)
    return _scope_fault(graph, {}, domains, is_main=True)


def _scope_fault(scope: gs.Graph, visible: dict[str, gs.Tensor], domains: set[str], is_main: bool) -> str | None:
    added: list[str] = []

    def define(tensor: gs.Tensor, what: str | gs.Node) -> str | None:
        if tensor.name in visible:
            second = what if isinstance(what, str) else f"an output of {describe(what)}"
            return f"two tensors are named {tensor.name!r}; the second is {second}"
        visible[tensor.name] = tensor
        added.append(tensor.name)
        return None

    def read(tensor: gs.Tensor, reader: str | gs.Node) -> str | None:
        known = visible.get(tensor.name)
        if known is tensor:
            return None
        if known is None and isinstance(tensor, gs.Constant):
            return define(tensor, "an initializer")
        what = reader if isinstance(reader, str) else describe(reader)
        if known is None:
            return f"tensor {tensor.name!r} is read by {what} before anything makes it"
        return f"two tensors are named {tensor.name!r}; one of them is read by {what}"

    def check() -> str | None:
        for tensor in scope.inputs:
            if fault := define(tensor, "a graph input"):
                return fault
        for node in scope.nodes:
            if (node.domain or "") not in domains:
                return f"{describe(node)}: the model imports no opset of domain {node.domain!r}"
            for tensor in node.inputs:
                if tensor.name and (fault := read(tensor, node)):
                    return fault
            for body in bodies(node):
                if fault := _scope_fault(body, visible, domains, is_main=False):
                    return fault
            for tensor in node.outputs:
                if not tensor.name:
                    continue
                if isinstance(tensor, gs.Constant):
                    return f"tensor {tensor.name!r} is a constant and the output of {describe(node)}"
                if len(tensor.inputs) != 1 or tensor.inputs[0] is not node:
                    return f"tensor {tensor.name!r} is an output of {describe(node)}, but its links say otherwise"
                if fault := define(tensor, node):
                    return fault
        for tensor in scope.outputs:
            if fault := read(tensor, "the outputs"):
                return fault
        names = [tensor.name for tensor in scope.outputs]
        if is_main and len(set(names)) < len(names):
            return f"an output appears twice among {names}"
        return None

    fault = check()
    for name in added:
        del visible[name]
    return fault


def onnx_fault(proto: onnx.ModelProto) -> str | None:
    """What `onnx.checker` says against a model whose weights are stand-ins; None if nothing.

    It would look for the stand-ins' file, so it sees them as graph inputs. Ops of unregistered domains pass.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _declare_stand_ins(copy.graph)
    try:
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        return str(error).strip().split("\n")[0]
    return None


def _declare_stand_ins(graph: onnx.GraphProto) -> None:
    initializers = list(graph.initializer)
    graph.ClearField("initializer")
    inputs = {value.name for value in graph.input}
    for tensor in initializers:
        if stand_in_name(tensor) is None:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
