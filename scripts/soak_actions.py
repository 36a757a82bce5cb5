"""What scripts/soak.py does with modules: the state that all threads share, and the actions that must go well."""

from __future__ import annotations

import copy
import dataclasses
import gc
import resource
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.plugins import torch_note

MOST_BATCH = 64
FAILING_BATCH = 3
"""A batch of this size makes the plugin `moody` fail."""
MOST_MODULES = 6
_BATCH = tb.Dim("batch", min=1, opt=4, max=MOST_BATCH)
_TOLERANCE = 2e-3

Action = Callable[["Soak", Random], str]
"""Does something and tells how it ended. Raises `WrongError` for a wrong result; any other error is unexpected."""


class WrongError(Exception):
    """A result that is not eager's."""


@torch.library.custom_op("trtbridge_soak::moody", mutates_args=())
def moody(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == FAILING_BATCH:
        raise ValueError("moody does not like this batch")
    return x * 1.5


moody.register_fake(torch.empty_like)


class Net(nn.Module):
    """Engines with two plugins between them, two inputs, two results in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.middle = nn.Linear(64, 64)
        self.last = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        values = torch.cummax(F.gelu(self.first(x)) * scale, 1).values
        values = torch.ops.trtbridge_soak.moody(self.middle(values))
        return {"scores": self.last(values), "sum": values.sum(1)}


def _patiently(net: Net, given: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Eager's results; torch before 2.13 has calls of `moody` fail where two threads make some."""
    return torch_note.patiently(lambda: net(*given))


@dataclass
class Entry:
    """A module that threads share.

    Attributes:
        module: called by any thread.
        weights: which ones it has now ("a" or "b").
        refits: begun so far; odd while one is under way.
    """

    module: Any
    weights: str = "a"
    refits: int = 0


@dataclass
class Soak:
    """All that threads share.

    Args:
        work: an empty folder.
        seed: of everything random.
    """

    work: Path
    seed: int
    calls: int = 0
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        cuda = on_cuda()
        self.backend = "tensorrt_rtx" if cuda else "onnxruntime"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if cuda:
            torch.backends.cuda.matmul.allow_tf32 = False
        torch.manual_seed(self.seed)
        self.eager = {name: Net().eval().to(self.device) for name in ("a", "b")}
        self.cache = self.work / "cache"
        self.lock = threading.Lock()
        # torch.export changes the module that it traces, and torch.nn.Module itself: eager calls wait meanwhile. Calls
        # of engines do not.
        self.tracing = threading.Lock()
        names = {option.name for option in dataclasses.fields(tb.Options)}
        self.has_cache = "cache" in names
        self.has_refit = hasattr(tb.EngineModule, "refit") and "refittable" in names
        if not self.has_cache:
            self.notes.append("no damaged engine cache: convert() has no option cache")
        if not self.has_refit:
            self.notes.append("no refits: convert() has no option refittable, or EngineModule no refit")
        first = self.convert(**({"refittable": True} if self.has_refit else {}))
        self.file = self.work / "first.trtb"
        """A program with the weights "a", which is never changed."""
        tb.save(first, self.file)
        self.shared = self.work / "shared.trtb"
        """Saved and loaded by all threads at once."""
        tb.save(first, self.shared)
        self.known = {self.file.name, self.shared.name, self.cache.name}
        self.pool = [Entry(first)]

    def convert(self, **options: Any) -> Any:
        """The network with the weights "a", converted."""
        with self.tracing:
            return tb.convert(
                self.eager["a"], self.arguments(4, Random(0)),
                dynamic_shapes={"x": {0: _BATCH}, "scale": {0: _BATCH}}, backend=self.backend, plugin_host="segments",
                cache_dir=self.cache, **options,
            )  # fmt: skip

    def describe(self) -> str:
        """What is soaked."""
        steps = self.pool[0].module.program
        return f"{self.backend} on {self.device}, {len(steps.engines)} engines, {len(steps.plugin_calls)} plugins"

    def arguments(self, batch: int, pick: Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Random inputs."""
        generator = torch.Generator().manual_seed(pick.getrandbits(40))
        x = torch.randn(batch, 16, generator=generator)
        return x.to(self.device), (0.5 + torch.rand(batch, 1, generator=generator)).to(self.device)

    def batch(self, pick: Random) -> int:
        """A batch size that works; small ones more often."""
        size = pick.choice([1, 2, 4, 5, pick.randint(1, MOST_BATCH)])
        return size + 1 if size == FAILING_BATCH else size

    def runtime_options(self, pick: Random) -> dict[str, Any]:
        """Options of a load, by chance."""
        options: dict[str, Any] = {"max_contexts": pick.choice([1, 2, 8]), "share_workspace": pick.random() < 0.7}
        if self.device.type == "cuda":
            options |= {"cuda_graphs": pick.choice([False, True, True, "auto"]), "max_graphs": pick.choice([2, 16])}
            options["parallel_replays"] = pick.choice(["auto", 1, 3])
        return options

    def load(self, path: Path, pick: Random) -> Any:
        """A file, with options by chance."""
        return tb.load(path, self.device, cache_dir=self.cache, **self.runtime_options(pick))

    def entry(self, pick: Random) -> Entry:
        """Any module of those that are shared."""
        with self.lock:
            return pick.choice(self.pool)

    def add(self, entry: Entry, pick: Random) -> None:
        """Share one more module, in place of another where there are many."""
        with self.lock:
            if len(self.pool) >= MOST_MODULES:
                self.pool.pop(pick.randrange(len(self.pool)))
            self.pool.append(entry)

    def note(self, name: str, outcome: str) -> None:
        """Count how something ended."""
        with self.lock:
            self.tally[name, outcome] += 1

    def check(self, module: Any, pick: Random, weights: str = "a", batch: int | None = None) -> None:
        """A good call of a module that nobody refits.

        Raises:
            WrongError: the result is not eager's.
        """
        given = self.arguments(batch or self.batch(pick), pick)
        with self._stream(pick):
            self.compare(module(*given), given, (weights,))

    def check_shared(self, entry: Entry, pick: Random) -> None:
        """A good call of a module that others may refit at the same time: it has the weights of before or of after."""
        given = self.arguments(self.batch(pick), pick)
        with self._stream(pick):
            before, weights = entry.refits, entry.weights
            result = entry.module(*given)
            quiet = before % 2 == 0 and entry.refits == before
            self.compare(result, given, (weights,) if quiet else ("a", "b"))

    def compare(self, result: Any, given: tuple[torch.Tensor, ...], weights: tuple[str, ...]) -> None:
        """Hold a result against eager's with one of these weights.

        Raises:
            WrongError: it is of none of them.
        """
        with self.lock:
            self.calls += 1
        errors = []
        for name in weights:
            with self.tracing, torch.no_grad():
                expected = _patiently(self.eager[name], given)
            if set(result) == set(expected) and all(result[k].shape == expected[k].shape for k in expected):
                error = max(
                    float((result[k] - v).abs().max() / v.abs().max().clamp(min=1)) for k, v in expected.items()
                )
                if error <= _TOLERANCE:  # not true of NaN
                    return
                errors.append(f"{error:.3g}")
            else:
                errors.append("another structure or shape")
        raise WrongError(f"batch {given[0].shape[0]}: off by {', '.join(errors)} from weights {', '.join(weights)}")

    def _stream(self, pick: Random) -> Any:
        if self.device.type != "cuda" or pick.random() < 0.5:
            return nullcontext()
        return _FreshStream(self.device)


class _FreshStream:
    """A stream of its own for a while, in order with what comes before and after."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._caller = torch.cuda.current_stream(device)
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._stream.wait_stream(self._caller)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stream.synchronize()
        self._context.__exit__(*error)


def on_cuda() -> bool:
    """Whether there is a GPU and TensorRT-RTX for it."""
    from trtbridge.bridge.backends import all_statuses

    return torch.cuda.is_available() and any(s.name == "tensorrt_rtx" and s.can_run for s in all_statuses())


def living() -> int:
    """How many modules there are in this process."""
    return sum(type(value) is tb.EngineModule for value in gc.get_objects())


def memory() -> dict[str, int]:
    """Bytes in use, with what only the garbage collector would free: modules must not need it."""
    found = {"RSS": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["RSS"] = int(statm.read_text().split()[1]) * resource.getpagesize()
    if torch.cuda.is_available():
        # Not waited for: torch.cuda.synchronize fails, and spoils the capture, while another thread captures a graph.
        free, total = torch.cuda.mem_get_info()
        found |= {"CUDA tensors": torch.cuda.memory_allocated(), "CUDA device": total - free}
    return found


def forget_workspaces() -> None:
    """Free what torch's cuBLAS keeps for eager's products: 32 MiB for each thread on each of torch's 32 streams."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()


# What must go well


def call(soak: Soak, pick: Random) -> str:
    entry = soak.entry(pick)
    for _ in range(pick.randint(1, 20)):
        soak.check_shared(entry, pick)
    return "right"


def call_bound(soak: Soak, pick: Random) -> str:
    module = soak.load(soak.file, pick)
    given = soak.arguments(soak.batch(pick), pick)
    bound = module.bind(*given)
    for _ in range(4):
        for target, source in zip(given, soak.arguments(given[0].shape[0], pick), strict=True):
            target.copy_(source)
        soak.compare(bound(), given, ("a",))
    soak.check(module, pick)
    return "right"


def keep_results(soak: Soak, pick: Random) -> str:
    """Results are fresh: later calls leave them alone."""
    module = copy.deepcopy(soak.load(soak.file, pick))
    kept = []
    for _ in range(6):
        given = soak.arguments(soak.batch(pick), pick)
        kept.append((given, module(*given)))
    for given, result in kept:
        soak.compare(result, given, ("a",))
    return "right"


def save_and_load(soak: Soak, pick: Random) -> str:
    path = soak.work / f"own-{threading.get_ident()}.trtb"
    module = soak.load(soak.file, pick)
    tb.save(module, path)
    again = soak.load(path, pick)
    path.unlink()
    soak.check(again, pick)
    soak.add(Entry(again), pick)
    return "right"


def save_over_another(soak: Soak, pick: Random) -> str:
    """Several threads write one file while others read it: it is whole at any time."""
    if pick.random() < 0.5:
        tb.save(soak.load(soak.file, pick), soak.shared)
    soak.check(soak.load(soak.shared, pick), pick)
    return "right"


def refit(soak: Soak, pick: Random) -> str:
    if not soak.has_refit:
        return "left out"
    entry = soak.entry(pick)
    with soak.lock:
        if entry.refits % 2:
            return "another is under way"
        entry.refits += 1
    try:
        weights = pick.choice("ab")
        entry.module.refit(soak.eager[weights].state_dict())
        entry.weights = weights
    finally:
        entry.refits += 1
    soak.check_shared(entry, pick)
    return "right"


ACTIONS: tuple[tuple[float, Action], ...] = (
    (20, call), (3, call_bound), (2, keep_results), (2, save_and_load), (2, save_over_another), (2, refit),
)  # fmt: skip
"""With how often each is done."""
