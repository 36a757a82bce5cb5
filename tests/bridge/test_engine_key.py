"""Everything that decides what is built changes an engine's key, one at a time; nothing else does."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import helper

import trtbridge as tb
from trtbridge.bridge import engine_key as module
from trtbridge.bridge.backends import get_backend, tensorrt, trt_blame, trt_fit
from trtbridge.bridge.backends.base import Backend, BuildOptions, Segment
from trtbridge.bridge.dtypes import from_torch
from trtbridge.bridge.engine_key import IRRELEVANT_OPTIONS, TensorDigests, canonical, engine_key
from trtbridge.bridge.model import ORIGIN_KEY, TensorSpec, make_stand_in
from trtbridge.bridge.plan import PluginCall
from trtbridge.nodes import CALL_ATTRIBUTE, DOMAIN, OP_ATTRIBUTE
from trtbridge.plugins.host_spec import HOST_ATTRIBUTE, HOST_OP_TYPE, HostInput, HostOutput, HostSpec

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
segment0 (float[n,512] x, float[n,512] z) => (float[n,512] y) {
    a = Sub (x, z)
    b = Softmax <axis = 1> (a)
    c = Mul (b, w)
    y = LeakyRelu <alpha = 0.5> (c)
}
"""


def _weight(values: torch.Tensor, name: str = "w") -> ir.TensorProtocol:
    return ir.tensor_adapters.TorchTensor(values, name=name)


def _segment(graph: str = GRAPH, weights: dict[str, torch.Tensor] | None = None, low: int = 1) -> Segment:
    proto = onnx.parser.parse_model(graph)
    for index, node in enumerate(proto.graph.node):
        node.name = f"node_{index}"
    given = {"w": torch.linspace(0, 1, 512)} if weights is None else weights
    made = {name: _weight(values, name) for name, values in given.items()}
    proto.graph.initializer.extend(make_stand_in(name, weight) for name, weight in made.items())
    dims = {"n": (low, 4, 8)}
    specs = [TensorSpec.make(name, ir.DataType.FLOAT, ("n", 512), dims) for name in ("x", "z", "y")]
    return Segment("segment0", proto, made, tuple(specs[:2]), tuple(specs[2:]))


def _key(segment: Segment | None = None, backend: Backend | None = None, **options: Any) -> str:
    return engine_key(segment or _segment(), backend or get_backend("onnxruntime"), BuildOptions(**options))


BASE = _key()
ONES = torch.arange(512) > 0  # where torch.linspace(0, 1, 512) is not 0


def _edited(edit: Callable[[onnx.ModelProto], object]) -> Segment:
    segment = _segment()
    edit(segment.proto)
    return segment


def _swap_inputs(proto: onnx.ModelProto) -> None:
    node = proto.graph.node[0]
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _one_weight() -> torch.Tensor:
    values = torch.linspace(0, 1, 512)
    values[511] = values[511].nextafter(torch.tensor(2.0))
    return values


def _with_range(position: int) -> Segment:
    segment = _segment()
    spec = segment.inputs[0]
    sizes = list(spec.ranges[0] or ())
    sizes[position] += 1
    changed = dataclasses.replace(spec, ranges=(tuple(sizes), spec.ranges[1]))  # type: ignore[arg-type]
    return dataclasses.replace(segment, inputs=(changed, *segment.inputs[1:]))


CHANGES: dict[str, Callable[[], Segment]] = {
    "one bit of one weight": lambda: _segment(weights={"w": _one_weight()}),
    "the sign of a zero": lambda: _segment(weights={"w": torch.linspace(0, 1, 512).where(ONES, -0.0)}),
    "a weight's shape": lambda: _segment(weights={"w": torch.linspace(0, 1, 512)[None]}),
    "a weight's dtype": lambda: _segment(weights={"w": torch.linspace(0, 1, 512).view(torch.int32)}),
    "an attribute": lambda: _segment(GRAPH.replace("axis = 1", "axis = 0")),
    "a float attribute": lambda: _segment(GRAPH.replace("0.5", "0.25")),
    "a default that is written out": lambda: _segment(GRAPH.replace("Sub (x, z)", "Sub <extra = 1> (x, z)")),
    "swapped operands": lambda: _edited(_swap_inputs),
    "an op": lambda: _segment(GRAPH.replace("Sub", "Add")),
    "an op's domain": lambda: _edited(lambda proto: setattr(proto.graph.node[0], "domain", "com.microsoft")),
    "another wiring of the same nodes": lambda: _segment(GRAPH.replace("Mul (b, w)", "Mul (a, w)")),
    "the opset": lambda: _segment(GRAPH.replace(": 20", ": 21")),
    "an intermediate type": lambda: _edited(
        lambda proto: proto.graph.value_info.append(helper.make_tensor_value_info("a", 1, ["n", 512]))
    ),
    "metadata that is not ours": lambda: _edited(lambda proto: proto.graph.node[0].metadata_props.add(key="k")),
    "the smallest size": lambda: _with_range(0),
    "the size it is tuned for": lambda: _with_range(1),
    "the largest size": lambda: _with_range(2),
    "the order of inputs": lambda: dataclasses.replace(_segment(), inputs=_segment().inputs[::-1]),
    "a name": lambda: _segment(GRAPH.replace("(c)", "(d)").replace("c =", "d =")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_graph_does_changes_the_key(change: str) -> None:
    assert _key(CHANGES[change]()) != BASE


def test_all_changes_differ_from_one_another() -> None:
    keys = {change: _key(make()) for change, make in CHANGES.items()}
    assert len({*keys.values()}) == len(keys)


OPTIONS: dict[str, Any] = {
    "tf32": True, "optimization_level": 3, "workspace_bytes": 1 << 20, "compute_capabilities": ((8, 9),),
}  # fmt: skip


def test_every_build_option_changes_the_key_or_is_named_as_one_that_does_not() -> None:
    names = {field.name for field in dataclasses.fields(BuildOptions)}
    relevant = names - set(IRRELEVANT_OPTIONS)
    keys = {BASE}
    for name in OPTIONS.keys() & relevant:
        keys.add(_key(**{name: OPTIONS[name]}))
    assert len(keys) == 1 + len(OPTIONS)
    for name, value in {"isolate": False, "timeout_s": 5.0, "cache_dir": "elsewhere"}.items():
        assert name in IRRELEVANT_OPTIONS
        assert _key(**{name: value}) == BASE


def test_versions_and_backend_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend

    keys = {BASE, _key(backend=OnnxRuntimeBackend(widens=False))}
    for owner, name in ((onnxruntime, "__version__"), (onnx, "__version__"), (tb, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, "99.0")
            keys.add(_key())
    with monkeypatch.context() as patch:
        patch.setattr(module, "KEY_FORMAT", module.KEY_FORMAT + 1)
        keys.add(_key())
    assert len(keys) == 6
    assert _key() == BASE


@pytest.mark.rtx
def test_gpu_targets_environment_and_library_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt_rtx")
    base = _key(backend=backend)
    keys = {BASE, base, _key(backend=backend, compute_capabilities=((8, 9),))}
    keys.add(_key(backend=backend, compute_capabilities=((8, 9), (12, 0))))
    keys.add(_key(backend=backend, tf32=True))
    with monkeypatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        keys.add(_key(backend=backend, tf32=True))
        assert _key(backend=backend) == base, "without TF32 it is set anyway"
    for capability in ((8, 9), (12, 0)):
        with monkeypatch.context() as patch:
            _pretend_gpu(patch, capability, f"GPU of {capability}")
            keys.add(_key(backend=backend))
            patch.setattr(torch.cuda, "get_device_name", lambda index=None: "another of the same capability")
            keys.add(_key(backend=backend))  # the same: engines of TensorRT-RTX are for a compute capability
    with monkeypatch.context() as patch:
        patch.setattr(trt_fit, "_distributions", lambda name: {"tensorrt_rtx_cu13_libs": "another parser"})
        keys.add(_key(backend=backend))
    with monkeypatch.context() as patch:
        patch.setattr(backend.flavour.module(), "__version__", "99.0")  # type: ignore[attr-defined]
        keys.add(_key(backend=backend))
    assert len(keys) == 10
    assert _key(backend=backend) == base


def _pretend_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda index=None: name)


def test_tensorrt_engines_are_for_a_gpu_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = tensorrt.FLAVOURS["tensorrt"]
    found = []
    for name in ("L4", "L40S"):
        with monkeypatch.context() as patch:
            _pretend_gpu(patch, (8, 9), name)
            found.append(trt_fit.identity(flavour, BuildOptions(), "10.16.1.11"))
    assert [one.pop("gpus") for one in found] == [["8.9 L4"], ["8.9 L40S"]]
    assert found[0] == found[1]


@pytest.mark.rtx
def test_a_rule_about_faults_counts_where_it_changes_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt_rtx")
    base = _key(backend=backend)

    def rewritten(proto: onnx.ModelProto) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        changed.graph.node[1].attribute[0].i = 0
        return changed

    monkeypatch.setattr(trt_blame, "avoid_faults", rewritten)
    assert _key(backend=backend) != base


# What only says where things come from


def _describe(proto: onnx.ModelProto) -> None:
    proto.doc_string = proto.graph.doc_string = "words"
    proto.producer_name, proto.producer_version = "someone", "else"
    proto.metadata_props.add(key="pkg.torch.onnx.export", value="today")
    for value in [*proto.graph.input, *proto.graph.output]:
        value.doc_string = "words"
    for index, node in enumerate(proto.graph.node):
        node.doc_string = "a stack trace"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=f"line {index}")
        node.metadata_props.add(key=ORIGIN_KEY, value=f'{{"line":{index}}}')
        for attribute in node.attribute:
            attribute.doc_string = "words"
    for tensor in proto.graph.initializer:
        tensor.doc_string = "words"


def _reorder(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="com.microsoft", version=1)
    for field in (proto.opset_import, proto.graph.initializer, *(node.attribute for node in proto.graph.node)):
        entries = [type(entry).FromString(entry.SerializeToString()) for entry in field][::-1]
        del field[:]
        field.extend(entries)


def test_places_do_not_change_the_key() -> None:
    assert _key(_edited(_describe)) == BASE


def test_order_does_not_change_the_key_where_it_means_nothing() -> None:
    weights = {"w": torch.linspace(0, 1, 512), "v": torch.ones(300)}
    plain = _segment(weights=weights)
    plain.proto.opset_import.add(domain="com.microsoft", version=1)
    plain.proto.graph.node[0].attribute.append(helper.make_attribute("k", 1))
    plain.proto.graph.node[0].attribute.append(helper.make_attribute("j", 2))
    other = _segment(weights=dict(reversed(weights.items())))
    other.proto.graph.node[0].attribute.append(helper.make_attribute("k", 1))
    other.proto.graph.node[0].attribute.append(helper.make_attribute("j", 2))
    _reorder(other.proto)
    assert other.proto.SerializeToString() != plain.proto.SerializeToString()
    assert _key(plain) == _key(other)


def test_bodies_count_without_their_places() -> None:
    def graph(constant: float, words: str) -> onnx.ModelProto:
        then = helper.make_graph([helper.make_node("Neg", ["x"], ["t"], doc_string=words)], "then", [], [_value("t")])
        added = helper.make_node("Constant", [], ["c"], value_float=constant)
        other = helper.make_graph([added, helper.make_node("Add", ["x", "c"], ["e"])], "else", [], [_value("e")])
        node = helper.make_node("If", ["b"], ["y"], then_branch=then, else_branch=other)
        condition = helper.make_tensor_value_info("b", onnx.TensorProto.BOOL, [])
        return helper.make_model(helper.make_graph([node], "g", [_value("x"), condition], [_value("y")]))

    assert canonical(graph(1.0, "here")) == canonical(graph(1.0, "there"))
    assert canonical(graph(1.0, "here")) != canonical(graph(2.0, "here"))


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3])


# Weights


def test_shared_memory_is_read_once_and_differs_from_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = module._torch_digest
    monkeypatch.setattr(module, "_torch_digest", lambda tensor: read.append(1) or real(tensor))  # type: ignore[func-returns-value]
    base = torch.arange(12.0)
    weights = {"a": base, "b": base, "c": base.clone(), "d": base.reshape(3, 4), "e": base.reshape(4, 3).t()}
    digests = TensorDigests().of({name: _weight(values, name) for name, values in weights.items()})
    assert len(read) == 4
    assert digests["a"] == digests["b"] == digests["c"]
    assert len({digests["a"], digests["d"], digests["e"]}) == 3, "shape and order of elements count"


def test_a_pinned_tensor_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    digests, tensor = TensorDigests(), torch.arange(5.0)
    found = digests.pin(tensor)
    monkeypatch.setattr(module, "_torch_digest", lambda tensor: "read again")
    assert digests.of({"w": _weight(tensor), "v": _weight(tensor.clone())}) == {"w": found, "v": "read again"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_and_layout_has_a_digest(dtype: torch.dtype) -> None:
    values = torch.arange(60).reshape(3, 4, 5).remainder(2).to(dtype)
    kinds = {
        "plain": values, "turned": values.permute(2, 0, 1), "part": values[:, 1:3], "none": values[:0],
        "scalar": values[0, 0, 0],
    }  # fmt: skip
    for tensor in kinds.values():
        again = TensorDigests().of({"w": _weight(tensor.contiguous().clone())})["w"]
        assert TensorDigests().of({"w": _weight(tensor)})["w"] == again
    assert len({TensorDigests().pin(tensor) for tensor in kinds.values()}) == len(kinds)


def test_weights_of_files_and_of_four_bits_have_digests(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.float32)
    (tmp_path / "data").write_bytes(values.tobytes())
    outside = ir.ExternalTensor(
        "data", 0, values.nbytes, ir.DataType.FLOAT, shape=ir.Shape([4096]), name="w", base_dir=tmp_path
    )
    packed = ir.PackedTensor(np.arange(16, dtype=np.uint8), ir.DataType.INT4, shape=ir.Shape([32]), name="p")
    changed = ir.PackedTensor(np.arange(1, 17, dtype=np.uint8), ir.DataType.INT4, shape=ir.Shape([32]), name="p")
    digests = TensorDigests().of({"w": outside, "v": ir.tensor(values, name="v"), "p": packed, "q": changed})
    assert digests["w"] == digests["v"]
    assert digests["p"] != digests["q"]


# Plugins inside


def _hosted(op: str, place: str = "", dtype: str = "FLOAT", call: str = '{"args":[{"tensor":0}]}') -> Segment:
    host = HostSpec((HostInput(dtype, "", 1),), (HostOutput(0, dtype, (3,)),), place=place)
    attributes = {OP_ATTRIBUTE: op, CALL_ATTRIBUTE: call, HOST_ATTRIBUTE: host.to_json()}
    node = helper.make_node(HOST_OP_TYPE, ["x"], ["y"], "p", domain=DOMAIN, **attributes)
    proto = helper.make_model(helper.make_graph([node], "segment0", [_value("x")], [_value("y")]))
    specs = [TensorSpec(name, from_torch(torch.float32), (3,), ((3, 3, 3),)) for name in ("x", "y")]
    plugin = PluginCall("p", op, call, ("x",), ("y",), (None,), (specs[1],), reason=f"because of {place}")
    return Segment("segment0", proto, {}, (specs[0],), (specs[1],), hosted=(plugin,))


def test_plugins_inside_count_without_their_places() -> None:
    base = _key(_hosted("aten::clone.default", "here"))
    assert _key(_hosted("aten::clone.default", "there")) == base
    others = [
        _hosted("aten::neg.default"), _hosted("aten::clone.default", dtype="HALF"),
        _hosted("aten::clone.default", call='{"args":[{"tensor":0}],"kwargs":{}}'),
    ]  # fmt: skip
    assert len({base, *map(_key, others)}) == 4


def test_the_source_of_a_plugin_counts(tmp_path: Path) -> None:
    def key(body: str, comment: str = "") -> str:
        (tmp_path / "key_ops.py").write_text(
            f"import torch\nimport trtbridge as tb\n{comment}\n\n@tb.plugin('key_test::op')\n"
            f"def op(x: torch.Tensor) -> torch.Tensor:\n    return {body}\n"
        )
        sys.modules.pop("key_ops", None)
        __import__("key_ops")
        return _key(_hosted("key_test::op.default"))

    sys.path.insert(0, str(tmp_path))
    try:
        base = key("x + 1")
        assert key("x + 2") != base
        assert key("x + 1", "# a line further down") == base
        with pytest.raises(tb.PluginError, match="not registered"):
            _key(_hosted("key_test::other.default"))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("key_ops", None)


# Other processes


def test_the_key_is_the_same_in_another_process_with_another_hash_seed(tmp_path: Path) -> None:
    script = tmp_path / "keys.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        import trtbridge as tb
        from trtbridge.bridge.backends import get_backend
        from trtbridge.bridge.conversion_cache import ConversionCache
        from trtbridge.bridge.convert import make_planner
        from trtbridge.bridge.engine_key import engine_key
        from trtbridge.bridge.options import Options

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(32, 32)

            def forward(self, x, y):
                return {"a": self.layer(x) @ y.mT, "b": torch.cummax(y, 0)[0]}

        options = Options(cache=True, cache_dir=sys.argv[1], keep_fp32={"Gemm", "layer", "*"}, precision="fp16")
        args = (torch.ones(3, 32), torch.ones(5, 32))
        dims = {"x": {0: tb.Dim("n", max=8)}, "y": {0: tb.Dim("m", max=9)}}
        backend = get_backend("onnxruntime")
        planner = make_planner(Net(), args, {}, dims, backend, options)
        print(ConversionCache.begin(planner, options).file.key)
        for segment in planner.plan().segments:
            print(engine_key(segment, backend, options.build))
        """)
    )
    runs = [
        subprocess.run(
            [sys.executable, script, tmp_path / "cache"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed, folder in (("1", tmp_path), ("2", Path.cwd()))
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2
