"""Lightning's own helpers beside HesScaleCallback: averaged weights, searches for a learning rate or a batch size."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from hesscale_lightning import AdaHesScale, HesScaleCallback, StepSizeScaling, attach
from hesscale_lightning.trainer.searches import HOOKS
from tests.lightning_models import Classifier, ListLogger, make_batches, make_loader, make_net, make_trainer

RATES = {"min_lr": 1e-4, "max_lr": 10.0, "num_training_steps": 12, "early_stop_threshold": None}


class Tunable(Classifier):
    """A module with the two attributes that the searches set, and its own data."""

    def __init__(self, optimizer: Any, lr: float = 1e-3) -> None:
        super().__init__(make_net())
        self.lr, self.batch_size, self.make = lr, 2, optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_loader(make_batches(16)).dataset, batch_size=self.batch_size)


def plain_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = cross_entropy(net(x), y)
    attach(loss)
    loss.backward()
    optimizer.step()
    return loss.item()


def in_a_region(params: Any, lr: float) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, lr=lr), 1e-4)


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("validate", [False, True])
def test_averaged_weights_equal_a_plain_loop(validate):
    """EMAWeightAveraging, also where it exchanges the weights for validation within an epoch."""

    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("loss", cross_entropy(self.net(batch[0]), batch[1]))

    batches = make_batches(8)
    model = (Validated if validate else Classifier)(make_net())
    options: dict[str, Any] = {"val_check_interval": 3} if validate else {}
    trainer = make_trainer(HesScaleCallback(), EMAWeightAveraging(decay=0.7), **options)
    trainer.fit(model, make_loader(batches), make_loader(batches[:2]) if validate else None)

    net = make_net()
    optimizer = AdaHesScale(net.parameters())
    average: list[Tensor] = []
    for x, y in batches:
        plain_step(net, optimizer, x, y)
        average = [0.7 * a + 0.3 * p for a, p in zip(average, weights(net), strict=True)] if average else weights(net)
    for p, a in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), a)


def test_averaged_weights_go_on_where_they_were_after_resuming(tmp_path):
    def callbacks() -> list[pl.Callback]:
        return [HesScaleCallback(), EMAWeightAveraging(decay=0.7)]

    whole = Classifier(make_net())
    make_trainer(*callbacks(), max_epochs=2).fit(whole, make_loader(make_batches(4)))
    first = make_trainer(*callbacks(), max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    first.fit(Classifier(make_net()), make_loader(make_batches(4)))
    (checkpoint,) = Path(tmp_path).rglob("*.ckpt")
    resumed = Classifier(make_net())
    make_trainer(*callbacks(), max_epochs=2).fit(resumed, make_loader(make_batches(4)), ckpt_path=checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("finder", [LearningRateFinder(**RATES, update_attr=False), BatchSizeFinder(max_trials=2)])
def test_a_search_with_another_optimizer_finds_the_same_with_and_without_the_callback(finder, tmp_path):
    found = []
    for callbacks in ([HesScaleCallback()], []):
        model = Tunable(torch.optim.Adam)
        make_trainer(finder, *callbacks, default_root_dir=tmp_path).fit(model)
        result = finder.optimal_lr.results if isinstance(finder, LearningRateFinder) else finder.optimal_batch_size
        found.append((result, weights(model)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(p, q) for p, q in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize(
    ("make", "callback"),
    [
        (AdaHesScale, HesScaleCallback()),
        (torch.optim.Adam, HesScaleCallback(delta=1e-4)),
        (AdaHesScale, HesScaleCallback(every_n_steps=3)),
    ],
)
def test_the_losses_of_a_search_for_a_learning_rate_are_those_of_a_plain_loop(make, callback, tmp_path):
    finder = LearningRateFinder(**RATES, update_attr=False)
    model = Tunable(make)
    make_trainer(finder, callback, default_root_dir=tmp_path, max_steps=3).fit(model)

    region = make is torch.optim.Adam
    net = make_net()
    optimizer = (in_a_region if region else AdaHesScale)(net.parameters(), lr=1e-3)
    losses, smoothed, x_y = [], 0.0, list(Tunable(make).train_dataloader())
    for step, rate in enumerate(finder.optimal_lr.results["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = x_y[step]
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        if step % callback.every_n_steps == 0:
            attach(loss)
        loss.backward()
        optimizer.step()
        smoothed = 0.98 * smoothed + 0.02 * loss.item()
        losses.append(smoothed / (1 - 0.98 ** (step + 2)))
    torch.testing.assert_close(torch.tensor(finder.optimal_lr.results["loss"]), torch.tensor(losses))


SEARCHES = {
    "learning rate": lambda: LearningRateFinder(**RATES, update_attr=False),
    "batch size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
}
USES = {"AdaHesScale": (AdaHesScale, None), "delta": (torch.optim.Adam, 1e-4)}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("search", SEARCHES)
def test_training_after_a_search_is_what_it_is_without_one(search, use, tmp_path):
    """Weights, averages of curvature, and what is logged on which steps."""
    make, delta = USES[use]
    finder = SEARCHES[search]()
    seen = []
    for first in ([finder], []):
        model, logger = Tunable(make), ListLogger()
        model.batch_size = 2 if first else getattr(finder, "optimal_batch_size", 2)
        callback = HesScaleCallback(every_n_steps=2, log_every_n_steps=2, delta=delta)
        trainer = make_trainer(*first, callback, logger=logger, default_root_dir=tmp_path, max_steps=6)
        trainer.fit(model)
        assert trainer.global_step == 6
        assert not set(HOOKS) & set(vars(model))  # the module's hooks are its own again
        seen.append((weights(model), [list(s.values()) for s in trainer.optimizers[0].state.values()], logger))
    (searched, state, log), (plain, plain_state, plain_log) = seen
    if search == "batch size":
        assert finder.optimal_batch_size > 2
    assert all(torch.equal(p, q) for p, q in zip(searched, plain, strict=True))
    assert str(state) == str(plain_state)
    assert log.curvature() == plain_log.curvature()
    assert list(log.curvature()) == [2, 4]


def test_a_search_in_the_middle_of_training_has_curvature_too(tmp_path):
    """As Lightning's documentation shows it, for fine-tuning at milestones."""

    class AtEpochOne(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    searched, plain = Tunable(AdaHesScale), Tunable(AdaHesScale)
    finder = AtEpochOne(**RATES | {"num_training_steps": 4}, update_attr=False)
    make_trainer(finder, HesScaleCallback(), default_root_dir=tmp_path, max_epochs=3).fit(searched)
    make_trainer(HesScaleCallback(), max_epochs=3).fit(plain)
    assert len(finder.optimal_lr.results["loss"]) == 4
    assert all(torch.equal(p, q) for p, q in zip(searched.parameters(), plain.parameters(), strict=True))


def test_a_module_keeps_hooks_of_its_own_during_a_search(tmp_path):
    class Counting(Tunable):
        calls = 0

        def on_before_backward(self, loss):
            self.calls += 1

    model = Counting(AdaHesScale)
    finder = SEARCHES["learning rate"]()
    make_trainer(finder, HesScaleCallback(), default_root_dir=tmp_path, max_steps=3).fit(model)
    assert model.calls == RATES["num_training_steps"] + 3
