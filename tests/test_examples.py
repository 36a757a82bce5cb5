"""examples/ that need packages that CI does not install: pip install -e '.[examples]' -c constraints.txt"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_ray_data() -> None:
    pytest.importorskip("ray")
    command = [sys.executable, str(EXAMPLES / "ray_data_inference.py"), "--backend", "onnxruntime"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1797 digits read by 2 actors" in done.stdout
    assert "the same as the original reads: True" in done.stdout
