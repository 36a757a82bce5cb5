"""What a conversion spends its time on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .backends.base import Progress

logger = logging.getLogger(__name__)


@dataclass
class Stages:
    """Seconds spent in each stage, in order; a stage that runs again adds to its seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and announce it."""
        if self.progress is not None:
            self.progress(name, 0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)
        logger.info("%s took %.2f s", name, spent)
        if self.progress is not None:
            self.progress(name, 1.0)
