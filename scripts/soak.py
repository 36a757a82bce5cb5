"""A long mix of everything that a converted module lives through, with deliberate failures: nothing may come out wrong.

    python scripts/soak.py [--minutes 10] [--threads 4] [--json FILE]
    python scripts/soak.py --load '{"cuda_graphs": true}' --without-gate --handing-over never    to find a cause

Threads call shared modules with shapes at random, bind, copy, save, load and (where the package can) refit them, and
provoke failures: bad shapes, wrong dtypes, a plugin that fails, files that are damaged, a save killed midway, a disk
that is full, a cache that is damaged. Every result of every good call is compared with eager PyTorch's. At the end: how
each provoked failure ended, wrong results, litter, memory before and after, and modules that outlive their owners.

On a GPU the backend is TensorRT-RTX and modules have CUDA graphs or none by chance; elsewhere ONNX Runtime on the CPU.
Exit status: 0 all was right, 1 a result was wrong, something ended in another way than it should, or files or modules
were left.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import soak_actions
import soak_failures
import soak_forced
import torch
from soak_actions import Soak, WrongError, forget_workspaces, living, memory

from trtbridge.bridge import host_thread

WARM_UP_S = 10.0
"""Before memory is looked at for the first time."""
MOST_UNEXPECTED = 100
"""Then it ends early."""


def worker(soak: Soak, number: int, deadline: float) -> None:
    """Do things at random until the time is over; the first thread alone does what is slow."""
    pick = random.Random(1000 * soak.seed + number)
    good = [(weight, action) for weight, action in soak_actions.ACTIONS if soak.has_refit or action.__name__ != "refit"]
    actions = [*good, *soak_failures.QUICK, *(soak_failures.SLOW if number == 0 else ())]
    todo = [action for _, action in actions]  # each once, then at random
    pick.shuffle(todo)
    weights = [weight for weight, _ in actions]
    while time.monotonic() < deadline and len(soak.unexpected) < MOST_UNEXPECTED:
        action = todo.pop() if todo else pick.choices(actions, weights)[0][1]
        name = action.__name__.replace("_", " ")
        try:
            outcome = action(soak, pick)
        except WrongError as error:
            soak.wrong.append(f"{name}: {error}")
            outcome = "WRONG RESULT"
        except Exception as error:
            traceback.print_exc()
            soak.unexpected.append(f"{name}: {type(error).__name__}: {error}"[:500])
            outcome = f"UNEXPECTED {type(error).__name__}"
        soak.note(name, outcome)


def run(minutes: float, threads: int, seed: int, work: Path) -> dict[str, Any]:
    """The whole soak.

    Args:
        minutes: how long, the conversion at the beginning not counted.
        threads: how many.
        seed: of everything random; threads take turns as they like, so that no two runs are the same.
        work: an empty folder.

    Returns:
        The summary, JSON-ready.
    """
    soak = Soak(work, seed)
    gc.collect()  # what torch imports in a first conversion leaves frames in cycles, and with them its module
    print(f"soak: {soak.describe()}", flush=True)
    started = time.monotonic()
    deadline = started + 60 * minutes
    before: dict[str, int] = {}
    samples: list[dict[str, int]] = []
    crowd = [threading.Thread(target=worker, args=(soak, number, deadline)) for number in range(threads)]
    for thread in crowd:
        thread.start()
    said = started
    while any(thread.is_alive() for thread in crowd):
        time.sleep(0.2)
        now = time.monotonic()
        if not before and now - started > min(WARM_UP_S, 20 * minutes):
            before = memory()
        if now - said > 30:
            said = now
            samples.append({"seconds": round(now - started), **memory()})
            rss = samples[-1]["RSS"] >> 20
            print(f"soak: {now - started:.0f} s, {soak.calls} calls, {len(soak.wrong)} wrong, {rss} MiB", flush=True)
    seconds = time.monotonic() - started
    leftovers = soak_failures.litter(soak)
    after = memory()
    gc.collect()
    collected = memory()
    shared = len(soak.pool)
    soak.pool.clear()
    forget_workspaces()
    left = living()
    tally: dict[str, dict[str, int]] = {}
    for (name, outcome), count in sorted(soak.tally.items()):
        tally.setdefault(name, {})[outcome] = count
    return {
        "backend": soak.backend, "seconds": round(seconds, 1), "threads": threads, "calls": soak.calls,
        "endings": tally, "wrong": soak.wrong, "unexpected": soak.unexpected, "litter": leftovers,
        "memory_before": before, "memory_after": after, "memory_collected": collected, "memory_dropped": memory(),
        "memory": samples, "shared": shared, "left": left, "notes": soak.notes,
        "handed_over": sum(thread.handed_over for thread in host_thread._threads.values()),
    }  # fmt: skip


def render(found: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"{found['calls']} calls compared with eager in {found['seconds']:.0f} s by {found['threads']} threads, "
             f"{found['backend']}; {found['handed_over']} calls were handed over", "",
             "what was done, and how it ended:"]  # fmt: skip
    for name, outcomes in found["endings"].items():
        lines.append(f"  {name}: " + ", ".join(f"{outcome} {count}" for outcome, count in outcomes.items()))
    lines += [f"  {note}" for note in found["notes"]]
    for title, key in (
        ("wrong results", "wrong"),
        ("ended otherwise than they should", "unexpected"),
        ("litter", "litter"),
    ):
        counts = Counter(found[key])
        lines.append(f"{title}: {len(found[key])}")
        lines += [f"  {count} x {words}" for words, count in counts.most_common(20)]
    for name, value in found["memory_after"].items():
        begin, collected, dropped = (
            found[key].get(name, 0) / 2**20 for key in ("memory_before", "memory_collected", "memory_dropped")
        )
        lines.append(
            f"memory, {name}: {begin:.1f} MiB after the warm-up, {value / 2**20:.1f} MiB at the end, "
            f"{collected:.1f} MiB after a garbage collection, {dropped:.1f} MiB without the {found['shared']} modules "
            "that threads shared"
        )
    lines.append(f"modules that nobody has and that are there: {found['left']}")
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--handing-over", choices=["auto", "never", "always"], default="auto",
        help="calls that come at once are made by one thread (bridge/host_thread.py): on CUDA, never, on a CPU, too",
    )  # fmt: skip
    parser.add_argument("--without-gate", action="store_true", help="captures and enqueues of several threads at once")
    parser.add_argument(
        "--load", type=json.loads, default={}, metavar="JSON", help="options of each load, in place of some by chance"
    )
    parser.add_argument("--json", type=Path, help="where the summary goes, too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.enable()  # a library that ends the process says where it was called,
    torch._C._set_print_stack_traces_on_fatal_signal(True)  # and where it was by then
    if options.child:
        soak_failures.save_for_ever(*map(Path, options.child))
        return 0
    with ExitStack() as stack:
        stack.enter_context(soak_forced.loads(options.load))
        stack.enter_context(soak_forced.handing_over(options.handing_over))
        if options.without_gate:
            stack.enter_context(soak_forced.without_gate())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trtbridge-soak-"))
        found = run(options.minutes, options.threads, options.seed, Path(folder))
    print(render(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["wrong"] or found["unexpected"] or found["litter"] or found["left"]))


if __name__ == "__main__":
    sys.exit(main())
