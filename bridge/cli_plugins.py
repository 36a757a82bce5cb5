"""``trtbridge plugins``: the plugin ops of this process, and what is wrong with one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import PluginError
from .cli_display import reporting
from .cli_options import BackendName, DebugOption, VerboseOption
from .cli_source import import_code, search_here

app = typer.Typer(
    name="plugins",
    help="Torch ops that run as plugins: list them, check one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="MODULE", help="Import first what registers ops: a module or file.py. Repeatable."
    ),
]


@app.command(
    "list",
    epilog="Examples:\n\n[bold]trtbridge plugins list[/bold]\n\n[bold]trtbridge plugins list --import my_ops.py[/bold]",
)
def list_command(
    imports: ImportOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """List the ops that ship and those that imported modules register. PyTorch's own are plugins too, where needed."""
    with reporting(verbose, debug):
        _import(imports)
        from ..plugins.listing import list_ops

        table = Table(box=None, pad_edge=False)
        for heading in ("op", "devices", "from", "description"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "op")
        for op in list_ops():
            origin = "trtbridge" if op.shipped else _short(op.place)
            table.add_row(Text(op.name), Text(", ".join(op.devices) or "none"), Text(origin), Text(op.description))
        Console(highlight=False).print(table)


@app.command(
    epilog="Examples:\n\n"
    "[bold]trtbridge plugins check demo::soft_sign --import my_ops.py[/bold]\n\n"
    "[bold]trtbridge plugins check demo::scale --import my_ops.py "
    '--sample "float32\\[2,3,8] 0.5" --sample "float16\\[1,3,7] 2.0"[/bold]'
)
def check(
    op: Annotated[str, typer.Argument(metavar="NAMESPACE::NAME", help="The op, as torch names it.")],
    imports: ImportOption = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            "--sample",
            metavar="ARGUMENTS",
            help="Arguments of a call: float32\\[2,3,8], int64\\[4]<10 (below 10), 0.5, 'text', \\[1, 2], name=value. "
            "Repeatable. Default: those of @trtbridge.plugin(samples=...), else of a function samples() in an imported "
            "module, else made up.",
        ),
    ] = None,
    backend: Annotated[
        list[BackendName] | None,
        typer.Option("--backend", "-b", metavar="NAME", help="Try this backend only. Repeatable. Default: all here."),
    ] = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Check an op, from its schema to a converted model of it. Exit status 1: something is wrong."""
    with reporting(verbose, debug):
        modules = _import(imports)
        from ..plugins.check_op import check as check_op
        from ..plugins.check_samples import parse_sample

        samples = [parse_sample(text) for text in sample] if sample else _samples_of(op, modules)
        names = None if backend is None else [one.value for one in backend if one is not BackendName.AUTO] or None
        report = check_op(op, samples, backends=names)
        Console(highlight=False).print(Text(str(report)), soft_wrap=True)
        if not report.ok:
            raise typer.Exit(1)


def _import(places: list[str] | None) -> list[ModuleType]:
    """Import modules and files; what they are, in order."""
    search_here()
    modules: list[ModuleType] = []
    for place in places or []:
        before = set(sys.modules)
        import_code(place)
        modules += _modules_of(place, before)
    return modules


def _modules_of(place: str, before: set[str]) -> Iterator[ModuleType]:
    """The module that importing a place gave, found by name or, for a file, by its path."""
    if not place.endswith(".py"):
        yield sys.modules[place]
        return
    path = str(Path(place).resolve())
    for name in sorted(set(sys.modules), key=lambda name: name in before):
        if getattr(sys.modules[name], "__file__", None) == path:
            yield sys.modules[name]
            return


def _samples_of(op: str, modules: list[ModuleType]) -> Any:
    """What a function ``samples()`` of an imported module gives for an op; None where there is none.

    The function returns a list of samples, or a dict of lists by op where the module has several ops. Samples given to
    the op itself go before.
    """
    from ..plugins.authoring import registration

    known = registration(op)
    if known is not None and known.samples is not None:
        return None
    for module in modules:
        function = getattr(module, "samples", None)
        if not inspect.isfunction(function):
            continue
        try:
            found = function()
        except Exception as error:
            raise PluginError(f"samples() of {module.__name__} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            return found
        if op in found:
            return found[op]
    return None


def _short(place: str) -> str:
    """A place in a file, as short as it can be written from here."""
    file, _, line = place.rpartition(":")
    try:
        return f"{Path(file).relative_to(Path.cwd())}:{line}" if file else "torch.library"
    except ValueError:
        return f"{Path(file).name}:{line}"
