"""The ``trtbridge`` command: convert, explain, run, refit, inspect, profile, compare, localize, passes,
plugins, cache, doctor.

torch takes seconds to import, so nothing here does before a command needs it: ``-h`` answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..errors import BackendError, OptionError
from .cli_cache import CacheFlag
from .cli_cache import app as cache_app
from .cli_compare import compare as compare_command
from .cli_display import Stages, reporting
from .cli_localize import localize as localize_command
from .cli_options import (
    AsPluginOption,
    AttentionOption,
    BackendOption,
    CacheOption,
    CalibrationOption,
    CapabilityOption,
    CheckPassesOption,
    DataSizeOption,
    DebugOption,
    DeviceOption,
    DimOption,
    DumpGraphsOption,
    ForceOption,
    HostOption,
    KeepOption,
    LevelOption,
    NoFallbackOption,
    OpsetOption,
    PrecisionOption,
    RefittableOption,
    SizeOption,
    SourceArgument,
    StreamingOption,
    StripOption,
    Tf32Option,
    TimeoutOption,
    ToleranceOption,
    VerboseOption,
    VerifyOption,
    WorkspaceOption,
    check_writable,
    given_dims,
    given_options,
    pass_options,
    plugin_options,
    precision_options,
    verify_options,
    weight_options,
)
from .cli_passes import passes as passes_command
from .cli_plugins import app as plugins_app
from .cli_profile import inspect as inspect_command
from .cli_profile import profile as profile_command
from .cli_refit import refit as refit_command
from .cli_source import import_code, search_here
from .text import size_text

if TYPE_CHECKING:
    from .module import EngineModule

app = typer.Typer(
    name="trtbridge",
    help="From a PyTorch module to a TensorRT engine, over ONNX.",
    epilog="Example: [bold]trtbridge convert model.py:make -o model.trtb && trtbridge run model.trtb[/bold]",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(plugins_app)
app.add_typer(cache_app)
app.command(
    "localize",
    epilog="Examples:\n\n"
    "[bold]trtbridge localize model.py:make model.trtb --repro wrong[/bold]\n\n"
    "[bold]trtbridge localize model.py:make --precision fp16[/bold]",
)(localize_command)
app.command("passes", epilog="Examples:\n\n[bold]trtbridge passes[/bold]\n\n[bold]trtbridge passes RemoveNoOps[/bold]")(
    passes_command
)

app.command(
    "refit",
    epilog="Examples:\n\n"
    "[bold]trtbridge refit net.trtb merged.safetensors -o new.trtb[/bold]\n\n"
    "[bold]trtbridge refit small.trtb state.pt -o whole.trtb[/bold]",
)(refit_command)


app.command(
    "compare",
    epilog="Examples:\n\n"
    "[bold]trtbridge compare model.py:make net.trtb --html report.html[/bold]\n\n"
    "[bold]trtbridge compare net.onnx net.trtb --samples 20 --rtol 1e-2 --atol 1e-3[/bold]",
)(compare_command)
app.command("inspect", epilog="Example:\n\n[bold]trtbridge inspect net.trtb[/bold]")(inspect_command)
app.command(
    "profile",
    epilog="Examples:\n\n"
    "[bold]trtbridge profile net.trtb --size batch=8 --picture profile.png[/bold]\n\n"
    "[bold]trtbridge profile model.py:make --trace trace.json[/bold]",
)(profile_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trtbridge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command; their callbacks do all."""


@app.command(
    epilog="Examples:\n\n"
    "[bold]trtbridge convert model.py:make[/bold]\n\n"
    "[bold]trtbridge convert net.onnx -o net.trtb --backend tensorrt_rtx --dim x:0=batch:1:8:32[/bold]"
)
def convert(
    source: SourceArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File to write. Default: the function's name with .trtb."),
    ] = None,
    force: ForceOption = False,
    backend: BackendOption = None,
    dim: DimOption = None,
    opset: OpsetOption = None,
    tf32: Tf32Option = None,
    compute_capability: CapabilityOption = None,
    optimization_level: LevelOption = None,
    workspace_mb: WorkspaceOption = None,
    cache_dir: CacheOption = None,
    cache: CacheFlag = False,
    device: DeviceOption = None,
    timeout_s: TimeoutOption = None,
    refittable: RefittableOption = False,
    strip_weights: StripOption = False,
    weight_streaming_mb: StreamingOption = None,
    plugin_host: HostOption = None,
    as_plugin: AsPluginOption = None,
    no_fallback: NoFallbackOption = False,
    max_data_size: DataSizeOption = None,
    precision: PrecisionOption = None,
    keep_fp32: KeepOption = None,
    tolerance: ToleranceOption = None,
    calibration: CalibrationOption = None,
    attention: AttentionOption = None,
    check_passes: CheckPassesOption = False,
    dump_graphs: DumpGraphsOption = None,
    verify: VerifyOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a model and write it to one file, which trtbridge run and trtbridge.load() take."""
    with reporting(verbose, debug) as console:
        dims = given_dims(dim)
        path = output or Path(f"{source.name}.trtb")
        check_writable(path, force)
        options = given_options(
            backend, opset, tf32, compute_capability, optimization_level, workspace_mb, cache_dir, device, timeout_s
        ) | plugin_options(plugin_host, as_plugin, no_fallback, max_data_size)
        options |= precision_options(precision, keep_fp32, tolerance, calibration)
        options |= pass_options(check_passes, dump_graphs, attention)
        options |= verify_options(verify)
        options |= {"cache": True} if cache else {}
        options |= weight_options(refittable, strip_weights, weight_streaming_mb)
        with Stages(console) as stages:
            with stages.stage("load"):
                from .convert import convert as convert_model

                request = source.load()
            module = request.call(convert_model, dims, {"progress": stages, **options})
            with stages.stage("save"):
                module.save(path)
        _summarize(module, path)


@app.command(
    epilog="Examples:\n\n"
    "[bold]trtbridge explain model.py:make --backend tensorrt_rtx[/bold]\n\n"
    "[bold]trtbridge explain net.onnx --dim x:0=batch:1:8:32[/bold]"
)
def explain(
    source: SourceArgument,
    backend: BackendOption = None,
    dim: DimOption = None,
    opset: OpsetOption = None,
    tf32: Tf32Option = None,
    compute_capability: CapabilityOption = None,
    optimization_level: LevelOption = None,
    workspace_mb: WorkspaceOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = None,
    timeout_s: TimeoutOption = None,
    plugin_host: HostOption = None,
    as_plugin: AsPluginOption = None,
    no_fallback: NoFallbackOption = False,
    max_data_size: DataSizeOption = None,
    precision: PrecisionOption = None,
    keep_fp32: KeepOption = None,
    tolerance: ToleranceOption = None,
    calibration: CalibrationOption = None,
    attention: AttentionOption = None,
    check_passes: CheckPassesOption = False,
    dump_graphs: DumpGraphsOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what becomes engine, what becomes plugin and why, without building. Exit status 1: it does not convert."""
    with reporting(verbose, debug) as console:
        dims = given_dims(dim)
        options = given_options(
            backend, opset, tf32, compute_capability, optimization_level, workspace_mb, cache_dir, device, timeout_s
        ) | plugin_options(plugin_host, as_plugin, no_fallback, max_data_size)
        options |= precision_options(precision, keep_fp32, tolerance, calibration)
        options |= pass_options(check_passes, dump_graphs, attention)
        with Stages(console) as stages:
            with stages.stage("load"):
                from .explain import explain as explain_model

                request = source.load()
            explanation = request.call(explain_model, dims, {"progress": stages, **options})
        _print(str(explanation))
        if not explanation.converts:
            raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n"
    "[bold]trtbridge run net.trtb --size batch=4 --iterations 100[/bold]\n\n"
    "[bold]trtbridge run net.trtb --inputs in.npz --output out.npz[/bold]"
)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What trtbridge convert or trtbridge.save() wrote.")],
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            "-i",
            metavar="FILE",
            help="An .npz file with an array for each input, by name. Default: random.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs to this .npz file.")
    ] = None,
    force: ForceOption = False,
    size: SizeOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of random inputs.")] = 0,
    int_max: Annotated[int, typer.Option("--int-max", min=1, metavar="N", help="Random integers are below this.")] = 2,
    iterations: Annotated[
        int, typer.Option("--iterations", "-n", min=1, metavar="N", help="Time this many calls, when more than one.")
    ] = 1,
    device: DeviceOption = None,
    cache_dir: CacheOption = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import first what registers plugin ops: a module or file.py."),
    ] = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a converted model on random inputs or those of a file; show its outputs and its latency."""
    with reporting(verbose, debug):
        if output is not None:
            check_writable(output, force)
        from .cli_run import Latency, Outputs, RandomInputs, describe_tensor, read_inputs, why_not_here
        from .convert import load

        search_here()
        for place in imports or []:
            import_code(place)
        module = load(file, device, cache_dir)
        if reason := why_not_here(module):
            raise BackendError(reason)
        signature = module.program.signature
        if inputs is not None:
            if size:
                raise OptionError("--size is for random inputs: leave it out with --inputs.")
            tensors = read_inputs(inputs, signature)
        else:
            tensors = RandomInputs(seed, {one.name: one.size for one in size or []}, int_max).make(signature)
        args, kwargs = signature.input_structure.unflatten([tensor.to(module.device) for tensor in tensors])
        outputs = Outputs.of(module(*args, **kwargs))
        table = Table(box=None, pad_edge=False)
        for heading in ("output", "shape", "dtype", "mean", "min", "max", "NaN"):
            table.add_column(heading, overflow="fold")
        for name, tensor in outputs.tensors.items():
            table.add_row(Text(name), *describe_tensor(tensor))
        console = Console(highlight=False)
        console.print(table)
        for name, value in outputs.constants.items():
            _print(f"{name} = {value!r}")
        if output is not None:
            outputs.save(output)
            _print(f"outputs are in {output}")
        if iterations > 1:
            _print(str(Latency.measure(lambda: module(*args, **kwargs), iterations, module.device)))


@app.command(epilog="Examples:\n\n[bold]trtbridge doctor[/bold]\n\n[bold]trtbridge doctor --json > report.json[/bold]")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show what is installed, and what can build and run here. Exit status 1: no backend can build."""
    with reporting(debug=debug) as console:
        from .cli_doctor import can_build, examine, show

        with console.status("looking around"):
            facts = examine()
        if as_json:
            print(json.dumps(facts, indent=2))
        else:
            show(facts, Console(highlight=False))
        if not can_build(facts):
            raise typer.Exit(1)


def _summarize(module: EngineModule, path: Path) -> None:
    from .attention import AttentionReport
    from .cli_run import why_not_here
    from .precision import PrecisionReport

    info = module.program.info
    seconds: dict[str, float] = info["stage_seconds"]
    stages = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    _print(str(module.inspect(fusions=False)))
    if info.get("precision"):
        _print(str(PrecisionReport.from_json(info["precision"])))
    if module.verification is not None:
        _print(str(module.verification))
    if info.get("attention"):
        _print(str(AttentionReport.from_json(info["attention"])))
    _print(f"backend: {module.program.backend} ({info['backend_choice']})")
    if info.get("cache"):
        _print(f"cache: {info['cache']['hits']} engine(s) from it, {info['cache']['misses']} built")
    _print(f"time: {sum(seconds.values()):.2f} s ({stages})")
    _print(f"wrote {path} ({size_text(path.stat().st_size)})")
    where = " on a machine with an NVIDIA GPU" if why_not_here(module) else ""
    _print(f"try it{where}: trtbridge run {path}")


def _print(text: str) -> None:
    """Print lines as they are: not wrapped, no markup."""
    Console(highlight=False).print(Text(text), soft_wrap=True)


def _terminate(number: int, _: object) -> NoReturn:
    # As an exception, so that the child that builds is stopped and half-written files are removed.
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, _terminate)
    app()
