"""New weights for a program, without a rebuild: all of them, or none.

The new tensors are held against what the program knows of the module (`Parameters`), each weight is made of them by its
recipe, and the backend puts them into copies of the engines. What runs is exchanged at the end, in one step.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ..errors import RefitError
from .backends import get_backend
from .build import snapshot
from .parameters import Parameters, TensorType, attribute_of, digest, module_tensors
from .program import EngineStep, Program, Step
from .recipes import Recipes
from .tracing import alone

logger = logging.getLogger(__name__)

Weights = torch.nn.Module | Mapping[str, Any]
"""A module of the class that was converted, or its state dict."""

_MOST_NAMES = 8


def refit_program(program: Program, weights: Weights, device: torch.device) -> Program:
    """A program with other weights.

    Args:
        program: converted with ``refittable=True`` or ``strip_weights=True``; it is not changed.
        weights: a module or a state dict, on any device; nothing of it is kept.
        device: where the backend may work, if it needs one.

    Returns:
        The new program; its ``info["refitted"]`` counts how often that was done.

    Raises:
        RefitError: the program cannot take weights, or these do not fit: names are missing or unknown, types or shapes
            differ, tied weights are no longer the same, or something that is built in is another now.
        BackendError: the backend cannot work here.
    """
    recipes = require_recipes(program)
    started = time.perf_counter()
    made = recipes.make(checked(recipes.parameters, weights))
    backend = get_backend(program.backend)
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, EngineStep):
            step = EngineStep(step.name, backend.refit(step.engine, made, device))
        steps.append(step)
    constants = dict(program.constants)
    constants |= {name: snapshot(made[name]) for name in recipes.constants}
    info = {name: value for name, value in program.info.items() if name != "verification"}
    if not program.is_stripped:
        info["refitted"] = int(info.get("refitted", 0)) + 1
    logger.info("%s: %d weights exchanged in %.3f s", program.source, len(made), time.perf_counter() - started)
    return dataclasses.replace(program, steps=tuple(steps), constants=constants, info=info)


def require_recipes(program: Program) -> Recipes:
    """How the weights of a program are made.

    Raises:
        RefitError: it does not know.
    """
    if program.recipes is None:
        raise RefitError(
            f"{program.source or 'This program'} was converted without refittable=True, so its engines know nothing of "
            "the module's weights. Convert it again with refittable=True."
        )
    return program.recipes


def checked(parameters: Parameters, weights: Weights) -> dict[str, ir.TensorProtocol]:
    """The tensors that a program reads, by first name.

    Raises:
        RefitError: they do not fit; the message names each that does not.
    """
    if isinstance(weights, torch.nn.Module):
        with alone():  # while a thread traces the module it has others
            given = module_tensors(weights)
            given |= {n: t for n in parameters.fixed if n not in given and (t := attribute_of(weights, n)) is not None}
            known = {*weights.state_dict()} | {*parameters.types, *parameters.ties}
    elif isinstance(weights, Mapping):
        given, known = dict(weights), {*weights}
    else:
        raise RefitError(f"New weights are a torch module or its state dict, not {type(weights).__name__}.")
    names = {*parameters.types, *parameters.ties}
    for group in _groups(parameters.ties):  # a file may hold a tied tensor once, under any of its names
        present = next((name for name in group if name in given), None)
        if present is not None:
            given |= {name: given[present] for name in group if name not in given}
    problems = [
        *_listed("missing", sorted(names - given.keys())),
        *_listed("unknown", sorted(known - {*parameters.names, *names, *parameters.fixed})),
    ]
    if problems and isinstance(weights, torch.nn.Module):
        problems.append("  (adapters must be merged into the module that was converted, as by merge_and_unload())")
    for name in sorted(names & given.keys()):
        problem = _problem(name, given[name], parameters.types[parameters.ties.get(name, name)])
        problems += [problem] if problem else []
    if not problems:
        problems += _untied(parameters.ties, given) + _altered(parameters.fixed, given)
    if problems:
        raise RefitError("The new weights do not fit the program, which keeps its own:\n" + "\n".join(problems))
    return {name: TorchTensor(given[name].detach(), name) for name in parameters.types}


def _groups(ties: Mapping[str, str]) -> Iterable[list[str]]:
    """Names of one tensor."""
    found: dict[str, list[str]] = {}
    for name, first in ties.items():
        found.setdefault(first, [first]).append(name)
    return found.values()


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return [f"  {what}: {', '.join(names[:_MOST_NAMES])}{more}"]


def _problem(name: str, tensor: Any, expected: TensorType) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"  {name}: expected a tensor {expected}, got {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return f"  {name}: a {tensor.layout} tensor on {tensor.device} cannot be read"
    found = TensorType.of(tensor)
    if found.shape != expected.shape:
        return f"  {name}: expected {expected}, got {found}; another shape needs another conversion"
    if found.dtype != expected.dtype:
        return f"  {name}: expected {expected}, got {found}; convert it with .to({_torch_name(expected.dtype)})"
    return ""


def _torch_name(dtype: ir.DataType) -> str:
    names = {"FLOAT": "torch.float32", "DOUBLE": "torch.float64"}
    return names.get(dtype.name, f"torch.{dtype.name.lower()}")


def _untied(ties: Mapping[str, str], given: Mapping[str, torch.Tensor]) -> list[str]:
    """What is one tensor in the graph and two different ones now."""
    found = []
    for name, first in ties.items():
        mine, other = given[name], given[first]
        same = mine.data_ptr() == other.data_ptr() and mine.stride() == other.stride()
        if not same and digest(mine) != digest(other):
            found.append(f"  {name} and {first} were tied when the module was converted, and differ now")
    return found


def _altered(fixed: Mapping[str, str], given: Mapping[str, Any]) -> list[str]:
    """What is built in and another now."""
    return [
        f"  {name}: it is built into the engines (an integer or a mask, no weight), and differs now: convert again"
        for name, expected in fixed.items()
        if isinstance(tensor := given.get(name), torch.Tensor) and digest(tensor) != expected
    ]
