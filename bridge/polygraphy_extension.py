"""``polygraphy run model.onnx --onnxrt --trtbridge``: trtbridge as a runner among Polygraphy's own.

Polygraphy finds `make_arg_groups` by the entry point group ``polygraphy.run.plugins``, and writes what the options say
into the script that ``polygraphy run --gen-script`` shows. So `TrtBridgeRunner` is what such scripts import.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from polygraphy import config
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.tools.args import ModelArgs, OnnxLoadArgs, TrtConfigArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from ..errors import OptionError
from .backends import BACKENDS, all_statuses
from .convert import convert, load
from .dims import Dim
from .module import EngineModule
from .runners import Array, EngineRunner, Layout, input_metadata

Profile = Mapping[str, Sequence[Sequence[int]]]
"""For each input its smallest, usual and largest shape."""


def make_arg_groups() -> list[BaseArgs]:
    """What Polygraphy adds to the command line of ``polygraphy run``."""
    return [TrtBridgeRunnerArgs()]


class TrtBridgeRunner(BaseRunner):  # type: ignore[misc]  # Polygraphy has no types
    """Converts an .onnx file with trtbridge when it is activated, and runs it.

    Args:
        model: path of an .onnx file, a ModelProto, or something to call for one of these; or the path of a file that
            trtbridge.save() wrote (.trtb).
        backend: as in trtbridge.convert(); None for the first that can build and run on this machine.
        profile: for each input with dynamic dimensions the shapes (min, opt, max). A dimension without is 1.
        options: other options of trtbridge.convert().
        name: of the runner.

    Raises:
        TrtBridgeError: when activated, as trtbridge.convert() does.
    """

    def __init__(
        self,
        model: str | onnx.ModelProto | Callable[[], Any],
        backend: str | None = None,
        profile: Profile | None = None,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, prefix="trtbridge-runner")
        self._model = model
        self._backend = backend
        self._profile = profile or {}
        self._options = dict(options or {})

    def activate_impl(self) -> None:
        model = self._model() if callable(self._model) else self._model
        if isinstance(model, (str, Path)) and str(model).endswith(".trtb"):
            module = load(model)
        else:
            with _as_file(model) as path:
                shapes = dynamic_shapes(path, self._profile)
                module = convert(
                    path, dynamic_shapes=shapes, backend=self._backend or running_backend(), **self._options
                )
        self.module: EngineModule = module
        signature = module.program.signature
        layout = Layout.of(signature)
        self._inner = EngineRunner(module, self.name)
        self._labels = dict(zip(layout.labels, (spec.name for spec in signature.inputs), strict=True))
        self._inner.activate()

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for label, (dtype, shape) in input_metadata(self.module.program.signature).items():
            metadata.add(self._labels[label], dtype, list(shape), shape.min, shape.max)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> OrderedDict[str, Array]:
        outputs = self._inner.infer_impl({label: feed_dict[name] for label, name in self._labels.items()})
        self.inference_time = self._inner.inference_time
        names = [spec.name for spec in self.module.program.signature.outputs]
        # Results that are numbers to Python come last and have no tensor's name.
        found = OrderedDict(zip(names, outputs.values(), strict=False)) if len(names) == len(outputs) else outputs
        if any(isinstance(array, torch.Tensor) for array in feed_dict.values()):  # Polygraphy: tensors for tensors
            found = OrderedDict((name, torch.as_tensor(array)) for name, array in found.items())
        return found

    def deactivate_impl(self) -> None:
        self._inner.deactivate()
        del self._inner, self._labels, self.module


class TrtBridgeRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]  # Polygraphy has no types
    """
    trtbridge Inference: converting the model with trtbridge and running it.

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
        - TrtConfigArgs: shapes and precision
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "trtbridge", "trtbridge"

    def get_extra_help_text_impl(self) -> str:
        return "Heeds --input-shapes, --trt-min-shapes and its like, --fp16, --bf16 and --tf32."

    def add_parser_args_impl(self) -> None:
        self.group.add_argument(
            "--trtbridge-backend",
            choices=BACKENDS,
            default=None,
            help="What trtbridge builds with. Defaults to the first that can build and run on this machine.",
        )
        self.group.add_argument(
            "--trtbridge-load",
            metavar="FILE",
            default=None,
            help="Run this file, which `trtbridge convert` wrote, instead of converting the model.",
        )

    def parse_impl(self, args: Any) -> None:
        """
        Parses command-line arguments and populates the following attributes:

        Attributes:
            backend (str): What to build with; None for what runs here.
            saved (str): A converted file to run; None to convert the model.
        """
        self.backend = args_util.get(args, "trtbridge_backend")
        self.saved = args_util.get(args, "trtbridge_load")
        if self.backend is not None and self.backend != "onnxruntime":
            # Polygraphy's own --trt is then the same library: it looks when it first loads TensorRT, after this.
            config.USE_TENSORRT_RTX = self.backend == "tensorrt_rtx"

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(imports=["TrtBridgeRunner"], frm=__name__)
        if self.saved is not None:
            script.add_runner(make_invocable("TrtBridgeRunner", self.saved))
            return
        onnx_args = self.arg_groups[OnnxLoadArgs]
        model = self.arg_groups[ModelArgs].path
        if onnx_args.must_use_onnx_loader():
            model = onnx_args.add_to_script(script)
        trt = self.arg_groups[TrtConfigArgs]
        options: dict[str, Any] = {"precision": "fp16"} if trt.fp16 else {"precision": "bf16"} if trt.bf16 else {}
        options |= {"tf32": True} if trt.tf32 else {}
        profiles = [
            {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}
            for profile in trt.profile_dicts
        ]
        script.add_runner(
            make_invocable(
                "TrtBridgeRunner",
                model,
                backend=self.backend,
                profile=(profiles[0] or None) if profiles else None,
                options=options or None,
            )
        )


def running_backend() -> str:
    """The first backend that can build and run on this machine."""
    for status in all_statuses():
        if status.can_build and (status.name == "onnxruntime" or torch.cuda.is_available()):
            return status.name
    return "auto"


def dynamic_shapes(path: str | Path, profile: Profile) -> dict[str, dict[int, Any]] | None:
    """The dynamic dimensions of an .onnx file as trtbridge.convert() takes them.

    Args:
        path: the file.
        profile: for each input its smallest, usual and largest shape; a dimension without is 1, as in Polygraphy.

    Raises:
        OptionError: a profile has another rank than the input.
    """
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, dict[int, Any]] = {}
    spans: dict[str, Any] = {}
    for number, value in enumerate(graph.input):
        sizes = value.type.tensor_type.shape.dim
        shapes = profile.get(value.name)
        if shapes is not None and any(len(shape) != len(sizes) for shape in shapes):
            raise OptionError(
                f"Input {value.name} has rank {len(sizes)}, but its shapes are {list(map(list, shapes))}."
            )
        for axis, size in enumerate(sizes):
            if value.name in constants or size.HasField("dim_value"):
                continue
            low, opt, high = (shape[axis] for shape in shapes) if shapes is not None else (1, 1, 1)
            own = size.dim_param if size.dim_param.isidentifier() else f"size{number}_{axis}"
            # The same symbol is the same size: the first that has a range gives it to all.
            span = spans.get(own)
            if span is None or (shapes is not None and span == 1):
                span = low if low == high else Dim(own, min=low, opt=opt, max=high)
                spans[own] = span
            found.setdefault(value.name, {})[axis] = own
    return {name: {axis: spans[own] for axis, own in axes.items()} for name, axes in found.items()} or None


@contextlib.contextmanager
def _as_file(model: Any) -> Iterator[str]:
    """A model as a path: Polygraphy's loaders give protos."""
    if not isinstance(model, onnx.ModelProto):
        yield str(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        onnx.save(model, path, save_as_external_data=model.ByteSize() > 1 << 30)
        yield path
