"""Rewrites of ONNX graphs with onnx-graphsurgeon, and the pipeline that runs and checks them. No torch, no TensorRT."""

from .default import DEFAULT
from .fold_constants import FoldConstants
from .graft_nodes import graft
from .narrow_types import NarrowTypes
from .pipeline import Notes, Pass, PassReport, Pipeline, PipelineReport, PipelineResult, Refusal
from .remove_dead_nodes import RemoveDeadNodes
from .remove_no_ops import RemoveNoOps
from .repair_ranks import RepairRanks
from .repair_types import RepairTypes
from .rewrite_to_plugin import Match, Refused, RewriteToPlugin

__all__ = [
    "DEFAULT",
    "FoldConstants",
    "Match",
    "NarrowTypes",
    "Notes",
    "Pass",
    "PassReport",
    "Pipeline",
    "PipelineReport",
    "PipelineResult",
    "Refusal",
    "Refused",
    "RemoveDeadNodes",
    "RemoveNoOps",
    "RepairRanks",
    "RepairTypes",
    "RewriteToPlugin",
    "graft",
]
