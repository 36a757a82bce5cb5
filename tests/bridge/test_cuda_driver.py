"""Copies within a CUDA graph whose ends are moved, with a driver that copies memory of the host."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from trtbridge.bridge.cuda_driver import CopyNode, EdgeData, Memcpy, copy_nodes, wait_for_ends
from trtbridge.bridge.graph_capture import Captured, Copies
from trtbridge.plugins.driver import DriverError

KERNEL, MEMCPY = 0, 1


class FakeDriver:
    """The functions of cuda.h that are used, over nodes that are here; a node's handle is its place and one."""

    def __init__(self) -> None:
        self.nodes: list[tuple[int, Memcpy]] = []
        self.refused: set[int] = set()  # addresses
        self.updates = 0
        self.edges: list[tuple[int, int, tuple[int, int, int]]] = []  # nodes, and ports and kind of what is waited for

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        memcpy = Memcpy(source=source.data_ptr(), target=target.data_ptr())
        memcpy.width, memcpy.height, memcpy.depth = source.numel() * source.element_size(), 1, 1
        self.nodes.append((MEMCPY, memcpy))

    def raw_cuda_graph(self) -> int:
        return 1

    raw_cuda_graph_exec = raw_cuda_graph

    def replay(self, places: range) -> None:
        for place in places:
            memcpy = self.nodes[place][1]
            ctypes.memmove(memcpy.target, memcpy.source, memcpy.width)

    # What stands behind ctypes, by its names there

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = 7
        return 0

    def cuGraphGetNodes(self, graph: Any, handles: Any, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.nodes)
        for place in range(len(self.nodes) if handles is not None else 0):
            handles[place] = place + 1
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:  # noqa: N802
        kind._obj.value = self.nodes[node.value - 1][0]
        return 0

    def cuGraphMemcpyNodeGetParams(self, node: Any, memcpy: Any) -> int:  # noqa: N802
        ctypes.pointer(memcpy._obj)[0] = self.nodes[node.value - 1][1]
        return 0

    def cuGraphExecMemcpyNodeSetParams(self, executable: Any, node: Any, memcpy: Any, context: Any) -> int:  # noqa: N802
        assert context.value == 7
        self.updates += 1
        if {memcpy._obj.source, memcpy._obj.target} & self.refused:
            return 1
        ctypes.pointer(self.nodes[node.value - 1][1])[0] = memcpy._obj
        return 0

    def cuGraphGetEdges_v2(self, graph: Any, begins: Any, ends: Any, data: Any, count: Any) -> int:  # noqa: N802
        if begins is not None and not count._obj.value:
            return 1
        count._obj.value = len(self.edges)
        for place, (first, second, kind) in enumerate(self.edges if begins is not None else ()):
            begins[place], ends[place], data[place] = first, second, EdgeData(*kind)
        return 0

    def cuGraphRemoveDependencies_v2(self, graph: Any, begins: Any, ends: Any, data: Any, count: Any) -> int:  # noqa: N802
        for place in range(count.value):
            one = data[place]
            self.edges.remove((begins[place], ends[place], (one.from_port, one.to_port, one.kind)))
        return 0

    def cuGraphAddDependencies_v2(self, graph: Any, begins: Any, ends: Any, data: Any, count: Any) -> int:  # noqa: N802
        assert data is None
        self.edges += [(begins[place], ends[place], (0, 0, 0)) for place in range(count.value)]
        return 1 if self.refused else 0


def nodes_of(driver: FakeDriver, *ends: tuple[torch.Tensor, torch.Tensor]) -> list[CopyNode]:
    return copy_nodes(driver, [(source.data_ptr(), target.data_ptr()) for source, target in ends], driver)


def test_copies_go_where_they_are_told() -> None:
    driver = FakeDriver()
    x, y, z = (torch.full((5,), float(value)) for value in range(3))
    driver.add(x, y)
    driver.nodes.append((KERNEL, Memcpy()))
    driver.add(y, z)
    (node,) = nodes_of(driver, (y, z))
    other = torch.zeros(5)
    node.write_to(other.data_ptr())
    driver.replay(range(2, 3))
    assert torch.equal(other, y)
    assert torch.equal(z, torch.full((5,), 2.0))
    node.read_from(x.data_ptr())
    driver.replay(range(2, 3))
    assert torch.equal(other, x)
    assert driver.updates == 2
    node.read_from(x.data_ptr())
    assert driver.updates == 2, "it reads there already"


def test_a_copy_that_is_not_there_or_there_twice() -> None:
    driver = FakeDriver()
    x, y = torch.ones(5), torch.ones(5)
    driver.add(x, y)
    with pytest.raises(DriverError, match="the graph has 0 copies from"):
        nodes_of(driver, (y, x))
    driver.add(x, y)
    with pytest.raises(DriverError, match="2 copies"):
        nodes_of(driver, (x, y))


def test_memory_that_is_refused_is_asked_for_again() -> None:
    driver = FakeDriver()
    x, y, z = torch.ones(5), torch.zeros(5), torch.full((5,), 3.0)
    driver.add(x, y)
    (node,) = nodes_of(driver, (x, y))
    driver.refused = {z.data_ptr()}
    for _ in range(2):
        with pytest.raises(DriverError, match="cuGraphExecMemcpyNodeSetParams failed with CUresult 1"):
            node.read_from(z.data_ptr())
    driver.refused.clear()
    node.read_from(z.data_ptr())
    node.write_to(y.data_ptr())
    driver.replay(range(1))
    assert torch.equal(y, z)


def test_kernels_wait_for_the_end_of_the_one_ahead() -> None:
    driver = FakeDriver()
    driver.edges = [(1, 2, (1, 0, 1)), (2, 3, (0, 0, 0)), (3, 4, (1, 0, 1))]
    assert wait_for_ends(driver.raw_cuda_graph(), driver) == 2
    assert sorted(driver.edges) == [(1, 2, (0, 0, 0)), (2, 3, (0, 0, 0)), (3, 4, (0, 0, 0))]
    assert wait_for_ends(driver.raw_cuda_graph(), driver) == 0
    driver.edges = []
    assert wait_for_ends(driver.raw_cuda_graph(), driver) == 0, "a graph of one node"
    driver.edges, driver.refused = [(1, 2, (1, 0, 1))], {1}
    with pytest.raises(DriverError, match="cuGraphAddDependencies failed with CUresult 1"):
        wait_for_ends(driver.raw_cuda_graph(), driver)


def captured_double(driver: FakeDriver, fresh: bool) -> Captured:
    """A graph that doubles; it copies from and, for fresh results, to the caller's tensors."""
    source, static, output, target = (torch.zeros(2, 3) for _ in range(4))
    driver.add(source, static)
    if fresh:
        driver.add(output, target)

    def replay() -> None:
        driver.replay(range(1))
        torch.mul(static, 2, out=output)
        driver.replay(range(1, len(driver.nodes)))

    ends = [(source, static), (output, target)][: 1 + fresh]
    nodes = nodes_of(driver, *ends)
    return Captured(replay, [static], [output], None, Copies(nodes[:1], nodes[1:], [source]))  # type: ignore[arg-type]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_graph_with_copies_inside(fresh: bool) -> None:
    captured = captured_double(FakeDriver(), fresh)
    results = []
    for value in range(1, 4):
        x = torch.full((3, 2), float(value), requires_grad=value == 2).T  # in pieces, as a caller may give it
        prepared = captured.prepare([x])
        captured.aim(prepared)
        (result,) = captured.call(prepared, fresh)
        assert torch.equal(result, torch.full((2, 3), 2.0 * value))
        assert not result.requires_grad
        results.append(result)
    assert len({result.data_ptr() for result in results}) == (3 if fresh else 1)
    assert captured.copies is not None
    assert not captured.copies.sources, "the tensors of the capture are let go"
