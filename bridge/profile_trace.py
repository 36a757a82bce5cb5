"""A profile as a Chrome trace: the JSON that chrome://tracing and Perfetto read.

The format is Google's "Trace Event Format": an object with ``traceEvents``. A span is an event of phase X with ``ts``
and ``dur`` in microseconds; spans of one thread lie within one another; names of processes and threads are events of
phase M.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelFileError
from .atomic import write_atomically

if TYPE_CHECKING:
    from .profile_report import ProfileReport

_PROCESS, _THREAD = 1, 1


def write_trace(report: ProfileReport, path: str | os.PathLike[str]) -> None:
    """Write the spans of a report; see `ProfileReport.to_chrome_trace`.

    Raises:
        ModelFileError: the file cannot be written.
    """
    text = json.dumps(make_trace(report))
    try:
        write_atomically(Path(path), lambda file: file.write(text.encode()))
    except OSError as error:
        raise ModelFileError(f"Cannot write {path}: {error}.") from error


def make_trace(report: ProfileReport) -> dict[str, Any]:
    """The trace of a report, ready for JSON."""
    place = {"pid": _PROCESS, "tid": _THREAD}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", **place, "args": {"name": f"trtbridge: {report.source or 'program'}"}},
        {"name": "thread_name", "ph": "M", **place, "args": {"name": f"{report.backend} on {report.device}"}},
    ]
    for span in report.spans:
        times = {"ts": round(span.start_us, 3), "dur": round(span.duration_us, 3)}
        events.append(
            {"name": span.name, "cat": span.category, "ph": "X", **times, **place, "args": dict(span.details)}
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "source": report.source,
            "backend": report.backend,
            "device": report.device,
            "inputs": report.inputs,
            "call_ms": f"{report.call_ms:.4f}",
        },
    }
