"""Calls in an exported program become plugin nodes, one by one.

A call is replaced by ``trtbridge::call``, an op that does what the call does and that torch.onnx translates with one
translation, whatever op, however many results. So a call that ONNX or a backend cannot take leaves the others of its op
alone, and it stands for the op that the user called, not for what that op decomposes to.
"""

from __future__ import annotations

import copy
import json
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import CallMethodKey
from torch.utils._pytree import SequenceKey

from ..errors import PluginError
from ..plugins.calls import encode, stated_results
from ..plugins.registry import call_op, find_op, op_name
from ..plugins.sizes import names_in
from .shared_memory import refuse_written_view
from .subprogram import as_program_call

logger = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("trtbridge", "FRAGMENT")
_LIBRARY.define("call(str op, str template, Tensor[] tensors, SymInt[] numbers) -> Tensor[]")


def _fake_call(op: str, template: str, tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
    stated = stated_results(template)
    if stated is None:
        return _call(op, template, tensors, numbers)
    device = tensors[0].device if tensors else torch.device("cpu")
    new_size = torch.library.get_ctx().new_dynamic_size
    return [
        torch.empty([new_size() if size == "?" else size for size in shape], dtype=dtype, device=device)
        for shape, dtype in stated
    ]


def _call(op: str, template: str, tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
    device = tensors[0].device if tensors and '"borrowed":' not in template else None
    results = call_op(find_op(op), template, [*tensors, *numbers], device)
    # An op's results must not share memory with its inputs, and views may.
    return [torch.empty_like(r, memory_format=torch.contiguous_format).copy_(r) if r._is_view() else r for r in results]


torch.library.impl(_LIBRARY, "call", "CompositeExplicitAutograd")(_call)
torch.library.register_fake("trtbridge::call", _fake_call, lib=_LIBRARY)

CALL: torch._ops.OpOverload = torch.ops.trtbridge.call.default


def graft_calls(program: torch.export.ExportedProgram, names: Sequence[str]) -> torch.export.ExportedProgram:
    """A copy of an exported program in which some calls are ``trtbridge::call``.

    Args:
        program: not changed; its weights are shared.
        names: of fx nodes of the main graph.

    Raises:
        PluginError: a call has an argument that a plugin node cannot hold.
    """
    if not names:
        return program
    graph, wanted = _copied_graph(program), set(names)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.name in wanted:
            refuse_written_view(graph, node)
            _graft(graph, node)
    _stay_real(graph)
    copied = copy.copy(program)
    # Every GraphModule compiles its graph when it is made, which takes longer than all else here.
    copied._graph_module = torch.fx.GraphModule(program.graph_module, graph)
    copied._graph_module.meta = dict(program.graph_module.meta)
    return copied


def graft_problems(program: torch.export.ExportedProgram, names: Iterable[str]) -> dict[str, str]:
    """Why calls cannot be plugins, by their names; those that can be are not in it.

    Args:
        program: not changed.
        names: of fx nodes of the main graph.
    """
    graph, wanted = _copied_graph(program), set(names)
    own = {node.name: node for node in program.graph.nodes}
    found = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.name in wanted:
            name = node.name
            try:
                refuse_written_view(program.graph, own[name])  # without the copies that plugins before it return
                _graft(graph, node)
            except PluginError as error:
                found[name] = str(error)
    return found


def _copied_graph(program: torch.export.ExportedProgram) -> torch.fx.Graph:
    """A copy of a program's graph; the modules that it refers to are the program's own."""
    graph = torch.fx.Graph(owning_module=program.graph_module)
    renamed: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(program.graph_module.graph, renamed)
    graph.output(output)
    # Nodes keep their names, which the program's signature and our own messages use.
    for old, new in renamed.items():
        new.name, new.meta = old.name, dict(old.meta)
    old_output = next(node for node in program.graph_module.graph.nodes if node.op == "output")
    new_output = next(node for node in graph.nodes if node.op == "output")
    new_output.meta = dict(old_output.meta)
    graph._codegen = copy.deepcopy(program.graph_module.graph._codegen)
    return graph


def _stay_real(graph: torch.fx.Graph) -> None:
    """A complex result that is only wanted as pairs of reals never becomes complex: ONNX lacks half ones."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not aten.view_as_real.default:
            continue
        chain = [node]
        while chain[-1].args[0].target in (aten.resolve_conj.default, aten.resolve_neg.default):
            chain.append(chain[-1].args[0])
        chain.append(chain[-1].args[0])
        if chain[-1].target is aten.view_as_complex.default and not chain[-1].meta["val"].is_conj():
            node.replace_all_uses_with(chain[-1].args[0], propagate_meta=False)
            for part in chain:
                if not part.users:
                    graph.erase_node(part)


def _graft(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        with graph.inserting_before(node):
            node = as_program_call(graph, node)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target is CALL:
        raise PluginError(f"{node.name} calls {target}, which is no torch op and cannot be a plugin.")
    functional, written = _functional(target)
    tensors: list[torch.fx.Node] = []
    numbers: list[torch.fx.Node] = []
    symbols: dict[str, tuple[int, int]] = {}
    with graph.inserting_before(node):
        order = {other: index for index, other in enumerate(graph.nodes)}

        def place(value: Any) -> dict[str, Any] | None:
            if not isinstance(value, torch.fx.Node):
                return None
            fake = value.meta.get("val")
            if isinstance(fake, torch.Tensor):
                if fake.is_complex():
                    value = _insert(graph, torch.ops.aten.view_as_real.default, (value,), node)
                tensors.append(value)
                return {"complex" if fake.is_complex() else "tensor": len(tensors) - 1}
            if isinstance(fake, (int, float, bool, str)):
                return {"number": repr(fake)} if isinstance(fake, float) else _wrapped(fake)
            kind = "int" if isinstance(fake, torch.SymInt) else "float" if isinstance(fake, torch.SymFloat) else "bool"
            if isinstance(fake, torch.SymInt):
                if _bind(str(fake.node.expr), symbols, tensors, graph, node, order):
                    return {"sym": str(fake.node.expr)}
                numbers.append(value)
                return {kind: -len(numbers)}
            tensors.append(_insert(graph, torch.ops.aten.scalar_tensor.default, (value,), node))
            return {kind: len(tensors) - 1}

        random = torch.Tag.nondeterministic_seeded in target.tags
        template = encode(node.args, node.kwargs, place, number=len(order) if random else None)
        # Without a tensor among its inputs a call's results are outside of torch's functionalization, which then fails
        # over whatever is written to them; TensorRT, too, wants a plugin to have an input.
        lends = next((n for n in reversed(order) if n.op == "placeholder" and _is_real_tensor(n)), None)
        borrowed = not tensors and lends is not None
        if borrowed and lends is not None:
            tensors.append(lends)
        # Arguments that the op writes to are copied for it, and come back as more results.
        writes = [] if functional is not target else written
        targets: list[Any] = [node.args[index] for index in writes]
        own = [tensors.index(written_to) for written_to in targets]
        flat = _as_list(node.meta.get("val"))
        after = [written_to.meta["val"] for written_to in targets]
        template = _settle(template, len(tensors), symbols, len(flat) + len(after), own, borrowed)
        call = graph.call_function(CALL, (op_name(functional), template, list(tensors), list(numbers)))
        call.meta = {k: v for k, v in node.meta.items() if k not in ("val", "unbacked_bindings", "tensor_meta")}
        results, *changed = _unflatten(graph, call, [node.meta.get("val"), *after], node)
        call.meta["val"] = [*flat, *after]
        if node.meta.get("unbacked_bindings"):
            call.meta["unbacked_bindings"] = _bindings(node.meta["unbacked_bindings"], call.meta["val"])
        if functional is not target:
            results = _insert(graph, torch.ops.aten.copy_.default, (node.args[written[0]], results), node)
        for written_to, value in zip(targets, changed, strict=True):
            _insert(graph, torch.ops.aten.copy_.default, (written_to, value), node)
    name = node.name
    _replace(node, results)
    graph.erase_node(node)
    call.name = name


def _is_real_tensor(node: torch.fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and not fake.is_complex()


def _functional(op: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, list[int]]:
    """A variant of an op that changes no argument where there is one, and which arguments the original writes to."""
    written = [index for index, argument in enumerate(op._schema.arguments) if _is_written(argument)]
    if not written:
        return op, []
    base = op._schema.name.split("::")[1]
    # aten.add_ has aten.add; aten.normal_ has aten.normal_functional, since aten.normal means something else.
    names = (f"{base}functional", base.removesuffix("_")) if base.endswith("_") and len(written) == 1 else ()
    packets = [getattr(getattr(torch.ops, op.namespace), name, None) for name in names]
    variants = [getattr(packet, op._overloadname, None) for packet in packets if packet is not None]
    variant = next((v for v in variants if v is not None and not any(map(_is_written, v._schema.arguments))), op)
    if variant is op and any(result.alias_info is not None for result in op._schema.returns):
        raise PluginError(
            f"{op} changes its arguments in place and returns them, and no variant that does neither is known: it "
            "cannot be a plugin. Call such a variant, or register one with torch.library.custom_op(mutates_args=())."
        )
    return variant, written


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _bind(
    expression: str,
    symbols: dict[str, tuple[int, int]],
    tensors: list[torch.fx.Node],
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    order: Mapping[torch.fx.Node, int],
) -> bool:
    """Find for every symbol of a size a tensor that has it as a size; a tensor that the call lacks becomes an input."""
    found: dict[str, tuple[torch.fx.Node, int]] = {}
    if not names_in(expression):
        return False
    candidates = [*tensors, *(other for other in graph.nodes if order.get(other, len(order)) < order[node])]
    for name in names_in(expression) - symbols.keys():
        for other in candidates:
            fake = other.meta.get("val")
            if not isinstance(fake, torch.Tensor) or fake.is_complex():
                continue
            axes = [axis for axis, size in enumerate(fake.shape) if str(size) == name]
            if axes:
                found[name] = (other, axes[0])
                break
        else:
            return False
    for name, (other, axis) in found.items():
        if other not in tensors:
            tensors.append(other)
        symbols[name] = (tensors.index(other), axis)
    return True


def _settle(
    template: str,
    count: int,
    symbols: Mapping[str, tuple[int, int]],
    outputs: int,
    writes: Sequence[int],
    borrowed: bool,
) -> str:
    """Complete a template: numbers come after the tensors, whose count is known only now."""
    data = json.loads(template)

    def one(part: Any) -> Any:
        if isinstance(part, list):
            return [one(entry) for entry in part]
        if isinstance(part, dict):
            if isinstance(part.get("int"), int) and part["int"] < 0:
                return {"int": count - part["int"] - 1}
            return {key: one(entry) for key, entry in part.items()}
        return part

    data = one(data)
    if symbols:
        data["symbols"] = {name: list(source) for name, source in symbols.items()}
    data["outputs"] = outputs
    if writes:
        data["writes"] = list(writes)
    if borrowed:
        data["borrowed"] = True
    return json.dumps(data, separators=(",", ":"))


def _wrapped(value: Any) -> Any:
    raise PluginError(f"{value!r} is a constant that an fx node makes; torch.export is expected to write it out.")


def _insert(graph: torch.fx.Graph, op: Any, args: tuple[Any, ...], like: torch.fx.Node) -> torch.fx.Node:
    values = torch.fx.map_arg(args, lambda node: node.meta["val"])
    if op is torch.ops.aten.view_as_real.default and values[0].is_conj():
        args = (_insert(graph, torch.ops.aten.resolve_conj.default, args, like),)
        values = (args[0].meta["val"],)
    made = graph.call_function(op, args)
    made.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "from_node", "custom")}
    fake = next(
        (n.meta["val"].fake_mode for n in made.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if op is torch.ops.aten.copy_.default:
        # It returns what it writes to. Torch up to 2.11 asks of a size that depends on data whether it is 1, and fails.
        made.meta["val"] = values[0]
    elif fake is not None:
        with fake:
            made.meta["val"] = op(*values)
    return made


def _as_list(value: Any) -> list[Any]:
    """The results of a call as ``trtbridge::call`` returns them."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _as_list(part)]
    if value is None:
        return []
    if isinstance(value, torch.Tensor) and value.is_complex():
        with value.fake_mode:  # type: ignore[attr-defined]
            return [torch.view_as_real(value.resolve_conj())]
    return [value]


def _bindings(old: Mapping[Any, Any], results: Sequence[Any]) -> dict[Any, Any]:
    """Where each data-dependent size of a call stands among its flat results."""
    found: dict[Any, Any] = {}
    for symbol in old:
        for index, result in enumerate(results):
            axes = [axis for axis, size in enumerate(result.shape) if str(size) == str(symbol)]
            if axes:
                found[symbol] = (SequenceKey(index), CallMethodKey("size"), SequenceKey(axes[0]))
                break
        else:
            raise PluginError(
                f"The data-dependent size {symbol} is no dimension of a result, so the call is no plugin."
            )
    return found


def _unflatten(graph: torch.fx.Graph, call: torch.fx.Node, value: Any, like: torch.fx.Node) -> Any:
    """The structure that the call had, over elements of the flat list."""
    count = iter(range(1 << 30))

    def one(part: Any) -> Any:
        if isinstance(part, (tuple, list)):
            return [one(entry) for entry in part]
        if part is None:
            return None
        element = graph.call_function(operator.getitem, (call, next(count)))
        element.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "from_node")}
        element.meta["val"] = part
        if isinstance(part, torch.Tensor) and part.is_complex():
            element.meta["val"] = _as_list(part)[0]
            return _insert(graph, torch.ops.aten.view_as_complex.default, (element,), like)
        if not isinstance(part, torch.Tensor):
            raise PluginError(
                f"{like.target} returns a {type(part).__name__} among its results; a plugin returns tensors."
            )
        return element

    return one(value)


def _replace(node: torch.fx.Node, results: Any) -> None:
    """Let the readers of a call read its results instead."""
    if isinstance(results, torch.fx.Node):
        node.replace_all_uses_with(results, propagate_meta=False)
        return
    for user in list(node.users):
        if user.target is operator.getitem and user.args[0] is node:
            chosen = None if results is None else results[user.args[1]]
            _replace(user, chosen)
            user.graph.erase_node(user)
        else:

            def swap(part: Any) -> Any:
                if part is node:
                    return results
                if isinstance(part, (list, tuple)):
                    return type(part)(swap(entry) for entry in part)
                return part

            user.args = tuple(swap(part) for part in user.args)
            user.kwargs = {name: swap(part) for name, part in user.kwargs.items()}


def opaque_calls(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Calls that are plugins since the trace: functions that torch.export cannot look into."""
    return {
        node.name: "torch.export cannot look into it: what it does depends on values"
        for node in program.graph_module.graph.nodes
        if node.op == "call_function" and node.target is CALL
    }
