"""What the models of model_zoo.py are called with: arguments made from the config and the signature of ``forward``."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

VOCABULARY, LAST_PLAIN_TOKEN = 1024, 800  # special tokens get numbers between the two
WIDTH, TOKENS, DECODER_TOKENS, BATCH = 64, 16, 8, 2


Maker = Callable[["Fields"], Any]


class NoRecipeError(Exception):
    """This file does not know how to make such a model small, or what to feed it; says nothing about converting it."""


def pictures(shape: Sequence[int]) -> torch.Tensor:
    """Soft blobs with some noise: of pure noise, networks that pool see nothing but its mean."""
    generator = torch.Generator().manual_seed(2)
    *batch, height, width = shape
    blobs = 2 * torch.randn(*batch, 5, 5, generator=generator).flatten(0, -4)
    smooth = torch.nn.functional.interpolate(blobs, size=(height, width), mode="bilinear").reshape(
        *batch, height, width
    )
    return smooth + 0.3 * torch.randn(*shape, generator=generator)


def input_sets(module: torch.nn.Module, own: Mapping[str, Maker] = MappingProxyType({})) -> Iterator[list[str]]:
    """Names of arguments to try, most telling first; the kind's own arguments, where it has some, before all."""
    if own:
        yield list(own)
    parameters = inspect.signature(module.forward).parameters
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in variadic]
    main = str(getattr(module, "main_input_name", ""))
    base = list(dict.fromkeys([*required, *([main] if main in parameters else [])]))
    decoder = [name for name in ("decoder_input_ids",) if name in parameters]
    tokens = [name for name in ("input_ids", "attention_mask") if name in parameters and "input_ids" in parameters]
    media = [
        name for name in ("pixel_values", "input_features", "input_values", "pixel_values_videos") if name in parameters
    ]
    grids = [name for name in ("image_grid_thw", "image_sizes", "bbox", "mm_token_type_ids") if name in parameters]
    extra = [name for name in ("bbox", "token_type_ids") if name in parameters and name == "bbox"]
    masks = ["attention_mask"] if "input_ids" in base and "attention_mask" in parameters else []
    sets: list[list[str]] = []
    if tokens and media:  # two kinds of input
        sets += [[*base, *tokens, media[0], *decoder, *extra], [*base, *tokens, media[0], *grids, *decoder]]
        sets += [[*base, *tokens, *media, *decoder]]
    sets += [[*base, *masks, *decoder, *extra], [*base, *masks, *extra], [*base, *tokens, *decoder], base]
    if "inputs_embeds" in parameters:
        sets.append([name for name in base if name != "input_ids"] + ["inputs_embeds"])
    if "input_features" in base and "input_features_mask" in parameters:
        sets.append(list(dict.fromkeys([*base, "input_features_mask"])))
    unique: dict[tuple[str, ...], list[str]] = {}
    for names_ in sets:
        without_twice = list(dict.fromkeys(names_))
        if without_twice:
            unique.setdefault(tuple(sorted(without_twice)), without_twice)
    yield from unique.values()


def try_inputs(
    module: torch.nn.Module, config: Any, chosen: Sequence[str], own: Mapping[str, Maker] = MappingProxyType({})
) -> dict[str, Any]:
    """Arguments that the model takes; it is asked, and its complaint about image tokens is heeded.

    Args:
        module, config: the model and its config.
        chosen: names of arguments, one of ``input_sets``.
        own: how the kind's own arguments are made, where ``chosen`` is those.

    Raises:
        Exception: what the model said about the last attempt.
    """
    fixed: dict[str, Any] = {}
    parameters = inspect.signature(module.forward).parameters
    if "use_cache" in parameters:
        fixed["use_cache"] = False
    choices = [(own[name],) if list(own) == list(chosen) else INPUTS.get(name, ()) for name in chosen]
    if "image_grid_thw" in chosen:  # then pictures come as patches, those of all in a row
        choices = [(_patches_of_all, *makers) if makers[:1] == (image_batch,) else makers for makers in choices]
    elif "grid_thw" in chosen:
        choices = [(flat_patches, *makers) if makers[:1] == (image_batch,) else makers for makers in choices]
    for name, makers in zip(chosen, choices, strict=True):
        if not makers:
            raise NoRecipeError(f"no rule for the argument {name!r}")
    failures: list[Exception] = []
    for makers in itertools.islice(itertools.product(*choices), 8):
        kwargs = dict(fixed)
        try:
            for name, maker in zip(chosen, makers, strict=True):
                kwargs[name] = maker(Fields(config))
            plain = kwargs.get("input_ids")
            width = int(Fields(config)("hidden_size", default=1, parts=("text_config",)))
            words = ""
            for divisor in (0, 1, width):  # no tokens; as many as the model says; it may have counted their elements
                if divisor and not _add_media_tokens(kwargs, plain, config, words, divisor):
                    continue
                try:
                    torch.manual_seed(0)
                    with torch.no_grad():
                        module(**kwargs)
                    return kwargs
                except Exception as error:
                    failures.append(error)
                    words = words or str(error)
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _add_media_tokens(kwargs: dict[str, Any], ids: Any, config: Any, words: str, divisor: int) -> bool:
    """Put as many image (or audio) tokens before the text as the model says it has features for.

    Returns:
        Whether the words were about that.
    """
    found = re.search(r"features:?\s+(?:torch\.Size\(\[)?(\d+)", words)
    token = next(
        (
            getattr(config, f"{kind}_token_{ending}")
            for kind in (("audio",) if "input_features" in kwargs else ("image", "video"))
            for ending in ("id", "index")
            if isinstance(getattr(config, f"{kind}_token_{ending}", None), int)
        ),
        None,
    )
    if not found or token is None or ids is None:
        return False
    count = int(found[1]) // len(ids) // divisor
    if not 0 < count <= 4096:
        return False
    kwargs["input_ids"] = torch.cat([torch.full((len(ids), count), token), ids], 1)
    if "attention_mask" in kwargs:
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    if "mm_token_type_ids" in kwargs:
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == token).long()
    return True


class Fields:
    """Looks a field up in a config and then in its parts."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, *names_: str, default: Any = None, parts: Sequence[str] = ()) -> Any:
        preferred = [getattr(self.config, part, None) for part in parts]
        everything = [value for value in vars(self.config).values() if hasattr(value, "to_diff_dict")]
        for config in [*preferred, self.config, *everything]:
            for name in names_:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        parts = ("vision_config", "backbone_config", "thinker_config")
        channels = self("num_channels", "in_channels", "in_chans", default=3, parts=parts)
        size = self("image_size", "img_size", default=224, parts=parts)
        if isinstance(size, Mapping):
            size = (size["height"], size["width"])
        height, width = (size[:2]) if isinstance(size, (list, tuple)) else (size, size)
        return channels if isinstance(channels, int) else 3, int(height), int(width)


def ids_maker(length: int) -> Maker:
    def make_ids(fields: Fields) -> torch.Tensor:
        vocabulary = fields(
            "vocab_size", "text_vocab_size", "padded_vocab_size", default=VOCABULARY, parts=("text_config",)
        )
        top = min(vocabulary if isinstance(vocabulary, int) else VOCABULARY, LAST_PLAIN_TOKEN)
        return torch.randint(min(10, top - 1), top, (BATCH, length), generator=torch.Generator().manual_seed(3))

    return make_ids


def mask_of_text(fields: Fields) -> torch.Tensor:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[-1, -3:] = 0  # the second text is shorter
    return mask


def image_batch(fields: Fields, batch: int = BATCH) -> torch.Tensor:
    return pictures((batch, *fields.image))


def _mel(fields: Fields) -> tuple[int, int]:
    names_ = ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_projection_input_dim")
    bins = fields(*names_, "input_size", default=80, parts=("audio_config", "encoder_config"))
    frames = fields("max_length", default=0)  # of a spectrogram
    positions = fields("max_source_positions", default=64, parts=("audio_config",))
    return int(bins), int(frames) or 2 * int(positions) if int(positions) <= 1500 else 128


def video_frames(fields: Fields) -> torch.Tensor:
    return pictures((1, int(fields("num_frames", "frames", default=8)), *fields.image))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def mel_first(fields: Fields) -> torch.Tensor:
    bins, frames = _mel(fields)
    return noise(BATCH, bins, frames)


def mel_last(fields: Fields) -> torch.Tensor:
    bins, frames = _mel(fields)
    return noise(BATCH, frames, bins)


def _spectrogram(fields: Fields) -> torch.Tensor:
    return noise(BATCH, 1, int(fields("spec_size", default=256)), int(fields("num_mel_bins", default=64)))


def _boxes(fields: Fields) -> torch.Tensor:
    corners = torch.randint(0, 400, (BATCH, TOKENS, 2), generator=torch.Generator().manual_seed(5))
    return torch.cat([corners, corners + 200], -1)


def flat_patches(fields: Fields) -> torch.Tensor:
    parts = ("vision_config",)
    patch = fields("patch_size", default=14, parts=parts)
    frames = fields("temporal_patch_size", "patch_temporal", default=1, parts=parts)
    return noise(16, fields.image[0] * frames * patch * patch)


def _patches_of_all(fields: Fields) -> torch.Tensor:
    return torch.cat([flat_patches(fields)] * BATCH)


def picture_patches(fields: Fields) -> torch.Tensor:
    """Patches as small pictures (16, C, P, P)."""
    patch = fields("patch_size", default=14, parts=("vision_config",))
    return pictures((16, fields.image[0], patch, patch))


def packed_patches(fields: Fields) -> torch.Tensor:
    patch = fields("patch_size", default=16, parts=("vision_config",))
    return noise(BATCH, 16, fields.image[0] * patch * patch)


def _series(fields: Fields) -> torch.Tensor:
    length = fields("context_length", "sequence_length", default=64)
    lags = max(fields("lags_sequence", default=[0]) or [0])
    channels = fields("num_input_channels", "input_size", default=1)
    return noise(BATCH, length + lags, *((channels,) if channels > 1 or fields("num_input_channels") else ()))


def _time_features(length_field: str) -> Maker:
    def make_features(fields: Fields) -> torch.Tensor:
        length = fields(length_field, default=64)
        lags = max(fields("lags_sequence", default=[0]) or [0]) if length_field == "context_length" else 0
        return noise(BATCH, length + lags, fields("num_time_features", default=0))

    return make_features


INPUTS: dict[str, tuple[Maker, ...]] = {
    "input_ids": (ids_maker(TOKENS), ids_maker(64)),
    "attention_mask": (mask_of_text,),
    "decoder_input_ids": (ids_maker(DECODER_TOKENS),),
    "qformer_input_ids": (ids_maker(DECODER_TOKENS),),
    "pixel_values": (
        image_batch,
        video_frames,
        lambda fields: pictures((BATCH, 1, *fields.image)),  # several images a text
        packed_patches,
        flat_patches,
        lambda fields: pictures((BATCH, fields.image[0], 64, 64)),
        lambda fields: pictures((1, 2, *fields.image)),  # a pair
    ),
    "pixel_values_videos": (video_frames, flat_patches),
    "input_features": (mel_first, mel_last, _spectrogram),
    "input_values": (lambda fields: noise(BATCH, 4800), lambda fields: noise(BATCH, 1, 4800), mel_last, mel_first),
    "hidden_states": (
        flat_patches,
        lambda fields: noise(BATCH, TOKENS, int(fields("hidden_size", default=WIDTH))),
        lambda fields: noise(BATCH, int(fields("hidden_size", default=WIDTH)), TOKENS),
    ),
    "inputs_embeds": (lambda fields: noise(BATCH, TOKENS, int(fields("hidden_size", "d_model", default=WIDTH))),),
    "latents": (lambda fields: noise(BATCH, int(fields("hidden_size", default=WIDTH)), TOKENS),),
    "grid_thw": (lambda fields: torch.tensor([[1, 4, 4]]),),
    "image_grid_thw": (lambda fields: torch.tensor([[1, 4, 4]] * BATCH), lambda fields: torch.tensor([[1, 4, 4]])),
    "mm_token_type_ids": (lambda fields: torch.zeros(BATCH, TOKENS, dtype=torch.long),),
    "image_sizes": (lambda fields: torch.tensor([fields.image[1:]] * BATCH),),
    "bbox": (_boxes,),
    "pixel_attention_mask": (lambda fields: torch.ones(BATCH, 16, dtype=torch.long),),
    "spatial_shapes": (lambda fields: torch.tensor([[4, 4]] * BATCH),),
    "input_features_mask": (lambda fields: torch.ones(BATCH, _mel(fields)[1], dtype=torch.bool),),
    "past_values": (_series,),
    "past_observed_mask": (lambda fields: torch.ones_like(_series(fields)),),
    "past_time_features": (_time_features("context_length"),),
    "future_time_features": (_time_features("prediction_length"),),
    "inputs": (ids_maker(64), lambda fields: noise(BATCH, 64, int(fields("d_model", default=WIDTH)))),
    "merge_sizes": (lambda fields: torch.tensor([1]),),
}
"""How each argument of ``forward`` may look, most usual first."""
