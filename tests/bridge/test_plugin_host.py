"""Plugin nodes inside engines: what TensorRT-RTX's parser and builder make of them. Built here, run in tests/gpu."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from trtbridge.bridge.backends import get_backend, plugin_library
from trtbridge.bridge.backends.base import BuildOptions, Engine, Segment
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.plugin_alias import alias_library, load_alias
from trtbridge.bridge.backends.plugin_nodes import (
    describe_host,
    hosted_plugins,
    make_parseable,
    probe_segment,
    require_ops,
)
from trtbridge.bridge.dims import Range, Shape
from trtbridge.bridge.model import Origin, TensorSpec
from trtbridge.bridge.plan import PluginCall
from trtbridge.errors import BackendError, BuildError, PluginError
from trtbridge.plugins.calls import encode
from trtbridge.plugins.host_spec import HOST_ATTRIBUTE, HOST_OP_TYPE, HostSpec
from trtbridge.plugins.tensorrt_v3 import PluginHost, _make_creator

pytestmark = pytest.mark.rtx
RTX = FLAVOURS["tensorrt_rtx"]
DIMS: dict[str, Range] = {"batch": (1, 4, 8), "seq": (2, 6, 32)}
PLACE = Origin(file="model.py", line=12, code="y = op(x)", op="aten.op.default")


@pytest.fixture(scope="module")
def hosting() -> None:
    """Skips where the parser takes no plugins (TensorRT-RTX before 1.7); the parser is asked."""
    pytest.importorskip("tensorrt_rtx")
    refusals = get_backend("tensorrt_rtx").check(probe_segment(), BuildOptions())
    if refusals:
        pytest.skip(refusals[0].reason)


class Input:
    """Stands for the i-th input in a call."""

    def __init__(self, index: int) -> None:
        self.index = index


X, Y = Input(0), Input(1)
EMPTY = (  # what is said of a plugin without inputs, and of one on empty tensors
    "no inputs",
    r"none \(batch, 0\) float may be empty",
    r"found \(u0\) float may be empty",
    r"pairs \(0\) float is empty",
)


def spec(name: str, *shape: int | str | None, dtype: ir.DataType = ir.DataType.FLOAT) -> TensorSpec:
    return TensorSpec.make(name, dtype, shape, DIMS)


def plugin(
    op: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec | None], *args: Any, **kwargs: Any
) -> PluginCall:
    call = encode(args, kwargs, lambda value: {"tensor": value.index} if isinstance(value, Input) else None)
    return PluginCall(
        name=f"node_{next((o.name for o in outputs if o), '')}",
        op=op,
        call=call,
        inputs=tuple(one.name for one in inputs),
        outputs=tuple("" if one is None else one.name for one in outputs),
        input_dtypes=tuple(None for _ in inputs),
        output_specs=tuple(outputs),
        origin=PLACE,
    )


def node(call: PluginCall, inputs: Sequence[TensorSpec]) -> onnx.NodeProto:
    """A plugin node inside a segment, as the partition makes it."""
    backend = get_backend("tensorrt_rtx")
    assert backend.plugin_refusal(call, tuple(inputs)) == ""
    return helper.make_node(
        HOST_OP_TYPE,
        list(call.inputs),
        list(call.outputs),
        call.name,
        domain="trtbridge",
        op=call.op,
        call=call.call,
        host=backend.host_spec(call, tuple(inputs)),
    )


def segment(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    initializers: Sequence[onnx.TensorProto] = (),
) -> Segment:
    def value(one: TensorSpec) -> onnx.ValueInfoProto:
        shape: Shape = one.shape
        return helper.make_tensor_value_info(one.name, int(one.dtype), list(shape))

    graph = helper.make_graph(list(nodes), "g", [value(i) for i in inputs], [value(o) for o in outputs], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    provenance = {name: PLACE for made in nodes for name in made.output if name}
    return Segment("segment0", proto, {}, tuple(inputs), tuple(outputs), provenance)


def build(made: Segment, **options: Any) -> Engine:
    engine = get_backend("tensorrt_rtx").build(made, BuildOptions(**options))
    assert engine.size_bytes > 1000
    return engine


def layers(engine: Engine) -> list[str]:
    return [layer["type"] for layer in engine.info["layers"]]


@pytest.mark.usefixtures("hosting")
@pytest.mark.parametrize("shape", [(4, 6), ("batch", "seq")])
def test_two_outputs_among_layers(shape: tuple[int | str, ...]) -> None:
    x, y = spec("x", *shape), spec("y", *shape)
    values, places = spec("values", *shape), spec("places", *shape, dtype=ir.DataType.INT64)
    call = plugin("aten::cummax.default", [y], [values, places], X, 1)
    made = segment(
        [helper.make_node("Relu", ["x"], ["y"]), node(call, [y]), helper.make_node("Neg", ["values"], ["out"])],
        [x],
        [spec("out", *shape), places],
    )
    engine = build(made)
    assert layers(engine).count("PLUGIN_V3") == 1
    assert engine.info["plugins"] == [
        {"op": "aten::cummax.default", "node": call.name, "place": str(PLACE), "waits": False}
    ]
    assert json.loads(json.dumps(engine.info))["plugins"], "saved with the program"
    assert call.op.encode() in bytes(engine.parts["engine.plan"]), "the op goes into the engine"
    assert get_backend("tensorrt_rtx").check(made, BuildOptions()) == []


@pytest.mark.usefixtures("hosting")
def test_unread_outputs_are_left_out() -> None:
    x, places = spec("x", "batch", 5), spec("places", "batch", 5, dtype=ir.DataType.INT64)
    call = plugin("aten::cummax.default", [x], [None, places], X, 1)
    made = segment([node(call, [x])], [x], [places])
    assert list(make_parseable(made.proto).graph.node[0].output) == ["places"]
    assert list(made.proto.graph.node[0].output) == ["", "places"], "the segment stays as it is"
    build(made)


@pytest.mark.usefixtures("hosting")
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL"])
def test_types(dtype: str) -> None:
    kind = ir.DataType[dtype]
    x, y = spec("x", "batch", 3, dtype=kind), spec("y", 3, "batch", dtype=kind)
    call = plugin("aten::t.default", [x], [y], X)
    build(segment([node(call, [x])], [x], [y]))


@pytest.mark.usefixtures("hosting")
def test_sizes_from_data_feed_layers_and_outputs() -> None:
    """nonzero, then a gather, a reduction and an elementwise layer; the gathered values are an output too."""
    x, found = spec("x", "batch", 6), spec("found", None, 2, dtype=ir.DataType.INT64)
    call = plugin("aten::nonzero.default", [x], [found], X)
    made = segment(
        [
            node(call, [x]),
            helper.make_node("GatherND", ["x", "found"], ["picked"]),
            helper.make_node("Exp", ["picked"], ["grown"]),
            helper.make_node("ReduceSum", ["grown"], ["total"], keepdims=0),
        ],
        [x],
        [spec("total"), spec("grown", None)],
    )
    parsed = make_parseable(made.proto).graph.node[0]
    assert len(parsed.output) == 2, "the size tensor is an output more"
    engine = build(made)
    assert engine.info["plugins"][0]["waits"]


@pytest.mark.usefixtures("hosting")
def test_many_nodes_and_constants() -> None:
    """The same op many times, one plugin after another, and initializers as inputs."""
    x = spec("x", "batch", 4)
    nodes, before = [], x
    for index in range(4):
        after = spec(f"t{index}", "batch", 4)
        nodes.append(node(plugin("aten::erfinv.default", [before], [after], X), [before]))
        before = after
    weight, summed = spec("weight", 4), spec("summed", "batch", 4)
    nodes.append(node(plugin("aten::hypot.default", [before, weight], [summed], X, Y), [before, weight]))
    nodes.append(helper.make_node("Neg", ["summed"], ["out"]))
    values = helper.make_tensor("weight", onnx.TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    engine = build(segment(nodes, [x], [spec("out", "batch", 4)], [values]))
    assert layers(engine).count("PLUGIN_V3") == 5
    assert len(engine.info["plugins"]) == 5


def test_what_may_be_empty_or_has_no_input_stays_outside() -> None:
    """An engine with such a plugin builds, and has been seen to fail when it ran."""
    backend = get_backend("tensorrt_rtx")
    drawn = plugin("aten::rand.default", [], [spec("drawn", 4)], [4])
    none, found = spec("none", "batch", 0), TensorSpec.make("found", ir.DataType.FLOAT, ("u0",), {"u0": (0, 4, 8)})
    refusals = [backend.plugin_refusal(drawn, ())]
    for one in (none, found):
        refusals.append(backend.plugin_refusal(plugin("aten::erfinv.default", [one], [one], X), (one,)))
    single, pairs = spec("single", 1, 4), spec("pairs", 0)
    refusals.append(backend.plugin_refusal(plugin("aten::pdist.default", [single], [pairs], X), (single,)))
    # Where no plugin can be inside, that is the reason given.
    if not backend.plugin_refusal(plugin("aten::erfinv.default", [spec("x", 4)], [spec("y", 4)], X), (spec("x", 4),)):
        assert [bool(re.search(words, given)) for words, given in zip(EMPTY, refusals, strict=True)] == [True] * 4
    assert all(refusals)


@pytest.mark.usefixtures("hosting")
@pytest.mark.parametrize("parse_only", [True, False])
def test_a_failure_in_a_callback_comes_back_with_its_traceback(parse_only: bool) -> None:
    x, y = spec("x", "batch", 4), spec("y", "batch", 4)
    made = segment([node(plugin("aten::erfinv.default", [x], [y], X), [x])], [x], [y])
    attribute = next(a for a in made.proto.graph.node[0].attribute if a.name == HOST_ATTRIBUTE)
    host = HostSpec.from_json(attribute.s.decode())
    attribute.s = replace(host, inputs=(replace(host.inputs[0], dtype="HALF"),)).to_json().encode()
    backend = get_backend("tensorrt_rtx")
    with pytest.raises(BuildError, match=r"gets inputs of types \['FLOAT'\](.|\n)*model.py") as caught:
        (backend.check if parse_only else backend.build)(made, BuildOptions())
    assert "in get_output_data_types" in str(caught.value), "the traceback says where"


@pytest.mark.usefixtures("hosting")
def test_a_damaged_host_attribute_is_an_error() -> None:
    x, y = spec("x", "batch", 4), spec("y", "batch", 4)
    made = segment([node(plugin("aten::erfinv.default", [x], [y], X), [x])], [x], [y])
    attribute = next(a for a in made.proto.graph.node[0].attribute if a.name == HOST_ATTRIBUTE)
    attribute.s = attribute.s.replace(b"d0_0", b"d7_7")
    with pytest.raises(BuildError, match="'d7_7' is not a size that TensorRT can compute"):
        build(made)
    attribute.s = b"{}"
    with pytest.raises(PluginError, match="another version of trtbridge"):
        build(made)


def make_plugin(host: PluginHost, texts: dict[str, str], phase: str) -> Any:
    """A plugin as TensorRT makes it: from fields, by the creator."""
    trt = RTX.module()
    fields = [trt.PluginField(name, text.encode() + b"\0", trt.PluginFieldType.CHAR) for name, text in texts.items()]
    creator: Any = _make_creator(RTX.module, host)
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.__members__[phase])


def enqueue(made: Any, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Reach the layer, with tensors on the CPU."""
    trt = RTX.module()

    def describe(tensor: torch.Tensor) -> Any:
        desc = trt.PluginTensorDesc()
        desc.dims = trt.Dims(tuple(tensor.shape))
        return desc

    made.enqueue(
        [describe(t) for t in inputs],
        [describe(t) for t in outputs],
        [t.data_ptr() for t in inputs],
        [t.data_ptr() for t in outputs],
        0,
        0,
    )


def test_the_life_of_a_plugin_object() -> None:
    """Made from fields, cloned, serialized, made again, run: on the CPU, since TensorRT only passes addresses."""
    pytest.importorskip("tensorrt_rtx")
    host = PluginHost()
    host.device = torch.device("cpu")
    x = spec("x", "batch", 3)
    call = plugin("aten::nonzero.default", [x], [spec("y", None, 2, dtype=ir.DataType.INT64)], X)
    texts = {"op": call.op, "call": call.call, "host": describe_host(call, (x,)).to_json()}
    built = make_plugin(host, texts, "BUILD")
    assert (built.plugin_name, built.plugin_namespace, built.plugin_version) == ("TorchOp", "trtbridge", "1")
    assert built.num_outputs == 2, "the indices and their number"
    values = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    room, count = torch.full((6, 2), -7, dtype=torch.int64), torch.full((1,), -7, dtype=torch.int32)
    enqueue(built, [values], [room, count])
    assert count == -7, "a builder that times layers runs nothing: its process has no torch"

    copy = built.clone()
    kept = {field.name: bytes(field.data).rstrip(b"\0").decode() for field in copy.get_fields_to_serialize()}
    assert kept == texts
    running = make_plugin(host, kept, "RUNTIME").attach_to_context(None)
    enqueue(running, [values], [room, count])
    assert count == 3
    assert torch.equal(room[:3], values.nonzero())
    assert host.take_failure() is None


def test_exceptions_of_a_plugin_object_are_kept() -> None:
    pytest.importorskip("tensorrt_rtx")
    host = PluginHost()
    host.device = torch.device("cpu")
    x = spec("x", "batch", 3)
    call = plugin("aten::nonzero.default", [x], [spec("y", None, 2, dtype=ir.DataType.INT64)], X)
    texts = {"op": call.op, "call": call.call, "host": describe_host(call, (x,)).to_json()}
    for damaged, words in (
        ({"op": "nowhere::op.default"}, "not registered"),
        ({"call": '{"args":[{"odd":0}],"kwargs":{}}'}, "unknown tag"),
    ):
        running = make_plugin(host, {**texts, **damaged}, "RUNTIME")
        with pytest.raises(PluginError, match=words):
            enqueue(running, [torch.ones(2, 3)], [torch.empty(6, 2, dtype=torch.int64), torch.empty(1)])
        failure = host.take_failure()
        assert isinstance(failure, PluginError)
        assert words in str(failure)
    with pytest.raises(PluginError, match="lacks call, host"):
        make_plugin(host, {"op": "aten::nonzero.default"}, "RUNTIME")
    assert "lacks call, host" in str(host.take_failure())


_IN_THIS_PROCESS = """
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions
from trtbridge.bridge.backends.plugin_nodes import probe_segment
for _ in range(2):
    engine = get_backend("tensorrt_rtx").build(probe_segment(), BuildOptions(isolate=False))
    assert engine.size_bytes > 1000
print("built twice")
"""


@pytest.mark.usefixtures("hosting")
def test_without_a_child_process_the_library_name_is_made_first() -> None:
    """The wheel lacks the name that the parser opens; without it the process ends (SIGABRT)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    environment.pop("LD_LIBRARY_PATH", None)
    command = [sys.executable, "-c", _IN_THIS_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "built twice\n", done.stderr


def test_the_library_name_is_made_only_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, job = tmp_path / "wheel", tmp_path / "job"
    wheel.mkdir()
    job.mkdir()
    name = "libtrtbridge_tests_missing.so"
    (wheel / f"{name}.1").write_bytes(b"")
    monkeypatch.setattr(plugin_library, "_NAME", name)
    monkeypatch.setattr(plugin_library, "_libraries", lambda flavour: wheel)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    assert plugin_library.library_environment(RTX, job) == {"LD_LIBRARY_PATH": f"{job}/lib:/before"}
    assert (job / "lib" / name).resolve() == wheel / f"{name}.1"
    with pytest.raises(BackendError, match=r"no 64-bit ELF library(.|\n)*isolate=True"):
        plugin_library.require_library(RTX)
    (wheel / name).symlink_to(f"{name}.1")
    assert plugin_library.library_environment(RTX, job) == {}
    plugin_library.require_library(RTX)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF libraries and the GNU loader")
def test_an_alias_gives_a_loaded_library_a_second_name() -> None:
    name = "libtrtbridge_tests_alias.so"
    mapped = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so.6" in line)
    with pytest.raises(OSError, match=name):
        ctypes.CDLL(name)
    load_alias(name, Path(mapped))
    library = ctypes.CDLL(name)
    library.cos.restype, library.cos.argtypes = ctypes.c_double, [ctypes.c_double]
    assert library.cos(0.0) == 1.0, "symbols are those of the library that it stands for"
    with pytest.raises(OSError, match="no 64-bit ELF"):
        alias_library(name, "libm.so.6", b"#!/bin/sh\n")


def test_a_parser_without_plugins_says_so() -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt_rtx")
    x = spec("x", "batch", 4)
    words = backend.plugin_refusal(plugin("aten::erfinv.default", [x], [spec("y", "batch", 4)], X), (x,))
    if backend.check(probe_segment(), BuildOptions()):
        assert "takes no plugins inside engines" in words
        assert "its parser says" in words
    else:
        assert words == ""


@pytest.mark.usefixtures("hosting")
def test_what_cannot_stay_inside_says_why() -> None:
    backend = get_backend("tensorrt_rtx")
    x = spec("x", "batch", 4, dtype=ir.DataType.DOUBLE)
    call = plugin("aten::erfinv.default", [x], [spec("y", "batch", 4)], X)
    assert "torch.float64" in backend.plugin_refusal(call, (x,))
    with pytest.raises(PluginError, match=r"torch\.float64"):
        backend.host_spec(call, (x,))


def test_casts_of_the_call_are_done_inside() -> None:
    """A float64 op between float32 layers: the partition leaves its casts to the call."""
    x = spec("x", "batch", 4)
    call = plugin("aten::logsumexp.default", [x], [spec("y", "batch")], X, [1])
    host = describe_host(replace(call, input_dtypes=(ir.DataType.DOUBLE,)), (x,))
    assert (host.inputs[0].dtype, host.inputs[0].cast, host.outputs[0].dtype) == ("FLOAT", "float64", "FLOAT")


def test_onnx_runtime_hosts_none() -> None:
    backend = get_backend("onnxruntime")
    x = spec("x", "batch", 4)
    call = plugin("aten::erfinv.default", [x], [x], X)
    assert backend.plugin_refusal(call, (x,)) == "ONNX Runtime has no torch ops"
    with pytest.raises(PluginError, match="ONNX Runtime has no torch ops"):
        backend.host_spec(call, (x,))


def test_missing_ops_are_all_named() -> None:
    plugins = [{"op": name} for name in ("aten::erfinv.default", "nowhere::one.default", "nowhere::two.default")]
    with pytest.raises(PluginError, match=r"2 plugin ops.*nowhere::one.default, nowhere::two.default"):
        require_ops(plugins)
    with pytest.raises(PluginError, match="nowhere::one"):
        require_ops(plugins[:2])
    require_ops(plugins[:1])


def test_a_segment_without_plugins_is_left_alone() -> None:
    x = spec("x", "batch", 4)
    made = segment([helper.make_node("Relu", ["x"], ["y"])], [x], [spec("y", "batch", 4)])
    assert make_parseable(made.proto) is made.proto
    assert hosted_plugins(made) == []


def test_what_runs_engines_does_without_torchs_compiler() -> None:
    code = (
        "import sys, trtbridge.bridge.backends.tensorrt, trtbridge.plugins.run_hosted\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    before = "import sys, torch\nsys.exit('torch._dynamo' in sys.modules)"
    if subprocess.run([sys.executable, "-c", before]).returncode:
        pytest.skip("this torch imports it by itself")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
