"""What `convert` costs beside a bare export, parser and builder: seconds and memory for ResNet-50 and BERT-base.

    python scripts/bench_convert.py [--repeats 3] [--models resnet50 bert-base] [--json FILE] [--write FILE]

Bare is what a person would write by hand: ``torch.onnx.export(dynamo=True)`` to a file, then the TensorRT-RTX parser
and builder in the same process. Ours is ``trtbridge.convert(..., backend="tensorrt_rtx")``. Both get the same random
weights, opset, dynamic dimensions and profile, strongly typed and without TF32, and neither needs a GPU.

Every measurement is a fresh process, and bare and ours take turns, so that a busy machine disturbs both alike. Time and
memory are measured in different runs, because reading memory maps slows a process down.

Time: medians over ``--repeats`` of wall seconds. CPU seconds of the process and its children stand beside them; they
tell a busy machine from slow code.

Memory: every 20 ms this process adds up the proportional set size (PSS, /proc/<pid>/smaps_rollup) of the worker and all
its descendants, and keeps the peak. PSS counts a page that several processes share once, so a weight that parent and
child both map is not counted twice. It includes file pages while they are mapped (weight files), which the kernel can
drop; "private" is the anonymous part, which it cannot. What the imports and the model itself take is measured before
the start and subtracted. Libraries that unrelated processes have mapped, too, count less: the private part is steadier.

Exit status: 0 both limits hold for every model, 1 one is exceeded, 2 a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OPSET = 20
TIME_LIMIT = 0.15
"""Most that our own stages may take, as a share of the bare run's time."""
MEMORY_LIMIT = 2.5
"""Most memory in sets of weights, the model's own included, on top of what the bare run needs besides its model."""
SAMPLE_SECONDS = 0.02
WORKER_LIMIT_SECONDS = 900
MODELS = ("resnet50", "bert-base")
TITLES = {"resnet50": "ResNet-50", "bert-base": "BERT-base"}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model with example inputs and the ranges of its dimensions.

    Attributes:
        model: random weights, in eval mode.
        inputs: example keyword arguments.
        dims: for each input its dynamic dimensions: axis → (name, min, opt, max).
    """

    model: Any
    inputs: dict[str, Any]
    dims: dict[str, dict[int, tuple[str, int, int, int]]]

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The (min, opt, max) shapes of one input."""
        sizes = [
            self.dims[name].get(axis, ("", size, size, size))[1:] for axis, size in enumerate(self.inputs[name].shape)
        ]
        low, opt, high = zip(*sizes, strict=True)
        return low, opt, high


def make_case(name: str) -> Case:
    """A model with random weights: ResNet-50 (25.6 M parameters) or BERT-base (109.5 M), in float32."""
    import torch
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    batch = ("batch", 1, 8, 32)
    if name == "resnet50":
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()
        inputs = {"pixel_values": torch.randn(2, 3, 224, 224)}
        return Case(model, inputs, {"pixel_values": {0: batch}})
    model = BertModel(BertConfig()).eval()
    ids = torch.randint(1000, 30000, (2, 16))
    dims = {0: batch, 1: ("seq", 8, 128, 512)}
    return Case(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": dims, "attention_mask": dims}
    )


@dataclass
class Run:
    """What one worker measured.

    Attributes:
        seconds: of each stage, in order.
        total: wall seconds from the module to the engine's bytes.
        cpu: CPU seconds of the process and its children for the same.
        details: seconds inside the stages of `convert`, by what it does there.
        engine_bytes: size of the engine.
        weight_bytes: size of parameters and buffers.
        parameters: number of parameters.
        versions: of what was measured.
        baseline_bytes: PSS before the start.
        peak_bytes: peak PSS above the baseline; 0 in a run for time.
        peak_private_bytes: peak of the anonymous part above its baseline.
        peak_stage: the stage in which the peak was reached.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    cpu: float = 0.0
    details: dict[str, float] = field(default_factory=dict)
    engine_bytes: int = 0
    weight_bytes: int = 0
    parameters: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    baseline_bytes: int = 0
    peak_bytes: int = 0
    peak_private_bytes: int = 0
    peak_stage: str = ""


# The worker: one measurement in a process of its own.


class _Talk:
    """Lines of JSON to the parent, on a descriptor that no library prints to."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        print(json.dumps(message), file=self._file)

    def wait(self) -> None:
        sys.stdin.readline()


@contextlib.contextmanager
def _stage(run: Run, talk: _Talk, name: str) -> Iterator[None]:
    talk.say(stage=name)
    started = time.perf_counter()
    yield
    run.seconds[name] = time.perf_counter() - started


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def worker(kind: str, name: str) -> None:
    """Measure one conversion and report to the parent."""
    talk = _Talk()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import onnx
    import onnxscript
    import tensorrt_rtx
    import torch
    import transformers

    import trtbridge
    from trtbridge.bridge import convert as _pipeline  # noqa: F401  # convert() is lazy; its imports are no part of a conversion

    case = make_case(name)
    tensors = [*case.model.parameters(), *case.model.buffers()]
    run = Run(
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(tensor.numel() for tensor in case.model.parameters()),
        versions={
            "trtbridge": trtbridge.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "tensorrt_rtx": tensorrt_rtx.__version__,
            "python": platform.python_version(),
        },
    )
    talk.say(ready=True)
    talk.wait()
    cpu, started = _cpu_seconds(), time.perf_counter()
    if kind == "bare":
        _bare(case, run, talk)
    else:
        _ours(case, run, talk)
    run.total, run.cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    talk.say(stage="", run=dataclasses.asdict(run))


def _bare(case: Case, run: Run, talk: _Talk) -> None:
    import tensorrt_rtx as trt
    import torch

    dims = {d[0]: torch.export.Dim(d[0], min=d[1], max=d[3]) for axes in case.dims.values() for d in axes.values()}
    shapes = {name: {axis: dims[d[0]] for axis, d in axes.items()} for name, axes in case.dims.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        with _stage(run, talk, "export"):
            program = torch.onnx.export(
                case.model,
                (),
                kwargs=case.inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                verbose=False,
            )
            assert program is not None
        with _stage(run, talk, "save"):
            program.save(path, external_data=True)
        with _stage(run, talk, "parse"):
            logger = trt.Logger(trt.ILogger.ERROR)
            builder = trt.Builder(logger)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(str(path)):
                raise RuntimeError(f"the parser refuses the bare export: {parser.get_error(0).desc()}")
        with _stage(run, talk, "build"):
            config = builder.create_builder_config()
            config.clear_flag(trt.BuilderFlag.TF32)
            if torch.cuda.is_available():
                config.num_compute_capabilities = 1
                config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
            profile = builder.create_optimization_profile()
            for name in case.inputs:
                profile.set_shape(name, *case.shapes(name))
            config.add_optimization_profile(profile)
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                raise RuntimeError("the builder failed on the bare export")
            run.engine_bytes = engine.nbytes


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def _ours(case: Case, run: Run, talk: _Talk) -> None:
    import torch

    import trtbridge as tb

    marks: list[tuple[str, float]] = []
    spent: list[float] = []
    # convert() looks both up when it calls them.
    torch.export.export = _timed(torch.export.export, spent)
    torch.onnx.export = _timed(torch.onnx.export, spent)

    def progress(stage: str, fraction: float) -> None:
        base, _, phase = stage.partition(": ")
        if not marks or marks[-1][0] != stage:
            if base != "build" or not phase:
                talk.say(stage=base)
            marks.append((stage, time.perf_counter()))

    dims = {d[0]: tb.Dim(d[0], min=d[1], opt=d[2], max=d[3]) for axes in case.dims.values() for d in axes.values()}
    shapes = {name: {axis: dims[d[0]] for axis, d in axes.items()} for name, axes in case.dims.items()}
    started = time.perf_counter()
    fast = tb.convert(
        case.model, (), case.inputs, dynamic_shapes=shapes, backend="tensorrt_rtx", opset=OPSET, progress=progress
    )
    total = time.perf_counter() - started
    stages = dict(fast.program.info["stage_seconds"])
    stages["export"] += stages.pop("trace")
    run.seconds.update(stages)
    run.seconds["rest"] = total - sum(run.seconds.values())
    run.engine_bytes = fast.program.size_bytes
    torch_seconds = sum(spent)
    run.details = {
        "export: torch.export and torch.onnx": torch_seconds,
        "export: the rest": run.seconds["export"] - torch_seconds,
        **_build_phases(marks, run.seconds["build"]),
    }


def _build_phases(marks: Sequence[tuple[str, float]], build_seconds: float) -> dict[str, float]:
    """Where the build spends its time: before the parser, in it, in the builder, and from its last phase on."""
    begin = next((at for stage, at in marks if stage == "build"), None)
    phases = [(stage.partition(": ")[2], at) for stage, at in marks if stage.startswith("build: ")]
    parsing = next((at for phase, at in phases if phase == "Parsing"), None)
    building = next((at for phase, at in phases if phase != "Parsing"), None)
    if begin is None or parsing is None or building is None:
        return {}
    last = phases[-1][1]
    return {
        "build: write weights, start process": parsing - begin,
        "build: parse": building - parsing,
        "build: builder": last - building,
        "build: finish, write and read engine": begin + build_seconds - last,
    }


# The parent: starts workers, watches their memory, sums up.


def measure(kind: str, name: str, *, memory: bool) -> Run:
    """Run one worker.

    Args:
        kind: "bare" or "ours".
        name: of the model.
        memory: sample memory instead of leaving the worker undisturbed.

    Raises:
        RuntimeError: the worker failed; the message holds the end of its standard error.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", kind, name]
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        sampler = MemorySampler(process.pid)
        timer = threading.Timer(WORKER_LIMIT_SECONDS, process.kill)
        timer.start()
        result = None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "ready" in message:
                    if memory:
                        sampler.start()
                    process.stdin.write("go\n")
                    process.stdin.flush()
                if "stage" in message:
                    sampler.stage = message["stage"]
                if "run" in message:
                    sampler.stop()
                    result = Run(**message["run"])
            process.wait()
        finally:
            timer.cancel()
            sampler.stop()
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if result is None or process.returncode:
            errors.seek(0)
            words = errors.read().decode(errors="replace")[-3000:]
            raise RuntimeError(f"{kind} {name}: the worker ended with status {process.returncode}\n{words}")
    if memory:
        result.baseline_bytes = sampler.baseline[0]
        result.peak_bytes = sampler.peak[0] - sampler.baseline[0]
        result.peak_private_bytes = sampler.peak_private - sampler.baseline[1]
        result.peak_stage = sampler.peak_stage
    return result


class MemorySampler:
    """Peak PSS of a process and all its descendants, sampled in a thread.

    Args:
        pid: the process.

    Attributes:
        stage: what the process is doing, set by whoever knows.
        baseline: (PSS, anonymous PSS) in bytes when sampling began.
        peak: the same at the highest PSS.
        peak_private: the highest anonymous PSS.
        peak_stage: the stage at the highest PSS.
    """

    def __init__(self, pid: int) -> None:
        self.stage = ""
        self.baseline = (0, 0)
        self.peak = (0, 0)
        self.peak_private = 0
        self.peak_stage = ""
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        """Take the baseline, then sample until `stop`."""
        self.baseline = self.peak = pss_bytes(self._pid)
        self.peak_private = self.baseline[1]
        self._thread.start()

    def stop(self) -> None:
        """End sampling; more calls do nothing."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            stage = self.stage
            now = pss_bytes(self._pid)
            self.peak_private = max(self.peak_private, now[1])
            if now[0] > self.peak[0]:
                self.peak, self.peak_stage = now, stage


def pss_bytes(pid: int) -> tuple[int, int]:
    """(PSS, its anonymous part) of a process and its descendants, in bytes; those that just ended count nothing."""
    total = private = 0
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        try:
            for line in Path(f"/proc/{current}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
                elif line.startswith("Pss_Anon:"):
                    private += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return total, private


@dataclass(frozen=True)
class Verdict:
    """Bare and ours for one model, summed up.

    Attributes:
        name: of the model.
        bare, ours: medians over the repeats; memory from the run made for it.
        own: seconds that are ours: passes, partition and the rest, and what our export and build add to the bare ones.
        own_seconds: their sum, which is the difference of the totals.
        time_ratio: that sum as a share of the bare run's time.
        memory_limit_bytes: most that our peak may be, above the baseline.
        spread: (bare, ours) longest minus shortest total, in seconds.
    """

    name: str
    bare: Run
    ours: Run
    own: Mapping[str, float]
    own_seconds: float
    time_ratio: float
    memory_limit_bytes: float
    spread: tuple[float, float]

    @property
    def time_holds(self) -> bool:
        return self.time_ratio <= TIME_LIMIT

    @property
    def memory_holds(self) -> bool:
        return self.ours.peak_bytes <= self.memory_limit_bytes

    @property
    def extra_memory(self) -> float:
        """What ours needs beyond bare, in sets of weights."""
        return (self.ours.peak_bytes - self.bare.peak_bytes) / self.ours.weight_bytes


def judge(name: str, bare: Sequence[Run], ours: Sequence[Run], memory: tuple[Run, Run]) -> Verdict:
    """Sum up the runs of one model.

    Args:
        name: of the model.
        bare, ours: the runs for time.
        memory: the bare and our run for memory.
    """
    middle = [_median(runs, of_memory) for runs, of_memory in zip((bare, ours), memory, strict=True)]
    before, after = (run.seconds for run in middle)
    bare_total, our_total = (run.total for run in middle)
    own = {
        "passes": after["passes"],
        "partition": after["partition"],
        "rest": after["rest"],
        "export beyond bare": after["export"] - before["export"] - before["save"],
        "build beyond bare": after["build"] - before["parse"] - before["build"],
    }
    # Peaks are counted without the model, which is one of the 2.5 sets of weights.
    limit = (MEMORY_LIMIT - 1) * middle[1].weight_bytes + middle[0].peak_bytes
    return Verdict(
        name=name,
        bare=middle[0],
        ours=middle[1],
        own=own,
        own_seconds=our_total - bare_total,
        time_ratio=(our_total - bare_total) / bare_total,
        memory_limit_bytes=limit,
        spread=tuple(max(r.total for r in runs) - min(r.total for r in runs) for runs in (bare, ours)),  # type: ignore[arg-type]
    )


def _median(runs: Sequence[Run], memory: Run) -> Run:
    def middle(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {key: statistics.median(value[key] for value in values) for key in values[0]}

    return dataclasses.replace(
        memory,
        seconds=middle([run.seconds for run in runs]),
        details=middle([run.details for run in runs]),
        total=statistics.median(run.total for run in runs),
        cpu=statistics.median(run.cpu for run in runs),
    )


def table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """The numbers as (headings, rows), for the screen and for the page."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} s"

    def size(value: float) -> str:
        return f"{value / MIB:.0f} MiB"

    headings = [""]
    rows: dict[str, list[str]] = {}
    for verdict in verdicts:
        headings += [f"{TITLES[verdict.name]} bare", f"{TITLES[verdict.name]} convert"]
        bare, ours = verdict.bare, verdict.ours
        holds = {True: "holds", False: "EXCEEDED"}
        pairs: list[tuple[str, str, str]] = [
            (stage, seconds(bare.seconds.get(stage)), seconds(ours.seconds.get(stage)))
            for stage in ("export", "save", "passes", "partition", "parse", "build", "rest")
        ]
        pairs += [(f"  of {phase}", "", seconds(value)) for phase, value in ours.details.items()]
        pairs += [
            ("total", seconds(bare.total), seconds(ours.total)),
            ("longest minus shortest", *map(seconds, verdict.spread)),
            ("CPU seconds", seconds(bare.cpu), seconds(ours.cpu)),
            *((f"own: {stage}", "", seconds(value)) for stage, value in verdict.own.items()),
            ("own stages together", "", seconds(verdict.own_seconds)),
            (f"own / bare (limit {TIME_LIMIT:.0%})", "", f"{verdict.time_ratio:+.1%} {holds[verdict.time_holds]}"),
            ("weights", size(bare.weight_bytes), size(ours.weight_bytes)),
            ("engine", size(bare.engine_bytes), size(ours.engine_bytes)),
            ("before the start: imports and model", size(bare.baseline_bytes), size(ours.baseline_bytes)),
            ("peak above that", size(bare.peak_bytes), size(ours.peak_bytes)),
            ("  reached in", bare.peak_stage, ours.peak_stage),
            ("  private part at most", size(bare.peak_private_bytes), size(ours.peak_private_bytes)),
            (
                f"limit: bare's + {MEMORY_LIMIT - 1} weights (the model is 1 more)",
                "",
                f"{size(verdict.memory_limit_bytes)} {holds[verdict.memory_holds]}",
            ),
            ("beyond bare", "", f"{verdict.extra_memory:+.2f} weights"),
        ]
        for label, *cells in pairs:
            row = rows.setdefault(label, [""] * (len(headings) - 3))
            row += cells
        for row in rows.values():
            row += [""] * (len(headings) - 1 - len(row))
    return headings, [[label, *cells] for label, cells in rows.items()]


def machine() -> str:
    """This machine in a line."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def notes(verdicts: Sequence[Verdict], repeats: int, load: tuple[float, float]) -> list[str]:
    """What one must know to read the numbers."""
    versions = ", ".join(f"{name} {version}" for name, version in verdicts[0].ours.versions.items())
    noisy = [TITLES[v.name] for v in verdicts if abs(v.own_seconds) < max(v.spread)]
    remarks = [
        f"{dt.date.today()}; {machine()}; {versions}.",
        f"Medians of {repeats} fresh processes each, bare and convert in turns; load average {load[0]:.1f} before and "
        f"{load[1]:.1f} after (both count this benchmark). Memory is from one more process each.",
        "; ".join(f"{TITLES[v.name]}: {v.ours.parameters / 1e6:.1f} M parameters" for v in verdicts)
        + f"; random float32 weights, opset {OPSET}, batch 1 to 32, sequence 8 to 512.",
    ]
    if noisy:
        remarks.append(
            f"{' and '.join(noisy)}: repeats of the same run differ by more than bare and convert do, so that the "
            "ratio tells less than its digits."
        )
    return remarks


def page(verdicts: Sequence[Verdict], remarks: Sequence[str]) -> str:
    """The page for docs/."""
    headings, rows = table(verdicts)
    lines = [
        "# What convert costs",
        "",
        "`convert` beside a bare `torch.onnx.export` with parser and builder. Written by",
        "`python scripts/bench_convert.py --write docs/bench-convert.md`; the script's head says how it measures.",
        "",
        *(f"- {remark}" for remark in remarks),
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
        *("| " + " | ".join([row[0].strip(), *row[1:]]) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def bench(names: Sequence[str], repeats: int, console: Console) -> list[Verdict]:
    """Measure the models."""
    verdicts = []
    for name in names:
        runs: dict[str, list[Run]] = {"bare": [], "ours": []}
        for repeat in range(repeats):
            for kind, made in runs.items():
                made.append(measure(kind, name, memory=False))
                console.print(f"{TITLES[name]} {kind} {repeat + 1}/{repeats}: {made[-1].total:.1f} s", style="dim")
        memory = (measure("bare", name, memory=True), measure("ours", name, memory=True))
        verdicts.append(judge(name, runs["bare"], runs["ours"], memory))
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="processes for each time; default 3")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, in Markdown")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        worker(*options.worker)
        return 0
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    console = Console()
    before = os.getloadavg()[0]
    try:
        verdicts = bench(options.models, options.repeats, console)
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    headings, rows = table(verdicts)
    shown = Table(title="convert beside a bare export, parser and builder")
    shown.add_column("", no_wrap=True)
    for heading in headings[1:]:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    remarks = notes(verdicts, options.repeats, (before, os.getloadavg()[0]))
    for remark in remarks:
        console.print(remark, markup=False, highlight=False)
    if options.json:
        numbers = [
            dataclasses.asdict(v) | {"time_holds": v.time_holds, "memory_holds": v.memory_holds} for v in verdicts
        ]
        options.json.write_text(json.dumps({"remarks": remarks, "models": numbers}, indent=1) + "\n")
    if options.write:
        options.write.write_text(page(verdicts, remarks))
    return 0 if all(v.time_holds and v.memory_holds for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
