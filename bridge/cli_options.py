"""The command line's arguments and options: how they are written, read and checked. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..errors import ModelFileError, OptionError
from .cli_source import DimRequest, Source, resolve_dims

T = TypeVar("T")


class BackendName(str, Enum):
    """Values of ``--backend``."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"
    ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True)
class ComputeCapability:
    """One ``--compute-capability``."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        match = re.fullmatch(r"(\d+)\.(\d)", text)
        if match is None:
            raise OptionError(f"{text!r} is no compute capability, such as 8.9.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class SizeRequest:
    """One ``--size``."""

    name: str
    size: int

    @classmethod
    def parse(cls, text: str) -> SizeRequest:
        name, _, size = text.partition("=")
        if not name.isidentifier() or not size.isdecimal():
            raise OptionError(f"{text!r} is not NAME=VALUE, as in batch=4.")
        return cls(name, int(size))


def _usage(parse: Callable[[str], T]) -> Callable[[Any], T]:
    """A parser of command line values whose complaints are usage errors."""

    def parsed(value: Any) -> T:
        try:
            return parse(value) if isinstance(value, str) else value  # typer passes values through twice
        except OptionError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


SourceArgument = Annotated[
    Source,
    typer.Argument(
        parser=_usage(Source.parse),
        metavar="SOURCE",
        help="[bold]package.module:function[/bold] or [bold]path/to/file.py:function[/bold], where the function takes "
        "nothing and returns (model, args), (model, args, kwargs), or a dict with the keys of trtbridge.convert(); "
        "or an [bold].onnx[/bold] file.",
    ),
]
BackendOption = Annotated[
    BackendName | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="tensorrt, tensorrt_rtx, onnxruntime, or auto: the first of these that can build here. Default: auto.",
    ),
]
DimOption = Annotated[
    list[DimRequest] | None,
    typer.Option(
        "--dim",
        "-d",
        parser=_usage(DimRequest.parse),
        metavar="DIM",
        help="A dimension that varies: INPUT:AXIS=NAME:MIN:OPT:MAX, as x:0=batch:1:8:32. Then y:0=batch is the same, "
        "and z:0=8 is fixed. Several profiles: x:0=batch:1:1:1,2:8:32. Repeatable.",
    ),
]
OpsetOption = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="ONNX opset of the export, 18 to 25. Default: 20.")
]
Tf32Option = Annotated[
    bool | None, typer.Option("--tf32", help="Let float32 products use TF32 (about 1e-4 relative error).")
]
CapabilityOption = Annotated[
    list[ComputeCapability] | None,
    typer.Option(
        "--compute-capability",
        parser=_usage(ComputeCapability.parse),
        metavar="X.Y",
        help="A GPU to build for with TensorRT-RTX, as 8.9. Repeatable. Default: the one here, else any.",
    ),
]
LevelOption = Annotated[
    int | None,
    typer.Option("--optimization-level", min=0, max=5, metavar="N", help="TensorRT's builder optimization level."),
]
WorkspaceOption = Annotated[
    int | None, typer.Option("--workspace-mb", min=1, metavar="N", help="Most scratch memory of a layer, in MiB.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        help="Folder for engines and compiled kernels. Default: $TRTBRIDGE_CACHE_DIR, else the user's.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="Where it runs: cpu, cuda, cuda:1. Default: the backend's choice."),
]
TimeoutOption = Annotated[
    float | None, typer.Option("--timeout-s", metavar="S", help="Most seconds that building one engine may take.")
]
RefittableOption = Annotated[
    bool, typer.Option("--refittable", help="Build so that trtbridge refit can exchange the weights later.")
]
StripOption = Annotated[
    bool, typer.Option("--strip-weights", help="Leave the weights out: a small file, for trtbridge refit to fill.")
]
StreamingOption = Annotated[
    int | None,
    typer.Option(
        "--weight-streaming-mb",
        min=0,
        metavar="N",
        help="TensorRT: most device memory for the weights of one engine, in MiB; the rest is streamed from the host.",
    ),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--plugin-host",
        metavar="WHERE",
        help="Where plugins run: engine, segments (between engines), or auto: inside where it can be. Default: auto.",
    ),
]
AsPluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--as-plugin",
        metavar="NAME",
        help="What becomes a plugin though the backend could take it: a torch op (of a file an ONNX op), a module "
        "path, or a pattern of one. Repeatable.",
    ),
]
NoFallbackOption = Annotated[
    bool, typer.Option("--no-fallback", help="Fail where the backend refuses something, rather than make it a plugin.")
]
DataSizeOption = Annotated[
    int | None,
    typer.Option("--max-data-size", min=1, metavar="N", help="Bound of data-dependent sizes that nothing else bounds."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="fp16 or bf16: compute in 16 bits where a float32 model allows it. auto or auto+bf16: keep in float32 "
        "what a tolerance needs, found by measuring. int8, fp8, int8+fp16 or fp8+fp16: products over 8 bits, with "
        "calibration= in the source's dict. Default: what the model has.",
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        help="With --precision auto: the largest L2 norm of an output's change over that of the output. Default: 0.01.",
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="NAME",
        help="With --precision, what stays in float32: a module path, an op type, or a pattern of one. Repeatable.",
    ),
]
CalibrationOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="With --precision, a sample to measure on: an .npz file with an array for each argument, by name. "
        "Repeatable. Default: the example.",
    ),
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="FORM",
        help="auto: the faster form of each attention; fused: one node wherever the backend takes it; decomposed; or "
        "as-written. Default: as-written.",
    ),
]
CheckPassesOption = Annotated[
    bool,
    typer.Option(
        "--check-passes", help="Run ONNX Runtime after every graph pass; name the pass and node that change numbers."
    ),
]
DumpGraphsOption = Annotated[
    Path | None,
    typer.Option(
        "--dump-graphs",
        metavar="DIR",
        help="Write the ONNX after every graph pass, which opens in Netron, and what the pass changed as text.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Compare the results with the original's on the example; fail where they differ."),
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the log, and what each pass did and left alone and why.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the whole log, and tracebacks of errors.")]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Replace the output file if it exists.")]
SizeOption = Annotated[
    list[SizeRequest] | None,
    typer.Option(
        "--size",
        parser=_usage(SizeRequest.parse),
        metavar="NAME=N",
        help="Size of a dynamic dimension of random inputs. Repeatable. Default: what it is tuned for.",
    ),
]


def given_dims(requests: list[DimRequest] | None) -> list[DimRequest]:
    """Every ``--dim`` with its range.

    Raises:
        typer.BadParameter: a name has no range, or two.
    """
    try:
        return resolve_dims(requests or [])
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint="--dim") from None


def given_options(
    backend: BackendName | None,
    opset: int | None,
    tf32: bool | None,
    capabilities: list[ComputeCapability] | None,
    optimization_level: int | None,
    workspace_mb: int | None,
    cache_dir: Path | None,
    device: str | None,
    timeout_s: float | None,
) -> dict[str, Any]:
    """Those options of convert() that are given, so that the others keep what the source says."""
    options = {
        "backend": None if backend is None else backend.value,
        "opset": opset,
        "tf32": tf32,
        "compute_capabilities": tuple((one.major, one.minor) for one in capabilities or []) or None,
        "optimization_level": optimization_level,
        "workspace_bytes": None if workspace_mb is None else workspace_mb << 20,
        "cache_dir": cache_dir,
        "device": device,
        "timeout_s": timeout_s,
    }
    return {name: value for name, value in options.items() if value is not None}


def plugin_options(
    host: str | None, as_plugin: list[str] | None, no_fallback: bool, max_data_size: int | None
) -> dict[str, Any]:
    """Those options about plugins that are given."""
    options = {
        "plugin_host": host,
        "as_plugins": tuple(as_plugin or ()) or None,
        "fallback": False if no_fallback else None,
        "max_data_size": max_data_size,
    }
    return {name: value for name, value in options.items() if value is not None}


def weight_options(refittable: bool, strip_weights: bool, weight_streaming_mb: int | None) -> dict[str, Any]:
    """Those options about weights that are given."""
    options = {
        "refittable": refittable or None,
        "strip_weights": strip_weights or None,
        "weight_streaming_bytes": None if weight_streaming_mb is None else weight_streaming_mb << 20,
    }
    return {name: value for name, value in options.items() if value is not None}


def precision_options(
    precision: str | None, keep_fp32: list[str] | None, tolerance: float | None, calibration: list[Path] | None
) -> dict[str, Any]:
    """Those options about precision that are given.

    Raises:
        ModelFileError: a file of ``calibration`` is missing, or no .npz file.
    """
    options: dict[str, Any] = {
        "precision": precision,
        "keep_fp32": tuple(keep_fp32 or ()) or None,
        "precision_tolerance": tolerance,
    }
    if calibration:
        from .cli_run import read_sample

        options["calibration"] = [read_sample(path) for path in calibration]
    return {name: value for name, value in options.items() if value is not None}


def verify_options(verify: bool) -> dict[str, Any]:
    """Whether the result is compared, where that is given."""
    return {"verify": True} if verify else {}


def pass_options(check_passes: bool, dump_graphs: Path | None, attention: str | None = None) -> dict[str, Any]:
    """Those options about the graph that are given."""
    options = {"check_passes": check_passes or None, "dump_graphs": dump_graphs, "attention": attention}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if attention == "as-written":
        given["attention"] = None
    return given


def check_writable(path: Path, force: bool) -> None:
    """See that a file can be written, before long work is done for it.

    Raises:
        ModelFileError: it exists and may not be replaced, or its folder is missing or read-only.
    """
    if path.is_dir():
        raise ModelFileError(f"{path} is a folder: name a file in it.")
    if path.exists() and not force:
        raise ModelFileError(f"{path} exists: choose another name with --output, or replace it with --force.")
    if not path.parent.is_dir():
        raise ModelFileError(f"There is no folder {path.parent} to write {path.name} into.")
    if not os.access(path.parent, os.W_OK):
        raise ModelFileError(f"Cannot write into the folder {path.parent}.")
