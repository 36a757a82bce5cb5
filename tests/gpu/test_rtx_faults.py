"""Graphs that TensorRT-RTX 1.6.1 computed wrongly without a word; bridge/backends/rtx_faults.py says what was wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import trtbridge as tb


class Router(torch.nn.Module):
    """Attention, then the experts of each token: the rows of the indices came out by sequence, not by batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(100, 64)
        self.query, self.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.key, self.value = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
        self.gate = torch.nn.Linear(64, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        query, key, value = (
            layer(x).reshape(2, 16, -1, 16).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        key, value = (part[:, :, None].expand(2, 2, 2, 16, 16).reshape(2, 4, 16, 16) for part in (key, value))
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 16, 64))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        weights, experts = torch.topk(self.gate(x.reshape(-1, 64)).softmax(-1), 2)
        return weights, experts


def test_indices_of_a_top_k_behind_attention(backend: str, device: torch.device) -> None:
    module = Router().eval().to(device)
    ids = torch.randint(0, 100, (2, 16), device=device)
    converted = tb.convert(module, (ids,), backend=backend)
    for _ in range(3):
        ids = torch.randint(0, 100, (2, 16), device=device)
        with torch.no_grad():
            expected = module(ids)
        torch.testing.assert_close(converted(ids)[0], expected[0], rtol=1e-4, atol=1e-4)
        assert float((converted(ids)[1] == expected[1]).float().mean()) > 0.9, "all but those of even weights"


class Clip(torch.nn.Module):
    """Boxes in two forms that are one tensor to a compiler: the first was never written."""

    def forward(self, boxes: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = boxes[keep[:20]]
        return chosen, torch.cat([chosen[:, :1], chosen[:, 1:2], chosen[:, 2:3], chosen[:, 3:4]], 1)


def test_a_result_that_is_joined_again(backend: str, device: torch.device) -> None:
    module = Clip().eval()
    boxes, keep = torch.rand(87, 4, device=device), torch.randperm(87, device=device)[:79]
    converted = tb.convert(module, (boxes, keep), backend=backend)
    for _ in range(3):
        boxes, keep = torch.rand(87, 4, device=device), torch.randperm(87, device=device)[:79]
        for got, expected in zip(converted(boxes, keep), module(boxes, keep), strict=True):
            assert torch.equal(got, expected)


class Twice(torch.nn.Module):
    """A result, and the same in the shape that it has."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = F.layer_norm(x, (64,))[:, 0] * 2
        return first, first.reshape(-1, 64), first.reshape(-1, 64) @ first.T


def test_a_result_in_the_same_shape(backend: str, device: torch.device) -> None:
    module, x = Twice(), torch.randn(2, 17, 64, device=device)
    converted = tb.convert(module, (x,), backend=backend)
    for _ in range(3):
        x = torch.randn(2, 17, 64, device=device)
        for got, expected in zip(converted(x), module(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Rotated(torch.nn.Module):
    """Rotary embedding, then a normalization of each head: off by half of the size of the values."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(16)[:, None] / 10000 ** (torch.arange(32) / 32)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = x * self.cos + torch.cat((-x[..., 32:], x[..., :32]), -1) * self.sin
        return turned * torch.rsqrt(turned.pow(2).mean(-1, keepdim=True) + 1e-5), turned.softmax(-1)


def test_a_rotation_that_is_reduced(backend: str, device: torch.device) -> None:
    module, x = Rotated().to(device), torch.randn(2, 4, 16, 64, device=device)
    for got, expected in zip(tb.convert(module, (x,), backend=backend)(x), module(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class GlobalResponse(torch.nn.Module):
    """The end of a ConvNeXt V2 block: NaN over 3x3 positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Conv2d(320, 1280, 1), torch.nn.Conv2d(1280, 320, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(x))
        norm = torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)
        return self.down(y + y * (norm / (norm.mean(1, keepdim=True) + 1e-6))) + x


def test_a_convolution_of_one_position_over_few(backend: str, device: torch.device) -> None:
    for edge in (2, 3, 4):
        module, x = GlobalResponse().to(device), torch.randn(2, 320, edge, edge, device=device)
        with torch.no_grad():
            expected = module(x)
        found = tb.convert(module, (x,), backend=backend)(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Projections(torch.nn.Module):
    """A block of Whisper's encoder: with weights transposed ahead of the builder, wrong at batch 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv1d(80, 512, 3, padding=1), torch.nn.Conv1d(512, 512, 3, 2, padding=1)
        self.places = torch.nn.Parameter(torch.randn(500, 512) * 0.02)
        self.norm = torch.nn.LayerNorm(512)
        self.query, self.value, self.out = (torch.nn.Linear(512, 512) for _ in range(3))
        self.key = torch.nn.Linear(512, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.second(F.gelu(self.first(x)))).permute(0, 2, 1) + self.places
        y = self.norm(y)
        parts = (layer(y).view(-1, 500, 8, 64).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(-1, 500, 512))


def test_products_of_many_rows(backend: str, device: torch.device) -> None:
    module = Projections().eval().to(device)
    dims = {"x": {0: tb.Dim("batch", min=1, opt=8, max=32)}}
    converted = tb.convert(module, (torch.randn(2, 80, 1000, device=device),), dynamic_shapes=dims, backend=backend)
    for batch in (1, 8, 32):
        x = torch.randn(batch, 80, 1000, device=device)
        with torch.no_grad():
            expected = module(x)
        similar = F.cosine_similarity(converted(x).flatten(), expected.flatten(), 0)
        assert float(similar) > 0.9999


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh")}


class Scaled(torch.nn.Module):
    """A linear layer, an activation and a product: the bias was forgotten, or no context could be made."""

    def __init__(self, activation: str, factor: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.both = (torch.nn.Linear(16, size) for size in (32, 32, 64))
        self.activation, self.factor = activation, factor

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if self.factor == "chunk":
            y, factor = self.both(x).chunk(2, -1)
        else:
            y = factor = self.gate(x)
        a = ACTIVATIONS[self.activation](y)
        if self.factor == "parts":
            a = y * 0.5 * (1.0 + torch.erf(y / 2**0.5))
        factors = {"row": s, "parts": s, "constant": 1.7, "itself": a, "source": y, "chunk": factor}
        return a * (self.up(x) if self.factor == "gate" else factors[self.factor])


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("factor", ["row", "gate", "constant", "itself", "source", "chunk", "parts"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_that_is_multiplied(
    activation: str, factor: str, axes: int, backend: str, device: torch.device
) -> None:
    if factor == "parts" and activation != "gelu":
        pytest.skip("GELU alone has parts")
    dims = {name: {0: tb.Dim("batch", min=1, opt=4, max=64)} for name in ("x", "s")}
    for dtype in (torch.float32, torch.float16):
        module = Scaled(activation, factor).eval().to(device, dtype)
        shape = (4, 16) if axes == 2 else (4, 5, 16)
        example = (
            torch.randn(shape, device=device, dtype=dtype),
            torch.rand((*shape[:-1], 1), device=device).to(dtype),
        )
        converted = tb.convert(module, example, dynamic_shapes=dims, backend=backend)
        bound = 1e-4 if dtype is torch.float32 else 1e-2
        for batch in (1, 4, 33):
            args = [torch.rand(batch, *t.shape[1:], device=device).to(dtype) * 2 - 0.5 for t in example]
            with torch.no_grad():
                torch.testing.assert_close(converted(*args), module(*args), rtol=bound, atol=bound)


class Lifted(torch.nn.Module):
    """A number for each image of a convolution's: it read addresses that are none."""

    def __init__(self, edge: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = torch.nn.Conv2d(8, 16, edge, padding=edge // 2)

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.image(x) + s


@pytest.mark.parametrize("edge", [1, 3])
def test_a_number_for_each_image(edge: int, backend: str, device: torch.device) -> None:
    dims = {name: {0: tb.Dim("batch", min=1, opt=4, max=64)} for name in ("x", "s")}
    for dtype in (torch.float32, torch.float16):
        module = Lifted(edge).eval().to(device, dtype)
        example = (torch.randn(4, 8, 6, 6, device=device, dtype=dtype), torch.rand(4, 1, 1, 1, device=device).to(dtype))
        converted = tb.convert(module, example, dynamic_shapes=dims, backend=backend)
        bound = 1e-4 if dtype is torch.float32 else 1e-2
        for batch in (1, 4, 33):
            args = [torch.rand(batch, *t.shape[1:], device=device).to(dtype) for t in example]
            with torch.no_grad():
                torch.testing.assert_close(converted(*args), module(*args), rtol=bound, atol=bound)


class Sinkhorn(torch.nn.Module):
    """Rows and columns that sum to one: the builder did not get done with it; sums of sums are products now."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.softmax(-1)
        for _ in range(20):
            x = x / (x.sum(-1, keepdim=True) + 1e-6)
            x = x / (x.sum(-2, keepdim=True) + 1e-6)
        return x


def test_sums_of_sums(backend: str, device: torch.device) -> None:
    x = torch.randn(2, 16, 4, 4, device=device)
    found = tb.convert(Sinkhorn(), (x,), backend=backend)(x)
    torch.testing.assert_close(found, Sinkhorn()(x), rtol=1e-4, atol=1e-5)


class Queries(torch.nn.Module):
    """Learned queries beside tokens behind attention (Grounding DINO): each image got the tokens of the first two.

    The compiler keeps the tokens as (sequence, batch), and reads token t of any image at place t.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed = torch.nn.Embedding(100, 64)
        self.attention = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm, self.project, self.last = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)
        self.queries = torch.nn.Parameter(torch.randn(20, 64))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        tokens = self.project(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))
        queries = self.queries
        if self.form in ("for each image", "product of all"):
            queries = queries.unsqueeze(0).repeat(2, 1, 1)
        if self.form == "product of all":
            scores = torch.einsum("bqc,btc->bqt", queries, tokens)
        elif self.form == "tokens first":
            scores = (tokens @ queries.T).transpose(-1, -2)
        else:
            scores = queries @ tokens.transpose(-1, -2)
        return scores.masked_fill(ids[:, None, :] == 0, float("-inf")), self.last(tokens)


@pytest.mark.parametrize("form", ["for each image", "of all images", "product of all", "tokens first"])
def test_learned_queries_behind_attention(form: str, backend: str, device: torch.device) -> None:
    module = Queries(form).eval().to(device)
    ids = torch.randint(1, 100, (2, 16), device=device)
    converted = tb.convert(module, (ids,), backend=backend)
    for _ in range(3):
        ids = torch.randint(1, 100, (2, 16), device=device)
        with torch.no_grad():
            for got, expected in zip(converted(ids), module(ids), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Text(torch.nn.Module):
    """Tokens behind a BERT, read across: there the same was wrong of a Transpose alone."""

    def __init__(self, form: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        self.form = form
        config = BertConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        self.bert, self.project = BertModel(config, add_pooling_layer=False), torch.nn.Linear(64, 64)
        self.queries, self.filter = torch.nn.Parameter(torch.randn(20, 64)), torch.nn.Conv1d(64, 32, 3, padding=1)
        self.mixed, self.other = torch.nn.Linear(16, 8), torch.nn.Linear(64, 64)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.bert(ids, mask, None, places).last_hidden_state
        across = self.project(hidden).transpose(-1, -2)
        if self.form == "queries":  # padded as in Grounding DINO
            padded = torch.full((2, 20, 32), float("-inf"), device=across.device)
            scores = self.queries.unsqueeze(0).repeat(2, 1, 1) @ across
            padded[..., :16] = scores.masked_fill(~tokens[:, None, :], float("-inf"))
            return padded
        forms = {
            "convolution": lambda: self.filter(across),
            "linear": lambda: self.mixed(across),
            "scores": lambda: self.other(hidden) @ across,
            "sum": lambda: across.sum(-1),
            "flat": lambda: across.flatten(1),
            "result": lambda: across,
        }
        return forms[self.form]()


@pytest.mark.parametrize("form", ["queries", "convolution", "linear", "scores", "sum", "flat", "result"])
def test_tokens_of_a_text_encoder_read_across(form: str, backend: str, device: torch.device) -> None:
    pytest.importorskip("transformers")
    bound = 1e-2 if form == "convolution" else 1e-4  # torch's are of TF32
    module = Text(form).eval().to(device)
    fixed = (
        torch.ones(2, 1, 16, 16, dtype=torch.bool, device=device),
        torch.arange(16, device=device).expand(2, 16).contiguous(),
        torch.ones(2, 16, dtype=torch.bool, device=device),
    )
    converted = tb.convert(module, (torch.randint(1, 100, (2, 16), device=device), *fixed), backend=backend)
    for _ in range(3):
        ids = torch.randint(1, 100, (2, 16), device=device)
        with torch.no_grad():
            torch.testing.assert_close(converted(ids, *fixed), module(ids, *fixed), rtol=bound, atol=bound)
