"""Models for scripts/bench_passes.py in which a pass is what lets a graph convert, or saves a plugin or a copy.

Each is a small one of its kind, written as people write it: samples of a sound card in int16, masks of bytes, one user
without a batch, slices of slices, a network ported from another framework, a file of another exporter.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import zoo  # noqa: E402

import trtbridge as tb  # noqa: E402

_BATCH = tb.Dim("batch", min=1, opt=min(8, zoo.MAX_BATCH), max=zoo.MAX_BATCH)
functional = nn.functional


class Speech(nn.Module):
    """wav2vec's convolutions over int16 samples; level and offset of a recording in float64, as SciPy would."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [1, *[width] * depth]
        self.convs = nn.ModuleList([nn.Conv1d(a, b, 4, 2) for a, b in itertools.pairwise(sizes)])
        self.head = nn.Linear(width, 32)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        wave = samples.double() / 32768.0
        wave = (wave - wave.mean(1, keepdim=True)) / (wave.std(1, keepdim=True) + 1e-5)
        x = wave.to(self.head.weight.dtype)[:, None]
        for conv in self.convs:
            x = functional.gelu(conv(x))
        return self.head(x.transpose(1, 2)).log_softmax(-1)


class ByteMasks(nn.Module):
    """A text encoder of before PyTorch had bool: masks are bytes, and states go to float32 and back between layers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(8000, width), nn.Embedding(512, width)
        self.mix = nn.ModuleList([nn.Conv1d(width, width, 3, padding=1) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Linear(2 * width, width) for _ in range(depth)])

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = ids.ne(0).byte()
        place = torch.relu(mask.long().cumsum(1) - 1)
        x = self.words(ids) + self.places(place)
        kind = x.dtype
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            x = x * mask.to(kind).unsqueeze(-1)
            x = x + mix(x.float().transpose(1, 2).to(kind)).float().transpose(1, 2).to(kind)
            x = x + down(functional.relu(up(x)))
        return x.mean(1), ids.gt(7000).amax(1)


class OneUser(nn.Module):
    """A recommender as it is called online: one user's vector, no batch, all items."""

    def __init__(self, width: int, items: int, interests: int) -> None:
        super().__init__()
        self.views = nn.Parameter(torch.randn(interests, width, width) / width**0.5)
        self.items = nn.Parameter(torch.randn(items, width) / width**0.5)
        self.gate = nn.Linear(width, items)

    def forward(self, user: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        interests = torch.tanh(user @ self.views)
        scores = (self.items @ interests.transpose(0, 1)).amax(1)
        chance = torch.softmax(scores + self.gate(user), 0)
        return chance, chance.argmax(0)


class Focus(nn.Module):
    """YOLOv5's first layer, every second pixel four times, and residual blocks that see a part of the channels."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(width // 2, width // 2, 3, padding=1) for _ in range(depth)])
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[..., i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], 1)
        x = functional.relu(self.stem(x))
        half = x.shape[1] // 2
        for block in self.blocks:
            kept, worked = x[:, :half], x[:, half:]
            # Two halves of the border are cut one after the other, as crops of crops are in many decoders.
            worked = functional.relu(block(functional.pad(worked, (2, 2, 2, 2))))[:, :, 1:-1, 1:-1][:, :, 1:-1, 1:-1]
            x = torch.cat([worked, kept], 1)
        return self.head(x)


class Ported(nn.Module):
    """A network brought over from another framework: flattened maps, pads of nothing, gains of one, norms by hand."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 1 if i % 2 else 3) for i in range(depth)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(depth)])
        self.scale, self.shift = nn.Parameter(torch.rand(width, 1, 1) + 0.5), nn.Parameter(torch.randn(width, 1, 1))
        for norm in self.norms:
            nn.init.uniform_(norm.running_var, 0.7, 1.4)

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, wide = x.shape
        y = functional.instance_norm(x.reshape(batch, 8, -1), eps=1e-5)
        return y.reshape(batch, self.width, height, wide) * self.scale + self.shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            around = 0 if index % 2 else 1
            y = norm(conv(functional.pad(x, (around,) * 4)) * 1.0)
            flat = y.flatten(2)
            x = x + (flat * torch.sigmoid(flat)).unflatten(2, y.shape[2:])
        return self._groups(x)


class Chunks(nn.Module):
    """A network over sequences that may be long: a table of places is cut, and chunks of 256 are counted."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(256, width))
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        for layer in self.layers:
            x = x + functional.relu(layer(x + self.places[: min(length, 256)])) / ((length + 255) // 256)
        return x


class Classifier(nn.Module):
    """What `write_file` writes as a file: bytes of an image, two convolutions with pools, a norm, a product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.to(self.out.weight.dtype) * 0.0039
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.max_pool2d(functional.relu(self.second(x)), 2)
        scores: torch.Tensor = self.out(self.norm(x.mean((2, 3))))
        return scores


_FILE = """
<ir_version: 8, opset_import: ["" : 18], producer_name: "another exporter">
main (uint8[batch,3,EDGE,EDGE] image) => (TYPE[batch,100] scores)
<int64[2] places = {2, 3}>
{
  copied = Identity (image)
  bytes = Cast <to = ELEMENT> (copied)
  pixels = Mul (bytes, scale)
  a = Conv <pads = [1, 1, 1, 1]> (pixels, w0, b0)
  b = Relu (a)
  c, at0 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
  d, mask0 = Dropout (c)
  e = Conv <pads = [1, 1, 1, 1]> (d, w1, b1)
  f = Relu (e)
  g, at1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f)
  h = ReduceMean <keepdims = 0> (g, places)
  i, mean, deviation = LayerNormalization (h, w2, b2)
  j, mask1 = Dropout (i)
  scores = Gemm <transB = 1> (j, w3, b3)
  left_over = Sigmoid (e)
  lost = ReduceMean <keepdims = 0> (left_over, places)
}
"""


_COMPUTED = ("places = {2, 3}>\n{", "last = {3, 4}, int64[2] ones = {1, 1}>\n{\n  places = Sub (last, ones)")
"""The axes as an exporter writes them that computes what they are."""


def write_file(module: Classifier, edge: int, path: Path, computed_axes: bool = False) -> None:
    """Write the classifier as an exporter for training would: with unread masks, places, deviations, and leftovers."""
    weights = [
        tensor.detach().cpu().numpy()
        for part in (module.first, module.second, module.norm, module.out)
        for tensor in (part.weight, part.bias)
    ]
    half = weights[0].dtype == np.float16
    text = _FILE.replace("TYPE", "float16" if half else "float").replace("EDGE", str(edge))
    text = text.replace(*_COMPUTED) if computed_axes else text
    text = text.replace("ELEMENT", str(int(onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT)))
    model = onnx.parser.parse_model(text)
    weights.append(np.array(0.0039, weights[0].dtype))
    names = [*(f"{letter}{index}" for index in range(4) for letter in "wb"), "scale"]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in zip(names, weights, strict=True)
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


@dataclass(frozen=True)
class FileCase(zoo.Case):
    """A case whose module is converted from a file."""

    computed_axes: bool = False

    def write(self, module: nn.Module, path: Path) -> None:
        """Write the module in its dtype."""
        assert isinstance(module, Classifier)
        write_file(module, _edge(zoo.DRY_RUN), path, self.computed_axes)


def _edge(small: bool) -> int:
    return 16 if small else 128


def _samples(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randint(-9000, 9000, (batch, 400 if small else 16000), generator=generator).short(),), {}


def _words(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randint(0, 8000, (batch, 16 if small else 256), generator=generator),), {}


def _user(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randn(16 if small else 256, generator=generator),), {}


def _bytes(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    size = (batch, 3, _edge(small), _edge(small))
    return (torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),), {}


def _rows(batch: int, generator: torch.Generator, small: bool) -> zoo.Inputs:
    return (torch.randn(batch, 100, 16 if small else 512, generator=generator),), {}


_LENGTH = tb.Dim("length", min=2, opt=100, max=200)

CASES: tuple[zoo.Case, ...] = (
    zoo.Case("int16 speech", (), lambda s: Speech(*((8, 3) if s else (256, 6))), _samples, {"samples": {0: _BATCH}}),
    zoo.Case("byte masks", (), lambda s: ByteMasks(*((16, 2) if s else (512, 6))), _words, {"ids": {0: _BATCH}}),
    zoo.Case("one user", (), lambda s: OneUser(*((16, 50, 3) if s else (256, 20000, 8))), _user, batches=(1,)),
    zoo.Case("focus", (), lambda s: Focus(*((8, 2) if s else (64, 6))), zoo._image(256, 16), {"x": {0: _BATCH}}),
    zoo.Case("ported", (), lambda s: Ported(*((16, 4) if s else (128, 8))), zoo._image(128, 16), {"x": {0: _BATCH}}),
    zoo.Case("chunks", (), lambda s: Chunks(*((16, 2) if s else (512, 6))), _rows, {"x": {0: _BATCH, 1: _LENGTH}}),
    FileCase("file", (), lambda s: Classifier(8 if s else 128), _bytes, {"image": {0: _BATCH}}),
    FileCase(
        "computed axes", (), lambda s: Classifier(8 if s else 128), _bytes, {"image": {0: _BATCH}}, computed_axes=True
    ),
)
