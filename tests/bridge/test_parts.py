"""The small parts: dims and shape expressions, structures, partition, caches."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trtbridge as tb
from trtbridge.bridge.arguments import collect
from trtbridge.bridge.atomic import write_atomically
from trtbridge.bridge.cache import JitCacheFile, resolve_cache_dir
from trtbridge.bridge.dims import evaluate_range, evaluate_shape, evaluate_size
from trtbridge.bridge.guards import guards_always_hold
from trtbridge.bridge.model import OnnxModel, Signature, TensorSpec
from trtbridge.bridge.partition import partition
from trtbridge.bridge.plan import Plan, PluginCall
from trtbridge.bridge.structure import TENSOR, Structure, flatten, leaf_labels


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("n", 7),
        ("2*n + 1", 15),
        ("(n//2)", 3),
        ("Max(1, n - 9)", 1),
        ("n**2 - m", 46),
        ("Mod(n, 4)", 3),
        ("-n + 10", 3),
    ],
)
def test_shape_expressions(expression: str, value: int) -> None:
    assert evaluate_size(expression, {"n": 7, "m": 3}) == value


@pytest.mark.parametrize("text", ["__import__('os')", "n.real", "n if n else 1", "n +", "[n]", "n / 2"])
def test_what_is_no_shape_expression(text: str) -> None:
    with pytest.raises(tb.DynamicShapeError):
        evaluate_size(text, {"n": 7})


@given(st.integers(-3, 3), st.integers(0, 9), st.integers(1, 5), st.integers(0, 20))
def test_ranges_hold_every_size(scale: int, offset: int, low: int, span: int) -> None:
    expression = f"{scale}*n + {offset}"
    dims = {"n": (low, low + span // 2, low + span)}
    found = evaluate_range(expression, dims)
    assert found is not None
    sizes = [evaluate_size(expression, {"n": n}) for n in range(low, low + span + 1)]
    assert (found[0], found[2]) == (min(sizes), max(sizes))
    assert evaluate_range("u0", dims) is None
    assert evaluate_shape((3, expression, None), {"n": low}) is None
    assert evaluate_shape((3, expression), {"n": low}) == (3, sizes[0])


def test_ranges_of_quotients() -> None:
    """A data-dependent size may be 0 for all that is known; no call has a shape that is divided by it then."""
    dims = {"u0": (0, 512, 1024), "u1": (0, 4, 8)}
    assert evaluate_range("u0//u1", dims) == (0, 128, 1024)
    assert evaluate_range("8 + Mod(12, u1)", dims) == (8, 8, 12)
    assert evaluate_range("u0//0", dims) is None


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Box:
    low: Any
    high: Any = None


_constants = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.sampled_from([torch.float16, torch.device("cpu")]),
)
_tensors = st.integers(0, 9).map(lambda n: torch.tensor([n]))
_nested = st.recursive(
    st.one_of(_constants, _tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.tuples(inner, inner).map(lambda pair: Box(*pair)),
    ),
    max_leaves=12,
)


@given(_nested)
def test_structures_survive_flattening_and_json(value: Any) -> None:
    leaves, structure = flatten(value)
    assert structure.leaf_count == len(leaves) == len(leaf_labels(structure, "x"))
    rebuilt = structure.unflatten(leaves)
    assert repr(rebuilt) == repr(value)
    assert type(rebuilt) is type(value)
    read = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert repr(read.unflatten(leaves)) == repr(value)


def test_registered_pytree_nodes_are_honoured() -> None:
    from torch.utils import _pytree

    class Bag:
        def __init__(self, items: list[Any], label: str) -> None:
            self.items, self.label = items, label

    _pytree.register_pytree_node(Bag, lambda b: (b.items, b.label), lambda items, label: Bag(list(items), label))
    leaves, structure = flatten({"bag": Bag([torch.ones(1), 2], "a")})
    rebuilt = structure.unflatten(leaves)["bag"]
    assert (rebuilt.items[1], rebuilt.label) == (2, "a")


def _plan(nodes: str, inputs: str = "float[N,4] x", outputs: str = "float[N,4] y") -> Plan:
    text = f'<ir_version: 9, opset_import: ["" : 20, "trtbridge" : 1]> g ({inputs}) => ({outputs}) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    made = {name for node in proto.graph.node for name in node.output}
    known = {value.name for value in proto.graph.output}
    for name in sorted(made - known):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]))
    spec = TensorSpec.make("x", ir.DataType.FLOAT, ("N", 4), {"N": (1, 2, 3)})
    structure = Structure("tuple", (Structure("tuple", (TENSOR,)), Structure("dict")))
    signature = Signature((spec,), (), ("x",), {"N": (1, 2, 3)}, structure, TENSOR, ("x",))
    return partition(OnnxModel(proto, {}, signature))


def _plugin(name: str, *inputs: str) -> str:
    return f'{name} = trtbridge.p <op = "aten::neg.default", call = "{{}}"> ({", ".join(inputs)})'


def _order(plan: Plan) -> list[Any]:
    return [
        step.outputs if isinstance(step, PluginCall) else sorted(n.op_type for n in step.proto.graph.node)
        for step in plan.steps
    ]


def test_no_plugin_is_one_segment() -> None:
    plan = _plan("a = Relu(x) y = Neg(a)")
    assert _order(plan) == [["Neg", "Relu"]]
    assert [spec.name for spec in plan.segments[0].outputs] == ["y"]


def test_segments_are_convex_by_plugin_depth() -> None:
    # b hangs on no plugin and d on one; a greedy grouping of all ordinary nodes would make a cycle through p.
    plan = _plan(f"a = Relu(x) {_plugin('p', 'a')} b = Neg(a) c = Add(p, b) {_plugin('q', 'c')} y = Add(q, c)")
    assert _order(plan) == [["Neg", "Relu"], ("p",), ["Add"], ("q",), ["Add"]]
    first, second, third = plan.segments
    assert [s.name for s in first.outputs] == ["a", "b"]
    assert [s.name for s in second.inputs] == ["p", "b"]
    assert [s.name for s in third.inputs] == ["q", "c"]
    assert second.inputs[0].ranges == ((1, 2, 3), (4, 4, 4))


def test_parallel_plugins_share_segments() -> None:
    plan = _plan(f"a = Relu(x) {_plugin('p', 'a')} {_plugin('q', 'x')} y = Add(p, q)")
    assert _order(plan) == [["Relu"], ("p",), ("q",), ["Add"]]


def test_shape_arithmetic_does_not_cross_boundaries() -> None:
    plan = _plan(f"s = Shape(x) {_plugin('p', 'x')} r = Relu(p) y = Reshape(r, s)")
    assert _order(plan) == [("p",), ["Relu", "Reshape", "Shape"]]
    assert {spec.name for spec in plan.segments[0].inputs} == {"p", "x"}


def test_what_is_made_of_weights_does_not_cross_boundaries() -> None:
    weight = "w = Constant<value = float[4,4] {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}>() t = Transpose(w)"
    plan = _plan(f"{weight} a = MatMul(x, t) {_plugin('p', 'a')} y = MatMul(p, t)")
    assert _order(plan) == [["Constant", "MatMul", "Transpose"], ("p",), ["Constant", "MatMul", "Transpose"]]
    assert [[spec.name for spec in segment.inputs] for segment in plan.segments] == [["x"], ["p"]]
    noise = "r = RandomNormal<shape = [4, 4]>()"
    plan = _plan(f"{noise} a = MatMul(x, r) {_plugin('p', 'a')} y = MatMul(p, r)")
    assert [[spec.name for spec in segment.inputs] for segment in plan.segments] == [["x"], ["p", "r"]]


def test_results_that_are_inputs_or_plugin_outputs_need_no_engine() -> None:
    plan = _plan(f"{_plugin('p', 'x')} y = Identity(p) z = Identity(x)", outputs="float[N,4] y, float[N,4] z")
    assert _order(plan) == [("p",)]
    assert plan.aliases == {"y": "p", "z": "x"}


def test_captured_tensors_reach_the_segment() -> None:
    body = (
        "then_branch = t () => (float[N,4] o) { o = Add(a, x) }, else_branch = e () => (float[N,4] o2) { o2 = Neg(p) }"
    )
    plan = _plan(f"a = Relu(x) {_plugin('p', 'a')} y = If <{body}> (c)", inputs="float[N,4] x, bool c")
    assert _order(plan) == [["Relu"], ("p",), ["If"]]
    assert {spec.name for spec in plan.segments[1].inputs} == {"a", "x", "p", "c"}


def test_plugin_in_a_body_is_refused_with_its_name() -> None:
    then = f"then_branch = t () => (float[N,4] o) {{ {_plugin('o', 'x')} }}"
    body = f"{then}, else_branch = e () => (float[N,4] o2) {{ o2 = Neg(x) }}"
    with pytest.raises(tb.UnsupportedOpError, match=r"(?s)body of a condition.*torch.cond"):
        _plan(f"y = If <{body}> (c)", inputs="float[N,4] x, bool c")


def test_default_cache_that_cannot_be_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRTBRIDGE_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "file" / "below"))
    assert resolve_cache_dir(None) is None
    with pytest.raises(tb.CacheError):
        resolve_cache_dir(tmp_path / "file" / "below")


def test_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, lambda file: file.write("text is no bytes"))  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_guards_that_torch_cannot_prove() -> None:
    n, m = "L['leaves'][0].size()[0]", "L['leaves'][0].size()[1]"

    def arguments(low: int) -> Any:
        dims = {"x": {0: tb.Dim("n", min=low, max=16), 1: 2 * tb.Dim("m", min=1, max=8)}}
        return collect(torch.nn.Identity(), (torch.ones(5, 6),), {}, {"input": dims["x"]})

    def error(*guards: str) -> str:
        start = "Constraints violated (n)!\n"
        return start + "\n".join(
            f"  - Not all values of n = {n} in the specified range n <= 16 satisfy the generated guard {g}."
            for g in guards
        )

    assert guards_always_hold(error(f"min({n}, 4*{n}) == {n}", f"2 <= {m} and {m} <= 16"), arguments(1))
    assert guards_always_hold(error(f"{n} >= 3"), arguments(3))
    assert not guards_always_hold(error(f"{n} >= 3"), arguments(1))
    assert not guards_always_hold(error(f"{n} >= 3", f"{n} != {m}"), arguments(3))
    assert not guards_always_hold(error(f"{n} >= 3") + "\n  - You marked n as dynamic but ...", arguments(3))
    assert not guards_always_hold(error("open('x')"), arguments(3))


def test_kernels_of_every_shape_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    compiled = b""
    looks = 0

    def serialize() -> bytes:
        nonlocal looks
        looks += 1
        return compiled

    kept = JitCacheFile(tmp_path, b"plan", "1.0")
    for shape in [(1,), (1,), (1,), (8,), (1,), (8,), (8,)]:
        compiled = compiled or b"first"
        if shape == (8,):  # a new shape compiles more, later than the first calls
            compiled = b"first and second"
        with kept.watch(shape, serialize):
            assert looks <= 4
    assert looks == 4, "two calls of each shape"
    assert JitCacheFile(tmp_path, b"plan", "1.0").read() == b"first and second"
    assert JitCacheFile(tmp_path, b"plan", "1.1").read() is None, "another version starts anew"
    assert JitCacheFile(tmp_path, b"other", "1.0").read() is None
    assert JitCacheFile(None, b"plan", "1.0").read() is None


def test_calls_that_compile_wait_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others do not, and a call that fails leaves nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    kept = JitCacheFile(tmp_path, b"plan", "1.0")
    inside, done = threading.Event(), []

    def another() -> None:
        inside.set()
        with kept.watch((2,), lambda: b"both"):
            done.append("another")

    with pytest.raises(ValueError, match="fails"), kept.watch((1,), lambda: b"nothing"):
        raise ValueError("fails")
    assert kept.read() is None
    thread = threading.Thread(target=another)
    with kept.watch((1,), lambda: b"first"):
        thread.start()
        inside.wait()
        time.sleep(0.05)
        done.append("first")
    thread.join()
    assert done == ["first", "another"]
    assert kept.read() == b"both"
    with kept.watch((1,), lambda: b"first again, and more"):
        pass
    thread = threading.Thread(target=lambda: kept.watch((1,), lambda: b"").__enter__())
    with kept.watch((3,), lambda: b"three"):
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "nothing is compiled for it any more"


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-1], lambda whole: whole[:50] + b"X" + whole[51:], lambda _: b""]
)
def test_damaged_kernels_are_not_used_and_made_anew(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    compiled = bytes(range(200))
    with JitCacheFile(tmp_path, b"plan", "1.0").watch((1,), lambda: compiled):
        pass
    (path,) = (tmp_path / "jit").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level("WARNING", "trtbridge"):
        assert JitCacheFile(tmp_path, b"plan", "1.0").read() is None
    assert str(path) in caplog.text
    with JitCacheFile(tmp_path, b"plan", "1.0").watch((1,), lambda: compiled):
        pass
    assert JitCacheFile(tmp_path, b"plan", "1.0").read() == compiled
