"""``trtbridge.plugins.check``: tells the author of an op what is wrong with it as a plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from ..errors import PluginError
from .authoring import registration
from .check_backends import check_backends
from .check_cuda import check_graph, check_stream, not_run
from .check_report import CheckReport, Finding
from .check_samples import Call, calls_of, made_up
from .check_shapes import check_dynamic, check_edges, check_fake, fake_differs
from .check_values import (
    Subject,
    _words,
    check_against_cpu,
    check_arguments,
    check_dtypes,
    check_repeat,
    check_schema,
    check_strides,
    difference,
    run_alone,
)
from .registry import find_op, op_name


def check(op: Any, samples: Iterable[Any] | None = None, *, backends: Sequence[str] | None = None) -> CheckReport:
    """Check a torch op as a plugin: what it promises against what it does.

    The op runs on the CPU and, where there is one, on the current CUDA device, as far as it has kernels for them.

    Args:
        op: full name ("demo::soft_sign"), what `plugin` returned, or an op of torch.ops.
        samples: calls to check it with: tuples of arguments or dicts by name, tensors on any device. The first one is
            used for the costly checks. Default: those given to `plugin`, else random tensors of shape (2, 3, 8) if
            the op takes nothing but tensors.
        backends: names of backends to convert a model of one op with; default all that can build here, () for none.

    Returns:
        The report: printable; ``ok`` says whether nothing is wrong.

    Raises:
        PluginError: there are no samples and none can be made up, or they are malformed.
    """
    name = _name_of(op)
    try:
        found = find_op(name)
    except PluginError as error:
        todo = "import the module that registers it first (trtbridge plugins check --import MODULE)"
        return CheckReport(name, "", 0, (Finding("name", "error", str(error), todo),))
    if not isinstance(found, torch._ops.OpOverload):
        what = "it is a function of torch, no op: it has neither schema nor fake kernel to check"
        return CheckReport(name, "", 0, (Finding("name", "error", what, "wrap it in an op of your own"),))
    findings = list(check_schema(found))
    if any(finding.severity == "error" for finding in findings):
        return CheckReport(op_name(found), str(found._schema), 0, tuple(findings))
    calls, made = _calls(found, samples)
    if made:
        todo = "give samples that the op meets in models: @trtbridge.plugin(..., samples=...), check(op, samples)"
        findings.append(Finding("samples", "note", f"made up: {calls[0]}", todo))
    subjects: list[Subject] = []
    for device in _devices():
        findings += _subject(found, calls, device, subjects)
    for step in _steps(subjects, backends):
        found_now, lost = _guarded(step)
        findings += found_now
        if any(f.check.startswith("fake") and f.severity == "error" for f in found_now):
            # Everything below rests on the fake kernel, and would only say so again in other words.
            findings.append(Finding("all others", "not run", "they rest on the fake kernel"))
            break
        if lost:
            what = "the CUDA context is lost, so what remains was not checked"
            findings.append(
                Finding("run", "error", what, "look for reads and writes outside tensors (compute-sanitizer)")
            )
            break
    return CheckReport(op_name(found), str(found._schema), len(calls), tuple(findings))


def _steps(subjects: Sequence[Subject], backends: Sequence[str] | None) -> Iterator[Callable[[], Iterator[Finding]]]:
    for subject in subjects:
        for check_one in (check_arguments, check_repeat, check_fake):
            yield partial(_on, subject, check_one)
    if not subjects:
        return
    main = subjects[-1]  # the CUDA device where there is one
    cpu = subjects[0] if len(subjects) == 2 else None
    yield lambda: check_dynamic(main, cpu)
    yield lambda: check_edges(main, cpu)
    yield lambda: check_dtypes(main, lambda call, results: fake_differs(main.op, call, results))
    yield lambda: check_strides(main)
    if main.device.type == "cuda":
        if cpu is not None:
            yield partial(check_against_cpu, main, cpu)
        yield lambda: check_stream(main)
    else:
        yield not_run
    if backends is None or backends:
        yield lambda: check_backends(subjects, backends)
    if main.device.type == "cuda":
        yield lambda: check_graph(main)  # last, since a capture that fails is not nice to what comes after


def _guarded(step: Callable[[], Iterator[Finding]]) -> tuple[list[Finding], bool]:
    """The findings of a check, and whether the CUDA context died in it; what it raises is a finding too."""
    findings: list[Finding] = []
    try:
        findings.extend(step())
        return findings, False
    except Exception as error:
        findings.append(Finding("run", "error", f"it failed while being checked: {_words(error)}"))
        fatal = ("illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure")
        return findings, any(words in str(error) for words in fatal)


def _on(subject: Subject, check_one: Callable[[Subject], Iterator[Finding]]) -> Iterator[Finding]:
    """Findings that are made for each device say for which."""
    for finding in check_one(subject):
        yield Finding(f"{finding.check} ({subject.device.type})", finding.severity, finding.what, finding.todo)


def _subject(
    op: torch._ops.OpOverload, calls: Sequence[Call], device: torch.device, subjects: list[Subject]
) -> Iterator[Finding]:
    """Run the samples on a device, and add the op with those that run there to the subjects."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    check = f"run ({device.type})"
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), key):
        if device.type == "cuda":
            yield Finding(check, "warning", "it has no CUDA kernel", "engines run on a GPU: register one")
        else:
            todo = "give one, @trtbridge.plugin(..., cpu=...): conversions are checked there in ONNX Runtime"
            yield Finding(check, "warning", "it has no CPU kernel, so it cannot run in ONNX Runtime", todo)
        return
    ran: list[Call] = []
    results: list[list[Any]] = []
    random = False
    for call in calls:
        moved = call.to(device)
        try:
            first = run_alone(op, moved.clone(), device)
            again = run_alone(op, moved.clone(), device)
        except Exception as error:
            todo = ""
            if "alias" in str(error):
                todo = "return new tensors: add .clone()"
            yield Finding(check, "error", f"it fails with {_words(error)}; {call}", todo)
            continue
        random = random or bool(difference(again, first))
        ran.append(moved)
        results.append(first)
    if ran:
        subjects.append(Subject(op, device, tuple(ran), tuple(results), random))


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda", torch.cuda.current_device()))
    return found


def _calls(op: torch._ops.OpOverload, samples: Iterable[Any] | None) -> tuple[list[Call], bool]:
    """The sample calls, and whether they are made up."""
    if samples is not None:
        return calls_of(samples), False
    known = registration(op_name(op))
    if known is None or known.samples is None:
        return made_up(op), True
    return calls_of(known.samples() if callable(known.samples) else known.samples), False


def _name_of(op: Any) -> str:
    if isinstance(op, str):
        return op
    if isinstance(op, torch._ops.OpOverload):
        return op_name(op)
    if isinstance(op, CustomOpDef):
        return op_name(op._opoverload)
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name)
    raise PluginError(
        f"check() takes the name of an op (namespace::name), what @plugin or torch.library.custom_op gave, or an op "
        f"of torch.ops; not a {type(op).__name__}."
    )
