"""check(): each flaw of an op is found, with words that say what to do; a right op passes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.plugins.check_report import CheckReport, Finding
from trtbridge.plugins.check_samples import Call, made_up, parse_sample
from trtbridge.plugins.check_shapes import Symbolic, check_dynamic, check_edges
from trtbridge.plugins.check_values import Subject, difference

library = torch.library.Library("check_tests", "FRAGMENT")


def define(name: str, schema: str, function: Any, fake: Any = None) -> str:
    """An op by the low road, where torch checks less than under custom_op."""
    library.define(f"{name}{schema}")
    library.impl(name, function, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"check_tests::{name}", fake)
    return f"check_tests::{name}"


def check(op: Any, samples: Any = None) -> CheckReport:
    return tb.plugins.check(op, samples, backends=())


def finding(report: CheckReport, check: str, severity: str) -> Finding:
    found = [f for f in report.findings if f.check.startswith(check) and f.severity == severity]
    assert found, f"no {severity} of {check!r} in:\n{report}"
    return found[0]


@tb.plugin(
    "check_tests::good", samples=lambda: [(torch.randn(3, 4), torch.randn(4)), (torch.randn(2, 5), torch.randn(5))]
)
def good(x: torch.Tensor, scale: torch.Tensor, power: int = 2) -> torch.Tensor:
    """A right op."""
    return (x * scale) ** power


def test_a_right_op() -> None:
    report = check(good)
    assert report.ok
    assert report.samples == 2
    assert not report.of("warning", "error", "note")
    names = [f.check for f in report.of("ok")]
    assert names == [
        "schema", "run (cpu)", "repeat (cpu)", "fake (cpu)", "dynamic shapes", "edge sizes", "dtypes", "strides",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        assert [f.check for f in report.of("not run")] == ["stream", "cuda graph"]
    text = str(report)
    assert text.startswith("check_tests::good(Tensor x, Tensor scale, SymInt power=2) -> Tensor\n  ok      schema: ")
    assert text.endswith("ok (2 not run)")


@pytest.mark.parametrize(
    "op", [good, "check_tests::good", torch.ops.check_tests.good, torch.ops.check_tests.good.default]
)
def test_ops_are_named_in_many_ways(op: Any) -> None:
    assert check(op).op == "check_tests::good.default"


def test_ops_of_pytorch_itself() -> None:
    report = check("aten::cummax", [(torch.randn(3, 5), 1)])
    assert report.ok
    assert not report.of("warning")


def test_an_op_that_is_not_there() -> None:
    report = check("check_tests::absent")
    assert not report.ok
    assert "--import" in finding(report, "name", "error").todo
    with pytest.raises(tb.PluginError, match="takes the name of an op"):
        check(len)


def test_schemas_that_no_graph_can_hold() -> None:
    @torch.library.custom_op("check_tests::in_place", mutates_args={"x"})
    def in_place(x: torch.Tensor) -> None:
        x.add_(1)

    assert "changes its arguments x" in finding(check(in_place), "schema", "error").what
    name = define("number", "(Tensor x) -> int", lambda x: 1)
    assert "returns int" in finding(check(name), "schema", "error").what
    name = define("view", "(Tensor(a) x) -> Tensor(a)", lambda x: x[:])
    assert "views" in finding(check(name), "schema", "error").what


def test_composite_ops_are_noted() -> None:
    library.define("composite(Tensor x) -> Tensor")
    library.impl("composite", lambda x: x.sin().cos(), "CompositeImplicitAutograd")
    assert "composite" in finding(check("check_tests::composite"), "schema", "note").what


def test_arguments_changed_and_memory_shared() -> None:
    name = define("sneaky", "(Tensor x) -> Tensor", lambda x: x.add_(1).clone(), torch.empty_like)
    assert "changes its tensor argument number 0" in finding(check(name), "run", "error").what
    name = define("alias", "(Tensor x) -> Tensor", lambda x: x.view(-1), lambda x: x.new_empty(x.numel()))
    assert "shares memory" in finding(check(name), "run", "error").what

    @torch.library.custom_op("check_tests::itself", mutates_args=())
    def itself(x: torch.Tensor) -> torch.Tensor:
        return x

    assert "clone" in finding(check(itself), "run", "error").todo


def wrong_count(x: torch.Tensor) -> Any:
    return x.new_empty(x.shape), x.new_empty(1), x.new_empty(1)


@pytest.mark.parametrize(
    ("number", "fake", "words"),
    [
        (0, lambda x: (x.new_empty(x.shape[0]), x.new_empty(1)), r"output 0 has shape \(2, 3, 8\), by the fake"),
        (1, lambda x: (x.new_empty(x.shape, dtype=torch.int64), x.new_empty(1)), "output 0 has dtype torch.float32"),
        (2, lambda x: (x.new_empty(x.shape, device="meta"), x.new_empty(1)), "output 0 has device cpu"),
    ],
)
def test_wrong_fake_kernels(number: int, fake: Any, words: str) -> None:
    name = define(f"wrong{number}", "(Tensor x) -> (Tensor, Tensor)", lambda x: (x + 1, x.sum()[None]), fake)
    report = check(name)
    found = finding(report, "fake", "error")
    assert re.search(words, found.what)
    assert "mend the fake kernel" in found.todo
    assert finding(report, "all others", "not run")


def test_no_fake_kernel() -> None:
    name = define("no_fake", "(Tensor x) -> Tensor", lambda x: torch.from_numpy(x.numpy() + 1))
    assert "register_fake" in finding(check(name), "fake", "error").todo


def test_strides_of_fakes_are_a_warning() -> None:
    name = define("strided", "(Tensor x) -> Tensor", lambda x: (x + 1).mT.contiguous().mT, torch.empty_like)
    report = check(name)
    assert report.ok
    assert "strides" in finding(report, "fake", "warning").what


def test_a_fake_kernel_that_holds_for_one_size_only() -> None:
    fixing = define(
        "fixing", "(Tensor x) -> Tensor", lambda x: x + 1, lambda x: x.new_empty(int(x.shape[0]), *x.shape[1:])
    )
    assert "dimension 0 of tensor argument number 0 (at 2)" in finding(check(fixing), "dynamic shapes", "warning").what
    square = define("square", "(Tensor x) -> Tensor", lambda x: x.mT.contiguous(), lambda x: x.new_empty(x.shape))
    report = check(square, [(torch.randn(3, 3),)])  # right by chance at this size
    assert finding(report, "fake", "ok")
    assert "where the fake kernel says" in finding(report, "dynamic shapes", "error").what


def test_sizes_that_an_op_refuses() -> None:
    def needs_four(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 4:
            raise ValueError("four rows")
        return x + 1

    name = define("needs_four", "(Tensor x) -> Tensor", needs_four, torch.empty_like)
    found = finding(check(name, [(torch.randn(4),)]), "dynamic shapes", "note")
    assert "four rows" in found.what
    assert "samples of several sizes" in found.todo


@tb.plugin("check_tests::pairs")
def pairs(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 2:
        raise ValueError("an even number of rows")
    return x[::2] + x[1::2]


def test_guards_limit_the_sizes_that_are_tried() -> None:
    report = check("check_tests::pairs", [(torch.randn(4, 3),)])
    assert not any("refuses" in f.what for f in report.findings if f.check == "dynamic shapes")
    assert "takes as given" in finding(report, "dynamic shapes", "ok").what
    symbolic = Symbolic.run(torch.ops.check_tests.pairs.default, Call((torch.randn(4, 3),)))
    (rows, _) = symbolic.sizes
    assert not symbolic.allows({**symbolic.sizes, rows: 5})
    assert symbolic.allows({**symbolic.sizes, rows: 6})


def test_sizes_that_the_op_fixes_too_are_a_note() -> None:
    @tb.plugin("check_tests::areas")
    def areas(boxes: torch.Tensor) -> torch.Tensor:
        if boxes.shape[1] != 4:
            raise ValueError("four coordinates")
        return boxes.prod(1)

    report = check(areas, [(torch.rand(3, 4),)])
    assert not report.of("warning", "error")
    assert "dimension 1 of tensor argument number 0 (at 4)" in finding(report, "dynamic shapes", "note").what
    assert finding(report, "dynamic shapes", "ok")


def test_sizes_that_no_other_fits_are_a_note() -> None:
    @tb.plugin("check_tests::small")
    def small(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] * x.shape[0] + 40 != 14 * x.shape[0]:  # 4 and 10
            raise ValueError("4 or 10")
        return x + 1

    found = finding(check(small, [(torch.randn(4),)]), "dynamic shapes", "note")
    assert "no other sizes were found that satisfy" in found.what
    assert "samples of several sizes" in found.todo


def test_another_device_is_held_against_the_cpu_at_every_size() -> None:
    define("halves", "(Tensor x) -> Tensor", lambda x: x / 2, torch.empty_like)
    define("blocks", "(Tensor x) -> Tensor", lambda x: x / 2 if x.shape[0] % 2 == 0 else x, torch.empty_like)
    call = Call((torch.randn(4),))
    right, wrong = (
        Subject(getattr(torch.ops.check_tests, name).default, torch.device("cpu"), (call,), ([call.args[0] / 2],))
        for name in ("halves", "blocks")
    )
    assert [f.severity for f in check_dynamic(right, right)] == ["ok"]
    (found,) = check_dynamic(wrong, right)
    assert found.severity == "error"
    assert "cpu and cpu differ: output 0: 5 of 5 values differ" in found.what
    assert [f.severity for f in check_edges(wrong, right)] == ["error"]

    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not here")

    define("refuses", "(Tensor x) -> Tensor", refuses, torch.empty_like)
    first = Subject(torch.ops.check_tests.refuses.default, torch.device("cpu"), (call,), ([],))
    assert [f.severity for f in check_dynamic(wrong, first)] == ["note"]  # never run where it might do harm


def test_empty_tensors() -> None:
    def refuses_empty(x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            raise RuntimeError("invalid configuration argument")
        return x + 1

    name = define("refuses_empty", "(Tensor x) -> Tensor", refuses_empty, torch.empty_like)
    found = finding(check(name), "edge sizes", "note")
    assert "invalid configuration" in found.what
    assert "numel() == 0" in found.todo


def test_dtypes() -> None:
    name = define(
        "half_wrong",
        "(Tensor x) -> Tensor",
        lambda x: x + 1 if x.dtype == torch.float32 else x + 2,
        torch.empty_like,
    )
    found = finding(check(name), "dtypes", "error")
    assert "float16 gives other numbers" in found.what

    def float_alone(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32, "float32 alone"
        return x + 1

    name = define("float_alone", "(Tensor x) -> Tensor", float_alone, torch.empty_like)
    report = check(name)
    assert report.ok
    assert "does not run in float16" in finding(report, "dtypes", "warning").what
    name = define("widens", "(Tensor x) -> Tensor", lambda x: x.float() + 1, torch.empty_like)
    assert "in float16 the fake kernel is wrong" in finding(check(name), "dtypes", "error").what


def test_strides_that_are_ignored() -> None:
    def raw(x: torch.Tensor) -> torch.Tensor:
        # As a kernel that takes a pointer reads it.
        return torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset()).clone()

    name = define("raw", "(Tensor x) -> Tensor", raw, lambda x: x.new_empty(x.shape))
    found = finding(check(name), "strides", "error")
    assert "transposed in memory" in found.what
    assert "contiguous()" in found.todo


def test_random_ops() -> None:
    name = define("untagged", "(Tensor x) -> Tensor", torch.rand_like, torch.empty_like)
    report = check(name)
    assert report.ok
    assert "random=True" in finding(report, "repeat", "warning").todo

    @tb.plugin("check_tests::tagged", random=True)
    def tagged(x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(x)

    assert not check(tagged).of("warning", "error")


def test_rounding_that_changes_is_a_note() -> None:
    calls = []

    def atomics(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * (1 + 1e-6 * (len(calls) % 2))

    name = define("atomics", "(Tensor x) -> Tensor", atomics, torch.empty_like)
    report = check(name)
    assert "rounding" in finding(report, "repeat", "note").what
    assert report.ok


def test_failing_samples_are_reported_and_the_others_used() -> None:
    def rows(x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2:
            raise ValueError("rows and columns, please")
        return x + 1

    name = define("rows", "(Tensor x) -> Tensor", rows, torch.empty_like)
    report = check(name, [(torch.ones(3),), (torch.ones(3, 2),)])
    found = finding(report, "run", "error")
    assert "rows and columns" in found.what
    assert "(float32[3])" in found.what
    assert finding(report, "strides", "ok")


def test_no_kernel_for_the_cpu() -> None:
    library.define("gpu_only(Tensor x) -> Tensor")
    library.impl("gpu_only", lambda x: x + 1, "CUDA")
    assert "cpu=" in finding(check("check_tests::gpu_only"), "run (cpu)", "warning").todo


def test_a_model_of_one_op_through_a_backend() -> None:
    report = tb.plugins.check(good, backends=["onnxruntime"])
    assert "dynamic shapes" in finding(report, "backend onnxruntime", "ok").what
    report = tb.plugins.check("aten::cummax", [(torch.randn(3, 5), 1)], backends=["onnxruntime"])
    assert report.ok
    assert finding(report, "backend onnxruntime", "ok")
    report = tb.plugins.check("check_tests::pairs", [(torch.randn(4, 3),)], backends=["onnxruntime"])
    assert "static shapes" in finding(report, "backend onnxruntime", "ok").what


@pytest.mark.rtx
def test_a_model_of_one_op_built_for_a_gpu() -> None:
    pytest.importorskip("tensorrt_rtx")
    report = tb.plugins.check(good, backends=["tensorrt_rtx"])
    assert report.ok, str(report)
    built = [f for f in report.findings if f.check == "backend tensorrt_rtx"]
    assert any("between segments" in f.what for f in built)
    if not torch.cuda.is_available():
        assert "built" in finding(report, "backend tensorrt_rtx", "not run").what


def test_samples_as_authors_write_them() -> None:
    x = torch.randn(2, 3)
    assert Call.of(x).args == (x,)
    assert Call.of((x, 1)).args == (x, 1)
    assert Call.of({"x": x}).kwargs == {"x": x}
    assert str(Call((x, [x, None]), {"mode": "a"})) == "(float32[2,3], [float32[2,3], None], mode='a')"
    with pytest.raises(tb.PluginError, match="not a str"):
        Call.of("x")
    with pytest.raises(tb.PluginError, match="No samples"):
        check(good, [])
    assert check(good, x.new_ones(2, 2)[None].unbind()).findings  # a generator-like of tensors, one argument each


def test_samples_made_up() -> None:
    name = define("many", "(Tensor x, Tensor[] y, float z=1, *, Tensor? w=None) -> Tensor", lambda x, y, z, w: x + z)
    (call,) = made_up(torch.ops.check_tests.many.default)
    assert str(call) == "(float32[2,3,8], [float32[2,3,8], float32[2,3,8]])"
    with pytest.raises(tb.PluginError, match=r"'dim' \(int\).*samples"):
        check("aten::cummax")
    assert "made up" in finding(check(name), "samples", "note").what


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("float32[2,3,8]", "(float32[2,3,8])"),
        ("float16[1] int64[4]<10 0.5", "(float16[1], int64[4], 0.5)"),
        ("float32[], bool[3], None, True", "(float32[], bool[3], None, True)"),
        ("float32[2, 3] mode='a b' n=-1", "(float32[2,3], mode='a b', n=-1)"),
        ("[float32[2],int32[3]] [1, 2]", "([float32[2], int32[3]], [1, 2])"),
        ("x=bfloat16[2,0] dtype=torch.float16", "(x=bfloat16[2,0], dtype=torch.float16)"),
        ("complex64[3] uint8[2] float8_e4m3fn[4]", "(complex64[3], uint8[2], float8_e4m3fn[4])"),
    ],
)
def test_samples_from_text(text: str, described: str) -> None:
    assert str(parse_sample(text)) == described


def test_integers_from_text_stay_below_their_bound() -> None:
    values = parse_sample("int64[1000]<10").args[0]
    assert values.unique().tolist() == list(range(10))
    assert parse_sample("int64[1000]").args[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no argument"),
        ("float31[2]", "no dtype 'float31'"),
        ("float32[2", "not closed"),
        ("hello", "neither a tensor"),
        ("n=1 float32[2]", "after a keyword"),
        ("float32[a]", "neither a tensor"),
    ],
)
def test_text_that_is_no_sample(text: str, words: str) -> None:
    with pytest.raises(tb.PluginError, match=words):
        parse_sample(text)


def test_differences_in_words() -> None:
    x = torch.tensor([1.0, 2.0, float("nan")])
    assert difference([x], [x.clone()]) == ""
    assert difference([x.half()], [x]) == ""
    assert "1 of 3 values differ, by up to 0.5" in difference([x + torch.tensor([0, 0.5, 0])], [x])
    assert "values differ" in difference([torch.nan_to_num(x)], [x])
    assert "shape (2,) instead of (3,)" in difference([x[:2]], [x])
    assert "1 outputs instead of 2" in difference([x], [x, x])
    assert "None instead of a Tensor" in difference([None], [x])
    assert "1 of 2 values" in difference([torch.tensor([1, 2])], [torch.tensor([1, 3])])
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])], values=False) == ""


def test_calls_at_other_sizes_keep_their_values_in_range() -> None:
    call = Call((torch.tensor([[3, 5], [7, 9]]), torch.randn(2)), {"z": torch.zeros(0)})
    other = call.resized({0: (5, 7), 2: (3,)})
    assert set(other.args[0].flatten().tolist()) <= {3, 5, 7, 9}
    assert other.args[0].shape == (5, 7)
    assert other.args[1] is call.args[1]
    assert torch.equal(other.kwargs["z"], torch.zeros(3))
