"""``trtbridge compare``: two models on the same inputs, as a table, a page or JSON, with an exit status for CI."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import ModelFileError, OptionError
from .cli_display import Stages, reporting
from .cli_options import DebugOption, DeviceOption, ForceOption, VerboseOption, _usage, check_writable
from .cli_source import Request, Source, import_code, search_here

if TYPE_CHECKING:
    from .compare_report import CompareReport
    from .compare_subjects import Side
    from .tolerances import Tolerance


@dataclass(frozen=True)
class Comparand:
    """What stands on one side on the command line.

    Attributes:
        text: as it was written.
        source: a function or an .onnx file; None for a converted file.
    """

    text: str
    source: Source | None

    @classmethod
    def parse(cls, text: str) -> Comparand:
        """Read SOURCE of ``trtbridge convert``, or the name of a converted file.

        Raises:
            OptionError: it is neither.
        """
        return cls(text, None if text.lower().endswith(".trtb") else Source.parse(text))

    def load(self) -> Request:
        """The model, and the example where the source has one."""
        return Request(Path(self.text)) if self.source is None else self.source.load()


_WORDS = (
    "[bold]package.module:function[/bold] or [bold]file.py:function[/bold], as for trtbridge convert, an "
    "[bold].onnx[/bold] file, or a converted [bold].trtb[/bold] file"
)

InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        "-i",
        metavar="FILE",
        help="An .npz file with an array for each input, by name. Default: a function's own example, else random.",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        "-n",
        min=1,
        metavar="N",
        help="Take N random inputs: of the size tuned for, the smallest, the largest, random ones.",
    ),
]


def _limit(name: str, words: str) -> Any:
    return typer.Option(name, metavar="X", help=words)


def compare(
    a: Annotated[
        Comparand, typer.Argument(parser=_usage(Comparand.parse), metavar="A", help=f"The reference: {_WORDS}.")
    ],
    b: Annotated[Comparand, typer.Argument(parser=_usage(Comparand.parse), metavar="B", help="What is compared.")],
    inputs: InputsOption = None,
    samples: SamplesOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of random inputs.")] = 0,
    int_max: Annotated[int, typer.Option("--int-max", min=1, metavar="N", help="Random integers are below this.")] = 2,
    rtol: Annotated[float | None, _limit("--rtol", "Allow an error relative to each value. Default: by dtype.")] = None,
    atol: Annotated[float | None, _limit("--atol", "Allow an absolute error.")] = None,
    scale: Annotated[float | None, _limit("--scale", "Allow an error relative to the output's RMS.")] = None,
    cosine: Annotated[float | None, _limit("--cosine", "Least cosine similarity.")] = None,
    snr_db: Annotated[float | None, _limit("--snr", "Least ratio of signal to error, in dB.")] = None,
    golden: Annotated[bool, typer.Option("--golden", help="Run A, a torch module, in float64.")] = False,
    top_k: Annotated[bool, typer.Option("--top-k", help="Count how often the 1 and 5 largest values agree.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
    save_outputs: Annotated[
        Path | None,
        typer.Option(
            "--save-outputs",
            metavar="PATH",
            help="Write the results for polygraphy inspect data and run --load-outputs: a .json file, or a folder.",
        ),
    ] = None,
    save_inputs: Annotated[
        Path | None,
        typer.Option("--save-inputs", metavar="PATH", help="Write the inputs for polygraphy run --load-inputs."),
    ] = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import first what registers plugin ops: a module or file.py."),
    ] = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Run two models on the same inputs and compare the results. Exit status 1: they are out of tolerance."""
    with reporting(verbose, debug) as console:
        if inputs is not None and samples is not None:
            raise OptionError("--samples is for random inputs: leave it out with --inputs.")
        for path in (html, as_json):
            if path is not None:
                check_writable(path, force)
        with Stages(console) as stages:
            with stages.stage("load"):
                search_here()
                for place in imports or []:
                    import_code(place)
                from .compare import compare as compare_models
                from .compare_subjects import make_side

                requests = (a.load(), b.load())
                sides = [make_side(request.model, device) for request in requests]
            with stages.stage("compare"):
                report = compare_models(
                    sides[0],
                    sides[1],
                    _inputs(inputs, samples is not None, requests, sides),
                    tolerance=_tolerance(rtol, atol, scale, cosine, snr_db),
                    golden="float64" if golden else None,
                    samples=samples,
                    seed=seed,
                    int_max=int_max,
                    top_k=top_k,
                    device=device,
                    save_outputs=save_outputs,
                    save_inputs=save_inputs,
                )
        show(report)
        if html is not None:
            report.to_html(html)
        if as_json is not None:
            as_json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if not report.ok:
            raise typer.Exit(1)


def show(report: CompareReport) -> None:
    """Print a report on standard output: its table is not squeezed where that is no terminal."""
    width = None if sys.stdout.isatty() else 110
    Console(highlight=False, width=width).print(report)


def _inputs(path: Path | None, random: bool, requests: Sequence[Request], sides: Sequence[Side]) -> Any:
    """What the command line says to compare on; None for random inputs."""
    from .compare_inputs import Sample

    if path is not None:
        return _read_sample(path, sides)
    for request in requests:
        if not random and (request.args or request.kwargs):
            return Sample(request.args, request.kwargs or {})
    return None


def _read_sample(path: Path, sides: Sequence[Side]) -> Any:
    import numpy as np

    from .cli_run import read_inputs
    from .compare_inputs import Sample
    from .runners import Layout

    for side in sides:
        if side.signature is not None:
            args, kwargs = Layout.of(side.signature).call(read_inputs(path, side.signature))
            return Sample(args, kwargs)
    try:
        with np.load(path, allow_pickle=False) as file:
            return Sample.of({name: file[name] for name in file.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path} is no .npz file of plain arrays: {error}") from error


def _tolerance(
    rtol: float | None, atol: float | None, scale: float | None, cosine: float | None, snr_db: float | None
) -> Tolerance | None:
    """The limits that are given; None where there are none."""
    from .tolerances import Tolerance

    values = {"rtol": rtol, "atol": atol, "scale": scale}
    given = {name: value for name, value in values.items() if value is not None}
    if not given and cosine is None and snr_db is None:
        return None
    # Where only the whole is held to a limit, single values may be anything.
    return Tolerance(**given, cosine=cosine, snr_db=snr_db, outliers=0.0 if given else 1.0)
