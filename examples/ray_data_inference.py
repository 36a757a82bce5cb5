"""Batch inference over Ray Data: an engine in each actor, loaded from a file that tb.save wrote.

    pip install 'trtbridge[examples]' scikit-learn
    python examples/ray_data_inference.py --backend onnxruntime          # a cluster of this machine's CPUs
    python examples/ray_data_inference.py --actors 4 --gpus-per-actor 1   # a GPU each; several machines: --address auto

A small network learns scikit-learn's handwritten digits for a few seconds, is converted once, and reads all 1,797 of
them. On a cluster of several machines the file must be where all of them can read it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from sklearn.datasets import load_digits
from torch import nn

import trtbridge as tb

MAX_BATCH = 256


class Reader:
    """What an actor does: one engine for as long as it lives.

    Args:
        path: the file.
        device: where its engine runs; Ray shows an actor its own GPUs alone, so "cuda:0" is its own.
    """

    def __init__(self, path: str, device: str) -> None:
        self.engine = tb.load(path, device=device)
        self.device = device

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Read a batch: image (N, 1, 8, 8) float32 to digit (N,) int64."""
        images = torch.tensor(batch["image"], device=self.device)  # a copy: Ray's arrays are read-only
        return {"label": batch["label"], "digit": self.engine(images).argmax(dim=1).cpu().numpy()}


def train(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A network that knows the digits: (N, 1, 8, 8) float32 to (N, 10) float32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, tensorrt_rtx or onnxruntime")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus-per-actor", type=float, default=0)
    parser.add_argument(
        "--address", default="local", help='"local" starts a cluster here, "auto" joins the running one'
    )
    options = parser.parse_args()
    device = "cuda:0" if options.gpus_per_actor else "cpu"

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    model = train(images, labels)
    with torch.inference_mode():
        expected = model(images).argmax(dim=1)

    ray.init(address=options.address, num_cpus=options.actors + 1 if options.address == "local" else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.trtb"
        batch = tb.Dim("batch", min=1, opt=64, max=MAX_BATCH)
        backend = options.backend if options.gpus_per_actor or options.backend != "auto" else "onnxruntime"
        tb.save(tb.convert(model, (images[:64],), dynamic_shapes={"input": {0: batch}}, backend=backend), path)
        data = ray.data.from_items([{"image": i.numpy(), "label": int(n)} for i, n in zip(images, labels, strict=True)])
        found = data.map_batches(
            Reader,
            fn_constructor_args=(str(path), device),
            batch_size=64,
            compute=ray.data.ActorPoolStrategy(size=options.actors),
            num_gpus=options.gpus_per_actor or None,
        ).to_pandas()
    right = (found["digit"] == found["label"]).mean()
    same = sorted(zip(found["label"], found["digit"], strict=True)) == sorted(
        zip(labels.tolist(), expected.tolist(), strict=True)
    )
    print(f"{len(found)} digits read by {options.actors} actors, {right:.1%} of them right")
    print(f"the same as the original reads: {same}")
    ray.shutdown()


if __name__ == "__main__":
    main()
