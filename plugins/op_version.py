"""What version of a plugin op is registered in this process: a digest that changes when its implementation does.

For functions that `plugin` or ``torch.library.custom_op`` registered it is their source, with that of the functions,
Triton kernels and constants that they use; for ``torch.library.Library`` that of the file that registers; for code that
is no Python the distribution's version, or the shared libraries that were loaded. A comment that changes counts as a
change: an engine is then built once more, which is better than one that is out of date.
"""

from __future__ import annotations

import dis
import hashlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch._library.simple_registry import singleton

from .registry import find_op

_TORCHS_OWN = {"aten", "prim", "prims", "python", "higher_order"}
_FOREIGN = {"torch", "triton", "numpy", "builtins", *sys.stdlib_module_names}
"""Packages whose functions have a version of their own, or change with Python."""

_INSTALLED = {"site-packages", "dist-packages"}
_PLACE = re.compile(r"registered at (.+?):\d+")
_TORCH = str(Path(torch.__file__).parent)
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def op_version(name: str) -> str:
    """A digest of an op's implementation.

    Args:
        name: the op's full name ("demo::soft_sign.default").

    Returns:
        The same in every process where the same code is registered, on any day.

    Raises:
        PluginError: no such op is registered in this process.
    """
    op = find_op(name)
    parts = [name, f"torch {torch.__version__}"]
    namespace = name.partition("::")[0]
    if isinstance(op, torch._ops.OpOverload):
        parts.append(str(op._schema))
    if namespace not in _TORCHS_OWN:
        parts += _implementation(name.partition(".")[0])
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def function_version(*functions: Callable[..., Any]) -> str:
    """A digest of the source of functions and of what they use of the same project."""
    return hashlib.sha256("\0".join(_sources(functions)).encode()).hexdigest()


def _implementation(name: str) -> list[str]:
    definition = OPDEFS.get(name)
    if definition is not None:
        return list(_sources(_registered_with(definition)))
    places = sorted({*_PLACE.findall(torch._C._dispatch_dump(name)), *_fake_places(name)})
    files = [Path(place) for place in places if not place.startswith(_TORCH)]
    sources = [file for file in files if file.suffix == ".py" and file.is_file()]
    if sources and len(sources) == len(files):
        return [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sources]
    return [*(hashlib.sha256(file.read_bytes()).hexdigest() for file in sources), *_compiled(name.partition("::")[0])]


def _registered_with(definition: CustomOpDef) -> list[Any]:
    """The functions behind an op of ``torch.library.custom_op``."""
    kernels = [function for _, function in sorted(definition._backend_fns.items(), key=lambda entry: str(entry[0]))]
    return [definition._init_fn, *kernels, *filter(None, [definition._abstract_fn])]


def _fake_places(name: str) -> list[str]:
    kernel = singleton.find(name).fake_impl.kernel
    return [] if kernel is None else [kernel.source.rpartition(":")[0]]


def _compiled(namespace: str) -> list[str]:
    """Of ops that are no Python: the version of the distribution with the namespace's name, else the libraries."""
    distributions = importlib.metadata.packages_distributions().get(namespace, [])
    if distributions:
        return sorted(f"{one} {importlib.metadata.version(one)}" for one in distributions)
    libraries = sorted(Path(library) for library in torch.ops.loaded_libraries)
    return [hashlib.sha256(library.read_bytes()).hexdigest() for library in libraries if library.is_file()]


def _sources(functions: Sequence[Any]) -> Iterator[str]:
    """The texts of some functions and of all that they reach, each once, in an order that is always the same."""
    pending, seen = list(functions), set()
    homes = {_package(_module_of(inspect.unwrap(one) if callable(one) else one)) for one in functions} - _FOREIGN
    while pending:
        value = pending.pop(0)
        if isinstance(value, types.MethodType):
            value = value.__func__
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, CustomOpDef):
            pending += _registered_with(value)
        elif isinstance(value, types.FunctionType):
            inner = inspect.unwrap(value)
            if inner is not value:
                pending.append(inner)  # what wraps it is torch's or ours
                continue
            yield _text(value)
            found, constants = _reached(value, homes)
            pending += found
            yield from constants
            yield from _imported(value, homes)
        elif isinstance(value, type):
            yield _class_text(value)
            pending += [method for method in vars(value).values() if isinstance(method, types.FunctionType)]
        elif hasattr(value, "fn"):  # Triton's JITFunction, and its autotuner and heuristics, which hold one
            yield from (str(config) for config in getattr(value, "configs", None) or ())
            pending.append(value.fn)


def _reached(function: types.FunctionType, homes: set[str]) -> tuple[list[Any], list[str]]:
    """What a function's code names: functions, kernels and classes of its project, and constants as text."""
    found: list[Any] = []
    constants: list[str] = []
    modules: set[types.ModuleType] = set()
    names = list(dict.fromkeys(_names(function.__code__)))

    def take(name: str, value: Any) -> None:
        value = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
        if isinstance(value, _CONSTANTS):
            constants.append(f"{name} = {value!r}")
        elif isinstance(value, (tuple, list, frozenset, set)):
            texts = [repr(entry) for entry in value if isinstance(entry, _CONSTANTS)]
            constants.append(f"{name} = {sorted(texts) if isinstance(value, (set, frozenset)) else texts}")
        elif isinstance(value, types.ModuleType):
            if value in modules:
                return
            modules.add(value)
            if _is_foreign(value.__name__, homes):
                constants.append(_release(value.__name__))
                return
            for inner in names:
                if inner in vars(value):
                    take(f"{name}.{inner}", vars(value)[inner])
        elif _is_foreign(_module_of(value), homes):
            constants.append(_release(_module_of(value)))
        else:
            found.append(value)

    for name in names:
        if name in function.__globals__:
            take(name, function.__globals__[name])
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            take(name, cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    for index, value in enumerate(function.__defaults__ or ()):
        take(f"default {index}", value)
    for name, value in sorted((function.__kwdefaults__ or {}).items()):
        take(f"default {name}", value)
    return found, [constant for constant in constants if constant]


def _imported(function: types.FunctionType, homes: set[str]) -> Iterator[str]:
    """The files of modules of its project that a function imports when it is called: all of each."""
    package = str(function.__globals__.get("__package__") or "")
    parents = [package.rsplit(".", up)[0] for up in range(package.count(".") + 1)] if package else []
    for wanted in dict.fromkeys(_imports(function.__code__)):
        if _package(wanted) in _FOREIGN:
            continue
        for name in (*(f"{parent}.{wanted}" for parent in parents), wanted):
            try:
                spec = importlib.util.find_spec(name)
            except (ImportError, ValueError, AttributeError):
                continue
            if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
                if _is_foreign(name, homes):
                    yield _release(name)
                    break
                yield f"{wanted} {hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()}"
                break


def _imports(code: types.CodeType) -> Iterator[str]:
    """Names of modules in the import statements of a function; for ``from . import a`` also ``a``."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"]
    yield from filter(None, names)
    if "" in names:
        yield from (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_FROM")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _module_of(value: Any) -> str:
    return str(getattr(getattr(value, "fn", value), "__module__", "") or "")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_foreign(module: str, homes: set[str]) -> bool:
    """Whether a module is of another project, installed beside this one: its release counts, not its source."""
    package = _package(module)
    if package in homes:
        return False
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _FOREIGN or package == _package(__name__) or bool(_INSTALLED & set(Path(file).parts))


def _release(module: str) -> str:
    """The release of another project; that of torch counts anyway, and that of Python does not."""
    package = _package(module)
    try:
        return f"{package} {importlib.metadata.version(package)}" if package not in _FOREIGN else ""
    except importlib.metadata.PackageNotFoundError:
        return f"{package} {getattr(sys.modules.get(package), '__version__', '')}"


def _text(function: types.FunctionType) -> str:
    try:
        return f"{function.__qualname__}\n{inspect.getsource(function)}"
    except (OSError, TypeError):  # typed at a prompt, or made by exec
        return f"{function.__qualname__}\n{_code_text(function.__code__)}"


def _class_text(value: type) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return value.__qualname__


def _code_text(code: types.CodeType) -> str:
    """A function's code where there is no source: its instructions, which are those of this version of Python."""
    constants = [
        _code_text(constant)
        if isinstance(constant, types.CodeType)
        else repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
        for constant in code.co_consts
    ]
    return "\n".join([code.co_code.hex(), repr(code.co_names), repr(code.co_varnames), *constants])
