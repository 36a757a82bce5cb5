"""``trtbridge cache``: what is kept on disk between conversions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import CacheError
from .cli_display import reporting
from .cli_options import CacheOption, DebugOption
from .text import size_text

app = typer.Typer(
    name="cache",
    help="What is kept on disk between conversions: list the engines, remove all, show the folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command("list", epilog="Example: [bold]trtbridge cache list[/bold]")
def list_command(cache_dir: CacheOption = None, debug: DebugOption = False) -> None:
    """List the engines that convert(cache=True) has kept, last used first."""
    with reporting(debug=debug):
        from .engine_cache import FOLDER, EngineCache

        engines = list(EngineCache(_folder(cache_dir) / FOLDER, most_bytes=1).list())
        table = Table(box=None, pad_edge=False)
        for heading in ("engine", "of", "backend", "size", "took", "last used"):
            table.add_column(heading, overflow="fold", no_wrap=heading != "of")
        for engine in engines:
            table.add_row(
                engine.path.stem[:12],
                Text(f"{engine.source} {engine.segment}" if engine.backend else "cannot be read"),
                Text(f"{engine.backend} {engine.version}"),
                size_text(engine.size_bytes),
                f"{engine.build_seconds:.1f} s",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(engine.used)),
            )
        console = Console(highlight=False)
        if engines:
            console.print(table)
        total = sum(engine.size_bytes for engine in engines)
        console.print(Text(f"{len(engines)} engine(s), {size_text(total)}"), soft_wrap=True)


@app.command("clear", epilog="Example: [bold]trtbridge cache clear[/bold]")
def clear_command(cache_dir: CacheOption = None, debug: DebugOption = False) -> None:
    """Remove what is kept: engines, what was learned of models, compiled kernels, times of kernels and of attention."""
    with reporting(debug=debug):
        from .backends import timing_cache
        from .cache import JIT_FOLDER
        from .engine_cache import FOLDER, EngineCache
        from .learned import FOLDER as LEARNED_FOLDER
        from .learned import clear

        folder = _folder(cache_dir)
        count, size = EngineCache(folder / FOLDER, most_bytes=1).clear()
        clear(folder / LEARNED_FOLDER)
        for path in [
            *(folder / JIT_FOLDER).glob("*.bin"),
            *(folder / timing_cache.FOLDER).glob("*.bin"),
            folder / "attention.json",
        ]:
            path.unlink(missing_ok=True)
        text = f"removed {count} engine(s), {size_text(size)}, and what else is kept in {folder}"
        Console(highlight=False).print(Text(text), soft_wrap=True)


@app.command("dir", epilog="Example: [bold]trtbridge cache dir[/bold]")
def dir_command(cache_dir: CacheOption = None, debug: DebugOption = False) -> None:
    """Print the folder, as other commands and convert() find it."""
    with reporting(debug=debug):
        print(_folder(cache_dir))


def _folder(cache_dir: Path | None) -> Path:
    from .cache import resolve_cache_dir

    folder = resolve_cache_dir(cache_dir)
    if folder is None:
        raise CacheError("The default cache folder cannot be written: name another with --cache-dir.")
    return folder


CacheFlag = Annotated[
    bool, typer.Option("--cache", help="Keep engines in the cache folder by content, and take them from there.")
]
"""Option of ``trtbridge convert``."""
