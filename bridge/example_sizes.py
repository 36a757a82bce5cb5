"""What sizes that depend on data are on the example, where the program ties them to one another."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .activations import Recorder, cuda_devices
from .export import ExportedModule
from .seeds import seeded
from .stated_sizes import tied_symbols

logger = logging.getLogger(__name__)


def example_sizes(traced: ExportedModule) -> dict[str, int]:
    """The sizes by symbol that the example gives, of those that the program asserts an equation about.

    A profile is tuned for one set of sizes, which has to fit together: TensorRT refuses to build where it does not (two
    parts that add up to the rows of an input). The example's do. Other sizes are left out, so that their profile, and
    with it the engine, does not hang on the example's values.
    """
    tied = tied_symbols(traced.program)
    if not tied:
        return {}
    recorder = _SizeRecorder(traced, tied)
    with seeded(cuda_devices(traced)):
        try:
            recorder.run_example()
        except Exception as error:  # half of the bound will do, unless the builder says otherwise
            logger.info("the example's sizes are not known, for the module fails on its example: %s", error)
    return recorder.sizes


class _SizeRecorder(Recorder):
    """Notes what symbols are, from numbers and from the shapes of tensors."""

    def __init__(self, traced: ExportedModule, wanted: frozenset[str]) -> None:
        super().__init__(traced)
        self.sizes: dict[str, int] = {}
        self._tied = wanted

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        self._note(n.meta.get("val"), value)
        return value

    def _note(self, fake: Any, value: Any) -> None:
        if isinstance(fake, (tuple, list)) and isinstance(value, (tuple, list)):
            for one, other in zip(fake, value, strict=False):
                self._note(one, other)
        elif isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
            self._note(tuple(fake.shape), tuple(value.shape))
        elif isinstance(fake, torch.SymInt) and isinstance(value, int) and str(fake.node.expr) in self._tied:
            self.sizes.setdefault(str(fake.node.expr), value)
