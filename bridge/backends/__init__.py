"""The backends: each builds engines from segments and runs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...errors import BackendError, OptionError

if TYPE_CHECKING:
    from .base import Backend, BackendStatus

logger = logging.getLogger(__name__)

BACKENDS = ("tensorrt", "tensorrt_rtx", "onnxruntime")
"""Names of all backends, in the order in which "auto" tries them."""


def get_backend(name: str) -> Backend:
    """A backend by name.

    Raises:
        OptionError: there is no such backend.
    """
    if name in ("tensorrt", "tensorrt_rtx"):
        from .tensorrt import TensorRtBackend

        return TensorRtBackend(name)
    if name == "onnxruntime":
        from .onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    raise OptionError(f"backend={name!r}: must be 'auto' or one of {', '.join(map(repr, BACKENDS))}.")


def choose_backend(name: str) -> tuple[Backend, str]:
    """The backend to build with, and why that one.

    Args:
        name: a backend, or "auto" for the first that is installed and can build on this machine.

    Raises:
        OptionError: there is no such backend.
        BackendError: it is not installed or cannot build here.
    """
    if name != "auto":
        backend = get_backend(name)
        status = backend.status()
        if not status.can_build:
            raise BackendError(status.reason)
        return backend, "asked for"
    passed: list[str] = []
    for status in all_statuses():
        if status.can_build:
            reason = "; ".join([f"{status.name} {status.version} is installed and can build here", *passed])
            logger.info("backend: %s (%s)", status.name, reason)
            return get_backend(status.name), reason
        passed.append(f"{status.name}: {status.reason.split('. ')[0].rstrip('.')}")
    raise BackendError("No backend can build here: " + "; ".join(passed))


def all_statuses() -> Iterator[BackendStatus]:
    """What every backend can do here, in the order of `BACKENDS`."""
    return (get_backend(name).status() for name in BACKENDS)
