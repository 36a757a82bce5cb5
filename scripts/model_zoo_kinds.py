"""What the rules of model_zoo_configs.py and model_zoo_inputs.py do not cover: fields, parts and arguments by kind."""

from __future__ import annotations

from typing import Any

import torch
from model_zoo_inputs import (
    BATCH,
    DECODER_TOKENS,
    TOKENS,
    WIDTH,
    Fields,
    Maker,
    ids_maker,
    image_batch,
    mask_of_text,
    noise,
    packed_patches,
    picture_patches,
    pictures,
)

_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
_BY_LAYER = {
    kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    for kind in ("full_attention", "sliding_attention")
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THIN_AUDIO = {"num_filters": 4, "depths": [1] * 7}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 1000,
}
_CODEC = {"upsample_groups": WIDTH}  # a group a channel, as in the wide one

FIELDS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 128},
    "blt": {
        "encoder_hash_byte_group_vocab": 512,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "chameleon": {"vocabulary_map": {"<image>": 900, "<s>": 1}},
    "clvp": {"speech_config": {"vocab_size": 1024}},
    "cohere_compass": {"text_config": {"rope_parameters": _BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": _BY_LAYER},
    "csm": {"codec_config": _CODEC},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "depth_pro": {
        "patch_size": 64,
        **{f"{part}_model_config": {"image_size": 64, "patch_size": 16} for part in ("image", "patch", "fov")},
        "intermediate_hook_ids": [1, 0],
        "scaled_images_feature_dims": [64, 64, 64],
        "intermediate_feature_dims": [64, 64],
        "fusion_hidden_size": 64,
    },
    "dia": {"decoder_config": {"cross_hidden_size": WIDTH, "cross_head_dim": 16, "cross_num_attention_heads": 4,
                               "cross_num_key_value_heads": 4}},
    "emu3": {"vocabulary_map": {"<image>": 900, "<s>": 1},
             "vq_config": {"base_channels": 32, "hidden_size": 128, "channel_multiplier": [1, 1, 2, 4]}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _SECTIONS}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": 128,
        "vocab_size_per_layer_input": 1024,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "neucodec": {"quantization_dim": 128},
    "kosmos-2": {"latent_query_num": 4},
    "mamba2": {"num_heads": 8},
    "mistral4": {"head_dim": 16, "rope_parameters": _PLAIN_ROPE},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "musicgen": {"audio_encoder": {"model_type": "encodec"}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "sam3_tracker": {
        "vision_config": {"fpn_hidden_size": WIDTH, "backbone_feature_sizes": [[72, 72], [36, 36], [18, 18]]}
    },
    "seggpt": {"image_size": [256, 128]},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "uvdoc": {"backbone_config": {"out_features": [f"stage{number}" for number in range(1, 7)]}},
    "timesfm2_5": {"context_length": 512},  # a loop in Python over 512 patches of the 16384 values by default
    "timm_backbone": {"backbone": "resnet10t", "use_pretrained_backbone": False},
    "tvp": {"max_img_size": 224, "num_frames": 2},
    "videomae": {"num_frames": 4, "image_size": 64},
    "vibevoice": {"audio_config": _THIN_AUDIO, "semantic_model_config": _THIN_AUDIO},
    "vibevoice_acoustic_tokenizer": _THIN_AUDIO,
    "vibevoice_acoustic_tokenizer_encoder": _THIN_AUDIO,
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": _THIN_AUDIO, "semantic_tokenizer_encoder_config": _THIN_AUDIO,
    },
    "vivit": {"num_frames": 4, "image_size": 64},
    "xcodec2": {"quantization_dim": 128},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
}  # fmt: skip
"""Fields of the config by kind."""

CLASSES = {"musicgen": "MusicgenForConditionalGeneration", "musicgen_melody": "MusicgenMelodyForConditionalGeneration"}
"""Classes by kind, in the module of the base model, where that takes only a part of the kind's config."""

PARTS = {
    "bark": "semantic",
    "edgetam_video": "vision_encoder",
    "sam2_video": "vision_encoder",
    "sam3_tracker_video": "vision_encoder",
    "sam3_video": "detector_model.vision_encoder",
}
"""Submodules by kind, of models that have no call of their own with tensors, such as those that keep a session."""


def _wide(*shape: int, field: str = "hidden_size", default: int = WIDTH) -> Maker:
    """Noise whose last dimension is a field of the config."""
    return lambda fields: noise(*shape, int(fields(field, default=default)))


def _whole(*shape: int, top: int = 2) -> Maker:
    return lambda fields: torch.randint(0, top, shape, generator=torch.Generator().manual_seed(6))


def _true(*shape: int) -> Maker:
    return lambda fields: torch.ones(*shape, dtype=torch.bool)


def _first_tokens(fields: Fields) -> torch.Tensor:
    """True where tokens of the picture stand: at the first of each text."""
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[:, : int(fields("latent_query_num", default=4))] = True
    return mask


def _one_each(fields: Fields) -> torch.Tensor:
    """One picture for each text, where a text may have several."""
    return pictures((BATCH, 1, *fields.image))


def _half_pictures(fields: Fields) -> torch.Tensor:
    """Of the model's width; it puts two of them one above the other."""
    return pictures((BATCH, 3, 128, 128))


_TEXT: dict[str, Maker] = {"input_ids": ids_maker(TOKENS), "attention_mask": mask_of_text}
_FRAMES = 200

CALLS: dict[str, dict[str, Maker]] = {
    "blip_2_qformer": {
        "query_embeds": _wide(BATCH, DECODER_TOKENS),
        "encoder_hidden_states": _wide(BATCH, TOKENS, field="encoder_hidden_size"),
    },
    "decision_transformer": {
        "states": _wide(BATCH, DECODER_TOKENS, field="state_dim"),
        "actions": _wide(BATCH, DECODER_TOKENS, field="act_dim"),
        "rewards": lambda fields: noise(BATCH, DECODER_TOKENS, 1),
        "returns_to_go": lambda fields: noise(BATCH, DECODER_TOKENS, 1),
        "timesteps": _whole(BATCH, DECODER_TOKENS, top=100),
        "attention_mask": lambda fields: torch.ones(BATCH, DECODER_TOKENS, dtype=torch.long),
    },
    "depth_pro": {"pixel_values": lambda fields: pictures((BATCH, 3, 256, 256))},
    "dia": {**_TEXT, "decoder_input_ids": _whole(BATCH, DECODER_TOKENS, 9, top=800)},
    "fun_asr_nano_encoder": {
        "input_features": lambda fields: noise(BATCH, 64, 560), "input_features_mask": _true(BATCH, 64),
    },
    "gemma3n_audio": {
        "audio_mel": _wide(BATCH, 64, field="input_feat_size"),
        "audio_mel_mask": lambda fields: torch.zeros(BATCH, 64, dtype=torch.bool),
    },
    "gemma4_vision": {
        "pixel_values": packed_patches,
        "pixel_position_ids": lambda fields: torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(BATCH, 1, 1),
    },
    "granite_speech5_ctc": {"input_features": lambda fields: noise(BATCH, 64, 320)},
    "granite_speech5_encoder": {"input_features": lambda fields: noise(BATCH, 64, 320)},
    "idefics": {
        **_TEXT,
        "pixel_values": _one_each,
        "image_attention_mask": lambda fields: torch.ones(BATCH, TOKENS, 1, dtype=torch.long),
    },
    "kimi_k25_vision": {"pixel_values": picture_patches, "grid_thw": lambda fields: torch.tensor([[1, 4, 4]])},
    "kosmos-2": {"pixel_values": image_batch, **_TEXT, "image_embeds_position_mask": _first_tokens},
    "lxmert": {
        **_TEXT,
        "visual_feats": _wide(BATCH, DECODER_TOKENS, field="visual_feat_dim"),
        "visual_pos": lambda fields: noise(BATCH, DECODER_TOKENS, 4).sigmoid(),
    },
    "muse_glimmer_assistant": {
        "noise_embeds": _wide(BATCH, DECODER_TOKENS),
        "context_hidden_states": lambda fields: noise(BATCH, TOKENS, 5 * WIDTH),
    },
    "musicgen": {**_TEXT, "decoder_input_ids": _whole(BATCH * 4, DECODER_TOKENS, top=800)},
    "musicgen_melody": {**_TEXT, "decoder_input_ids": _whole(BATCH * 4, DECODER_TOKENS, top=800)},
    "neucodec": {
        "input_values": lambda fields: noise(BATCH, 1, 6400), "input_features": lambda fields: noise(BATCH, 20, 160),
    },
    "oneformer": {"pixel_values": image_batch, "task_inputs": _whole(BATCH, 77, top=800)},
    "pi0": {
        "action_embeds": _wide(BATCH, DECODER_TOKENS),
        **_TEXT,
        "pixel_values": _one_each,
        "pixel_attention_mask": _true(BATCH, 1),
    },
    "qwen3_asr_encoder": {
        "input_features": _wide(BATCH, 128, field="_frames", default=_FRAMES),
        "input_features_mask": lambda fields: torch.ones(BATCH, _FRAMES, dtype=torch.long),
    },
    "seggpt": dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), _half_pictures),
    "siglip2": {
        **_TEXT,
        "pixel_values": packed_patches,
        "pixel_attention_mask": lambda fields: torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": lambda fields: torch.tensor([[4, 4]] * BATCH),
    },
    "speecht5": {"input_values": _wide(BATCH, TOKENS), "decoder_input_values": _wide(BATCH, DECODER_TOKENS)},
    "timesfm": {
        "past_values": lambda fields: noise(BATCH, 64),
        "past_values_padding": lambda fields: torch.zeros(BATCH, 64, dtype=torch.long),
        "freq": lambda fields: torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "tvp": {  # takes one text at a time where the pictures are small
        "input_ids": lambda fields: ids_maker(TOKENS)(fields)[:1],
        "attention_mask": lambda fields: torch.ones(1, TOKENS, dtype=torch.long),
        "pixel_values": lambda fields: pictures((1, 2, 3, 224, 224)),
    },
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": lambda fields: noise(BATCH, 1, 6400)},
    "xcodec2": {
        "input_values": lambda fields: noise(BATCH, 1, 6400), "input_features": lambda fields: noise(BATCH, 20, 160),
    },
}  # fmt: skip
"""Arguments of ``forward`` by kind, tried first."""
