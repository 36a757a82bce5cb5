"""Fusions that users add to the pipeline, in a model of transformers."""

from __future__ import annotations

import pytest
import torch

import trtbridge as tb
from trtbridge.passes import FoldShapes, FuseRmsNorm, FuseRotaryEmbedding, FuseSilu

PASSES = tb.DEFAULT
for fusion in (FuseRmsNorm(), FuseRotaryEmbedding(), FuseSilu()):
    PASSES = PASSES.insert(fusion, after=FoldShapes)
SHAPES = {"ids": {0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=2, opt=8, max=16)}}


class Decoder(torch.nn.Module):
    """ids: (batch, length) int64 to (batch, length, 32) float32."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        self.model = getattr(transformers, f"{kind}Model")(config).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.model(ids, use_cache=False).last_hidden_state
        assert isinstance(states, torch.Tensor)
        return states


# Llama turns halves, Cohere neighbours; Cohere's norms subtract the mean.
@pytest.mark.parametrize(("kind", "norms"), [("Llama", 3), ("Cohere", 0)])
def test_a_decoder(kind: str, norms: int) -> None:
    net, ids = Decoder(kind), torch.randint(0, 50, (2, 8))
    fast = tb.convert(
        net, (ids,), dynamic_shapes=SHAPES, backend="onnxruntime", opset=24, passes=PASSES, check_passes=True
    )
    rewrites = {row["name"]: row["rewrites"] for row in fast.program.info["passes"]}
    assert [rewrites[name] for name in ("FuseRmsNorm", "FuseRotaryEmbedding", "FuseSilu")] == [norms, 2, 1]
    for size in ((2, 8), (1, 3), (4, 16)):
        tb.compare(net, fast, (torch.randint(0, 50, size),)).raise_if_failed()


@pytest.mark.rtx
@pytest.mark.parametrize("kind", ["Llama", "Cohere"])
def test_rotary_embeddings_are_layers_of_tensorrt_rtx(kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    ids = torch.randint(0, 50, (2, 8))
    program = tb.convert(
        Decoder(kind), (ids,), dynamic_shapes=SHAPES, backend="tensorrt_rtx", opset=24, passes=PASSES
    ).program
    (engine,) = program.engines
    assert not program.plugin_calls
    assert [layer["type"] for layer in engine.info["layers"]].count("ROTARY_EMBEDDING") == 2
