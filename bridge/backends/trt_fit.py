"""What an engine of TensorRT or TensorRT-RTX is made for, and whether it fits the machine that is to run it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .base import BuildOptions
from .flavour import Flavour

if TYPE_CHECKING:
    RTX = False  # set by scripts/typecheck.py


def identity(flavour: Flavour, options: BuildOptions, version: str) -> dict[str, Any]:
    """`Backend.identity` of these two.

    Args:
        flavour: which of them.
        options: of the build.
        version: of the library.
    """
    return {
        "version": version,
        "distributions": _distributions(flavour.name),
        "platform": f"{sys.platform} {platform.machine()}",
        # What the library reads from the environment where tf32_environment does not set it.
        "tf32": options.tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0",
        "gpus": [] if options.compute_capabilities else _gpus(named=not flavour.jit),
    }


def made_for(flavour: Flavour, options: BuildOptions) -> dict[str, Any]:
    """What an engine that is built here is for, in `Engine.info`: ``target`` is for people, ``gpu`` for `misfit`.

    ``gpu`` is {"name", "capability"} of the GPU whose kernels it holds, None for an engine for several.
    """
    if options.compute_capabilities:
        return {"target": ", ".join(f"{major}.{minor}" for major, minor in options.compute_capabilities), "gpu": None}
    if not torch.cuda.is_available():
        return {"target": "any GPU it supports", "gpu": None}
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    return {
        "target": f"compute capability {capability}",
        "gpu": {"name": torch.cuda.get_device_name(), "capability": capability},
    }


def misfit(flavour: Flavour, info: Mapping[str, Any], version: str, capability: tuple[int, int], name: str) -> str:
    """Why an engine cannot be loaded here, as far as that is known before the library is asked; "" where it is not.

    Neither library takes engines of another release ("Version Compatibility" in both manuals). TensorRT's kernels are
    for one compute capability; which GPUs an engine of TensorRT-RTX runs on beyond those named is left to itself.

    Args:
        flavour: which library.
        info: of the engine.
        version: of the library here.
        capability: of the device.
        name: of the device.
    """
    made, words = str(info.get("version", "")), []
    if made and made.split(".")[:3] != version.split(".")[:3]:
        words.append(
            f"it was built with {flavour.title} {made}, and {version} is installed here, which takes no engine of "
            f"another release (install {flavour.title} {made}, or convert again)"
        )
    gpu = info.get("gpu")
    here = f"{capability[0]}.{capability[1]}"
    if gpu and not flavour.jit and gpu["capability"] != here:
        words.append(
            f"it was built for {gpu['name']} (compute capability {gpu['capability']}), and the device here is {name} "
            f"({here}); TensorRT's engines run on GPUs of one compute capability (convert again on this machine)"
        )
    return "" if not words else f"This engine cannot be loaded: {'; '.join(words)}."


def words_of_invalidity(flavour: Flavour, plan: bytes | bytearray | memoryview) -> str:
    """What TensorRT-RTX itself says against an engine that it did not load, "" where it says nothing."""
    if not flavour.jit:
        return ""
    if TYPE_CHECKING and not RTX:
        return ""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    runtime = trt.Runtime(trt.Logger(trt.ILogger.INTERNAL_ERROR))
    _, found = runtime.get_engine_validity(plan)
    names = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(found) & int(bit)]
    return f" {flavour.title} says: {', '.join(names)}." if names else ""


def _gpus(named: bool) -> list[str]:
    """What an engine that is built here is for; the child process builds on the first GPU, this one on the current.

    Args:
        named: whether it is for GPUs of one name, rather than of one compute capability.
    """
    if not torch.cuda.is_available():
        return []
    indices = sorted({0, torch.cuda.current_device()})
    capabilities = ["{}.{}".format(*torch.cuda.get_device_capability(index)) for index in indices]
    names = [torch.cuda.get_device_name(index) for index in indices] if named else [""] * len(indices)
    return [f"{capability} {name}".strip() for capability, name in zip(capabilities, names, strict=True)]


@functools.cache
def _distributions(name: str) -> dict[str, str]:
    """Versions of what pip installed of a library: its parser is a distribution's own, without a version."""
    wanted = re.compile(rf"{name}(_cu\d+)?(_libs|_bindings)?")
    found = ((str(one.name).lower().replace("-", "_"), one.version) for one in importlib.metadata.distributions())
    return {name: version for name, version in found if wanted.fullmatch(name)}
