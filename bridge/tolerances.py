"""How far two results may be apart: by default what rounding in their dtype explains, and no more."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Tolerance:
    """Limits of the difference between a result and its reference.

    An element is within where ``|actual - reference| <= atol + rtol * |reference| + scale * rms``, with the root of the
    mean square of the reference over the tensor. ``rtol`` and ``atol`` are those of torch.allclose; ``scale`` is there
    because errors of a network follow the size of what was added up, not that of a sum that happens to be near zero.
    NaN must stand where the reference has NaN, and infinities must be equal.

    Attributes:
        rtol: relative to each element.
        atol: absolute, in the units of the result.
        scale: relative to the root mean square of the reference.
        cosine: least cosine similarity of result and reference, from -1 to 1; None asks for none.
        snr_db: least ratio of signal to error in dB, ``10 log10(sum ref^2 / sum (actual - ref)^2)``; None for none.
        outliers: share of the elements that may be beyond, from 0 to 1.

    Raises:
        OptionError: a limit is no number, negative, or out of its range.
    """

    rtol: float = 0.0
    atol: float = 0.0
    scale: float = 0.0
    cosine: float | None = None
    snr_db: float | None = None
    outliers: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("cosine", "snr_db"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise OptionError(f"Tolerance: {field.name}={value!r} is no number.")
        for name in ("rtol", "atol", "scale", "outliers"):
            if getattr(self, name) < 0:
                raise OptionError(f"Tolerance: {name}={getattr(self, name)!r} is negative.")
        if self.outliers > 1:
            raise OptionError(f"Tolerance: outliers={self.outliers!r} is a share, from 0 to 1.")
        if self.cosine is not None and not -1 <= self.cosine <= 1:
            raise OptionError(f"Tolerance: cosine={self.cosine!r} is not from -1 to 1.")

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name):g}" for name in ("rtol", "atol", "scale") if getattr(self, name)]
        parts += [] if self.cosine is None else [f"cosine {self.cosine:g}"]
        parts += [] if self.snr_db is None else [f"SNR {self.snr_db:g} dB"]
        parts += [f"{self.outliers:.2%} of the values beyond"] if self.outliers else []
        return ", ".join(parts) or "exact"


_FLOATS = {
    "float64": Tolerance(1e-6, 1e-9, 1e-6, 0.9999999),
    "float32": Tolerance(1e-3, 1e-5, 1e-3, 0.99999),
    "tf32": Tolerance(5e-3, 1e-4, 5e-3, 0.9999),
    "float16": Tolerance(2e-2, 1e-3, 3e-2, 0.999),
    "bfloat16": Tolerance(1e-1, 1e-2, 2e-1, 0.99),
    "float8": Tolerance(2e-1, 5e-2, 5e-1, 0.95),
}
"""From the finest to the coarsest: five times and more of what rounding adds up to in deep networks."""

_INTEGERS = {"float16": 0.01, "bfloat16": 0.03, "float8": 0.1}
"""Share of integers and booleans that may differ, by what they were computed in: argmax of values that nearly tie."""

_SHORT = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "double": "float64",
    "complex64": "float32",
    "complex128": "float64",
}


def default_tolerance(dtype: Any, computed_in: Any = None) -> Tolerance:
    """The tolerance for results of a dtype.

    Args:
        dtype: of the results: a torch, NumPy or ONNX dtype, or its name.
        computed_in: the coarsest float dtype on the way there, where that is known, "tf32" among them: a float32 result
            of a half-precision network is as good as half precision.
    """
    names = [name for name in (dtype_name(dtype), dtype_name(computed_in)) if name in _FLOATS]
    coarsest = max(names, key=list(_FLOATS).index, default="float32")
    if dtype_name(dtype) not in _FLOATS:
        return Tolerance(outliers=_INTEGERS.get(coarsest, 0.0))
    return _FLOATS[coarsest]


def coarser(one: Any, other: Any) -> str:
    """The name of that of two dtypes that rounds more; "" where neither is a float."""
    names = [name for name in (dtype_name(one), dtype_name(other)) if name in _FLOATS]
    return max(names, key=list(_FLOATS).index, default="")


def dtype_name(dtype: Any) -> str:
    """A dtype's name as in torch ("float16"), whoever's dtype it is; "" for None."""
    if dtype is None:
        return ""
    text = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    text = text.removeprefix("torch.").lower()
    return "float8" if text.startswith("float8") else _SHORT.get(text, text)
