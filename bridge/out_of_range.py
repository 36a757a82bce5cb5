"""Calls whose sizes lie outside every profile: an error, or the original module in place of the engines."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..errors import ExecutionError, OptionError

logger = logging.getLogger(__name__)

OUT_OF_RANGE = ("error", "eager")
"""Values of ``out_of_range``."""


def check_choice(out_of_range: str | None, eager: torch.nn.Module | None) -> None:
    """See that what is asked for and what is given to do it go together, for a program from a file.

    Raises:
        OptionError: they do not.
    """
    if out_of_range not in (None, *OUT_OF_RANGE):
        raise OptionError(f'out_of_range={out_of_range!r}: must be "error" or "eager".')
    if out_of_range == "eager" and eager is None:
        raise OptionError(
            'out_of_range="eager" runs the original module, which is not in the file: give it, as in '
            "tb.load(path, eager=model)."
        )
    if out_of_range == "error" and eager is not None:
        raise OptionError('out_of_range="error" never runs the module given as eager: leave one of them out.')


class Original:
    """The module that an engine was made of, run as the engine runs: in eval mode, without gradients and autocast.

    It is kept by reference. It runs in eval mode and has its own mode back afterwards, so that it must not be trained
    in another thread meanwhile. Calls from several threads may overlap.

    Args:
        module: the original.
        device: where the engines run; the module must be there.

    Attributes:
        module: the original.
        calls: how many it has run.

    Raises:
        OptionError: it is no module, or on another device.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        if not isinstance(module, torch.nn.Module):
            raise OptionError(f"eager must be a torch.nn.Module, got {type(module).__name__}.")
        self.module = module
        self.calls = 0
        self._device = device
        self._lock = threading.Lock()
        self._running = 0
        self._trained: list[torch.nn.Module] = []  # those to put back into training mode
        where = self._elsewhere()
        # Without a GPU neither runs here, and the original may be moved once there is one.
        if where is not None and (device.type != "cuda" or torch.cuda.is_available()):
            raise OptionError(
                f'out_of_range="eager": the engines run on {device}, and the original {type(module).__name__} is on '
                f'{where}: move it there first, with .to("{device}").'
            )

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: str) -> Any:
        """Run a call of the engine's.

        Args:
            args, kwargs: as the engine's module was called.
            why: what is outside, for the log, where the first call leaves a line.

        Raises:
            ExecutionError: the original was moved to another device. What it raises itself passes.
        """
        where = self._elsewhere()
        if where is not None:
            raise ExecutionError(
                f"The original {type(self.module).__name__}, which is to run on sizes out of range, was moved to "
                f"{where}; the engines are on {self._device}.\n{why}"
            )
        with self._lock:
            self.calls += 1
            first = self.calls == 1
        if first:
            logger.warning(
                "sizes outside every profile: the original %s runs in place of the engines, now and whenever that is "
                "so again (eager_calls counts). %s",
                type(self.module).__name__,
                why.partition("\n")[0],
            )
        kind = self._device.type
        autocast: AbstractContextManager[object] = nullcontext()
        if torch.is_autocast_enabled(kind):
            autocast = torch.autocast(kind, enabled=False)
        with torch.no_grad(), autocast, self._eval_mode():
            return self.module(*args, **kwargs)

    def __str__(self) -> str:
        return f"sizes outside: the original {type(self.module).__name__} runs ({self.calls} calls so far)"

    def _elsewhere(self) -> torch.device | None:
        """The device that the module is on where that is not the engines'."""
        tensor = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        return None if tensor is None or tensor.device == self._device else tensor.device

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        # The first of the calls that overlap puts the module into eval mode, the last one puts it back.
        with self._lock:
            if not self._running:
                # The flags alone: eval() may do more, such as merging weights, that train() need not undo.
                self._trained = [module for module in self.module.modules() if module.training]
                for module in self._trained:
                    module.training = False
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    for module in self._trained:
                        module.training = True
                    self._trained = []
