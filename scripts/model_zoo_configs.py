"""Small configs of transformers models, by the names of their fields; used by model_zoo.py."""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from typing import Any

from model_zoo_inputs import LAST_PLAIN_TOKEN, VOCABULARY
from model_zoo_kinds import FIELDS

LAYERS = 2
WIDTH, INNER, HEADS, HEAD_DIM = 64, 128, 4, 16

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
        "num_experts_per_tok num_experts_per_token moe_k experts_per_token moe_topk num_selected_experts "
        "linear_num_key_heads",
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
_FILLED = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": INNER,
    "expert_intermediate_size": INNER,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 8,
}  # None by default in configs whose model needs a number all the same
_HIERARCHY = (
    "depths",
    "hidden_sizes",
    "num_heads",
    "embed_dims",
    "stage_out_channels",
    "layer_depths",
    "blocks_per_stage",
)


LEVELS = ("small", "filled", "thin", "default")
"""In the order to try: all small; small, with numbers for fields that are None; widths kept; all kept but caches."""


def small_config(kind: str, config_class: Any, level: str) -> Any:
    """A config of a kind, made small by rules and by the kind's own entry in model_zoo_kinds.FIELDS.

    Args:
        kind: a model type of transformers.
        config_class: its config's class.
        level: one of LEVELS.
    """
    special = FIELDS.get(kind, {})
    try:
        made = shrink(config_class(), level)
    except Exception:  # some have parts without defaults
        if not special:
            raise
        made = {}
    return config_class(**_merged(made, special))


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        mine = both.get(key)
        parts = isinstance(mine, dict) and isinstance(value, dict) and key != "rope_parameters"
        both[key] = _merged(mine, value) if parts else value
    return both


def shrink(config: Any, level: str = "small") -> dict[str, Any]:
    """The keyword arguments that make a small config of the same class.

    Args:
        config: a transformers config with its defaults.
        level: one of LEVELS.
    """
    made: dict[str, Any] = {}
    fields = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    hierarchical = any(isinstance(fields.get(key), (list, tuple)) for key in _HIERARCHY)
    small = level in ("small", "filled")
    heads = fields.get("num_attention_heads")
    for key in ("layer_types", "layers_block_type"):
        kinds = fields.get(key)
        if level != "default" and isinstance(kinds, (list, tuple)) and len(set(kinds)) > 1:
            made[key] = list(dict.fromkeys(kinds))
    layers = max((len(kinds) for kinds in made.values()), default=LAYERS)
    backbone = bool(fields.get("out_features"))  # names layers, so that their number must stay
    for key, value in fields.items():
        if hasattr(value, "to_diff_dict") and hasattr(value, "model_type"):
            made[key] = _part(value, level)
        elif key == "use_cache":
            made[key] = False
        elif key in _NEEDED and value is None:
            made[key] = _NEEDED[key]
        elif level == "filled" and value is None and (key in _FILLED or _is_media_token(key)):
            made[key] = _FILLED.get(key, _token_number(key))
        elif level == "filled" and value is None and key == "layer_types":
            made[key] = ["full_attention"] * layers
        elif level == "filled" and value is None and key == "mlp_layer_types":
            made[key] = ["dense"] + ["sparse"] * (layers - 1)
        elif level == "default" or isinstance(value, bool) or (backbone and key in _LAYER_FIELDS):
            continue
        elif key == "rope_parameters" and small:
            made |= _rope(config, value)
        elif re.search(r"_token_(id|index)$", key):
            made |= _token(key, value)
        elif isinstance(value, int):
            number = _shrunk(key, value, "small" if small and not hierarchical else "thin", layers, heads)
            if number is not None and number < value:
                made[key] = number
        elif key in ("depths", "layer_depths", "blocks_per_stage", "num_blocks") and isinstance(value, (list, tuple)):
            made[key] = [min(part, 2) if isinstance(part, int) else part for part in value]
        elif key == "image_size" and isinstance(value, (list, tuple)) and max(value, default=0) > 256:
            made[key] = [min(part, 256) for part in value]
    return made


def _part(config: Any, level: str) -> dict[str, Any]:
    """A config within another: its class may have other defaults, so that what differs from those is kept."""
    own = config.to_diff_dict()
    shrunk = shrink(config, level)
    if level != "default":
        own = {name: part for name, part in own.items() if name not in _DERIVED}
        chosen, stages = getattr(config, "out_features", None), getattr(config, "stage_names", None)
        if chosen and stages and list(chosen) == list(stages)[-1:]:  # the last, which a shallow one has under its name
            own = {name: part for name, part in own.items() if name not in ("out_features", "out_indices")}
        elif chosen and stages and "out_features" in own:  # names layers, so that their number must stay
            shrunk = {name: part for name, part in shrunk.items() if name not in _LAYER_FIELDS}
    return own | shrunk | {"model_type": config.model_type}


def _rope(config: Any, parameters: Any) -> dict[str, Any]:
    """Rotary embeddings whose sections (time, height, width) fit the small heads."""
    if parameters is not None and not isinstance(parameters, dict):
        return {}
    if "mrope_section" not in (parameters or {}) and not _has_sections(config):
        return {} if parameters is None else {"rope_parameters": parameters}
    plain = parameters or {"rope_type": "default", "rope_theta": 10000.0}
    share = plain.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    half = int(HEAD_DIM * share) // 2
    rest = max(half * 3 // 8, 1)
    return {"rope_parameters": plain | {"mrope_section": [half - 2 * rest, rest, rest]}}


def _has_sections(config: Any) -> bool:
    """Whether the model takes sections from the config, or else its own for wide heads."""
    if "Vision" in type(config).__name__ or "Audio" in type(config).__name__:
        return False
    try:
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return '"mrope_section"' in inspect.getsource(modeling)


def _is_media_token(key: str) -> bool:
    return re.fullmatch(r"(image|video|audio)_token_(id|index)", key) is not None


def _token_number(key: str) -> int:
    return LAST_PLAIN_TOKEN + zlib.crc32(key.encode()) % (VOCABULARY - LAST_PLAIN_TOKEN)


def _token(key: str, value: Any) -> dict[str, Any]:
    """A special token within the small vocabulary; the same for the same field of every part of a config."""
    number = _token_number(key)
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
