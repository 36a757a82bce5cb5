"""``trtbridge run``: inputs from a file or at random, outputs as statistics and as a file, latency."""

from __future__ import annotations

import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, ModelFileError, OptionError
from .atomic import write_atomically
from .backends import get_backend
from .dims import evaluate_shape
from .dtypes import to_torch
from .model import Signature, TensorSpec
from .module import EngineModule
from .profiles import nearest_profile
from .structure import flatten, leaf_labels

_WARM_UP_CALLS = 10


def why_not_here(module: EngineModule) -> str:
    """Why a module cannot be called on this machine, "" where it can."""
    if module.device.type == "cuda" and not torch.cuda.is_available():
        return get_backend(module.program.backend).status().reason or f"There is no device {module.device} here."
    return ""


@dataclass(frozen=True)
class RandomInputs:
    """How inputs are made up.

    Attributes:
        seed: of the generator; the same on every device.
        sizes: of named dimensions; the others take the size that the engine is tuned for, in the profile of these.
        int_max: integers are below this.
    """

    seed: int = 0
    sizes: Mapping[str, int] | None = None
    int_max: int = 2

    def make(self, signature: Signature) -> list[torch.Tensor]:
        """A tensor for each input, on the CPU.

        Raises:
            OptionError: a size is given for a dimension that the program does not have.
        """
        sizes = {name: opt for name, (_, opt, _) in signature.dims.items()}
        unknown = [name for name in self.sizes or {} if name not in sizes]
        if unknown:
            known = ", ".join(f"{name} from {r[0]} to {r[2]}" for name, r in signature.dims.items())
            raise OptionError(f"--size {unknown[0]}: no such dynamic dimension; it has {known or 'none'}.")
        if self.sizes and (index := nearest_profile(self.sizes, signature.profiles)) is not None:
            sizes = {name: opt for name, (_, opt, _) in signature.profiles[index].items()}
        sizes |= self.sizes or {}
        generator = torch.Generator().manual_seed(self.seed)
        return [self._tensor(spec, sizes, generator) for spec in signature.inputs]

    def _tensor(self, spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
        shape = evaluate_shape(spec.shape, sizes)
        if shape is None:
            raise InputError(f"Input {spec} has a size that only data can tell: give it with --inputs.")
        dtype = to_torch(spec.dtype)
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=generator).bool()
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        if dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=dtype)
        limit = min(self.int_max, torch.iinfo(dtype).max)
        return torch.randint(0, limit, shape, generator=generator).to(dtype)


def read_inputs(path: Path, signature: Signature) -> list[torch.Tensor]:
    """The inputs in an .npz file, whose keys are the labels of the signature.

    NumPy has no bfloat16 and no float8: those inputs are written as float32 and rounded here.

    Raises:
        ModelFileError: no such file, or it is no .npz file.
        InputError: an array is missing, or there is one too many, or one is of a dtype that torch does not know.
    """
    arrays = _read_arrays(path)
    missing = [
        f"{label} ({spec})"
        for label, spec in zip(signature.labels, signature.inputs, strict=True)
        if label not in arrays
    ]
    extra = [name for name in arrays if name not in signature.labels]
    if missing or extra:
        raise InputError(
            f"{path} must hold one array for each of {', '.join(signature.labels)}."
            + (f" Missing: {', '.join(missing)}." if missing else "")
            + (f" Unexpected: {', '.join(extra)}." if extra else "")
        )
    return [_to_tensor(arrays[n], s, n) for n, s in zip(signature.labels, signature.inputs, strict=True)]


def read_sample(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an .npz file as tensors, by name: a sample of ``calibration=``.

    Raises:
        ModelFileError: no such file, or it is no .npz file.
        InputError: an array is of a dtype that torch does not know.
    """
    found = {}
    for name, array in _read_arrays(path).items():
        try:
            found[name] = torch.from_numpy(np.array(array, order="C", copy=True))
        except TypeError as error:
            raise InputError(f"{path}: {name}: {error}") from error
    return found


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ModelFileError(f"{path} is no .npz file: write it with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise ModelFileError(f"There is no file {path}.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{path} is no .npz file of plain arrays, or is damaged: {error}") from error
    return arrays


def _to_tensor(array: np.ndarray[Any, Any], spec: TensorSpec, label: str) -> torch.Tensor:
    try:
        tensor = torch.from_numpy(np.array(array, order="C", copy=True))
    except TypeError as error:
        raise InputError(f"Input {label}: {error}") from error
    dtype = to_torch(spec.dtype)
    written_as_float32 = dtype == torch.bfloat16 or "float8" in str(dtype)
    return tensor.to(dtype) if written_as_float32 and tensor.dtype == torch.float32 else tensor


@dataclass(frozen=True)
class Outputs:
    """What a program returned.

    Attributes:
        tensors: by path ("output", "output[1]", "logits").
        constants: what is returned beside tensors, by path.
    """

    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, result: Any) -> Outputs:
        """Take the result of a call apart."""
        tensors, structure = flatten(result)
        root = "" if structure.keys else "output"
        # A number that follows a dynamic dimension is a constant here.
        return cls(
            dict(zip(leaf_labels(structure, root), (t.detach().cpu() for t in tensors), strict=True)),
            {path: value for path, value in structure.constants(root) if value is not None},
        )

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all; bfloat16 and float8 are widened to float32.

        Raises:
            ModelFileError: the file cannot be written.
        """
        arrays = {name: _to_array(tensor) for name, tensor in self.tensors.items()}
        numbers = {name: value for name, value in self.constants.items() if isinstance(value, (bool, int, float))}
        arrays |= {name: np.asarray(value) for name, value in numbers.items()}

        def write(file: Any) -> None:
            # numpy.savez takes names as keywords, so it cannot write an array called "file".
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, array in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array, allow_pickle=False)

        try:
            write_atomically(path, write)
        except OSError as error:
            raise ModelFileError(f"Cannot write {path}: {error}.") from error


def _to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    narrow = tensor.dtype == torch.bfloat16 or "float8" in str(tensor.dtype)
    return np.asarray((tensor.float() if narrow else tensor).contiguous().numpy())


def describe_tensor(tensor: torch.Tensor) -> tuple[str, ...]:
    """Shape, dtype, mean, smallest, largest (NaNs left out) and number of NaNs, as text."""
    shape = f"({', '.join(map(str, tensor.shape))})"
    name = str(tensor.dtype).removeprefix("torch.")
    values = tensor.abs().double() if tensor.is_complex() else tensor.double()
    nans = torch.isnan(values)
    known = values[~nans]
    if not known.numel():
        return shape, name, "-", "-", "-", str(int(nans.sum()))
    if not tensor.is_floating_point() and not tensor.is_complex():
        low, high = str(int(known.min())), str(int(known.max()))
    else:
        low, high = f"{known.min().item():.6g}", f"{known.max().item():.6g}"
    return shape, name, f"{known.mean().item():.6g}", low, high, str(int(nans.sum()))


@dataclass(frozen=True)
class Latency:
    """Times of single calls, each waited for, in milliseconds."""

    calls_ms: Sequence[float]

    @classmethod
    def measure(cls, call: Callable[[], Any], count: int, device: torch.device) -> Latency:
        """Time calls one by one, after some that are not counted."""
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda _: None)
        times = []
        for index in range(min(_WARM_UP_CALLS, count) + count):
            wait(device)
            started = time.perf_counter()
            call()
            wait(device)
            if index >= min(_WARM_UP_CALLS, count):
                times.append((time.perf_counter() - started) * 1e3)
        return cls(times)

    def __str__(self) -> str:
        median = statistics.median(self.calls_ms)
        low, high = min(self.calls_ms), max(self.calls_ms)
        return f"latency: median {median:.3f} ms, from {low:.3f} to {high:.3f} ms over {len(self.calls_ms)} calls"
