"""Decides, node by node, what of a float32 graph will work in 16 bits."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import onnx_graphsurgeon as gs

from .pipeline import Notes
from .precision_rules import (
    BOUNDED,
    BOUNDS,
    COMPUTE,
    EXACT_INPUTS,
    FOLLOW,
    GROWING,
    INTEGER_TYPES,
    INTEGERS,
    MOST_SUMMED,
    MOVE,
    SUMMING,
    TARGETS,
    count_summed,
    is_cast,
    is_constant,
    is_float32,
    is_outer,
    misfit,
    positions,
)
from .surgery import bodies, element_type, is_standard, output_ids, scopes, type_name


class Role(enum.Enum):
    """What the type of a node depends on."""

    COMPUTE = "16 bits"
    FOLLOW = "16 bits where an input has them"
    MOVE = "whatever gives the fewest casts"
    KEEP = "float32"


@dataclass(frozen=True)
class Decision:
    """What becomes of a graph.

    Attributes:
        half: nodes that will work in 16 bits, by ``id()``.
        reasons: why nodes stay in float32, by ``id()``; those without an entry do because what is around them does.
        huge: tensors that may hold finite numbers beyond the range of the 16 bits (masks), by ``id()``.
    """

    half: frozenset[int]
    reasons: Mapping[int, str]
    huge: frozenset[int]


@dataclass
class Judge:
    """Decides on every node of a main graph.

    Attributes:
        graph: in topological order.
        notes: gives the values of constants.
        target: the 16-bit element type.
        keep: names of nodes, or of tensors that they make, which stay in float32, with the reason.
        wide: names of tensors whose values need float32, with the reason.
        sensitive: op types that stay in float32, with the reason.
    """

    graph: gs.Graph
    notes: Notes
    target: int
    keep: Mapping[str, str]
    wide: Mapping[str, str]
    sensitive: Mapping[str, str]
    reasons: dict[int, str] = field(default_factory=dict)
    _roles: dict[int, Role] = field(default_factory=dict)
    _huge: set[int] = field(default_factory=set)
    _constants: dict[int, tuple[bool, str]] = field(default_factory=dict)

    def decide(self) -> Decision:
        """Roles by op, then what must stay after all, then the nodes that follow their neighbours."""
        for node in self.graph.nodes:
            self._judge(node)
        self._keep_coordinates()
        self._keep_exact_inputs()
        self._keep_islands()
        return Decision(frozenset(self._assign()), self.reasons, frozenset(self._huge))

    # What one node says by itself

    def _judge(self, node: gs.Node) -> None:
        if is_cast(node):
            # One to 16 bits is merged with what its input becomes.
            follows = is_float32(node.inputs[0]) and node.attrs.get("to") not in TARGETS.values()
            follows = follows and not self._asked(node) and not self._measured(node)
            self._roles[id(node)] = Role.FOLLOW if follows else Role.KEEP
            self._spread_huge(node)
            return
        self._roles[id(node)] = self._role(node)
        if not any(is_float32(tensor) for tensor in (*node.inputs, *node.outputs)):
            return
        if reason := self._asked(node) or self._refusal(node) or self._unfit_constant(node):
            self._stay(node, reason)
        self._spread_huge(node)
        if reason := self._measured(node):
            self._stay(node, reason)

    def _stay(self, node: gs.Node, reason: str) -> None:
        self._roles[id(node)] = Role.KEEP
        if not is_cast(node):
            self.reasons.setdefault(id(node), reason)

    def _role(self, node: gs.Node) -> Role:
        if not is_standard(node) or bodies(node):
            return Role.KEEP
        if node.op in COMPUTE:
            return Role.COMPUTE
        if node.op in MOVE:
            return Role.MOVE
        return Role.FOLLOW if node.op in FOLLOW else Role.KEEP

    def _asked(self, node: gs.Node) -> str:
        names = (node.name, *(tensor.name for tensor in node.outputs))
        return next((self.keep[name] for name in names if name and name in self.keep), "")

    def _measured(self, node: gs.Node) -> str:
        for tensor in (*node.outputs, *node.inputs):
            if tensor.name in self.wide and is_float32(tensor):
                return f"{tensor.name!r} {self.wide[tensor.name]}"
        return ""

    def _refusal(self, node: gs.Node) -> str:
        """Why the op itself stays in float32."""
        if not is_standard(node):
            return "a plugin, or an op of another domain, keeps the types that it was made for"
        if bodies(node):
            return "the bodies of conditions and loops stay as they are"
        if node.op in self.sensitive:
            return self.sensitive[node.op]
        if any(is_standard(maker, "DequantizeLinear") for tensor in node.inputs for maker in tensor.inputs):
            return "it reads quantized values, which no cast may stand behind"
        if self._roles[id(node)] is Role.KEEP:
            return f"{node.op} is not known to be safe in 16 bits"
        tensors = [tensor for tensor in (*node.inputs, *node.outputs) if tensor.name]
        if any(element_type(tensor) == 0 for tensor in tensors):
            return "the type of a tensor of its is not known"
        if node.op == "BatchNormalization" and self.notes.opset < 15:
            return "before opset 15 its statistics must have the type of the data"
        if positions(node, self.notes.opset, self.target) is None:
            return f"it does not exist for {type_name(self.target)} in opset {self.notes.opset}"
        if node.op in SUMMING:
            count = count_summed(node, self.notes)
            if count is None or count > MOST_SUMMED:
                return f"it sums {'an unknown number of' if count is None else count} values"
        return ""

    def _unfit_constant(self, node: gs.Node) -> str:
        found = positions(node, self.notes.opset, self.target)
        for position in found[0] if found else ():
            tensor = node.inputs[position]
            if isinstance(tensor, gs.Constant) and position not in BOUNDS.get(node.op, ()):
                reason = self._look_at(tensor)[1]
                if reason:
                    return f"constant {tensor.name!r} {reason}"
        return ""

    def _look_at(self, tensor: gs.Constant) -> tuple[bool, str]:
        """Whether a constant has finite values beyond the range, and why it does not fit 16 bits, "" where it does."""
        if id(tensor) not in self._constants:
            self._constants[id(tensor)] = misfit(self.notes.values(tensor), self.target)
        return self._constants[id(tensor)]

    def _spread_huge(self, node: gs.Node) -> None:
        """Follow the -3.4e38 and -1e9 of masks, which would become infinite, to the nodes that they are added in."""
        role, is_passing = self._roles[id(node)], node.op not in BOUNDED
        read = [t for t in node.inputs if is_float32(t)]
        if is_cast(node):
            if any(id(t) in self._huge for t in read) and is_float32(node.outputs[0]):
                self._huge.add(id(node.outputs[0]))
            return
        if not is_standard(node) or node.op not in FOLLOW | MOVE or not is_passing:
            return
        if any(id(t) in self._huge or (isinstance(t, gs.Constant) and self._look_at(t)[0]) for t in read):
            self._huge.update(id(t) for t in node.outputs if is_float32(t))
            if role is not Role.KEEP:
                self._stay(node, f"it handles a mask or bound beyond the range of {type_name(self.target)}")

    # What follows from the graph

    def _keep_coordinates(self) -> None:
        """Arithmetic on values that came from integers alone (positions, counts, masks) stays in float32."""
        found: set[int] = set()
        for node in self.graph.nodes:
            made = [t for t in node.outputs if is_float32(t)]
            if not made or not is_standard(node) or bodies(node):
                continue
            read = [t for t in node.inputs if t.name and is_float32(t) and not isinstance(t, gs.Constant)]
            if is_cast(node) or node.op == "Range":
                is_source = node.op == "Range" or element_type(node.inputs[0]) in INTEGER_TYPES
                if is_source or any(id(t) in found for t in read):
                    found.update(map(id, made))
                continue
            simple = node.op in FOLLOW | MOVE | {"Sin", "Cos", "Exp", "Log", "Pow", "CumSum"} or is_outer(node)
            if not simple or node.op in SUMMING or not any(id(t) in found for t in read):
                continue
            if all(id(t) in found or is_constant(t) for t in read):
                found.update(map(id, made))
                self._stay(node, INTEGERS)

    def _keep_exact_inputs(self) -> None:
        """What leads to an angle, a grid or an index, back to the layer that made it, stays in float32."""
        pending = [
            (node.inputs[position], node.op)
            for node in self.graph.nodes
            for position in self._exact_positions(node)
            if position < len(node.inputs)
        ]
        seen: set[int] = set()
        while pending:
            tensor, reader = pending.pop()
            if id(tensor) in seen or not is_float32(tensor) or not tensor.inputs:
                continue
            seen.add(id(tensor))
            node = tensor.inputs[0]
            if id(node) not in self._roles or not (is_cast(node) or node.op in FOLLOW | MOVE or is_outer(node)):
                continue
            self._stay(node, f"a {reader} needs its result in full")
            pending.extend((source, reader) for source in node.inputs)

    def _exact_positions(self, node: gs.Node) -> tuple[int, ...]:
        if not is_standard(node):
            return ()
        if is_cast(node):
            return (0,) if node.attrs.get("to") in INTEGER_TYPES - {onnx.TensorProto.BOOL} else ()
        return EXACT_INPUTS.get(node.op, ())

    def _keep_islands(self) -> None:
        """Between a cast from 16 bits to float32 and one back, somebody chose float32: it stays."""
        ahead: set[int] = set()
        for node in self.graph.nodes:
            made = [t for t in node.outputs if is_float32(t)]
            from_half = is_cast(node) and element_type(node.inputs[0]) in TARGETS.values()
            if made and (from_half or any(id(t) in ahead for t in node.inputs)):
                ahead.update(map(id, made))
        if not ahead:
            return
        behind: set[int] = set()
        for node in reversed(self.graph.nodes):
            to_half = is_cast(node) and node.attrs.get("to") in TARGETS.values()
            if to_half or any(id(t) in behind for t in node.outputs):
                behind.update(id(t) for t in node.inputs if is_float32(t) and not isinstance(t, gs.Constant))
                between = any(id(t) in ahead and id(t) in behind for t in node.outputs)
                if between and any(id(t) in ahead for t in node.inputs):
                    self._roles[id(node)] = Role.KEEP

    # Types

    def _assign(self) -> set[int]:
        """Nodes that will work in 16 bits.

        A COMPUTE node does. A FOLLOW node does if one of its inputs has 16 bits. A MOVE node takes the type of what it
        reads, unless its readers want the other one and the cast costs no more ahead of it.
        """
        strict, lenient = self._wishes()
        types: dict[int, bool] = {}  # by tensor: has 16 bits
        free: set[int] = set()  # tensors that are made of constants alone
        half: set[int] = set()
        for node in self.graph.nodes:
            found = positions(node, self.notes.opset, self.target)
            role = self._roles[id(node)]
            if not found or not any(found) or role is Role.KEEP:
                continue
            data = [t for p in found[0] if not isinstance(t := node.inputs[p], gs.Constant) and id(t) not in free]
            known = [types.get(id(tensor), False) for tensor in data]
            if role is Role.COMPUTE or (not data and node.op == "Gather"):
                is_half = True  # A table in 16 bits takes half the room.
            elif not data:
                is_half = all(lenient.get(id(node.outputs[p]), False) for p in found[1])
                free.update(id(node.outputs[p]) for p in found[1])
            elif role is Role.FOLLOW:
                is_half = any(known)
            else:
                wanted = bool(found[1]) and all(strict.get(id(node.outputs[p]), False) for p in found[1])
                if all(known):
                    is_half = not (node.op in GROWING and self._all_keep(node))
                elif any(known):
                    is_half = True
                else:
                    is_half = wanted and not (node.op in ("Slice", "Gather") and len(data[0].outputs) == 1)
            if is_half:
                half.add(id(node))
                types.update((id(node.outputs[p]), True) for p in found[1])
        return half

    def _all_keep(self, node: gs.Node) -> bool:
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        return bool(readers) and all(self._roles.get(id(reader), Role.KEEP) is Role.KEEP for reader in readers)

    def _wishes(self) -> tuple[dict[int, bool], dict[int, bool]]:
        """For each tensor whether all its readers want 16 bits: those that follow count as no, and as yes."""
        outputs = set().union(*(output_ids(scope) for scope in scopes(self.graph)))
        strict: dict[int, bool] = {}
        lenient: dict[int, bool] = {}

        def wants(reader: gs.Node, wishes: dict[int, bool], following: bool) -> bool:
            role = self._roles.get(id(reader), Role.KEEP)
            if is_cast(reader):
                # One that a former run made speaks for those behind it.
                return reader.attrs.get("to") == self.target and wishes.get(id(reader.outputs[0]), False)
            if role is Role.MOVE:
                return all(wishes.get(id(tensor), False) for tensor in reader.outputs if tensor.name)
            return role is Role.COMPUTE or reader.op in ("Shape", "Size") or (role is Role.FOLLOW and following)

        for node in reversed(self.graph.nodes):
            for tensor in node.outputs:
                if tensor.name:
                    for wishes, following in ((strict, False), (lenient, True)):
                        wishes[id(tensor)] = id(tensor) not in outputs and all(
                            wants(reader, wishes, following) for reader in tensor.outputs
                        )
        return strict, lenient
