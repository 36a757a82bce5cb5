"""The version of an op changes with its implementation, wherever that stands, and with nothing else."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import trtbridge as tb
from trtbridge.plugins import op_version as module
from trtbridge.plugins.op_version import function_version, op_version

HEAD = "import torch\nimport trtbridge as tb\n"
PLUGIN = "@tb.plugin('versions::op')\ndef op(x: torch.Tensor, k: int = 1) -> torch.Tensor:\n    return {body}\n"

Version = Callable[..., str]


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Version]:
    """Writes modules, imports the one named first, and gives the version of its op."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # Compiled files go by size and second: of two sources of one length within a second, the first would count.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made: set[str] = set()

    folder = re.sub(r"\W", "_", f"{tmp_path.parent.name}_{tmp_path.name}")
    own = f"versions::op_{folder}"  # of this test alone

    def write(op: str = "", **sources: str) -> str:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source.replace("versions::op", own))
            sys.modules.pop(name, None)
        made.update(sources)
        importlib.invalidate_caches()
        importlib.import_module(next(iter(sources)))
        return op_version(op or f"{own}.default")

    yield write
    for name in made:
        sys.modules.pop(name, None)


def _plugin(body: str, above: str = "") -> str:
    return HEAD + above + "\n\n" + PLUGIN.format(body=body)


def test_its_own_source_counts(version: Version) -> None:
    base = version(v_ops=_plugin("x + k"))
    assert version(v_ops=_plugin("x + k")) == base
    assert version(v_ops=_plugin("x + k", "# a comment above\n")) == base
    assert version(v_ops=_plugin("x - k")) != base
    assert version(v_ops=_plugin("x + k").replace("k: int = 1", "k: int = 2")) != base


HELPER = "def helper(x, k):\n    return inner(x) + k\ndef inner(x):\n    return x * {factor}\n"


def test_what_it_calls_counts_in_the_same_file_and_in_others(version: Version) -> None:
    own = [version(v_ops=_plugin("helper(x, k)", HELPER.format(factor=factor))) for factor in (2, 3)]
    unused = version(v_ops=_plugin("x + k", HELPER.format(factor=2)))
    assert unused == version(v_ops=_plugin("x + k", HELPER.format(factor=3))), "what it does not call does not count"
    by_name = [
        version(v_ops=_plugin("helper(x, k)", "from v_help import helper\n"), v_help=HELPER.format(factor=factor))
        for factor in (2, 3)
    ]
    by_module = [
        version(v_ops=_plugin("v_mod.helper(x, k)", "import v_mod\n"), v_mod=HELPER.format(factor=factor))
        for factor in (2, 3)
    ]
    late = "__import__('v_late'); import v_late"
    lazily = [
        version(
            v_ops=HEAD + PLUGIN.format(body="x + k").replace("    return", f"    {late}\n    return"),
            v_late=HELPER.format(factor=factor),
        )
        for factor in (2, 3)
    ]
    # Same module name, other content: Python may hold the old module, but its file is looked at.
    assert len({*own, *lazily}) == 4
    assert own[0] != own[1]
    assert lazily[0] != lazily[1]
    assert len({unused, *own}) == 3
    assert by_name[0] != by_name[1]
    assert by_module[0] != by_module[1]


def test_constants_and_closures_count(version: Version) -> None:
    blocks = [version(v_ops=_plugin("x + BLOCK", f"BLOCK = {size}\n")) for size in (64, 128)]
    sets = [version(v_ops=_plugin("x + len(KINDS)", f"KINDS = {kinds}\n")) for kinds in ('{"a", "b"}', '{"b", "a"}')]
    assert blocks[0] != blocks[1]
    assert sets[0] == sets[1]

    def make(k: int) -> Callable[[int], int]:
        return lambda x: x + k

    assert function_version(make(1)) == function_version(make(1))
    assert function_version(make(1)) != function_version(make(2))


def test_modules_that_name_one_another_end(version: Version) -> None:
    sources = {"v_a": "import v_b\ndef f(x):\n    return v_b.v_a.f(x)\n", "v_b": "import v_a\n"}
    assert version(v_ops=_plugin("v_a.f(x)", "import v_a\n"), **sources) == version(
        v_ops=_plugin("v_a.f(x)", "import v_a\n"), **sources
    )


TRITON = """
import triton
import triton.language as tl

@triton.jit
def inner(x):
    return x * {factor}

@triton.jit
def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, inner(tl.load(x_ptr + at, mask=at < n)), mask=at < n)
"""


def test_triton_kernels_count_with_what_they_call(version: Version) -> None:
    pytest.importorskip("triton")
    body = "kernel[(1,)](x, x, x.numel(), BLOCK=64)"
    found = [version(v_ops=_plugin(body, TRITON.format(factor=factor))) for factor in (2, 3)]
    assert found[0] != found[1]


JIT = """
class Jit:
    def __init__(self, fn, configs):
        self.fn, self.configs = fn, configs

def scale(x):
    return x * {factor}

def body(x):
    return scale(x)

kernel = Jit(Jit(body, None), ["BLOCK: {block}"])
"""


def test_what_is_like_tritons_kernels_counts_with_its_configurations(version: Version) -> None:
    sources = [JIT.format(factor=factor, block=block) for factor, block in ((2, 8), (3, 8), (2, 9))]
    found = {version(v_ops=_plugin("kernel.fn.fn(x)", source)) for source in sources}
    assert len(found) == 3


LIBRARY = """
import torch
library = torch.library.Library("versions_lib", "FRAGMENT")
library.define("op(Tensor x) -> Tensor")
def run(x):
    return x + {number}
torch.library.impl(library, "op", "CPU")(run)
"""


def test_ops_of_a_library_count_by_their_file(tmp_path: Path) -> None:
    def version(number: int) -> str:
        (tmp_path / "v_lib.py").write_text(LIBRARY.format(number=number))
        script = "import v_lib; from trtbridge.plugins.op_version import op_version as v; print(v('versions_lib::op'))"
        command = [sys.executable, "-c", script]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first = version(1)
    assert len(first.strip()) == 64
    assert version(1) == first
    assert version(2) != first


def test_a_kernel_and_a_fake_registered_later_count(version: Version) -> None:
    op = "import torch\n@torch.library.custom_op('versions::two', mutates_args=())\n"
    op += "def two(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\n"
    more = (
        "@two.register_kernel('cuda')\ndef _(x):\n    return x + {n}\n@two.register_fake\ndef _(x):\n    return {f}\n"
    )
    found = {
        version("versions::two.default", v_two=op + more.format(n=n, f=f))
        for n, f in ((1, "x"), (2, "x"), (1, "torch.empty_like(x)"))
    }
    assert len(found) == 3


def test_functions_without_a_source_count_by_their_code() -> None:
    def make(body: str) -> Callable[..., int]:
        namespace: dict[str, Callable[..., int]] = {}
        exec(f"def f(x):\n    return [y for y in x if y in {{1, 2, {body}}}]", namespace)
        return namespace["f"]

    assert function_version(make("3")) == function_version(make("3"))
    assert function_version(make("3")) != function_version(make("4"))


def test_torchs_own_ops_and_those_that_ship_have_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "aten::cummax.default",
        "python::torch.cov",
        "trtbridge::onnx_node.default",
        "trtbridge::batched_nms.default",
    ]
    versions = {name: op_version(name) for name in names}
    assert len({*versions.values()}) == len(names)
    monkeypatch.setattr(module.torch, "__version__", "99.0")
    assert all(op_version(name) != versions[name] for name in names)


def test_code_of_other_projects_counts_by_its_release(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _plugin("torch.tensor(np.asarray(onnx.helper.printable_type))", "import onnx\nimport numpy as np\n")
    base = version(v_ops=source)
    real = module.importlib.metadata.version
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "99" if name == "onnx" else real(name))
    assert version(v_ops=source) != base


def test_ops_that_are_no_python_count_by_release_or_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "ops.so"
    library.write_bytes(b"one")
    monkeypatch.setattr(module.torch.ops, "loaded_libraries", {str(library)})
    first = module._compiled("nobody_has_this_name")
    library.write_bytes(b"two")
    assert module._compiled("nobody_has_this_name") != first
    assert module._compiled("onnx") == [f"onnx {importlib.metadata.version('onnx')}"]


def test_an_op_that_is_not_registered_is_an_error() -> None:
    with pytest.raises(tb.PluginError, match="not registered"):
        op_version("versions::never.default")
