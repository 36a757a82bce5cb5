"""Compare anything with anything: modules, ONNX graphs, engines, files, on many inputs, in steady memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from polygraphy.comparator import Comparator, IterationResult
from polygraphy.exception import PolygraphyException

from ..errors import InputError, OptionError
from .compare_inputs import Prepare, Samples, generated_samples, given_samples
from .compare_report import CompareReport, OutputReport
from .compare_statistics import OutputStatistics
from .compare_subjects import Side, Subject, make_side
from .model import Signature
from .profiles import common_profiles
from .runners import input_metadata, quiet_polygraphy, to_tensor
from .tolerances import Tolerance, coarser

Tolerances = Tolerance | Mapping[str, Tolerance]
"""One for all outputs, or one each by label; those without have the default of their dtype."""


def compare(
    a: Subject | Side,
    b: Subject | Side,
    inputs: Any = None,
    *,
    tolerance: Tolerances | None = None,
    golden: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    top_k: bool | Sequence[int] = False,
    prepare: Prepare | None = None,
    int_max: int = 2,
    device: torch.device | str | None = None,
    save_outputs: str | os.PathLike[str] | None = None,
    save_inputs: str | os.PathLike[str] | None = None,
) -> CompareReport:
    """Run two models on the same inputs and measure how far their results are apart.

    Inputs are taken one at a time and only statistics are kept, so that the memory does not grow with their number. A
    module runs in eval mode, without gradients and without TF32, and is left as it was found.

    Args:
        a: the reference: a torch module, an `EngineModule`, an `OnnxModel` (it runs in ONNX Runtime, no pass over it),
            or the path of an .onnx file or of what `save` wrote.
        b: what is compared with it: any of these.
        inputs: a tuple of arguments, a dict of keyword arguments or a tensor for one call; a list, DataLoader or other
            iterable of such for many; None for random tensors within the signature's ranges: the sizes tuned for, the
            smallest, the largest, random ones.
        tolerance: limits, for all outputs or by label; by default those that rounding in the dtypes explains
            (`tolerances.default_tolerance`).
        golden: "float64" runs a copy of the module ``a`` in float64 as the reference; ``a`` itself is measured, too
            (`CompareReport.baseline`), which shows what its own dtype loses.
        samples: how many random inputs, or how many to take of those given at most.
        seed: of the random inputs.
        top_k: count how often the largest values along the last dimension agree: for True the 1 and 5 largest.
        prepare: makes a call of what ``inputs`` yields, as ``lambda batch: batch[0]``.
        int_max: random integers are below this, so that they are valid indices.
        device: where files and ONNX models run.
        save_outputs: write the results of both as Polygraphy's RunResults, which ``polygraphy inspect data`` and
            ``polygraphy run --load-outputs`` read: one file (.json, all in memory), or a folder with one a sample.
        save_inputs: write the inputs the same way, for ``polygraphy run --load-inputs``.

    Returns:
        The statistics of each output and whether it is within its tolerance; `CompareReport.raise_if_failed` raises.

    Raises:
        OptionError: an option makes no sense, or a side cannot be compared at all.
        InputError: the inputs do not fit, or the two sides return different things.
        BackendError: a side cannot run on this machine.
        ModelFileError: a file cannot be read or written.
    """
    _check_options(tolerance, golden, samples, top_k)
    sides = (make_side(a, device), make_side(b, device))
    loader = _loader(sides, inputs, prepare) if inputs is not None else _random(sides, samples, seed, int_max)
    return run_comparison(
        sides,
        loader,
        tolerance=tolerance,
        golden=golden is not None,
        limit=samples if inputs is not None else None,
        top_k=(1, 5) if top_k is True else tuple(top_k or ()),
        save=(save_outputs, save_inputs),
    )


def run_comparison(
    sides: tuple[Side, Side],
    loader: Samples,
    *,
    tolerance: Tolerances | None = None,
    golden: bool = False,
    limit: int | None = None,
    top_k: tuple[int, ...] = (),
    save: tuple[str | os.PathLike[str] | None, str | os.PathLike[str] | None] = (None, None),
) -> CompareReport:
    """Compare two sides that are ready, with inputs that are.

    Args:
        sides: the reference, and what is compared with it.
        loader: the inputs.
        tolerance, golden, top_k: as in `compare`.
        limit: most samples to take.
        save: where results and inputs are written; None for nowhere.
    """
    names = [sides[0].name + (", in float64" if golden else ""), sides[1].name]
    if names[0] == names[1]:
        names[1] += " (2)"
    runners = [sides[0].runner(names[0], loader.layout, golden), sides[1].runner(names[1], loader.layout)]
    computed_in = coarser("" if golden else sides[0].computed_in, sides[1].computed_in)
    gathered = _Gatherer(names, tolerance, computed_in, top_k)
    own = None
    if golden:
        runners.append(sides[0].runner(f"{sides[0].name}, as it is", loader.layout))
        own = _Gatherer([names[0], runners[2].name], tolerance, sides[0].computed_in, top_k)
    with quiet_polygraphy(), _translated():
        stream = Comparator.run(
            runners,
            data_loader=loader,
            streaming=True,
            save_outputs_path=None if save[0] is None else os.fspath(save[0]),
            save_inputs_path=None if save[1] is None else os.fspath(save[1]),
        )
        with contextlib.closing(stream):
            for results in stream:
                gathered.add(results[0][1][0], results[1][1][0], loader.shape)
                if own is not None:
                    own.add(results[0][1][0], results[2][1][0], loader.shape)
                if limit is not None and gathered.count == limit:
                    break
    if not gathered.count:
        raise InputError("inputs holds no sample.")
    report = gathered.report(loader.text)
    return report if own is None else dataclasses.replace(report, baseline=own.report(loader.text).outputs)


class _Gatherer:
    """Gathers the statistics of every output; a comparison function of Polygraphy, too."""

    def __init__(
        self, names: Sequence[str], tolerance: Tolerances | None, computed_in: str, top_k: tuple[int, ...]
    ) -> None:
        self.names = names
        self.count = 0
        self._tolerance = tolerance
        self._computed_in = computed_in
        self._top_k = top_k
        self._outputs: dict[str, OutputStatistics] = {}

    def add(self, reference: IterationResult, actual: IterationResult, shape: str) -> None:
        """Take in the results of one sample."""
        pairs = pair_outputs(list(reference.keys()), list(actual.keys()), self.names)
        if not self._outputs:
            self._outputs = {label: self._statistics(label) for label, _ in pairs}
            self._check_labels()
        for label, other in pairs:
            if label not in self._outputs:
                raise InputError(f"Sample {self.count} returns {label}, which the samples before it did not.")
            wanted, got = to_tensor(reference[label]), to_tensor(actual[other])
            self._outputs[label].add(self.count, shape, wanted, got)
        self.count += 1

    def report(self, inputs: str) -> CompareReport:
        outputs = tuple(OutputReport.of(statistics) for statistics in self._outputs.values())
        return CompareReport(self.names[0], self.names[1], inputs, self.count, outputs)

    def _statistics(self, label: str) -> OutputStatistics:
        given = self._tolerance.get(label) if isinstance(self._tolerance, Mapping) else self._tolerance
        return OutputStatistics(label, given, self._computed_in, self._top_k)

    def _check_labels(self) -> None:
        if isinstance(self._tolerance, Mapping):
            unknown = [label for label in self._tolerance if label not in self._outputs]
            if unknown:
                raise OptionError(f"tolerance names {unknown}, but the outputs are {list(self._outputs)}.")


def pair_outputs(reference: Sequence[str], actual: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Which output of one side is which of the other: by label where these are the same, else in order.

    Raises:
        InputError: the sides have different numbers of outputs.
    """
    if set(reference) == set(actual):
        return [(label, label) for label in reference]
    if len(reference) == len(actual):
        return list(zip(reference, actual, strict=True))
    raise InputError(
        f"The two sides return different things: {names[0]} returns {', '.join(reference) or 'nothing'}; {names[1]} "
        f"returns {', '.join(actual) or 'nothing'}."
    )


def _loader(sides: tuple[Side, Side], inputs: Any, prepare: Prepare | None) -> Samples:
    """The user's inputs. The labels of a signature go before those of a module, which are the same, but for an .onnx
    file, whose inputs have names of their own."""
    bounded = [side.signature for side in sides if side.signature is not None and side.bounded]
    others = [side.signature for side in sides if side.signature is not None]
    modules = [side.runs for side in sides if side.signature is None]
    signature = next(iter([*bounded, *others]), None)
    if hasattr(inputs, "input_metadata") and signature is not None:  # a loader of Polygraphy's
        inputs.input_metadata = input_metadata(signature)
    return given_samples(inputs, signature, modules[0] if modules else None, prepare)


def _random(sides: tuple[Side, Side], samples: int | None, seed: int, int_max: int) -> Samples:
    signatures = [side.signature for side in sides if side.signature is not None]
    bounded = [side.signature for side in sides if side.signature is not None and side.bounded]
    if bounded:
        return generated_samples(_within_both(bounded), samples, seed, int_max)
    what = "the inputs have sizes without a range" if signatures else "neither side tells the shapes of its inputs"
    raise InputError(f"Give inputs: {what}.")


def _within_both(signatures: Sequence[Signature]) -> Signature:
    """The first signature, its dims held to the ranges that the other has for dims of the same names."""
    first, dims = signatures[0], dict(signatures[0].dims)
    for other in signatures[1:]:
        for name in dims.keys() & other.dims.keys():
            low, high = max(dims[name][0], other.dims[name][0]), min(dims[name][2], other.dims[name][2])
            if low > high:
                raise InputError(
                    f"No size of {name} fits both sides: one takes {dims[name][0]} to {dims[name][2]}, the other "
                    f"{other.dims[name][0]} to {other.dims[name][2]}."
                )
            dims[name] = (low, min(max(dims[name][1], low), high), high)
    if not any(each.profiles for each in signatures):
        return dataclasses.replace(first, dims=dims)
    profiles = common_profiles([each.profiles or (each.dims,) for each in signatures])
    if not profiles:
        raise InputError("No sizes fit both sides: none of their profiles have any in common.")
    # The whole range is the one around all of them, tuned for what the last one is.
    spans = {name: [profile[name] for profile in profiles] for name in dims}
    dims = {name: (min(r[0] for r in each), each[-1][1], max(r[2] for r in each)) for name, each in spans.items()}
    return dataclasses.replace(first, dims=dims, profiles=profiles if len(profiles) > 1 else ())


def _check_options(
    tolerance: Tolerances | None, golden: str | None, samples: int | None, top_k: bool | Sequence[int]
) -> None:
    given = list(tolerance.values()) if isinstance(tolerance, Mapping) else [tolerance]
    if tolerance is not None and not all(isinstance(each, Tolerance) for each in given):
        raise OptionError(f"tolerance={tolerance!r}: must be a Tolerance, or a dict of these by output.")
    if golden not in (None, "float64"):
        raise OptionError(f'golden={golden!r}: must be None or "float64".')
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise OptionError(f"samples={samples!r}: must be a positive number.")
    if not isinstance(top_k, bool) and not all(isinstance(k, int) and k > 0 for k in top_k):
        raise OptionError(f"top_k={top_k!r}: must be True, False, or numbers such as (1, 5).")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Polygraphy's errors as ours."""
    try:
        yield
    except PolygraphyException as error:
        raise InputError(f"The inputs cannot be compared: {error}") from error
