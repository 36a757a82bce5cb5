"""Memory of calls: what is freed and when, and what stays flat over many shapes."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from calls_model import SLEEP_CYCLES, Make, Net, arguments, close
from helpers import Report

import trtbridge as tb


def test_random_shapes_leave_memory_flat(make: Make, cuda: torch.device, report: Report) -> None:
    module = make(cuda_graphs=True)
    pick = random.Random(0)

    def run(calls: int) -> int:
        for _ in range(calls):
            module(*arguments(pick.randint(1, 64), cuda))
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    run(1000)
    before = run(200)
    torch.cuda.reset_peak_memory_stats()
    after = run(2000)
    report(
        "random shapes",
        calls=2000,
        allocated_mib_before=round(before / 2**20, 2),
        allocated_mib_after=round(after / 2**20, 2),
        peak_mib=round(torch.cuda.max_memory_allocated() / 2**20, 2),
        graphs=module.stats().captured_graphs,
        captures=module.stats().graph_captures,
    )
    assert after <= before + (1 << 20)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
def test_a_dropped_module_frees_its_memory_at_once(make: Make, eager: Net, cuda: torch.device, share: bool) -> None:
    """Without the garbage collector. The first of the two lives is for what libraries keep for good."""
    side = torch.cuda.Stream()  # one for both: cuBLAS keeps memory for each stream that eager runs on

    def live() -> list[weakref.ref[Any]]:
        module = make(cuda_graphs=True, share_workspace=share)
        for turn in range(3):
            for batch in (1, 4):
                given = arguments(batch, cuda, turn)
                close(module(*given), eager, given)
        assert module.stats().captured_graphs == 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            close(make(cuda_graphs=False, share_workspace=share)(*given), eager, given)
            close(module(*given), eager, given)
        side.synchronize()
        with pytest.raises(tb.InputError):
            module(*arguments(65, cuda))
        bound = arguments(4, cuda)
        call = module.bind(*bound)
        close(call(), eager, bound)
        running = module._running
        assert running is not None
        found = [weakref.ref(module), weakref.ref(running), *map(weakref.ref, running._lanes._idle)]
        del module, running
        assert all(ref() is not None for ref in found), "the bound call keeps it"
        close(call(), eager, bound)
        return found

    gc.collect()
    torch.cuda.synchronize()
    gc.disable()
    try:
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            found = live()
            assert [ref() for ref in found] == [None] * len(found)
            torch.cuda.synchronize()
            torch.empty(
                1, device=cuda
            )  # the allocator looks for what other streams have used when it is asked for some
            after = torch.cuda.memory_allocated()
        assert after == before
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [True, False], ids=str)
def test_a_module_may_go_right_after_a_call(make: Make, eager: Net, cuda: torch.device, mode: bool) -> None:
    given = arguments(64, cuda)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    module = make(cuda_graphs=mode)
    with torch.cuda.stream(side):
        for _ in range(2):
            module(*given)
        torch.cuda._sleep(SLEEP_CYCLES)
        result = module(*given)
        assert not side.query(), "its kernels are still to run"
        del module
    noise = [torch.full((1 << 20,), float("nan"), device=cuda) for _ in range(8)]  # over what it has freed
    side.synchronize()
    assert all(bool(tensor.isnan().all()) for tensor in noise), "nothing of it writes any more"
    close(result, eager, given)


def test_graphs_come_again_after_all_are_gone(make: Make, eager: Net, cuda: torch.device) -> None:
    """torch takes no memory pool up again whose graphs are all gone."""
    module = make(cuda_graphs=True)
    given = arguments(4, cuda)
    for turn in range(1, 4):
        call = module.bind(*given)
        for _ in range(2):
            close(call(), eager, given)
        assert module.stats().graph_captures == turn
        assert module.stats().graph_replays == 2 * turn
        del call
