"""Runs the code of a Markdown guide: its files are written, its commands run, and their output compared.

The first line of a fenced block says what it is:

* ``python file=NAME``: written to a file;
* ``console``: commands after ``$``, each with the standard output that it must give; ``...`` stands for any text, and
  spaces count as one. ``status=1`` is the exit status of the last command, 0 if not said.
* ``gpu`` anywhere in it: left out where there is no GPU.
"""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line.
        words: what stands behind the fence.
        text: what it holds.
    """

    line: int
    words: tuple[str, ...]
    text: str

    def option(self, name: str) -> str:
        """The value of ``name=value`` behind the fence, "" without it."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), "")


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text that name a language."""
    words: tuple[str, ...] = ()
    start, lines, inside = 0, [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if inside and words:
                yield Block(start, words, "\n".join(lines) + "\n")
            inside, start, words, lines = not inside, number + 1, tuple(line[3:].split()), []
        elif inside:
            lines.append(line)


class Guide:
    """Runs the blocks of a guide in one folder.

    Args:
        folder: where; files that blocks write stay there for those after them.
        gpu: whether there is one.
    """

    def __init__(self, folder: Path, gpu: bool) -> None:
        self.folder, self.gpu = folder, gpu
        self.outputs: list[str] = []
        programs = folder / ".bin"
        programs.mkdir()
        self._program(programs / "python", '"$@"')
        self._program(programs / "trtbridge", '-c "from trtbridge.bridge.cli import main; main()" "$@"')
        self.environment = dict(os.environ, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", COLUMNS="200")
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def run(self, block: Block) -> str:
        """Run a block.

        Returns:
            What is wrong with it; "" if nothing is.
        """
        if "gpu" in block.words and not self.gpu:
            return ""
        if name := block.option("file"):
            (self.folder / name).write_text(block.text)
            return ""
        if block.words[0] != "console":
            return f"line {block.line}: a block that is neither file=NAME nor console would not be tested"
        commands = [part.partition("\n") for part in f"\n{block.text}".split("\n$ ")[1:]]
        for index, (command, _, want) in enumerate(commands):
            status = int(block.option("status") or 0) if index == len(commands) - 1 else 0
            if problem := self._command(command, want, status):
                return f"line {block.line}: {problem}"
        return ""

    def _command(self, command: str, want: str, status: int) -> str:
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=540
        )
        self.outputs.append(done.stdout)
        if done.returncode != status:
            words = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return f"$ {command}\nended with status {done.returncode} instead of {status}:\n{words}"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(want.strip() + "\n", done.stdout.strip() + "\n", flags):
            return f"$ {command}\ngave:\n{done.stdout}\n{done.stderr[-2000:]}\ninstead of:\n{want}"
        return ""

    @staticmethod
    def _program(path: Path, arguments: str) -> None:
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        path.chmod(0o755)
