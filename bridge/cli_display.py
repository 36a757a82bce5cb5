"""What the command line shows: progress of each stage, errors, logs and sizes. No control characters in a pipe."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from ..errors import TrtBridgeError

_PLAIN_INTERVAL_S = 10.0  # between lines of one stage where there is no terminal
_NAME_WIDTH = 10


class Stages:
    """Shows the stages of a conversion; call it as the ``progress`` option of convert().

    On a terminal each stage is a line with its time, the build one with a bar; elsewhere a line is printed when a
    stage ends, and every ten seconds while an engine builds.

    Args:
        console: where.
    """

    def __init__(self, console: Console) -> None:
        self._view: _Live | _Plain
        self._view = _Live(console) if console.is_terminal and not console.is_dumb_terminal else _Plain(console)
        self._stage = ""
        self._started = 0.0
        self._fraction = 0.0

    def __call__(self, stage: str, fraction: float) -> None:
        """Take a report: ``(stage, 0)`` begins one, ``(stage, 1)`` ends it, ``("stage: phase", f)`` stands between."""
        name, _, phase = stage.partition(": ")
        if phase:
            if name != self._stage:
                self._begin(name)
            # Inner phases begin at the start of their share again; a bar that goes back only confuses.
            self._fraction = max(self._fraction, min(fraction, 1.0))
            self._view.advance(name, phase, self._fraction, time.perf_counter() - self._started)
        elif name == self._stage and fraction >= 1.0:
            self._view.end(name, time.perf_counter() - self._started)
            self._stage = ""
        else:
            self._begin(name)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the command line's own."""
        self(name, 0.0)
        yield
        self(name, 1.0)

    def __enter__(self) -> Stages:
        self._view.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None and self._stage:
            self._view.fail(self._stage, time.perf_counter() - self._started)
        self._view.close()

    def _begin(self, name: str) -> None:
        self._stage, self._started, self._fraction = name, time.perf_counter(), 0.0
        self._view.begin(name)


class _Plain:
    """Lines of text."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_line = 0.0

    def open(self) -> None:
        """Nothing to set up."""

    def close(self) -> None:
        """Nothing to undo."""

    def begin(self, name: str) -> None:
        self._last_line = time.perf_counter()

    def advance(self, name: str, phase: str, fraction: float, seconds: float) -> None:
        now = time.perf_counter()
        if now - self._last_line >= _PLAIN_INTERVAL_S:
            self._last_line = now
            self._print(name, f"{fraction:4.0%} after {seconds:.0f} s: {phase}")

    def end(self, name: str, seconds: float) -> None:
        self._print(name, f"{seconds:.2f} s")

    def fail(self, name: str, seconds: float) -> None:
        self._print(name, f"failed after {seconds:.2f} s")

    def _print(self, name: str, text: str) -> None:
        self._console.print(Text(f"{name:{_NAME_WIDTH}}{text}"), soft_wrap=True)


class _Live:
    """Lines that change in place."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn("line" if console.options.ascii_only else "dots", finished_text=Text("+", style="green")),
            TextColumn("{task.description}", markup=False),
            _Seconds(),
            _BuildBar(bar_width=30),
            TextColumn("{task.fields[phase]}", markup=False, style="dim"),
            console=console,
            redirect_stdout=False,
        )
        self._task: TaskID | None = None

    def open(self) -> None:
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        self._task = self._progress.add_task(f"{name:{_NAME_WIDTH}}", total=None, phase="")

    def advance(self, name: str, phase: str, fraction: float, seconds: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=min(fraction, 0.999), phase=phase)

    def end(self, name: str, seconds: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=1.0, phase="")

    def fail(self, name: str, seconds: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, phase="failed")
            self._progress.stop_task(self._task)


class _Seconds(ProgressColumn):
    """Time of a stage."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds or 0.0:7.2f} s")


class _BuildBar(BarColumn):
    """A bar for the stage that tells how far it is, while it runs."""

    def render(self, task: Task) -> Text:  # type: ignore[override]
        if task.total is None or task.finished:
            return Text("")
        return super().render(task)  # type: ignore[return-value]


class _ConsoleHandler(logging.Handler):
    """Log records on a console, above what changes in place there."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(Text(self.format(record), style="dim"), soft_wrap=True)
        except Exception:  # As every handler of logging: no record may end the program.
            self.handleError(record)


@contextmanager
def reporting(verbose: bool = False, debug: bool = False) -> Iterator[Console]:
    """The frame of a command: logs while it runs, and any error as text on standard error with an exit status.

    Args:
        verbose: show what trtbridge logs at INFO, and the report of the passes.
        debug: show all that it logs, and tracebacks of errors.

    Yields:
        The console for standard error.

    Raises:
        typer.Exit: status 1 after an error, 130 after an interrupt.
    """
    console = Console(stderr=True, highlight=False)
    try:
        with _logging(console, verbose, debug):
            yield console
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            console.print(Text(traceback.format_exc()), soft_wrap=True)
        expected = isinstance(error, TrtBridgeError)
        name = type(error).__name__ if expected else f"unexpected {type(error).__name__}"
        console.print(Text.assemble(("error", "bold red"), f" ({name}): {error}"), soft_wrap=True)
        # The message of an expected error says it all, unless it stands for an error of other code.
        if not debug and not (expected and isinstance(error.__cause__, (OSError, type(None)))):
            console.print(Text("Run it again with --debug for the traceback.", style="dim"), soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def _logging(console: Console, verbose: bool, debug: bool) -> Iterator[None]:
    package = logging.getLogger(__name__.partition(".")[0])
    passes = logging.getLogger(f"{package.name}.bridge.convert")  # logs the report of the passes, at DEBUG
    before = (package.level, passes.level, package.propagate)
    handler = _ConsoleHandler(console)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
    if verbose:
        passes.setLevel(logging.DEBUG)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        passes.setLevel(before[1])
        package.propagate = before[2]
