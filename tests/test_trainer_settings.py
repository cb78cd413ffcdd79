"""The diagonals are right, and training goes on as it should, under settings of the Trainer not covered elsewhere."""

import csv
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from hesscale_lightning import AdaHesScale, HesScaleCallback, UnsupportedOperationError, attach
from hesscale_lightning.trainer.eager import has_compiled_code
from tests.lightning_models import (
    Classifier,
    ListLogger,
    Recorder,
    ResumableLoader,
    fit,
    make_batches,
    make_loader,
    make_net,
    make_trainer,
)


def plain_loop(batches: Any, optimizer: Any = AdaHesScale) -> tuple[nn.Module, list[list[Tensor]]]:
    """The reference: the same network trained on the same batches without a Trainer, and its diagonals."""
    net = make_net()
    stepper = optimizer(net.parameters())
    diagonals = []
    for x, y in batches:
        stepper.zero_grad()
        loss = cross_entropy(net(x), y)
        attach(loss)
        loss.backward()
        diagonals.append([p.hess_diag.clone() for p in net.parameters()])
        stepper.step()
    return net, diagonals


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    for h, e in zip(found, expected, strict=True):
        torch.testing.assert_close(h, e, **tolerance)


# -- compiled and checkpointed networks


class CompiledStep(Classifier):
    """The loss is computed by a compiled function, as users do it who compile more than the network."""

    def __init__(self, net: nn.Module, optimizer: Any) -> None:
        super().__init__(net, optimizer)
        self.compute = torch.compile(lambda x, y: cross_entropy(self.net(x), y), backend="aot_eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.compute(*batch)


class CompiledInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_net()
        self.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


COMPILED = {
    "torch.compile(net)": lambda optimizer: Classifier(torch.compile(make_net(), backend="aot_eager"), optimizer),
    "net.compile()": lambda optimizer: Classifier(CompiledInPlace(), optimizer),
    "torch.compile(module)": lambda optimizer: torch.compile(Classifier(make_net(), optimizer), backend="aot_eager"),
    "torch.compile(function)": lambda optimizer: CompiledStep(make_net(), optimizer),
}


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_a_compiled_network_runs_eagerly_on_refreshed_steps_and_compiled_on_the_others(make):
    ran: list[bool] = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            names, queue = set(), [loss.grad_fn]
            while queue:
                node = queue.pop()
                names.add(node.name())
                queue += [child for child, _ in node.next_functions if child is not None]
            ran.append("CompiledFunctionBackward" in names)

    torch._dynamo.reset()
    batches, sgd = make_batches(6), lambda params: torch.optim.SGD(params, lr=0.1)
    recorder, _ = fit(make(sgd), batches, HesScaleCallback(every_n_steps=3), Watch())
    _, expected = plain_loop(batches, sgd)
    assert ran == [False, True, True, False, True, True]
    for step, row in enumerate(recorder.diagonals):
        if step % 3 == 0:
            assert_same(row, expected[step])
        else:
            assert row == [None] * 4


def test_compiled_code_is_told_from_ordinary_modules():
    assert not has_compiled_code(Classifier(make_net()))
    assert has_compiled_code(Classifier(torch.compile(make_net(), backend="aot_eager")))


def test_code_compiled_out_of_sight_is_named_with_advice():
    net = make_net()
    compute = torch.compile(lambda x, y: cross_entropy(net(x), y), backend="aot_eager")

    class Hidden(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return compute(*batch)

    torch._dynamo.reset()
    with pytest.raises(UnsupportedOperationError, match=r"CompiledFunctionBackward.*force_eager"):
        fit(Hidden(net), make_batches(1), HesScaleCallback())


def test_compiled_code_is_compiled_again_after_an_error():
    class Fail(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("stop")

    torch._dynamo.reset()
    net = torch.compile(make_net(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="stop"):
        fit(Classifier(net), make_batches(1), HesScaleCallback(), Fail())
    assert net(make_batches(1)[0][0]).grad_fn.name() == "CompiledFunctionBackward"


def test_activation_checkpointing_gives_the_same_training():
    class Checkpointed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            hidden = checkpoint(lambda x: self.net[1](self.net[0](x)), x, use_reentrant=False)
            return cross_entropy(self.net[3](hidden), y)

    net, batches = make_net(), make_batches(5)
    recorder, _ = fit(Checkpointed(net), batches, HesScaleCallback(audit="exact", audit_every_n_steps=2))
    reference, expected = plain_loop(batches)
    for found, e in zip(recorder.diagonals, expected, strict=True):
        assert_same(found, e)
    assert_same(net.parameters(), reference.parameters())


def test_reentrant_checkpointing_is_refused_with_advice():
    class Reentrant(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return cross_entropy(self.net[3](checkpoint(self.net[:2], x.requires_grad_(), use_reentrant=True)), y)

    with pytest.raises(UnsupportedOperationError, match="use_reentrant=False"):
        fit(Reentrant(make_net()), make_batches(1), HesScaleCallback())


# -- DDP


class Shared(Classifier):
    """Each of two processes takes every second sample; only the second one uses the extra layer, if there is one."""

    def __init__(self, net: nn.Module, extra: bool = False, optimizer: Any = AdaHesScale) -> None:
        super().__init__(net, optimizer)
        self.extra = nn.Linear(6, 6) if extra else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (part[self.global_rank :: self.trainer.world_size] for part in batch)
        return cross_entropy(self.net(self.extra(x) if self.extra and self.global_rank == 1 else x), y)


class Saver(Recorder):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {key: value for key, value in trainer.callback_metrics.items() if "overhead" not in key}
        torch.save((self.diagonals, pl_module.state_dict(), metrics), self.path / f"{trainer.global_rank}.pt")


DDP = {
    "plain": {},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "all": {"static_graph": True, "gradient_as_bucket_view": True, "find_unused_parameters": True},
}


def two_processes(model: pl.LightningModule, path: Path, callback: HesScaleCallback, **strategy: Any) -> list[Any]:
    ddp = DDPStrategy(start_method="fork", process_group_backend="gloo", **strategy)
    trainer = make_trainer(callback, Saver(path), strategy=ddp, devices=2, use_distributed_sampler=False)
    trainer.fit(model, make_loader(make_batches(4)))
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("options", DDP.values(), ids=DDP)
def test_two_processes_train_as_one_on_the_global_batch(tmp_path, options):
    callback = HesScaleCallback(audit="exact", audit_every_n_steps=1, log_every_n_steps=1)
    ranks = two_processes(Shared(make_net()), tmp_path, callback, **options)
    reference, expected = plain_loop(make_batches(4))
    for found, weights, _ in ranks:
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs, rtol=1e-4, atol=1e-6)
        assert_same(weights.values(), reference.state_dict().values(), rtol=1e-4, atol=1e-6)
    # What is logged, the audit's error included, is the same everywhere.
    assert ranks[0][2] == ranks[1][2]
    assert 0 < ranks[0][2]["curvature/audit/relative_l1"] < 1


def test_a_parameter_that_one_process_does_not_use_neither_hangs_nor_differs(tmp_path):
    callback = HesScaleCallback(audit="exact", audit_every_n_steps=2)
    ranks = two_processes(Shared(make_net(), extra=True), tmp_path, callback, find_unused_parameters=True)
    for ours, theirs in zip(ranks[0][0], ranks[1][0], strict=True):
        assert all(h is not None for h in ours)
        assert_same(ours, theirs, rtol=0, atol=0)
    assert_same(ranks[0][1].values(), ranks[1][1].values(), rtol=0, atol=0)


def test_the_trust_region_is_the_same_in_both_processes(tmp_path):
    model = Shared(make_net(), optimizer=lambda params: torch.optim.SGD(params, lr=10.0))
    ranks = two_processes(model, tmp_path, HesScaleCallback(delta=1e-4, log_every_n_steps=1))
    assert_same(ranks[0][1].values(), ranks[1][1].values(), rtol=0, atol=0)
    assert ranks[0][2]["curvature/scale"] == ranks[1][2]["curvature/scale"] < 0.1


# -- fine-tuning, short runs, validation, interruption


class UnfreezeInSecondEpoch(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Trainable(Classifier):
    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("optimizer", "delta"), [(AdaHesScale, None), (lambda params: torch.optim.SGD(params, lr=1.0), 1e-4)]
)
def test_layers_that_finetuning_unfreezes_get_their_diagonals(optimizer, delta):
    net = make_net()
    before = net[0].weight.detach().clone()
    callbacks = [HesScaleCallback(delta=delta), UnfreezeInSecondEpoch()]
    recorder, trainer = fit(Trainable(net, optimizer), make_batches(2), *callbacks, max_epochs=2)
    assert [len(row) for row in recorder.diagonals] == [2, 2, 4, 4]
    assert all(h is not None for row in recorder.diagonals for h in row)
    assert not torch.equal(net[0].weight, before)
    assert len(trainer.optimizers[0].param_groups) == 2


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not torch.is_grad_enabled()
        x, y = batch
        self.log("val/loss", cross_entropy(self.net(x), y))


def test_sanity_checking_and_validation_within_an_epoch_do_not_disturb():
    net, batches, logger = make_net(), make_batches(6), ListLogger()
    recorder = Recorder()
    options = {"num_sanity_val_steps": 1, "val_check_interval": 2, "logger": logger}
    trainer = make_trainer(HesScaleCallback(log_every_n_steps=2), recorder, **options)
    trainer.fit(Validated(net), make_loader(batches), make_loader(batches[:2]))
    reference, expected = plain_loop(batches)
    for found, e in zip(recorder.diagonals, expected, strict=True):
        assert_same(found, e)
    assert_same(net.parameters(), reference.parameters(), rtol=0, atol=0)
    assert list(logger.curvature()) == [1, 3, 5]


def test_fast_dev_run_and_overfit_batches():
    batches = make_batches(4)
    net = make_net()
    recorder, _ = fit(Validated(net), batches, HesScaleCallback(), fast_dev_run=True)
    assert_same(recorder.diagonals[0], plain_loop(batches[:1])[1][0])
    assert len(recorder.diagonals) == 1

    net = make_net()
    recorder, _ = fit(Validated(net), batches, HesScaleCallback(), overfit_batches=2, max_epochs=3)
    reference, expected = plain_loop(batches[:2] * 3)
    assert_same([h for row in recorder.diagonals for h in row], [h for row in expected for h in row])
    assert_same(net.parameters(), reference.parameters(), rtol=0, atol=0)


def test_one_trainer_fits_two_modules_one_after_the_other_with_a_trust_region():
    trainer = make_trainer(HesScaleCallback(delta=1e-4), max_epochs=1)
    weights = []
    for _ in range(2):
        model = Classifier(make_net(), lambda params: torch.optim.SGD(params, lr=1.0))
        trainer.fit(model, make_loader(make_batches(3)))
        trainer.fit_loop.epoch_progress.reset()
        trainer.fit_loop.epoch_loop.reset()
        weights.append([p.detach().clone() for p in model.parameters()])
    alone = Classifier(make_net(), lambda params: torch.optim.SGD(params, lr=1.0))
    fit(alone, make_batches(3), HesScaleCallback(delta=1e-4))
    assert_same(weights[0], alone.parameters(), rtol=0, atol=0)


# -- SIGKILL and resume


class Stuck(pl.Callback):
    """Waits to be killed in the middle of the second epoch, after its 13th step."""

    def __init__(self, reached: Any) -> None:
        self.reached = reached

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 13:
            self.reached.set()
            time.sleep(60)


class Measured(Classifier):
    """Logs a metric that is computed over the whole epoch."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(make_net(), optimizer)
        self.accuracy = MulticlassAccuracy(3)
        self.accuracy.persistent(True)  # without this, a metric forgets the first part of an interrupted epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return cross_entropy(logits, y)


def run(folder: Path, name: str, optimizer: str, reached: Any = None, resume: Path | None = None) -> None:
    make = {"adahesscale": AdaHesScale, "adam": lambda params: torch.optim.Adam(params, lr=0.05)}[optimizer]
    curvature = HesScaleCallback(
        every_n_steps=2,
        log_every_n_steps=3,
        delta=1e-4 if optimizer == "adam" else None,
        audit="exact",
        audit_every_n_steps=5,
        audit_entries=20,
    )
    keep = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    stuck = [] if reached is None else [Stuck(reached)]
    logger = CSVLogger(folder, "log", name)
    options = {"logger": logger, "max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 3}
    trainer = make_trainer(curvature, keep, *stuck, **options)
    trainer.fit(Measured(make), ResumableLoader(make_batches(9)), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{name}.ckpt")


@pytest.mark.filterwarnings("ignore")  # the folders of the checkpoints differ
@pytest.mark.parametrize("optimizer", ["adahesscale", "adam"])
def test_a_run_that_was_killed_and_resumed_ends_bit_identical_to_an_uninterrupted_one(optimizer, tmp_path):
    processes = multiprocessing.get_context("fork")
    reached = processes.Event()
    killed = processes.Process(target=run, args=(tmp_path, "killed", optimizer, reached))
    killed.start()
    run(tmp_path, "whole", optimizer)
    assert reached.wait(180)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    run(tmp_path, "resumed", optimizer, resume=tmp_path / "killed" / "step=12.ckpt")

    expected, found = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "resumed"))
    assert found["global_step"] == expected["global_step"] == 18
    compare(found["state_dict"], expected["state_dict"])
    compare(found["optimizer_states"], expected["optimizer_states"])
    (key,) = (key for key in found["callbacks"] if "HesScaleCallback" in key)
    assert found["callbacks"][key] == expected["callbacks"][key]
    logs = [read_log(tmp_path / "log" / name / "metrics.csv") for name in ("whole", "resumed")]
    assert logs[1] == {step: row for step, row in logs[0].items() if step >= 12}
    assert "train/accuracy" in logs[1][17]
    assert any("curvature/audit/cosine" in row for row in logs[1].values())


def compare(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        # torch's own Optimizer adds this option to the groups when it loads a state.
        assert found.keys() - {"differentiable"} == expected.keys() - {"differentiable"}
        for key in expected:
            compare(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for f, e in zip(found, expected, strict=True):
            compare(f, e)
    else:
        assert found == expected


def read_log(path: Path) -> dict[int, dict[str, str]]:
    log: dict[int, dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            values = {key: value for key, value in row.items() if value and "overhead" not in key}
            log.setdefault(int(row["step"]), {}).update(values)
    return log
