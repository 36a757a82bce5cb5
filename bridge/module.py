"""EngineModule: a torch.nn.Module around a running program, called as the original was."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import BackendError, OptionError, OutOfRangeError, RefitError, TrtBridgeError
from .backends import get_backend
from .cache import resolve_cache_dir
from .input_check import InputChecker
from .inspection import InspectReport, inspect
from .out_of_range import Original
from .program import Program
from .refit import Weights, refit_program
from .runtime import RunningProgram
from .runtime_options import RuntimeOptions
from .stats import Stats, gather_stats
from .text import size_text
from .torch_op import HANDLE, call_traced, is_traced, register

if TYPE_CHECKING:
    from .compare_report import CompareReport
    from .profile_report import ProfileReport


class EngineModule(torch.nn.Module):
    """A converted module: same arguments, same structure of results.

    It has no parameters and no gradients, and ``state_dict()`` is empty. Calls from several threads may overlap; on
    CUDA the work is enqueued on torch's current stream. ``copy.deepcopy`` shares the engines.

    Args:
        program: what it runs.
        device: where; None for the backend's own choice (the current CUDA device, or the CPU).
        cache_dir: folder for compiled kernels; None for the default one.
        options: how calls run.
        eager: the original, which runs in place of the engines where the sizes of a call lie outside every profile;
            None raises `OutOfRangeError` there. It is neither copied, nor a submodule, nor saved.
        weights: a module or a state dict whose weights the engines take first.

    Raises:
        BackendError: the engines cannot run on that device.
        OptionError: ``eager`` is no module, or on another device.
        RefitError: the weights do not fit.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        options: RuntimeOptions | None = None,
        eager: torch.nn.Module | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.options = options or RuntimeOptions()
        self.device = pick_device(program.backend, device)
        self._stripped = program if program.is_stripped else None
        self.program = program if weights is None else refit_program(program, weights, self.device)
        self._cache_dir = cache_dir
        self._cache_folder: Path | None = resolve_cache_dir(cache_dir)
        self._checker = InputChecker(program.signature, self.device)
        self._running: RunningProgram | None = None
        self._load_lock = threading.Lock()
        self._original = None if eager is None else Original(eager, self.device)
        self.training = False
        self._handle = register(self, program.info.get(HANDLE))
        self._refit_lock = threading.Lock()
        if runs_here(self.device) and not self.program.is_stripped:
            self._load()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engines.

        Args:
            args, kwargs: as the original takes them, tensors on ``self.device`` with the dtypes, ranks and ranges of
                ``self.program.signature``.

        Returns:
            What the original returns: the same structure, fresh tensors.

        Raises:
            InputError: an argument does not fit; the message names each that does not and what was expected.
            OutOfRangeError: an `InputError` about nothing but sizes, where there is no original to run instead.
            BackendError: there is no device here to run on.
            RefitError: the engines were saved without weights and have got none.
            ExecutionError: the backend or a plugin op failed.
        """
        if torch.compiler.is_compiling() and is_traced(args, kwargs):
            return call_traced(self, args, kwargs)
        return self._call(args, kwargs)

    # torch.export puts another function in the place of torch.nn.Module.__call__ while it traces, in all threads.
    __call__ = torch.nn.Module._wrapped_call_impl

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call itself, arguments as the original takes them; the op of compiled graphs ends here, too."""
        running = self._running or self._load()
        try:
            tensors = self._checker(args, kwargs)
        except OutOfRangeError as error:
            if self._original is None:
                raise
            return self._original(args, kwargs, str(error))
        return self._structured(running(tensors))

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """A call on these very tensors: fill them, call what this returns, read its results.

        Where calls run as CUDA graphs (`RuntimeOptions.cuda_graphs`) it is one replay, with nothing copied; elsewhere a
        plain call. Its results are the same tensors each time, valid until the module's next call, unless their sizes
        depend on data. Sizes outside every profile are an error here, whatever `out_of_range` says.

        Args:
            args, kwargs: as for a call.

        Raises:
            InputError, BackendError, ExecutionError: as for a call.
        """
        running = self._running or self._load()
        tensors = self._checker(args, kwargs)
        bound = (running, running.bind(tensors))

        def call() -> Any:
            nonlocal bound
            now = self._running or self._load()
            if now is not bound[0]:  # it was refitted
                bound = (now, now.bind(tensors))
            return self._structured(bound[1]())

        return call

    def _structured(self, results: list[torch.Tensor]) -> Any:
        """Flat results in the original's structure."""
        signature = self.program.signature
        for index in signature.complex_outputs:
            results[index] = torch.view_as_complex(results[index].contiguous())
        return signature.output_structure.unflatten(results)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to one file, without weights if it was converted so; see `Program.save`."""
        program = self._stripped or self.program
        info = {**program.info, HANDLE: self._handle}  # exported programs that call this module find it by that
        dataclasses.replace(program, info=info).save(path)

    def refit(self, weights: Weights) -> None:
        """Take other weights, without a rebuild: all engines, or none where they do not fit.

        Calls that are running end with the old weights, later ones have the new ones; calls of `bind` follow, an
        original that runs on sizes out of range does not. Where weights are inputs of the engines (TensorRT-RTX,
        `Engine.info`), the new ones take the old ones' place on the device, and CUDA graphs that a caller captured have
        them too: wait for their replays before, and start none meanwhile. Elsewhere such graphs keep the old ones, and
        while it works there are two copies of the weights on the device.

        Args:
            weights: a module like the one that was converted, or its state dict; whole, with the same names, types and
                shapes, on any device.

        Raises:
            RefitError: it was converted without ``refittable=True``, or the weights do not fit; each that does not is
                named.
            BackendError: there is no device here to work on.
        """
        with self._refit_lock:
            program = refit_program(self.program, weights, self.device)
            if not runs_here(self.device):
                self.program = program
                return
            with self._load_lock:
                running = self._running
            if running is not None and running.exchange(program):
                self.program = program
                return
            fresh = RunningProgram(program, self.device, self._cache_folder, options=self.options)
            with self._load_lock:
                old, self.program, self._running = self._running, program, fresh
            if old is not None:
                with old.exclusive():  # what it holds for calls with the old weights is let go
                    pass

    def inspect(self, fusions: bool = True) -> InspectReport:
        """What it runs: steps, precisions, fusions, weights, memory, plugins with their Python lines; prints as text.

        Args:
            fusions: ask the backend what it fused, which loads the engines once more for that moment; TensorRT-RTX
                engines are read instead where there is no GPU.

        Raises:
            BackendError: the backend cannot load an engine.
        """
        return inspect(self.program, self.device, fusions, "" if self._original is None else str(self._original))

    def profile(
        self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, iterations: int = 20
    ) -> ProfileReport:
        """Where the time of a call goes: by layer, segment and plugin, back to module and Python line.

        Layers run in copies of the engines, so that calls stay as they are; these copies take memory meanwhile.

        Args:
            args, kwargs: of the call, in one sequence and one mapping: ``fast.profile((x,), {"mask": mask})``.
            iterations: how many calls are timed, of each kind: whole, step by step, layer by layer.

        Raises:
            OptionError: there are no iterations.
            InputError, BackendError, ExecutionError: as a call.
        """
        from .profile import profile

        return profile(self, args, kwargs or {}, iterations, self._cache_folder)

    def stats(self) -> Stats:
        """Calls so far, sizes and memory; prints as text."""
        return gather_stats(self.program, self.device, self._running, self.eager_calls)

    @property
    def out_of_range(self) -> str:
        """What happens to sizes outside every profile: "error", or "eager", the original runs."""
        return "error" if self._original is None else "eager"

    @property
    def eager_calls(self) -> int:
        """How many calls the original has run, as their sizes were outside every profile."""
        return 0 if self._original is None else self._original.calls

    @property
    def verification(self) -> CompareReport | None:
        """What ``convert(verify=...)`` found, also after `save` and `load`; None where it was not asked."""
        from .compare_report import CompareReport

        found = self.program.info.get("verification")
        return None if found is None else CompareReport.from_json(found)

    def extra_repr(self) -> str:
        engines, plugins = self.program.engines, self.program.plugin_calls
        parts = [f"{self.program.source}, backend={self.program.backend}, device={self.device}"]
        parts.append(f"{len(engines)} engine(s), {size_text(self.program.size_bytes)}, {len(plugins)} plugin call(s)")
        return ", ".join(parts)

    def _load(self) -> RunningProgram:
        if self.program.is_stripped:
            raise RefitError(
                f"{self.program.source} was saved without weights. Give it some: tb.load(path, weights=...) with the "
                "module or its state dict, or module.refit(...)."
            )
        with self._load_lock:
            if self._running is None:
                self._running = RunningProgram(self.program, self.device, self._cache_folder, options=self.options)
            return self._running

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> EngineModule:
        # .to(), .cuda(), .half() of this module or of one that contains it all come here.
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return self
        probe = torch.empty(0, device=self.device)
        moved = fn(probe)
        if moved.device != probe.device:
            raise TrtBridgeError(
                f"An EngineModule cannot move from {self.device} to {moved.device}: its engines are on one device. "
                f'Load a copy there: save it with tb.save(module, path), then tb.load(path, device="{moved.device}").'
            )
        if moved.dtype != probe.dtype:
            raise TrtBridgeError(
                f"An EngineModule cannot change to {moved.dtype}: its precision was fixed when it was built. "
                "Convert a module of that dtype."
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineModule:
        eager = None if self._original is None else self._original.module
        copied = EngineModule(self.program, self.device, self._cache_dir, self.options, eager)
        copied._stripped = self._stripped
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TrtBridgeError(
            "An EngineModule is not pickled: write it with tb.save(module, path), read it with tb.load(path)."
        )


def runs_here(device: torch.device) -> bool:
    """Whether a device is there."""
    return device.type != "cuda" or torch.cuda.is_available()


def pick_device(backend: str, device: torch.device | str | None) -> torch.device:
    """The device to run on, with its index where it is there.

    Raises:
        OptionError: it is no device at all.
        BackendError: the device is of a kind that the backend does not run on, or is not there.
    """
    if device is None:
        cuda = backend != "onnxruntime" or "cuda" in get_backend(backend).status().devices
        device = "cuda" if cuda and (backend != "onnxruntime" or torch.cuda.is_available()) else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={device!r}: not a torch device, such as 'cuda:0' or 'cpu'.") from error
    if device.type == "cuda" and torch.cuda.is_available():
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"There is no device cuda:{index}; torch sees {torch.cuda.device_count()} CUDA device(s)."
            )
        return torch.device("cuda", index)
    if device.type == "cpu" and backend != "onnxruntime":
        raise BackendError(
            f"The backend {backend!r} runs on CUDA devices only, not on {device}; use backend='onnxruntime'."
        )
    return device
