"""``trtbridge localize``: from "my engine gives wrong results" to the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import OptionError
from .cli_display import Stages, reporting
from .cli_options import (
    AsPluginOption,
    BackendOption,
    CacheOption,
    DebugOption,
    DeviceOption,
    DimOption,
    HostOption,
    KeepOption,
    OpsetOption,
    PrecisionOption,
    SourceArgument,
    Tf32Option,
    VerboseOption,
    given_dims,
    given_options,
    plugin_options,
    precision_options,
)
from .cli_source import Request, import_code, merge_dims, search_here

if TYPE_CHECKING:
    from .model import Signature

_NO_ANSWER = 2
"""Exit status where something else failed: 1 says that the model is wrong."""


def localize(
    source: SourceArgument,
    converted: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONVERTED",
            help="What trtbridge convert wrote, or an .onnx file. Default: SOURCE is converted here, with the options.",
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            "-i",
            metavar="FILE",
            help="An .npz file with an array for each input, by name. "
            "Default: those that SOURCE returns, random ones for an .onnx file.",
        ),
    ] = None,
    repro: Annotated[
        Path | None,
        typer.Option(
            "--repro", "-r", metavar="DIR", help="Write what is wrong as a standalone repro into this folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    golden: Annotated[bool, typer.Option("--golden", help="Compare with the module in float64.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance", "-t", metavar="X", help="Largest relative error of one layer. Default: by its precision."
        ),
    ] = None,
    backend: BackendOption = None,
    dim: DimOption = None,
    opset: OpsetOption = None,
    tf32: Tf32Option = None,
    precision: PrecisionOption = None,
    keep_fp32: KeepOption = None,
    plugin_host: HostOption = None,
    as_plugin: AsPluginOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import first what registers plugin ops: a module or file.py."),
    ] = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the first layer, and its Python line, where a converted model parts from the original.

    Exit status: 0 nothing is wrong, 1 something is, 2 there is no answer.
    """
    try:
        with reporting(verbose, debug) as console:
            search_here()
            for place in imports or []:
                import_code(place)
            options = given_options(backend, opset, tf32, None, None, None, cache_dir, device, None)
            options |= plugin_options(plugin_host, as_plugin, False, None)
            options |= precision_options(precision, keep_fp32, None, None)
            dims = given_dims(dim)
            with Stages(console) as stages:
                with stages.stage("load"):
                    from .localize import localize as search

                    request = source.load()
                    shapes = merge_dims(request.dynamic_shapes, dims) if dims else request.dynamic_shapes
                    call = _inputs(request, inputs, shapes)
                    given = _settings(request, options, converted is not None)
                with stages.stage("localize"):
                    report = search(
                        request.model,
                        converted,
                        call,
                        dynamic_shapes=shapes,
                        golden=golden,
                        tolerance=tolerance,
                        repro=repro,
                        **given,
                    )
    except typer.Exit as ended:
        raise typer.Exit(_NO_ANSWER if ended.exit_code == 1 else ended.exit_code) from None
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        Console(highlight=False).print(Text(str(report)), soft_wrap=True)
    if report.found:
        raise typer.Exit(1)


def _settings(request: Request, options: dict[str, Any], is_converted: bool) -> dict[str, Any]:
    """The options of localize(): those of SOURCE, with those of the command line before them.

    Raises:
        OptionError: options of a conversion are given, and there is none to be made.
    """
    names = [name for name in options if name not in ("device", "cache_dir")]
    if is_converted and names:
        raise OptionError(f"{', '.join(names)}: leave it out, CONVERTED has been converted already.")
    own = {} if is_converted else dict(request.options)
    return {**own, **options}


def _inputs(request: Request, path: Path | None, dynamic_shapes: Any) -> Any:
    """The inputs of one call: those of a file, else those of SOURCE; None for random ones."""
    from .cli_run import read_inputs

    is_file = isinstance(request.model, (str, Path))
    if path is None:
        return None if is_file else (request.args, dict(request.kwargs or {}))
    if is_file:
        from .onnx_file import read_onnx

        signature = read_onnx(request.model, dynamic_shapes).signature
        return tuple(read_inputs(path, signature))
    signature = _signature(request)
    tensors = read_inputs(path, signature)
    devices = [tensor.device for tensor in _tensors(request)]
    args, kwargs = signature.input_structure.unflatten(
        [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]
    )
    return args, kwargs


def _tensors(request: Request) -> list[Any]:
    from .structure import flatten

    return flatten((request.args, dict(request.kwargs or {})))[0]


def _signature(request: Request) -> Signature:
    """What SOURCE's module takes, as its example says."""
    from .arguments import collect
    from .dtypes import from_torch
    from .model import Signature, TensorSpec
    from .structure import TENSOR

    arguments = collect(request.model, request.args, dict(request.kwargs or {}))
    specs = [
        TensorSpec.make(label, from_torch(tensor.dtype), tuple(tensor.shape), {})
        for label, tensor in zip(arguments.labels, _tensors(request), strict=True)
    ]
    return Signature(tuple(specs), (), arguments.labels, {}, arguments.structure, TENSOR, arguments.parameters)
