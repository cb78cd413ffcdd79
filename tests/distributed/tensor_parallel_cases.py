"""Run by two or four processes: tensor parallelism, alone and inside fully_shard, against one process on the batch."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from hesscale_lightning import AdaHesScale, UnsupportedOperationError, attach, coverage
from hesscale_lightning.curvature.graph import trace
from hesscale_lightning.curvature.tensor_parallel import PROVEN, operations_on_dtensors
from hesscale_lightning.optim import StepSizeScaling
from tests.distributed.launching import DEVICE, begin, run_cases

WIDTH = 8
#: Names of the operations on DTensors that some case has gone through.
met: set[str] = set()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Checkpointed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(checkpoint(lambda z: self.b(torch.tanh(self.a(z))), x, use_reentrant=False)))


class Elementwise(MLP):
    """What the rules are proven for on DTensors: elementwise operations, shapes, and paths that meet."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)  # a DTensor, split by columns
        z = silu(z) * torch.sigmoid(z) - torch.relu(z) / 2 + (-z) * torch.tanh(z)
        z = gelu(z.clone().to(torch.float64)).unflatten(1, (2, -1)).transpose(1, 2).permute(0, 2, 1)
        z = z.contiguous().reshape(len(x), WIDTH) / (2 + torch.sigmoid(self.a(x)))
        return self.c(torch.tanh(self.b(z)))


class Products(nn.Module):
    """Products without a bias, of batches, and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, WIDTH, bias=False), nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x.unflatten(0, (4, 2))))
        return self.b(torch.bmm(torch.bmm(z, z.transpose(1, 2)), z)).flatten(0, 1)


class Casts(MLP):
    """In single precision, but for what is in between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x.float()).double()).float())))


class ByHand(MLP):
    """Each process computes some columns of a tensor that all have, and the sum of all is gone on with."""

    mesh: Any = None

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.mesh is None:
            return self.c(torch.tanh(self.b(torch.tanh(z))))
        mine = torch.zeros(WIDTH, dtype=z.dtype, device=z.device)
        mine[self.mesh.get_local_rank() :: self.mesh.size()] = 1
        z = DTensor.from_local(z, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        z = DTensor.from_local(torch.tanh(z) * mine, self.mesh, [Partial()]).redistribute(placements=[Replicate()])
        return self.c(torch.tanh(self.b(z.to_local())))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class WrittenNorm(nn.Module):
    """RMS norm as language models write it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    def __init__(self, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.n1, self.n2 = norm(WIDTH), norm(WIDTH)
        self.attention, self.feed = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.feed(self.n2(x))


class Transformer(nn.Module):
    def __init__(self, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(12, WIDTH), Block(norm)
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(i)))).flatten(0, -2)


def columns_and_rows(net: Any, mesh: Any) -> None:
    parallelize_module(net, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})


def on_dtensors(net: Any, mesh: Any) -> None:
    """Everything but the loss works on DTensors."""
    kept = {"use_local_output": False}
    plan = {"a": ColwiseParallel(**kept), "b": RowwiseParallel(**kept)}
    parallelize_module(net, mesh, {**plan, "c": ColwiseParallel(output_layouts=Replicate())})


def inner(net: Any, mesh: Any) -> None:
    linear = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    linear |= {"attention.o": RowwiseParallel(), "feed.up": ColwiseParallel(), "feed.down": RowwiseParallel()}
    parallelize_module(net.block, mesh, linear)


def sequence(net: Any, mesh: Any) -> None:
    """Norms and residuals on parts of the sequence, the embedding split by rows."""
    whole = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    outer = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    block = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {
        "n1": SequenceParallel(),
        "n2": SequenceParallel(),
        "attention": PrepareModuleInput(**whole),
        "attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "feed": PrepareModuleInput(**whole),
        "feed.up": ColwiseParallel(),
        "feed.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(net, mesh, outer)
    parallelize_module(net.block, mesh, block)


def data(make: Any, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if make is not Products and not issubclass(getattr(make, "func", make), MLP):
        x, y = (torch.randint(12, (4, 6), generator=generator) for _ in range(2))
    else:
        x = torch.randn(8, 5, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def difference(net: nn.Module, ref: nn.Module, name: str) -> float:
    """Largest relative difference of an attribute of the parameters, which is placed as they are."""
    worst, mine = 0.0, dict(net.named_parameters())
    for key, r in ref.named_parameters():
        here, there = getattr(mine[key], name), getattr(r, name)
        if isinstance(here, DTensor):
            assert name == "grad" or here.placements == mine[key].placements, (
                key
            )  # torch spreads some gradients otherwise
            here = here.full_tensor()
        # A key's bias has no gradient, and what is computed of it is rounding.
        worst = max(worst, ((here - there).abs().max() / there.abs().max().clamp(min=1e-6)).item())
    return worst


def by_hand(net: Any, mesh: Any) -> None:
    net.mesh = mesh


def products(net: Any, mesh: Any) -> None:
    whole = {"use_local_output": False}
    plan = {"a": ColwiseParallel(output_layouts=Shard(0), **whole), "b": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(net, mesh, plan)


def meshes(data_parallel: int = 1) -> Any:
    shape = (data_parallel, dist.get_world_size() // data_parallel)
    return init_device_mesh(DEVICE, shape, mesh_dim_names=("data", "tensor"))


def pair(make: Any, split: Any, data_parallel: int = 0) -> tuple[nn.Module, nn.Module, slice]:
    """A network split over processes, the same in one, and this process's rows of a batch."""
    torch.manual_seed(1)
    net = make().to(DEVICE, torch.float32 if make is Casts else torch.float64)
    ref = copy.deepcopy(net)
    mesh = meshes(max(data_parallel, 1))
    split(net, mesh["tensor"])
    if data_parallel:
        for child in net.children():
            fully_shard(child, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
    return net, ref, slice(mesh["data"].get_local_rank(), None, mesh["data"].size())


def diagonals(make: Any, split: Any, method: str = "hesscale", data_parallel: int = 0, accumulate: int = 1) -> float:
    net, ref, rows = pair(make, split, data_parallel)
    worst = 0.0
    for step in range(3):
        for model, part in ((ref, slice(None)), (net, rows)):
            model.zero_grad()
            for k in range(accumulate):
                x, y = data(make, 10 * step + k)
                loss = cross_entropy(model(x[part]), y[part].flatten()) / accumulate
                if model is net:
                    met.update(node.name() for node in operations_on_dtensors(trace(loss.grad_fn, None)))
                attach(loss, method=method)
                loss.backward()
        worst = max(worst, difference(net, ref, "hess_diag"), difference(net, ref, "grad"))
        with torch.no_grad():
            for p in (*net.parameters(), *ref.parameters()):
                p -= 0.05 * p.grad
    return max(worst, difference(net, ref, "data"))


def training(make: Any, split: Any, optimizer: Any, clip: float = 0.0, data_parallel: int = 0) -> float:
    """The weights after five steps, with a break after the third, and the statistics of the last one."""
    net, ref, rows = pair(make, split, data_parallel)
    mine, other = optimizer(net.parameters()), optimizer(ref.parameters())
    for step in range(5):
        if step == 3:
            saved = copy.deepcopy(mine.state_dict())
            mine = optimizer(net.parameters())
            mine.load_state_dict(saved)
        x, y = data(make, step)
        for model, steps, part in ((ref, other, slice(None)), (net, mine, rows)):
            steps.zero_grad()
            loss = cross_entropy(model(x[part]), y[part].flatten())
            attach(loss)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.step()
    stats = [abs(float(mine.stats[k]) / float(v) - 1) for k, v in other.stats.items()]
    return max(difference(net, ref, "data"), *stats)


def refused(error: type[Exception], words: str, work: Callable[[], Any]) -> float:
    with pytest.raises(error, match=words):
        work()
    return 0.0


class Unproven(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x).cumsum(0))))


class Hooked(MLP):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z.register_hook(lambda g: 2 * g)
        return self.c(torch.tanh(self.b(torch.tanh(z))))


def unproven_is_reported() -> float:
    net, _, _ = pair(Unproven, on_dtensors)
    x, y = data(MLP, 0)
    report = coverage(cross_entropy(net(x), y))
    assert [(e.operation, "use_local_output" in e.reason) for e in report.unsupported] == [("CumsumBackward0", True)]
    return 0.0


def split_loss() -> None:
    net, _, _ = pair(MLP, on_dtensors)
    x, _ = data(MLP, 0)
    attach(net.a(x).square().mean())


def adahesscale(**options: Any) -> Any:
    return lambda params: AdaHesScale(params, lr=0.5, **options)


def scaling(params: Any) -> Any:
    return StepSizeScaling(torch.optim.SGD(params, lr=1.0), 1e-3)


def every_proven_operation_is_met() -> float:
    assert met >= PROVEN, f"not met by any case: {sorted(PROVEN - met)}"
    return 0.0


TWO = {
    "columns and rows": lambda: diagonals(MLP, columns_and_rows),
    "columns and rows, gauss-newton": lambda: diagonals(MLP, columns_and_rows, "hesscale_gn"),
    "columns and rows, bl89": lambda: diagonals(MLP, columns_and_rows, "bl89"),
    "columns and rows, accumulated": lambda: diagonals(MLP, columns_and_rows, accumulate=2),
    "on DTensors": lambda: diagonals(MLP, on_dtensors),
    "elementwise on DTensors": lambda: diagonals(Elementwise, on_dtensors),
    "elementwise on DTensors, gauss-newton": lambda: diagonals(Elementwise, on_dtensors, "hesscale_gn"),
    "by hand": lambda: diagonals(ByHand, by_hand),
    "products on DTensors": lambda: diagonals(Products, products),
    "casts on DTensors": lambda: diagonals(Casts, on_dtensors),
    "checkpointed": lambda: diagonals(Checkpointed, columns_and_rows),
    "transformer": lambda: diagonals(Transformer, inner),
    "sequence": lambda: diagonals(Transformer, sequence),
    "sequence, gauss-newton": lambda: diagonals(Transformer, sequence, "hesscale_gn"),
    "sequence, RMS norm": lambda: diagonals(partial(Transformer, nn.RMSNorm), sequence),
    "sequence, RMS norm written out": lambda: diagonals(partial(Transformer, WrittenNorm), sequence),
    "AdaHesScale": lambda: training(MLP, columns_and_rows, adahesscale()),
    "AdaHesScale, damped and clipped": lambda: training(MLP, on_dtensors, adahesscale(damping=0.1), clip=0.1),
    "StepSizeScaling": lambda: training(MLP, on_dtensors, scaling, clip=0.1),
    "AdaHesScale, sequence": lambda: training(Transformer, sequence, adahesscale()),
    "in fully_shard, one copy": lambda: diagonals(MLP, columns_and_rows, data_parallel=1),
    "in fully_shard, one copy, on DTensors": lambda: diagonals(MLP, on_dtensors, data_parallel=1),
    "rank one": lambda: refused(ValueError, "tensor par", lambda: diagonals(MLP, on_dtensors, "hesscale_rank1")),
    "unproven": lambda: refused(
        UnsupportedOperationError, "CumsumBackward0 works on DTensors", lambda: diagonals(Unproven, on_dtensors)
    ),
    "unproven is reported": unproven_is_reported,
    "changed by a hook": lambda: refused(RuntimeError, "hook changed the", lambda: diagonals(Hooked, on_dtensors)),
    "loss is a DTensor": lambda: refused(RuntimeError, "the loss is a DTensor", split_loss),
    "every proven operation is met": every_proven_operation_is_met,
}

FOUR = {
    "fully_shard and columns and rows": lambda: diagonals(MLP, columns_and_rows, data_parallel=2),
    "fully_shard and columns and rows, accumulated": lambda: diagonals(MLP, columns_and_rows, "bl89", 2, 2),
    "fully_shard and sequence": lambda: diagonals(Transformer, sequence, data_parallel=2),
    "fully_shard and AdaHesScale": lambda: training(MLP, on_dtensors, adahesscale(), 0.1, 2),
    "fully_shard and StepSizeScaling": lambda: training(MLP, columns_and_rows, scaling, data_parallel=2),
    "fully_shard and AdaHesScale, sequence": lambda: training(Transformer, sequence, adahesscale(), data_parallel=2),
}

if __name__ == "__main__":
    begin()
    run_cases(TWO if dist.get_world_size() == 2 else FOUR, *sys.argv[1:])
