"""A shared library that gives a loaded library a second name: nothing in it but the name and what it stands for.

The dynamic loader answers ``dlopen("libx.so")`` with a library that is loaded already and carries that name as its
SONAME; symbols asked of it are looked up in the libraries that it needs. So an empty library with SONAME ``libx.so``
that needs ``libx.so.1`` makes the first name work in a process that runs already. Layout: the ELF-64 specification
(System V ABI, chapters 4 and 5).
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from pathlib import Path

_HEADER, _SEGMENT, _SYMBOL = 64, 56, 24  # sizes of Elf64_Ehdr, Elf64_Phdr, Elf64_Sym
_LOAD, _DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_ALIGNMENT = 0x10000  # the largest page size in use
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 4, 5, 6, 10, 11, 14


def load_alias(name: str, library: Path) -> None:
    """Make a name stand for a library that is loaded in this process.

    Args:
        name: the new name ("libx.so").
        library: file of the loaded library; its SONAME is its file name.

    Raises:
        OSError: this system does not load it, for one where no folder for temporary files may hold programs.
    """
    with library.open("rb") as file:
        content = alias_library(name, library.name, file.read(_HEADER))
    last = f"there is no folder to load {name} from"
    for folder in (tempfile.gettempdir(), "/dev/shm", "/var/tmp"):
        try:
            with tempfile.TemporaryDirectory(prefix="trtbridge-", dir=folder) as place:
                alias = Path(place) / name
                alias.write_bytes(content)
                ctypes.CDLL(str(alias))  # stays loaded; the file is not needed any more
                return
        except OSError as error:
            last = str(error)
    raise OSError(last)


def alias_library(name: str, needed: str, header: bytes) -> bytes:
    """The library's file.

    Args:
        name: its SONAME.
        needed: SONAME of the library that it stands for.
        header: ELF header of that library, for the machine that it is for.

    Raises:
        OSError: that is no ELF-64 library.
    """
    if header[:5] != b"\x7fELF\x02":
        raise OSError(f"{needed} is no 64-bit ELF library")
    order = "<" if header[5] == 1 else ">"
    machine, flags = struct.unpack_from(f"{order}H", header, 18)[0], struct.unpack_from(f"{order}I", header, 48)[0]
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    symbols_at = _HEADER + 3 * _SEGMENT
    hash_at = symbols_at + _SYMBOL  # one symbol, the null symbol
    strings_at = hash_at + 16
    dynamic_at = (strings_at + len(strings) + 15) // 16 * 16
    entries = [
        (_NEEDED, 2 + len(name)), (_SONAME, 1), (_HASH, hash_at), (_STRTAB, strings_at), (_SYMTAB, symbols_at),
        (_STRSZ, len(strings)), (_SYMENT, _SYMBOL), (0, 0),
    ]  # fmt: skip
    dynamic = b"".join(struct.pack(f"{order}qQ", *entry) for entry in entries)
    size = dynamic_at + len(dynamic)

    def segment(kind: int, at: int, size: int, alignment: int) -> bytes:
        return struct.pack(f"{order}IIQQQQQQ", kind, _READ_WRITE, at, at, at, size, size, alignment)

    parts = [
        header[:16],
        # Type ET_DYN, version 1, no entry point, segments right behind, no sections.
        struct.pack(f"{order}HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, flags, _HEADER, _SEGMENT, 3, 64, 0, 0),
        segment(_LOAD, 0, size, _ALIGNMENT),
        segment(_DYNAMIC, dynamic_at, len(dynamic), 8),
        segment(_GNU_STACK, 0, 0, 16),  # without it the loader would make the stack executable
        bytes(_SYMBOL),
        struct.pack(f"{order}IIII", 1, 1, 0, 0),
        strings.ljust(dynamic_at - strings_at, b"\0"),
        dynamic,
    ]
    return b"".join(parts)
