"""Engines in a process group: two processes under torchrun, on the CPU, over gloo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import trtbridge as tb

ROOT = Path(__file__).parent.parent.parent


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).parent / "ends_its_group.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_results_are_gathered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4).eval()
    shapes = {"input": {0: tb.Dim("batch", min=1, opt=3, max=8)}}
    tb.save(tb.convert(model, (torch.randn(3, 8),), dynamic_shapes=shapes, backend="onnxruntime"), tmp_path / "m.trtb")
    script = Path(__file__).parent / "process_group.py"
    output = torchrun(str(script), str(tmp_path / "m.trtb"), str(tmp_path / "found.pt"))
    # An engine has no parameters, so there is nothing that DistributedDataParallel could keep in step.
    assert "doesn't have any parameter that requires a gradient" in output
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        expected = model(found["data"])
    torch.testing.assert_close(found["merged"], expected)
    # The mean over both processes of the gradient of each one's sum.
    torch.testing.assert_close(found["grad"], expected.sum(dim=0).expand(2, 4) / 2)


def test_the_example_runs() -> None:
    script = str(ROOT / "examples" / "torchrun_throughput.py")
    output = torchrun(script, "--backend", "onnxruntime", "--batches", "5", "--batch-size", "4", "--width", "8")
    assert "2 process(es) on cpu, onnxruntime" in output
    assert re.search(r"one process alone: \d+ images/s; all at once: \d+ images/s, [\d.]+ times one", output)
    difference = re.search(r"largest difference from the original: (\S+)", output)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    last = json.loads(output.splitlines()[-1])
    assert last["processes"] == 2
    assert last["throughput"] > 0
