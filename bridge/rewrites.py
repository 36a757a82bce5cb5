"""Refused nodes that are written in other ops, before any of them becomes a plugin.

What is rewritten is kept by place, not by node name: a call of the traced module and the op, because a translation with
other plugins may name its nodes otherwise; for a node with no call behind it (an .onnx file) its name.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import onnx

from ..errors import PassError
from ..nodes import DOMAIN, OP_ATTRIBUTE
from ..passes import FoldConstants, Pipeline, RemoveDeadNodes, RemoveNoOps
from ..passes.pipeline import PassReport
from ..passes.refused_rules import RULES
from ..passes.rewrite_refused import RewriteRefused, original_name
from .backends.base import Refusal
from .model import OnnxModel, iterate_nodes, origin_of

logger = logging.getLogger(__name__)

_MOST_LAYERS = 4
"""A definition may be written in ops that are refused as well, and so on, but not without end."""


class Site(NamedTuple):
    """A place whose nodes are rewritten.

    Attributes:
        call: the call of the traced module; "" where there is none.
        node: the node's name; "" where there is a call.
        op: op type, or full name of the torch op of a plugin node.
    """

    call: str
    node: str
    op: str


@dataclass
class Rewrites:
    """What is rewritten, and what has been tried in vain.

    Attributes:
        sites: what is rewritten, each with the reason.
        given_up: calls, and nodes without one, whose rewrite did not help.
        reports: of the passes that ran last.
    """

    sites: dict[Site, str] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    reports: tuple[PassReport, ...] = ()

    @property
    def state(self) -> frozenset[str]:
        """Equal where the same is rewritten."""
        return frozenset(f"rewritten {site.call or site.node} {site.op}" for site in self.sites)

    def apply(self, model: OnnxModel) -> OnnxModel:
        """The model with all sites rewritten."""
        self.reports = ()
        for _ in range(_MOST_LAYERS):
            names = self._matching(model.proto)
            if not names:
                break
            changed = _run(model, RewriteRefused(names))
            self.reports += changed[1]
            if not changed[1][0].rewrites:
                break
            model = changed[0]
        if not self.reports:
            return model
        model, reports = _run(model, FoldConstants(), RemoveNoOps(), RemoveDeadNodes())
        self.reports += reports
        return model

    def add_plugins(self, model: OnnxModel) -> None:
        """Rewrite plugin nodes of torch ops that have a rule: ONNX has no op for them, but it has several."""
        found: dict[str, Site] = {}
        for node in iterate_nodes(model.proto.graph):
            if node.domain == DOMAIN and _op(node) in RULES:
                site = _site(node)
                if site.call and site not in self.sites and site.call not in self.given_up:
                    found[node.name] = site
        left = _left(model, found)
        for name, site in found.items():
            if name in left:
                self.given_up.add(site.call)
            else:
                self._note(site, "ONNX has no op for it")

    def add(self, model: OnnxModel, refusals: Sequence[Refusal], title: str) -> list[Refusal]:
        """Rewrite what can be of some refused nodes.

        Args:
            model: after the passes and all rewrites so far.
            refusals: about nodes of this model.
            title: of the backend.

        Returns:
            The refusals that must be met otherwise: those for which there is no rewrite, those about rewritten nodes,
            and all of a call of which one node cannot be rewritten.
        """
        nodes = {node.name: node for node in iterate_nodes(model.proto.graph) if node.name}
        sites: dict[str, Site] = {}
        for refusal in refusals:
            node = nodes.get(refusal.node)
            if node is not None and node.op_type == refusal.op_type and node.op_type in RULES and not node.domain:
                site = _site(node)
                known = {site.call, site.node, original_name(site.node)} & self.given_up
                if site not in self.sites and not known:
                    sites[node.name] = site
        left = _left(model, sites)
        # What only a rewritten node needs goes with it, refused or not.
        lost = {r.origin.call for r in refusals if r.origin.call and (r.node in left or r.node not in nodes)}
        remaining = []
        for refusal in refusals:
            if refusal.node in left or refusal.node not in nodes or refusal.origin.call in lost:
                remaining.append(refusal)
        kept = {refusal.node for refusal in remaining}
        for refusal in refusals:
            if refusal.node in sites and refusal.node not in kept:
                self._note(sites[refusal.node], f"{title} refuses {refusal.op_type}: {refusal.reason.strip()}")
        return remaining

    def give_up(self, calls: Iterable[str]) -> bool:
        """Leave calls as they were; whether any of them was rewritten."""
        return sum(self._drop(call) for call in calls) > 0  # all of them, not the first one only

    def give_up_node(self, name: str) -> str:
        """The node for which a refused node was written, which is left as it was from now on; "" where it is none."""
        root = original_name(name)
        return root if root != name and (self._drop(root) or root in self.given_up) else ""

    def _drop(self, owner: str) -> bool:
        dropped = [site for site in self.sites if owner in (site.call, site.node, original_name(site.node)) and owner]
        for site in dropped:
            logger.info("%s at %s is not rewritten after all", site.op, site.call or site.node)
            del self.sites[site]
        if dropped:
            self.given_up.add(owner)
        return bool(dropped)

    def _note(self, site: Site, reason: str) -> None:
        logger.info("%s at %s is written in other ops: %s", site.op, site.call or site.node, reason)
        self.sites[site] = reason

    def _matching(self, proto: onnx.ModelProto) -> frozenset[str]:
        """Names of the nodes at the sites."""
        ops = {site.op for site in self.sites}
        nodes = (node for node in iterate_nodes(proto.graph) if ops and _op(node) in ops)
        return frozenset(node.name for node in nodes if node.name and _site(node) in self.sites)


def _site(node: onnx.NodeProto) -> Site:
    call = origin_of(node).call
    return Site(call, "" if call else node.name, _op(node))


def _op(node: onnx.NodeProto) -> str:
    if node.domain != DOMAIN:
        return node.op_type
    return next((a.s.decode() for a in node.attribute if a.name == OP_ATTRIBUTE), node.op_type)


def _left(model: OnnxModel, sites: Mapping[str, Site]) -> set[str]:
    """The nodes that a rewrite of some would leave; all where there is nothing to rewrite."""
    if sites:
        try:
            model, _ = _run(model, RewriteRefused(frozenset(sites)), RemoveDeadNodes())
        except PassError as error:  # a mistake in a rule must not end what a plugin can do
            logger.warning("%s", error)
    return {node.name for node in iterate_nodes(model.proto.graph)}


def _run(
    model: OnnxModel, *passes: RewriteRefused | FoldConstants | RemoveNoOps | RemoveDeadNodes
) -> tuple[OnnxModel, tuple[PassReport, ...]]:
    result = Pipeline(passes).run(model.proto, model.weights)
    for report in result.report.passes:
        logger.debug("%s", report)
    model = dataclasses.replace(model, proto=result.proto, weights=result.weights)
    return model, tuple(result.report.passes)
