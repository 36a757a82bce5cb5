"""Checks of what an op computes: schema, arguments, dtypes, strides, repetition, CUDA against CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .calls import encode_tensors
from .captures import wait_for_device
from .check_report import Finding
from .check_samples import Call, flat_results
from .registry import call_op

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_MOST_WORDS = 400
_HALF = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Subject:
    """An op on one device with the calls that run there.

    Attributes:
        op: the op.
        device: where.
        calls: sample calls on that device.
        results: what each gave, flat.
        random: repeated calls give unrelated results, so only shapes and dtypes can be compared.
    """

    op: torch._ops.OpOverload
    device: torch.device
    calls: tuple[Call, ...]
    results: tuple[list[Any], ...]
    random: bool = False

    def difference(self, got: Sequence[Any], expected: Sequence[Any]) -> str:
        """In words how results differ, "" if they do not; numbers count unless the op is random."""
        return difference(got, expected, values=not self.random)

    def run(self, call: Call) -> list[Any]:
        """Results of a call, flat, computed when this returns."""
        return run_alone(self.op, call, self.device)


def run_alone(op: Callable[..., Any], call: Call, device: torch.device) -> list[Any]:
    """Results of a call, flat, with nothing else under way on the device: streams are a check of their own."""
    if device.type == "cuda":
        wait_for_device(device)
    results = flat_results(call.run(op))
    if device.type == "cuda":
        wait_for_device(device)
    return results


def difference(got: Sequence[Any], expected: Sequence[Any], values: bool = True, tolerance: float | None = None) -> str:
    """In words how two lists of results differ, "" if they do not.

    Args:
        got: results under test.
        expected: what they should be; of other floating dtypes if need be, which then is no difference in value.
        values: compare numbers, too.
        tolerance: relative to the largest magnitude of each tensor; None for that of its dtype.
    """
    if len(got) != len(expected):
        return f"{len(got)} outputs instead of {len(expected)}"
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            if mine is not theirs:
                return f"output {index} is {_kind(mine)} instead of {_kind(theirs)}"
            continue
        if mine.shape != theirs.shape:
            return f"output {index} has shape {tuple(mine.shape)} instead of {tuple(theirs.shape)}"
        if values and (text := _values_differ(mine, theirs, tolerance)):
            return f"output {index}: {text}"
    return ""


def _values_differ(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float | None) -> str:
    if not theirs.numel():
        return ""
    mine, theirs = mine.detach().cpu(), theirs.detach().cpu()
    if not (theirs.is_floating_point() or theirs.is_complex()):
        wrong = (mine != theirs).sum().item()
        return f"{wrong} of {theirs.numel()} values differ" if wrong else ""
    allowed = tolerance or max(_TOLERANCES.get(t.dtype, 1e-4) for t in (mine, theirs))
    if theirs.is_complex():
        mine, theirs = torch.view_as_real(mine.resolve_conj()), torch.view_as_real(theirs.resolve_conj())
    a, b = mine.double(), theirs.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = b[b.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    error = torch.where(same, torch.zeros_like(a), (a - b).abs())
    bad = ~(error <= allowed * max(scale, 1e-6))  # NaN is bad
    if not bad.any():
        return ""
    worst = error[bad].max().item()
    return f"{bad.sum().item()} of {b.numel()} values differ, by up to {worst:.3g} where values go up to {scale:.3g}"


def check_schema(op: torch._ops.OpOverload) -> Iterator[Finding]:
    """Whether the op returns new tensors and changes nothing, by its schema."""
    schema = op._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    views = any(r.alias_info is not None for r in schema.returns)
    odd = [str(r.type) for r in schema.returns if str(r.type) not in ("Tensor", "List[Tensor]", "Optional[Tensor]")]
    if written:
        what = f"it changes its arguments {', '.join(written)} in place, which a graph cannot express"
        yield Finding("schema", "error", what, "return new tensors instead: mutates_args=() and no (a!) in the schema")
    elif views:
        yield Finding("schema", "error", "it returns views of its arguments", "return new tensors: add .clone()")
    elif odd or not schema.returns:
        what = f"it returns {', '.join(odd) or 'nothing'}"
        yield Finding("schema", "error", what, "return tensors only; a number as a 0-d tensor")
    elif torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
        what = (
            "it is a composite op: torch.export takes it apart, so it becomes a plugin only if its parts do not convert"
        )
        yield Finding("schema", "note", what, "to keep it whole register it with torch.library.custom_op")
    else:
        yield Finding("schema", "ok", "functional: new tensors out, none changed")


def check_arguments(subject: Subject) -> Iterator[Finding]:
    """Whether real calls leave their arguments alone, return memory of their own, and survive being stored."""
    for call in subject.calls:
        given = call.clone()
        results = subject.run(given)
        for number, (before, after) in enumerate(zip(call.tensors, given.tensors, strict=True)):
            if _values_differ(after, before, 1e-30):
                what = f"a call changes its tensor argument number {number}, and the schema does not say so; {call}"
                yield Finding("run", "error", what, "write to a new tensor (torch.empty_like)")
                return
        owned = {t.untyped_storage().data_ptr() for t in given.tensors if t.numel()}
        for index, result in enumerate(results):
            if isinstance(result, torch.Tensor) and result.numel():
                if result.untyped_storage().data_ptr() in owned:
                    what = f"output {index} shares memory with an argument or another output; {call}"
                    yield Finding("run", "error", what, "return a tensor of its own: .clone()")
                    return
                owned.add(result.untyped_storage().data_ptr())
        tensors, template = encode_tensors(call.args, call.kwargs)  # PluginError says which argument has no JSON form
        expected = [torch.view_as_real(r.resolve_conj()) if r.is_complex() else r for r in results if r is not None]
        if text := subject.difference(call_op(subject.op, template, tensors, subject.device), expected):
            yield Finding("run", "error", f"the call as a plugin node stores it gives something else: {text}; {call}")
            return
    count = len(subject.calls)
    yield Finding("run", "ok", f"{count} sample call{'s' * (count != 1)} on {subject.device.type}")


def check_repeat(subject: Subject) -> Iterator[Finding]:
    """Whether equal calls give equal results."""
    for call, first in zip(subject.calls, subject.results, strict=True):
        for _ in range(2):
            again = subject.run(call)
            if difference(again, first, values=False):
                yield Finding("repeat", "error", f"equal calls give different shapes; {call}")
                return
            if subject.random:
                what = "equal calls give unrelated numbers; below only shapes and dtypes are compared"
                todo = "" if torch.Tag.nondeterministic_seeded in subject.op.tags else _RANDOM
                yield Finding("repeat", "warning" if todo else "note", what, todo)
                return
            if text := difference(again, first, tolerance=1e-30):
                what = f"equal calls differ by rounding ({text}): sums in changing order, by atomics perhaps"
                yield Finding("repeat", "note", what)
                return
    yield Finding("repeat", "ok", "equal calls give equal results")


def check_dtypes(subject: Subject, fake_differs: Callable[[Call, Sequence[Any]], str]) -> Iterator[Finding]:
    """float32, float16 and bfloat16: which run, and whether they give the same up to rounding."""
    call = subject.calls[0]
    kinds = [t.dtype for t in call.tensors if t.dtype in (*_HALF, torch.float64)]
    if not kinds:
        yield Finding("dtypes", "note", "no floating-point tensor among the arguments of the first sample")
        return
    fine: list[str] = []
    for dtype in _HALF:
        name = str(dtype).removeprefix("torch.")
        # Both runs get the very same values; what differs is the arithmetic alone.
        cast = _cast(call, kinds[0], dtype)
        try:
            results = subject.run(cast)
        except Exception as error:
            what = f"it does not run in {name}: {_words(error)}"
            yield Finding("dtypes", "warning", what, f"take {name}, or say so: models in {name} will fail")
            continue
        if text := fake_differs(cast, results):
            yield Finding("dtypes", "error", f"in {name} the fake kernel is wrong: {text}", "follow x.dtype in it")
            continue
        try:
            expected = subject.run(_cast(cast, dtype, torch.float32))
        except Exception as error:  # an op for half precision alone
            logger.debug("no float32 reference: %s", error)
            fine.append(name)
            continue
        if text := subject.difference(results, expected):
            todo = "accumulate in float32, and read and write memory in the tensors' own dtype"
            yield Finding("dtypes", "error", f"{name} gives other numbers than float32: {text}", todo)
        else:
            fine.append(name)
    if fine:
        yield Finding("dtypes", "ok", ", ".join(fine))


def check_strides(subject: Subject) -> Iterator[Finding]:
    """Whether tensors that are not contiguous give the same as contiguous ones."""
    tried = 0
    for call in subject.calls:
        plain = call.map(lambda _, tensor: tensor.contiguous())
        expected = subject.run(plain)
        for number in range(len(plain.tensors)):
            for label, change in _LAYOUTS.items():
                if (other := change(plain.tensors[number])) is None:
                    continue
                varied = plain.map(lambda n, t, number=number, other=other: other if n == number else t)  # type: ignore[misc]
                what = f"tensor argument number {number} {label}; {call}"
                try:
                    text = subject.difference(subject.run(varied), expected)
                except Exception as error:
                    yield Finding("strides", "error", f"fails with {what}: {_words(error)}", _CONTIGUOUS)
                    return
                if text:
                    yield Finding("strides", "error", f"wrong with {what}: {text}", _CONTIGUOUS)
                    return
                tried += 1
    yield Finding("strides", "ok", f"{tried} calls with tensors that are not contiguous, or begin inside their memory")


def check_against_cpu(cuda: Subject, cpu: Subject) -> Iterator[Finding]:
    """Whether both implementations give the same."""
    for call, result in zip(cuda.calls, cuda.results, strict=True):
        try:
            expected = cpu.run(call.to(cpu.device))
        except Exception as error:
            yield Finding("cuda against cpu", "note", f"the CPU does not take {call}: {_words(error)}")
            continue
        if text := cuda.difference(result, expected):
            todo = "one of the two implementations is wrong, or they round very differently"
            yield Finding("cuda against cpu", "error", f"they differ: {text}; {call}", todo)
            return
    yield Finding("cuda against cpu", "ok", "the same numbers on both")


_RANDOM = (
    "if it draws random numbers say so, that calls are not merged: @trtbridge.plugin(..., random=True), or "
    "tags=torch.Tag.nondeterministic_seeded in torch.library; if not, look for memory that is read before it is written"
)
_CONTIGUOUS = "begin with x = x.contiguous(), or give the kernel the strides"


def _transposed(tensor: torch.Tensor) -> torch.Tensor | None:
    if tensor.ndim < 2 or tensor.numel() < 2:
        return None
    other = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return None if other.is_contiguous() else other


def _every_second(tensor: torch.Tensor) -> torch.Tensor | None:
    return None if not tensor.ndim else torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def _offset(tensor: torch.Tensor) -> torch.Tensor | None:
    flat = torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])
    return flat[1:].view(tensor.shape)


_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "transposed in memory": _transposed,
    "with every second element of its memory": _every_second,
    "at an odd address": _offset,
}


def _cast(call: Call, source: torch.dtype, target: torch.dtype) -> Call:
    return call.map(lambda _, tensor: tensor.to(target) if tensor.dtype == source else tensor)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _words(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_MOST_WORDS]}{'...' * (len(text) > _MOST_WORDS)}"
