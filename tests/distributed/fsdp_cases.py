"""Run by two processes: diagonals and optimizers under fully_shard against one process on the global batch."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from benchmarks.distributed import Sent
from hesscale_lightning import AdaHesScale, attach, compile_step, coverage
from hesscale_lightning.optim import CalibratedRadius, StepSizeScaling
from tests.distributed.launching import DEVICE, begin, run_cases


class Tied(nn.Module):
    """An embedding whose weight is the head's, around a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(torch.tanh(self.block(self.embed(i))))


class Checkpointed(nn.Module):
    """A checkpoint around the parts inside of a module, or around a module that may be sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))


def frozen() -> nn.Module:
    net = mlp()
    net[2].requires_grad_(False)
    return net


def unused() -> nn.Module:
    net = mlp()
    net.extra = nn.Linear(2, 2)
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[method-assign]
    return net


class Branching(nn.Module):
    """Leaves one layer out where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.short = False

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.a(x))
        return self.c(z if self.short else torch.tanh(self.b(z)))


def shard(net: nn.Module, children: bool, **options: object) -> None:
    if children:
        inner = [net.block] if isinstance(net, Tied) else [m for m in net.children() if isinstance(m, nn.Linear)]
        for module in inner:
            fully_shard(module, **options)
    fully_shard(net, **options)


def replicated():
    """torch's ``replicate``, FSDP2 with copies in place of shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    net = mlp().double().to(DEVICE)
    ref = copy.deepcopy(net)
    for module in (net[0], net[2], net):
        replicate(module)
    worst = 0.0
    for step in range(3):
        x, y = data(net, step)
        for model, rows in ((ref, slice(None)), (net, slice(rank, None, world))):
            model.zero_grad()
            attach(loss := cross_entropy(model(x[rows]), y[rows]))
            loss.backward()
        worst = max(worst, difference(net, ref, "hess_diag"), difference(net, ref, "grad"))
    return worst


def by_columns(p: Tensor) -> Shard:
    """FSDP2 cuts other dimensions than the first into equal parts only."""
    return Shard(p.dim() - 1 if p.shape[-1] % dist.get_world_size() == 0 else 0)


def data(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(net, Tied):
        return tuple(torch.randint(11, (8,), generator=generator).to(DEVICE) for _ in range(2))
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return x.to(DEVICE), torch.randint(3, (8,), generator=generator).to(DEVICE)


def difference(net: nn.Module, ref: nn.Module, name: str) -> float:
    """Largest relative difference of an attribute of the parameters; both lack it or both have it."""
    worst, mine = 0.0, dict(net.named_parameters())
    for key, r in ref.named_parameters():
        there, here = (getattr(p, name, None) for p in (r, mine[key]))
        assert (there is None) == (here is None), key
        if there is not None:
            assert here.placements == mine[key].placements
            worst = max(worst, ((here.full_tensor() - there).abs().max() / there.abs().max()).item())
    return worst


def diagonals(make, children=True, reshard=True, accumulate="", method="hesscale", named=False, **options):
    """Several steps, so that rules run, are taken down and run as a program; weights move by plain SGD."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    net = make().double().to(DEVICE)
    ref = copy.deepcopy(net)
    if make is unused:
        ref = unused().double().to(DEVICE)
        ref.load_state_dict(net.state_dict())
    shard(net, children, reshard_after_forward=reshard, **options)
    worst = 0.0
    for step in range(4):
        for p in (*net.parameters(), *ref.parameters()):
            p.grad = None
        parts = 2 if accumulate else 1
        for part in range(parts):
            x, y = data(net, 10 * step + part)
            ref.short = net.short = part == 1
            loss = cross_entropy(ref(x), y) / parts
            attach(loss, method=method)
            loss.backward()
            if accumulate == "without sync":
                net.set_requires_gradient_sync(part == parts - 1)
            if accumulate == "without all-reduce":
                net.set_requires_all_reduce(part == parts - 1)
            loss = cross_entropy(net(x[rank::world]), y[rank::world]) / parts
            attach(loss, list(net.parameters()) if named else None, method=method)
            loss.backward()
        worst = max(worst, difference(net, ref, "hess_diag"), difference(net, ref, "grad"))
        with torch.no_grad():
            for p in (*net.parameters(), *ref.parameters()):
                if p.grad is not None:
                    p -= 0.05 * p.grad
    return max(worst, difference(net, ref, "data"))


def between(passes):
    """A forward pass between attach and backward, which frees the parameters, or two losses attached at once."""
    torch.manual_seed(1)
    net = mlp().double().to(DEVICE)
    ref = copy.deepcopy(net)
    shard(net, True, reshard_after_forward=True)
    worst = 0.0
    for step in range(4):
        for model, rows in ((ref, slice(None)), (net, slice(dist.get_rank(), None, 2))):
            model.zero_grad()
            losses = []
            for seed in range(passes):
                x, y = data(net, 10 * step + seed)
                losses.append(cross_entropy(model(x[rows]), y[rows]))
                attach(losses[-1])
            if passes == 1:
                with torch.no_grad():
                    model(x[rows])
            for loss in losses:
                loss.backward()
        worst = max(worst, difference(net, ref, "hess_diag"), difference(net, ref, "grad"))
        with torch.no_grad():
            for p in (*net.parameters(), *ref.parameters()):
                p -= 0.05 * p.grad
    return worst


def given_up():
    """What was attached and dropped or removed leaves shards, so the next forward pass has the new weights."""
    torch.manual_seed(1)
    net = mlp().double().to(DEVICE)
    ref = copy.deepcopy(net)
    shard(net, True)
    x, y = data(net, 0)
    for remove in (False, True):
        attachment = attach(loss := cross_entropy(net(x), y))
        if remove:
            attachment.remove()
        del loss, attachment
        with torch.no_grad():
            for p in (*net.parameters(), *ref.parameters()):
                p *= 0.9
    return (net(x) - ref(x)).abs().max().item()


def frozen_critic():
    """Gradients go through a sharded model of which no parameter is trained, and through one that is not wanted."""
    worst = 0.0
    for trained in (False, True):
        torch.manual_seed(1)
        net, critic = nn.Linear(5, 5).double().to(DEVICE), mlp().double().requires_grad_(trained).to(DEVICE)
        pairs = [(copy.deepcopy(net), copy.deepcopy(critic)), (net, critic)]
        shard(net, False)
        shard(critic, True)
        for step in range(3):
            x, y = data(critic, step)
            for (a, b), rows in zip(pairs, (slice(None), slice(dist.get_rank(), None, 2)), strict=True):
                a.zero_grad()
                loss = cross_entropy(b(torch.tanh(a(x[rows]))), y[rows])
                attach(loss, list(a.parameters()))
                loss.backward()
            worst = max(worst, difference(net, pairs[0][0], "hess_diag"))
    return worst


def half(**_):
    """A policy of bfloat16 parameters: diagonals are the float32 shards' and close to those of full precision."""
    torch.manual_seed(1)
    net = mlp().to(DEVICE)
    ref = copy.deepcopy(net)
    shard(net, True, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    x, y = data(net, 0)
    for model, rows in ((ref, slice(None)), (net, slice(dist.get_rank(), None, 2))):
        loss = cross_entropy(model(x.float()[rows]).float(), y[rows])
        attach(loss)
        loss.backward()
    assert all(p.hess_diag.dtype == torch.float32 for p in net.parameters())
    return difference(net, ref, "hess_diag")


def hybrid():
    """Replicated twice; in four processes shards are halves, in two they are whole."""
    return init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def training(make_optimizer, clip=None, resume=False):
    """The weights after five steps."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    net = mlp().double().to(DEVICE)
    ref = copy.deepcopy(net)
    shard(net, True)
    mine, other = make_optimizer(net.parameters()), make_optimizer(ref.parameters())
    for step in range(5):
        if resume and step == 3:
            saved = copy.deepcopy(mine.state_dict())
            mine = make_optimizer(net.parameters())
            mine.load_state_dict(saved)
        x, y = data(net, step)
        for model, optimizer, rows in ((ref, other, slice(None)), (net, mine, slice(rank, None, world))):
            optimizer.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            attach(loss)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    stats = {k: abs(float(mine.stats[k]) / float(v) - 1) for k, v in other.stats.items()}
    return max(difference(net, ref, "data"), *stats.values())


def uneven():
    """One process leaves a layer out that the other uses, and FSDP2 was told of it."""
    torch.manual_seed(1)
    net = Branching().double().to(DEVICE)
    ref = copy.deepcopy(net)
    shard(net, False)
    net.set_reduce_scatter_unused_params(True)
    worst = 0.0
    for step in range(4):
        rank = dist.get_rank()
        (x, y), lone = data(net, step), step % 2  # the process that leaves it out
        ref.zero_grad()
        losses = []
        for process in range(2):
            ref.short = process == lone
            losses.append(cross_entropy(ref(x[process::2]), y[process::2]))
        attach(loss := sum(losses) / 2)
        loss.backward()
        net.zero_grad()
        net.short = rank == lone
        attach(loss := cross_entropy(net(x[rank::2]), y[rank::2]))
        loss.backward()
        worst = max(worst, difference(net, ref, "hess_diag"), difference(net, ref, "grad"))
    return worst


def covered():
    """The report on a loss of a sharded model is that of one process's."""
    net = mlp().double().to(DEVICE)
    ref = copy.deepcopy(net)
    shards = (shard(net, True), list(net.parameters()))[1]
    x, y = data(net, 0)
    mine, other = coverage(cross_entropy(net(x), y), shards), coverage(cross_entropy(ref(x), y), ref.parameters())
    assert mine.unreached == other.unreached == 0
    barrier = "RegisterPostBackwardFunctionBackward"
    assert [entry for entry in mine.entries if entry.operation != barrier] == list(other.entries)
    return 0.0


def left_out():
    net = Branching().double().to(DEVICE)
    shard(net, False)
    net.short = dist.get_rank() == 1
    x, y = data(net, 0)
    attach(cross_entropy(net(x), y))


def bytes_reduced():
    """Over two backward passes of which the second reduces: as many bytes for curvature as for the gradient."""
    sent = {}
    for curvature in (False, True):
        torch.manual_seed(1)
        net = mlp().double().to(DEVICE)
        shard(net, True)
        for _ in range(2):
            with Sent() as counted:
                for part in range(2):
                    net.set_requires_gradient_sync(part == 1)
                    x, y = data(net, part)
                    loss = cross_entropy(net(x), y)
                    if curvature:
                        attach(loss)
                    loss.backward()
        sent[curvature] = counted.bytes
    flags = 2 * 6 * 4  # at each attach, an int32 for each parameter
    assert sent[True]["gather"] == sent[False]["gather"] > 0
    assert sent[True]["reduce"] == 2 * sent[False]["reduce"] + flags
    return 0.0


def compiled():
    net = mlp().to(DEVICE)
    shard(net, True)
    compile_step(net, cross_entropy, backend="eager", on_failure="raise", silent=True)


def refused(error, words, work):
    with pytest.raises(error, match=words):
        work()
    return 0.0


def checkpointed_sharded():
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(DEVICE)
    shard(net, True)
    x, y = torch.randn(4, 5, device=DEVICE), torch.randint(3, (4,), device=DEVICE)
    loss = cross_entropy(net[2](checkpoint(net[:2], x, use_reentrant=False)), y)
    attach(loss)


def foreign():
    net = mlp().double().to(DEVICE)
    shard(net, True)
    other = mlp().double().to(DEVICE)
    shard(other, True)
    x, y = data(net, 0)
    other(x)
    attach(cross_entropy(net(x), y), other.parameters())


def scaled():
    net = mlp().double().to(DEVICE)
    shard(net, True)
    for module in net.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(3.0)
    x, y = data(net, 0)
    attach(cross_entropy(net(x), y))


def adahesscale(**options):
    return lambda params: AdaHesScale(params, **options)


def scaling(**options):
    return lambda params: StepSizeScaling(torch.optim.SGD(params, lr=1.0), **options)


def calibrated():
    net = mlp().double().to(DEVICE)
    shard(net, True)
    AdaHesScale(net.parameters(), delta=0.1, radius=CalibratedRadius(lambda: 0.0))


CASES = {
    "reshard": lambda: diagonals(mlp),
    "no reshard": lambda: diagonals(mlp, reshard=False),
    "root only": lambda: diagonals(mlp, children=False),
    "named parameters": lambda: diagonals(mlp, named=True),
    "gauss-newton": lambda: diagonals(mlp, method="hesscale_gn"),
    "accumulation with sync": lambda: diagonals(mlp, accumulate="with sync"),
    "accumulation without sync": lambda: diagonals(mlp, accumulate="without sync"),
    "hybrid": lambda: diagonals(mlp, mesh=hybrid()),
    "hybrid, accumulation without sync": lambda: diagonals(mlp, accumulate="without sync", mesh=hybrid()),
    "hybrid, accumulation without all-reduce": lambda: diagonals(mlp, accumulate="without all-reduce", mesh=hybrid()),
    "last pass without a layer": lambda: diagonals(Branching, False, accumulate="without sync"),
    "sharded by columns": lambda: diagonals(mlp, shard_placement_fn=by_columns),
    "offloaded": lambda: diagonals(mlp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "replicated": replicated,
    "uneven": uneven,
    "bytes": bytes_reduced,
    "coverage": covered,
    "tied": lambda: diagonals(Tied),
    "frozen": lambda: diagonals(frozen),
    "unused": lambda: diagonals(unused),
    "checkpoint inside": lambda: diagonals(Checkpointed, children=False),
    "forward between": lambda: between(1),
    "two losses": lambda: between(2),
    "given up": given_up,
    "frozen critic": frozen_critic,
    "mixed precision": half,
    "AdaHesScale": lambda: training(adahesscale(lr=0.5)),
    "AdaHesScale foreach": lambda: training(adahesscale(lr=0.5, foreach=True)),
    "AdaHesScale free": lambda: training(adahesscale(lr=0.5, delta=None)),
    "AdaHesScale damped": lambda: training(adahesscale(lr=0.5, damping=0.1)),
    "AdaHesScale clipped": lambda: training(adahesscale(lr=0.5, denominator="abs"), clip=0.1),
    "StepSizeScaling": lambda: training(scaling(delta=1e-3)),
    "AdaHesScale resumed": lambda: training(adahesscale(lr=0.5), resume=True),
    "StepSizeScaling resumed": lambda: training(scaling(delta=1e-3), resume=True),
    "StepSizeScaling damped": lambda: training(scaling(delta=1e-3, damping=0.1), clip=0.1),
    "rank one": lambda: refused(ValueError, "hesscale_rank1", lambda: diagonals(mlp, method="hesscale_rank1")),
    "checkpointed sharded": lambda: refused(RuntimeError, "is checkpointed", checkpointed_sharded),
    "found nothing": lambda: refused(RuntimeError, "none of the", foreign),
    "left out by one process": lambda: refused(RuntimeError, "b.weight .1 of 2 processes", left_out),
    "compiled step": lambda: refused(ValueError, "sharded", compiled),
    "divide factor": lambda: refused(RuntimeError, "set_gradient_divide_factor", scaled),
    "calibrated radius": lambda: refused(ValueError, "CalibratedRadius", calibrated),
}

if __name__ == "__main__":
    begin()
    run_cases(CASES, *sys.argv[1:])
