"""The passes that every conversion runs."""

from __future__ import annotations

from .fold_constants import FoldConstants
from .fold_shapes import FoldShapes
from .fuse_batch_norm import FuseBatchNorm
from .merge_casts import MergeCasts
from .merge_reshapes import MergeReshapes
from .merge_slices import MergeSlices
from .merge_transposes import MergeTransposes
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
        FuseBatchNorm(),  # Behind RemoveNoOps, which brings convolution and norm together.
        FoldShapes(),  # Constant shapes are what the merges go by.
        MergeCasts(),
        MergeSlices(),
        MergeTransposes(),
        MergeReshapes(),
        RemoveDeadNodes(),
    )
)
"""What every conversion runs.

The fusions of other norms, GELU and SiLU are not among them: TensorRT-RTX finds these by itself, and its engines were
no faster for them (docs/bench-passes.md). They are for graphs that overflow in 16 bits, or go elsewhere. That of rotary
embedding needs opset 23.
"""
