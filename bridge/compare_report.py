"""What a comparison found: per output the statistics of the error and whether it is within its tolerance."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..errors import AccuracyError, ModelFileError
from .atomic import write_atomically
from .compare_statistics import QUANTILES, OutputStatistics, cosine_of, snr_db
from .tolerances import Tolerance

_WIDTH = 110
"""Columns of the table where it goes into text."""


@dataclass(frozen=True)
class ShapeReport:
    """The error for inputs of one shape.

    Attributes:
        shape: of the inputs, as text.
        samples: how many.
        failures: how many of them were out of tolerance.
        max_abs: largest absolute error.
        snr_db: ratio of signal to error in dB, over all of them.
    """

    shape: str
    samples: int
    failures: int
    max_abs: float
    snr_db: float


@dataclass(frozen=True)
class OutputReport:
    """The error of one output over all samples; over what is finite on both sides, unless it says otherwise.

    Attributes:
        label: how a user would write it: ``output``, ``output[1]``, ``logits``.
        dtypes: of the reference and of what was compared.
        tolerance: its limits.
        samples: how many were compared.
        failed_samples: how many of them were out of tolerance.
        failures: the first of these, with the reason.
        elements: how many values in all.
        beyond: values out of the tolerance for single values.
        differing: values that are not equal.
        max_abs, mean_abs: absolute error.
        max_rel, mean_rel: relative to each value that is not 0.
        max_scaled: largest absolute error of a sample, relative to the root mean square of the reference.
        quantiles: of the absolute error: (share of values, error that they do not exceed), exact to 2 %.
        cosine, least_cosine: similarity over all samples, and of the worst one.
        snr_db, least_snr_db: ratio of signal to error in dB over all samples, and of the worst one.
        nans, infs: how many values are NaN and infinite, in the reference and in what was compared.
        misplaced: values that are NaN or infinite on one side only, or infinite with the other sign.
        top_k: for each k the share of the k largest values along the last dimension that both sides have.
        worst: where the largest absolute error is, and the two values.
        histogram: (log10 of the lower edge, count) of absolute errors in quarters of decades.
        exact: values without any error.
        shapes: the error by shape of the inputs.
    """

    label: str
    dtypes: tuple[str, str]
    tolerance: Tolerance
    samples: int
    failed_samples: int
    failures: tuple[str, ...]
    elements: int
    beyond: int
    differing: int
    max_abs: float
    mean_abs: float
    max_rel: float
    mean_rel: float
    max_scaled: float
    quantiles: tuple[tuple[float, float], ...]
    cosine: float
    least_cosine: float
    snr_db: float
    least_snr_db: float
    nans: tuple[int, int]
    infs: tuple[int, int]
    misplaced: int
    top_k: Mapping[int, float]
    worst: str
    histogram: tuple[tuple[float, int], ...]
    exact: int
    shapes: tuple[ShapeReport, ...]

    @property
    def ok(self) -> bool:
        """Whether all samples are within the tolerance."""
        return not self.failed_samples

    @classmethod
    def of(cls, found: OutputStatistics) -> OutputReport:
        """What statistics came to."""
        quantiles = [(share, min(found.sketch.quantile(share), found.max_abs)) for share in QUANTILES]
        return cls(
            label=found.label,
            dtypes=found.dtypes,
            tolerance=found.tolerance or Tolerance(),
            samples=found.samples,
            failed_samples=found.failed_samples,
            failures=tuple(found.failures),
            elements=found.elements,
            beyond=found.beyond,
            differing=found.differing,
            max_abs=found.max_abs,
            mean_abs=found.sum_abs / max(1, found.finite),
            max_rel=found.max_rel,
            mean_rel=found.sum_rel / max(1, found.rel_count),
            max_scaled=found.max_scaled,
            quantiles=tuple(quantiles) if found.finite else (),
            cosine=cosine_of(found.product, found.signal, found.power),
            least_cosine=min(1.0, found.least_cosine),
            snr_db=snr_db(found.signal, found.error),
            least_snr_db=found.least_snr_db,
            nans=(found.nans[0], found.nans[1]),
            infs=(found.infs[0], found.infs[1]),
            misplaced=found.misplaced,
            top_k={k: hits / max(1, found.top_rows) for k, hits in found.top_hits.items()},
            worst=found.worst,
            histogram=tuple(found.sketch.bars()),
            exact=found.sketch.zeros,
            shapes=tuple(
                ShapeReport(shape, group.samples, group.failures, group.max_abs, snr_db(group.signal, group.error))
                for shape, group in found.shapes.items()
            ),
        )

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["tolerance"] = dataclasses.asdict(self.tolerance)
        data["shapes"] = [dataclasses.asdict(shape) for shape in self.shapes]
        data["top_k"] = {str(k): share for k, share in self.top_k.items()}
        written: dict[str, Any] = _to_json(data)
        return written

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputReport:
        read = {name: _from_json(value) for name, value in data.items()}
        read["tolerance"] = Tolerance(**read["tolerance"])
        read["shapes"] = tuple(ShapeReport(**shape) for shape in read["shapes"])
        read["top_k"] = {int(k): share for k, share in read["top_k"].items()}
        return cls(**{field.name: read[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class CompareReport:
    """What `compare` returns; prints as a table.

    Attributes:
        reference: what was taken for right.
        actual: what was compared with it.
        inputs: what the inputs were.
        samples: how many.
        outputs: what was found for each output.
        baseline: with a golden reference, what was found for the module in its own dtype; it does not count for `ok`.
    """

    reference: str
    actual: str
    inputs: str
    samples: int
    outputs: tuple[OutputReport, ...]
    baseline: tuple[OutputReport, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every output of every sample is within its tolerance."""
        return all(output.ok for output in self.outputs)

    def own_error(self, label: str) -> OutputReport | None:
        """What the module makes of an output in a dtype of its own; None where it has none, or no golden reference."""
        found = (output for output in self.baseline if output.label == label and len(set(output.dtypes)) == 2)
        return next(found, None)

    def raise_if_failed(self) -> None:
        """Do nothing where all is within tolerance.

        Raises:
            AccuracyError: with the outputs that are not, the worst sample and value of each, and the limits.
        """
        if self.ok:
            return
        lines = [f"{self.actual} differs from {self.reference}:"]
        for output in self.outputs:
            if not output.ok:
                lines.append(
                    f"  {output.label}: {output.failed_samples} of {output.samples} sample(s) out of tolerance"
                )
                lines += [f"    {line}" for line in output.failures[:3]]
                lines += [f"    worst: {output.worst}"] if output.worst else []
                lines.append(f"    allowed: {output.tolerance}")
        lines.append(
            "Find where they part with trtbridge localize, or allow more with tolerance=Tolerance(rtol=..., atol=...)."
        )
        raise AccuracyError("\n".join(lines), self)

    def to_json(self) -> dict[str, Any]:
        """All of it, ready for JSON: infinite and undefined numbers are strings."""
        return {
            "reference": self.reference,
            "actual": self.actual,
            "inputs": self.inputs,
            "samples": self.samples,
            "ok": self.ok,
            "outputs": [output.to_json() for output in self.outputs],
            "baseline": [output.to_json() for output in self.baseline],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompareReport:
        """The inverse of `to_json`."""
        outputs, baseline = (tuple(map(OutputReport.from_json, data[name])) for name in ("outputs", "baseline"))
        return cls(data["reference"], data["actual"], data["inputs"], data["samples"], outputs, baseline)

    def to_html(self, path: str | os.PathLike[str] | None = None, layers: Sequence[Any] = ()) -> str:
        """The report as one page that needs nothing else: no script, no network.

        Args:
            path: where to write it; None writes nothing.
            layers: the error layer by layer, as `localize` finds it: things with a ``name`` and an ``error``, and
                perhaps a ``tolerance``, ``op`` and ``place``.

        Returns:
            The page's text.

        Raises:
            ModelFileError: it cannot be written.
        """
        from .report_html import make_page

        text: str = make_page(self, layers)
        if path is not None:
            try:
                write_atomically(Path(path), lambda file: file.write(text.encode()))
            except OSError as error:
                raise ModelFileError(f"Cannot write {path}: {error}.") from error
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"reference {self.reference}\ncompared  {self.actual}\ninputs    {self.inputs}")
        yield self._table()
        for output in self.outputs:
            yield Text(f"{output.label}: allowed {output.tolerance}")
            if (own := self.own_error(output.label)) is not None:
                words = f"max abs {number(own.max_abs)}, SNR {number(own.snr_db, '.1f')} dB"
                yield Text(f"  the reference in {own.dtypes[1]} instead of {own.dtypes[0]}: {words}")
            for line in output.failures:
                yield Text(f"  out of tolerance: {line}", style="red")
            if not output.ok and output.worst:
                yield Text(f"  largest error: {output.worst}")
        yield Text("within tolerance" if self.ok else "OUT OF TOLERANCE", style="bold" if self.ok else "bold red")

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=_WIDTH, no_color=True, highlight=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        tops = sorted({k for output in self.outputs for k in output.top_k})
        odd = any(sum(output.nans) + sum(output.infs) for output in self.outputs)
        table.add_column("output", overflow="fold")
        for heading in ("max abs", "mean abs", "99 %", "max rel", "cosine", "SNR dB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for k in tops:
            table.add_column(f"top-{k}", justify="right", no_wrap=True)
        if odd:
            table.add_column("NaN", justify="right", no_wrap=True)
            table.add_column("Inf", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for output in self.outputs:
            quantiles = dict(output.quantiles)
            row = [output.label, *map(number, (output.max_abs, output.mean_abs, quantiles.get(0.99, math.nan)))]
            row += [number(output.max_rel), f"{output.cosine:.6f}", number(output.snr_db, ".1f")]
            row += [f"{output.top_k[k]:.1%}" if k in output.top_k else "" for k in tops]
            row += ["/".join(map(str, output.nans)), "/".join(map(str, output.infs))] if odd else []
            style = "green" if output.ok else "bold red"
            table.add_row(*map(Text, row), Text("ok" if output.ok else "FAILED", style=style))
        return table


def number(value: float, form: str = ".2e") -> str:
    """A number as it stands in the report."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "0" if value == 0 else f"{value:{form}}"


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _to_json(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(part) for part in value]
    return value


def _from_json(value: Any) -> Any:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, Mapping):
        return {name: _from_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return value
