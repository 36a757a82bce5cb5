"""scripts/model_sweep.py and model_zoo.py: small models that run, outcomes that tell good from bad, resuming."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default", "error:::trtbridge")  # transformers warns of what it changes next


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield
    for name in (
        "model_sweep",
        "model_sweep_examine",
        "model_zoo",
        "model_zoo_configs",
        "model_zoo_inputs",
        "model_zoo_kinds",
    ):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def zoo() -> Any:
    return _load("model_zoo")


@pytest.fixture(scope="module")
def examination(zoo: Any) -> Any:
    return _load("model_sweep_examine")


@pytest.fixture(scope="module")
def sweep(examination: Any) -> Any:
    return _load("model_sweep")


# The zoo


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("bert", {"input_ids", "attention_mask"}),
        ("t5", {"input_ids", "attention_mask", "decoder_input_ids"}),
        ("clip", {"input_ids", "attention_mask", "pixel_values"}),
        ("swin", {"pixel_values"}),
        ("whisper", {"input_features", "decoder_input_ids"}),
        ("wav2vec2", {"input_values"}),
        ("videomae", {"pixel_values"}),
    ],
)
def test_small_models_run(zoo: Any, kind: str, inputs: set[str]) -> None:
    recipe = zoo.make("transformers", kind)
    tensors = {name for name, value in recipe.kwargs.items() if isinstance(value, torch.Tensor)}
    assert tensors == inputs
    assert not recipe.module.training
    assert sum(p.numel() for p in recipe.module.parameters()) < 40_000_000
    assert all(name in recipe.inputs for name in inputs)
    with torch.no_grad():
        result = recipe.module(**recipe.kwargs)
    assert result[0].isfinite().all()
    assert result[0].std() > 0


def test_the_same_model_every_time(zoo: Any) -> None:
    one, other = (zoo.make("transformers", "gpt2") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True))
    assert torch.equal(one.kwargs["input_ids"], other.kwargs["input_ids"])


def test_image_tokens_are_as_many_as_the_model_asks_for(zoo: Any) -> None:
    recipe = zoo.make("transformers", "llava")
    assert "pixel_values" in recipe.kwargs
    assert recipe.note == ""
    token = recipe.module.config.image_token_id
    count = int((recipe.kwargs["input_ids"] == token).sum(1)[0])
    assert count > 4
    assert int((recipe.kwargs["input_ids"][:, count:] == token).sum()) == 0


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        pytest.param("qwen2_vl", {"pixel_values", "image_grid_thw"}, id="sections of rotary embeddings, patches"),
        pytest.param("blip-2", {"pixel_values", "input_ids"}, id="image token is None"),
        pytest.param("deepseek_v2", {"input_ids"}, id="numbers are None"),
        pytest.param("lfm2_moe", {"input_ids"}, id="layer types are None"),
        pytest.param("tipsv2", {"pixel_values", "input_ids"}, id="backbone names layers"),
        pytest.param("zamba", {"input_ids"}, id="fields of its own"),
        pytest.param("lxmert", {"visual_feats", "visual_pos"}, id="arguments of its own"),
        pytest.param("musicgen", {"decoder_input_ids"}, id="class of its own"),
    ],
)
def test_models_that_need_more_than_small_widths(zoo: Any, kind: str, inputs: set[str]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    if kind not in MODEL_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    recipe = zoo.make("transformers", kind)
    assert inputs <= set(recipe.kwargs)
    assert sum(p.numel() for p in recipe.module.parameters()) < 20_000_000, "at the small level"
    assert "thin" not in recipe.note
    with torch.no_grad():
        result = recipe.module(**recipe.kwargs)
    assert result[0].isfinite().all()


def test_image_tokens_and_patches_of_several_pictures_agree(zoo: Any) -> None:
    kwargs = zoo.make("transformers", "qwen2_vl").kwargs
    assert kwargs["pixel_values"].shape[0] == int(kwargs["image_grid_thw"].prod(1).sum())
    assert kwargs["mm_token_type_ids"].sum(1).tolist() == [4, 4], "4x4 patches, merged two by two"


def test_a_part_says_which(zoo: Any) -> None:
    recipe = zoo.make("transformers", "bark")
    assert recipe.note == "its semantic"
    assert type(recipe.module).__name__ == "BarkSemanticModel"


def test_a_model_without_arguments_says_so(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "PARTS", {})
    with pytest.raises(zoo.NoRecipeError, match=r"BarkModel has no arguments|million parameters"):
        zoo.make("transformers", "bark")


def test_weights_that_are_constants_get_values(zoo: Any) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 1))
    torch.nn.init.zeros_(module[1].weight)
    with torch.no_grad():
        module[1].bias.fill_(float("nan"))
    zoo.enliven(module)
    for tensor in (*module.parameters(), module[0].running_mean, module[0].running_var):
        assert tensor.isfinite().all()
        assert tensor.std() > 0
    assert (module[0].running_var > 0).all()


def test_what_cannot_be_made_says_what_was_tried(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "MOST_PARAMETERS", 10)
    with pytest.raises(zoo.NoRecipeError, match=r"small.*million parameters"):
        zoo.make("transformers", "bert")


def test_every_kind_has_its_place(zoo: Any) -> None:
    kinds = zoo.names("transformers")
    assert len(kinds) > 300
    ranks = [zoo.rank("transformers", kind)[0] for kind in kinds]
    assert sum(rank == 0 for rank in ranks) > 150
    assert zoo.rank("transformers", "bert") < zoo.rank("transformers", "zamba2")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("tf_efficientnet_b0", "efficientnet"),
        ("resnet18", "resnet"),
        ("legacy_xception", "xception"),
        ("vit_tiny_patch16_224", "vit"),
        ("ese_vovnet19b_dw", "vovnet"),
    ],
)
def test_families_of_timm(zoo: Any, name: str, family: str) -> None:
    assert zoo.timm_prefix(name) == family


def test_the_table_of_timm_families(zoo: Any) -> None:
    table = json.loads(zoo.TIMM_FAMILIES.read_text())
    assert len(table) > 100
    assert all(zoo.timm_prefix(model) == key.partition("/")[2] for key, model in table.items())


# Judging


@pytest.fixture
def judged(examination: Any) -> Any:
    def judge(got: Any, expected: Any, reference: Any = None, random: bool = False, dtype: str = "float32") -> Any:
        outcome = examination.Outcome("timm", "x", "onnxruntime", dtype)
        examination.judge(outcome, [got], [expected], [expected if reference is None else reference], random)
        return outcome

    return judge


def test_equal_is_a_match(judged: Any) -> None:
    x = torch.randn(2, 9)
    outcome = judged(x.clone(), x)
    assert outcome.stage == "match"
    assert outcome.cosine == pytest.approx(1)
    assert outcome.max_abs_error == 0


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: x.roll(1, 1), id="moved"),
        pytest.param(lambda x: x * 1.02, id="scaled"),
        pytest.param(lambda x: torch.where(x == x.max(), 0.9 * x, x), id="one element"),
        pytest.param(lambda x: torch.where(x == x.max(), float("nan"), x), id="one nan"),
        pytest.param(lambda x: x[:1], id="shape"),
        pytest.param(torch.zeros_like, id="zeros"),
    ],
)
def test_what_differs_is_a_mismatch(judged: Any, spoil: Any) -> None:
    x = torch.randn(2, 999)
    outcome = judged(spoil(x), x)
    assert outcome.stage == "mismatch"
    assert outcome.words


def test_what_is_not_finite_must_be_the_same(judged: Any) -> None:
    x = torch.tensor([1.0, float("-inf"), float("nan"), 3.0])
    assert judged(x.clone(), x).stage == "match"
    assert judged(torch.tensor([1.0, float("inf"), float("nan"), 3.0]), x).stage == "mismatch"
    nothing = torch.full((3,), float("nan"))
    assert judged(nothing, nothing).stage == "no recipe", "a model that gives nothing but NaN shows nothing"


def test_integers_must_be_equal(judged: Any) -> None:
    x = torch.arange(1000)
    assert judged(x.clone(), x).stage == "match"
    assert judged(torch.where(x > 900, x + 1, x), x).stage == "mismatch"


def test_half_precision_may_be_as_far_from_float32_as_pytorch_is(judged: Any) -> None:
    exact = torch.randn(1000)
    theirs = exact + 0.2 * torch.randn(1000)
    ours = exact + 0.2 * torch.randn(1000)
    assert judged(ours.half(), theirs.half(), exact, dtype="float16").stage == "match"
    assert judged(torch.randn(1000).half(), exact.half(), exact, dtype="float16").stage == "mismatch"
    assert judged(ours, theirs, theirs).stage == "mismatch"


def test_random_models_are_compared_by_shape(judged: Any) -> None:
    assert judged(torch.randn(9), torch.randn(9), random=True).stage == "shapes only"
    assert judged(torch.randn(9), torch.randn(7), random=True).stage == "shapes only"
    assert judged(torch.randn(9), torch.randn(7, 1), random=True).stage == "mismatch"


class _Tie(torch.nn.Module):
    """Picks one of two rows whose scores differ in the last bit of float32 only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.stack([(x + 1e8).sum() - 1e8 * x.numel(), x.sum()])
        return torch.stack([x, -x])[scores.argmax()]


def test_a_mismatch_is_explained(examination: Any) -> None:
    x = torch.full((8,), 0.3)
    outcome = examination.Outcome("timm", "x", "onnxruntime", "float32", "mismatch", "output 0")
    examination.explain_mismatch(outcome, torch.nn.Linear(8, 3), (x,), {}, [torch.nn.Linear(8, 3)(x).detach()])
    assert outcome.stage == "torch.export", "neither is what the module itself gives"
    linear = torch.nn.Linear(8, 3)
    outcome = examination.Outcome("timm", "x", "onnxruntime", "float32", "mismatch", "output 0")
    examination.explain_mismatch(outcome, linear, (x,), {}, [linear(x).detach()])
    assert outcome.stage == "mismatch", "PyTorch agrees with itself, so the conversion is to blame"
    tie = _Tie()
    outcome = examination.Outcome("timm", "x", "onnxruntime", "float32", "mismatch", "output 0")
    examination.explain_mismatch(outcome, tie, (x,), {}, [tie(x)])
    assert outcome.stage == "unstable"


# Whole runs


def test_a_model_in_this_process(sweep: Any) -> None:
    outcome = sweep.examine("transformers", "bert", "onnxruntime", "float32")
    assert outcome.stage == "match", outcome.words
    assert outcome.segments == 1
    assert outcome.plugins == {}
    assert set(outcome.seconds) == {"eager", "convert", "run"}
    assert outcome.parameters > 1000


def test_where_a_model_parts_from_pytorch(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--localize", "--backend", "onnxruntime", "--only", "transformers", "--filter", "^bert$"]
    assert sweep.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("transformers bert\n")
    assert "nothing wrong in export, passes, engine onnxruntime" in text


def test_what_torch_export_refuses_says_its_words(sweep: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    monkeypatch.setattr(zoo, "make", lambda source, name: zoo.Recipe(Branches(), (torch.ones(3),)))
    outcome = sweep.examine("timm", "branches", "onnxruntime", "float32")
    assert outcome.stage == "torch.export"
    assert "data-dependent" in outcome.words


class _Chosen(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0] * 2


def test_a_bound_is_given_where_the_backend_asks_for_one(sweep: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trtbridge as tb

    tried = []
    convert = tb.convert

    def asks(*args: Any, **options: Any) -> Any:
        most = options.get("max_data_size")
        tried.append(most)
        if most is None:
            raise tb.DynamicShapeError("State a bound: max_data_size for all of them")
        if most > 64:
            raise tb.BuildError("too large")
        return convert(*args, **options)

    monkeypatch.setattr(tb, "convert", asks)
    monkeypatch.setattr(zoo, "make", lambda source, name: zoo.Recipe(_Chosen(), (torch.randn(9),), note="small"))
    outcome = sweep.examine("timm", "chosen", "onnxruntime", "float32")
    assert tried == [None, 1024, 64]
    assert outcome.stage == "match", outcome.words
    assert outcome.note == "small, max_data_size=64"


def test_other_refusals_of_shapes_are_not_tried_again(sweep: Any, zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trtbridge as tb

    def refuses(*args: Any, **options: Any) -> Any:
        assert "max_data_size" not in options
        raise tb.DynamicShapeError("the model fixes this size")

    monkeypatch.setattr(tb, "convert", refuses)
    monkeypatch.setattr(zoo, "make", lambda source, name: zoo.Recipe(torch.nn.ReLU(), (torch.randn(9),)))
    outcome = sweep.examine("timm", "relu", "onnxruntime", "float32")
    assert (outcome.stage, outcome.note) == ("convert", "")
    assert "fixes this size" in outcome.words


WORKER = """
import json, sys, time
print(json.dumps({"ready": {"python": "3"}}), flush=True)
for line in sys.stdin:
    source, name = line.rstrip().split("\\t")
    if name == "slow":
        time.sleep(60)
    if name == "dies":
        sys.stderr.write("last words\\n")
        sys.exit(7)
    fields = {"source": source, "name": name, "backend": "onnxruntime", "dtype": "float32", "stage": "match"}
    print(json.dumps(fields), flush=True)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A worker that needs no torch."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return [sys.executable, str(path)]


def test_workers_outlive_slow_and_dying_models(sweep: Any, command: list[str]) -> None:
    stored: dict[str, Any] = {}
    workers = sweep.Workers("onnxruntime", "float32", 3.0, lambda o: stored.update({o.name: o}), command)
    models = [("timm", name) for name in ("one", "slow", "two", "dies", "three")]
    started = time.monotonic()
    workers.run(models, jobs=2)
    assert time.monotonic() - started < 40
    assert {name: o.stage for name, o in stored.items()} == {
        "one": "match",
        "slow": "timeout",
        "two": "match",
        "dies": "crash",
        "three": "match",
    }
    assert "exit status 7: last words" in stored["dies"].words
    assert workers.environment == {"python": "3"}


def test_nothing_starts_after_the_deadline(sweep: Any, command: list[str]) -> None:
    stored: list[Any] = []
    workers = sweep.Workers("onnxruntime", "float32", 3.0, stored.append, command)
    workers.run([("timm", "one")], jobs=1, deadline=time.monotonic() - 1)
    assert stored == []


def test_results_are_kept_and_rendered(sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "page.md"
    results = sweep.Results(path)
    results.environments["onnxruntime float32"] = {"torch": "2"}
    results.add(
        sweep.Outcome(
            "timm", "resnet/resnet", "onnxruntime", "float32", "match", note="resnet18", cosine=1.0,
            max_abs_error=1e-6, plugins={"aten::cummax": 2}, segments=3,
        )
    )  # fmt: skip
    failed = sweep.Outcome("transformers", "led", "onnxruntime", "float32", "convert", "Error: a | b\nnext line")
    results.add(failed)
    results.add(sweep.Outcome("transformers", "vits", "onnxruntime", "float32", "torch.export", "GuardOnData"))
    again = sweep.Results(path)
    assert again.outcomes == results.outcomes
    arguments = ["--json", str(path), "--out", str(out), "--render"]
    assert sweep.main(arguments) == 1, "a model failed"
    text = out.read_text()
    assert "| onnxruntime | float32 | timm | 1 |" in text
    assert "1 of 1 (100.0 %)" in text
    assert "0 of 1 (0.0 %)" in text, "what torch.export refuses does not count"
    assert "Error: a \\| b next line" in text
    assert "2 aten::cummax" in text
    del results.outcomes[failed.key]
    results.write()
    assert sweep.main(arguments) == 0


def test_known_models_are_not_run_again(sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    results = sweep.Results(path)
    results.add(sweep.Outcome("transformers", "bert", "onnxruntime", "float32", "match"))
    options = ["--json", str(path), "--no-render", "--only", "transformers", "--filter", "^bert$"]
    assert sweep.main([*options, "--backend", "onnxruntime"]) == 0
    assert "0 models to run, 1 known" in capsys.readouterr().out
    assert sweep.main([*options, "--backend", "onnxruntime", "--again", "match", "--budget", "0.000001"]) == 0
    assert "1 models to run, 0 known" in capsys.readouterr().out


def test_what_failed_before_comes_first(sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.json"
    results = sweep.Results(path)
    for name, stage in [("bert", "match"), ("gpt2", "timeout"), ("zamba2", "no recipe"), ("opt", "convert")]:
        results.add(sweep.Outcome("transformers", name, "onnxruntime", "float32", stage))
    results.add(sweep.Outcome("transformers", "t5", "tensorrt", "float32", "convert"))
    order: list[str] = []
    monkeypatch.setattr(sweep.Workers, "run", lambda self, models, *rest: order.extend(name for _, name in models))
    options = ["--json", str(path), "--no-render", "--only", "transformers", "--backend", "onnxruntime"]
    sweep.main([*options, "--filter", "^(bert|gpt2|zamba2|opt|t5)$", "--again", "all"])
    assert order == ["opt", "zamba2", "t5", "gpt2", "bert"], "t5 was never tried on this backend"
