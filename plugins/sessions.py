"""Options of ONNX Runtime's sessions, which share the cores of a CPU with torch.

The threads of a session wait for work by spinning. So do OpenMP's, which are torch's, and where both spin on the same
cores what the one waits for gets none: a torch op between two runs then takes time slices of the system (some 8 ms on
two cores) instead of microseconds. docs/bench-cpu.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch

_LOG_FATAL_ONLY = 4  # errors arrive as exceptions


def session_options(ort: Any) -> Any:
    """Options of a session that stops spinning when it has run; of one thread where torch has one.

    Args:
        ort: the module onnxruntime.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    options.intra_op_num_threads = 1 if torch.get_num_threads() == 1 else 0  # 0: all cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def never_spin(options: Any) -> None:
    """Let a session not even spin while it runs: OpenMP's threads spin on for a while after a torch op ahead of it.

    Small models alone are a fifth slower so; where torch and sessions take turns it is what keeps times even.
    """
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
