"""Which calls of an exported program torch.onnx cannot translate, found before exporting and from its errors."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch

from .corrected_translations import CORRECTED
from .graft import CALL
from .model import origin_of
from .translations import translations

# A line of the stack trace by which a node of the decomposed program tells which call it comes from. Decomposing keeps
# stack traces and nothing else that the exporter hands on.
_MARK = '\n  File "<trtbridge>", line 0, in {}\n'
_MARKED = re.compile(r'\n  File "<trtbridge>", line 0, in ([^\n]*)\n')
_TRANSLATING = re.compile(r"Error when translating node %(\w+)")
_EXECUTING = re.compile(r"While executing %(\w+)")
_NO_FUNCTION = "torch.onnx has no translation for {}"


def mark_calls(program: torch.export.ExportedProgram) -> None:
    """Write every call's name into its stack trace; calls inside a condition or loop get the name of that one."""
    for node in call_nodes(program.graph_module):
        node.meta["stack_trace"] = strip_mark(node.meta.get("stack_trace") or "") + _MARK.format(node.name)
        for inner in _inner_nodes(program.graph_module, node):
            inner.meta["stack_trace"] = strip_mark(inner.meta.get("stack_trace") or "") + _MARK.format(node.name)


def marked_call(stack_trace: str | None) -> str:
    """The call that a stack trace is marked with; "" for none."""
    found = _MARKED.findall(stack_trace or "")
    return found[-1] if found else ""


def strip_mark(stack_trace: str) -> str:
    """A stack trace without our mark."""
    return _MARKED.sub("", stack_trace)


def random_calls(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Calls that draw random numbers: as plugins they draw from torch's generator, as the module does."""
    found = {}
    for node in call_nodes(program.graph_module):
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            given = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | node.kwargs
            training = given.get("train", given.get("training"))
            if training is False or given.get("dropout_p", given.get("dropout", 1)) == 0:
                continue  # a dropout that drops nothing
            if "dropout_p" in {a.name for a in node.target._schema.arguments} and "dropout_p" not in given:
                continue  # attention's default is none
            found[node.name] = "it draws from torch's random generator"
    return found


class UntranslatableError(Exception):
    """Calls that the exporter neither translates nor decomposes into what it translates.

    Attributes:
        calls: the reason by name of the call.
    """

    def __init__(self, calls: dict[str, str]) -> None:
        super().__init__(f"torch.onnx cannot translate {', '.join(calls)}")
        self.calls = calls


@dataclass
class Decomposition:
    """What the exporter decomposed a program into: decomposing takes a good part of its time, so that it is done once.

    Attributes:
        program: the result; None as long as it was not made. The exporter goes on to change it.
    """

    program: torch.export.ExportedProgram | None = None


@contextlib.contextmanager
def refuse_untranslatable(
    program: torch.export.ExportedProgram, opset: int, possible: Callable[[dict[str, str]], dict[str, str]]
) -> Iterator[Decomposition]:
    """While this lasts, the exporter ends as soon as it has decomposed a program into what it cannot translate.

    So all such calls are known at once, rather than the first that it comes to.

    Args:
        program: marked (`mark_calls`).
        opset: ONNX opset.
        possible: of the calls found those for which it is to end.

    Raises:
        UntranslatableError: from inside the exporter, which raises its own error from it.
    """
    found = Decomposition()
    decompose = program.run_decompositions

    def decompose_and_look(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        found.program = decompose(*args, **kwargs)
        calls = possible(find_untranslatable(found.program, opset))
        if calls:
            raise UntranslatableError(calls)
        return found.program

    vars(program)["run_decompositions"] = decompose_and_look  # of this one object
    try:
        yield found
    finally:
        del vars(program)["run_decompositions"]


def find_untranslatable(decomposed: torch.export.ExportedProgram, opset: int) -> dict[str, str]:
    """Calls that the exporter does not translate.

    Args:
        decomposed: by the exporter, of a program that was marked (`mark_calls`).
        opset: ONNX opset.

    Returns:
        The reason by name of the call.
    """
    from torch.onnx._internal.exporter import _dispatching  # no public view of it exists

    registry = translations(opset)
    found: dict[str, str] = {}
    for node in _all_calls(decomposed.graph_module):
        # Calls of Python's own operators are arithmetic over sizes, and assertions are left out.
        if not isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)) or _is_dropped(node):
            continue
        known = node.target is CALL or node.target in CORRECTED
        if known or _dispatching.dispatch(node, registry)[0] is not None:
            continue
        name = marked_call(node.meta.get("stack_trace"))
        if name:
            found.setdefault(name, _NO_FUNCTION.format(node.target))
    return found


def blamed_calls(
    error: BaseException, program: torch.export.ExportedProgram, opset: int, decomposed: Decomposition
) -> dict[str, str]:
    """The calls that an export failure is about, with the exporter's words.

    The exporter names nodes of the decomposed program, or of the program itself where decomposing fails.
    """
    executing: dict[str, str] = {}
    translating: dict[str, str] = {}
    cause: BaseException | None = error
    words = str(error)
    while cause is not None:
        if isinstance(cause, UntranslatableError):
            return cause.calls
        words = str(cause).strip()
        executing.update((name, words) for name in _EXECUTING.findall(words))
        translating.update((name, words) for name in _TRANSLATING.findall(words))
        cause = cause.__cause__
    last = next((line.strip() for line in words.splitlines() if line.strip()), type(error).__name__)
    reason = f"torch.onnx fails on it: {last[:300]}"
    if decomposed.program is None:
        own = {node.name for node in call_nodes(program.graph_module)}
        found = {name: reason for name in executing if name in own}
    else:
        # A node of the decomposed program may have the name of some other call. Names of translations are those after
        # type promotion, which gives a node a new name that begins with the old one.
        named = {**executing, **translating}
        nodes = list(_all_calls(decomposed.program.graph_module))
        failed = [node for node in nodes if node.name in named] or [
            node for node in nodes if any(name.startswith(f"{node.name}_") for name in named)
        ]
        found = {call: reason for node in failed if (call := marked_call(node.meta.get("stack_trace")))}
    if found:
        return found
    # The exporter fails without naming a call: those that are not translated as they stand come into question.
    registry = translations(opset)
    return {
        node.name: reason
        for node in call_nodes(program.graph_module)
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target is not CALL
        and not registry.is_registered(node.target)
        and not _is_dropped(node)
    }


def alike_calls(program: torch.export.ExportedProgram, calls: Mapping[str, str]) -> dict[str, str]:
    """These calls and those that do the same to tensors of the same ranks and dtypes: they fail for the same reason."""

    def kind(node: torch.fx.Node) -> str:
        def one(value: Any) -> str:
            if isinstance(value, torch.fx.Node):
                fake = value.meta.get("val")
                return f"{fake.dtype}{fake.ndim}" if isinstance(fake, torch.Tensor) else type(fake).__name__
            if isinstance(value, (list, tuple)):
                return "[" + ",".join(map(one, value)) + "]"
            return repr(value)

        return f"{node.target}({one(node.args)}, {[(name, one(value)) for name, value in node.kwargs.items()]})"

    kinds = {node.name: kind(node) for node in call_nodes(program.graph_module)}
    reasons = {kinds[call]: reason for call, reason in calls.items() if call in kinds}
    return {name: reasons[each] for name, each in kinds.items() if each in reasons} | dict(calls)


def sharing_calls(
    program: torch.export.ExportedProgram, refused: Mapping[str, str], made: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Calls that share a refused node with the call that it is named after.

    Equal nodes of several calls become one, which is the first call's. Without that call each of the others has one of
    its own, refused like the first.

    Args:
        program: marked (`mark_calls`).
        refused: by call the op type of its refused node.
        made: call and op type of every node of the graph.

    Returns:
        By call the refused call with which it shares a node: it is the same op on tensors of the same ranks and dtypes,
        but has no node of that type.
    """
    own = set(made)
    found: dict[str, str] = {}
    for call, op_type in refused.items():
        for other in alike_calls(program, {call: ""}):
            if other not in refused and (other, op_type) not in own:
                found[other] = call
    return found


def reading_calls(
    program: torch.export.ExportedProgram, nodes: Sequence[onnx.NodeProto], refused: Mapping[str, str]
) -> dict[str, str]:
    """Calls, of whatever op, that read what a refused node makes on its way to the result of another call.

    Equal nodes of several calls become one, which is the first call's; that one is a plugin next, and then the others
    have such a node of their own. (Indices by one mask, in a read and in a write, share its NonZero.)

    Args:
        program: marked (`mark_calls`).
        nodes: of the graph, in order.
        refused: by name of a refused node the call that it belongs to.

    Returns:
        By call the refused one that it shares a node with.
    """
    calls = {node.name: node for node in program.graph.nodes}
    found: dict[str, str] = {}
    # Who reads what a call writes to, or a view of it, stands in no edge of the program.
    owners = {call for call in refused.values() if call in calls and _makes_its_own(calls[call])}
    after = {owner: _descendants(calls[owner]) for owner in owners}
    inner: dict[str, set[str]] = {owner: set() for owner in owners}  # tensors from the refused node to the result
    for node in nodes:
        call = origin_of(node).call
        for owner in owners:
            reads = not inner[owner].isdisjoint(node.input)
            if refused.get(node.name) == owner or (reads and call == owner):
                results = {owner, *(user.name for user in calls[owner].users if user.target is operator.getitem)}
                inner[owner].update(name for name in node.output if name and name not in results)
            elif reads and call in calls and call not in owners and calls[call] not in after[owner]:
                found.setdefault(call, owner)
    return found


def _makes_its_own(node: torch.fx.Node) -> bool:
    """Whether a call's results are new tensors, and it writes to none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return all(each.alias_info is None for each in (*schema.arguments, *schema.returns))


def _descendants(node: torch.fx.Node) -> set[torch.fx.Node]:
    """All that a call's result goes into."""
    found: set[torch.fx.Node] = set()
    pending = [node]
    while pending:
        users = pending.pop().users.keys() - found
        found |= users
        pending += users
    return found


def forget_pending_sizes(program: torch.export.ExportedProgram) -> None:
    """Drop data-dependent sizes that a translation left unassigned: torch takes them for the next kernel's mistake."""
    for node in program.graph.nodes:
        shape_env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if shape_env is not None:
            shape_env.pending_fresh_unbacked_symbols.clear()
            return


def call_nodes(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """The calls of a graph that stand for an op (element accesses do not)."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            yield node


def _all_calls(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from call_nodes(part)


def _inner_nodes(module: torch.fx.GraphModule, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Every node of the graphs that a higher-order op is called with."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            inner = getattr(module, str(argument.target), None)
            if isinstance(inner, torch.fx.GraphModule):
                for part in inner.modules():
                    if isinstance(part, torch.fx.GraphModule):
                        yield from (n for n in part.graph.nodes if n.op == "call_function")


def _is_dropped(node: torch.fx.Node) -> bool:
    """Assertions, which the exporter leaves out."""
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name
