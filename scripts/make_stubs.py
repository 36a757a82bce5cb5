"""Makes type stubs from the real Python bindings of TensorRT and TensorRT-RTX, without a GPU or their libraries.

The bindings are small wheels (1.2 MB each), but they link against libraries of several hundred MB. Reading classes,
enums and signatures calls nothing in those libraries, so they are replaced by empty ones compiled here: nine symbols
each. The bindings then import, pybind11-stubgen reads them, and what it prints is repaired until a type checker can
hold code to it.

    python scripts/make_stubs.py [--out FOLDER] [--force]

writes FOLDER/<dist>-<version>-v<format>/<package>/__init__.pyi for each of the four sets; one that is there already is
left as it is. A TensorRT-RTX set also has a package ``tensorrt`` that is the same as its ``tensorrt_rtx``, so that code
that imports ``tensorrt`` while type checking can be held to either flavour by the choice of one folder.
The submodule ``tensorrt.plugin`` is pure Python and not part of the stubs.
"""

from __future__ import annotations

import argparse
import ast
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

STUB_FORMAT = 1
"""Raised when this script would write other stubs for the same wheel, so that stubs cached before are made again."""

SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""What the four bindings need at import. One that needs more fails to import, and the loader names the symbol."""

LIBRARY_NAME = re.compile(rb"lib(?:nvinfer|nvonnxparser|tensorrt)\w*\.so\.\d+")


class StubError(Exception):
    """Stubs could not be made; the message says what to do."""


class NoIndexError(StubError):
    """pip could not download the wheels."""


@dataclass(frozen=True)
class StubSet:
    """One binding wheel that the code is held to.

    Attributes:
        package: import name that the stubs carry, as users write it ("tensorrt").
        dist: the wheel's name on PyPI.
        version: its exact version.
        label: short name for reports.
    """

    package: str
    dist: str
    version: str
    label: str

    @property
    def bindings(self) -> str:
        """The package inside the wheel, which `package` re-exports."""
        return f"{self.package}_bindings"

    def folder(self, out: Path) -> Path:
        """Where the stubs lie: the folder to put on MYPYPATH."""
        return out / f"{self.dist}-{self.version}-v{STUB_FORMAT}"


SETS = (
    StubSet("tensorrt", "tensorrt-cu13-bindings", "10.16.1.11", "TensorRT 10.16"),
    StubSet("tensorrt", "tensorrt-cu13-bindings", "11.4.0.106", "TensorRT 11.4"),
    StubSet("tensorrt_rtx", "tensorrt-rtx-cu13-bindings", "1.6.1.120", "TensorRT-RTX 1.6"),
    StubSet("tensorrt_rtx", "tensorrt-rtx-cu13-bindings", "1.7.1.116", "TensorRT-RTX 1.7"),
)


def default_cache() -> Path:
    """The folder that stubs are kept in: ``$TRTBRIDGE_STUBS``, else ``~/.cache/trtbridge/stubs``."""
    chosen = os.environ.get("TRTBRIDGE_STUBS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtbridge" / "stubs"


def make(out: Path, force: bool = False, sets: tuple[StubSet, ...] = SETS) -> list[Path]:
    """Makes the stubs that are missing.

    Args:
        out: folder for all sets.
        force: make them again even if they are there.
        sets: which ones.

    Returns:
        One folder a set, in the order of `sets`.

    Raises:
        NoIndexError: pip cannot download the wheels.
        StubError: there is no C compiler, a binding does not import, or what it holds and what the stubs say differ.
    """
    for one in sets:
        marker = one.folder(out) / "tensorrt" / "__init__.pyi"
        if marker.is_file() and not force:
            continue
        with tempfile.TemporaryDirectory(prefix="trtbridge-stubs-") as work:
            text = _stub_text(one, Path(work))
        main_stub = one.folder(out) / one.package / "__init__.pyi"
        _write(main_stub, text)
        if main_stub != marker:
            _write(marker, f"from {one.package} import *\nfrom {one.package} import __version__ as __version__\n")
        print(f"made {main_stub} ({len(text) // 1024} KB)", flush=True)
    return [one.folder(out) for one in sets]


def _write(path: Path, text: str) -> None:
    """Writes the file whole or not at all: several test workers may get here at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)


def _stub_text(one: StubSet, work: Path) -> str:
    wheel = _download(one, work)
    site = work / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    libraries = work / "lib"
    libraries.mkdir()
    _compile_libraries(next((site / one.bindings).glob("*.so")), libraries)
    raw, known = _read_bindings(one, site, libraries, work)
    text = Repair(raw, f"{one.dist} {one.version}", known["setters"]).text()
    _compare_names(one, text, known["names"])
    return text


def _download(one: StubSet, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(work), f"{one.dist}=={one.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NoIndexError(
            f"pip could not download {one.dist}=={one.version} for Python {version}. The stubs need a package index "
            f"that has it. pip said:\n{done.stderr.strip()}"
        )
    return wheels[0]


def _compile_libraries(binding: Path, out: Path) -> None:
    """Compiles a library of empty functions for each TensorRT library that the binding names."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise StubError("no C compiler found (tried $CC, cc, gcc, clang): install one, such as Debian's package gcc.")
    source = out / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in sorted({match.decode() for match in LIBRARY_NAME.findall(binding.read_bytes())}):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(out / name), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StubError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


# Runs in a child process with the wheel and the empty libraries on its paths.
_READER = """
import importlib, json, sys
bindings, out = sys.argv[1:]
sys.modules[bindings.replace("_bindings", "_libs")] = None  # installed real libraries must not come in between
from pybind11_stubgen import main
main([bindings, bindings + "." + bindings.removesuffix("_bindings"), "-o", out, "--print-invalid-expressions-as-is"])
module = importlib.import_module(bindings)
def public(thing):
    return sorted(name for name in dir(thing) if not name.startswith("_"))
names = {name: public(value) if isinstance(value, type) else None
         for name, value in vars(module).items()
         if not name.startswith("_") and type(value).__name__ != "module"}
# pybind11-stubgen passes over properties that can only be set; their setters' documentation has the type.
setters = {name: {key: prop.fset.__doc__ for key, prop in vars(value).items()
                  if isinstance(prop, property) and prop.fget is None and prop.fset}
           for name, value in vars(module).items() if isinstance(value, type)}
open(out + "/names.json", "w").write(json.dumps({"names": names, "setters": setters}))
"""


def _read_bindings(one: StubSet, site: Path, libraries: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """Runs pybind11-stubgen on the binding.

    Returns:
        The stub as printed, and what the binding really has: "names" at module level with those of each class, and
        "setters", the documentation of each class's write-only properties.
    """
    out = work / "raw"
    env = dict(os.environ, PYTHONPATH=str(site), LD_LIBRARY_PATH=str(libraries), PYTHONWARNINGS="ignore")
    done = subprocess.run(
        [sys.executable, "-c", _READER, one.bindings, str(out)], capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise StubError(f"{one.dist} {one.version} could not be read:\n{done.stderr.strip()[-3000:]}")
    known = json.loads((out / "names.json").read_text())
    return (out / one.bindings / f"{one.package}.pyi").read_text(), known


HEADER = '''"""Made from the real bindings of {name} by scripts/make_stubs.py; not to be edited."""

import builtins
import collections.abc
import numpy
import typing
import typing_extensions

# What the bindings themselves are loose about: overloads that repeat, overrides with other types.
# mypy: disable-error-code="override, overload-cannot-match, assignment, type-arg, misc"

__version__: str
'''

# The package's own Python code on top of the binding. Context managers are left out: they are deprecated and warn.
PYTHON_LEVEL = """
def volume(iterable: collections.abc.Iterable[typing.SupportsIndex]) -> builtins.int: ...
def nptype(trt_type: DataType) -> builtins.type[typing.Any]: ...
"""

# pybind11 converts these by itself, so arguments may have more types than the signature says.
CONVERTED = {
    "Dims": "Dims | collections.abc.Sequence[typing.SupportsIndex]",
    "Permutation": "Permutation | collections.abc.Sequence[typing.SupportsIndex]",
    "Weights": "Weights | numpy.ndarray[typing.Any, typing.Any]",
    "FallbackString": "FallbackString | builtins.str",
    # A raw pointer. Any bound object goes, and nothing that Python code could hold has this type.
    "typing_extensions.CapsuleType": "typing.Any",
}

# Where pybind11 printed an expression of its own in place of a type.
RETURNS = {"get_plugin_registry": "IPluginRegistry"}

# Classes with the buffer protocol. Only from Python 3.12 on can that be seen in the class, as an untyped __buffer__.
BUFFERS = {"IHostMemory"}

LEFT_OUT = {"__enter__", "__exit__", "__del__", "__buffer__", "__release_buffer__"}

# The package's Python code on top of the binding, which is in PYTHON_LEVEL or is no use to anyone.
IGNORED_NAMES = {"attr", "value", "common_enter", "common_exit", "volume", "nptype"}


class Repair:
    """Turns what pybind11-stubgen prints for TensorRT into a stub that a type checker takes at its word.

    Each repair is here because of something seen: C++ names in signatures, parameters called ``in``, a module variable
    called ``bool``, ``x: T = None``, ``self`` annotated as another class, enums copied into subclasses.
    """

    def __init__(self, raw: str, name: str, setters: Mapping[str, Mapping[str, str]]) -> None:
        self._name = name
        self._setters = setters
        lines = [_parseable(line) for line in raw.splitlines()]
        self._tree = ast.parse("\n".join(lines))
        self._classes = {node.name for node in self._tree.body if isinstance(node, ast.ClassDef)}

    def text(self) -> str:
        """The stub."""
        body: list[ast.stmt] = []
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef):
                body.append(self._class(node))
            elif isinstance(node, ast.FunctionDef):
                body.append(self._function(node, in_class=None))
            elif isinstance(node, ast.AnnAssign) and not _target(node).startswith("__"):
                body.append(self._variable(node))
        module = ast.fix_missing_locations(ast.Module(body, []))
        return HEADER.format(name=self._name) + PYTHON_LEVEL + ast.unparse(module) + "\n"

    def _class(self, node: ast.ClassDef) -> ast.ClassDef:
        body: list[ast.stmt] = []
        if _is_interface(node):
            # TensorRT calls these methods on Python subclasses, and passes real numbers.
            node = cast("ast.ClassDef", _Numbers().visit(node))
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name not in LEFT_OUT:
                body.append(self._function(item, in_class=node.name))
            elif isinstance(item, ast.AnnAssign):
                body.append(self._variable(item))
            elif isinstance(item, ast.ClassDef) and not (node.name == "Logger" and item.name == "Severity"):
                # Logger.Severity is ILogger.Severity, which the subclass inherits; a copy would be another type.
                body.append(self._class(item))
        for name, documentation in self._setters.get(node.name, {}).items():
            match = re.search(r"arg1: ([\w.]+)\)", documentation)
            if match is None:
                raise StubError(f"cannot read the type of {node.name}.{name} from {documentation!r}")
            annotation = re.sub(r"^\w+_bindings\.\w+\.", "", match[1])
            body.append(self._variable(cast("ast.AnnAssign", _statement(_parseable(f"{name}: {annotation}")))))
        if node.name in BUFFERS:
            body.append(_statement("def __buffer__(self, flags: builtins.int, /) -> builtins.memoryview: ..."))
        body.extend(_iteration(body))
        node.body = body or [_statement("...")]
        return node

    def _variable(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = self._type(node.annotation)
        node.value = None
        return node

    def _function(self, node: ast.FunctionDef, in_class: str | None) -> ast.FunctionDef:
        arguments = node.args
        static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
        if in_class and not static:
            self._fix_self(arguments)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        defaults = _defaults(arguments)
        for argument in every:
            if argument.annotation is None:
                continue
            converted = CONVERTED.get(ast.unparse(argument.annotation))
            annotation = _expression(converted) if converted else self._type(argument.annotation)
            default = defaults.get(argument.arg)
            if isinstance(default, ast.Constant) and default.value is None:
                annotation = _expression(f"{ast.unparse(annotation)} | None")
            argument.annotation = annotation
        arguments.defaults = [_expression("...") for _ in arguments.defaults]
        arguments.kw_defaults = [default and _expression("...") for default in arguments.kw_defaults]
        if node.name in RETURNS and in_class is None:
            node.returns = _expression(RETURNS[node.name])
        elif node.returns is not None:
            node.returns = self._type(node.returns)
        elif node.name == "itemsize":
            node.returns = _expression("builtins.float")
        else:
            raise StubError(f"no return type: {in_class or ''}.{node.name}")
        if node.name in {"__eq__", "__ne__"} and not _is_overload(node):
            arguments.args[1].annotation = _expression("builtins.object")
        node.body = [_statement("...")]
        return node

    def _fix_self(self, arguments: ast.arguments) -> None:
        """Gives a method a plain ``self``; the binding sometimes says another class, or forgets it."""
        first = arguments.args[0] if arguments.args and not arguments.posonlyargs else None
        if arguments.posonlyargs:
            arguments.posonlyargs[0].annotation = None
        elif first is None or first.arg not in {"self", "cls"}:
            arguments.args.insert(0, ast.arg("self"))
        elif first.annotation is not None and ast.unparse(first.annotation) == "typing.SupportsInt":
            first.arg = "arg0"
            arguments.args.insert(0, ast.arg("self"))
        else:
            first.annotation = None

    def _type(self, annotation: ast.expr) -> ast.expr:
        """An annotation with C++ names resolved and builtins spelled so that module variables cannot hide them."""
        resolved: ast.expr = _Types(self._classes).visit(annotation)
        return ast.fix_missing_locations(resolved)


class _Types(ast.NodeTransformer):
    BUILTINS = frozenset(
        {"bool", "int", "float", "str", "bytes", "list", "tuple", "dict", "object", "slice", "memoryview", "type"}
    )

    def __init__(self, classes: set[str]) -> None:
        self._classes = classes

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Resolves a bare name."""
        if node.id in self.BUILTINS:
            return _expression(f"builtins.{node.id}")
        if node.id in self._classes or node.id in {"typing", "typing_extensions", "collections", "numpy", "builtins"}:
            return node
        # C++ knows IBuilder and IParserError by their interface, Python as Builder and ParserError.
        if node.id.startswith("I") and node.id[1:] in self._classes:
            return _expression(node.id[1:])
        raise StubError(f"a signature names {node.id!r}, which the binding does not have")

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """An int parameter takes what has ``__index__``; SupportsInt lets floats through, which pybind11 refuses."""
        if ast.unparse(node) == "typing.SupportsInt":
            return _expression("typing.SupportsIndex")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """Leaves None and Literal values."""
        return node


class _Numbers(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """What pybind11 prints for a number that it converts becomes the number itself."""
        numbers = {"typing.SupportsInt": "int", "typing.SupportsFloat": "float"}
        return _expression(numbers.get(ast.unparse(node), ast.unparse(node)))


def _is_interface(node: ast.ClassDef) -> bool:
    """Whether Python code derives from the class: it is called I... and can be made without arguments."""
    constructors = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
    return node.name.startswith("I") and any(len(item.args.args) == 1 for item in constructors)


def _parseable(line: str) -> str:
    """Repairs one line of raw output until Python can parse it."""
    line = re.sub(r"\b(?:nvinfer1|nvonnxparser)::(?:v_\w+::)?(\w+)", r"\1", line)
    # The names that newer Pythons print, which mypy does not know when it checks for an older one.
    line = re.sub(r"\bcollections\.abc\.Buffer\b", "typing_extensions.Buffer", line)
    line = re.sub(r"(?<!_)\btypes\.CapsuleType\b", "typing_extensions.CapsuleType", line)
    if not line.lstrip().startswith("def "):
        return line
    line = re.sub(r"-> detail::.*:$", "-> object:", line)
    line = re.sub(r"= <[^>]*>", "= ...", line)
    match = re.match(r"(\s*def \w+)\((.*)\)( -> .*:|:)$", line)
    if match is None:
        return line
    arguments = _split(match[2])
    for index, argument in enumerate(list(arguments)):
        name = argument.split(":")[0].strip()
        if keyword.iskeyword(name):
            # Python cannot pass it by name: it and what stands before it are positional.
            arguments[index] = argument.replace(name, f"{name}_", 1)
            arguments.insert(index + 1, "/")
    # C++ allows a required argument after optional ones. All are made required: too strict rather than too loose.
    required = [
        index for index, argument in enumerate(arguments) if " = " not in argument and argument not in {"*", "/"}
    ]
    if required and "*" not in match[2]:
        for index in range(required[-1]):
            arguments[index] = arguments[index].split(" = ")[0]
    return f"{match[1]}({', '.join(arguments)}){match[3]}"


def _split(arguments: str) -> list[str]:
    """Splits at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(arguments[start:index].strip())
            start = index + 1
    last = arguments[start:].strip()
    return [*parts, last] if last else parts


def _defaults(arguments: ast.arguments) -> dict[str, ast.expr]:
    positional = [*arguments.posonlyargs, *arguments.args]
    found = {}
    if arguments.defaults:
        found = {
            arg.arg: value
            for arg, value in zip(positional[-len(arguments.defaults) :], arguments.defaults, strict=True)
        }
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if value is not None:
            found[arg.arg] = value
    return found


def _iteration(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """``__iter__`` for a class that Python iterates by length and index, which type checkers do not know."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for item in body:
        if isinstance(item, ast.FunctionDef):
            methods.setdefault(item.name, []).append(item)
    if "__getitem__" in methods and "__len__" in methods and "__iter__" not in methods:
        for item in methods["__getitem__"]:
            annotation = item.args.args[1].annotation
            if annotation is not None and item.returns is not None and "SupportsIndex" in ast.unparse(annotation):
                returns = ast.unparse(item.returns)
                yield _statement(f"def __iter__(self) -> collections.abc.Iterator[{returns}]: ...")
                return


def _is_overload(node: ast.FunctionDef) -> bool:
    return any("overload" in ast.unparse(item) for item in node.decorator_list)


def _target(node: ast.AnnAssign) -> str:
    return node.target.id if isinstance(node.target, ast.Name) else ""


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _statement(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


def _compare_names(one: StubSet, text: str, names: dict[str, list[str] | None]) -> None:
    """Raises StubError unless the stub has exactly the public names that the binding has."""
    tree = ast.parse(text)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def own(node: ast.ClassDef) -> set[str]:
        found = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.ClassDef))}
        found |= {_target(item) for item in node.body if isinstance(item, ast.AnnAssign)}
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in classes:
                found |= own(classes[base.id])
        return {name for name in found if not name.startswith("_")}

    top = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    top |= {_target(node) for node in tree.body if isinstance(node, ast.AnnAssign)}
    real = set(names) - IGNORED_NAMES
    problems = [f"{name}" for name in sorted(real ^ (top - IGNORED_NAMES - {"__version__"}))]
    for name, members in names.items():
        if members is not None and name in classes:
            problems += [f"{name}.{member}" for member in sorted(set(members) ^ own(classes[name]))]
    if problems:
        raise StubError(f"{one.dist} {one.version}: stub and binding differ in {', '.join(problems)}")


def main() -> int:
    """Makes the stubs from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=default_cache(), help="folder for the stubs (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make them again even if they are there")
    options = parser.parse_args()
    try:
        folders = make(options.out, options.force)
    except StubError as error:
        platform = sysconfig.get_platform()
        print(f"make_stubs ({platform}): {error}", file=sys.stderr)
        return 1
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
