"""Small models of every kind that timm and transformers know, with random weights, for scripts/model_sweep.py.

Neither needs a network: timm models are made by name, transformers models from their config class, shrunk by the names
of its fields (widths, heads, layers, vocabulary, image size). The inputs come from the config and the signature of
``forward``; several sets are tried, and the first that the model itself takes is used.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_zoo_configs import LEVELS, small_config
from model_zoo_inputs import BATCH, NoRecipeError, input_sets, pictures, try_inputs
from model_zoo_kinds import CALLS, CLASSES, PARTS

MOST_PARAMETERS = 150_000_000
TIMM_EDGES = (96, 128, 160)
TIMM_FAMILIES = Path(__file__).parent / "model_zoo_timm.json"


@dataclass
class Recipe:
    """A model and a call of it that works.

    Attributes:
        module: float32, eval mode, on the CPU, random weights.
        args, kwargs: example arguments, floating tensors in float32.
        note: what is not plain to see, such as "text only".
    """

    module: torch.nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def inputs(self) -> str:
        """The arguments with their shapes, as text."""
        named = [*((f"arg{i}", value) for i, value in enumerate(self.args)), *self.kwargs.items()]
        return ", ".join(
            f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}"
            for name, value in named
            if isinstance(value, torch.Tensor)
        )


def names(source: str) -> list[str]:
    """All kinds of a source ("timm" or "transformers"), sorted."""
    return sorted(timm_families() if source == "timm" else transformers_kinds())


def rank(source: str, name: str) -> tuple[int, str, str]:
    """The order to run in: well-known kinds and one family of each timm module first."""
    if source == "timm":
        module = name.partition("/")[0]
        first = min(key for key in timm_families() if key.startswith(module + "/"))
        return (0 if name == first else 2, source, name)
    return (0 if name in WELL_KNOWN else 1, source, name)


def make(source: str, name: str) -> Recipe:
    """A small model of a kind.

    Raises:
        NoRecipeError: no small model of it, or no inputs for it, could be made; the message says what was tried.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _timm(timm_families()[name]) if source == "timm" else _transformers(name)


def enliven(module: torch.nn.Module) -> None:
    """Give weights that start as constants (zeros, ones, or memory as it was) values that count.

    Otherwise a residual branch that starts as nothing could be wrong and not show.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.is_meta:
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if not tensor.isfinite().all() or tensor.abs().max() > 1e6:
                if isinstance(dict(module.named_parameters()).get(name), torch.nn.Parameter):
                    tensor.copy_(0.02 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.clamp(-2, 2))
            elif name.endswith("running_mean"):
                tensor.copy_(0.02 * noise)
            elif isinstance(tensor, torch.nn.Parameter) and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(0.02 * noise)


# timm


@functools.cache
def timm_families() -> dict[str, str]:
    """The smallest model of each family, by ``module`` or ``module/prefix``.

    The table beside this file was made by counting parameters; models that this timm does not have are replaced by
    the shortest name of their family, and families that the table lacks are added so.
    """
    import timm

    known: dict[str, str] = json.loads(TIMM_FAMILIES.read_text())
    available = set(timm.list_models())
    found = {}
    for module in timm.list_modules():
        for prefix, members in itertools.groupby(sorted(timm.list_models(module=module), key=timm_prefix), timm_prefix):
            key = f"{module}/{prefix}"
            chosen = known.get(key, "")
            found[key] = chosen if chosen in available else min(members, key=lambda name: (len(name), name))
    return found


def timm_prefix(name: str) -> str:
    """The family of a timm model: the letters before its first digit or "_", without the name of who trained it."""
    return re.split(r"[\d_]", re.sub(r"^(tf|gluon|legacy|ese|seresnet|test)_", "", name), maxsplit=1)[0]


def _timm(name: str) -> Recipe:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False).eval()
    enliven(module)
    channels, *size = module.pretrained_cfg.get("input_size", (3, 224, 224))
    trial = copy.deepcopy(module)  # some modules keep tensors of their first call, on the device of that call
    errors = []
    for edges in (*((edge, edge) for edge in TIMM_EDGES if edge < min(size)), tuple(size)):
        x = pictures((BATCH, channels, *edges))
        try:
            with torch.no_grad():
                trial(x)
        except Exception as error:
            errors.append(f"{edges}: {type(error).__name__}: {error}")
            continue
        return Recipe(module, (x,), note=name)
    raise NoRecipeError("; ".join(errors))


def transformers_kinds() -> list[str]:
    """Every model type of transformers that has a base model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


# transformers: models

_WELL_KNOWN = (
    "albert align altclip audio-spectrogram-transformer bart beit bert big_bird biogpt blenderbot blip "
    "blip-2 bloom bridgetower bros camembert canine chinese_clip clap clip clipseg codegen cohere "
    "convbert convnext convnextv2 cvt data2vec-audio data2vec-text data2vec-vision deberta deberta-v2 "
    "deepseek_v3 deformable_detr deit detr dinov2 dinov3_vit distilbert donut-swin dpr dpt efficientnet "
    "electra encodec ernie esm falcon falcon_mamba flava fnet focalnet funnel gemma gemma2 gemma3_text "
    "git glm glpn gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe groupvit grounding- "
    "dino hiera hubert ibert idefics2 idefics3 imagegpt internvl jamba kosmos-2 layoutlm layoutlmv3 led "
    "levit lilt llama llava longformer longt5 luke m2m_100 mamba mamba2 marian markuplm mask2former "
    "maskformer mbart megatron-bert mimi mistral mixtral mobilebert mobilenet_v1 mobilenet_v2 mobilevit "
    "mobilevitv2 modernbert mpnet mpt mt5 musicgen mvp nystromformer olmo olmo2 oneformer opt owlv2 "
    "owlvit paligemma patchtst pegasus perceiver persimmon phi phi3 pix2struct plbart poolformer "
    "prophetnet pvt pvt_v2 qwen2 qwen2_moe qwen2_vl qwen3 qwen3_moe reformer regnet rembert resnet "
    "roberta roc_bert roformer rt_detr rwkv sam sam2 segformer sew siglip speech_to_text speecht5 "
    "splinter squeezebert stablelm starcoder2 swiftformer swin swin2sr swinv2 switch_transformers t5 "
    "table-transformer tapas time_series_transformer timesformer tvp umt5 unispeech univnet videomae vilt "
    "visual_bert vit vit_mae vit_msn vitdet vits vivit wav2vec2 wav2vec2-bert wavlm whisper xclip xglm "
    "xlm xlm-roberta xlnet xmod yolos yoso zamba"
)
WELL_KNOWN = frozenset(_WELL_KNOWN.split())
"""Kinds that most people have heard of; they are run first."""


def _transformers(kind: str) -> Recipe:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        config_class = CONFIG_MAPPING[kind]
        made = MODEL_MAPPING[config_class]
        model_class = made[0] if isinstance(made, tuple) else made
        if kind in CLASSES:
            model_class = getattr(sys.modules[model_class.__module__], CLASSES[kind])
    except Exception as error:
        raise NoRecipeError(f"{type(error).__name__}: {error}") from error
    own, errors = CALLS.get(kind, {}), []
    for level in LEVELS:
        try:
            config = small_config(kind, config_class, level)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model_class(config).parameters())
            if parameters > MOST_PARAMETERS:
                raise NoRecipeError(f"{parameters / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            module = model_class(config).eval().float()
            if kind in PARTS:
                module = module.get_submodule(PARTS[kind])
                config = module.config
            enliven(module)
        except Exception as error:
            errors.append(f"{level}: {type(error).__name__}: {_first_line(error)}")
            continue
        for chosen in input_sets(module, own):
            try:
                kwargs = try_inputs(copy.deepcopy(module), config, chosen, own)
            except Exception as error:
                errors.append(f"{level} with {', '.join(chosen)}: {type(error).__name__}: {_first_line(error)}")
                continue
            parameters_of = inspect.signature(module.forward).parameters
            seen = {"pixel_values", "input_features", "input_values", "pixel_values_videos"} & set(parameters_of)
            note = "text only" if seen and not seen & set(kwargs) and "input_ids" in kwargs else ""
            notes = ("" if level in ("small", "filled") else level, f"its {PARTS[kind]}" if kind in PARTS else "", note)
            return Recipe(module, (), kwargs, ", ".join(filter(None, notes)))
    raise NoRecipeError("; ".join(dict.fromkeys(errors)) or f"{model_class.__name__} has no arguments that have a name")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]
