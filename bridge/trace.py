"""Tracing a module with torch.export: as the user calls it, left as it was found."""

from __future__ import annotations

import contextlib
import copy
import enum
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..errors import DynamicShapeError, ExportError
from ..plugins import torch_note
from .arguments import Arguments, trace_tensors
from .assertions import drop_truth_checks
from .guards import guards_always_hold
from .opaque import FailureFinder, Opaque, OpaqueCaller, ResultRecorder, TracedOtherwiseError, can_be_opaque
from .origins import user_frame
from .side_effects import side_effects
from .structure import CONSTANTS, Structure, flatten
from .tracing import alone, one_at_a_time

logger = logging.getLogger(__name__)

MODULE = "module"
"""The attribute of the traced wrapper that holds the user's module."""

# Lines of torch's errors that lead to its own debugging switches.
_ADVERTISING = re.compile(
    r"For more (information|debugging)|TORCH_LOGS=|TORCHDYNAMO|draft_export|C\+\+ stack trace|logs when we create"
    r"|This is .*step \d/3|Create an issue in|Create an error report|^## Exception summary|Refer to the full stack"
)


class _Flat(torch.nn.Module):
    """The user's module as a function from flat, real tensors to flat, real tensors; reports what it returns."""

    def __init__(
        self,
        module: torch.nn.Module,
        arguments: Arguments,
        report: Callable[[Structure, tuple[int, ...]], None],
        opaque: Opaque,
    ) -> None:
        super().__init__()
        self.module = module
        self.input_structure = arguments.structure
        self.complex_inputs = arguments.complex_inputs
        self.opaque = opaque
        self.report = report  # torch.export works on copies of plain attributes, so the result goes out by a call

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = [torch.view_as_complex(t) if i in self.complex_inputs else t for i, t in enumerate(leaves)]
        args, kwargs = self.input_structure.unflatten(given)
        if self.opaque.functions:
            with OpaqueCaller(self.opaque) as caller:
                result = self.module(*args, **kwargs)
            tensors, structure = flatten(result, caller.numbers)
        else:
            tensors, structure = flatten(self.module(*args, **kwargs))
        self.report(structure, tuple(i for i, t in enumerate(tensors) if t.is_complex()))
        return tuple(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors)


@one_at_a_time
def trace_module(
    model: torch.nn.Module, arguments: Arguments
) -> tuple[torch.export.ExportedProgram, Structure, tuple[int, ...]]:
    tensors, specs = trace_tensors(arguments)
    reports: list[tuple[Structure, tuple[int, ...]]] = []
    name = type(model).__name__
    opaque = Opaque(dynamic=any(specs))

    def trace(deferred: bool, finder: AbstractContextManager[object]) -> torch.export.ExportedProgram:
        def report(structure: Structure, complex_outputs: tuple[int, ...]) -> None:
            reports.append((structure, complex_outputs))

        flat = _Flat(model, arguments, report, opaque)
        to_eval_mode(flat)
        with finder:
            return torch.export.export(
                flat,
                tuple(tensors),
                dynamic_shapes={"leaves": tuple(specs)} if tensors else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )

    def trace_both(finder: AbstractContextManager[object]) -> torch.export.ExportedProgram:
        try:
            return trace(deferred=False, finder=finder)
        except Exception as error:
            # torch.export gives up on conditions that it cannot prove; those that hold for every size are harmless.
            if not guards_always_hold(str(error), arguments):
                raise
            logger.info("conditions that torch.export cannot prove hold for every size in range: %s", error)
            return trace(deferred=True, finder=finder)

    def trace_somehow() -> torch.export.ExportedProgram:
        refusal: Exception | None = None
        try:
            while True:
                try:
                    return trace_both(contextlib.nullcontext())
                except TracedOtherwiseError as error:
                    words = _explain_trace(refusal or error, name, arguments)
                    raise type(words)(f"{words}\n{error}") from refusal
                except Exception as error:
                    refusal = error
                    lost = torch_note.is_lost(error)  # of that no function is to blame
                    if lost or not _make_opaque(opaque, model, arguments, trace_both):
                        raise _explain_trace(error, name, arguments) from error
        finally:
            del refusal  # it knows this frame, and with it the module: no cycle of the two is left behind

    program = trace_somehow()
    drop_truth_checks(program)
    if not program.graph_signature.user_outputs:
        raise ExportError(f"{name} returns no tensor, so there is nothing for an engine to compute.")
    for effect in side_effects(program, arguments.labels, MODULE):
        logger.warning("%s %s", name, effect)
    structure, complex_outputs = reports[-1]
    for label, value in structure.constants("output"):
        if not isinstance(value, (*CONSTANTS, enum.Enum)):
            raise ExportError(
                f"{name} returns a {type(value).__name__} ({label}), whose tensors cannot be seen: make the model "
                "return without it (for a cache of transformers use_cache=False), or register its class with "
                "torch.utils._pytree.register_pytree_node."
            )
    return program, structure, complex_outputs


def _make_opaque(
    opaque: Opaque,
    model: torch.nn.Module,
    arguments: Arguments,
    trace: Callable[[AbstractContextManager[object]], Any],
) -> bool:
    """After a failed trace: take the function of torch that failed for one that cannot be looked into."""
    finder = FailureFinder()
    with contextlib.suppress(Exception):
        trace(finder)
    if not can_be_opaque(finder.failed) or finder.failed in opaque.functions:
        return False
    opaque.functions.add(finder.failed)
    try:
        with torch.random.fork_rng(), ResultRecorder(opaque):
            leaves = [t.detach().clone() for t in arguments.tensors]
            leaves = [torch.view_as_complex(t) if i in arguments.complex_inputs else t for i, t in enumerate(leaves)]
            args, kwargs = arguments.structure.unflatten(leaves)
            copy.deepcopy(model)(*args, **kwargs)
    except Exception as error:
        logger.info("the module cannot be run for the results of %s: %s", finder.failed, error)
        return False
    logger.info("%s cannot be traced and becomes one call", finder.failed)
    return bool(opaque.results[finder.failed])


def to_eval_mode(model: torch.nn.Module) -> None:
    """``model.eval()``, also for modules of exported programs (PT2E's are some), which refuse it: they have no mode."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


@contextlib.contextmanager
def left_as_found(model: torch.nn.Module) -> Iterator[None]:
    """Put back every module's training flag and attributes, whatever tracing did to them.

    No other thread traces meanwhile: it may be the same module, which has other parameters then, and these would be
    what is put back.
    """
    with alone():
        before = [
            (m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()
        ]
        try:
            yield
        finally:
            for found in before:
                _put_back(*found)


def _put_back(
    module: torch.nn.Module,
    attributes: Mapping[str, Any],
    parameters: Mapping[str, Any],
    buffers: Mapping[str, Any],
    modules: Mapping[str, Any],
) -> None:
    for own, old in ((module._parameters, parameters), (module._buffers, buffers), (module._modules, modules)):
        if own.keys() != old.keys() or any(own[key] is not old[key] for key in old):
            own.clear()
            own.update(old)
    current = module.__dict__
    if current.keys() != attributes.keys() or any(current[key] is not attributes[key] for key in attributes):
        current.clear()
        current.update(attributes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's talk about itself off the user's screen; their own warnings pass."""
    names = ("onnx._internal.exporter._registration", "_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in (*(f"torch.{name}" for name in names), "onnxscript", "onnx_ir")]
    # Levels and filters are of all threads, and put back as they were found: two of these must not overlap.
    with alone():
        levels = [other.level for other in loggers]
        for other in loggers:
            other.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                warnings.filterwarnings(
                    "ignore",
                    message=r".*(torchvision|onnxscript|pytree|LeafSpec|cuda capability|assigned during export).*",
                )
                yield
        finally:
            for other, level in zip(loggers, levels, strict=True):
                other.setLevel(level)


def _user_line(error: BaseException) -> str:
    """The line of the user's code that an exception passed through last, as text for a message."""
    file, line, code = user_frame("".join(traceback.format_tb(error.__traceback__)), strictly_user=True)
    return f'\n  at "{file}", line {line}: `{code}`' if file else ""


def _explain_trace(error: Exception, name: str, arguments: Arguments) -> Exception:
    text = str(error).strip()
    if "Constraints violated" in text or ("marked" in text and "as dynamic" in text):
        for index, label in reversed(list(enumerate(arguments.labels))):
            text = text.replace(f"L['leaves'][{index}]", label).replace(f"leaves[{index}]", label)
        return DynamicShapeError(
            f"{name} does not take every size that dynamic_shapes promises:\n{shorten(text)}{_user_line(error)}\n"
            "Narrow the Dim, leave that dimension static, or change the line."
        )
    if "data-dependent" in text or "Could not guard" in text or "Could not extract" in text:
        return ExportError(
            f"{name} decides its control flow or a shape by the values of a tensor, which no graph can hold:\n"
            f"{shorten(text)}{_user_line(error)}\n"
            "Use torch.where or torch.cond instead of a Python `if`, or convert the part of the model around that line."
        )
    return ExportError(
        f"torch.export cannot trace {name}: {type(error).__name__}: {shorten(text)}{_user_line(error)}\n"
        "Check that the module runs on these arguments, then try torch.export.export on it alone."
    )


def shorten(text: str, lines: int = 12, width: int = 400) -> str:
    text = re.sub(r"\x1b\[\d*m", "", text)
    kept = [line[:width] for line in text.splitlines() if line.strip() and not _ADVERTISING.search(line)]
    return "\n".join(kept[:lines]) + ("\n..." if len(kept) > lines else "")
