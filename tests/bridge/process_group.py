"""Run by torchrun from test_process_group.py: an engine in each of two processes, results gathered over gloo."""

import sys

import torch
import torch.distributed as dist
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


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Linear(8, 4).eval()
engine = tb.load(sys.argv[1])
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
tuned = DistributedDataParallel(Tuned(engine))
tuned(data[rank::world]).sum().backward()
grad = tuned.module.head.weight.grad
assert grad is not None
mine = grad.clone()
dist.broadcast(mine, src=0)
torch.testing.assert_close(mine, grad)

if rank == 0:
    print("refused:", refusal)
    torch.save({"merged": merged, "grad": grad, "data": data}, sys.argv[2])
dist.barrier()  # nobody goes while another one is still connected
dist.destroy_process_group()
