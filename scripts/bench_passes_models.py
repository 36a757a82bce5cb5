"""More models for scripts/bench_passes.py, as cases of tests/gpu/zoo.py: what passes are for, as people write it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

sys.path.insert(0, str(ROOT / "scripts"))

import bench_passes_needs as needs  # noqa: E402
import zoo  # noqa: E402

import trtbridge as tb  # noqa: E402

_BATCH = tb.Dim("batch", min=1, opt=min(8, zoo.MAX_BATCH), max=zoo.MAX_BATCH)


class ByHand(nn.Module):
    """A transformer in primitives: norms, GELU, attention with a mask of the least float, rotary positions."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.scales = nn.ParameterList([nn.Parameter(1 + 0.1 * torch.randn(width)) for _ in range(2 * depth)])
        self.shifts = nn.ParameterList([nn.Parameter(0.1 * torch.randn(width)) for _ in range(2 * depth)])
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(depth)])
        self.out = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(depth)])

    def _norm(self, x: torch.Tensor, index: int) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        if index % 2:
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.scales[index]
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.scales[index] + self.shifts[index]

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
        frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = (positions[:, None] * frequencies).to(x.dtype)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer, project in enumerate(self.qkv):
            parts = project(self._norm(x, 2 * layer)).reshape(batch, length, 3, self.heads, width // self.heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
            scores = self._rotate(q) @ self._rotate(k).transpose(-2, -1) / (width // self.heads) ** 0.5
            scores = scores.masked_fill(~causal, torch.finfo(x.dtype).min)
            mixed = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(batch, length, width)
            x = x + self.out[layer](mixed)
            y = self.up[layer](self._norm(x, 2 * layer + 1))
            x = x + self.down[layer](y * 0.5 * (1.0 + torch.erf(y / 2**0.5)))
        return x


class Block(nn.Module):
    """A residual block of a diffusion UNet: group norms, SiLU, convolutions, the time added to the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels) for _ in range(2)])
        self.time = nn.Linear(64, channels)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.first(nn.functional.silu(self.norms[0](x))) + self.time(time)[:, :, None, None]
        return x + self.second(nn.functional.silu(self.norms[1](y)))


class UNet(nn.Module):
    """Stable Diffusion's shape in small: down, attention, up, with skips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(2 * channels, 4, 3, padding=1)
        self.before, self.middle, self.after = Block(channels), Block(channels), Block(2 * channels)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(channels, 8, batch_first=True)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        skip = self.before(self.enter(x), time)
        y = self.middle(self.down(skip), time)
        tokens = y.flatten(2).transpose(1, 2)
        y = y + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(y.shape)
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return self.leave(self.after(torch.cat([skip, y], 1), time))


def _unet_inputs(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    edge = 16 if small else 64
    return (torch.randn(batch, 4, edge, edge, generator=generator), torch.randn(batch, 64, generator=generator)), {}


def _states(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    length, width = (16, 64) if small else (128, 512)
    return (torch.randn(batch, length, width, generator=generator),), {}


def _whisper(small: bool) -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    width, layers = (64, 2) if small else (512, 6)
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, encoder_attention_heads=8, encoder_ffn_dim=4 * width,
        max_source_positions=50 if small else 500,
    )  # fmt: skip
    return WhisperEncoder(config)


def _sound(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randn(batch, 80, 100 if small else 1000, generator=generator),), {}


def _swin(small: bool) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
    return model


def _whole_images(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (zoo._pictures(batch, 224, generator),), {}


def _timm(name: str, **options: Any) -> Any:
    def build(small: bool) -> nn.Module:
        import timm

        return zoo._lively(timm.create_model(name, pretrained=False, **options))

    return build


def picture_case(name: str, model: str) -> Any:
    """A model of timm on whole images, its norms and biases as lively as trained ones."""
    return zoo.Case(name, ("timm",), _timm(model), _whole_images, {"x": {0: _BATCH}})


def _gpt2(small: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    width, layers = (64, 2) if small else (512, 6)
    return GPT2Model(GPT2Config(n_embd=width, n_layer=layers, n_head=8, vocab_size=8000, use_cache=False))


def _cohere(small: bool) -> nn.Module:
    from transformers import CohereConfig, CohereModel

    width, layers = (64, 2) if small else (512, 6)
    config = CohereConfig(
        vocab_size=8000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return CohereModel(config)


_OWN: tuple[Any, ...] = (
    zoo.Case("by_hand", (), lambda small: ByHand(*((64, 4, 2) if small else (512, 8, 8))), _states, {"x": {0: _BATCH}}),
    zoo.Case(
        "unet", (), lambda small: UNet(32 if small else 256), _unet_inputs, {"x": {0: _BATCH}, "time": {0: _BATCH}}
    ),
    zoo.Case("whisper_encoder", ("transformers",), _whisper, _sound, {"input_features": {0: _BATCH}}),
    zoo.Case("swin_tiny", ("timm",), _swin, _whole_images, {"x": {0: _BATCH}}),
    zoo.Case("gpt2", ("transformers",), _gpt2, zoo._decoder_tokens, {"input_ids": {0: _BATCH}}),
    picture_case("efficientnet_b0", "efficientnet_b0"),
    picture_case("mobilenetv3_large", "mobilenetv3_large_100"),
    picture_case("densenet121", "densenet121"),
    zoo.Case("cohere", ("transformers",), _cohere, zoo._decoder_tokens, {"input_ids": {0: _BATCH}}),
)
_ZOO = tuple(case for case in zoo.CASES if not case.may_refuse)
_FIRST = ("by_hand", "llama_small", "unet", "resnet50", "cohere", "vit_base_patch16", "gpt2")

CASES: tuple[Any, ...] = (
    *needs.CASES,
    *sorted((*_OWN, *_ZOO), key=lambda case: _FIRST.index(case.name) if case.name in _FIRST else len(_FIRST)),
)
"""In the order in which they are measured: those first that say most about passes."""


def case_named(name: str) -> Any:
    """A case by name."""
    return next(case for case in CASES if case.name == name)
