"""Tolerances: defaults by dtype, from whichever library the dtype is, and limits that make no sense."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from trtbridge.bridge.tolerances import Tolerance, coarser, default_tolerance, dtype_name
from trtbridge.errors import OptionError


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float16, "float16"),
        (np.dtype("float16"), "float16"),
        (np.float16, "float16"),
        (ir.DataType.FLOAT16, "float16"),
        ("float16", "float16"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        (ir.DataType.FLOAT, "float32"),
        (ir.DataType.DOUBLE, "float64"),
        (torch.complex64, "float32"),
        (torch.float8_e4m3fn, "float8"),
        (ir.DataType.FLOAT8E5M2, "float8"),
        (torch.int64, "int64"),
        (None, ""),
    ],
)
def test_a_dtype_has_one_name(dtype: object, name: str) -> None:
    assert dtype_name(dtype) == name


def test_coarser_dtypes_have_wider_tolerances() -> None:
    order = ["float64", "float32", "tf32", "float16", "bfloat16", "float8"]
    limits = [default_tolerance(name) for name in order]
    for finer, wider in itertools.pairwise(limits):
        assert finer.rtol < wider.rtol
        assert finer.atol < wider.atol
        assert finer.scale < wider.scale
        assert finer.cosine is not None
        assert wider.cosine is not None
        assert finer.cosine > wider.cosine


def test_the_coarsest_dtype_on_the_way_counts() -> None:
    assert default_tolerance(torch.float32, torch.float16) == default_tolerance("float16")
    assert default_tolerance(torch.float16, torch.float32) == default_tolerance("float16")
    assert default_tolerance(torch.float32, "tf32").rtol > default_tolerance(torch.float32).rtol
    assert coarser(torch.float32, "bfloat16") == "bfloat16"
    assert coarser(torch.int64, None) == ""


def test_integers_are_exact_unless_half_precision_made_them() -> None:
    assert default_tolerance(torch.int64) == Tolerance()
    assert str(default_tolerance(torch.bool)) == "exact"
    assert default_tolerance(torch.int64, torch.float16).outliers > 0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"rtol": -1.0}, "negative"),
        ({"atol": float("nan")}, "no number"),
        ({"rtol": "1e-3"}, "no number"),
        ({"rtol": True}, "no number"),
        ({"cosine": 1.5}, "-1 to 1"),
        ({"outliers": 2.0}, "from 0 to 1"),
    ],
)
def test_a_limit_that_makes_no_sense(limits: dict[str, float], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Tolerance(**limits)


def test_it_prints_what_it_asks_for() -> None:
    text = str(Tolerance(rtol=1e-3, atol=1e-5, cosine=0.99, snr_db=40, outliers=0.01))
    assert text == "rtol 0.001, atol 1e-05, cosine 0.99, SNR 40 dB, 1.00% of the values beyond"
