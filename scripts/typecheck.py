"""Type-checks the package against TensorRT's real API: 10.16, 11.4, RTX 1.6 and RTX 1.7, one mypy run each.

A name or an argument that one of the four lacks is an error. The same code is checked each time; what changes is which
stubs stand behind ``import tensorrt`` (scripts/make_stubs.py makes them from the real bindings).

How code that serves both flavours is written, so that the four runs see it:

* For annotations, ``if TYPE_CHECKING: import tensorrt as trt`` at the top of the module. A function that calls the API
  begins with the same import and an ``else`` that names the module of the flavour in hand; classes that derive from one
  of TensorRT's are defined inside such a function::

      if TYPE_CHECKING:
          import tensorrt as trt
      else:
          trt = flavour.module()

* Outside such an ``else`` branch ``trt`` is always followed by a name, as in ``trt.Builder``. Passing the module on or
  giving it another name (``helper(trt)``, ``t = trt``, ``getattr(trt, name)``) hides it from mypy, so this script
  refuses it, and a parameter called ``trt`` too.
* Code for some versions only stands under a condition on one of these names, each declared under TYPE_CHECKING
  (``RTX: bool``); mypy knows their values (always_true, always_false) and skips the other branch: ``RTX`` (either RTX),
  ``TENSORRT_10``, ``TENSORRT_11``, ``RTX_1_6``, ``RTX_1_7``. A function for RTX alone begins with::

      if TYPE_CHECKING and not RTX:
          return

Exit status: 0 clean, 1 errors, 2 the stubs could not be made, 3 because pip reaches no index.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from make_stubs import SETS, NoIndexError, StubError, StubSet, default_cache, make

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "trtbridge"
NOT_PACKAGE = {"tests", "scripts", "build", "dist", "docs", "examples", "typings"}

CONSTANTS = {
    "TensorRT 10.16": {"TENSORRT_10"},
    "TensorRT 11.4": {"TENSORRT_11"},
    "TensorRT-RTX 1.6": {"RTX", "RTX_1_6"},
    "TensorRT-RTX 1.7": {"RTX", "RTX_1_7"},
}
"""What is true in each run; all other names in this table are false in it."""


def check(root: Path, stubs: Path, cache: Path) -> list[str]:
    """Checks the package whose files lie in a folder.

    Args:
        root: the folder that is the package (it has ``__init__.py``).
        stubs: folder of the stub sets; missing ones are made.
        cache: folder for mypy's cache and the package's stand-in.

    Returns:
        The errors, each once, with the sets that it is an error for.

    Raises:
        StubError: the stubs could not be made.
    """
    errors = [f"{error}  [all sets]" for path in _modules(root) for error in hidden_uses(path, root)]
    search_path = cache / "src"
    _stand_in(root, search_path / PACKAGE)
    found: dict[str, list[str]] = {}
    for one, folder in zip(SETS, make(stubs), strict=True):
        started = time.monotonic()
        lines = _mypy(one, folder, search_path, cache)
        count = sum(": note: " not in line for line in lines)
        print(f"{one.label}: {count} errors ({time.monotonic() - started:.0f} s)", flush=True)
        for line in lines:
            found.setdefault(line, []).append(one.label)
    for line, labels in found.items():
        errors.append(f"{line}  [{'all sets' if len(labels) == len(SETS) else ', '.join(labels)}]")
    return errors


def hidden_uses(path: Path, root: Path) -> list[str]:
    """Places where the TensorRT module is used as a value, which mypy cannot follow."""
    text = path.read_text(encoding="utf-8")
    if "trt" not in text:
        return []
    tree = ast.parse(text)
    runtime = {id(node) for branch in _runtime_branches(tree) for node in ast.walk(branch)}
    followed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    errors = []
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        is_read = isinstance(getattr(node, "ctx", None), ast.Load)
        is_parameter = isinstance(node, ast.arg) and node.arg == "trt"
        if id(node) in runtime or not (is_parameter or (name == "trt" and is_read and id(node) not in followed)):
            continue
        line = getattr(node, "lineno", 0)
        errors.append(
            f"{path.relative_to(root)}:{line}: error: the module trt is used as a value, which hides it from mypy"
        )
    return errors


def _runtime_branches(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that only run outside type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            if test in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                yield from node.orelse
            elif test in {"not TYPE_CHECKING", "not typing.TYPE_CHECKING"}:
                yield from node.body


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0] not in NOT_PACKAGE and not any(part.startswith(".") for part in parts):
            yield path


def _stand_in(root: Path, folder: Path) -> None:
    """Makes a folder with the package's name that links to its files: the repository's own folder has another name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for path in root.iterdir():
        is_part = path.suffix == ".py" or path.name == "py.typed" or (path / "__init__.py").is_file()
        if is_part and path.name not in NOT_PACKAGE:
            (folder / path.name).symlink_to(path)


def _mypy(one: StubSet, stubs: Path, search_path: Path, cache: Path) -> list[str]:
    """Runs mypy with one set of stubs; the cache is shared, so that torch and the like are read once."""
    true = CONSTANTS[one.label]
    false = set().union(*CONSTANTS.values()) - true
    # As per-module options: global ones would make mypy read everything else anew for each set.
    section = f'\n[[tool.mypy.overrides]]\nmodule = ["{PACKAGE}", "{PACKAGE}.*"]\n'
    section += f"always_true = {sorted(true)}\nalways_false = {sorted(false)}\n"
    config = cache / "pyproject.toml"
    config.write_text((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8") + section, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(cache / "mypy")]
    command += ["--no-error-summary", "--hide-error-context", "--package", PACKAGE]
    env = dict(os.environ, MYPYPATH=os.pathsep.join([str(search_path), str(stubs)]))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=search_path)
    lines = [line.removeprefix(f"{PACKAGE}/") for line in done.stdout.splitlines()]
    if done.returncode not in {0, 1} or (done.returncode and not lines):
        lines.append(f"mypy ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return lines


def main() -> int:
    """Runs the four checks from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the package's folder (default: %(default)s)")
    parser.add_argument("--stubs", type=Path, default=default_cache(), help="folder for stubs (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for mypy's cache (default: beside the stubs)")
    options = parser.parse_args()
    root = options.root.resolve()
    key = hashlib.sha256(str(root).encode()).hexdigest()[:12]
    cache = options.cache or options.stubs.parent / "typecheck" / key
    started = time.monotonic()
    try:
        errors = check(root, options.stubs.resolve(), cache.resolve())
    except StubError as problem:
        print(f"typecheck: {problem}", file=sys.stderr)
        return 3 if isinstance(problem, NoIndexError) else 2
    for error in errors:
        print(error)
    seconds = time.monotonic() - started
    count = sum(": note: " not in error for error in errors)
    print(f"typecheck: {count} errors against {len(SETS)} versions of TensorRT's API, {seconds:.0f} s")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
