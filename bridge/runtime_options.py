"""How a program runs: options of a call, which can be chosen anew whenever a program is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

SPECIALIZATIONS = ("lazy", "eager", "none")
"""What TensorRT-RTX can do when it meets new sizes: IRuntimeConfig's dynamic_shapes_kernel_specialization_strategy."""


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of `convert` and `load` that concern calls.

    Attributes:
        cuda_graphs: on a GPU, replay one CUDA graph over all engines and plugins of a call: True wherever the program
            can be captured, "auto" where a replay was also measured to be no slower than a plain call, False never. A
            graph is kept for each combination of input shapes, from the second call with it on.
        max_graphs: most CUDA graphs that are kept, one for each combination of input shapes (and each of the
            `parallel_replays`). Where there are more, the one that was not used for longest makes room.
        parallel_replays: most replays that run at once, of calls on different streams. Each has graphs of its own, with
            contexts and scratch memory; weights are shared. With 1 they run one after the other; "auto" is 1 until
            streams take turns again and again, and then up to 4, as long as half of the device's memory is free.
        reuse_outputs: results of replays are the graph's own tensors, valid until the next call, in place of fresh
            ones; saves one copy.
        max_contexts: most calls that run at once; each has execution contexts and scratch memory of its own. Further
            ones wait.
        share_workspace: one scratch memory, of the largest engine's size, for all engines of a call and for all CUDA
            graphs, in place of one for each.
        overlap_kernels: kernels of a CUDA graph may begin before the one ahead has ended, where the engine makes them
            so (programmatic dependent launch). None is True but with TensorRT-RTX, whose replays were wrong now and
            then that way while other work ran on the device (docs/runtime.md).
        kernel_specialization: TensorRT-RTX: what it does when it meets new sizes: "lazy" compiles kernels for them in
            the background and runs general ones meanwhile, "eager" compiles them before it runs, "none" always runs
            general ones. None is "eager" where calls may become CUDA graphs, which keep the kernels of their capture,
            and else leaves it to the library ("lazy").
    """

    cuda_graphs: bool | str = "auto"
    max_graphs: int = 16
    parallel_replays: int | str = "auto"
    reuse_outputs: bool = False
    max_contexts: int = 8
    share_workspace: bool = True
    overlap_kernels: bool | None = None
    kernel_specialization: str | None = None

    def __post_init__(self) -> None:
        for name in ("reuse_outputs", "share_workspace"):
            self._need(isinstance(getattr(self, name), bool), name, "True or False")
        may_overlap = self.overlap_kernels is None or isinstance(self.overlap_kernels, bool)
        self._need(may_overlap, "overlap_kernels", "True, False or None")
        self._need(isinstance(self.cuda_graphs, bool) or self.cuda_graphs == "auto", "cuda_graphs", 'a bool or "auto"')
        for name in ("max_graphs", "max_contexts"):
            self._need(_is_count(getattr(self, name)), name, "an int above 0")
        replays = self.parallel_replays
        self._need(_is_count(replays) or replays == "auto", "parallel_replays", 'an int above 0 or "auto"')
        strategies = (None, *SPECIALIZATIONS)
        self._need(self.kernel_specialization in strategies, "kernel_specialization", f"one of {strategies}")

    def _need(self, condition: bool, name: str, what: str) -> None:
        if not condition:
            raise OptionError(f"{name}={getattr(self, name)!r}: must be {what}.")

    def overlaps(self, backend: str) -> bool:
        """Whether kernels of CUDA graphs may overlap in engines of a backend."""
        return backend != "tensorrt_rtx" if self.overlap_kernels is None else self.overlap_kernels

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> RuntimeOptions:
        """Options from keyword arguments.

        Raises:
            OptionError: a name is unknown or a value impossible.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"There is no run-time option {name!r}.{hint} Options: {', '.join(known)}.")
        return cls(**given)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
