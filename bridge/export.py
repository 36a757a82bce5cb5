"""From an nn.Module to an `OnnxModel`, through torch.export and torch.onnx."""

from __future__ import annotations

import contextlib
import enum
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch

from ..errors import DynamicShapeError, ExportError
from .arguments import Arguments, collect, trace_tensors
from .dims import Size
from .dtypes import from_torch
from .guards import guards_always_hold
from .model import INLINE_LIMIT_BYTES, OnnxModel, Signature, TensorSpec, make_stand_in
from .origins import compact_origins, strip_prefix, user_frame
from .side_effects import side_effects
from .simplify import simplify
from .structure import CONSTANTS, Structure, flatten
from .untranslatable import blamed_ops, find_untranslatable, translation_table

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 20
"""The newest opset whose nodes all build; from 23 on attention is one node, which builds only in some cases."""

# Lines of torch's errors that lead to its own debugging switches.
_ADVERTISING = re.compile(
    r"For more (information|debugging)|TORCH_LOGS=|TORCHDYNAMO|draft_export|C\+\+ stack trace|logs when we create"
)

_MODULE = "module"  # the wrapper's attribute that holds the user's module


class _Flat(torch.nn.Module):
    """The user's module as a function from flat tensors to flat tensors; remembers the structure of the result."""

    def __init__(self, module: torch.nn.Module, structure: Structure, report: Callable[[Structure], None]) -> None:
        super().__init__()
        self.module = module
        self.input_structure = structure
        self.report = report  # torch.export works on copies of plain attributes, so the result goes out by a call

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.input_structure.unflatten(leaves)
        tensors, structure = flatten(self.module(*args, **kwargs))
        self.report(structure)
        return tuple(tensors)


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
) -> OnnxModel:
    """Export a module in eval mode, without changing it and without copying its weights.

    Args:
        model: on CPU or CUDA, in any floating dtype.
        args: example positional arguments; tensors in any nesting of tuples, lists, dicts, named tuples, dataclasses
            and None. Everything that is no tensor is fixed at its value.
        kwargs: example keyword arguments.
        dynamic_shapes: by argument, as for torch.export, with `Dim`s.
        opset: ONNX opset of the default domain.

    Returns:
        The ONNX model; ops that torch.onnx cannot translate are plugin nodes in it.

    Raises:
        InputError: the arguments do not fit the module.
        DynamicShapeError: dynamic_shapes does not fit the arguments, or the module fixes a size it names.
        ExportError: the module cannot be traced or translated.
    """
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            f"convert() takes a torch.nn.Module or the path of an .onnx file, got {type(model).__name__}."
        )
    arguments = collect(model, args, dict(kwargs or {}), dynamic_shapes)
    with _left_as_found(model), torch.no_grad(), _quiet():
        model.eval()
        program, output_structure = _trace(model, arguments)
        onnx_program = _translate(program, opset, type(model).__name__)
    return _finish(onnx_program, program, arguments, output_structure, type(model).__name__)


def _trace(model: torch.nn.Module, arguments: Arguments) -> tuple[torch.export.ExportedProgram, Structure]:
    tensors, specs = trace_tensors(arguments)
    structures: list[Structure] = []
    flat = _Flat(model, arguments.structure, structures.append)
    flat.eval()
    name = type(model).__name__

    def trace(deferred: bool) -> torch.export.ExportedProgram:
        return torch.export.export(
            flat,
            tuple(tensors),
            dynamic_shapes={"leaves": tuple(specs)} if tensors else None,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )

    try:
        try:
            program = trace(deferred=False)
        except Exception as error:
            # torch.export gives up on conditions that it cannot prove; those that hold for every size are harmless.
            if not guards_always_hold(str(error), arguments):
                raise
            logger.info("conditions that torch.export cannot prove hold for every size in range: %s", error)
            program = trace(deferred=True)
    except Exception as error:
        raise _explain_trace(error, name, arguments) from error
    if not program.graph_signature.user_outputs:
        raise ExportError(f"{name} returns no tensor, so there is nothing for an engine to compute.")
    for effect in side_effects(program, arguments.labels, _MODULE):
        logger.warning("%s %s", name, effect)
    for label, value in structures[-1].constants("output"):
        if not isinstance(value, (*CONSTANTS, enum.Enum)):
            raise ExportError(
                f"{name} returns a {type(value).__name__} ({label}), whose tensors cannot be seen: make the model "
                "return without it (for a cache of transformers use_cache=False), or register its class with "
                "torch.utils._pytree.register_pytree_node."
            )
    return program, structures[-1]


def _translate(program: torch.export.ExportedProgram, opset: int, name: str) -> torch.onnx.ONNXProgram:
    """Translate, with more and more ops as plugin nodes until nothing is left that the exporter does not know."""
    plugins = find_untranslatable(program, opset)
    while True:
        if plugins:
            logger.info("as plugins, unknown to torch.onnx: %s", ", ".join(sorted(map(str, plugins))))
        table = translation_table(plugins, program)
        try:
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=table,
                optimize=False,  # done below, by our own rule
                verbose=False,
            )
        except Exception as error:
            more = blamed_ops(error, program) - plugins
            if not more:
                raise ExportError(_translation_message(error, name)) from error
            plugins |= more
        else:
            assert result is not None
            try:
                simplify(result.model)
            except Exception as error:
                raise ExportError(_translation_message(error, name)) from error
            return result


def _finish(
    onnx_program: torch.onnx.ONNXProgram,
    program: torch.export.ExportedProgram,
    arguments: Arguments,
    output_structure: Structure,
    source: str,
) -> OnnxModel:
    model = onnx_program.model
    compact_origins(model.graph, _MODULE)
    symbols = _rename_symbols(model.graph, program, arguments)
    _share_tied_weights(model.graph)
    weights = _name_values(model.graph, arguments)
    # Stand-ins go in before the proto is made, so that no weight is ever serialized.
    kept = {name: weight for name, weight in weights.items() if weight.nbytes > INLINE_LIMIT_BYTES}
    for name, weight in kept.items():
        stand_in = ir.ExternalTensor("", None, None, weight.dtype, shape=weight.shape, name=name)  # type: ignore[arg-type]
        model.graph.initializers[name].const_value = stand_in
    proto = ir.to_proto(model)
    for initializer in proto.graph.initializer:
        if initializer.name in kept:
            initializer.CopyFrom(make_stand_in(initializer.name, kept[initializer.name]))
    signature = Signature(
        inputs=tuple(
            TensorSpec.make(value.name or "", from_torch(tensor.dtype), _input_shape(tensor, leaf), arguments.ranges)
            for value, tensor, leaf in zip(model.graph.inputs, arguments.tensors, arguments.dims, strict=True)
        ),
        outputs=tuple(_output_spec(value, arguments) for value in model.graph.outputs),
        labels=arguments.labels,
        dims=arguments.ranges,
        input_structure=arguments.structure,
        output_structure=output_structure,
        parameters=arguments.parameters,
    )
    logger.debug("symbols renamed: %s", symbols)
    return OnnxModel(proto, kept, signature, source)


def _input_shape(tensor: torch.Tensor, leaf: Mapping[int, Any]) -> tuple[Size, ...]:
    return tuple(str(leaf[axis]) if axis in leaf else size for axis, size in enumerate(tensor.shape))


def _output_spec(value: ir.Value, arguments: Arguments) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None, "the exporter types every output"
    return TensorSpec.make(value.name, value.dtype, shape_of(value), arguments.ranges)


def shape_of(value: ir.Value) -> tuple[Size, ...]:
    """A value's shape with symbolic dims as text; dims without a name as None."""
    assert value.shape is not None, f"{value.name} has no rank"
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def _rename_symbols(graph: ir.Graph, program: torch.export.ExportedProgram, arguments: Arguments) -> dict[str, str]:
    """Give torch's symbols ("s77") the names of the user's dims, in every shape of the graph."""
    names: dict[str, str] = {}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, leaf in zip(program.graph_signature.user_inputs, arguments.dims, strict=True):
        for axis, dim in leaf.items():
            size = placeholders[str(name)].meta["val"].shape[axis]
            if isinstance(size, torch.SymInt) and (dim.scale, dim.offset) == (1, 0):
                names[str(size.node.expr)] = dim.root.name
    # A dim that only stands in derived dims: torch made its symbol, and one equation gives the name.
    free = {
        str(s): s
        for n in placeholders.values()
        for s in getattr(n.meta.get("val"), "shape", ())
        if isinstance(s, torch.SymInt)
    }
    for text in free:
        for symbol in re.findall(r"\bs\d+\b", text):
            if symbol not in names and len(arguments.ranges.keys() - set(names.values())) == 1:
                names[symbol] = next(iter(arguments.ranges.keys() - set(names.values())))
    if names:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
        for value in _all_values(graph):
            if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
                value.shape = ir.Shape(
                    [
                        size
                        if isinstance(size, int) or size.value is None
                        else pattern.sub(lambda m: names[m[0]], size.value)
                        for size in value.shape
                    ]
                )
    return names


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs


def _share_tied_weights(graph: ir.Graph) -> None:
    """Make one initializer of those that are the same torch tensor."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0 or raw.device.type == "meta":
            continue
        key = (raw.data_ptr(), raw.device, raw.dtype, tuple(raw.shape), raw.stride())
        kept = first.setdefault(key, value)
        if kept is not value and not value.is_graph_output() and not value.is_graph_input():
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _name_values(graph: ir.Graph, arguments: Arguments) -> dict[str, ir.TensorProtocol]:
    """Name inputs as the user wrote them, outputs ``output_<i>``, and weights as in the user's state_dict.

    Returns:
        The weights by their new names.
    """
    weights = {}
    initializers = list(graph.initializers.values())
    io = {id(value) for value in [*graph.inputs, *graph.outputs]}
    wanted = [
        (value, re.sub(r"\W+", "_", label).strip("_"))
        for value, label in zip(graph.inputs, arguments.labels, strict=True)
    ]
    wanted += [(value, f"output_{index}") for index, value in enumerate(graph.outputs) if value not in graph.inputs]
    wanted += [(value, strip_prefix(value.name or "", _MODULE)) for value in initializers if id(value) not in io]
    renamed = {id(value) for value, _ in wanted}
    taken = {value.name for value in _all_values(graph) if id(value) not in renamed}
    graph.initializers.clear()
    for value, name in wanted:
        unique, number = name, 1
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        value.name = unique
    for value in initializers:
        graph.initializers[value.name or ""] = value
        assert value.const_value is not None
        weights[value.name or ""] = value.const_value
    return weights


@contextlib.contextmanager
def _left_as_found(model: torch.nn.Module) -> Iterator[None]:
    """Put back every module's training flag and attributes, whatever tracing did to them."""
    before = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers, modules in before:
            for own, old in ((module._parameters, parameters), (module._buffers, buffers), (module._modules, modules)):
                if own.keys() != old.keys() or any(own[key] is not old[key] for key in old):
                    own.clear()
                    own.update(old)  # type: ignore[arg-type]
            current = module.__dict__
            if current.keys() != attributes.keys() or any(current[key] is not attributes[key] for key in attributes):
                current.clear()
                current.update(attributes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk about itself off the user's screen; their own warnings pass."""
    names = ("onnx._internal.exporter._registration", "_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in (*(f"torch.{name}" for name in names), "onnxscript", "onnx_ir")]
    levels = [other.level for other in loggers]
    for other in loggers:
        other.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings(
                "ignore", message=r".*(torchvision|onnxscript|pytree|LeafSpec|cuda capability|assigned during export).*"
            )
            yield
    finally:
        for other, level in zip(loggers, levels, strict=True):
            other.setLevel(level)


def _user_line(error: BaseException) -> str:
    """The line of the user's code that an exception passed through last, as text for a message."""
    file, line, code = user_frame("".join(traceback.format_tb(error.__traceback__)), strictly_user=True)
    return f'\n  at "{file}", line {line}: `{code}`' if file else ""


def _explain_trace(error: Exception, name: str, arguments: Arguments) -> Exception:
    text = str(error).strip()
    if "Constraints violated" in text or ("marked" in text and "as dynamic" in text):
        for index, label in reversed(list(enumerate(arguments.labels))):
            text = text.replace(f"L['leaves'][{index}]", label).replace(f"leaves[{index}]", label)
        return DynamicShapeError(
            f"{name} does not take every size that dynamic_shapes promises:\n{_shorten(text)}{_user_line(error)}\n"
            "Narrow the Dim, leave that dimension static, or change the line."
        )
    if "data-dependent" in text or "Could not guard" in text or "Could not extract" in text:
        return ExportError(
            f"{name} decides its control flow or a shape by the values of a tensor, which no graph can hold:\n"
            f"{_shorten(text)}{_user_line(error)}\n"
            "Use torch.where or torch.cond instead of a Python `if`, or convert the part of the model around that line."
        )
    return ExportError(
        f"torch.export cannot trace {name}: {type(error).__name__}: {_shorten(text)}{_user_line(error)}\n"
        "Check that the module runs on these arguments, then try torch.export.export on it alone."
    )


def _translation_message(error: Exception, name: str) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {_shorten(str(cause))}")
        cause = cause.__cause__
    return (
        f"torch.onnx cannot translate {name}:\n  " + "\n  ".join(causes[-2:]) + "\n"
        "torch.export traced it, so this is a limit of the ONNX exporter; rewrite that part, or make it a custom op "
        "(torch.library.custom_op), which trtbridge runs as a plugin."
    )


def _shorten(text: str, lines: int = 12, width: int = 400) -> str:
    kept = [line[:width] for line in text.splitlines() if line.strip() and not _ADVERTISING.search(line)]
    return "\n".join(kept[:lines]) + ("\n..." if len(kept) > lines else "")
