"""Every error that trtbridge raises: one hierarchy, so that ``except TrtBridgeError`` catches them all.

It stands at the top level because ``bridge``, ``passes`` and ``plugins`` all raise from it while knowing nothing of
each other. Messages say what is wrong, where (input, node, tensor, Python line), what was expected and what to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TrtBridgeError(Exception):
    """Base of every error raised by trtbridge."""


class OptionError(TrtBridgeError, TypeError):
    """An option is unknown, or its value does not make sense."""


class InputError(TrtBridgeError, ValueError):
    """An argument of a call does not fit the signature: its dtype, rank, shape, device, or its presence."""


class OutOfRangeError(InputError):
    """The sizes of a call's tensors lie outside every range that the engines were built for; nothing else is wrong."""


class DynamicShapeError(TrtBridgeError, ValueError):
    """``dynamic_shapes`` does not fit the arguments, or the model contradicts it."""


class ExportError(TrtBridgeError):
    """torch.export or torch.onnx could not turn the module into an ONNX graph."""


class ModelFileError(TrtBridgeError):
    """A file (an .onnx model or a saved program) is missing, damaged, or of a kind that cannot be read."""


class PassError(TrtBridgeError):
    """A graph pass broke its contract: it changed the model's inputs or outputs, or left an invalid graph."""


class BackendError(TrtBridgeError):
    """A backend is not installed, or cannot do on this machine what was asked of it."""


class RefitError(TrtBridgeError, ValueError):
    """New weights do not fit a program, or it cannot take any. It keeps the old ones, all of them."""


class _NodesError(TrtBridgeError):
    def __init__(self, message: str, refusals: Sequence[Any] = (), graph_at_fault: bool = True) -> None:
        super().__init__(message)
        self.refusals = tuple(refusals)
        self.graph_at_fault = graph_at_fault
        self.segment = ""


class UnsupportedOpError(_NodesError):
    """The backend's parser refuses nodes of the graph. All of them are listed.

    Attributes:
        refusals: the nodes, as `bridge.backends.base.Refusal`.
        segment: name of the segment, where it is known.
    """


class BuildError(_NodesError):
    """The backend accepted the graph but failed, or died, while building the engine.

    Attributes:
        refusals: the nodes that the backend's messages name, as `bridge.backends.base.Refusal`; often empty.
        graph_at_fault: whether another graph could help; False for a full disk or a limit of time.
        segment: name of the segment, where it is known.
    """


class ExecutionError(TrtBridgeError):
    """A running program failed."""


class CacheError(TrtBridgeError):
    """The cache folder cannot be used."""


class PluginError(TrtBridgeError):
    """A plugin op is not registered in this process, or does not do what its schema says."""


class AccuracyError(TrtBridgeError):
    """Results differ from those of the reference by more than the tolerance.

    Attributes:
        report: the `bridge.compare_report.CompareReport`.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
