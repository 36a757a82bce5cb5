"""Checks of an op's fake kernel: against real calls, under symbolic sizes, and at sizes 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .check_report import Finding
from .check_samples import Call, flat_results
from .check_values import Subject, _words

_NO_FAKE = (
    "give it one: @trtbridge.plugin(..., fake=...), or torch.library.register_fake: a function of the same arguments "
    "that returns empty outputs of the right shape and dtype"
)
_WRONG_FAKE = "mend the fake kernel: it must return what the op returns, with sizes computed from x.shape"

_WRONG_SIZES = "the kernel is wrong at some sizes: look at masks and at sizes that no block divides"

_GROWTH: tuple[Callable[[int, int], int], ...] = (
    lambda size, _: size + 1,
    lambda size, _: 2 * size,
    lambda size, index: 2 * size + 3 + index,
    lambda size, _: max(2, size - 1),
    lambda size, _: 4 * size,
)
"""Other sizes for the symbols of a call, from the size that each has and its number."""


@dataclass(frozen=True)
class Symbolic:
    """An op's fake kernel run on a call whose sizes are all symbols.

    Attributes:
        call: the call.
        inputs: for each tensor its sizes after the run: a symbol, a number that the kernel fixed, or an expression.
        outputs: for each result its sizes; None for a result that is no tensor.
        guards: what the fake kernel asked of the sizes and took as given.
        sizes: the size of each symbol in the call.
    """

    call: Call
    inputs: tuple[tuple[sympy.Basic, ...], ...]
    outputs: tuple[tuple[sympy.Basic, ...] | None, ...]
    guards: tuple[sympy.Basic, ...]
    sizes: Mapping[sympy.Symbol, int]

    @classmethod
    def run(cls, op: torch._ops.OpOverload, call: Call) -> Symbolic:
        """Run the fake kernel; what it raises is raised."""
        env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True, duck_shape=False)
        with FakeTensorMode(shape_env=env) as mode:

            def fake(number: int, tensor: torch.Tensor) -> Any:
                context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.ndim)
                return mode.from_tensor(tensor, source=ConstantSource(f"t{number}"), symbolic_context=context)

            fakes = call.map(fake)
            results = flat_results(fakes.run(op))
        inputs = tuple(tuple(map(_expression, tensor.shape)) for tensor in fakes.tensors)
        outputs = tuple(tuple(map(_expression, r.shape)) if isinstance(r, torch.Tensor) else None for r in results)
        sizes: dict[sympy.Symbol, int] = {}
        for shape, tensor in zip(inputs, call.tensors, strict=True):
            for expression, size in zip(shape, tensor.shape, strict=True):
                if isinstance(expression, sympy.Symbol):
                    sizes[expression] = size
        # Two sizes found equal are one symbol by now, and a size found constant is a number: such guards say no more.
        said = dict.fromkeys(env.replace(guard.expr) for guard in env.guards)
        guards = tuple(guard for guard in said if guard.free_symbols)
        return cls(call, inputs, outputs, guards, sizes)

    def fixed(self) -> list[tuple[int, int, int]]:
        """Sizes above 1 that the fake kernel made constants: number of the tensor, dimension, size."""
        return [
            (number, axis, size)
            for number, (shape, tensor) in enumerate(zip(self.inputs, self.call.tensors, strict=True))
            for axis, (expression, size) in enumerate(zip(shape, tensor.shape, strict=True))
            if not expression.free_symbols and size > 1
        ]

    def allows(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether some sizes satisfy what the fake kernel took as given, and make sense."""
        if any(not bool(_at(guard, sizes)) for guard in self.guards if guard.free_symbols <= sizes.keys()):
            return False
        values = [_at(expression, sizes) for shape in self.inputs for expression in shape]
        return all(value.is_Integer and int(value) >= 0 for value in values)

    def resized(self, sizes: Mapping[sympy.Symbol, int]) -> Call:
        """The call at other sizes."""
        shapes = {n: [int(_at(e, sizes)) for e in shape] for n, shape in enumerate(self.inputs)}
        return self.call.resized(shapes)

    def mismatch(self, sizes: Mapping[sympy.Symbol, int], results: Sequence[Any]) -> str:
        """In words how real results at some sizes differ from what the fake kernel says, "" if they do not."""
        if len(results) != len(self.outputs):
            return f"{len(results)} outputs, where the fake kernel says {len(self.outputs)}"
        for index, (shape, result) in enumerate(zip(self.outputs, results, strict=True)):
            if shape is None or not isinstance(result, torch.Tensor):
                continue
            if len(shape) != result.ndim:
                return f"output {index} has {result.ndim} dimensions, where the fake kernel says {len(shape)}"
            said = [_at(expression, sizes) for expression in shape]
            # A size that depends on data stays a symbol.
            if any(s.is_Integer and int(s) != real for s, real in zip(said, result.shape, strict=True)):
                return f"output {index} has shape {tuple(result.shape)}, where the fake kernel says {tuple(said)}"
        return ""


def check_fake(subject: Subject) -> Iterator[Finding]:
    """The fake kernel against every sample call: number of outputs, shapes, dtypes, devices, strides."""
    strides = ""
    for call, results in zip(subject.calls, subject.results, strict=True):
        try:
            text = fake_differs(subject.op, call, results)
            strides = strides or fake_differs(subject.op, call, results, strides=True)
        except Exception as error:
            missing = isinstance(error, UnsupportedOperatorException) or "no fake impl" in str(error)
            if missing or isinstance(error, NotImplementedError):
                yield Finding("fake", "error", "it has no fake kernel, so torch.export cannot trace it", _NO_FAKE)
            else:
                yield Finding("fake", "error", f"the fake kernel fails with {_words(error)}; {call}", _NO_FAKE)
            return
        if text:
            yield Finding("fake", "error", f"{text}; {call}", _WRONG_FAKE)
            return
    if strides:
        todo = "allocate outputs alike in both; torch.compile relies on it, engines do not"
        yield Finding("fake", "warning", strides, todo)
    else:
        yield Finding("fake", "ok", "says what the op returns: shapes, dtypes, devices, strides")


def fake_differs(op: torch._ops.OpOverload, call: Call, results: Sequence[Any], strides: bool = False) -> str:
    """In words how the fake kernel differs from real results, "" if it does not; what it raises is raised."""
    env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=env) as mode:
        fakes = flat_results(call.map(lambda _, t: mode.from_tensor(t, static_shapes=True)).run(op))
    if len(fakes) != len(results):
        return f"the op returns {len(results)} outputs, the fake kernel {len(fakes)}"
    for index, (fake, real) in enumerate(zip(fakes, results, strict=True)):
        if not isinstance(fake, torch.Tensor) or not isinstance(real, torch.Tensor):
            if type(fake) is not type(real):
                return f"output {index} is a {type(real).__name__}, by the fake kernel a {type(fake).__name__}"
            continue
        said = [size if isinstance(size, int) else None for size in fake.shape]
        if len(said) != real.ndim or any(s not in (None, r) for s, r in zip(said, real.shape, strict=True)):
            return f"output {index} has shape {tuple(real.shape)}, by the fake kernel {tuple(fake.shape)}"
        for what in ("dtype", "device"):
            if getattr(fake, what) != getattr(real, what):
                return f"output {index} has {what} {getattr(real, what)}, by the fake kernel {getattr(fake, what)}"
        # Strides of dimensions of size 1, and those of an output of unknown size, say nothing.
        if strides and None not in said:
            pairs = zip(real.stride(), fake.stride(), real.shape, strict=True)
            if any(a != b for a, b, size in pairs if size > 1) and real.numel():
                return f"output {index} has strides {real.stride()}, by the fake kernel {tuple(fake.stride())}"
    return ""


def check_dynamic(subject: Subject, cpu: Subject | None) -> Iterator[Finding]:
    """The fake kernel on symbolic sizes, and what it says of other sizes against real calls at those.

    Args:
        subject: the op on the device that counts.
        cpu: the op on the CPU, if that is another; see `_run`.
    """
    call = subject.calls[0]
    if not any(tensor.ndim for tensor in call.tensors):
        yield Finding("dynamic shapes", "ok", "no argument of the first sample has dimensions")
        return
    try:
        symbolic = Symbolic.run(subject.op, call)
    except Exception as error:
        what = f"the fake kernel fails on symbolic sizes with {_words(error)}"
        todo = "compute sizes from x.shape with + - * // alone; no int(size), no branch on a size, no data"
        yield Finding("dynamic shapes", "error", what, todo)
        return
    yield from _fixed(subject, cpu, symbolic)
    compared, refused = 0, ""
    for sizes in _other_sizes(symbolic):
        other = symbolic.resized(sizes)
        try:
            results, differs = _run(subject, cpu, other)
        except Exception as error:
            refused = f"{other}: {_words(error)}"
            continue
        if text := symbolic.mismatch(sizes, results):
            yield Finding("dynamic shapes", "error", f"{text}; {other}", _WRONG_FAKE)
            return
        if differs:
            yield Finding("dynamic shapes", "error", f"{differs}; {other}", _WRONG_SIZES)
            return
        compared += 1
    if not symbolic.sizes:
        return
    limits = ", ".join(str(guard) for guard in symbolic.guards)
    if refused or not compared:
        what = f"the op refuses {refused}" if refused else f"no other sizes were found that satisfy {limits}"
        todo = "" if compared else "give samples of several sizes, so that more than one can be compared"
        yield Finding("dynamic shapes", "note", what, todo)
    if compared:
        only = f"; the fake kernel takes as given: {limits}" if limits else ""
        yield Finding("dynamic shapes", "ok", f"right at {compared} other sets of sizes{only}")


def _fixed(subject: Subject, cpu: Subject | None, symbolic: Symbolic) -> Iterator[Finding]:
    """Sizes that the fake kernel takes for constants: well, if the op itself takes no other."""
    needed, needless = [], []
    for number, axis, size in symbolic.fixed():
        words = f"dimension {axis} of tensor argument number {number} (at {size})"
        shape = list(symbolic.call.tensors[number].shape)
        shape[axis] += 1
        try:
            _run(subject, cpu, symbolic.call.resized({number: shape}))
            needless.append(words)
        except Exception:
            needed.append(words)
    if needed:
        yield Finding("dynamic shapes", "note", f"fixed, and by the op as well: {', '.join(needed)}")
    if needless:
        what = f"the fake kernel fixes {', '.join(needless)}, where the op takes other sizes, so models cannot vary it"
        yield Finding("dynamic shapes", "warning", what, "no int(size) and no branch on a size in the fake kernel")


def check_edges(subject: Subject, cpu: Subject | None) -> Iterator[Finding]:
    """Each size in turn 0 and 1: the fake kernel against real calls; arguments as for `check_dynamic`."""
    try:
        symbolic = Symbolic.run(subject.op, subject.calls[0])
    except Exception:
        return  # check_dynamic has said so
    refused: dict[int, str] = {}
    tried = 0
    for size in (1, 0):
        for symbol in symbolic.sizes:
            # Guards say nothing here: 0 and 1 are special to torch, which traces for sizes from 2 up.
            sizes = {**symbolic.sizes, symbol: size}
            other = symbolic.resized(sizes)
            try:
                results, differs = _run(subject, cpu, other)
            except Exception as error:
                refused.setdefault(size, f"{other}: {_words(error)}")
                continue
            tried += 1
            try:
                text = fake_differs(subject.op, other, results)
            except Exception as error:
                text = f"the fake kernel fails with {_words(error)}"
            if text or differs:
                todo = _WRONG_FAKE if text else _WRONG_SIZES
                yield Finding("edge sizes", "error", f"{text or differs}; {other}", todo)
                return
    for size, what in refused.items():
        todo = "if models can meet that: return empty outputs when x.numel() == 0, no launch" if size == 0 else ""
        yield Finding("edge sizes", "note", f"the op refuses a size of {size}: {what}", todo)
    if tried:
        yield Finding("edge sizes", "ok", f"right at {tried} sets of sizes with a 0 or a 1")


def _run(subject: Subject, cpu: Subject | None, call: Call) -> tuple[list[Any], str]:
    """Run a call at sizes that nobody promised to work, first on the CPU where the op runs there too.

    An implementation for the CPU refuses sizes that do not fit together; a kernel may read outside of its tensors, and
    then the process cannot use the GPU any more.

    Returns:
        The results, and in words how they differ from those of the CPU.
    """
    if cpu is None:
        return subject.run(call), ""
    expected = cpu.run(call.to(cpu.device))
    results = subject.run(call)
    differs = subject.difference(results, expected)
    return results, f"{subject.device.type} and cpu differ: {differs}" if differs else ""


def _other_sizes(symbolic: Symbolic) -> Iterator[dict[sympy.Symbol, int]]:
    for grow in _GROWTH if symbolic.sizes else ():
        sizes = {symbol: grow(size, index) for index, (symbol, size) in enumerate(symbolic.sizes.items())}
        if sizes != symbolic.sizes and symbolic.allows(sizes):
            yield sizes


def _expression(size: Any) -> sympy.Basic:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _at(expression: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """An expression, or a condition, with numbers for its symbols."""
    return expression.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()})
