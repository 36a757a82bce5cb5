"""Whether passes keep a model's numbers, and who is to blame where one does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ..errors import PassError
from . import numbers
from .graph_diff import node_text, origin_text

_log = logging.getLogger("trtbridge.passes")

_MOST_EXTRA = 256
"""Inner tensors that are asked for in one run, so that their memory stays bounded."""


@dataclass(frozen=True)
class _State:
    """A model between two passes."""

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    outputs: numbers.Numbers


class Comparison:
    """Compares the numbers of a model after each pass with those before it.

    The numbers before are those after the last pass, so what is named is the pass that changed them, and rounding that
    each pass may change is not laid on the last of them.

    Args:
        proto: the model before any pass.
        weights: values of its stand-ins.
        feeds: a value for each input; None compares nothing.
        run: what runs models; default ONNX Runtime without plugins.
        tolerance: largest change of an output by one pass, relative to its largest magnitude.

    Attributes:
        words: whether numbers are compared, or why not.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        feeds: numbers.Numbers | None,
        run: numbers.Runner | None,
        tolerance: float,
    ) -> None:
        self._feeds: numbers.Numbers = feeds or {}
        self._run: numbers.Runner = run or numbers.run
        self._tolerance = tolerance
        self._state: _State | None = None
        if feeds is None:
            self.words = "not compared (not asked for)"
            return
        reason = numbers.why_not_comparable(proto, any_domain=run is not None)
        if reason is None:
            try:
                outputs = self._run(proto, weights, self._feeds)
                again = self._run(proto, weights, self._feeds)
            except Exception as error:  # ONNX Runtime's errors share no base class.
                reason = f"ONNX Runtime cannot run the model: {error}"
            else:
                if changed := numbers.difference(outputs, again, 0.0):
                    reason = f"the model is random: in a second run {changed}"
                else:
                    self._state = _State(proto, weights, outputs)
        self.words = f"not compared: {reason}" if reason else "compared by ONNX Runtime after every pass"
        if reason:
            _log.warning("The passes' numbers are not compared: %s", reason)

    @property
    def is_on(self) -> bool:
        """Whether numbers are compared."""
        return self._state is not None

    def check(
        self,
        name: str,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        own_tolerance: float | None = None,
    ) -> None:
        """Compare the model after a pass with the one before it.

        Args:
            name: the pass.
            proto: the model after it.
            weights: values of its stand-ins.
            own_tolerance: what the pass itself says it may change.

        Raises:
            PassError: the numbers changed; the message names the first tensor that did, and the node that makes it.
        """
        before = self._state
        if before is None:
            return
        try:
            outputs = self._run(proto, weights, self._feeds)
        except Exception as error:  # ONNX Runtime's errors share no base class.
            raise PassError(f"{name} left a model that ONNX Runtime cannot run: {error}") from error
        after = _State(proto, weights, outputs)
        tolerance = self._tolerance if own_tolerance is None else own_tolerance
        if tolerance:
            # What is computed in half precision moves by its rounding when sums are taken in another order.
            tolerance = max(tolerance, 4 * min(numbers.rounding(before.proto), numbers.rounding(proto)))
        if changed := numbers.difference(before.outputs, outputs, tolerance):
            where = self._first_change(before, after, tolerance)
            raise PassError(f"{name} changed the model's numbers: {changed}.{where}")
        self._state = after

    def _first_change(self, before: _State, after: _State, tolerance: float) -> str:
        """The first tensor that changed among those which the changed outputs are made from, in the graph's order."""
        wrong = [name for name in before.outputs
                 if numbers.difference(before.outputs, after.outputs, tolerance, [name])]  # fmt: skip
        made = {name: node for node in before.proto.graph.node for name in node.output if name}
        makers = {name: node for node in after.proto.graph.node for name in node.output if name}
        ancestors = _ancestors(wrong, makers)
        order = [name for name in makers if name in ancestors and name in made]
        changed = ""
        for start in range(0, len(order), _MOST_EXTRA):
            part = order[start : start + _MOST_EXTRA]
            try:
                old, new = (self._run(model.proto, model.weights, self._feeds, part) for model in (before, after))
            except Exception as error:  # ONNX Runtime's errors share no base class.
                return f" Which node changed them first could not be found out: {error}"
            for name in part:
                if name in old and name in new and (changed := numbers.difference(old, new, tolerance, [name]) or ""):
                    return _blame(name, changed, made[name], makers[name])
        name = next(iter(wrong))
        if name in makers:
            return _blame(name, "", made.get(name), makers[name])
        return ""


def _blame(name: str, changed: str, before: onnx.NodeProto | None, after: onnx.NodeProto) -> str:
    how = changed.removeprefix(f"output {name!r} ")
    lines = [f"\nThe first tensor that changed is {name!r}{': it ' + how if how else ''}."]
    lines.append(f"  made by {node_text(after)}")
    if before is not None and node_text(before) != node_text(after):
        lines.append(f"  before  {node_text(before)}")
    if origin := origin_text(after) or (origin_text(before) if before is not None else ""):
        lines.append(f"  from {origin}")
    return "\n".join(lines)


def _ancestors(names: list[str], makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """All tensors that these are made from, and these."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        node = makers.get(name)
        graphs = []
        if node is not None:
            pending.extend(node.input)
            graphs = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
        while graphs:
            for inner in graphs.pop().node:
                pending.extend(inner.input)
                graphs.extend(a.g for a in inner.attribute if a.type == onnx.AttributeProto.GRAPH)
    return found
