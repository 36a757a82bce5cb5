"""Sample calls of an op: read from text or made up, and varied for the checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import PluginError

_TENSOR = re.compile(r"(?P<dtype>[a-z]+\w*)\[(?P<shape>[\d,\s]*)\](?:<(?P<below>\d+))?")
_KEYWORD = re.compile(r"([A-Za-z_]\w*)=(?!=)")
_MADE_UP = (2, 3, 8)
_INT_BELOW = 2  # as `trtbridge run --int-max`: small enough to be a valid index almost everywhere


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an op.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sample: Any) -> Call:
        """A sample as authors write it: a tuple or list of arguments, a dict by name, or one tensor.

        Raises:
            PluginError: it is something else.
        """
        if isinstance(sample, Call):
            return sample
        if isinstance(sample, torch.Tensor):
            return cls((sample,))
        if isinstance(sample, Mapping):
            return cls((), dict(sample))
        if isinstance(sample, (tuple, list)):
            return cls(tuple(sample))
        raise PluginError(
            f"A sample is a tuple of arguments, a dict of them by name, or one tensor; not a {type(sample).__name__}."
        )

    def run(self, op: Callable[..., Any]) -> Any:
        """Call an op with these arguments."""
        return op(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, those in lists included."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def map(self, change: Callable[[int, torch.Tensor], Any]) -> Call:
        """The same call with every tensor replaced: ``change(number of the tensor, tensor)``."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        number = -1
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                number += 1
                leaves[index] = change(number, leaf)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return Call(args, kwargs)

    def to(self, device: torch.device) -> Call:
        """The same call with all tensors, and devices among the arguments, on a device."""
        moved = self.map(lambda _, tensor: tensor.detach().to(device))
        leaves, spec = pytree.tree_flatten((moved.args, dict(moved.kwargs)))
        args, kwargs = pytree.tree_unflatten([device if isinstance(x, torch.device) else x for x in leaves], spec)
        return Call(args, kwargs)

    def clone(self) -> Call:
        """The same call with copies of all tensors, strides kept."""
        return self.map(lambda _, tensor: tensor.clone())

    def resized(self, shapes: Mapping[int, Sequence[int]]) -> Call:
        """The same call with tensors of other shapes, their values drawn from those that they had.

        So indices stay within the range that they had, and probabilities positive.

        Args:
            shapes: by number of the tensor; the others stay.
        """

        def change(number: int, tensor: torch.Tensor) -> torch.Tensor:
            shape = shapes.get(number)
            if shape is None or tuple(shape) == tuple(tensor.shape):
                return tensor
            if not tensor.numel():
                return tensor.new_zeros(tuple(shape))
            # Drawn on the CPU: the CUDA generator is part of graphs that are captured.
            return tensor.reshape(-1)[torch.randint(tensor.numel(), tuple(shape)).to(tensor.device)]

        return self.map(change)

    def __str__(self) -> str:
        words = [_describe(arg) for arg in self.args] + [f"{k}={_describe(v)}" for k, v in self.kwargs.items()]
        return f"({', '.join(words)})"


def made_up(op: torch._ops.OpOverload) -> list[Call]:
    """A call with random tensors of one shape, for an op that takes nothing else without a default.

    Raises:
        PluginError: it takes more than that, so its author must give samples.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value() or kind.startswith("Optional["):
            continue  # those before a required one have none either, as in Python
        if kind not in ("Tensor", "List[Tensor]"):
            raise PluginError(
                f"{op} takes {argument.name!r} ({kind}), for which no value can be made up. Give samples: "
                f'check(op, [(...), ...]), @trtbridge.plugin(..., samples=...), or --sample "float32[2,3,8] 0.5".'
            )
        value = torch.randn(_MADE_UP) if kind == "Tensor" else [torch.randn(_MADE_UP), torch.randn(_MADE_UP)]
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    missing = [a.name for a in op._schema.arguments[: len(args)] if a.has_default_value()]
    if missing:
        raise PluginError(f"{op} needs {missing} in the middle of its arguments: give samples.")
    return [Call(tuple(args), kwargs)]


def parse_sample(text: str) -> Call:
    """Read a sample from text: arguments separated by spaces or commas.

    A tensor is ``dtype[sizes]``, as ``float32[2,3,8]`` or ``int64[4]<10`` (integers from 0 to 9; else to 1); floats are
    normal. Everything else is a Python literal: ``0.5``, ``True``, ``'mean'``, ``None``, ``[1, 2]``; lists may hold
    tensors. ``name=value`` is a keyword argument.

    Raises:
        PluginError: it cannot be read.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in _words(text):
        made = _value(value, text)
        if name:
            kwargs[name] = made
        elif kwargs:
            raise PluginError(f"Sample {text!r}: {value!r} stands after a keyword argument.")
        else:
            args.append(made)
    if not args and not kwargs:
        raise PluginError(f"Sample {text!r} holds no argument.")
    return Call(tuple(args), kwargs)


def _words(text: str) -> Iterator[tuple[str, str]]:
    """The arguments in a text, split at spaces and commas outside brackets and quotes."""
    depth, quote, word = 0, "", ""
    for char in text + " ":
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[(":
            depth += 1
        elif char in "])":
            depth -= 1
        if depth == 0 and not quote and char in ", ":
            if word:
                match = _KEYWORD.match(word)
                yield (match[1], word[match.end() :]) if match else ("", word)
            word = ""
        else:
            word += char
    if word.strip():
        raise PluginError(f"Sample {text!r}: a bracket or quote is not closed.")


def _value(word: str, text: str) -> Any:
    match = _TENSOR.fullmatch(word)
    if match:
        return _tensor(match, text)
    if word.startswith("[") and _TENSOR.search(word):
        return [_value(part, text) for _, part in _words(word[1:-1])]
    if word.startswith("torch."):
        named = getattr(torch, word.removeprefix("torch."), None)
        if isinstance(named, (torch.dtype, torch.layout, torch.memory_format)):
            return named
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError) as error:
        raise PluginError(
            f"Sample {text!r}: {word!r} is neither a tensor, as float32[2,3,8] or int64[4]<10, nor a Python literal."
        ) from error


def _tensor(match: re.Match[str], text: str) -> torch.Tensor:
    dtype = getattr(torch, match["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise PluginError(f"Sample {text!r}: torch has no dtype {match['dtype']!r}; float32, float16, int64, bool, ...")
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    if dtype.is_floating_point or dtype.is_complex:
        kind = dtype if dtype.itemsize >= 2 else torch.float32
        return torch.randn(shape, dtype=kind).to(dtype)
    below = 2 if dtype is torch.bool else int(match["below"] or _INT_BELOW)
    return torch.randint(max(below, 1), shape).to(dtype)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value)


def flat_results(result: Any) -> list[Any]:
    """The results of a call, lists opened; None stays, so that positions can be compared."""
    if isinstance(result, (list, tuple)):
        return [part for item in result for part in flat_results(item)]
    return [result]


def calls_of(samples: Iterable[Any]) -> list[Call]:
    """Samples as calls.

    Raises:
        PluginError: there is none, or one is malformed.
    """
    if isinstance(samples, (torch.Tensor, Mapping)):
        samples = [samples]
    calls = [Call.of(sample) for sample in samples]
    if not calls:
        raise PluginError("No samples: give at least one, such as [(torch.randn(2, 3),)].")
    return calls
