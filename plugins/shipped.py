"""The ops that ship with trtbridge, and the modules that register them when imported."""

from __future__ import annotations

import importlib

SHIPPED = {
    "trtbridge::batched_nms": ".batched_nms",
    "trtbridge::batched_nms_padded": ".batched_nms",
    "trtbridge::deform_conv2d": ".deformable_convolution",
    "trtbridge::deformable_attention": ".deformable_attention",
    "trtbridge::selective_scan": ".selective_scan",
    "trtbridge::selective_scan_with_state": ".selective_scan",
}
"""Name of each op → its module in this package."""


def load_shipped(name: str | None = None) -> None:
    """Register the ops that ship.

    Args:
        name: one op, with or without its overload; nothing happens if it does not ship. None for all.
    """
    modules = set(SHIPPED.values()) if name is None else {SHIPPED.get(name.partition(".")[0])} - {None}
    for module in sorted(filter(None, modules)):
        importlib.import_module(module, __package__)
