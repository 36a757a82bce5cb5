"""What torch does not tell or do of CUDA graphs, asked of the driver: capture ids, and copies whose ends may change.

Functions of cuda.h, by ctypes; handles of the runtime, which torch uses, are the driver's, too.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from ..plugins.driver import DriverError, check, library

_MEMCPY_NODE = 1  # CU_GRAPH_NODE_TYPE_MEMCPY
_PROGRAMMATIC = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


class Memcpy(ctypes.Structure):
    """CUDA_MEMCPY3D; a copy of bytes in a row has one line of them."""

    _fields_ = (
        *((f"source_{name}", ctypes.c_size_t) for name in ("x", "y", "z", "level")),
        ("source_kind", ctypes.c_uint),
        ("source_host", ctypes.c_void_p),
        ("source", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("reserved0", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("source_height", ctypes.c_size_t),
        *((f"target_{name}", ctypes.c_size_t) for name in ("x", "y", "z", "level")),
        ("target_kind", ctypes.c_uint),
        ("target_host", ctypes.c_void_p),
        ("target", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("reserved1", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("target_height", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class EdgeData(ctypes.Structure):
    """CUgraphEdgeData: what a node waits for of the one ahead."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("kind", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


class Graph(Protocol):
    """What is needed of a torch.cuda.CUDAGraph that was made with ``keep_graph=True``."""

    def raw_cuda_graph(self) -> int: ...

    def raw_cuda_graph_exec(self) -> int: ...


class CopyNode:
    """A copy within an instantiated graph. Its ends may be moved to other memory of the same device between replays."""

    def __init__(self, driver: Any, executable: ctypes.c_void_p, node: ctypes.c_void_p, memcpy: Memcpy) -> None:
        context = ctypes.c_void_p()
        check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        self._set = driver.cuGraphExecMemcpyNodeSetParams
        self._memcpy = memcpy
        self._arguments = (executable, node, ctypes.byref(memcpy), context)

    def read_from(self, address: int) -> None:
        """Let replays from now on read elsewhere.

        Raises:
            DriverError: the driver refuses that memory; then the copy may not be replayed before it has another.
        """
        if address != self._memcpy.source:
            self._memcpy.source = address
            self._update()

    def write_to(self, address: int) -> None:
        """Let replays from now on write elsewhere; raises as `read_from`."""
        if address != self._memcpy.target:
            self._memcpy.target = address
            self._update()

    def _update(self) -> None:
        status = self._set(*self._arguments)
        if status:
            self._memcpy.source = self._memcpy.target = 0  # whatever comes next is another
            check(status, "cuGraphExecMemcpyNodeSetParams")


def copy_nodes(graph: Graph, ends: list[tuple[int, int]], driver: Any = None) -> list[CopyNode]:
    """The copies of an instantiated graph that go from some addresses to others.

    Args:
        graph: of torch.
        ends: source and target of each, in bytes of device memory.
        driver: for tests.

    Raises:
        DriverError: there is no such copy, or more than one.
    """
    driver = driver or library()
    whole, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    check(driver.cuGraphGetNodes(whole, None, ctypes.byref(count)), "cuGraphGetNodes")
    handles = (ctypes.c_void_p * count.value)()
    check(driver.cuGraphGetNodes(whole, handles, ctypes.byref(count)), "cuGraphGetNodes")
    found: dict[tuple[int, int], list[tuple[ctypes.c_void_p, Memcpy]]] = {}
    for handle in handles:
        node, kind, memcpy = ctypes.c_void_p(handle), ctypes.c_int(), Memcpy()
        check(driver.cuGraphNodeGetType(node, ctypes.byref(kind)), "cuGraphNodeGetType")
        if kind.value == _MEMCPY_NODE:
            check(driver.cuGraphMemcpyNodeGetParams(node, ctypes.byref(memcpy)), "cuGraphMemcpyNodeGetParams")
            found.setdefault((memcpy.source or 0, memcpy.target or 0), []).append((node, memcpy))
    executable = ctypes.c_void_p(graph.raw_cuda_graph_exec())
    nodes = []
    for source, target in ends:
        fitting = found.get((source, target), [])
        if len(fitting) != 1:
            raise DriverError(f"the graph has {len(fitting)} copies from {source:#x} to {target:#x}, not one")
        nodes.append(CopyNode(driver, executable, *fitting[0]))
    return nodes


def wait_for_ends(graph: int, driver: Any = None) -> int:
    """Let each kernel of a graph wait for the end of the one ahead, where it may begin before that.

    Programmatic dependent launch overlaps the end of a kernel with the beginning of the next one, which says by itself
    from when on it needs the results. In its place there are dependencies of the common kind.

    Args:
        graph: cudaGraph_t, not instantiated yet; its capture may still be under way.
        driver: for tests.

    Returns:
        How many dependencies were replaced.

    Raises:
        DriverError: the driver refuses; the graph may have lost dependencies, and is not to be used.
    """
    driver = driver or library()
    whole, count = ctypes.c_void_p(graph), ctypes.c_size_t()
    check(driver.cuGraphGetEdges_v2(whole, None, None, None, ctypes.byref(count)), "cuGraphGetEdges")
    if not count.value:
        return 0  # a single kernel; the next call would take that for a mistake
    handles, kinds = ctypes.c_void_p * count.value, EdgeData * count.value
    begins, ends, data = handles(), handles(), kinds()
    check(driver.cuGraphGetEdges_v2(whole, begins, ends, data, ctypes.byref(count)), "cuGraphGetEdges")
    early = [place for place in range(count.value) if data[place].kind == _PROGRAMMATIC]
    if early:
        number = ctypes.c_size_t(len(early))
        nodes = ctypes.c_void_p * len(early)
        first, second = nodes(*(begins[place] for place in early)), nodes(*(ends[place] for place in early))
        these = (EdgeData * len(early))(*(data[place] for place in early))
        check(driver.cuGraphRemoveDependencies_v2(whole, first, second, these, number), "cuGraphRemoveDependencies")
        check(driver.cuGraphAddDependencies_v2(whole, first, second, None, number), "cuGraphAddDependencies")
    return len(early)


def capture_of(stream: int) -> tuple[int, int]:
    """The capture that a stream takes part in.

    Args:
        stream: CUDA stream handle.

    Returns:
        Its number, unique in the process, and the cudaGraph_t that it fills; zeros without one.
    """
    # CUresult cuStreamGetCaptureInfo(stream, status*, id*, graph*, ...), as v2 with the last outputs left out.
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    library().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None
    )
    return number.value, graph.value or 0
