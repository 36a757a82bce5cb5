"""Sets of CUDA graphs of one module: replays that are given to different streams may run at once, each in its own set.

One graph cannot run twice at once: a replay writes to the graph's own memory. With one set, calls of several threads
are right and take turns on the device, which small inputs leave mostly idle. Each further set has graphs, contexts and
scratch memory of its own; weights are shared by all. Unless a number of sets is asked for there are further ones only
where streams take turns again and again, which one that warms a module up does not, and half of the device's memory is
free.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from .cuda_graphs import GraphCache

_MOST_STREAMS = 1024  # whose set is remembered
_AUTO_SETS = 4  # eight threads get in each other's way on two (docs/runtime.md)
_AUTO_TURNS = 8  # calls right after one of another stream, before a stream has a set for good


class GraphSets:
    """The graphs of one module.

    Args:
        make: makes a set; told whether it may find by measuring that plain calls are faster, which the first one alone
            does: later ones would measure beside other calls.
        most: how many sets there may be: "auto" is four, made for streams that take turns.
        stream: the handle of torch's current stream.
        has_room: whether the device has memory for one more, which counts where no number was asked for.
    """

    def __init__(
        self,
        make: Callable[[bool], GraphCache],
        most: int | str,
        stream: Callable[[], int],
        has_room: Callable[[], bool],
    ) -> None:
        self._make = make
        self._most, self._turns_first = (_AUTO_SETS, _AUTO_TURNS) if isinstance(most, str) else (most, 0)
        self._may_grow = has_room if isinstance(most, str) else lambda: True
        self._stream = stream
        self._last = -1  # stream of the last call
        self._turns: Counter[int] = Counter()  # of streams without a set
        self._sets = [make(True)]
        self._of_stream: OrderedDict[int, GraphCache] = OrderedDict()
        self._lock = threading.RLock()
        self._next = 0

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(map(len, self._sets))

    @property
    def sets(self) -> int:
        """How many sets there are."""
        return len(self._sets)

    @property
    def refusal(self) -> str:
        """Why there are no graphs (any more), "" where there are."""
        return self._sets[0].refusal

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened in all sets."""
        total: Counter[str] = Counter()
        for each in self._sets:
            total.update(each.counters)
        return total

    def call(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Replay a graph on torch's current stream, in the set of that stream; see `GraphCache.call`."""
        return self._pick().call(inputs)

    def bind(self, inputs: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]] | None:
        """A replay that reads these very tensors; None where there can be none (`refusal`)."""
        chosen = self._pick()
        captured = chosen.bind(inputs)
        return None if captured is None else lambda: chosen.replay_bound(captured)

    def clear(self) -> None:
        """Forget all graphs; they are captured anew when they are needed."""
        with self.held():
            for each in self._sets:
                each.clear()

    def wait(self) -> None:
        """Wait on the host until all replays are done."""
        for each in self._sets:
            each.wait()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody replays or captures meanwhile."""
        with self._lock, ExitStack() as stack:
            for each in self._sets:
                stack.enter_context(each.lock)
            yield

    def _pick(self) -> GraphCache:
        """The set of torch's current stream: what is given to one stream runs in order, and gains nothing from a second
        set. What the first has found out about plain calls counts for all, and it is there where another can have no
        graphs, as for lack of memory.
        """
        first = self._sets[0]
        if self._most == 1 or first.refusal:
            return first
        stream = self._stream()
        last, self._last = self._last, stream
        chosen = self._of_stream.get(stream)
        if chosen is None:
            if self._turns_first and last == stream:
                return first
            chosen = self._choose(stream)
        return first if chosen.refusal else chosen

    def _choose(self, stream: int) -> GraphCache:
        """Streams take the sets in turn and keep theirs."""
        with self._lock:
            if self._turns[stream] < self._turns_first:
                if len(self._turns) > _MOST_STREAMS:
                    self._turns.clear()
                self._turns[stream] += 1
                return self._sets[0]
            if self._next >= len(self._sets) and self._may_grow():
                self._next = len(self._sets)  # there may have been no room for those ahead of it
                self._sets.append(self._make(False))
            chosen = self._of_stream[stream] = self._sets[self._next % len(self._sets)]
            self._next = (self._next + 1) % self._most
            self._turns.pop(stream, None)
            if len(self._of_stream) > _MOST_STREAMS:
                self._of_stream.popitem(last=False)
            return chosen


def half_is_free(device: torch.device) -> bool:
    """Whether half of a CUDA device's memory is free, what torch's allocator holds in reserve not counted."""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # as it may be while a caller captures on another stream
        return False
    return free > total // 2
