"""One model of scripts/model_sweep.py: made, converted, run, compared with PyTorch, and a mismatch explained."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DATA_SIZES = (1024, 64)
"""Bounds for sizes that depend on data, tried in turn where the backend asks for one (``max_data_size``)."""

MATCH, SHAPES, UNSTABLE = "match", "shapes only", "unstable"
GOOD = (MATCH, SHAPES, UNSTABLE)
STAGES = {
    MATCH: "converts and gives PyTorch's numbers",
    SHAPES: "converts; PyTorch itself gives other numbers each time, so only shapes were compared",
    UNSTABLE: "converts; numbers differ, but PyTorch's own in float32 and float64 differ as much (ties in a top-k)",
    "mismatch": "converts, but the numbers differ",
    "torch.export": "torch.export refuses the model, or its own program already gives other numbers than the model",
    "convert": "conversion fails, though torch.export takes the model",
    "run": "converts, but a call fails",
    "timeout": "not done within the time limit",
    "crash": "the process died",
    "no recipe": "no small model or no inputs for it could be made; says nothing about converting, not counted",
}
"""Outcomes, from best to worst."""

Key = tuple[str, str, str, str]


@dataclass
class Outcome:
    """What came of one model.

    Attributes:
        source, name, backend, dtype: which.
        stage: a key of STAGES.
        words: for a failure the first lines of its message; for torch.export its own.
        note: of the recipe: the timm model's name, or that only text went in; and the bound of sizes that depend on
            data, where the backend asked for one.
        inputs: arguments with their shapes.
        parameters: number of them.
        segments, plugins: engines, and plugin calls between or inside them by op with their number.
        seconds: eager, export-to-engine ("convert") and first call ("run").
        outputs: of each output tensor its cosine similarity and largest absolute error.
        cosine, max_abs_error: the worst of all outputs.
    """

    source: str
    name: str
    backend: str
    dtype: str
    stage: str = "crash"
    words: str = ""
    note: str = ""
    inputs: str = ""
    parameters: int = 0
    segments: int = 0
    plugins: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: list[tuple[float, float]] = field(default_factory=list)
    cosine: float | None = None
    max_abs_error: float | None = None

    @property
    def key(self) -> Key:
        """What it is an outcome of."""
        return (self.source, self.name, self.backend, self.dtype)


def examine(source: str, name: str, backend: str, dtype: str) -> Outcome:
    """Make, convert, run and compare one model."""
    import model_zoo
    import torch

    outcome = Outcome(source, name, backend, dtype)
    device = torch.device("cpu" if backend == "onnxruntime" else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started = time.perf_counter()
    try:
        recipe = model_zoo.make(source, name)
    except Exception as error:
        return dataclasses.replace(outcome, stage="no recipe", words=words_of(error))
    outcome.note, outcome.inputs = recipe.note, recipe.inputs
    outcome.parameters = sum(p.numel() for p in recipe.module.parameters())
    with torch.no_grad():
        exact = recipe.module.to(device)
        args, kwargs = _cast((recipe.args, recipe.kwargs), torch.float32, device)
        try:
            reference = _run(exact, args, kwargs)
            random = not _equal(reference, _run(exact, args, kwargs, seed=1))
        except Exception as error:
            return dataclasses.replace(outcome, stage="no recipe", words=f"PyTorch on {device}: {words_of(error)}")
        eager, expected = exact, reference
        if dtype != "float32":
            try:
                eager = exact.to(getattr(torch, dtype))
                args, kwargs = _cast((args, kwargs), getattr(torch, dtype), device)
                expected = _run(eager, args, kwargs)
            except Exception as error:
                return dataclasses.replace(outcome, stage="no recipe", words=f"PyTorch in {dtype}: {words_of(error)}")
        outcome.seconds["eager"] = round(time.perf_counter() - started, 2)
        try:
            converted = _convert(eager, args, kwargs, backend, device, outcome)
        except Exception as error:
            words = _refusal(eager, args, kwargs)
            stage = "torch.export" if words else "convert"
            return dataclasses.replace(outcome, stage=stage, words=words or words_of(error))
        started = time.perf_counter()
        try:
            got = _run(converted, args, kwargs)
        except Exception as error:
            return dataclasses.replace(outcome, stage="run", words=words_of(error))
        outcome.seconds["run"] = round(time.perf_counter() - started, 2)
        judge(outcome, got, expected, reference, random)
        if outcome.stage == "mismatch":
            explain_mismatch(outcome, eager, args, kwargs, expected)
    return outcome


def localize(source: str, name: str, backend: str, dtype: str) -> str:
    """Where the conversion of one model parts from PyTorch, as `tb.localize` tells it."""
    import model_zoo
    import torch

    import trtbridge as tb

    device = torch.device("cpu" if backend == "onnxruntime" else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recipe = model_zoo.make(source, name)
    kind = getattr(torch, dtype)
    args, kwargs = _cast((recipe.args, recipe.kwargs), kind, device)
    with torch.no_grad():
        module = recipe.module.to(device, kind)
        converted = _convert(module, args, kwargs, backend, device, Outcome(source, name, backend, dtype))
        return f"{source} {name}\n{tb.localize(module, converted, (args, kwargs))}"


def explain_mismatch(
    outcome: Outcome, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Sequence[Any]
) -> None:
    """Set another stage where the conversion is not to blame: torch.export's program, or an unstable model."""
    import torch

    def agrees(other: Sequence[Any]) -> bool:
        trial = dataclasses.replace(outcome, outputs=[], stage="")
        judge(trial, [t.to(e.dtype) for t, e in zip(other, expected, strict=True)], expected, expected, False)
        return trial.stage == MATCH

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, args, dict(kwargs), strict=False).module()
        if not agrees(_run(exported, args, kwargs)):
            outcome.stage = "torch.export"
            outcome.words = f"torch.export's own program gives other numbers than the model: {outcome.words}"
        elif not agrees(_run(module.double(), *_cast((args, kwargs), torch.float64, expected[0].device))):
            outcome.stage = UNSTABLE
    except Exception as error:  # the mismatch stands; the attempt to explain it says why it failed
        outcome.words += f" (not explained: {words_of(error)[:200]})"


def _convert(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: str, device: Any, outcome: Outcome
) -> Any:
    import trtbridge as tb

    started = time.perf_counter()
    try:
        converted = tb.convert(module, args, kwargs, backend=backend, device=device)
    except tb.DynamicShapeError as error:
        if "max_data_size" not in str(error):
            raise
        converted, most = _convert_bounded(module, args, kwargs, backend, device)
        outcome.note = ", ".join(filter(None, (outcome.note, f"max_data_size={most}")))
    outcome.seconds["convert"] = round(time.perf_counter() - started, 2)
    program = converted.program
    outcome.segments = len(program.engines)
    calls = [call.op for call in program.plugin_calls]
    calls += [plugin["op"] for engine in program.engines for plugin in engine.info.get("plugins", ())]
    outcome.plugins = {op: calls.count(op) for op in sorted(set(calls))}
    return converted


def _convert_bounded(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], backend: str, device: Any
) -> tuple[Any, int]:
    """Converted with the first bound that goes, and that bound: engines for the larger may be too large to build."""
    import trtbridge as tb

    for most in DATA_SIZES[:-1]:
        try:
            return tb.convert(module, args, kwargs, backend=backend, device=device, max_data_size=most), most
        except tb.TrtBridgeError:
            continue
    most = DATA_SIZES[-1]
    return tb.convert(module, args, kwargs, backend=backend, device=device, max_data_size=most), most


def _refusal(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What torch.export alone says against the model; "" where it takes it."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(module, args, dict(kwargs), strict=False)
    except Exception as error:
        return words_of(error)
    return ""


def judge(
    outcome: Outcome, got: Sequence[Any], expected: Sequence[Any], reference: Sequence[Any], random: bool
) -> None:
    """Compare outputs and set the stage.

    An output matches by cosine similarity and by its largest error relative to its largest value. In half precision it
    also matches where it is at most three times as far from PyTorch's float32 result as PyTorch's own half precision.

    Args:
        got, expected: outputs as tensors, of the converted module and of PyTorch in the same dtype.
        reference: PyTorch's in float32.
        random: whether PyTorch's own outputs differ from call to call with other seeds.
    """
    shapes = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
    if shapes[0] != shapes[1] and random and [len(s) for s in shapes[0]] == [len(s) for s in shapes[1]]:
        outcome.stage = SHAPES  # sizes are random too, as the length of speech is
        return
    if shapes[0] != shapes[1]:
        outcome.stage, outcome.words = "mismatch", f"shapes {shapes[0]} where PyTorch gives {shapes[1]}"
        return
    limits = (0.9999, 1e-2) if outcome.dtype == "float32" else (0.995, 5e-2)
    wrong = []
    for index, (ours, theirs, exact) in enumerate(zip(got, expected, reference, strict=True)):
        cosine, error, scale = distance(ours, theirs)
        outcome.outputs.append((round(cosine, 7), error))
        good = cosine >= limits[0] and error <= limits[1] * scale
        if not good and outcome.dtype != "float32" and exact.shape == ours.shape:
            good = distance(ours, exact)[1] <= 3 * distance(theirs, exact)[1]
        if not good:
            wrong.append(f"output {index}: cosine {cosine:.5f}, error {error:.3g} of {scale:.3g}")
    outcome.cosine = min((cosine for cosine, _ in outcome.outputs), default=1.0)
    outcome.max_abs_error = max((error for _, error in outcome.outputs), default=0.0)
    if not all(bool(t.isfinite().any()) for t in expected if t.numel() and t.is_floating_point()):
        outcome.stage, outcome.words = "no recipe", "PyTorch's own result is not finite"
    elif not wrong:
        outcome.stage = MATCH
    elif random:
        outcome.stage = SHAPES
    else:
        outcome.stage, outcome.words = "mismatch", "; ".join(wrong[:3])


def distance(ours: Any, theirs: Any) -> tuple[float, float, float]:
    """Cosine similarity, largest absolute error, and the largest absolute value of ``theirs``.

    Both are flattened and in float64. Where one is not finite the other must have the same value. Integers and bools
    have the share of equal elements for a cosine.
    """
    import torch

    if not theirs.numel():
        return 1.0, 0.0, 1.0
    a, b = ours.detach().double().flatten().cpu(), theirs.detach().double().flatten().cpu()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return 0.0, float("inf"), 1.0
    a, b = a[finite], b[finite]
    if not a.numel():
        return 1.0, 0.0, 1.0
    error, scale = float((a - b).abs().max()), float(b.abs().max())
    if not theirs.is_floating_point() and not theirs.is_complex():
        same = float((a == b).double().mean())
        return same, error if same < 0.99 else 0.0, max(scale, 1.0)
    if scale == 0:
        return float(error < 1e-6), error, 1.0
    return float(torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-300)), error, max(scale, 1e-6)


def _run(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int = 0) -> list[Any]:
    import torch

    from trtbridge.bridge.structure import flatten

    torch.manual_seed(seed)
    return [tensor.detach().clone() for tensor in flatten(module(*args, **kwargs))[0]]


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool((a.isclose(b, rtol=1e-3, atol=1e-3, equal_nan=True)).all())
        for a, b in zip(one, other, strict=True)
    )


def _cast(value: Any, dtype: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: _cast(part, dtype, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(part, dtype, device) for part in value)
    return value


def words_of(error: BaseException) -> str:
    text = "\n".join(line.rstrip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text}"[:1200]
