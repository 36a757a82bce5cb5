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
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_zoo_inputs import (
    BATCH,
    LAST_PLAIN_TOKEN,
    VOCABULARY,
    NoRecipeError,
    input_sets,
    pictures,
    try_inputs,
)

LAYERS = 2
WIDTH, INNER, HEADS, HEAD_DIM = 64, 128, 4, 16
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


# transformers: small configs

_NUMBERS = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size out_hidden_size projection_dim hidden_dim "
        "emb_dim encoder_hidden_size decoder_hidden_size d_embed input_dim output_dim output_hidden_size "
        "cross_attention_dim lm_hidden_size mm_hidden_size text_hidden_size vision_hidden_size "
        "rnn_hidden_size word_embed_proj_dim lru_width cross_attention_hidden_size mm_embed_dim "
        "audio_embed_dim adapter_hidden_size output_proj_dims output_channels",
    ),
    (
        INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff d_inner moe_intermediate_size "
        "dim_feedforward shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size "
        "expert_intermediate_size intermediate_size_mlp attention_hidden_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size encoder_intermediate_dim decoder_intermediate_dim block_ff_dim",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads heads "
        "encoder_num_attention_heads decoder_num_attention_heads encoder_num_heads decoder_num_heads "
        "attention_heads index_n_heads linear_num_value_heads",
    ),
    (
        HEAD_DIM,
        "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_dim kv_channels d_head "
        "global_head_dim index_head_dim attention_head_size query_pre_attn_scalar rotary_dim",
    ),
    (
        32,
        "kv_lora_rank q_lora_rank index_topk num_pos_feats d_latents",
    ),
    (
        2,
        "num_experts_per_tok moe_k experts_per_token moe_topk num_selected_experts linear_num_key_heads",
    ),
    (
        1,
        "n_group topk_group n_shared_experts num_zero_experts first_k_dense_replace",
    ),
    (
        20,
        "num_queries num_latents",
    ),
)
_SIZES = {name: number for number, text in _NUMBERS for name in text.split()}
_DERIVED = {"layer_types", "mlp_layer_types", "per_layer_config", "layers_block_type", "layer_block_type"}
_DERIVED |= {"image_embedding_size"}  # fields that follow from others, so that they must not stay as they were
_LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers encoder_layers decoder_layers num_layers num_decoder_layers "
    "num_encoder_layers depth encoder_num_layers decoder_num_layers num_hidden_layers_encoder "
    "num_block_layers num_blocks encoder_num_hidden_layers decoder_num_hidden_layers encoder_n_layers "
    "l_layers x_layers r_layers"
)
_LAYER_FIELDS = frozenset(_LAYER_COUNTS.split())
_NEEDED = {"vocab_size": VOCABULARY, "prediction_length": 8}  # without a default in some configs
_HIERARCHY = (
    "depths",
    "hidden_sizes",
    "num_heads",
    "embed_dims",
    "stage_out_channels",
    "layer_depths",
    "blocks_per_stage",
)


def transformers_kinds() -> list[str]:
    """Every model type of transformers that has a base model."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def shrink(config: Any, level: str = "small") -> dict[str, Any]:
    """The keyword arguments that make a small config of the same class.

    Args:
        config: a transformers config with its defaults.
        level: "small", or "thin" for a config that keeps its widths, or "default" for all but no caches.
    """
    made: dict[str, Any] = {}
    fields = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    hierarchical = any(isinstance(fields.get(key), (list, tuple)) for key in _HIERARCHY)
    heads = fields.get("num_attention_heads")
    kinds = fields.get("layer_types")
    if level != "default" and isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
        made["layer_types"] = list(dict.fromkeys(kinds))
    layers = len(made.get("layer_types", ())) or LAYERS
    backbone = bool(fields.get("out_features"))  # names layers, so that their number must stay
    for key, value in fields.items():
        if hasattr(value, "to_diff_dict") and hasattr(value, "model_type"):
            own = value.to_diff_dict()
            if level != "default":
                own = {name: part for name, part in own.items() if name not in _DERIVED}
            made[key] = own | shrink(value, level) | {"model_type": value.model_type}
        elif key == "use_cache":
            made[key] = False
        elif key in _NEEDED and value is None:
            made[key] = _NEEDED[key]
        elif level == "default" or isinstance(value, bool) or (backbone and key in _LAYER_FIELDS):
            continue
        elif key == "rope_parameters" and isinstance(value, dict) and level == "small":
            made[key] = _rope(value)
        elif re.search(r"_token_(id|index)$", key):
            made |= _token(key, value)
        elif isinstance(value, int):
            number = _shrunk(key, value, level if not hierarchical else "thin", layers, heads)
            if number is not None and number < value:
                made[key] = number
        elif key in ("depths", "layer_depths", "blocks_per_stage", "num_blocks") and isinstance(value, (list, tuple)):
            made[key] = [min(part, 2) if isinstance(part, int) else part for part in value]
        elif key == "image_size" and isinstance(value, (list, tuple)) and max(value, default=0) > 256:
            made[key] = [min(part, 256) for part in value]
    return made


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings whose sections (time, height, width) fit the small heads."""
    if "mrope_section" not in parameters:
        return parameters
    half = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
    return parameters | {"mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}


def _token(key: str, value: Any) -> dict[str, Any]:
    """A special token within the small vocabulary; the same for the same field of every part of a config."""
    number = LAST_PLAIN_TOKEN + zlib.crc32(key.encode()) % (VOCABULARY - LAST_PLAIN_TOKEN)
    if isinstance(value, int) and value > LAST_PLAIN_TOKEN:
        return {key: number}
    if isinstance(value, (list, tuple)) and any(isinstance(part, int) and part > LAST_PLAIN_TOKEN for part in value):
        return {key: [number]}
    return {}


def _shrunk(key: str, value: int, level: str, layers: int, heads: Any) -> int | None:
    if key in _LAYER_FIELDS:
        return layers
    if "vocab" in key and key.endswith("size") and value > VOCABULARY:
        return VOCABULARY
    if key in ("image_size", "img_size", "pretrain_image_size") and value > 256:
        return 256
    if key == "max_source_positions":
        return 64
    if key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        return 4
    if level == "thin":
        return None
    if key in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        return value if value == 1 else HEADS if value == heads else HEADS // 2
    return _SIZES.get(key)


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
    except Exception as error:
        raise NoRecipeError(f"{type(error).__name__}: {error}") from error
    errors = []
    for level in ("small", "thin", "default"):
        try:
            config = config_class(**(shrink(config_class(), level) | OVERRIDES.get(kind, {})))
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model_class(config).parameters())
            if parameters > MOST_PARAMETERS:
                raise NoRecipeError(f"{parameters / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            module = model_class(config).eval().float()
            enliven(module)
        except Exception as error:
            errors.append(f"{level}: {type(error).__name__}: {_first_line(error)}")
            continue
        for chosen in input_sets(module):
            try:
                kwargs = try_inputs(copy.deepcopy(module), config, chosen)
            except Exception as error:
                errors.append(f"{level} with {', '.join(chosen)}: {type(error).__name__}: {_first_line(error)}")
                continue
            parameters_of = inspect.signature(module.forward).parameters
            seen = {"pixel_values", "input_features", "input_values", "pixel_values_videos"} & set(parameters_of)
            note = "text only" if seen and not seen & set(kwargs) and "input_ids" in kwargs else ""
            return Recipe(module, (), kwargs, note if level == "small" else f"{level} {note}".strip())
    raise NoRecipeError("; ".join(dict.fromkeys(errors)))


OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 900, "<s>": 1}},
    "emu3": {"vocabulary_map": {"<image>": 900, "<s>": 1}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "audio-spectrogram-transformer": {"max_length": 128},
    "mamba2": {"num_heads": 8},
    "videomae": {"num_frames": 4, "image_size": 64},
    "vivit": {"num_frames": 4, "image_size": 64},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
}
"""Fields by kind, where the rules by field name do not do."""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]
