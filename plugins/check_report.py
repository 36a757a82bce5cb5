"""What `check` found out about a plugin op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "note", "warning", "error", "not run"]
"""``error``: the op is wrong, or unusable as a plugin. ``warning``: it works, but not everywhere or not as well as it
could. ``note``: worth knowing. ``not run``: this machine lacks what the check needs."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: which: "name", "schema", "run", "fake", "dynamic shapes", "edge sizes", "dtypes", "strides", "repeat",
            "cuda against cpu", "stream", "cuda graph", or "backend NAME".
        severity: how bad.
        what: what was seen.
        todo: what to do about it; "" where nothing is to be done.
    """

    check: str
    severity: Severity
    what: str
    todo: str = ""

    def __str__(self) -> str:
        lines = [f"{self.severity:8}{self.check}: {self.what}"]
        if self.todo:
            lines.append(f"to do: {self.todo}")
        return "\n".join(lines).replace("\n", "\n        ")


@dataclass(frozen=True)
class CheckReport:
    """All that `check` found.

    Attributes:
        op: full name, ``namespace::name.overload``.
        schema: arguments and results as torch has them; "" for an op that is not registered.
        samples: how many sample calls were used.
        findings: in the order of the checks.
    """

    op: str
    schema: str
    samples: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; warnings and checks that could not run do not count."""
        return not self.of("error")

    def of(self, *severities: Severity) -> tuple[Finding, ...]:
        """The findings of some severities."""
        return tuple(finding for finding in self.findings if finding.severity in severities)

    def __str__(self) -> str:
        counts = {severity: len(self.of(severity)) for severity in ("error", "warning", "not run")}
        summary = ", ".join(
            (f"{count} {name}" if name == "not run" else f"{count} {name}{'s' * (count != 1)}")
            for name, count in counts.items()
            if count
        )
        head = self.schema or self.op
        tail = ("ok" if self.ok else "wrong") + (f" ({summary})" if summary else "")
        return "\n".join([head, *(f"  {line}" for f in self.findings for line in str(f).splitlines()), tail])
