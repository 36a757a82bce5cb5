"""The library name that TensorRT-RTX's parser opens when it imports a plugin.

The parsers of TensorRT-RTX that know plugins (1.7 on) dlopen ``libtensorrt_rtx.so`` right before they add one. The
Linux wheels hold ``libtensorrt_rtx.so.1`` alone, and the parser ends the process where the name is not found. So the
name is made before parsing: for a child process as a link in a folder on its ``LD_LIBRARY_PATH``, which the loader
reads once at the start; in a process that runs already as an empty library of that name (`plugin_alias`).

Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

from ...errors import BackendError
from .flavour import Flavour
from .plugin_alias import load_alias

_NAME = "libtensorrt_rtx.so"
_VARIABLE = "LD_LIBRARY_PATH"


def library_environment(flavour: Flavour, folder: Path) -> dict[str, str]:
    """What to add to the environment of a child process whose parser imports plugins.

    Args:
        flavour: TensorRT, and Windows, need nothing.
        folder: where a link may be made; it must outlive the child.
    """
    libraries = _libraries(flavour)
    if libraries is None or (libraries / _NAME).exists():
        return {}
    versions = sorted(libraries.glob(f"{_NAME}.*"))
    if not versions:
        return {}  # installed in another way than from a wheel: the loader's own search must find it
    links = folder / "lib"
    links.mkdir(exist_ok=True)
    (links / _NAME).symlink_to(versions[0])
    before = os.environ.get(_VARIABLE)
    return {_VARIABLE: f"{links}{os.pathsep}{before}" if before else str(links)}


def require_library(flavour: Flavour) -> None:
    """Make sure, before anything is parsed, that the parser in this process finds the name.

    TensorRT-RTX must be imported already.

    Raises:
        BackendError: it does not, and would end the process.
    """
    libraries = _libraries(flavour)
    if libraries is None or (libraries / _NAME).exists():  # the parser looks beside itself first
        return
    try:
        ctypes.CDLL(_NAME)
        return
    except OSError as error:
        missing = str(error)
    versions = sorted(libraries.glob(f"{_NAME}.*"))
    try:
        if not versions:
            raise OSError(missing)
        load_alias(_NAME, versions[0])
        ctypes.CDLL(_NAME)
    except OSError as error:
        raise BackendError(
            f"{flavour.title}'s parser opens {_NAME} to import a plugin, and would end this process since that "
            f"cannot be found ({error}). Build in a child process (isolate=True, the default), make "
            f'{libraries / _NAME} a link to {_NAME}.1, or convert with plugin_host="segments".'
        ) from error


def _libraries(flavour: Flavour) -> Path | None:
    """The folder that holds the wheel's libraries; None where the name is no matter or the folder is unknown."""
    if not flavour.jit or sys.platform == "win32":
        return None
    spec = importlib.util.find_spec(f"{flavour.name}_libs")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None
