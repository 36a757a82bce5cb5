"""``convert(verify=...)``: a conversion is compared with what it was made from before anybody gets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import BackendError
from .backends import get_backend
from .compare import Tolerances, run_comparison
from .compare_inputs import Sample, generated_samples, given_samples
from .compare_report import CompareReport
from .compare_subjects import make_side
from .model import OnnxModel
from .module import EngineModule


def require_running_here(backend: str, device: torch.device) -> None:
    """See before anything is built that what is built can be run.

    Raises:
        BackendError: it cannot.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = get_backend(backend).status().reason or f"torch sees no device {device} here."
        raise BackendError(
            f"verify: engines of {backend} cannot run on this machine, so nothing can be compared here: {reason} "
            "Convert without verify, and compare with `trtbridge compare` where the engine runs."
        )


def verify(
    original: torch.nn.Module | OnnxModel,
    module: EngineModule,
    call: tuple[tuple[Any, ...], Mapping[str, Any] | None],
    tolerance: Tolerances | None,
) -> CompareReport:
    """Compare a converted module with its original; the report stays with the module.

    Args:
        original: the torch module, or the model of an .onnx file, which runs in ONNX Runtime.
        module: what was made of it; its program gets the report into its facts.
        call: the example's arguments and keyword arguments; an .onnx file is compared on random inputs.
        tolerance: the limits; None for the defaults.

    Raises:
        AccuracyError: the results are out of tolerance.
    """
    sides = (make_side(original), make_side(module))
    signature = module.program.signature
    if isinstance(original, OnnxModel):
        samples = generated_samples(signature, None, 0)
    else:
        samples = given_samples(Sample(tuple(call[0]), dict(call[1] or {})), signature, None, None)
    report = run_comparison(sides, samples, tolerance=tolerance)
    report.raise_if_failed()
    module.program = dataclasses.replace(module.program, info={**module.program.info, "verification": report.to_json()})
    return report
