"""trtbridge: from a PyTorch module to a TensorRT engine, over ONNX, in one call.

The names load when first used, so that ``trtbridge --help`` and the processes that build engines start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import plugins
from .errors import (
    AccuracyError,
    BackendError,
    BuildError,
    CacheError,
    DynamicShapeError,
    ExecutionError,
    ExportError,
    InputError,
    ModelFileError,
    OptionError,
    OutOfRangeError,
    PassError,
    PluginError,
    RefitError,
    TrtBridgeError,
    UnsupportedOpError,
)

if TYPE_CHECKING:
    from .bridge.annotation import annotate
    from .bridge.compare import compare
    from .bridge.compare_report import CompareReport
    from .bridge.convert import convert, load, save
    from .bridge.dims import Dim
    from .bridge.explain import explain
    from .bridge.export import export
    from .bridge.inspection import InspectReport
    from .bridge.localize import localize
    from .bridge.localize_report import LocalizeReport
    from .bridge.module import EngineModule
    from .bridge.options import Options
    from .bridge.precision import PrecisionReport
    from .bridge.profile_report import ProfileReport
    from .bridge.runtime_options import RuntimeOptions
    from .bridge.stats import Stats
    from .bridge.submodules import SubmodulesReport, convert_submodules
    from .bridge.tolerances import Tolerance
    from .passes.default import DEFAULT
    from .passes.pipeline import Pass, Pipeline
    from .plugins.authoring import plugin
    from .plugins.captures import exclusive_capture

__version__ = "0.1.0"

_LAZY = {
    "CompareReport": ".bridge.compare_report",
    "DEFAULT": ".passes.default",
    "Dim": ".bridge.dims",
    "EngineModule": ".bridge.module",
    "InspectReport": ".bridge.inspection",
    "LocalizeReport": ".bridge.localize_report",
    "Options": ".bridge.options",
    "Pass": ".passes.pipeline",
    "Pipeline": ".passes.pipeline",
    "PrecisionReport": ".bridge.precision",
    "ProfileReport": ".bridge.profile_report",
    "RuntimeOptions": ".bridge.runtime_options",
    "Stats": ".bridge.stats",
    "SubmodulesReport": ".bridge.submodules",
    "Tolerance": ".bridge.tolerances",
    "annotate": ".bridge.annotation",
    "compare": ".bridge.compare",
    "convert": ".bridge.convert",
    "convert_submodules": ".bridge.submodules",
    "exclusive_capture": ".plugins.captures",
    "explain": ".bridge.explain",
    "export": ".bridge.export",
    "load": ".bridge.convert",
    "localize": ".bridge.localize",
    "plugin": ".plugins.authoring",
    "save": ".bridge.convert",
}

__all__ = [
    "DEFAULT",
    "AccuracyError",
    "BackendError",
    "BuildError",
    "CacheError",
    "CompareReport",
    "Dim",
    "DynamicShapeError",
    "EngineModule",
    "ExecutionError",
    "ExportError",
    "InputError",
    "InspectReport",
    "LocalizeReport",
    "ModelFileError",
    "OptionError",
    "Options",
    "OutOfRangeError",
    "Pass",
    "PassError",
    "Pipeline",
    "PluginError",
    "PrecisionReport",
    "ProfileReport",
    "RefitError",
    "RuntimeOptions",
    "Stats",
    "SubmodulesReport",
    "Tolerance",
    "TrtBridgeError",
    "UnsupportedOpError",
    "annotate",
    "compare",
    "convert",
    "convert_submodules",
    "exclusive_capture",
    "explain",
    "export",
    "load",
    "localize",
    "plugin",
    "plugins",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
