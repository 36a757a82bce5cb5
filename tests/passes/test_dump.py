"""Graphs on disk, that load and pass the checker, and what a pass changed as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from trtbridge.errors import ModelFileError, PassError
from trtbridge.passes import (
    DEFAULT,
    FoldConstants,
    MergeReshapes,
    Notes,
    Pass,
    Pipeline,
    RemoveNoOps,
    RepairRanks,
    dump,
    graph_diff,
)

TEXT = """g (float[N,40] x) => (float[N,40] y) <float one = {1}> {
    [n1] n = Mul(x, one)  [m1] t = MatMul(n, w)  [s1] s = Softmax<axis = 1>(t)  [i1] y = Identity(s) }"""


def _model(tools):
    model = tools.model(TEXT)
    for index, node in enumerate(model.graph.node):
        node.metadata_props.add(
            key="trtbridge.origin", value=f'{{"file": "net.py", "line": {index + 1}, "module": "head"}}'
        )
    return model, tools.stand_in(model, "w", np.eye(40, dtype=np.float32) * 3)


def test_files_load_check_and_run(tools, tmp_path):
    model, weights = _model(tools)
    Pipeline((FoldConstants(), RemoveNoOps())).run(model, weights, dump_dir=tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    names = sorted(path.name for path in folder.iterdir())
    # The second round, that finds nothing to do, writes nothing.
    assert names == ["00_model.onnx", "01_FoldConstants.diff", "01_FoldConstants.onnx", "02_RemoveNoOps.diff",
                     "02_RemoveNoOps.onnx", "weights.data"]  # fmt: skip
    assert (folder / "weights.data").stat().st_size == 40 * 40 * 4, "each weight stands there once"
    x = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    results = []
    for path in folder.glob("*.onnx"):
        loaded = onnx.load(path)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[-1]), np.eye(40) * 3)
        onnx.checker.check_model(path, full_check=True)
        assert loaded.metadata_props[0].value == "values"
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    np.testing.assert_allclose(results[0], results[-1], rtol=1e-6)
    assert "nothing changed" in (folder / "01_FoldConstants.diff").read_text()


def test_the_difference_in_words(tools, tmp_path):
    model, weights = _model(tools)
    DEFAULT.run(model, weights, dump_dir=tmp_path)
    text = (tmp_path / "03_RemoveNoOps.diff").read_text()
    assert text.startswith("RemoveNoOps: 2 rewrites, 4 -> 2 nodes")
    assert "nodes that went (2):\n- Mul 'n1' (x, one) -> n\n    n: float[N, 40]\n" in text
    assert "- Identity 'i1' (s) -> y\n    y: float[N, 40]\n    \"net.py\", line 4 in head\n" in text
    # A node is known by its name, whatever it makes.
    assert "changed (2):\n~ MatMul 'm1' (x, w) -> t\n    inputs: (n, w) -> (x, w)\n~ Softmax 's1' (t) -> y" in text
    assert "    outputs: (s) -> (y)\n" in text
    assert "initializers (1):\n- one: float[] 1.0" in text
    assert text == text.strip() + "\n"


def test_large_weights_are_zeros(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(dump, "WEIGHTS_LIMIT_BYTES", 1000)
    model, weights = _model(tools)
    big = tools.stand_in(model, "big", np.ones((40, 4000), np.float32))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["x", "big"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 4000]))
    Pipeline((RemoveNoOps(),)).run(model, {**weights, **big}, dump_dir=tmp_path)
    zeros = (tmp_path / "zeros.data").stat()
    assert zeros.st_size == 40 * 4000 * 4
    assert zeros.st_blocks * 512 < 4096 * 4, "a sparse file takes no room"
    loaded = onnx.load(tmp_path / "01_RemoveNoOps.onnx")
    assert {t.name: (tuple(t.dims), onnx.numpy_helper.to_array(t).any()) for t in loaded.graph.initializer} == {
        "w": ((40, 40), False),
        "big": ((40, 4000), False),
    }
    onnx.checker.check_model(tmp_path / "01_RemoveNoOps.onnx", full_check=True)
    assert loaded.metadata_props[0].value == "zeros"


def test_an_earlier_dump_is_replaced_and_other_files_stay(tools, tmp_path):
    model, weights = _model(tools)
    (tmp_path / "mine.onnx").write_bytes(b"mine")
    DEFAULT.run(model, weights, dump_dir=tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    Pipeline((FoldConstants(),)).run(model, weights, dump_dir=tmp_path)
    second = {path.name for path in tmp_path.iterdir()}
    assert len(first) > 10
    assert second == {"00_model.onnx", "01_FoldConstants.onnx", "01_FoldConstants.diff", "weights.data", "mine.onnx"}
    with pytest.raises(ModelFileError, match="Cannot write graphs into the folder"):
        DEFAULT.run(model, weights, dump_dir=tmp_path / "mine.onnx")


@dataclass(frozen=True)
class NewWeight(Pass):
    """Doubles a weight under a new name."""

    after: ClassVar[tuple[type[Pass], ...]] = ()

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        node = next(node for node in graph.nodes if node.op == "MatMul")
        if node.inputs[1].name != "w":
            return 0
        node.inputs[1] = gs.Constant(notes.fresh_name("w_doubled"), notes.values(node.inputs[1]) * 2)
        return 1


def test_weights_that_a_pass_makes_are_added(tools, tmp_path):
    model, weights = _model(tools)
    Pipeline((NewWeight(),)).run(model, weights, dump_dir=tmp_path)
    for name, value in (("00_model", 3), ("01_NewWeight", 6)):
        tensor = onnx.load(tmp_path / f"{name}.onnx").graph.initializer[-1]
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), np.eye(40) * value)
    assert (tmp_path / "weights.data").stat().st_size == 2 * 40 * 40 * 4
    assert "initializers (2):\n- w: float[40, 40]\n+ w_doubled: float[40, 40]" in (
        tmp_path / "01_NewWeight.diff"
    ).read_text()  # fmt: skip


def test_difference_in_subgraphs_types_and_attributes(tools):
    text = """g (float[4] x, bool c) => (float[4] y) {
        [a] r = ArgMax<axis = 0, keepdims = 0>(x)  [k] k = Cast<to = 1>(r)
        [i] y = If<then_branch = t () => (float[4] p) { [q] q = Abs(x)  [p] p = Add(q, k) },
                   else_branch = e () => (float[4] o) { [o] o = Neg(x) }>(c) }"""
    before, after = tools.model(text), tools.model(text)
    assert graph_diff.diff(before, after) == ""
    then = next(a.g for a in after.graph.node[2].attribute if a.name == "then_branch")
    then.node[1].op_type = "Sub"
    del then.node[0]
    then.node[0].input[0] = "x"
    next(a for a in after.graph.node[0].attribute if a.name == "keepdims").i = 1
    after.graph.value_info[0].type.tensor_type.elem_type = 6
    after.opset_import[0].version = 21
    assert graph_diff.diff(before, after).splitlines() == [
        "nodes that went (1):",
        "- i.then_branch/Abs 'q' (x) -> q",
        "    q: float[4]",
        "",
        "nodes that changed (2):",
        "~ ArgMax 'a' (x) -> r  {axis=0, keepdims=1}",
        "    attribute keepdims: 0 -> 1",
        "~ i.then_branch/Sub 'p' (x, k) -> p",
        "    op: Add -> Sub",
        "    inputs: (q, k) -> (x, k)",
        "",
        "tensors whose type changed (1):",
        "~ r: int64[] -> int32[]",
        "",
        "other (1):",
        "~ opset of ai.onnx: 20 -> 21",
    ]


def test_values_in_the_difference_are_short(tools):
    before = tools.model("g (float[3] x) => (float[3] y) <float[3] a = {1, 2, 3}> { y = Add(x, a) }")
    after = tools.model("g (float[3] x) => (float[3] y) <float[3] a = {1, 2, 4}> { y = Add(x, a) }")
    assert (
        graph_diff.diff(before, after) == "initializers (1):\n~ a: float[3] [1.0, 2.0, 3.0] -> float[3] [1.0, 2.0, 4.0]"
    )


@dataclass(frozen=True)
class Fail(Pass):
    """Breaks or fails, by name."""

    how: str

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        match self.how:
            case "raise":
                graph.nodes[0].op = "Abs"
                raise ZeroDivisionError("oops")
            case "op":
                graph.nodes[0].op = "NoSuchOp"
            case "unprintable":
                graph.nodes[0].attrs["x"] = object()
                graph.outputs = []
        return 1


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", ["raise", "op"])
def test_both_graphs_of_a_broken_pass_are_saved(tools, tmp_path, monkeypatch, how, given):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, weights = _model(tools)
    pipeline = Pipeline((RemoveNoOps(), Fail(how)))
    with pytest.raises(PassError, match="The graphs before and after Fail are in") as raised:
        pipeline.run(model, weights, dump_dir=tmp_path / "given" if given else None)
    text = str(raised.value)
    before, after = (Path(word.rstrip(";")) for word in text.split() if word.rstrip(";").endswith(".onnx"))
    assert (tmp_path / "given" in before.parents) == given
    assert [node.op_type for node in onnx.load(before).graph.node] == ["MatMul", "Softmax"]
    assert onnx.load(after).graph.node[0].op_type == {"raise": "Abs", "op": "NoSuchOp"}[how]
    found = Path(text.split()[-1]).read_text()
    assert f"op: MatMul -> {'Abs' if how == 'raise' else 'NoSuchOp'}" in found
    assert before.parent == after.parent


def test_a_graph_that_cannot_be_written_is_said(tools, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, weights = _model(tools)
    with pytest.raises(
        PassError, match=r"Fail broke the graph.*\n.*before Fail is in .*the one after it cannot be writ"
    ):
        Pipeline((Fail("unprintable"),)).run(model, weights)


def test_what_a_pass_makes_is_seen_by_those_ahead_of_it(tools):
    # Both ArgMax are lifted to rank 2; the Squeeze of one and the Unsqueeze of the next cancel out.
    model = tools.model("g (float[5] x) => (float[5] y) { s = Softmax<axis = 0>(x)  y = Softmax<axis = 0>(s) }")
    passes = Pipeline((MergeReshapes(), RepairRanks()))
    result = passes.run(model, {}, check={"x": np.arange(5, dtype=np.float32)}, tolerance=0)
    assert tools.ops(result) == ["Unsqueeze", "Softmax", "Softmax", "Squeeze"]
    reports = {report.name: report for report in result.report.passes}
    assert list(reports) == [item.name for item in passes]
    assert (reports["RepairRanks"].rewrites, reports["MergeReshapes"].rewrites) == (2, 1)


@dataclass(frozen=True)
class Toggle(Pass):
    """Never content."""

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        node = graph.nodes[-1]
        node.op = "Abs" if node.op == "Relu" else "Relu"
        return 1


def test_passes_that_never_end_are_stopped(tools):
    model = tools.model("g (float[5] x) => (float[5] y) { y = Relu(x) }")
    assert Pipeline((Toggle(),)).run(model, {}).report.rewrites == 4


def test_a_type_that_was_unknown_may_be_known(tools):
    model = tools.model("g (float[5] x) => (float[5] y) { s = Shape(x)  y = Reshape(x, s) }")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert tools.ops(DEFAULT.run(model, {})) == ["Identity"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEFAULT.without(RemoveNoOps()), "give its class, RemoveNoOps"),
        (lambda: DEFAULT.without("RemoveNoOps"), "give the class of a pass"),
        (lambda: DEFAULT.insert(NewWeight(), after=int), "give the class of a pass"),
        (lambda: DEFAULT.insert(NewWeight, after=RemoveNoOps), "is no pass: give an instance"),
    ],
)
def test_what_is_no_pass_is_refused(make, words):
    with pytest.raises(PassError, match=words):
        make()
