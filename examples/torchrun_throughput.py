"""One engine a process: a stream of batches split over the processes of torchrun, and what that gains over one of them.

    torchrun --nproc-per-node 2 examples/torchrun_throughput.py                      # a GPU each, NCCL
    torchrun --nproc-per-node 2 examples/torchrun_throughput.py --backend onnxruntime  # on the CPU, gloo

Rank 0 converts the model and writes it to a file; every process loads that file on its own device. First rank 0 works
alone, then all of them at once, each on every n-th batch. Results are gathered and compared with the original's.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its defaults keep the one they find (docs/pytorch.md)
from torch import nn

import trtbridge as tb


def make_model(width: int) -> nn.Module:
    """A small convolutional network: (N, 3, 32, 32) float32 to (N, 10) float32."""
    layers: list[nn.Module] = []
    for channels in (3, width, 2 * width):
        after = 2 * channels if channels > 3 else width
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, 10)).eval()


def run(
    engine: nn.Module, batches: list[torch.Tensor], device: torch.device, repeats: int
) -> tuple[list[torch.Tensor], float]:
    """The engine's results and the seconds that all of them took together, so many times over."""
    for _ in range(3):  # the first calls allocate, and capture a CUDA graph
        engine(batches[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        results = [engine(batch) for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, tensorrt_rtx or onnxruntime")
    parser.add_argument("--batches", type=int, default=64, help="how many batches there are in all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer")
    parser.add_argument("--repeats", type=int, default=1, help="times that the stream is run")
    options = parser.parse_args()

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available() and options.backend != "onnxruntime"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", **({"device_id": device} if on_gpu else {}))

    torch.manual_seed(0)  # the same model and the same batches everywhere
    model = make_model(options.width).to(device)
    stream = torch.randn(options.batches, options.batch_size, 3, 32, 32)

    folder = [tempfile.mkdtemp(prefix="trtbridge-") if rank == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    path = Path(folder[0]) / "model.trtb"
    if rank == 0:
        backend = options.backend if on_gpu or options.backend != "auto" else "onnxruntime"
        tb.save(tb.convert(model, (stream[0].to(device),), backend=backend), path)
    dist.barrier()
    engine = tb.load(path, device=device)
    dist.barrier()
    if rank == 0:
        path.unlink()
        path.parent.rmdir()

    alone = 0.0
    if rank == 0:
        _, alone = run(engine, [batch.to(device) for batch in stream[::world]], device, options.repeats)
    dist.barrier()
    results, seconds = run(engine, [batch.to(device) for batch in stream[rank::world]], device, options.repeats)

    slowest = torch.tensor(seconds, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    with torch.inference_mode():
        pairs = zip(results, stream[rank::world], strict=True)
        wrong = max(float((found - model(batch.to(device))).abs().max()) for found, batch in pairs)
    worst = torch.tensor(wrong, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if rank == 0:
        images = options.batches * options.batch_size * options.repeats
        one = len(stream[::world]) * options.batch_size * options.repeats / alone
        every = images / float(slowest)
        print(f"{world} process(es) on {device.type}, {engine.program.backend}, batches of {options.batch_size}")
        print(f"one process alone: {one:.0f} images/s; all at once: {every:.0f} images/s, {every / one:.2f} times one")
        print(f"largest difference from the original: {float(worst):.1e}")
        print(json.dumps({"processes": world, "throughput": every, "alone": one}))  # images a second, for programs
    dist.barrier()  # nobody goes while another one is still connected
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
