"""Rewrites of ONNX graphs with onnx-graphsurgeon, and the pipeline that runs and checks them. No torch, no TensorRT."""

from .convert_precision import ConvertPrecision
from .default import DEFAULT
from .fold_constants import FoldConstants
from .fold_ranges import FoldRanges
from .fold_shapes import FoldShapes
from .fuse_attention import FuseAttention
from .fuse_batch_norm import FuseBatchNorm
from .fuse_gelu import FuseGelu
from .fuse_group_norm import FuseGroupNorm
from .fuse_layer_norm import FuseLayerNorm
from .fuse_rms_norm import FuseRmsNorm
from .fuse_rotary_embedding import FuseRotaryEmbedding
from .fuse_silu import FuseSilu
from .graft_nodes import graft
from .merge_casts import MergeCasts
from .merge_reshapes import MergeReshapes
from .merge_slices import MergeSlices
from .merge_transposes import MergeTransposes
from .narrow_types import NarrowTypes
from .pipeline import Notes, Pass, PassReport, Pipeline, PipelineReport, PipelineResult, Refusal
from .prepare_quantization import PrepareQuantization
from .remove_dead_nodes import RemoveDeadNodes
from .remove_no_ops import RemoveNoOps
from .repair_ranks import RepairRanks
from .repair_types import RepairTypes
from .repeat_heads import RepeatHeads
from .rewrite_refused import RewriteRefused
from .rewrite_to_plugin import Match, Refused, RewriteToPlugin

__all__ = [
    "DEFAULT",
    "ConvertPrecision",
    "FoldConstants",
    "FoldRanges",
    "FoldShapes",
    "FuseAttention",
    "FuseBatchNorm",
    "FuseGelu",
    "FuseGroupNorm",
    "FuseLayerNorm",
    "FuseRmsNorm",
    "FuseRotaryEmbedding",
    "FuseSilu",
    "Match",
    "MergeCasts",
    "MergeReshapes",
    "MergeSlices",
    "MergeTransposes",
    "NarrowTypes",
    "Notes",
    "Pass",
    "PassReport",
    "Pipeline",
    "PipelineReport",
    "PipelineResult",
    "PrepareQuantization",
    "Refusal",
    "Refused",
    "RemoveDeadNodes",
    "RemoveNoOps",
    "RepairRanks",
    "RepairTypes",
    "RepeatHeads",
    "RewriteRefused",
    "RewriteToPlugin",
    "graft",
]
