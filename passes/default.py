"""The passes that every conversion runs."""

from __future__ import annotations

from .fold_constants import FoldConstants
from .narrow_types import NarrowTypes
from .pipeline import Pipeline
from .remove_dead_nodes import RemoveDeadNodes
from .remove_no_ops import RemoveNoOps
from .repair_ranks import RepairRanks
from .repair_types import RepairTypes

DEFAULT = Pipeline(
    (
        FoldConstants(),  # Before types are narrowed: arithmetic on float64 constants keeps its digits.
        NarrowTypes(),  # Makes some Casts no-ops.
        RemoveNoOps(),
        RepairTypes(),
        RepairRanks(),
        RemoveDeadNodes(),
    )
)
