"""The options of convert(): checked by name and value, so that none is silently ignored."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..passes.default import DEFAULT
from ..passes.fuse_batch_norm import FuseBatchNorm
from ..passes.pipeline import Pipeline
from .backends.base import BuildOptions, Progress
from .chosen_nodes import are_entries, as_entries, names_of
from .dims import Dim
from .out_of_range import OUT_OF_RANGE
from .runtime_options import RuntimeOptions
from .tolerances import Tolerance

PRECISIONS = ("fp16", "bf16", "auto", "auto+bf16", "int8", "int8+fp16", "fp8", "fp8+fp16")
"""Values of the option ``precision``."""
_PRECISIONS = ", ".join(f'"{name}"' for name in PRECISIONS)


@dataclass(frozen=True)
class Options(RuntimeOptions):
    """Options of `convert`, beyond the model, its arguments and the backend; also those of `RuntimeOptions`.

    Attributes:
        opset: ONNX opset of the export of a module; None for 20, which every backend takes. 23 and later write
            attention as one node, which builds in some cases only. An .onnx file has its own.
        passes: the graph passes and their order.
        tf32: let fp32 matrix products and convolutions use TF32 (about 1e-4 relative error). Off, as in torch.matmul.
        optimization_level: TensorRT's builder optimization level, 0 to 5.
        workspace_bytes: most scratch memory of a layer, in bytes.
        compute_capabilities: TensorRT-RTX: GPUs to build for, as ``((8, 9), (12, 0))``. Default: the one that is
            present, else a portable engine.
        isolate: parse and build in a child process, so that a crash of the backend ends as an error.
        timeout_s: most seconds that building one engine may take.
        refittable: let ``module.refit`` exchange the weights later, without a rebuild. What the graph computes of them
            alone is computed beforehand; TensorRT may optimize less around weights that it does not know.
        strip_weights: build small engines without weights, which `tb.load` takes from a module or a state dict; implies
            ``refittable``.
        weight_streaming_bytes: TensorRT: most device memory for the weights of one engine, in bytes; the rest is
            streamed from the host while it runs. 0 streams all that can be.
        device: where the module will run; default the module's own device, or what the backend runs on.
        cache_dir: folder for engines, compiled kernels and times of kernels and of attention; default
            ``$TRTBRIDGE_CACHE_DIR``, else the user's cache folder.
        cache: keep engines in ``cache_dir`` by content, and take them from there: same graph, weights, ranges, options,
            plugins, library and GPU. ``program.info["cache"]`` says what came from there.
        cache_size_bytes: most bytes of engines kept there; those that were not used for longest go.
        progress: called with (stage, fraction) while converting.
        plugin_host: "engine" keeps plugins inside engines and raises where one cannot be, "segments" runs all of them
            between engines, "auto" keeps inside what can be.
        as_plugins: what becomes a plugin, and so runs in PyTorch, though the backend could take it: torch ops or their
            names ("aten::layer_norm", `torch.ops.aten.layer_norm.default`), module paths with all below
            ("encoder.layers.3"), patterns of these ("*.norm?"), or functions of a `precision.NodeView` that say True;
            one or several. For an .onnx file op types, node names, patterns or functions. What fits nothing raises.
        fallback: make plugins of what the backend refuses; False raises `UnsupportedOpError` or `BuildError` instead.
        check_export: run the exported graph in ONNX Runtime on the example, and make plugins of what comes out wrong.
            Models over 2 GiB are not checked.
        precision: "fp16" or "bf16" makes a mixed model of a float32 one: products work in 16 bits; normalizations,
            softmax, exponentials, large sums and, for fp16, what the samples show to leave its range stay in float32.
            "auto" is "fp16", and keeps what else must stay for the outputs to meet ``precision_tolerance``, found by
            measuring; "auto+bf16" does so with bf16. "int8" and "fp8" let products read 8-bit values, the rest as it
            is; with "int8+fp16" and "fp8+fp16" the rest is mixed. Inputs and outputs keep their dtypes. None leaves
            all as it is.
        precision_tolerance: for "auto": the largest L2 norm of an output's change over that of the output, on every
            sample. Default 0.01.
        calibration: what precision is measured on: an iterable of samples, each a tensor, a tuple of positional
            arguments or a dict of arguments by name. Default: the example (random numbers for an .onnx file).
        attention: "fused" makes one Attention node of every attention that the backend takes as one, however it is
            written; "decomposed" leaves and makes none; "auto" takes the faster form for each block: on a GPU both are
            built alone and timed once, and ``cache_dir`` keeps the figures; without one it is the node in 16 bits
            wherever the backend takes it. Where it takes no heads that queries share, keys and values are repeated for
            the node. Models are raised to opset 23 for the node. None leaves attention as written.
        keep_fp32: what stays in float32 besides: op types ("Softmax"), module paths with all below
            ("encoder.layers.3"), patterns of these ("*.norm?"), node names, or functions of a `precision.NodeView`
            (op_type, name, module, file, line) that say True; one or several.
        check_passes: run ONNX Runtime on the example (random numbers for an .onnx file) after every pass, and raise
            `PassError` with the first pass, node and tensor whose numbers changed. A model that is random, or that
            ONNX Runtime cannot run, is not compared, and a warning says so.
        dump_graphs: folder where the ONNX before all passes and after each is written, with a text of what the pass
            changed. What an earlier conversion wrote there is removed; where a model is translated several times, the
            last time stays.
        verify: compare the results with the module's on the example (those of an .onnx file with ONNX Runtime's, on
            random inputs), and raise `AccuracyError` where they are out of tolerance: True for the tolerances of
            their dtypes, a `Tolerance`, or one each by output. The report is ``module.verification``.
        max_data_size: bound of sizes that depend on data and that nothing else bounds. Engines need one where they read
            such a tensor.
        output_shapes: names and bounds for data-dependent sizes of results, by the result's label or position:
            ``{"boxes": {0: Dim("found", max=300)}}``.
        out_of_range: what a call does whose sizes lie outside every profile, or differ in a static dimension: "error"
            raises `OutOfRangeError`; "eager" runs the original module, which is kept by reference, in eval mode and
            without gradients. Wrong dtypes, devices, ranks and structures are errors all the same.
    """

    opset: int | None = None
    passes: Pipeline = field(default_factory=lambda: DEFAULT)
    tf32: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    isolate: bool = True
    timeout_s: float | None = None
    refittable: bool = False
    strip_weights: bool = False
    weight_streaming_bytes: int | None = None
    device: torch.device | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    cache: bool = False
    cache_size_bytes: int = 8 << 30
    progress: Progress | None = None
    plugin_host: str = "auto"
    as_plugins: Any = ()
    fallback: bool = True
    check_export: bool = True
    precision: str | None = None
    precision_tolerance: float | None = None
    calibration: Any = None
    keep_fp32: Any = ()
    attention: str | None = None
    check_passes: bool = False
    dump_graphs: str | os.PathLike[str] | None = None
    verify: bool | Tolerance | Mapping[str, Tolerance] = False
    max_data_size: int | None = None
    output_shapes: Mapping[str | int, Mapping[int, Dim]] | None = None
    out_of_range: str = "error"

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments.

        Raises:
            OptionError: a name is unknown or a value impossible; the message says which and what is meant perhaps.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"convert() has no option {name!r}.{hint} Options: {', '.join(known)}.")
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        def need(condition: bool, name: str, what: str) -> None:
            if not condition:
                raise OptionError(f"{name}={getattr(self, name)!r}: must be {what}.")

        opset = self.opset
        need(opset is None or (_is_int(opset) and 18 <= opset <= 25), "opset", "an ONNX opset from 18 to 25")
        need(isinstance(self.passes, Pipeline), "passes", "a passes.Pipeline, such as trtbridge.DEFAULT")
        for name in (
            *("tf32", "isolate", "fallback", "check_export", "check_passes", "cache", "refittable", "strip_weights"),
        ):
            need(isinstance(getattr(self, name), bool), name, "True or False")
        level = self.optimization_level
        need(level is None or (_is_int(level) and 0 <= level <= 5), "optimization_level", "from 0 to 5")
        memory = self.workspace_bytes
        need(memory is None or (_is_int(memory) and memory > 0), "workspace_bytes", "a positive number of bytes")
        most = self.cache_size_bytes
        need(_is_int(most) and most > 0, "cache_size_bytes", "a positive number of bytes")
        need(self.timeout_s is None or self.timeout_s > 0, "timeout_s", "a positive number of seconds")
        need(
            self.timeout_s is None or self.isolate,
            "timeout_s",
            "left out with isolate=False: only a child process can be stopped",
        )
        budget = self.weight_streaming_bytes
        need(budget is None or (_is_int(budget) and budget >= 0), "weight_streaming_bytes", "a number of bytes")
        need(
            not self.can_be_refitted or str(self.precision).partition("+")[0] not in ("int8", "fp8"),
            "precision",
            "left out or 16 bits with refittable or strip_weights: scales of 8-bit weights are part of the engine",
        )
        pairs = self.compute_capabilities
        need(
            isinstance(pairs, (tuple, list))
            and all(isinstance(p, (tuple, list)) and len(p) == 2 and all(map(_is_int, p)) for p in pairs),
            "compute_capabilities",
            "pairs such as ((8, 9), (12, 0))",
        )
        need(self.plugin_host in ("auto", "engine", "segments"), "plugin_host", '"auto", "engine" or "segments"')
        limits = self.verify.values() if isinstance(self.verify, Mapping) else [self.verify]
        need(
            isinstance(self.verify, bool) or all(isinstance(limit, Tolerance) for limit in limits),
            "verify",
            "True, False, a tb.Tolerance, or a dict of these by output",
        )
        size = self.max_data_size
        need(size is None or (_is_int(size) and size > 0), "max_data_size", "a positive number of elements")
        shapes = self.output_shapes
        need(
            shapes is None
            or (
                isinstance(shapes, Mapping)
                and all(
                    isinstance(dims, Mapping) and all(_is_int(a) and isinstance(d, Dim) for a, d in dims.items())
                    for dims in shapes.values()
                )
            ),
            "output_shapes",
            'a dict such as {"boxes": {0: tb.Dim("found", max=300)}}',
        )
        need(self.precision is None or self.precision in PRECISIONS, "precision", f"None or one of {_PRECISIONS}")
        limit = self.precision_tolerance
        need(limit is None or (isinstance(limit, (int, float)) and limit > 0), "precision_tolerance", "above 0")
        need(
            limit is None or str(self.precision).startswith("auto"),
            "precision_tolerance",
            'left out unless precision is "auto" or "auto+bf16"',
        )
        samples = self.calibration
        need(
            samples is None
            or (isinstance(samples, Iterable) and not isinstance(samples, (str, Mapping, torch.Tensor))),
            "calibration",
            "an iterable of samples, such as [(x,), (y,)]",
        )
        need(samples is None or self.precision is not None, "calibration", "left out unless precision is given")
        forms = (None, "auto", "fused", "decomposed")
        need(self.attention in forms, "attention", 'None, "auto", "fused" or "decomposed"')
        entries = "op types, module paths, patterns or functions of a node"
        need(are_entries(self.keep_fp32), "keep_fp32", entries)
        need(are_entries(self.as_plugins), "as_plugins", entries)
        kept = as_entries(self.keep_fp32)
        need(not kept or self.precision is not None, "keep_fp32", "left out unless precision is given")
        folder = self.dump_graphs
        need(
            folder is None or (isinstance(folder, (str, os.PathLike)) and not Path(folder).is_file()),
            "dump_graphs",
            "a folder, which is made where it is missing",
        )
        need(self.out_of_range in OUT_OF_RANGE, "out_of_range", '"error" or "eager"')
        need(self.progress is None or callable(self.progress), "progress", "a function of (stage, fraction)")

    @property
    def pipeline(self) -> Pipeline:
        """The passes that run: with `keep_fp32`, which may name batch norms, without the default's fold of them."""
        if not self.keep_fp32:
            return self.passes
        return Pipeline(tuple(item for item in self.passes.passes if item != FuseBatchNorm()))

    @property
    def can_be_refitted(self) -> bool:
        """Whether weights are exchanged later."""
        return self.refittable or self.strip_weights

    @property
    def recorded(self) -> dict[str, Any]:
        """What decides the graph, JSON-ready: those that are not as by default, passes and functions left out."""
        names = (
            *("opset", "tf32", "plugin_host", "fallback", "check_export", "max_data_size"),
            *("precision", "precision_tolerance", "attention", "refittable", "strip_weights"),
        )
        found = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Options, name, None)}
        entries = {name: names_of(getattr(self, name)) for name in ("keep_fp32", "as_plugins")}
        return found | {name: named for name, named in entries.items() if named}

    @property
    def runtime(self) -> RuntimeOptions:
        """The part that concerns calls."""
        return RuntimeOptions(
            **{option.name: getattr(self, option.name) for option in dataclasses.fields(RuntimeOptions)}
        )

    @property
    def build(self) -> BuildOptions:
        """The part that concerns building."""
        return BuildOptions(
            tf32=self.tf32,
            optimization_level=self.optimization_level,
            workspace_bytes=self.workspace_bytes,
            compute_capabilities=tuple((p[0], p[1]) for p in self.compute_capabilities),
            isolate=self.isolate,
            timeout_s=self.timeout_s,
            cache_dir=self.cache_dir,
            refittable=self.can_be_refitted,
            strip_weights=self.strip_weights,
            weight_streaming_bytes=self.weight_streaming_bytes,
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
