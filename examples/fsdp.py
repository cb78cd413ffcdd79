"""AdaHesScale on a model whose parameters FSDP2 spreads over processes.

python -m torch.distributed.run --standalone --nproc_per_node 2 examples/fsdp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hesscale_lightning import AdaHesScale, attach


def main() -> None:
    """Train a small classifier, each process on its own half of every batch."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3))
    teacher = torch.randn(20, 3)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = AdaHesScale(model.parameters(), delta=1e-2)
    for step in range(101):
        inputs = torch.randn(64, 20)
        mine = inputs[rank::world]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(mine), (mine @ teacher).argmax(1))
        attach(loss)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {mean.item():.3f}")
    dist.barrier()  # leave together: a process that ends while another still talks to it is torn down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
