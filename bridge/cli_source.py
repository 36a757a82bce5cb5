"""What the command line converts: SOURCE and ``--dim`` made into arguments of convert() and explain()."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ..errors import DynamicShapeError, OptionError, TrtBridgeError
from .dims import Dim

T = TypeVar("T")

RETURNS = (
    "It must take no arguments and return (model, args), (model, args, kwargs), or a dict with the keys of "
    "trtbridge.convert(): model, args, kwargs, dynamic_shapes and options."
)


class SourceError(TrtBridgeError):
    """SOURCE cannot be imported, fails, or returns something else than a model and its inputs."""


@dataclass(frozen=True)
class Source:
    """SOURCE, split but not loaded yet.

    Attributes:
        place: a Python file, a module's dotted name, or an .onnx file.
        function: name of the function in it; "" for an .onnx file.
    """

    place: str
    function: str

    @classmethod
    def parse(cls, text: str) -> Source:
        """Split SOURCE.

        Raises:
            OptionError: it is neither ``module:function`` nor ``file.py:function`` nor an .onnx file.
        """
        if text.lower().endswith(".onnx"):
            return cls(text, "")
        place, _, function = text.rpartition(":")
        if place and all(part.isidentifier() for part in function.split(".")):
            return cls(place, function)
        hint = ""
        if text.endswith(".trtb"):
            hint = " This file is converted already: trtbridge run takes it."
        elif text.endswith(".py"):
            hint = f" Name the function too: {text}:FUNCTION."
        elif text.endswith((".pt", ".pth", ".safetensors")):
            hint = " Weights alone are no model: write a function that builds the model and loads them."
        raise OptionError(f"{text!r} is neither module:function, nor file.py:function, nor an .onnx file.{hint}")

    @property
    def name(self) -> str:
        """What to name the result after."""
        return self.function.rpartition(".")[2] or Path(self.place).stem

    def load(self) -> Request:
        """Import and call the function, if it is one.

        Raises:
            SourceError: there is no such module or function, it fails, or returns the wrong thing.
        """
        if not self.function:
            return Request(self.place)
        is_file = self.place.endswith(".py") or "/" in self.place or "\\" in self.place
        module = _import_file(Path(self.place)) if is_file else _import_module(self.place)
        found: Any = module
        for part in self.function.split("."):
            if not hasattr(found, part):
                names = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
                raise SourceError(
                    f"{self.place} has no {self.function!r}. Its functions: {', '.join(names) or 'none'}."
                )
            found = getattr(found, part)
        return _check_result(self._call(found), self)

    def __str__(self) -> str:
        return f"{self.place}:{self.function}" if self.function else self.place

    def _call(self, function: Any) -> Any:
        if not inspect.isroutine(function):
            raise SourceError(f"{self} is a {type(function).__name__}, not a function. {RETURNS}")
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise SourceError(f"{self} cannot be called without arguments ({error}). {RETURNS}") from error
        except ValueError:
            pass  # Functions written in C have no signature.
        with _blaming(f"{self}()"):
            return function()


@dataclass(frozen=True)
class Request:
    """The arguments of convert() and explain().

    Attributes:
        model: an nn.Module or the path of an .onnx file.
        args, kwargs, dynamic_shapes: as convert() takes them.
        options: backend and options.
    """

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def call(self, function: Callable[..., T], dims: Sequence[DimRequest], options: Mapping[str, Any]) -> T:
        """Call convert() or explain() with this, where what the command line says goes before.

        Args:
            function: trtbridge.convert or trtbridge.explain.
            dims: those of the command line, resolved.
            options: those of the command line.
        """
        shapes = merge_dims(self.dynamic_shapes, dims) if dims else self.dynamic_shapes
        return function(self.model, self.args, self.kwargs, dynamic_shapes=shapes, **{**self.options, **options})


@dataclass(frozen=True)
class DimRequest:
    """One ``--dim``.

    Attributes:
        input: name of the argument, or of the input of an .onnx file.
        axis: which dimension.
        size: its range, the name of a range that another ``--dim`` gives, or one fixed size.
    """

    input: str
    axis: int
    size: Dim | str | int

    @classmethod
    def parse(cls, text: str) -> DimRequest:
        """Read ``INPUT:AXIS=NAME:MIN:OPT:MAX[,MIN:OPT:MAX...]``, ``INPUT:AXIS=NAME`` or ``INPUT:AXIS=SIZE``.

        Raises:
            OptionError: it is not written so, or the range is impossible.
        """
        match = re.fullmatch(r"(.+):(-?\d+)=([^=]+)", text)
        if match is None:
            raise OptionError(f"{text!r} is not INPUT:AXIS=NAME:MIN:OPT:MAX, as in x:0=batch:1:8:32.")
        name, colon, ranges = match[3].partition(":")
        if not colon:
            size: Dim | str | int = int(name) if name.isdecimal() else name
            return cls(match[1], int(match[2]), size)
        profiles = [each.split(":") for each in ranges.split(",")]
        if not all(len(numbers) == 3 and all(number.isdecimal() for number in numbers) for numbers in profiles):
            raise OptionError(
                f"{text!r}: after = comes NAME:MIN:OPT:MAX, three whole numbers, as in batch:1:8:32; several profiles "
                "follow one another, as in batch:1:1:1,2:8:32."
            )
        try:
            spans = [(int(low), int(opt), int(high)) for low, opt, high in profiles]
            return cls(match[1], int(match[2]), Dim(name, *spans[0]) if len(spans) == 1 else Dim(name, profiles=spans))
        except DynamicShapeError as error:
            raise OptionError(f"{text!r}: {error}") from error


def resolve_dims(requests: Sequence[DimRequest]) -> list[DimRequest]:
    """Put the range in place of each name that another ``--dim`` gives one for.

    Raises:
        OptionError: a name has no range, or two.
    """
    ranges: dict[str, Dim] = {}
    for request in requests:
        if isinstance(request.size, Dim) and ranges.setdefault(request.size.name, request.size) != request.size:
            raise OptionError(f"{request.size.name!r} is given with two ranges.")
    resolved = []
    for request in requests:
        size = request.size
        if isinstance(size, str):
            if size not in ranges:
                example = f"{request.input}:{request.axis}={size}:1:8:32"
                raise OptionError(f"{size!r} has no range: give it in one --dim, as in {example}.")
            size = ranges[size]
        resolved.append(DimRequest(request.input, request.axis, size))
    return resolved


def merge_dims(dynamic_shapes: Any, requests: Sequence[DimRequest]) -> dict[str, Any]:
    """The dynamic shapes of a source with those of the command line put over them.

    Raises:
        OptionError: the source's own dynamic shapes are not written by name and dimension.
    """
    if not isinstance(dynamic_shapes, (Mapping, type(None))):
        raise OptionError("--dim goes by argument name, but the function's dynamic_shapes is no dict: change it there.")
    merged = dict(dynamic_shapes or {})
    for request in requests:
        own = merged.get(request.input) or {}
        if not isinstance(own, Mapping) or not all(isinstance(axis, int) for axis in own):
            raise OptionError(
                f"--dim {request.input}:{request.axis}: the function's dynamic_shapes for {request.input!r} is not "
                "{dimension: Dim}, so the two cannot be joined: change it there."
            )
        merged[request.input] = {**own, request.axis: request.size}
    return merged


def import_code(place: str) -> None:
    """Import a module or a Python file for what it registers (plugin ops, classes).

    Raises:
        SourceError: it is not there, or fails.
    """
    if place.endswith(".py"):
        _import_file(Path(place))
    else:
        _import_module(place)


def search_here() -> None:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    _search(Path.cwd())


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import_module(name: str) -> ModuleType:
    search_here()
    try:
        with _blaming(f"import {name}", but=ModuleNotFoundError):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _blame(f"import {name}", error) from error
        raise SourceError(
            f"There is no module {error.name!r}, neither installed nor in {Path.cwd()}. "
            "For a file write path/to/file.py:function."
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError(f"There is no file {path}.")
    path = path.resolve()
    search_here()
    _search(path.parent)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None:  # The file is named like a module that is in use.
        name = f"trtbridge_source_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Saved programs name the classes that a model returns by module.
    try:
        with _blaming(f"import {path.name}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _blaming(what: str, but: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors of the user's code as a SourceError that says where, but for those of some type."""
    try:
        yield
    except but:
        raise
    except (Exception, SystemExit) as error:
        raise _blame(what, error) from error


def _blame(what: str, error: BaseException) -> SourceError:
    lines = [f"{what} failed: {''.join(traceback.format_exception_only(error)).strip()}"]
    frames = traceback.extract_tb(error.__traceback__)
    for frame in [f for f in frames if f.filename != __file__ and "importlib" not in f.filename][-3:]:
        lines.append(f'  "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}')
    if isinstance(error, SystemExit):
        lines.append('Code that ends the process belongs under `if __name__ == "__main__":`.')
    return SourceError("\n".join(lines))


def _check_result(result: Any, source: Source) -> Request:
    if isinstance(result, Mapping):
        options = dict(result)
        missing = object()
        model = options.pop("model", missing)
        if model is missing:
            raise SourceError(f"{source} returned a dict without 'model'; its keys: {list(result)}. {RETURNS}")
        args, kwargs = options.pop("args", ()), options.pop("kwargs", None)
        dynamic_shapes = options.pop("dynamic_shapes", None)
    elif isinstance(result, tuple) and len(result) in (2, 3):
        model, args, kwargs = (*result, None)[:3]
        dynamic_shapes, options = None, {}
    else:
        raise SourceError(f"{source} returned a value of type {type(result).__name__}. {RETURNS}")
    if not isinstance(args, (tuple, list)):
        raise SourceError(f"{source}: args is a {type(args).__name__}; a single argument is written (model, (x,)).")
    if not isinstance(kwargs, (Mapping, type(None))):
        raise SourceError(f"{source}: kwargs is a {type(kwargs).__name__}; it must be a dict.")
    return Request(model, tuple(args), kwargs, dynamic_shapes, options)
