"""The inputs of a comparison: examples, loaders of them, or random tensors within a signature's ranges."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .arguments import collect
from .cli_run import RandomInputs
from .input_check import InputChecker
from .model import Signature
from .runners import Array, Layout, to_array

_CPU = torch.device("cpu")

Prepare = Callable[[Any], Any]
"""Makes a sample of what a loader yields."""


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        args, kwargs: of the call.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, value: Any) -> Sample:
        """Take what users write for a call: a tensor, a tuple or list of arguments, a dict of keyword arguments, or a
        pair of a tuple and a dict."""
        if isinstance(value, Sample):
            return value
        if isinstance(value, Mapping):
            return cls((), {str(name): _tensors(part) for name, part in value.items()})
        if isinstance(value, (tuple, list)):
            if len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping):
                return cls(_tensors(value[0]), {str(name): _tensors(part) for name, part in value[1].items()})
            return cls(tuple(map(_tensors, value)), {})
        return cls((_tensors(value),), {})


class Samples:
    """A loader for Polygraphy's Comparator: one dict of arrays by label at a time, and none of them kept.

    Attributes:
        layout: of the calls.
        text: what the inputs are, for the report.
        shape: the shapes of the last sample, as text: what errors are grouped by.
        count: samples given out so far.
    """

    def __init__(
        self,
        entries: Iterable[Any],
        flat: Callable[[Sample], list[torch.Tensor]],
        layout: Layout,
        text: str,
        prepare: Prepare | None = None,
    ) -> None:
        self._entries = entries
        self._flat = flat
        self._prepare = prepare
        self.layout = layout
        self.text = text
        self.shape = ""
        self.count = 0

    def __iter__(self) -> Iterator[OrderedDict[str, Array]]:
        for index, entry in enumerate(self._entries):
            tensors = _flattened(self._flat, entry, self._prepare, index)
            self.shape = ", ".join("x".join(map(str, tensor.shape)) or "scalar" for tensor in tensors[:3])
            self.shape += ", ..." if len(tensors) > 3 else ""
            self.count += 1
            yield OrderedDict(zip(self.layout.labels, map(to_array, tensors), strict=True))


def given_samples(
    inputs: Any, signature: Signature | None, module: torch.nn.Module | None, prepare: Prepare | None
) -> Samples:
    """Samples that the user gives.

    Args:
        inputs: a tensor, tuple or dict for one call, or any other iterable of calls (a list, a torch DataLoader).
        signature: how the calls look, where one side has a signature.
        module: what binds the arguments otherwise.
        prepare: makes a call of each entry.

    Raises:
        InputError: there is no sample, or one does not fit.
    """
    single = isinstance(inputs, (torch.Tensor, np.ndarray, tuple, Mapping, Sample))
    if not single and not isinstance(inputs, Iterable) and not hasattr(inputs, "__getitem__"):
        raise InputError(
            f"inputs is a {type(inputs).__name__}: give a tuple of arguments, a dict of keyword arguments, a list of "
            "such, or a DataLoader."
        )
    entries = iter([inputs] if single else inputs)
    try:
        first = next(entries)
    except StopIteration:
        raise InputError("inputs holds no sample.") from None
    flat = _binder(signature, module, Sample.of(first if prepare is None else _prepared(prepare, first, 0)))
    tensors = _flattened(flat, first, prepare, 0)
    if signature is not None:
        known = Layout.of(signature)
        labels, structure, complex_inputs = known.labels, known.structure, known.complex_inputs
    else:
        assert module is not None, "either side has a signature or is a module"
        sample = Sample.of(first if prepare is None else prepare(first))
        arguments = collect(module, sample.args, sample.kwargs)
        labels, structure, complex_inputs = arguments.labels, arguments.structure, arguments.complex_inputs
    layout = Layout(labels, structure, complex_inputs, tuple(t.dtype for t in tensors), tuple(t.ndim for t in tensors))
    kind = "the example" if single else f"samples of a {type(inputs).__name__}"
    return Samples(itertools.chain([first], entries), flat, layout, kind, prepare)


def generated_samples(signature: Signature, count: int | None, seed: int, int_max: int = 2) -> Samples:
    """Random samples within the ranges of a signature: the sizes tuned for, the smallest, the largest, random ones.

    Each of several profiles gets its own in turn, the last one first, as it is that of the ranges as a whole.

    Args:
        signature: names, dtypes and ranges.
        count: how many; None for 3 where sizes are fixed, else 5, or 3 a profile where that is more.
        seed: of the first sample; each further one has the next.
        int_max: integers are below this.

    Raises:
        InputError: an input has a size that only data can tell.
    """
    dims, profiles = signature.dims, signature.profiles[::-1] or (signature.dims,)
    total = count or (max(5, 3 * len(profiles)) if dims else 3)
    generator = random.Random(seed)

    def sizes(index: int) -> dict[str, int]:
        places = {0: 1, 1: 0, 2: 2}  # opt, min, max
        turn, which = divmod(index, len(profiles))
        if turn in places:
            return {name: span[places[turn]] for name, span in profiles[which].items()}
        return {name: generator.randint(span[0], span[2]) for name, span in profiles[which].items()}

    chosen = [sizes(index) for index in range(total)]
    layout = Layout.of(signature)

    def samples() -> Iterator[Sample]:
        for index, chosen_sizes in enumerate(chosen):
            tensors = RandomInputs(seed + index, chosen_sizes, int_max).make(signature)
            args, kwargs = layout.call(tensors)
            yield Sample(args, kwargs)

    text = f"{total} random, seed {seed}" + (f" to {seed + total - 1}" if total > 1 else "")
    if dims:
        listed = ["/".join(str(each[name]) for each in chosen[:8]) for name in dims]
        text += ", " + ", ".join(f"{name} {line}" for name, line in zip(dims, listed, strict=True))
        text += " ..." if total > 8 else ""
    return Samples(samples(), _binder(signature, None, None), layout, text)


def _binder(
    signature: Signature | None, module: torch.nn.Module | None, first: Sample | None
) -> Callable[[Sample], list[torch.Tensor]]:
    if signature is not None:
        checker = InputChecker(signature, _CPU)
        return lambda sample: checker.flatten(sample.args, sample.kwargs)
    if module is None or first is None:
        raise InputError("Neither side tells how it is called: compare with a module or with what trtbridge converted.")
    known = collect(module, first.args, first.kwargs)

    def flat(sample: Sample) -> list[torch.Tensor]:
        arguments = collect(module, sample.args, sample.kwargs)
        if arguments.labels != known.labels or arguments.structure != known.structure:
            raise InputError(
                f"Takes {', '.join(known.labels)} as in the first sample, got {', '.join(arguments.labels)}, or "
                "another value of what is no tensor."
            )
        return list(arguments.tensors)

    return flat


def _flattened(
    flat: Callable[[Sample], list[torch.Tensor]], entry: Any, prepare: Prepare | None, index: int
) -> list[torch.Tensor]:
    sample = Sample.of(entry if prepare is None else _prepared(prepare, entry, index))
    try:
        tensors = flat(sample)
    except InputError as error:
        hint = "" if prepare is not None else (
            "\nWhere a loader yields more than the arguments, or in another form, say how to make a call of it: "
            "prepare=lambda batch: batch[0]."
        )  # fmt: skip
        raise InputError(f"Sample {index} does not fit: {error}{hint}") from error
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"Sample {index} does not fit: expected a tensor, got {type(tensor).__name__}.")
    return tensors


def _prepared(prepare: Prepare, entry: Any, index: int) -> Any:
    try:
        return prepare(entry)
    except Exception as error:
        raise InputError(f"prepare() failed on sample {index}: {type(error).__name__}: {error}") from error


def _tensors(value: Any) -> Any:
    """NumPy arrays in tuples, lists and dicts as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value).copy())
    if type(value) in (tuple, list):
        return type(value)(map(_tensors, value))
    if type(value) is dict:
        return {name: _tensors(part) for name, part in value.items()}
    return value
