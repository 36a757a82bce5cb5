"""What convert(cache=True) adds to a conversion: engines and what is refused come from disk, and go there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import PluginError
from . import engine_cache, learned
from .cache import resolve_cache_dir
from .engine_cache import EngineCache
from .learned import LearnedFile, learned_key
from .options import Options
from .planner import Planner


@dataclass
class ConversionCache:
    """The cache of one conversion.

    Attributes:
        engines: where engines are looked up and kept.
        file: what is known of the model; None where it has no key.
    """

    engines: EngineCache
    file: LearnedFile | None = None

    @classmethod
    def begin(cls, planner: Planner, options: Options) -> ConversionCache | None:
        """Give a planner the cache, and what is known of its model; None where there is no folder to keep it in."""
        folder = resolve_cache_dir(options.cache_dir)
        if folder is None:
            engine_cache.logger.warning("cache=True has no effect: the default cache folder cannot be written")
            return None
        source = planner.source
        name = getattr(source, "name", "") or getattr(source, "source", "")
        engines = EngineCache(folder / engine_cache.FOLDER, options.cache_size_bytes, str(name))
        cache = cls(engines)
        planner.cache = engines
        try:
            key = learned_key(source, planner.backend, options, engines.digests)
        except PluginError as error:
            engines.report.note(f"What is refused of this model is not kept: {error}")
            return cache
        if key is not None:
            cache.file = LearnedFile(folder / learned.FOLDER, key)
            known = cache.file.read(engines.report)
            engines.report.learned = bool(known)
            planner.recall(known)
        return cache

    def end(self, planner: Planner) -> dict[str, Any]:
        """Keep what the planner has learned; what the cache did, for ``program.info["cache"]``."""
        if self.file is not None and planner.learned:
            self.file.write(planner.learned, self.engines.report)
        return self.engines.report.to_json()
