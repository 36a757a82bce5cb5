"""``trtbridge::onnx_node`` against ONNX's own node tests, ONNX Runtime and plain loops."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from trtbridge.errors import PluginError
from trtbridge.nodes import decode_nodes, encode_node, wrong_in_onnxruntime
from trtbridge.passes.graft_nodes import graft
from trtbridge.plugins import onnx_fallback
from trtbridge.plugins.onnx_node import IMPLEMENTATIONS, runs_in_torch
from trtbridge.plugins.onnx_ops_math import multiply_by_digits
from trtbridge.plugins.registry import call_op, find_op

CPU = torch.device("cpu")
RANDOM = ("Bernoulli", "Multinomial", "RandomUniformLike", "Dropout")


@functools.cache
def node_cases() -> dict[str, list[Any]]:
    """ONNX's node tests of one node, by op; those with types that torch lacks left out."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    found: dict[str, list[Any]] = {}
    for case in cases:
        values = [*case.model.graph.input, *case.model.graph.output]
        kinds = {value.type.WhichOneof("value") for value in values}
        elements = {value.type.tensor_type.elem_type for value in values}
        if (
            kinds == {"tensor_type"}
            and elements <= onnx_fallback._BY_ELEMENT.keys()
            and len(case.model.graph.node) == 1
        ):
            found.setdefault(case.model.graph.node[0].op_type, []).append(case)
    return found


def grafted(model: onnx.ModelProto) -> onnx.NodeProto:
    """The one node of a model as a plugin node."""
    named = onnx.ModelProto()
    named.CopyFrom(model)
    named.graph.node[0].name = "node"
    (plugin,) = graft(named, {"node": "asked for"}).graph.node
    return plugin


def call(plugin: onnx.NodeProto, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a plugin node."""
    attributes = {attribute.name: attribute.s.decode() for attribute in plugin.attribute}
    inputs = [feeds[name] for name in plugin.input]
    results = call_op(find_op(attributes["op"]), attributes["call"], inputs, CPU)
    return dict(zip(plugin.output, results, strict=True))


def run(body: str, feeds: dict[str, torch.Tensor], opset: int = 20) -> dict[str, torch.Tensor]:
    """Run a model of one node, written as text."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {body}')
    return call(grafted(model), feeds)


def in_onnxruntime(body: str, feeds: dict[str, torch.Tensor], opset: int = 20) -> list[torch.Tensor]:
    """The same in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {body}')
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(r) for r in session.run(None, {name: t.numpy() for name, t in feeds.items()})]


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _case_feeds(case: Any) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    given, expected = case.data_sets[0]
    feeds = {v.name: onnx_fallback.to_torch(_array(x)) for v, x in zip(case.model.graph.input, given, strict=True)}
    return feeds, {v.name: _array(x) for v, x in zip(case.model.graph.output, expected, strict=True)}


@pytest.mark.parametrize("op", sorted(IMPLEMENTATIONS))
def test_torch_implementation_agrees_with_onnx(op: str) -> None:
    cases = [case for case in node_cases().get(op, []) if runs_in_torch(case.model.graph.node[0])]
    if op not in ("RandomUniform", "RandomNormal", "RandomNormalLike", "Multinomial", "RandomUniformLike"):
        assert cases, "ONNX has node tests for it"
    for case in cases:
        feeds, expected = _case_feeds(case)
        found = call(grafted(case.model), feeds)
        for name, wanted in expected.items():
            mine = onnx_fallback.to_numpy(found[name])
            assert (mine.dtype, mine.shape) == (wanted.dtype, wanted.shape), case.name
            if wanted.size and not (op in RANDOM and (op != "Dropout" or "training" in case.name)):
                exact = wanted.dtype.kind in "biu"
                rtol = 0 if exact else {2: 2e-3}.get(wanted.dtype.itemsize, 1e-3)
                if not exact and wanted.dtype.kind != "f":  # bfloat16
                    rtol = 2e-2
                mine, wide = mine.astype(np.float64), wanted.astype(np.float64)
                atol = 1e-6 * float(np.abs(wide[np.isfinite(wide)]).max(initial=0.1))
                np.testing.assert_allclose(mine, wide, rtol=rtol, atol=0 if exact else atol, err_msg=case.name)


@pytest.mark.parametrize("op", ["Det", "MaxPool", "CumSum", "ScatterND", "TopK", "Unique", "NonZero", "DFT", "RoiAlign",
                                "Compress", "NonMaxSuppression", "Add", "Attention", "ConvTranspose"])  # fmt: skip
def test_fake_result_has_the_shape_of_the_real_one(op: str) -> None:
    """With symbolic sizes: what is no data-dependent size is right at the example, dtype and rank are."""
    checked = 0
    for case in node_cases()[op]:
        feeds, expected = _case_feeds(case)
        plugin = grafted(_frozen(case.model, feeds))
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fakes = {}
        for name in plugin.input:
            dynamic = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in feeds[name].shape]
            context = StatelessSymbolicContext(dynamic_sizes=dynamic)
            fakes[name] = mode.from_tensor(feeds[name], symbolic_context=context)
        with mode:
            found = call(plugin, fakes)
        for name, fake in found.items():
            wanted = expected[name]
            assert onnx_fallback._TYPES[fake.dtype][1] == wanted.dtype, case.name
            assert fake.dim() == wanted.ndim, case.name
            for mine, size in zip(fake.shape, wanted.shape, strict=True):
                assert mine == size if isinstance(mine, int) else mine.node.hint in (size, None), case.name
            checked += 1
    assert checked


def _frozen(model: onnx.ModelProto, feeds: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """The same model with its small whole-number inputs (axes, shapes, counts) as constants."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kept = []
    for position, value in enumerate(model.graph.input):
        tensor = feeds[value.name]
        if position and not tensor.is_floating_point() and tensor.numel() < 10 and "indices" not in value.name:
            result.graph.initializer.append(numpy_helper.from_array(tensor.numpy(), value.name))
        else:
            kept.append(value)
    del result.graph.input[:]
    result.graph.input.extend(kept)
    return result


# The ways in which a node can run


def test_falls_back_to_onnxruntime() -> None:
    x = torch.randn(2, 3)
    found = run("g (float[2,3] x) => (float[2,3] y) { y = Celu<alpha = 2.0>(x) }", {"x": x})
    torch.testing.assert_close(found["y"], torch.celu(x, 2.0))
    assert "Celu" not in IMPLEMENTATIONS


def test_falls_back_to_the_reference_where_onnxruntime_lacks_the_form() -> None:
    (case,) = [case for case in node_cases()["GRU"] if case.name == "test_gru_batchwise"]
    feeds, expected = _case_feeds(case)
    found = call(grafted(case.model), feeds)
    assert onnx_fallback._session.cache_info().currsize
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-3, atol=1e-6)


def test_what_nothing_runs_names_both_reasons() -> None:
    body = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="nowhere")
    text = encode_node(body, [onnx.helper.make_opsetid("nowhere", 1)])
    with pytest.raises(PluginError, match=r"Frobnicate cannot run on inputs.*\n.*\n  ONNX Runtime: .*\n.*reference"):
        torch.ops.trtbridge.onnx_node(text, [torch.ones(2)], CPU)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn]
)
def test_every_type_survives_numpy(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    back = onnx_fallback.to_torch(onnx_fallback.to_numpy(tensor))
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_bfloat16_through_onnxruntime() -> None:
    x = torch.randn(4, 4).bfloat16()
    found = run("g (bfloat16[4,4] x) => (bfloat16[4,4] y) { y = Identity(x) }", {"x": x})
    assert torch.equal(found["y"], x)


def test_a_node_without_inputs_draws_from_torchs_generator() -> None:
    body = "g () => (float[1000] y) { y = RandomNormal<shape = [1000], mean = 3.0, scale = 0.5>() }"
    torch.manual_seed(1)
    first, second = run(body, {})["y"], run(body, {})["y"]
    torch.manual_seed(1)
    assert torch.equal(run(body, {})["y"], first)
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 3) < 0.1
    assert abs(float(first.std()) - 0.5) < 0.1


def test_results_are_no_views_of_inputs() -> None:
    x = torch.randn(3)
    found = run("g (float[3] x) => (float[3] y, bool[3] m) { y, m = Dropout(x) }", {"x": x})
    found["y"].zero_()
    assert x.abs().sum() > 0
    assert found["m"].all()


@pytest.mark.parametrize("body", [
    "g (float[3,3] x) => (float y) { y = Det(x) }",
    "g (float[3,3] x) => (int64[2,n] y) { y = NonZero(x) }",
    "g (float[3,3] x) => (float[3,3] y) { y = Celu(x) }",
])  # fmt: skip
def test_opcheck(body: str) -> None:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {body}')
    text = encode_node(model.graph.node[0], model.opset_import)
    torch.library.opcheck(
        torch.ops.trtbridge.onnx_node.default,
        (text, [torch.randn(3, 3)], CPU),
        test_utils=("test_schema", "test_faketensor"),
    )


# Single ops against other formulations


@pytest.mark.parametrize("seed", range(6))
def test_non_max_suppression_like_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches, classes, count = 2, 3, 40
    boxes = torch.rand(batches, count, 4, generator=generator) * 4  # corners in any order
    scores = (torch.rand(batches, classes, count, generator=generator) * 10).round() / 10  # with ties
    body = f"""g (float[2,40,4] b, float[2,3,40] s) => (int64[n,3] y)
        <int64[1] most = {{{seed + 1}}}, float[1] iou = {{0.3}}, float[1] low = {{0.35}}>
        {{ y = NonMaxSuppression(b, s, most, iou, low) }}"""
    (wanted,) = in_onnxruntime(body, {"b": boxes, "s": scores})
    assert run(body, {"b": boxes, "s": scores})["y"].tolist() == wanted.tolist()
    assert 0 < len(wanted) < batches * classes * count


def test_non_max_suppression_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.rand(1, 300, 4)
    scores = torch.rand(1, 2, 300)
    body = """g (float[1,300,4] b, float[1,2,300] s) => (int64[n,3] y) <int64[1] most = {300}, float[1] iou = {0.4}>
        { y = NonMaxSuppression(b, s, most, iou) }"""
    whole = run(body, {"b": boxes, "s": scores})["y"]
    monkeypatch.setattr("trtbridge.plugins.onnx_ops_select._BLOCK", 32)
    monkeypatch.setattr("trtbridge.plugins.onnx_ops_select._CHUNK_ELEMENTS", 1)
    assert torch.equal(run(body, {"b": boxes, "s": scores})["y"], whole)
    assert whole.tolist() == in_onnxruntime(body, {"b": boxes, "s": scores})[0].tolist()


def test_non_max_suppression_of_nothing() -> None:
    body = "g (float[1,2,4] b, float[1,1,2] s) => (int64[n,3] y) { y = NonMaxSuppression(b, s) }"
    feeds = {"b": torch.rand(1, 2, 4), "s": torch.rand(1, 1, 2)}
    assert run(body, feeds)["y"].shape == (0, 3)  # max_output_boxes_per_class is 0 by default


@pytest.mark.parametrize("attributes", [
    "kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 0, 1]",
    "kernel_shape = [2, 2], dilations = [2, 3], strides = [2, 2], ceil_mode = 1",
    "kernel_shape = [3, 3], strides = [2, 3], pads = [1, 1, 1, 1], ceil_mode = 1",
    'kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"',
    'kernel_shape = [2, 4], strides = [1, 3], auto_pad = "SAME_LOWER", storage_order = 1',
])  # fmt: skip
def test_max_pool_with_indices_like_onnxruntime(attributes: str) -> None:
    x = torch.randn(2, 3, 9, 11)
    body = f"g (float[2,3,9,11] x) => (float[2,3,h,w] y, int64[2,3,h,w] i) {{ y, i = MaxPool<{attributes}>(x) }}"
    values, indices = in_onnxruntime(body, {"x": x})
    found = run(body, {"x": x})
    assert torch.equal(found["y"], values)
    assert torch.equal(found["i"], indices)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("size", [(5, 23), (17, 4), (9, 11)])
def test_resize_like_onnxruntime(mode: str, antialias: int, size: tuple[int, int]) -> None:
    x = torch.randn(1, 2, 9, 11)
    body = f"""g (float[1,2,9,11] x) => (float[1,2,{size[0]},{size[1]}] y) <int64[4] s = {{1, 2, {size[0]}, {size[1]}}}>
        {{ y = Resize<mode = "{mode}", antialias = {antialias}>(x, , , s) }}"""
    (wanted,) = in_onnxruntime(body, {"x": x})
    torch.testing.assert_close(run(body, {"x": x})["y"], wanted, rtol=1e-4, atol=1e-5)


def test_resize_in_channels_last_and_half_precision() -> None:
    x = torch.randn(1, 3, 8, 8, dtype=torch.float16).to(memory_format=torch.channels_last)
    body = """g (float16[1,3,8,8] x) => (float16[1,3,5,5] y) <int64[4] s = {1, 3, 5, 5}>
        { y = Resize<mode = "linear">(x, , , s) }"""
    found = run(body, {"x": x})["y"]
    wanted = torch.nn.functional.interpolate(x.float(), size=(5, 5), mode="bilinear").half()
    torch.testing.assert_close(found.contiguous(), wanted.contiguous(), rtol=2e-3, atol=2e-3)


def test_whole_numbers_wrap_around() -> None:
    x = torch.tensor([2**32 - 1, 5], dtype=torch.uint32)
    y = torch.tensor([2, 7], dtype=torch.uint32)
    body = "g (uint32[2] x, uint32[2] y) => (uint32[2] z) {{ z = {}(x, y) }}"
    assert run(body.format("Add"), {"x": x, "y": y})["z"].to(torch.int64).tolist() == [1, 12]
    assert run(body.format("Sub"), {"x": y, "y": x})["z"].to(torch.int64).tolist() == [3, 2]
    assert run(body.format("Mul"), {"x": x, "y": y})["z"].to(torch.int64).tolist() == [2**32 - 2, 35]
    assert run(body.format("Div"), {"x": x, "y": y})["z"].to(torch.int64).tolist() == [2**31 - 1, 0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_shifts_of_all_widths(dtype: str) -> None:
    bits = int(dtype[4:])
    numbers = [0, 1, 5, 2**bits - 1, 2 ** (bits - 1)]
    for shift in (0, 1, 2, bits - 1, bits):
        x = torch.from_numpy(np.array(numbers, dtype))
        by = torch.from_numpy(np.full(5, shift, dtype))
        for direction in ("LEFT", "RIGHT"):
            body = (
                f'g ({dtype}[5] x, {dtype}[5] n) => ({dtype}[5] y) {{ y = BitShift<direction = "{direction}">(x, n) }}'
            )
            found = run(body, {"x": x, "n": by})["y"].numpy().tolist()
            moved = [(n << shift if direction == "LEFT" else n >> shift) % 2**bits for n in numbers]
            assert found == moved, (direction, shift)


def test_product_by_digits_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    limits = (-(2**63), 2**63 - 1)
    a = torch.randint(*limits, (5, 64), generator=generator)
    b = torch.randint(*limits, (64, 3), generator=generator)
    assert torch.equal(multiply_by_digits(a, b), a @ b)


def test_scatter_with_truth_values() -> None:
    body = """g (bool[4] x, int64[2] i, bool[2] u) => (bool[4] y)
        { y = ScatterElements<reduction = "add">(x, i, u) }"""
    feeds = {
        "x": torch.tensor([True, False, False, True]),
        "i": torch.tensor([1, -1]),
        "u": torch.tensor([True, False]),
    }
    assert run(body, feeds, opset=18)["y"].tolist() == [True, True, False, True]


def test_top_k_takes_the_lower_index_of_equals_and_any_k() -> None:
    x = torch.zeros(1, 5000)
    body = "g (float[1,5000] x, int64[1] k) => (float[1,k] v, int64[1,k] i) { v, i = TopK(x, k) }"
    found = run(body, {"x": x, "k": torch.tensor([4500])})  # k is no constant here
    assert found["i"].tolist() == [list(range(4500))]


# The text of a node


def test_equal_nodes_give_equal_text() -> None:
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("unused", 3)]
    one = onnx.helper.make_node("Celu", ["a"], ["b"], name="first", doc_string="x", alpha=2.0)
    other = onnx.helper.make_node("Celu", ["c"], ["d"], name="second", alpha=2.0)
    other.metadata_props.add(key="k", value="v")
    assert encode_node(one, imports) == encode_node(other, imports)
    different = onnx.helper.make_node("Celu", ["a"], ["b"], alpha=3.0)
    assert encode_node(one, imports) != encode_node(different, imports)
    assert [opset.domain for opset in decode_nodes(encode_node(one, imports)).opset_import] == [""]


def test_outputs_that_nobody_reads_are_not_asked_for() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[4] x) => (float[n] y) { y, i, j, c = Unique(x) }""")
    plugin = grafted(model)
    assert list(plugin.output) == ["y"]
    text = next(attribute.s.decode() for attribute in plugin.attribute if attribute.name == "call")
    import json

    assert len(decode_nodes(json.loads(text)["args"][0]).graph.node[0].output) == 1


@pytest.mark.parametrize("name", ["test_maxunpool_export_with_output_shape",
                                  "test_resize_downsample_scales_cubic_align_corners",
                                  "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal"])  # fmt: skip
def test_what_onnxruntime_gets_wrong_is_known(name: str) -> None:
    """If this fails, ONNX Runtime was repaired: the entry of `wrong_in_onnxruntime` can go."""
    ort = pytest.importorskip("onnxruntime")
    (case,) = [case for cases in node_cases().values() for case in cases if case.name == name]
    assert wrong_in_onnxruntime(case.model.graph.node[0])
    session = ort.InferenceSession(case.model.SerializeToString(), providers=["CPUExecutionProvider"])
    given, expected = case.data_sets[0]
    found = session.run(None, {v.name: x for v, x in zip(case.model.graph.input, given, strict=True)})
    assert not all(np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))
