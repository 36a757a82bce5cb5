"""The fake kernel of a plugin whose author gave none: what the function itself does to shapes.

A fake kernel says the shapes and dtypes of an op's outputs without touching data. Torch code says that by itself when
it runs on fake tensors, and a function that launches Triton kernels does too once the launches are left out: a kernel
only fills memory that torch calls around it have allocated. Where the function needs the data (NumPy, ctypes, a C++
library), the outputs are taken to be like the first tensor argument, and every real call is checked against that.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from ..errors import PluginError

Function = Callable[..., Any]

_DATA_ACCESS = {
    "data_ptr", "const_data_ptr", "mutable_data_ptr", "numpy", "__array__", "untyped_storage", "storage", "__dlpack__",
}  # fmt: skip
_HOW = (
    "Give a fake kernel, which returns empty outputs of the right shape, dtype and device without reading data:\n"
    '  @trtbridge.plugin("{name}", fake=lambda x, ...: torch.empty_like(x))\n'
    "or @{function}.register_fake over a function of the same arguments."
)


class _NeedsDataError(Exception):
    """The function reads the memory of a tensor."""


class _WithoutData(TorchFunctionMode):
    """Stops at whatever reads the memory of a tensor: a fake one has none, and its address is 0."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _DATA_ACCESS:
            raise _NeedsDataError(name)
        return func(*args, **(kwargs or {}))


class _Skipped:
    """Stands for a Triton kernel; launching it does nothing."""

    def __getitem__(self, grid: object) -> Function:
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    run = warmup = __call__


class DerivedFake:
    """The fake kernel of an op, derived from its implementation.

    Args:
        name: the op, for messages.
        functions: its implementations; those after the first (one for the CPU, say) are tried when it needs data.

    Attributes:
        guessed: whether outputs were taken to be like the first tensor argument, so that real calls must be checked.
    """

    def __init__(self, name: str, functions: Sequence[Function]) -> None:
        self.name = name
        self.functions = functions
        self.guessed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on fake tensors.

        Returns:
            Fake outputs.

        Raises:
            PluginError: the function does not run on fake tensors, and what it returns cannot be told either.
        """
        stopped = ""
        for function in self.functions:
            try:
                with _WithoutData():
                    return without_launches(function)(*args, **kwargs)
            except (
                _NeedsDataError,
                torch._subclasses.fake_tensor.UnsupportedOperatorException,  # it calls an op that has no fake kernel
                ImportError,  # it imports its kernels when called, and this machine has no Triton
            ) as error:
                # In words: the error itself would keep the frames that led here, and what is converted with them.
                stopped = f"{type(error).__name__.strip('_')}: {error}"
            except (
                torch._subclasses.fake_tensor.DataDependentOutputException,
                torch._subclasses.fake_tensor.DynamicOutputShapeException,
            ):
                raise  # torch's own signal that sizes are not known here; export asks in a way that takes them
            except GuardOnDataDependentSymNode as error:
                raise self._error(f"it decides by the values of a tensor ({_first_line(error)})") from error
            except PluginError:
                raise
            except Exception as error:
                raise self._error(
                    f"it failed on fake tensors with {type(error).__name__}: {_first_line(error)} (if the arguments "
                    "are wrong, mend the call)"
                ) from error
        return self._guess(stopped, args, kwargs)

    def _guess(self, stopped: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        schema = _schema(self.name)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if first is None or any(str(result.type) != "Tensor" for result in schema.returns):
            why = f"it needs real data ({stopped})"
            raise self._error(f"{why}, and its outputs cannot all be like its first tensor argument")
        self.guessed = True
        made = tuple(torch.empty_like(first, memory_format=torch.contiguous_format) for _ in schema.returns)
        return made[0] if len(made) == 1 else made

    def check(self, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compare what a real call gave with the guess.

        Raises:
            PluginError: they differ in shape, dtype or device.
        """
        if not self.guessed:
            return
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        for index, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
                raise self._error(
                    f"it needs real data, so its outputs were taken to be like its first tensor argument, "
                    f"{tuple(first.shape)} {first.dtype} on {first.device}; but output {index} is "
                    f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )

    def _error(self, why: str) -> PluginError:
        function = getattr(self.functions[0], "__name__", "function")
        how = _HOW.format(name=self.name, function=function)
        return PluginError(f"The fake kernel of {self.name!r} cannot be derived from {function}(): {why}.\n{how}")


def without_launches(function: Function) -> Function:
    """The function with the Triton kernels that it names, itself or through its helpers, replaced by nothing.

    Only the copy's globals and closure differ, so other threads launch the real kernels meanwhile. What is reached
    otherwise (an attribute of a module, a dict) is launched and then stopped by `_WithoutData`.
    """
    if kernel_type() is None:
        return function
    copy: Function = _copy(function, {})
    return copy


def launches_kernels(function: Function) -> bool:
    """Whether a function, or a helper that it names, launches a Triton kernel."""
    return kernel_type() is not None and _copy(function, {}) is not function


def kernel_type() -> type | None:
    """The base of all Triton kernels; None when Triton is not imported, so that nobody can have written one."""
    module = sys.modules.get("triton.runtime.jit")
    return getattr(module, "KernelInterface", None)


def _copy(function: Any, copies: dict[int, Any]) -> Any:
    """A function whose kernels are gone; the very function if it reaches none."""
    if not isinstance(function, types.FunctionType):
        return function
    if id(function) in copies:
        return copies[id(function)]
    copies[id(function)] = function  # a recursive function reaches itself
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    replaced = {
        name: other
        for name in names & function.__globals__.keys()
        if (other := _replace(function.__globals__[name], copies)) is not function.__globals__[name]
    }
    cells = [_replace_cell(cell, copies) for cell in function.__closure__ or ()]
    changed = any(new is not old for new, old in zip(cells, function.__closure__ or (), strict=True))
    if replaced or changed:
        copy = types.FunctionType(
            function.__code__,
            {**function.__globals__, **replaced},
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copies[id(function)] = copy
    return copies[id(function)]


def _replace(value: Any, copies: dict[int, Any]) -> Any:
    kernel = kernel_type()
    if kernel is not None and isinstance(value, kernel):
        return _Skipped()
    # Helpers of other packages (torch's above all) reach no kernel of this op, and following them takes long.
    if isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] not in _FOREIGN:
        return _copy(value, copies)
    return value


_FOREIGN = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "triton", "numpy"}


def _replace_cell(cell: types.CellType, copies: dict[int, Any]) -> types.CellType:
    try:
        old = cell.cell_contents
    except ValueError:  # not filled yet
        return cell
    new = _replace(old, copies)
    return cell if new is old else types.CellType(new)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of the functions, lambdas and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _schema(name: str) -> Any:
    return torch._C._get_schema(name, "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
