"""What a TensorRT-RTX engine says of its own kernels, read out of its bytes: no GPU is needed.

The plan holds the program of its compiler as text: a header with the regions of memory, then one line a kernel, each
with the nodes of the graph in it. Nobody documents this; it was found in engines of 1.6.1, and where it is not
there, nothing is known. On a GPU the engine's inspector is asked instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .layers import EngineLayers, Layer, nodes_in_metadata

SOURCE = "the kernel list in the engine's bytes"

_HEADER = re.compile(rb"header \{\n  version = \d+\n")
_REGION = re.compile(r"region = \{ name=devmem size=(\d+) ")
_KERNEL = re.compile(r'^  (\w+)=\{ name="?([^"\s]+)"? .*?(?:layers="([^"]*)".*)?\}$', re.MULTILINE)
_MOST_BYTES = 64 << 20  # of one program's text


def read_plan(plan: bytes | bytearray | memoryview, nodes: Mapping[str, object]) -> EngineLayers | None:
    """The kernels of an engine and its memory for activations; None where the bytes do not tell.

    An engine for several GPUs has one list for each; the first is read.

    Args:
        plan: the engine.
        nodes: nodes of the graph by name.
    """
    for match in _HEADER.finditer(plan):
        start = match.start()
        text = bytes(plan[start : start + _MOST_BYTES]).partition(b"\x00")[0].decode("utf-8", "replace")
        header, begin, body = text.partition("\nmain {")
        if not begin or "accelerators={*}" in header:  # the inside of a fused kernel, not a program
            continue
        kernels = tuple(
            Layer(name, kind, nodes_in_metadata(layers or "", nodes))
            for kind, name, layers in _KERNEL.findall(body.partition("\n}")[0])
        )
        if kernels:
            sizes = [int(size) for size in _REGION.findall(header)]
            return EngineLayers(kernels, SOURCE, sum(sizes) if sizes else None)
    return None
