"""``trtbridge passes``: the graph passes, those of the default pipeline and others. No torch here."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OptionError
from .cli_display import reporting
from .cli_options import DebugOption
from .cli_source import import_code, search_here

if TYPE_CHECKING:
    from ..passes.pipeline import Pass


def passes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the whole documentation of this pass.")
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import passes of your own first: a module or file.py."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """List the graph passes: the default pipeline in order, then what can be added to it; or explain one."""
    with reporting(debug=debug):
        search_here()
        for place in imports or []:
            import_code(place)
        from ..passes.default import DEFAULT

        known = {kind.__name__: kind for kind in _kinds()}
        if name is not None:
            _explain(known, name)
            return
        standard = [type(item) for item in DEFAULT]
        others = sorted((kind for kind in known.values() if kind not in standard), key=lambda kind: kind.__name__)
        _show("The default pipeline, trtbridge.DEFAULT, in order:", standard)
        if others:
            _show("Other passes, for passes=trtbridge.DEFAULT.insert(...):", others)


def _kinds() -> Iterator[type[Pass]]:
    """Every pass that ships, and those that imported modules define."""
    from .. import passes as package
    from ..passes.pipeline import Pass

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    pending: list[Any] = [Pass]
    seen: set[type[Pass]] = set()
    while pending:
        for kind in pending.pop().__subclasses__():
            if kind in seen:
                continue
            seen.add(kind)
            pending.append(kind)
            if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
                yield kind


def _show(title: str, kinds: list[Any]) -> None:
    console = Console(highlight=False)
    console.print(title)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for kind in kinds:
        doc = inspect.getdoc(kind) if kind.__doc__ else None
        table.add_row(Text(f"  {kind.__name__}"), Text((doc or "").partition("\n")[0]))
    console.print(table)


def _explain(known: dict[str, type[Pass]], name: str) -> None:
    kind = known.get(name)
    if kind is None:
        close = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise OptionError(f"There is no pass {name!r}.{hint} Passes: {', '.join(sorted(known))}.")
    signature = inspect.signature(kind)
    follows = ", ".join(other.__name__ for other in kind.after)
    lines = [f"{kind.__name__}{signature}  from {kind.__module__}", "", inspect.getdoc(kind) or "No documentation."]
    if follows:
        lines += ["", f"Comes after {follows}, where they are in the pipeline."]
    if kind.changes_io:
        lines += ["", "May change the dtypes of the model's inputs and outputs."]
    Console(highlight=False).print(Text("\n".join(lines)), soft_wrap=True)
