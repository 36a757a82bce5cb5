"""Runs models between two passes, plugins included: what `convert(check_passes=True)` compares.

A model goes to ONNX Runtime as it is, without optimizations, where that is possible. One with plugin nodes, or with
types that ONNX Runtime lacks on a CPU, is split into a plan, and runs as `verify` runs it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from ..errors import TrtBridgeError
from ..nodes import DOMAIN
from ..passes import numbers
from ..passes.pipeline import Pipeline
from ..passes.reports import PipelineResult
from .activations import from_numpy, to_numpy, with_outputs
from .backends import get_backend
from .backends.base import BuildOptions, Segment
from .build import build_plan
from .cli_run import RandomInputs
from .export import ExportedModule
from .model import OnnxModel, iterate_nodes
from .options import Options
from .partition import partition
from .runtime import RunningProgram
from .seeds import seeded

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def run_passes(
    passes: Pipeline, model: OnnxModel, source: ExportedModule | OnnxModel, options: Options
) -> PipelineResult:
    """Run the passes of a conversion, comparing numbers and writing graphs as the options say.

    Args:
        passes: which, in order.
        model: what they run on.
        source: what that was made from; its example is what the passes are checked on.
        options: `Options.check_passes` and `Options.dump_graphs` count.

    Raises:
        PassError: a pass failed, broke the graph, or changed its numbers.
        ModelFileError: the graphs cannot be written.
    """
    runner = CheckRunner(model) if options.check_passes else None
    folder = options.dump_graphs
    return passes.run(
        model.proto,
        model.weights,
        check=None if runner is None else runner.feeds(source),
        runner=runner,
        dump_dir=None if folder is None else Path(folder),
        ranges=model.signature.bounds,
    )


@dataclasses.dataclass(frozen=True)
class CheckRunner:
    """Runs a model that passes have changed, on a CPU; a `passes.numbers.Runner`.

    Attributes:
        model: the model before any pass, for its signature.
    """

    model: OnnxModel

    def feeds(self, source: ExportedModule | OnnxModel) -> dict[str, np.ndarray]:
        """The user's own example, by input name; for an .onnx file, which has none, random numbers.

        Integers are 0 or 1, so that they are valid indices; dynamic dimensions have the size that is tuned for.
        """
        if isinstance(source, OnnxModel):
            tensors = RandomInputs().make(self.model.signature)
        else:
            tensors = [tensor.detach().cpu() for tensor in source.arguments.tensors]
        return {spec.name: to_numpy(t) for spec, t in zip(self.model.signature.inputs, tensors, strict=True)}

    def __call__(
        self,
        proto: onnx.ModelProto,
        weights: numbers.Weights,
        feeds: numbers.Numbers,
        extra: Sequence[str] = (),
    ) -> numbers.Numbers:
        """The outputs of a model, and inner tensors of its main graph.

        Raises:
            Exception: it cannot be run; ONNX Runtime's errors share no base class.
        """
        if any(node.domain == DOMAIN for node in iterate_nodes(proto.graph)):
            return self._run_plan(proto, weights, feeds, extra)
        try:
            return numbers.run(proto, weights, feeds, extra)
        except Exception as error:
            logger.debug("ONNX Runtime cannot run the model as it is: %s", error)
            try:
                return self._run_plan(proto, weights, feeds, extra)
            except TrtBridgeError:
                raise error from None

    def _run_plan(
        self, proto: onnx.ModelProto, weights: numbers.Weights, feeds: numbers.Numbers, extra: Sequence[str]
    ) -> numbers.Numbers:
        plan = partition(dataclasses.replace(self.model, proto=proto, weights=weights))
        wanted = set(extra)
        if wanted:
            steps = [with_outputs(step, wanted) if isinstance(step, Segment) else step for step in plan.steps]
            plan = dataclasses.replace(plan, steps=tuple(steps))
        running = RunningProgram(build_plan(plan, get_backend("onnxruntime"), BuildOptions()), _CPU, None)
        inputs = [from_numpy(feeds[spec.name]) for spec in self.model.signature.inputs]
        with seeded():
            seen = running.run_all(inputs)
        names = {spec.name: plan.aliases.get(spec.name, spec.name) for spec in plan.signature.outputs}
        found = {name: to_numpy(seen[inner]) for name, inner in names.items()}
        return found | {name: to_numpy(seen[name]) for name in extra if name in seen}
