"""The type check holds code to four versions of TensorRT's API: planted mistakes are found, for the right versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "typecheck.py"
NO_INDEX = 3  # typecheck.py's exit status when pip cannot download the bindings

# Written the way that scripts/typecheck.py asks for.
HEAD = """\
from __future__ import annotations
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt
    RTX: bool

class Api:
    name: str
"""

MODULE = """\
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = importlib.import_module(self.name)
"""

RIGHT = (
    HEAD
    + """\
    def build(self, model: bytes, weights: dict[str, int]) -> bytes | None:
"""
    + MODULE
    + """\
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        for name, address in weights.items():
            parser.load_initializer(name, address, 4)
        if not parser.load_model_proto(model) or not parser.parse_model_proto():
            for index in range(parser.num_errors):
                print(parser.get_error(index).desc().upper())
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
        config.builder_optimization_level = 3
        config.progress_monitor = self.monitor()
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 3), opt=(2, 3), max=[4, 3])
        config.add_optimization_profile(profile)
        self.target(config)
        plan = builder.build_serialized_network(network, config)
        return None if plan is None else bytes(plan)

    def target(self, config: trt.IBuilderConfig) -> None:
        if TYPE_CHECKING and not RTX:
            return
"""
    + MODULE
    + """\
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)

    def monitor(self) -> trt.IProgressMonitor:
"""
    + MODULE
    + """\
        class Monitor(trt.IProgressMonitor):
            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
            def step_complete(self, phase_name: str, step: int) -> bool:
                return True
            def phase_finish(self, phase_name: str) -> None: ...

        return Monitor()

    def plugin(self) -> trt.IPluginV3:
"""
    + MODULE
    + """\
        class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            def __init__(self) -> None:
                trt.IPluginV3.__init__(self)
                trt.IPluginV3OneCore.__init__(self)
                trt.IPluginV3OneBuild.__init__(self)
                trt.IPluginV3OneRuntime.__init__(self)
                self.plugin_name = "op"
                self.num_outputs = 1

            def get_capability_interface(self, type: trt.PluginCapabilityType) -> Plugin:
                return self

            def clone(self) -> Plugin:
                return Plugin()

        return Plugin()

    def shape(self, engine: trt.ICudaEngine, stream: int) -> tuple[int, ...]:
"""
    + MODULE
    + """\
        context = engine.create_execution_context()
        context.set_input_shape("x", (1, 3))
        context.execute_async_v3(stream_handle=stream)
        kinds = {trt.DataType.HALF: 2, trt.float32: 4}
        kinds[engine.get_tensor_dtype("x")] += 1
        return tuple(engine.get_tensor_shape("x"))
"""
)

PLANTED = {
    # name: (a method's body, the versions that must refuse it)
    "removed_in_11": ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", {"11.4", "RTX 1.6", "RTX 1.7"}),
    "not_in_rtx": ("network.add_plugin_v3([], [], plugin)", {"RTX 1.6", "RTX 1.7"}),
    "rtx_only_class": ("trt.ComputeCapability.CURRENT", {"10.16", "11.4"}),
    "rtx_1_7_only": ("engine.unload_weights()", {"10.16", "11.4", "RTX 1.6"}),
    "no_such_module_name": ("trt.Bilder", "all"),
    "no_such_method": ("context.execute_async_v4(0)", "all"),
    "no_such_member": ("trt.DataType.FLOAT128", "all"),
    "wrong_keyword": ("context.execute_async_v3(stream=0)", "all"),
    "wrong_type": ("config.set_flag(trt.DataType.HALF)", "all"),
    "float_for_int": ("config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1e9)", "all"),
    "missing_argument": ("config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)", "all"),
    "too_many_arguments": ("engine.get_tensor_name(0, 1)", "all"),
    "unknown_property": ("config.optimisation_level = 3", "all"),
    "read_only_property": ("engine.num_io_tensors = 3", "all"),
    "under_a_constant": ("if RTX:\n            network.add_plugin_v3([], [], plugin)", {"RTX 1.6", "RTX 1.7"}),
    "under_its_negation": ("if not RTX:\n            trt.ComputeCapability", {"10.16", "11.4"}),
    "hidden_in_a_variable": ("hidden = trt\n        hidden.Nope", "all"),
    "hidden_in_a_call": ("getattr(trt, 'Nope')", "all"),
    "hidden_in_a_parameter": ("def helper(trt: object) -> None: ...", "all"),
}

VERSIONS = {
    "10.16": "TensorRT 10.16",
    "11.4": "TensorRT 11.4",
    "RTX 1.6": "TensorRT-RTX 1.6",
    "RTX 1.7": "TensorRT-RTX 1.7",
}

SIGNATURE = """\
    def method(
        self,
        network: trt.INetworkDefinition,
        config: trt.IBuilderConfig,
        engine: trt.ICudaEngine,
        context: trt.IExecutionContext,
        plugin: trt.IPluginV3,
    ) -> None:
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mypy's, empty at first: what both tests read of Python's and TensorRT's stubs is read once."""
    return tmp_path_factory.mktemp("typecheck")


def _check(root: Path, cache: Path, files: dict[str, str]) -> tuple[int, list[str]]:
    root.mkdir()
    (root / "__init__.py").touch()
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    command = [sys.executable, str(SCRIPT), "--root", str(root), "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == NO_INDEX:
        pytest.skip(f"pip reaches no index with TensorRT's bindings: {done.stderr.splitlines()[0]}")
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if ": error: " in line]


def test_typecheck_right_code_passes_in_all_versions(tmp_path: Path, cache: Path) -> None:
    """Code for both flavours, with version-specific parts under constants, has no errors."""
    status, errors = _check(tmp_path / "package", cache, {"right": RIGHT})
    assert errors == []
    assert status == 0


def test_typecheck_planted_mistakes_fail_for_the_versions_that_lack_the_name(tmp_path: Path, cache: Path) -> None:
    """Each planted mistake is an error in its own file, for exactly the versions that it should be one for."""
    status, errors = _check(
        tmp_path / "package",
        cache,
        {name: HEAD + SIGNATURE + MODULE + "        " + body for name, (body, _) in PLANTED.items()},
    )
    assert status == 1
    for name, (body, versions) in PLANTED.items():
        mine = [line for line in errors if line.startswith(f"{name}.py:")]
        wanted = set(VERSIONS) if versions == "all" else set(versions)
        found = {
            short
            for line in mine
            for short, label in VERSIONS.items()
            if line.endswith("[all sets]") or label in line.rpartition("  [")[2].rstrip("]").split(", ")
        }
        assert found == wanted, f"{name}: {body!r} should fail for {sorted(wanted)}; the errors were {mine}"
