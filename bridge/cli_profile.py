"""``trtbridge profile`` and ``trtbridge inspect``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import BackendError, OptionError
from .cli_compare import Comparand
from .cli_display import Stages, reporting
from .cli_options import (
    BackendOption,
    CacheOption,
    DebugOption,
    DeviceOption,
    ForceOption,
    PrecisionOption,
    SizeOption,
    VerboseOption,
    _usage,
    check_writable,
    given_options,
    precision_options,
)
from .cli_source import import_code, search_here

if TYPE_CHECKING:
    from .module import EngineModule

_ImportOption = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import first what registers plugin ops: a module or file.py."),
]


def profile(
    source: Annotated[
        Comparand,
        typer.Argument(
            parser=_usage(Comparand.parse),
            metavar="SOURCE",
            help="A converted [bold].trtb[/bold] file, or what trtbridge convert takes: it is converted first.",
        ),
    ],
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            "-i",
            metavar="FILE",
            help="An .npz file with an array for each input, by name. Default: a function's own example, else random.",
        ),
    ] = None,
    size: SizeOption = None,
    iterations: Annotated[
        int, typer.Option("--iterations", "-n", min=1, metavar="N", help="Time N calls of each kind.")
    ] = 20,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, metavar="N", help="Names of a module path that count in the table.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Most rows of a table.")] = 15,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write a trace for chrome://tracing and ui.perfetto.dev."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Write bar charts: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
    force: ForceOption = False,
    backend: BackendOption = None,
    precision: PrecisionOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = None,
    imports: _ImportOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Show where the time of a call goes: by step, module, line of Python and layer."""
    with reporting(verbose, debug) as console:
        for path in (trace, picture, as_json):
            if path is not None:
                check_writable(path, force)
        options = given_options(backend, None, None, None, None, None, cache_dir, device, None)
        options |= precision_options(precision, None, None, None)
        with Stages(console) as stages:
            search_here()
            for place in imports or []:
                import_code(place)
            module, example = _load(source, options, stages)
            with stages.stage("profile"):
                args, kwargs = _call(module, example, inputs, size)
                report = module.profile(args, kwargs, iterations)
        # Where this is no terminal, tables are as wide as in text.
        out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        out.print(report.tables(depth, top))
        if trace is not None:
            report.to_chrome_trace(trace)
        if picture is not None:
            report.to_picture(picture, depth)
        if as_json is not None:
            as_json.write_text(json.dumps(report.to_json()) + "\n")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What trtbridge convert or trtbridge.save() wrote.")],
    fusions: Annotated[
        bool, typer.Option("--fusions/--no-fusions", help="Ask the backend what it fused, which loads the engines.")
    ] = True,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what a converted model runs: steps, precisions, fusions, weights, memory, plugins and why."""
    with reporting(debug=debug):
        import torch

        from .inspection import inspect as look_into
        from .module import pick_device
        from .program import Program

        program = Program.load(file)
        # Not as a module: that one would load the engines, and need the plugins' code.
        report = look_into(program, torch.device(pick_device(program.backend, device)), fusions)
        Console(highlight=False).print(Text(str(report)), soft_wrap=True)


def _load(source: Comparand, options: dict[str, Any], stages: Stages) -> tuple[EngineModule, Any]:
    """The module, and the example of its source; None for random inputs.

    Raises:
        OptionError: options of a conversion are given, and there is none to be made.
    """
    from .convert import convert, load

    if source.source is None:
        names = [name for name in options if name not in ("device", "cache_dir")]
        if names:
            raise OptionError(f"{', '.join(names)}: leave it out, {source.text} has been converted already.")
        with stages.stage("load"):
            return load(source.text, **options), None
    with stages.stage("load"):
        request = source.load()
    module = request.call(convert, (), {"progress": stages, **options})
    has_example = bool(request.args or request.kwargs)
    return module, (request.args, dict(request.kwargs or {})) if has_example else None


def _call(module: EngineModule, example: Any, inputs: Path | None, size: Any) -> tuple[Any, Any]:
    """The arguments of the call: those of a file, of the source, or random ones, on the module's device."""
    from .cli_run import RandomInputs, read_inputs, why_not_here
    from .input_check import InputChecker

    if reason := why_not_here(module):
        raise BackendError(reason)
    signature = module.program.signature
    if size and inputs is not None:
        raise OptionError("--size is for random inputs: leave it out with --inputs.")
    if inputs is not None:
        tensors = read_inputs(inputs, signature)
    elif example is not None and not size:
        tensors = InputChecker(signature, module.device).flatten(*example)
    else:
        tensors = RandomInputs(0, {one.name: one.size for one in size or []}).make(signature)
    args, kwargs = signature.input_structure.unflatten([tensor.to(module.device) for tensor in tensors])
    return args, kwargs
