"""What several threads do with engines at once, as often as they can, for a fault that a soak meets once in an hour.

    python scripts/soak_fast.py [--seconds 60] [--without-gate] [--kinds plain,plain,captures,contexts,loads]

A thread for each kind that is named: *plain* calls without CUDA graphs, *captures* of a graph, one replay of it and its
end, *contexts* that are made and let go of, *loads* of the file and a first call; and without TensorRT *torch_kernels*
with an event after each, and *torch_captures* of such. Every result is compared with eager's. So one sees what a fault
does not come without (docs/runtime.md), which `--without-gate` lets come. On a GPU the backend is TensorRT-RTX;
elsewhere ONNX Runtime, which has no captures.

Exit status: 0 all was right, 1 a result was wrong or something was raised.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import soak_actions
import soak_forced
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.graph_capture import Capturer
from trtbridge.plugins.captures import OwnGraph, capturing
from trtbridge.plugins.streams import own_stream

BATCHES = (1, 2, 4, 16)
TOLERANCE = 2e-3


class Net(nn.Module):
    """A dozen kernels, and no op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.softmax(layer(x), -1) + torch.roll(x, 1, 1)
        return x


class Fast:
    """All that threads share.

    Args:
        work: an empty folder.
        seed: of everything random.
    """

    def __init__(self, work: Path, seed: int) -> None:
        torch.manual_seed(seed)
        cuda = soak_actions.on_cuda()
        self.seed = seed
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._file, self._cache = work / "net.trtb", work / "cache"
        if cuda:
            torch.backends.cuda.matmul.allow_tf32 = False
        net = Net().eval().to(self.device)
        self._given = {size: torch.randn(size, 64, device=self.device) for size in BATCHES}
        with torch.no_grad():
            self._expected = {size: net(x) for size, x in self._given.items()}
        batch = tb.Dim("batch", min=1, opt=4, max=max(BATCHES))
        backend = "tensorrt_rtx" if cuda else "onnxruntime"
        made = tb.convert(
            net, (self._given[4],), dynamic_shapes={"x": {0: batch}}, backend=backend, cache_dir=self._cache
        )
        tb.save(made, self._file)
        self._shared = self.load(cuda_graphs=False)
        for size in BATCHES:
            self.call(self._shared, size)

    def load(self, **options: Any) -> Any:
        """The file, as a module."""
        return tb.load(self._file, self.device, cache_dir=self._cache, **options)

    def call(self, module: Any, size: int) -> None:
        """A call whose result is compared."""
        self._compare(module(self._given[size]), size)

    def _compare(self, result: torch.Tensor, size: int) -> None:
        error = float((result - self._expected[size]).abs().max())
        if not error <= TOLERANCE:
            self.wrong.append(f"batch {size}: off by {error:.3g}")

    # Of each kind what a thread does again and again

    def plain(self, pick: Random) -> Callable[[], None]:
        return lambda: self.call(self._shared, pick.choice(BATCHES))

    def captures(self, pick: Random) -> Callable[[], None]:
        running = self.load(cuda_graphs=False)._running
        capturer = Capturer(running._run, running._make_lane, self.device, overlap=False)

        def step() -> None:
            size = pick.choice(BATCHES)
            captured = capturer.capture([self._given[size]])
            captured.replay()
            self._compare(captured.outputs[0], size)
            capturer.recycle(captured)

        return step

    def contexts(self, pick: Random) -> Callable[[], None]:
        running = self._shared._running
        return lambda: running._make_lane().wait()

    def loads(self, pick: Random) -> Callable[[], None]:
        return lambda: self.call(self.load(cuda_graphs=False), pick.choice(BATCHES))

    def torch_kernels(self, pick: Random) -> Callable[[], None]:
        x, event = self._given[4], torch.cuda.Event()

        def step() -> None:
            for _ in range(50):
                torch.relu(x)
                event.record()
            event.synchronize()

        return step

    def torch_captures(self, pick: Random) -> Callable[[], None]:
        own = own_stream(self.device)  # which nothing else works on

        def step() -> None:
            x = self._given[4]
            graph = OwnGraph(keep_graph=True)
            with capturing(graph, self.device, stream=own.stream):
                for _ in range(30):
                    x = torch.relu(x)
            graph.instantiate()
            graph.replay()
            torch.cuda.current_stream().synchronize()

        return step


KINDS = ("plain", "captures", "contexts", "loads", "torch_kernels", "torch_captures")


def worker(fast: Fast, kind: str, number: int, deadline: float) -> None:
    """Do one thing until the time is over."""
    with ExitStack() as stack:
        if fast.device.type == "cuda":
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        try:
            step = getattr(fast, kind)(Random(1000 * fast.seed + number))
            while time.monotonic() < deadline:
                step()
                fast.done[kind] += 1
        except Exception as error:
            traceback.print_exc()
            fast.wrong.append(f"{kind}: {type(error).__name__}: {error}"[:500])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kinds", default="plain,plain,captures,contexts,loads", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-gate", action="store_true", help="captures and enqueues of several threads at once")
    parser.add_argument("--json", type=Path, help="where what was done goes, too")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if not soak_actions.on_cuda() and (needy := set(kinds) - {"plain", "contexts", "loads"}):
        parser.error(f"{', '.join(sorted(needy))} need a GPU; leave them out of --kinds")
    faulthandler.enable()
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    with ExitStack() as stack:
        stack.enter_context(soak_forced.handing_over("never"))
        if options.without_gate:
            stack.enter_context(soak_forced.without_gate())
        fast = Fast(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trtbridge-fast-"))), options.seed)
        deadline = time.monotonic() + options.seconds
        crowd = [
            threading.Thread(target=worker, args=(fast, kind, number, deadline)) for number, kind in enumerate(kinds)
        ]
        for thread in crowd:
            thread.start()
        while any(thread.is_alive() for thread in crowd):
            time.sleep(min(5.0, options.seconds / 4))
            print(dict(fast.done), len(fast.wrong), "wrong", flush=True)
        found = {"kinds": kinds, "seconds": options.seconds, "done": dict(fast.done), "wrong": fast.wrong}
    for words, count in Counter(fast.wrong).most_common(10):
        print(f"{count} x {words}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(fast.wrong))


if __name__ == "__main__":
    sys.exit(main())
