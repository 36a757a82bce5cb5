"""Runs a script as if it were called itself, and fails where its process group is still there when it has ended.

    torchrun ... tests/bridge/ends_its_group.py SCRIPT [ARGUMENT ...]

A group that something holds on to keeps the threads of gloo. One of them may then give up a tensor when Python is gone
already, which aborts the process: seldom, and with nothing but "terminate called without an active exception".
"""

import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo" in name]
if left:
    sys.exit(f"{sys.argv[0]}: the process group was destroyed and something still holds it; its threads: {left}")
