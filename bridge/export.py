"""From an nn.Module to an `OnnxModel`, through torch.export and torch.onnx."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ExportError, PluginError
from ..nodes import DOMAIN, REASON_KEY
from ..passes.parameters import set_parameter_names
from ..plugins import torch_note
from .arguments import Arguments, collect
from .corrected_translations import corrected_translations, restore_output_types
from .dims import Range, Size
from .dtypes import from_torch
from .graft import graft_calls, graft_problems, opaque_calls
from .model import INLINE_LIMIT_BYTES, ORIGIN_KEY, OnnxModel, Origin, Signature, TensorSpec, make_stand_in
from .origins import compact_origins, strip_prefix
from .parameters import Parameters, describe_parameters, mark, marked
from .simplify import simplify
from .stated_sizes import stated_sizes
from .structure import Structure
from .trace import MODULE, left_as_found, quiet, shorten, to_eval_mode, trace_module
from .tracing import alone, one_at_a_time
from .translate_calls import call_translation
from .translations import shared_translations
from .untranslatable import (
    Decomposition,
    alike_calls,
    blamed_calls,
    forget_pending_sizes,
    mark_calls,
    random_calls,
    refuse_untranslatable,
)

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 20
"""The newest opset whose nodes all build; from 23 on attention is one node, which builds only in some cases."""

_NO_BOUND = 1 << 31  # what torch gives a size of which it knows nothing is far above


@dataclass(frozen=True)
class ExportedModule:
    """A module traced once, from which ONNX models are made, with any of its calls as plugins.

    Attributes:
        program: what torch.export made; its calls are named as the plugins of `to_onnx` are.
        arguments: the example arguments.
        output_structure: the structure of the result.
        complex_outputs: which results are complex.
        name: class of the module.
        opset: ONNX opset of the default domain.
        parameters: what may change in what is made of it; None where nothing may.
    """

    program: torch.export.ExportedProgram
    arguments: Arguments
    output_structure: Structure
    complex_outputs: tuple[int, ...]
    name: str
    opset: int
    parameters: Parameters | None = None

    def plugin_problems(self, calls: Iterable[str]) -> dict[str, str]:
        """Why calls cannot be plugins, by call; those that can be are not in it."""
        return graft_problems(self.program, calls)

    def to_onnx(self, plugins: Mapping[str, str]) -> tuple[OnnxModel, dict[str, str]]:
        """Translate, with some calls as plugin nodes, and those besides that torch.onnx cannot translate.

        Args:
            plugins: for each call that becomes a plugin node the reason why.

        Returns:
            The model, and all calls that are plugins in it with their reasons.

        Raises:
            ExportError: torch.onnx fails, and no call is to blame that could be a plugin.
        """
        plugins = random_calls(self.program) | opaque_calls(self.program) | dict(plugins)
        with torch.no_grad(), quiet():
            onnx_program = None
            while onnx_program is None:
                onnx_program, more = self._translate(plugins)
                for call, reason in more.items():
                    logger.info("%s becomes a plugin: %s", call, reason)
                plugins |= more
        return _finish(onnx_program, self, plugins), plugins

    def alike(self, calls: Mapping[str, str]) -> dict[str, str]:
        """Some calls and those like them: torch.onnx and the check of the export name few at a time."""
        return alike_calls(self.program, calls)

    def _possible(self, calls: Mapping[str, str], plugins: Mapping[str, str]) -> dict[str, str]:
        """Those of some calls that are not plugins yet and can be."""
        new = {call: reason for call, reason in calls.items() if call not in plugins}
        problems = self.plugin_problems(new) if new else {}
        return {call: reason for call, reason in new.items() if call not in problems}

    @one_at_a_time
    def _translate(self, plugins: Mapping[str, str]) -> tuple[torch.onnx.ONNXProgram | None, dict[str, str]]:
        """One attempt: the translation, or what must be a plugin besides."""
        forget_pending_sizes(self.program)
        opaque = opaque_calls(self.program)
        grafted, decomposed = self.program, Decomposition()
        try:
            grafted = graft_calls(self.program, [call for call in plugins if call not in opaque])
            with (
                shared_translations(self.opset),
                refuse_untranslatable(grafted, self.opset, lambda calls: self._possible(calls, plugins)) as decomposed,
            ):
                onnx_program = torch.onnx.export(
                    grafted,
                    dynamo=True,
                    opset_version=self.opset,
                    custom_translation_table=call_translation() | corrected_translations(grafted),
                    optimize=False,  # done below, by our own rule
                    verbose=False,
                )
            assert onnx_program is not None
            if self.parameters is not None:
                mark(onnx_program.model, self.parameters, self.program.state_dict, f"{MODULE}.")
            simplify(onnx_program.model)
            return onnx_program, {}
        except PluginError as error:
            raise ExportError(f"{self.name}: {error}") from error
        except ExportError:
            raise
        except Exception as error:
            more = {}
            if not torch_note.is_lost(error):  # of that no call is to blame
                more = self._possible(self.alike(blamed_calls(error, grafted, self.opset, decomposed)), plugins)
            if not more:
                raise ExportError(_translation_message(error, self.name)) from error
            return None, more


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
) -> OnnxModel:
    """Export a module in eval mode, without changing it and without copying its weights.

    Takes and raises what `trace` does.

    Returns:
        The ONNX model; calls that torch.onnx cannot translate are plugin nodes in it.
    """
    return trace(model, args, kwargs, dynamic_shapes=dynamic_shapes, opset=opset).to_onnx({})[0]


def trace(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
    refittable: bool = False,
) -> ExportedModule:
    """Trace a module in eval mode, without changing it and without copying its weights.

    Args:
        model: on CPU or CUDA, in any floating dtype.
        args: example positional arguments; tensors in any nesting of tuples, lists, dicts, named tuples, dataclasses
            and None. Everything that is no tensor is fixed at its value.
        kwargs: example keyword arguments.
        dynamic_shapes: by argument, as for torch.export, with `Dim`s.
        opset: ONNX opset of the default domain.
        refittable: let nothing that is made of it hang on the values of the module's weights.

    Raises:
        InputError: the arguments do not fit the module.
        DynamicShapeError: dynamic_shapes does not fit the arguments, or the module fixes a size it names.
        ExportError: the module cannot be traced.
    """
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            f"convert() takes a torch.nn.Module or the path of an .onnx file, got {type(model).__name__}."
        )
    arguments = collect(model, args, dict(kwargs or {}), dynamic_shapes)
    with alone():  # from here to the end no other thread gives the module other parameters
        with left_as_found(model), torch.no_grad(), quiet():
            to_eval_mode(model)
            program, structure, complex_outputs = trace_module(model, arguments)
        parameters = describe_parameters(model, program, f"{MODULE}.") if refittable else None
    mark_calls(program)
    return ExportedModule(program, arguments, structure, complex_outputs, type(model).__name__, opset, parameters)


def _finish(onnx_program: torch.onnx.ONNXProgram, traced: ExportedModule, plugins: Mapping[str, str]) -> OnnxModel:
    program, arguments = traced.program, traced.arguments
    model = onnx_program.model
    compact_origins(model.graph, MODULE)
    _note_reasons(ir.traversal.RecursiveGraphIterator(model.graph), plugins)
    exported = onnx_program.exported_program or program
    symbols = _rename_symbols(model.graph, program, exported, arguments)
    data_dims = _data_dims(exported, symbols)
    restore_output_types(model.graph, program)
    _share_tied_weights(model.graph)
    changing = [(value, own) for value in model.graph.initializers.values() if (own := marked(value))]
    weights = _name_values(model.graph, arguments)
    parameters = {value.name or "": own for value, own in changing}
    # Stand-ins go in before the proto is made, so that no weight is ever serialized.
    kept = {n: weight for n, weight in weights.items() if weight.nbytes > INLINE_LIMIT_BYTES or n in parameters}
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
        outputs=tuple(_output_spec(value, {**arguments.ranges, **data_dims}) for value in model.graph.outputs),
        labels=arguments.labels,
        dims=arguments.ranges,
        input_structure=arguments.structure,
        output_structure=traced.output_structure,
        parameters=arguments.parameters,
        complex_inputs=arguments.complex_inputs,
        complex_outputs=traced.complex_outputs,
        profiles=arguments.profiles,
    )
    set_parameter_names(proto, parameters)
    return OnnxModel(proto, kept, signature, traced.name, data_dims, traced.parameters)


def _note_reasons(nodes: Iterable[ir.Node], plugins: Mapping[str, str]) -> None:
    """Write into every plugin node why it is one."""
    for node in nodes:
        if node.domain == DOMAIN and ORIGIN_KEY in node.metadata_props:
            origin = Origin.from_metadata(node.metadata_props[ORIGIN_KEY])
            node.metadata_props[REASON_KEY] = plugins.get(origin.call, "")


def _data_dims(program: torch.export.ExportedProgram, names: Mapping[str, str]) -> dict[str, Range]:
    """The ranges of sizes that depend on data, as far as torch derived them or torch._check stated them."""
    found: dict[str, Range] = {}
    for symbol, bounds in program.range_constraints.items():
        name = str(symbol)
        if name in names or not name.startswith("u"):
            continue
        if bounds.upper < _NO_BOUND:  # without a bound it is infinite
            low, high = int(max(0, bounds.lower)), int(bounds.upper)  # the lower one may be infinite
            found[name] = (low, max(1, low, high // 2), high)
    return found


def _input_shape(tensor: torch.Tensor, leaf: Mapping[int, Any]) -> tuple[Size, ...]:
    return tuple(str(leaf[axis]) if axis in leaf else size for axis, size in enumerate(tensor.shape))


def _output_spec(value: ir.Value, dims: Mapping[str, Range]) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None, "the exporter types every output"
    return TensorSpec.make(value.name, value.dtype, shape_of(value), dims)


def shape_of(value: ir.Value) -> tuple[Size, ...]:
    """A value's shape with symbolic dims as text; dims without a name as None."""
    assert value.shape is not None, f"{value.name} has no rank"
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def _rename_symbols(
    graph: ir.Graph,
    program: torch.export.ExportedProgram,
    exported: torch.export.ExportedProgram,
    arguments: Arguments,
) -> dict[str, str]:
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
    names |= _data_symbols(exported)
    stated = stated_sizes(program)
    if names or stated:
        pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None

        def rename(size: Size) -> Size:
            return pattern.sub(lambda m: names[m[0]], size) if pattern is not None and isinstance(size, str) else size

        stated = {str(rename(text)): rename(size) for text, size in stated.items()}
        for value in _all_values(graph):
            if value.shape is not None and any(not isinstance(size, int) for size in value.shape):
                sizes = [rename(size) for size in shape_of(value)]
                value.shape = ir.Shape([stated.get(size, size) if isinstance(size, str) else size for size in sizes])
    return names


def _data_symbols(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """The one name of each data-dependent size that has several.

    The exporter runs every node once more for its type promotion, and then such sizes get new symbols, in the order of
    the old ones, which torch does not know to be the same.
    """
    nodes = list(exported.graph.nodes)
    own = [str(symbol) for node in nodes for symbol in (node.meta.get("unbacked_bindings") or {})]
    modes = (getattr(node.meta.get("val"), "fake_mode", None) for node in nodes)
    shape_env = next((mode.shape_env for mode in modes if mode is not None), None)
    if shape_env is None or not own:
        return {}
    renamed = {str(new): str(old) for new, old in shape_env.unbacked_renamings.items()}
    known = {*own, *renamed}
    last = max((int(name[1:]) for name in known if name[1:].isdigit()), default=-1)
    names = (str(symbol) for symbol in shape_env.var_to_range)
    fresh = sorted(int(name[1:]) for name in names if re.fullmatch(r"u\d+", name) and int(name[1:]) > last)
    found = {f"u{number}": name for number, name in zip(fresh, own, strict=False)} if len(fresh) == len(own) else {}
    return renamed | found


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
    wanted += [(value, strip_prefix(value.name or "", MODULE)) for value in initializers if id(value) not in io]
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


def _translation_message(error: Exception, name: str) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(f"{type(cause).__name__}: {shorten(str(cause))}")
        cause = cause.__cause__
    return (
        f"torch.onnx cannot translate {name}:\n  " + "\n  ".join(causes[-2:]) + "\n"
        "torch.export traced it, so this is a limit of the ONNX exporter; rewrite that part, or make it a custom op "
        "(torch.library.custom_op), which trtbridge runs as a plugin."
    )
