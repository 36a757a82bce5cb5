"""Values of the option ``precision``, and the samples that precision is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import InputError, OptionError
from .cli_run import RandomInputs
from .export import ExportedModule
from .input_check import InputChecker
from .model import OnnxModel
from .options import Options

T = TypeVar("T")

TARGETS: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16"}
"""Names of the 16-bit types, and the type of each."""

DEFAULT_TOLERANCE = 0.01
"""Of "auto": the L2 norm of an output's change over that of the output; cosine similarity is then above 0.99995."""


@dataclass(frozen=True)
class PrecisionRequest:
    """What ``precision=`` asks for.

    Attributes:
        target: "fp16" or "bf16" where nodes are to work in 16 bits, else None.
        quantized: "int8" or "fp8" where products are to read 8 bits, else None.
        search: whether what stays in float32 is found by measuring.
    """

    target: str | None
    quantized: str | None = None
    search: bool = False

    @classmethod
    def parse(cls, text: str) -> PrecisionRequest:
        """The request that a value of the option stands for.

        Raises:
            OptionError: it is no such value.
        """
        if text not in _REQUESTS:
            raise OptionError(f"precision={text!r}: must be one of {', '.join(map(repr, _REQUESTS))}.")
        return _REQUESTS[text]


_REQUESTS: Mapping[str, PrecisionRequest] = {
    "fp16": PrecisionRequest("fp16"),
    "bf16": PrecisionRequest("bf16"),
    "auto": PrecisionRequest("fp16", search=True),
    "auto+bf16": PrecisionRequest("bf16", search=True),
    "int8": PrecisionRequest(None, "int8"),
    "int8+fp16": PrecisionRequest("fp16", "int8"),
    "fp8": PrecisionRequest(None, "fp8"),
    "fp8+fp16": PrecisionRequest("fp16", "fp8"),
}


@dataclass
class Measurements:
    """What was measured of a model in one conversion, so that it is not measured again in each round of the planner.

    Attributes:
        known: results by what was measured and a digest of the graph.
        samples: inputs that things are measured on, and in words where they come from; None until they are asked for.
    """

    known: dict[tuple[str, bytes], Any] = field(default_factory=dict)
    samples: tuple[Sequence[Sequence[torch.Tensor]], str] | None = None

    def once(self, what: str, model: OnnxModel, measure: Callable[[], T]) -> T:
        """The result for a graph, measured the first time that it is asked for."""
        key = (what, hashlib.sha256(model.proto.SerializeToString(deterministic=True)).digest())
        if key not in self.known:
            self.known[key] = measure()
        found: T = self.known[key]
        return found

    def samples_of(
        self, model: OnnxModel, source: ExportedModule | OnnxModel, options: Options
    ) -> tuple[Sequence[Sequence[torch.Tensor]], str]:
        """The inputs to measure on, each a tensor for each input on the CPU, and where they come from.

        Raises:
            InputError: a sample does not fit the model.
        """
        if self.samples is None:
            self.samples = _samples(model, source, options)
        return self.samples


def _samples(
    model: OnnxModel, source: ExportedModule | OnnxModel, options: Options
) -> tuple[Sequence[Sequence[torch.Tensor]], str]:
    if options.calibration is not None:
        checker = InputChecker(model.signature, torch.device("cpu"))
        found = [_bound(checker, sample, index) for index, sample in enumerate(options.calibration)]
        if not found:
            raise InputError("calibration holds no sample: give at least one, such as [(x,)].")
        return found, f"measured on {len(found)} sample{'s' if len(found) > 1 else ''}"
    if isinstance(source, ExportedModule):
        return [[tensor.detach().cpu() for tensor in source.arguments.tensors]], "measured on the example"
    return [RandomInputs().make(model.signature)], "measured on random inputs"


def _bound(checker: InputChecker, sample: Any, index: int) -> list[torch.Tensor]:
    """One sample's tensors in the order of the model's inputs."""
    args: Any = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(sample, Mapping):
        kwargs = sample
    elif isinstance(sample, torch.Tensor):
        args = (sample,)
    elif isinstance(sample, (tuple, list)):
        args = tuple(sample)
    else:
        raise InputError(
            f"calibration: sample {index} is a {type(sample).__name__}; it must be a tensor, a tuple of positional "
            "arguments or a dict of arguments by name."
        )
    try:
        return checker(*torch.utils._pytree.tree_map_only(torch.Tensor, _on_cpu, (args, dict(kwargs))))
    except InputError as error:
        raise InputError(f"calibration, sample {index}: {error}") from error


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()
