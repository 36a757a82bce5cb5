"""The call of an engine as one op of torch, ``trtbridge::run_engine``, for torch.compile and torch.export.

The op names its engine by a handle: a text that belongs to one living `EngineModule`. Nothing here keeps a module
alive: when it goes, its engines are freed, and a graph that still names it says so when it is called. A module that is
saved takes its handle along, so a program that torch.export.save wrote runs in another process in which the module's
file has been loaded, and is kept.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from ..errors import BackendError
from .signature_fake import fake_results
from .structure import matches

if TYPE_CHECKING:
    from .module import EngineModule

OP = "trtbridge::run_engine"
HANDLE = "handle"
"""Key of a program's info that holds the handle."""

# The names of living modules, which is what a name in a graph needs; entries go with their modules.
_modules: weakref.WeakValueDictionary[str, EngineModule] = weakref.WeakValueDictionary()
_lock = threading.Lock()

_LIBRARY = torch.library.Library("trtbridge", "FRAGMENT")
_LIBRARY.define(
    "run_engine(Tensor[] inputs, str engine) -> Tensor[]",
    tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides],
)


def register(module: EngineModule, wanted: str | None) -> str:
    """Give a module its handle: the wanted one, unless another living module has that."""
    with _lock:
        handle = wanted if wanted and wanted not in _modules else uuid.uuid4().hex
        _modules[handle] = module
    return handle


def find_module(handle: str) -> EngineModule:
    """The living module of a handle.

    Raises:
        BackendError: there is none in this process.
    """
    module = _modules.get(handle)
    if module is None:
        raise BackendError(
            f"No living EngineModule has the handle {handle!r}, which a compiled or exported graph calls: keep the "
            "module as long as the graph, or, for a graph that was saved, load the module's file with tb.load(path) "
            "before calling it, and keep what that returns."
        )
    return module


def is_traced(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is part of a trace: that something is being compiled is said to all threads of a process."""
    if torch.compiler.is_dynamo_compiling():
        return True
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return not tensors or any(map(is_fake, tensors))


def call_traced(module: EngineModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A call of a module as torch.compile and torch.export see it: arguments flat, one op, results put together."""
    signature = module.program.signature
    # An engine has no gradient; without detach() the graph would be made to look for one.
    tensors = [tensor.detach() for tensor in module._checker.flatten(args, kwargs)]
    results = list(torch.ops.trtbridge.run_engine(tensors, module._handle))
    for index in signature.complex_outputs:
        results[index] = torch.view_as_complex(results[index])
    return signature.output_structure.unflatten(results)


@torch.library.impl(_LIBRARY, "run_engine", "CompositeExplicitAutograd")
def _run(inputs: Sequence[torch.Tensor], engine: str) -> list[torch.Tensor]:
    module = find_module(engine)
    signature = module.program.signature
    complex_inputs = signature.complex_inputs
    leaves = [torch.view_as_complex(t.contiguous()) if i in complex_inputs else t for i, t in enumerate(inputs)]
    args, kwargs = signature.input_structure.unflatten(leaves)
    found: list[Any] = []
    matches(module._call(args, kwargs), signature.output_structure, "output", found)
    results: list[torch.Tensor] = []
    seen: set[int] = set()
    for value in found:
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, device=module.device)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        # An op's results share no memory with one another; a module may return one tensor twice.
        results.append(tensor.clone() if tensor.data_ptr() in seen else tensor)
        seen.add(tensor.data_ptr())
    return results


def _fake(inputs: Sequence[torch.Tensor], engine: str) -> list[torch.Tensor]:
    module = find_module(engine)
    return fake_results(module.program.signature, inputs, module.device)


torch.library.register_fake(OP, _fake, lib=_LIBRARY)
