"""Nested arguments and results taken apart into flat leaves, and put together again; storable as JSON.

torch's pytree does this in memory, but knows no dataclasses until each is registered and cannot store every context.
Here tuples, lists, dicts, named tuples, dataclasses (transformers' ModelOutput among them) and None are structure,
types registered with torch's pytree are honoured, and all else is a leaf.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError, ModelFileError

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict}
_SEQUENCES = {"tuple": tuple, "list": list}


@dataclass(frozen=True)
class Structure:
    """One node of a nested value.

    Attributes:
        kind: "tensor" (a flat leaf), "number" (a flat leaf that is a Python number to the user: a size that follows a
            dynamic dimension), "constant" (a fixed value), "tuple", "list", "dict", "OrderedDict",
            "namedtuple", "dataclass", "mapping" (a dict subclass), or "pytree" (registered with torch).
        children: the parts.
        keys: for dict kinds the keys, for dataclasses the field names, as long as children.
        value: a constant's value; for pytree kinds its context.
        type: the class of a namedtuple, dataclass, mapping or pytree node.
    """

    kind: str
    children: tuple[Structure, ...] = ()
    keys: tuple[Any, ...] = ()
    value: Any = None
    type: type | None = None

    @property
    def leaf_count(self) -> int:
        """Number of tensors."""
        return 1 if self.kind in ("tensor", "number") else sum(child.leaf_count for child in self.children)

    def constants(self, path: str = "") -> Iterator[tuple[str, Any]]:
        """(path, value) of every fixed value."""
        if self.kind == "constant":
            yield path, self.value
        for label, child in zip(child_labels(self, path), self.children, strict=True):
            yield from child.constants(label)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The nested value, with these leaves in place of the tensors."""
        iterator = iter(leaves)
        return self._build(iterator)

    def _build(self, leaves: Iterator[Any]) -> Any:
        if self.kind == "tensor":
            return next(leaves)
        if self.kind == "number":
            return next(leaves).item()
        if self.kind == "constant":
            return self.value
        children = [child._build(leaves) for child in self.children]
        if self.kind in _SEQUENCES:
            return _SEQUENCES[self.kind](children)
        if self.kind in _MAPPINGS:
            return _MAPPINGS[self.kind](zip(self.keys, children, strict=True))
        assert self.type is not None
        if self.kind == "namedtuple":
            return self.type(*children)
        if self.kind == "dataclass":
            return _build_dataclass(self.type, dict(zip(self.keys, children, strict=True)))
        if self.kind == "mapping":
            return self.type(zip(self.keys, children, strict=True))
        return pytree.SUPPORTED_NODES[self.type].unflatten_fn(children, self.value)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form.

        Raises:
            ModelFileError: a constant or a pytree context has no JSON form.
        """
        data: dict[str, Any] = {"kind": self.kind}
        if self.children:
            data["children"] = [child.to_json() for child in self.children]
        if self.keys:
            data["keys"] = [_constant_to_json(key) for key in self.keys]
        if self.type is not None:
            data["type"] = f"{self.type.__module__}:{self.type.__qualname__}"
        if self.kind == "constant":
            data["value"] = _constant_to_json(self.value)
        elif self.kind == "pytree":
            data["value"] = _context_to_json(self.type, self.value)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Structure:
        """The inverse of `to_json`.

        Raises:
            ModelFileError: a class that the structure names cannot be imported here.
        """
        kind = data["kind"]
        node_type = _import_type(data["type"]) if "type" in data else None
        value = None
        if kind == "constant":
            value = _constant_from_json(data["value"])
        elif kind == "pytree":
            value = _context_from_json(node_type, data["value"])
        return cls(
            kind,
            tuple(cls.from_json(child) for child in data.get("children", ())),
            tuple(_constant_from_json(key) for key in data.get("keys", ())),
            value,
            node_type,
        )


TENSOR = Structure("tensor")


def flatten(value: Any, numbers: Collection[int] = ()) -> tuple[list[torch.Tensor], Structure]:
    """The tensors of a nested value in order, and its structure.

    Dict entries keep their insertion order.

    Args:
        value: the nested value.
        numbers: ids of 0-d tensors that stand for Python numbers.
    """
    leaves: list[torch.Tensor] = []
    return leaves, _flatten(value, leaves, numbers)


def _flatten(value: Any, leaves: list[torch.Tensor], numbers: Collection[int]) -> Structure:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return Structure("number") if id(value) in numbers else TENSOR
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):  # while tracing only
        dtype = torch.int64 if isinstance(value, torch.SymInt) else torch.float32
        leaves.append(torch.scalar_tensor(value, dtype=dtype))  # type: ignore[arg-type]
        return Structure("number")
    kind, keys, parts, context = _take_apart(value)
    if kind == "constant":
        return Structure("constant", value=value)
    children = tuple(_flatten(part, leaves, numbers) for part in parts)
    named = kind in ("namedtuple", "dataclass", "mapping", "pytree")
    return Structure(kind, children, keys, context, type(value) if named else None)


def _take_apart(value: Any) -> tuple[str, tuple[Any, ...], list[Any], Any]:
    """(kind, keys, parts, pytree context) of one level of a nested value."""
    kind = type(value)
    if kind in (tuple, list):
        return kind.__name__, (), list(value), None
    if kind in (dict, OrderedDict):
        return kind.__name__, tuple(value), list(value.values()), None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple", (), list(value), None
    if isinstance(value, CONSTANTS):
        return "constant", (), [], None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Mapping):  # transformers' ModelOutput: only the entries that are set
            return "dataclass", tuple(value), list(value.values()), None
        fields = tuple(field.name for field in dataclasses.fields(value))
        return "dataclass", fields, [getattr(value, name) for name in fields], None
    if isinstance(value, tuple) and kind not in pytree.SUPPORTED_NODES:  # torch.Size
        return "tuple", (), list(value), None
    if isinstance(value, defaultdict):
        return "dict", tuple(value), list(value.values()), None
    if kind in pytree.SUPPORTED_NODES:
        parts, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        return "pytree", (), list(parts), context
    if isinstance(value, dict):
        return "mapping", tuple(value), list(value.values()), None
    if isinstance(value, Mapping) and hasattr(value, "data"):  # UserDict: transformers' BatchEncoding
        return "dict", tuple(value), list(value.values()), None
    return "constant", (), [], None


def child_labels(structure: Structure, path: str) -> list[str]:
    """How a user would write the path of each child."""
    if structure.kind == "dataclass":
        return [f"{path}.{key}" if path else key for key in structure.keys]
    if structure.keys:
        return [f"{path}[{key!r}]" if path else str(key) for key in structure.keys]
    if structure.kind == "namedtuple":
        fields: Sequence[str] = getattr(structure.type, "_fields", ())
        return [f"{path}.{field}" for field in fields]
    return [f"{path}[{index}]" for index in range(len(structure.children))]


def leaf_labels(structure: Structure, path: str) -> list[str]:
    """How a user would write the path of each tensor."""
    if structure.kind in ("tensor", "number"):
        return [path]
    pairs = zip(child_labels(structure, path), structure.children, strict=True)
    return [label for child_path, child in pairs for label in leaf_labels(child, child_path)]


def matches(value: Any, structure: Structure, path: str, leaves: list[Any]) -> None:
    """Collect the leaves of a value that must have a given structure.

    Args:
        value: the nested value.
        structure: what it must look like.
        path: how the user would write it, for errors.
        leaves: filled with what stands where the structure has tensors.

    Raises:
        InputError: the value differs from the structure; the message names the place.
    """
    if structure.kind in ("tensor", "number"):
        leaves.append(value)
        return
    if structure.kind == "constant":
        # A tensor's comparison is no truth value, so types go first.
        if type(value) is not type(structure.value) or not _same(value, structure.value):
            raise InputError(
                f"Input {path} was fixed at {structure.value!r} by convert() and cannot change to {_brief(value)}. "
                "Non-tensor arguments become part of the engine: pass the same value, or convert again with this one."
            )
        return
    kind, keys, parts, _ = _take_apart(value)
    if kind != structure.kind and {kind, structure.kind} <= {"tuple", "list"}:
        kind = structure.kind
    if kind != structure.kind and {kind, structure.kind} <= {"dict", "OrderedDict", "mapping"}:
        kind = structure.kind
    if kind != structure.kind:
        raise InputError(f"Input {path} must be a {_type_name(structure)} as in convert(), got {_brief(value)}.")
    if structure.keys:
        missing = [key for key in structure.keys if key not in keys]
        extra = [key for key in keys if key not in structure.keys]
        if missing or extra:
            raise InputError(
                f"Input {path}: keys must be {list(structure.keys)} as in convert();"
                + (f" missing {missing}" if missing else "")
                + (f" unexpected {extra}" if extra else "")
            )
        by_key = dict(zip(keys, parts, strict=True))
        parts = [by_key[key] for key in structure.keys]
    elif len(parts) != len(structure.children):
        raise InputError(f"Input {path} must have {len(structure.children)} entries as in convert(), got {len(parts)}.")
    for label, part, child in zip(child_labels(structure, path), parts, structure.children, strict=True):
        matches(part, child, label, leaves)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and a != a:
        return bool(b != b)
    return a is b or bool(a == b)


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _type_name(structure: Structure) -> str:
    return structure.type.__name__ if structure.type is not None else structure.kind


def _build_dataclass(kind: type, fields: dict[str, Any]) -> Any:
    if issubclass(kind, Mapping):  # ModelOutput takes the set entries and leaves the rest None
        return kind(**fields)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]  # dataclasses.fields() breaks dynamo's graphs
    init = {name for name in known if known[name].init}
    made = kind(**{name: part for name, part in fields.items() if name in init})
    for name in fields.keys() - init:
        object.__setattr__(made, name, fields[name])
    return made


_TAGGED: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # JSON has no such types (nor NaN and infinity): {"tag": text}
    "dtype": (torch.dtype, lambda v: str(v).removeprefix("torch."), lambda t: getattr(torch, t)),
    "layout": (torch.layout, lambda v: str(v).removeprefix("torch."), lambda t: getattr(torch, t)),
    "device": (torch.device, str, torch.device),
    "float": (float, repr, float),
    "complex": (complex, repr, complex),
    "bytes": (bytes, lambda v: v.hex(), bytes.fromhex),
}


def _constant_to_json(value: Any) -> Any:
    if value is None or (isinstance(value, (bool, int, str)) and type(value) in (bool, int, str)):
        return value
    for tag, (kind, write, _) in _TAGGED.items():
        if type(value) is kind:
            return {tag: write(value)}
    if isinstance(value, tuple):
        return {"tuple": [_constant_to_json(part) for part in value]}
    raise ModelFileError(f"The constant argument {_brief(value)} has no JSON form, so the program cannot be saved.")


def _constant_from_json(data: Any) -> Any:
    if isinstance(data, dict):
        ((tag, text),) = data.items()
        if tag == "tuple":
            return tuple(_constant_from_json(part) for part in text)
        return _TAGGED[tag][2](text)
    return data


def _context_to_json(kind: Any, context: Any) -> str:
    serializer = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    try:
        if serializer is not None and callable(serializer.to_dumpable_context):
            context = serializer.to_dumpable_context(context)
        return json.dumps(context)
    except TypeError as error:
        raise ModelFileError(
            f"The pytree context of {kind} has no JSON form: register it with to_dumpable_context."
        ) from error


def _context_from_json(kind: Any, text: str) -> Any:
    context = json.loads(text)
    serializer = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    if serializer is not None and callable(serializer.from_dumpable_context):
        return serializer.from_dumpable_context(context)
    return context


def _import_type(name: str) -> type:
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(
            f"The saved program returns or takes a {qualname} from {module!r}, which cannot be imported ({error}). "
            "Make that class importable, then load again."
        ) from error
    if not isinstance(found, type):
        raise ModelFileError(f"{name} is not a class.")
    return found
