"""trtbridge plugins: what it lists, what it says of an op, and the exit status."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from trtbridge.bridge.cli import app
from trtbridge.plugins.shipped import SHIPPED

OPS = """
import torch
import trtbridge as tb


@tb.plugin("cli_plugin_tests::{name}")
def {name}(x: torch.Tensor, gain: float{default}) -> torch.Tensor:
    '''x times a gain. More.'''
    return x * gain
{extra}
"""


def ops(folder: Path, name: str, default: str = "", extra: str = "") -> str:
    path = folder / f"{name}_ops.py"
    path.write_text(OPS.format(name=name, default=default, extra=extra))
    return str(path)


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["plugins", *arguments])


def test_list(tmp_path: Path) -> None:
    result = invoke("list", "--import", ops(tmp_path, "listed"))
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert set(SHIPPED) <= set(lines)
    assert re.search(r"cpu, cuda +listed_ops.py:\d+ +x times a gain$", lines["cli_plugin_tests::listed"].rstrip())
    for name in SHIPPED:
        assert re.search(r"cpu.* trtbridge +\w.*\w", lines[name]), "each has a description"
    namespaces = {name.partition("::")[0] for name in lines if "::" in name}
    assert not namespaces & {"aten", "prims", "quantized", "c10d", "mkldnn"}


def test_check_with_samples_from_text(tmp_path: Path) -> None:
    place = ops(tmp_path, "texts")
    command = ("check", "cli_plugin_tests::texts", "--import", place, "--backend", "onnxruntime")
    result = invoke(*command, "--sample", "float32[3,4] 0.5", "--sample", "float16[2,7] gain=2.0")
    assert result.exit_code == 0, result.output
    assert "ok      run (cpu): 2 sample calls on cpu" in result.stdout
    assert "ok      backend onnxruntime" in result.stdout
    assert "tensorrt" not in result.stdout
    missing = invoke(*command)
    assert missing.exit_code == 1
    assert "'gain' (float), for which no value can be made up" in missing.output
    bad = invoke(*command, "--sample", "float32[3")
    assert bad.exit_code == 1
    assert "not closed" in bad.output


@pytest.mark.parametrize("form", ["[(torch.ones(3), 2.0)]", "{{'cli_plugin_tests::{name}': [(torch.ones(3), 2.0)]}}"])
def test_check_with_samples_of_the_module(tmp_path: Path, form: str) -> None:
    name = "listing" if form.startswith("[") else "dicts"
    extra = f"def samples():\n    return {form.format(name=name)}"
    place = ops(tmp_path, name, extra=extra)
    result = invoke("check", f"cli_plugin_tests::{name}", "--import", place, "-b", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert "1 sample call on cpu" in result.stdout
    assert "made up" not in result.stdout


def test_samples_that_fail(tmp_path: Path) -> None:
    place = ops(tmp_path, "failing", extra="def samples():\n    raise ValueError('no samples today')")
    result = invoke("check", "cli_plugin_tests::failing", "--import", place)
    assert result.exit_code == 1
    assert "samples() of failing_ops failed: ValueError: no samples today" in result.output


def test_an_op_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "wrong_ops.py"
    path.write_text(
        "import torch, trtbridge as tb\n"
        "@tb.plugin('cli_plugin_tests::wrong', fake=lambda x: x.new_empty(1))\n"
        "def wrong(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\n"
    )
    result = invoke("check", "cli_plugin_tests::wrong", "--import", str(path))
    assert result.exit_code == 1
    assert re.search(r"error +fake \(cpu\): output 0 has shape", result.stdout)
    assert result.stdout.rstrip().endswith("wrong (1 error, 1 not run)")


def test_ops_and_modules_that_are_not_there() -> None:
    result = invoke("check", "cli_plugin_tests::absent")
    assert result.exit_code == 1
    assert "not registered" in result.stdout
    result = invoke("list", "--import", "no_such_module_at_all")
    assert result.exit_code == 1
    assert "no module 'no_such_module_at_all'" in result.output


def test_help_starts_without_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom trtbridge.bridge.cli import app\n"
        "r = CliRunner().invoke(app, ['plugins', 'check', '-h'])\n"
        "print(r.output)\nsys.exit('torch' in sys.modules or r.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--sample" in done.stdout
