"""Run by torchrun from test_process_group.py: an engine in each of two processes, results gathered over gloo."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its defaults keep the one they find (docs/pytorch.md)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import trtbridge as tb


class Tuned(nn.Module):
    """An engine with a head that trains."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine, self.head = engine, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.engine(x))


def averaged_gradient(engine: nn.Module, share: torch.Tensor) -> torch.Tensor:
    """The gradient of a head behind an engine, averaged over the processes: (2, 4) float32, the same in all of them."""
    tuned = DistributedDataParallel(Tuned(engine))
    tuned(share).sum().backward()
    grad = tuned.module.head.weight.grad
    assert grad is not None
    mine = grad.clone()
    dist.broadcast(mine, src=0)
    torch.testing.assert_close(mine, grad)
    return grad


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = tb.load(sys.argv[1])
    torch.manual_seed(0)  # the same data everywhere
    data = torch.randn(6, 8)
    share = engine(data[rank::world])
    gathered = [torch.empty_like(share) for _ in range(world)]
    dist.all_gather(gathered, share)
    merged = torch.stack(gathered, dim=1).flatten(0, 1)

    try:
        DistributedDataParallel(engine)
        refusal = "none"
    except RuntimeError as error:
        refusal = str(error)

    # What trains may stand around an engine: its gradients are averaged over the processes.
    grad = averaged_gradient(engine, data[rank::world])
    if rank == 0:
        print("refused:", refusal)
        torch.save({"merged": merged, "grad": grad, "data": data}, sys.argv[2])
    dist.barrier()  # nobody goes while another one is still connected
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
