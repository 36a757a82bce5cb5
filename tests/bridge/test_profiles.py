"""Several optimization profiles: which sizes fit, which profile is used, and engines that have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.backends.base import Engine
from trtbridge.bridge.cli_run import RandomInputs
from trtbridge.bridge.cli_source import DimRequest
from trtbridge.bridge.compare_inputs import generated_samples
from trtbridge.bridge.dims import Range, combine_profiles
from trtbridge.bridge.localize_stages import dynamic_shapes_of
from trtbridge.bridge.model import Signature, TensorSpec
from trtbridge.bridge.onnx_file import read_onnx
from trtbridge.bridge.plan import PluginCall
from trtbridge.bridge.profiles import EngineProfiles, common_profiles, fits, nearest_profile
from trtbridge.bridge.program import EngineStep, Program

ONE_OR_MANY = tb.Dim("batch", profiles=[(1, 1, 1), (8, 16, 32)])
SHORT_OR_LONG = tb.Dim("seq", profiles=[(2, 4, 8), (10, 12, 20)])


def spec(name: str, shape: tuple[Any, ...], dims: dict[str, Range], *profiles: dict[str, Range]) -> TensorSpec:
    return TensorSpec.make(name, ir.DataType.FLOAT, shape, dims, profiles)


# The dims


def test_a_dim_takes_its_range_from_its_profiles() -> None:
    dim = tb.Dim("n", profiles=[(8, 8, 8), (1, 2, 4), (16, 32, 64)])
    assert (dim.min, dim.opt, dim.max) == (1, 32, 64)
    assert tb.Dim("n", profiles=[(1, 2, 4)]) == tb.Dim("n", min=1, opt=2, max=4)
    assert len({dim, tb.Dim("n", profiles=((8, 8, 8), [1, 2, 4], (16, 32, 64)))}) == 1  # type: ignore[arg-type]
    assert str(2 * dim + 1) == "2*n + 1"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tb.Dim("n", min=1, profiles=[(1, 1, 1)]), ["leave min=1 out"]),
        (lambda: tb.Dim("n", opt=4, max=8, profiles=[(1, 1, 1), (2, 4, 8)]), ["leave opt=4, max=8 out"]),
        (lambda: tb.Dim("n", profiles=[(1, 1, 1), (2, 8)]), ["profile 1 is (2, 8)", "(min, opt, max)"]),
        (lambda: tb.Dim("n", profiles=[(4, 2, 8)]), ["profile 0 is (4, 2, 8)", "min <= opt"]),
        (lambda: tb.Dim("n", profiles=[(0, 2, 8)]), ["1 <= min"]),
        (lambda: tb.Dim("n", profiles=[(1, 2.0, 8)]), ["whole numbers"]),
        (lambda: tb.Dim("n", profiles=[(True, 2, 8)]), ["whole numbers"]),
        (lambda: tb.Dim("n", profiles={"a": (1, 2, 8)}), ["must be a list"]),
        (lambda: tb.Dim("n", profiles=[]), ["needs 1 <= min"]),
    ],
)
def test_impossible_profiles_are_refused(make: Callable[[], tb.Dim], words: list[str]) -> None:
    with pytest.raises(tb.DynamicShapeError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_profile_k_is_made_of_entry_k_of_every_dim() -> None:
    single = tb.Dim("width", min=3, opt=4, max=5)
    ranges = {"batch": (1, 16, 32), "seq": (2, 12, 20), "width": (3, 4, 5)}
    assert combine_profiles([ONE_OR_MANY, SHORT_OR_LONG, single], ranges) == (
        {"batch": (1, 1, 1), "seq": (2, 4, 8), "width": (3, 4, 5)},
        {"batch": (8, 16, 32), "seq": (10, 12, 20), "width": (3, 4, 5)},
    )
    assert combine_profiles([single], ranges) == ()
    three = tb.Dim("seq", profiles=[(1, 1, 1), (2, 2, 2), (3, 3, 3)])
    with pytest.raises(tb.DynamicShapeError, match="'batch' has 2 profiles and Dim 'seq' has 3"):
        combine_profiles([ONE_OR_MANY, three], ranges)


# The choice


def test_sizes_fit_where_one_profile_takes_all_of_them() -> None:
    profiles = ({"b": (1, 1, 1), "s": (1, 4, 8)}, {"b": (8, 16, 32), "s": (10, 12, 20)})
    assert fits({"b": 1, "s": 8}, profiles)
    assert fits({"b": 32, "s": 10}, profiles)
    assert not fits({"b": 1, "s": 10}, profiles), "each fits some profile, and no profile fits both"
    assert not fits({"b": 4, "s": 8}, profiles)
    assert fits({"b": 1, "other": 99}, profiles)
    assert [nearest_profile({"s": s}, profiles) for s in (8, 10, 9, 21)] == [0, 1, None, None]
    assert nearest_profile({"b": 1}, ()) is None


def test_the_choice_is_the_nearest_opt_then_the_narrowest_then_the_first() -> None:
    def chosen(size: int, *ranges: Range) -> int | None:
        return EngineProfiles.of([spec("x", ("n",), {"n": (1, 1, 99)}, *({"n": r} for r in ranges))]).choose([[size]])

    narrow, wide = (1, 1, 1), (1, 8, 32)
    assert [chosen(n, narrow, wide) for n in (1, 2, 8, 32, 33)] == [0, 1, 1, 1, None]
    assert [chosen(n, wide, narrow) for n in (1, 2)] == [1, 0], "whatever the order"
    assert [chosen(n, (1, 4, 64), (1, 32, 64)) for n in (4, 8, 16, 64)] == [0, 0, 1, 1], "half is as far as twice"
    assert chosen(8, (1, 8, 64), (4, 8, 16)) == 1
    assert chosen(8, (1, 8, 16), (2, 8, 32)) == 0, "as near and as wide: the first"
    assert chosen(0, (0, 4, 8), (0, 100, 200)) == 0, "sizes that depend on data may be 0"


def test_an_engine_has_each_profile_once_and_only_of_what_it_reads() -> None:
    profiles = ({"b": (1, 1, 1), "s": (1, 4, 8)}, {"b": (8, 16, 32), "s": (1, 4, 8)})
    dims = {"b": (1, 16, 32), "s": (1, 4, 8)}
    both = EngineProfiles.of([spec("x", ("b", 3), dims, *profiles), spec("y", ("2*s - 1",), dims, *profiles)])
    assert both.ranges == ((((1, 1, 1), (3, 3, 3)), ((1, 7, 15),)), (((8, 16, 32), (3, 3, 3)), ((1, 7, 15),)))
    assert [both.choose(shapes) for shapes in ([(1, 3), (15,)], [(9, 3), (1,)], [(4, 3), (1,)])] == [0, 1, None]
    assert both.choose([(1, 2), (15,)]) is None, "static sizes count as well"
    assert both.choose([(1,), (15,)]) is None, "another rank fits nothing"
    only_s = EngineProfiles.of([spec("y", ("s",), dims, *profiles)])
    assert len(only_s) == 1
    assert "profile 1: x (8 to 32 (tuned for 16), 3), y (1 to 15 (tuned for 7))" in both.describe()
    assert EngineProfiles.from_json(json.loads(json.dumps(both.to_json()))) == both
    unknown = EngineProfiles.of([TensorSpec("z", ir.DataType.FLOAT, (None,), (None,))])
    assert EngineProfiles.from_json(json.loads(json.dumps(unknown.to_json()))).choose([(7,)]) == 0
    assert len(EngineProfiles.of([])) == 1


def test_an_engine_from_before_profiles_has_the_one_of_its_inputs() -> None:
    inputs = (spec("x", ("n",), {"n": (1, 2, 4)}),)
    assert EngineProfiles.of_engine({}, inputs).ranges == ((((1, 2, 4),),),)
    stated = {"profiles": [{"x": [[1, 1, 1]]}, {"x": [[2, 3, 4]]}]}
    assert EngineProfiles.of_engine(stated, inputs).ranges == ((((1, 1, 1),),), (((2, 3, 4),),))


def test_what_two_programs_have_in_common() -> None:
    mine = [{"n": (1, 1, 1)}, {"n": (8, 16, 32)}]
    assert common_profiles([mine, [{"n": (1, 2, 12)}]]) == ({"n": (1, 1, 1)}, {"n": (8, 12, 12)})
    assert common_profiles([mine, [{"n": (2, 2, 4)}, {"other": (1, 1, 1)}]]) == tuple(mine)
    assert common_profiles([mine, [{"n": (2, 2, 4)}]]) == ()


# Whole models


class Model(torch.nn.Module):
    """Two dims, a derived one, a plugin between two segments, and a result with a computed size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, _ = torch.cummax(self.linear(x).relu(), 1)
        return torch.cat([values, y], 0).softmax(-1), y[1:].tanh()


SHAPES = {"x": {0: ONE_OR_MANY, 1: SHORT_OR_LONG}, "y": {0: 2 * ONE_OR_MANY + 1, 1: SHORT_OR_LONG}}


def arguments(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, length, 8), torch.randn(2 * batch + 1, length, 8)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def fast(model: torch.nn.Module) -> tb.EngineModule:
    return tb.convert(model, arguments(1, 3), dynamic_shapes=SHAPES, backend="onnxruntime")


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 8), (8, 10), (32, 20)])
def test_numbers_in_every_profile(
    model: torch.nn.Module, fast: tb.EngineModule, assert_same: Callable[..., None], batch: int, length: int
) -> None:
    args = arguments(batch, length)
    assert_same(fast(*args), model(*args))


@pytest.mark.parametrize(("batch", "length"), [(4, 4), (1, 9), (1, 12), (8, 8)])
def test_sizes_between_profiles_are_refused_with_the_profiles(fast: tb.EngineModule, batch: int, length: int) -> None:
    with pytest.raises(tb.OutOfRangeError) as caught:
        fast(*arguments(batch, length))
    words = [f"batch {batch} (in x) and seq {length} (in x)", "profile 0: batch 1, seq 2 to 8 (tuned for 4)"]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_wrong_beside_sizes_is_another_error(fast: tb.EngineModule) -> None:
    x, y = arguments(4, 4)
    for args, words in (
        ((x.double(), y), "expected torch.float32"),
        ((x[0], y), "expected rank 3"),
        ((x, "y"), "y"),
    ):
        with pytest.raises(tb.InputError, match=words) as caught:
            fast(*args)
        assert type(caught.value) is tb.InputError


def test_profiles_in_words(fast: tb.EngineModule, model: torch.nn.Module) -> None:
    text = str(fast.inspect())
    assert "input x: (batch, seq, 8) float  (batch in [1, 1] or [8, 32], seq in [2, 8] or [10, 20])" in text
    assert "\n  profile 1: batch 8 to 32 (tuned for 16), seq 10 to 20 (tuned for 12)\n" in text
    assert text.count("2 profiles") == 2
    told = str(tb.explain(model, arguments(1, 3), dynamic_shapes=SHAPES, backend="onnxruntime"))
    assert "\n  profile 0: batch 1, seq 2 to 8 (tuned for 4)\n" in told


def test_ranges_of_every_tensor_between_segments(fast: tb.EngineModule) -> None:
    first, plugin, second = fast.program.steps
    assert isinstance(first, EngineStep)
    assert isinstance(plugin, PluginCall)
    assert isinstance(second, EngineStep)
    made = {s.name: s for s in second.engine.inputs}
    assert made["y"].profiles == (((3, 3, 3), (2, 4, 8), (8, 8, 8)), ((17, 33, 65), (10, 12, 20), (8, 8, 8)))
    assert second.engine.outputs[0].profiles[1][0] == (25, 49, 97)
    stated = second.engine.info["profiles"]
    assert [profile["y"][0] for profile in stated] == [[3, 3, 3], [17, 33, 65]]


def test_profiles_survive_a_file(
    fast: tb.EngineModule, model: torch.nn.Module, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    tb.save(fast, tmp_path / "m.trtb")
    loaded = tb.load(tmp_path / "m.trtb")
    assert loaded.program.signature == fast.program.signature
    assert [e.inputs for e in loaded.program.engines] == [e.inputs for e in fast.program.engines]
    args = arguments(8, 20)
    assert_same(loaded(*args), model(*args))
    with pytest.raises(tb.OutOfRangeError, match="No profile takes batch 2"):
        loaded(*arguments(2, 4))


def test_specs_and_signatures_from_before_profiles_are_read() -> None:
    old = spec("x", ("n", 4), {"n": (1, 2, 3)})
    assert "profiles" not in old.to_json()
    assert TensorSpec.from_json(json.loads(json.dumps(old.to_json()))) == old
    new = spec("x", ("n", 4, None), {"n": (1, 2, 3)}, {"n": (1, 1, 1)}, {"n": (2, 2, 3)})
    assert new.profiles == (((1, 1, 1), (4, 4, 4), None), ((2, 2, 3), (4, 4, 4), None))
    assert TensorSpec.from_json(json.loads(json.dumps(new.to_json()))) == new


def test_a_file_from_before_profiles_is_read(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 2).eval()
    shapes = {"input": {0: tb.Dim("n", min=1, opt=2, max=4)}}
    made = tb.convert(net, (torch.randn(2, 4),), dynamic_shapes=shapes, backend="onnxruntime").program
    data = made.signature.to_json()
    del data["profiles"]
    (step,) = made.steps
    assert isinstance(step, EngineStep)
    info = {name: value for name, value in step.engine.info.items() if name != "profiles"}
    engine = Engine(step.engine.backend, step.engine.parts, info, step.engine.inputs, step.engine.outputs)
    Program(made.backend, (EngineStep(step.name, engine),), Signature.from_json(data)).save(tmp_path / "old.trtb")
    loaded = tb.load(tmp_path / "old.trtb")
    assert loaded.program.signature == made.signature
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), net(x))
    assert "profile" not in str(loaded.inspect())


def test_the_example_must_lie_in_a_profile(model: torch.nn.Module) -> None:
    with pytest.raises(tb.DynamicShapeError) as caught:
        tb.export(model, arguments(1, 12), dynamic_shapes=SHAPES)
    assert "example has batch 1, seq 12" in str(caught.value)
    assert "profile 1: batch 8 to 32" in str(caught.value)


def test_dims_of_different_numbers_of_profiles_are_named(model: torch.nn.Module) -> None:
    three = tb.Dim("seq", profiles=[(1, 1, 1), (2, 4, 8), (10, 12, 20)])
    shapes = {"x": {0: ONE_OR_MANY, 1: three}, "y": {0: 2 * ONE_OR_MANY + 1, 1: three}}
    with pytest.raises(tb.DynamicShapeError, match="'batch' has 2 profiles and Dim 'seq' has 3"):
        tb.export(model, arguments(1, 4), dynamic_shapes=shapes)


def test_comparisons_draw_sizes_from_every_profile(model: torch.nn.Module, fast: tb.EngineModule) -> None:
    samples = list(generated_samples(fast.program.signature, 8, 0))
    sizes = [sample["x"].shape[:2] for sample in samples]
    assert sizes[:6] == [(16, 12), (1, 4), (8, 10), (1, 2), (32, 20), (1, 8)]
    assert all(fits({"batch": b, "seq": s}, fast.program.signature.profiles) for b, s in sizes)
    assert tb.compare(model, fast).ok
    other = tb.convert(
        model,
        arguments(9, 10),
        dynamic_shapes={
            "x": {0: tb.Dim("batch", min=9, opt=9, max=10), 1: tb.Dim("seq", min=2, opt=10, max=20)},
            "y": {0: 2 * tb.Dim("batch", min=9, opt=9, max=10) + 1, 1: tb.Dim("seq", min=2, opt=10, max=20)},
        },
        backend="onnxruntime",
    )
    assert tb.compare(fast, other).ok, "only the second profile fits both"


def test_an_onnx_file_takes_profiles(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    assert read_onnx(path, {"x": {0: ONE_OR_MANY}}).signature.profiles == (
        {"batch": (1, 1, 1)},
        {"batch": (8, 16, 32)},
    )
    fast = tb.convert(path, dynamic_shapes={"x": {0: ONE_OR_MANY}}, backend="onnxruntime", check_passes=True)
    assert fast(-torch.ones(8, 3)).count_nonzero() == 0
    with pytest.raises(tb.OutOfRangeError, match="No profile takes batch 7"):
        fast(torch.ones(7, 3))


class Rows(torch.nn.Module):
    """A size that depends on data between the two segments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(1) > 0].relu() @ torch.ones(6, 2)


def test_sizes_that_depend_on_data_have_one_range_in_all_profiles(assert_same: Callable[..., None]) -> None:
    shapes = {"x": {0: ONE_OR_MANY}}
    fast = tb.convert(Rows(), (torch.randn(8, 6),), dynamic_shapes=shapes, max_data_size=32, backend="onnxruntime")
    for rows in (1, 8, 32):
        x = torch.randn(rows, 6)
        assert_same(fast(x), Rows()(x))
    found = {0: {0: tb.Dim("found", profiles=[(1, 1, 1), (2, 4, 8)])}}
    with pytest.raises(tb.OptionError, match="'found' has profiles"):
        tb.convert(Rows(), (torch.randn(8, 6),), dynamic_shapes=shapes, output_shapes=found, backend="onnxruntime")


def test_the_command_line_writes_profiles_one_after_the_other() -> None:
    assert DimRequest.parse("x:0=batch:1:1:1,8:16:32") == DimRequest("x", 0, ONE_OR_MANY)
    assert DimRequest.parse("x:0=batch:1:2:4") == DimRequest("x", 0, tb.Dim("batch", 1, 2, 4))


def test_random_inputs_of_a_given_size_take_the_rest_from_its_profile(fast: tb.EngineModule) -> None:
    signature = fast.program.signature
    for given, shape in (({}, (16, 12)), ({"batch": 1}, (1, 4)), ({"seq": 11}, (16, 11)), ({"batch": 5}, (5, 12))):
        assert RandomInputs(sizes=given).make(signature)[0].shape[:2] == shape


def test_dynamic_shapes_are_found_again_in_a_signature(fast: tb.EngineModule) -> None:
    found = dynamic_shapes_of(fast.program.signature)
    assert found == {name: {axis: 1 * dim for axis, dim in dims.items()} for name, dims in SHAPES.items()}
