"""Run by several processes: HesScaleCallback under ModelParallelStrategy against a plain loop on the global batch."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

from hesscale_lightning import AdaHesScale, HesScaleCallback, HesScaleModule, SkipNonfiniteSteps, attach
from hesscale_lightning.metrics import (
    STATISTICS,
    effective_learning_rate,
    layer_shares,
    log_histogram,
    mean_abs,
    predicted_decrease,
)
from hesscale_lightning.optim import StepSizeScaling
from tests.distributed.launching import DEVICE, begin, run_cases
from tests.lightning_models import ListLogger, Recorder, ResumableLoader, make_batches, make_net, make_trainer

BATCHES = make_batches(6, size=8, dtype=torch.float64)


def shard_all(net: nn.Sequential, mesh: Any) -> None:
    for layer in (net[0], net[3], net):
        fully_shard(layer, mesh=mesh)


def by_columns_and_rows(net: nn.Sequential, mesh: Any) -> None:
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})


def both(net: nn.Sequential, mesh: Any) -> None:
    """Tensor parallelism inside fully_shard."""
    by_columns_and_rows(net, mesh["tensor_parallel"])
    shard_all(net, mesh["data_parallel"])


#: By how a network is split, along which dimension of the mesh; both: the mesh itself.
ALONG = {by_columns_and_rows: "tensor_parallel", both: None}


class Sharded(pl.LightningModule):
    """Splits its network, and takes its part of every batch."""

    def __init__(self, optimizer: Any, shard: Any = shard_all) -> None:
        super().__init__()
        self.net, self.optimizer = make_net(dtype=torch.float64), optimizer
        self.shard = shard

    def configure_model(self) -> None:
        if not any(hasattr(p, "placements") for p in self.parameters()):
            along = ALONG.get(self.shard, "data_parallel")
            self.shard(self.net, self.device_mesh if along is None else self.device_mesh[along])

    def loss(self, batch: Any) -> Tensor:
        mesh = self.device_mesh["data_parallel"]
        x, y = (part[mesh.get_local_rank() :: mesh.size()] for part in batch)
        return cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Manual(Sharded):
    """Accumulates two batches without a reduction between them."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        steps = batch_idx % 2 == 1
        self.net.set_requires_gradient_sync(steps)
        self.manual_backward(self.loss(batch) / 2)
        if steps:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def fit(
    module: Any,
    callback: Any,
    *others: Any,
    distributed: bool = True,
    path: Any = None,
    batches: Any = BATCHES,
    **options: Any,
) -> Any:
    recorder = Recorder()
    world, along = dist.get_world_size(), ALONG.get(getattr(module, "shard", None), "data_parallel")
    sizes = {"data_parallel": (world, 1), "tensor_parallel": (1, world), None: (2, world // 2)}[along]
    trainer = make_trainer(
        callback,
        recorder,
        *others,
        accelerator=DEVICE,
        devices=world,
        strategy=ModelParallelStrategy(*sizes, save_distributed_checkpoint=distributed),
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, ResumableLoader(batches), ckpt_path=path)
    return recorder, trainer


def plain(make_optimizer: Any, steps: int = 6, every: int = 1, clip: float = 0.0, accumulate: int = 1) -> Any:
    """Weights, diagonals and what is logged of a loop in one process."""
    net = make_net(dtype=torch.float64)
    optimizer = make_optimizer(net.parameters())
    diagonals, logs = [], []
    for step in range(0, steps, accumulate):
        optimizer.zero_grad()
        for x, y in BATCHES[step : step + accumulate]:
            loss = cross_entropy(net(x), y) / accumulate
            if step % every == 0:
                attach(loss)
            loss.backward()
        if step % every == 0:
            h = [p.hess_diag.clone() for p in net.parameters()]
            diagonals.append(h)
            log = {name: function(h) for name, function in STATISTICS.items()}
            layers = {"net.0": h[:2], "net.3": h[2:]}
            log |= {f"share/{name}": share for name, share in layer_shares(layers).items()}
            log |= {f"mean_abs/{name}": mean_abs(hs) for name, hs in layers.items()}
            log["counts"] = log_histogram(h)
            logs.append(log)
        g, before = (
            [t.detach().clone() for t in tensors] for tensors in ([p.grad for p in net.parameters()], net.parameters())
        )
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if step % every == 0:
            moved = [p.detach() - old for p, old in zip(net.parameters(), before, strict=True)]
            logs[-1]["effective_lr"] = effective_learning_rate(moved, g)
            logs[-1]["predicted_decrease"] = predicted_decrease(g, h, moved)
            with torch.no_grad():
                logs[-1]["actual_decrease"] = loss - cross_entropy(net(x), y)
            if "scale" in getattr(optimizer, "stats", {}):
                logs[-1]["scale"] = optimizer.stats["scale"]
    return list(net.parameters()), diagonals, logs


def relative(found: Any, expected: Tensor) -> float:
    found = found.full_tensor() if hasattr(found, "full_tensor") else torch.as_tensor(found)
    found = found.cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def differences(module: Any, recorder: Any, expected: Any, logger: Any = None) -> float:
    weights, diagonals, logs = expected
    worst = [relative(p, r) for p, r in zip(module.net.parameters(), weights, strict=True)]
    refreshed = [hs for hs in recorder.diagonals if hs[0] is not None]
    for found, ones in zip(refreshed, diagonals, strict=True):
        worst += [relative(h, one) for h, one in zip(found, ones, strict=True)]
    if logger is not None:
        records = list(logger.curvature().values())
        for record, log in zip(records, logs, strict=True):
            assert set(record) - {f"curvature/{name}" for name in log} <= {"curvature/gain_ratio"}
            worst += [abs(v - float(log[k.removeprefix("curvature/")])) / abs(v) for k, v in record.items() if k in log]
            keys = [key for key in record if key != "curvature/gain_ratio"]
            worst += [abs(record[k] / float(log[k.removeprefix("curvature/")]) - 1) for k in keys]
    return max(worst)


def adahesscale(**options: Any) -> Any:
    return lambda params: AdaHesScale(params, lr=0.5, **options)


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=1.0)


def adam(params: Any) -> Any:
    return torch.optim.Adam(params, lr=0.1)


def scaled(make: Any) -> Any:
    return lambda params: StepSizeScaling(make(params), 1e-3)


def logged(
    optimizer: Any,
    reference: Any = None,
    clip: float = 0.0,
    accumulate: int = 1,
    shard: Any = shard_all,
    **options: Any,
) -> float:
    logger, module = ListLogger(), Sharded(optimizer, shard)
    callback = HesScaleCallback(log_every_n_steps=1, per_layer=True, **options)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip or None}
    recorder, _ = fit(module, callback, logger=logger, **settings)
    every = options.get("every_n_steps", 1)
    return differences(module, recorder, plain(reference or optimizer, 6, every, clip, accumulate), logger)


class Writer:
    """A TensorBoard writer that keeps the counts."""

    def __init__(self) -> None:
        self.counts: list[Any] = []

    def add_histogram_raw(self, *_: Any, bucket_counts: Any, **__: Any) -> None:
        self.counts.append(bucket_counts)


def histogram() -> float:
    logger = ListLogger()
    logger.experiment = Writer()
    module = Sharded(adahesscale())
    fit(module, HesScaleCallback(log_every_n_steps=1, histogram=True), logger=logger)
    expected = [log["counts"].tolist() for log in plain(adahesscale())[2]]
    assert logger.experiment.counts == (expected if dist.get_rank() == 0 else [])  # rank zero alone writes
    return 0.0


def shared_folder() -> Path:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def manual(optimizer: Any) -> float:
    module = Manual(optimizer)
    recorder, _ = fit(module, HesScaleCallback())
    return differences(module, recorder, plain(optimizer, accumulate=2))


def resumed(optimizer: Any, reference: Any = None, distributed: bool = True, **options: Any) -> float:
    """Three steps, a checkpoint, and three more in a new module, as if there had been no break."""
    folder = shared_folder()
    save_into(folder, optimizer, distributed, **options)
    return resume_from(folder, optimizer, reference, distributed, **options)


def save_into(folder: Any, optimizer: Any, distributed: bool = True, shard: Any = shard_all, **options: Any) -> float:
    keep = ModelCheckpoint(folder, "three", every_n_train_steps=3, save_top_k=-1)
    callback = HesScaleCallback(log_every_n_steps=2, **options)
    fit(Sharded(optimizer, shard), callback, keep, distributed=distributed, max_steps=3, enable_checkpointing=True)
    return 0.0


def resume_from(
    folder: Any,
    optimizer: Any,
    reference: Any = None,
    distributed: bool = True,
    shard: Any = shard_all,
    **options: Any,
) -> float:
    module, callback = Sharded(optimizer, shard), HesScaleCallback(log_every_n_steps=2, **options)
    logger = ListLogger()
    recorder, _ = fit(module, callback, distributed=distributed, path=str(folder / "three.ckpt"), logger=logger)
    weights, diagonals, logs = plain(reference or optimizer)
    assert list(logger.curvature()) == [3, 5]
    return differences(module, recorder, (weights, diagonals[3:], logs))


def refused(words: str, optimizer: Any = None, shard: Any = shard_all, **options: Any) -> float:
    with pytest.raises(MisconfigurationException, match=words):
        fit(Sharded(optimizer or adahesscale(), shard), HesScaleCallback(**options))
    return 0.0


def elsewhere(_: Any) -> Any:
    return AdaHesScale(make_net().parameters())


class Opaque(torch.autograd.Function):
    """An operation without a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Behind(nn.Sequential):
    """The first layer is behind an operation without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return self[3](torch.tanh(Opaque.apply(self[0](x))))


def skipped() -> float:
    module = Sharded(sgd)
    module.net = Behind(*module.net)
    recorder, _ = fit(module, HesScaleCallback(on_unsupported="skip"))
    ref = Behind(*make_net(dtype=torch.float64))
    worst = []
    for (x, y), found in zip(BATCHES, recorder.diagonals, strict=True):
        ref.zero_grad()
        attach(loss := cross_entropy(ref(x), y), ref[3].parameters())
        loss.backward()
        assert found[:2] == [None, None]
        worst += [relative(h, p.hess_diag) for h, p in zip(found[2:], ref[3].parameters(), strict=True)]
        with torch.no_grad():
            for p in ref.parameters():
                p -= p.grad
    return max(worst + [relative(p, r) for p, r in zip(module.net.parameters(), ref.parameters(), strict=True)])


def nonfinite(optimizer: Any, shard: Any = shard_all) -> float:
    """A batch of which one process alone sees what is not a number is skipped by all."""
    x, y = BATCHES[0]
    bad = x.clone()
    bad[dist.get_world_size() - 1, 0] = float("nan")  # the last process's first sample
    guard, module = SkipNonfiniteSteps(), Sharded(optimizer, shard)
    fit(module, HesScaleCallback(), guard, batches=[*BATCHES[:2], (bad, y), *BATCHES[2:]])
    assert guard.skipped == 1
    weights, _, _ = plain(optimizer)
    return max(relative(p, r) for p, r in zip(module.net.parameters(), weights, strict=True))


def no_plan() -> float:
    module = HesScaleModule(make_net())
    module.shard = by_columns_and_rows
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size=2, expected 1"):
        fit(module, HesScaleCallback())
    return 0.0


CASES = {
    "AdaHesScale": lambda: logged(adahesscale()),
    "AdaHesScale, clipped": lambda: logged(adahesscale(), clip=0.1),
    "AdaHesScale, accumulated": lambda: logged(adahesscale(), accumulate=2),
    "AdaHesScale, every second step": lambda: logged(adahesscale(), every_n_steps=2),
    "SGD, only logged": lambda: logged(sgd),
    "SGD with delta, clipped": lambda: logged(sgd, scaled(sgd), clip=0.1, delta=1e-3),
    "measured decrease": lambda: logged(adahesscale(), measure_decrease=True),
    "histogram": histogram,
    "steps that are not finite, AdaHesScale": lambda: nonfinite(adahesscale()),
    "steps that are not finite, Adam": lambda: nonfinite(adam),
    "steps that are not finite, tensor parallel": lambda: nonfinite(adahesscale(), by_columns_and_rows),
    "tensor parallel": lambda: logged(adahesscale(), shard=by_columns_and_rows),
    "tensor parallel, SGD with delta": lambda: logged(sgd, scaled(sgd), shard=by_columns_and_rows, delta=1e-3),
    "accumulated in manual optimization": lambda: manual(adahesscale()),
    "tensor parallel, resumed": lambda: resumed(adahesscale(), shard=by_columns_and_rows),
    "tensor parallel, resumed with delta from one file": lambda: resumed(
        adam, scaled(adam), False, shard=by_columns_and_rows, delta=1e-3
    ),
    "resumed": lambda: resumed(adahesscale()),
    "resumed from one file": lambda: resumed(adahesscale(), distributed=False),
    "resumed with delta": lambda: resumed(adam, scaled(adam), delta=1e-3),
    "resumed with delta from one file": lambda: resumed(sgd, scaled(sgd), distributed=False, delta=1e-3),
    "audit": lambda: refused("an audit .* set audit to null", audit="exact"),
    "rank one": lambda: refused("hesscale_rank1", method="hesscale_rank1"),
    "skip": skipped,
    "not sharded": lambda: refused("4 parameters that no fully_shard", shard=lambda net, mesh: None),
    "partly sharded": lambda: refused(
        "2 parameters that no .*net.3", shard=lambda net, mesh: fully_shard(net[0], mesh=mesh)
    ),
    "no plan for tensor parallelism": no_plan,
    "found nothing": lambda: refused("found no parameter of Sharded in its optimizers", elsewhere),
}

#: What is saved by some processes and gone on with by others: options of the optimizer, and of the callback.
HANDED_OVER = {
    "AdaHesScale handed over": (adahesscale(), adahesscale(), {}),
    "Adam with delta handed over": (adam, scaled(adam), {"delta": 1e-3}),
}


def handed_over(task: str, folder: Path) -> dict[str, Any]:
    if task == "save":
        return {
            name: lambda name=name, made=made: save_into(folder / name, made[0], **made[2])
            for name, made in HANDED_OVER.items()
        }
    return {
        name: lambda name=name, made=made: resume_from(folder / name, made[0], made[1], **made[2])
        for name, made in HANDED_OVER.items()
    }


if __name__ == "__main__":
    begin()
    if len(sys.argv) == 3:
        run_cases(handed_over(sys.argv[1], Path(sys.argv[2])))
    else:
        run_cases(CASES, *sys.argv[1:])
