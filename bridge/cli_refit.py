"""``trtbridge refit``: other weights for a saved program."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ModelFileError
from .cli_display import reporting
from .cli_options import DebugOption, DeviceOption, ForceOption, VerboseOption, check_writable
from .text import size_text

if TYPE_CHECKING:
    import torch


def refit(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What trtbridge convert wrote with --refittable or --strip-weights."),
    ],
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS",
            help="The whole state dict of the module: a .safetensors file, or what torch.save wrote (.pt, .pth, .bin).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")],
    force: ForceOption = False,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a copy of a converted model with other weights, without a rebuild."""
    with reporting(verbose, debug):
        check_writable(output, force)
        from .module import pick_device
        from .program import Program
        from .refit import refit_program, require_recipes

        program = Program.load(file)
        recipes = require_recipes(program)
        state = read_state(weights)
        started = time.perf_counter()
        new = refit_program(program, state, pick_device(program.backend, device))
        seconds = time.perf_counter() - started
        new.save(output)
    print(f"{output}: {len(recipes.weights)} weights in {seconds:.2f} s, {size_text(output.stat().st_size)}")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file; nothing in it is run.

    Raises:
        ModelFileError: no such file, not a state dict, or safetensors is not installed.
    """
    import torch

    if not path.is_file():
        raise ModelFileError(f"There is no file {path}.")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModelFileError(f"Reading {path} takes safetensors: pip install safetensors.") from error
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ModelFileError(f"{path} is no safetensors file, or is damaged: {error}.") from error
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"{path} cannot be read as a state dict: {first} Save one with torch.save(module.state_dict(), path); a "
            "whole module is not read, since that would run code."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelFileError(f"{path} holds no state dict of tensors, but a {type(found).__name__}.")
    return found
