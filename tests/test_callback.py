"""HesScaleCallback computes the diagonal of the loss that the optimizer minimises, and disturbs nothing else."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hesscale_lightning import AdaHesScale, HesScaleCallback, UnsupportedOperationError, attach
from hesscale_lightning.metrics import STATISTICS
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

KEYS = {f"curvature/{name}" for name in (*STATISTICS, "effective_lr", "predicted_decrease", "scale")}


def diagonal(net: nn.Module, batches: list[tuple[Tensor, Tensor]], method: Any = "hesscale") -> list[Tensor]:
    """The diagonal of the mean loss over some batches, by a plain loop on a copy of the network."""
    copy = make_net(dtype=next(net.parameters()).dtype)
    copy.load_state_dict(net.state_dict())
    for x, y in batches:
        loss = cross_entropy(copy(x), y) / len(batches)
        attach(loss, list(copy.parameters()), method=method)
        loss.backward()
    return [p.hess_diag for p in copy.parameters()]


def assert_same(found: list[Tensor | None], expected: list[Tensor], **tolerance: float) -> None:
    for h, e in zip(found, expected, strict=True):
        torch.testing.assert_close(h, e, **tolerance)


# -- what the optimizer receives


def test_training_with_adahesscale_equals_a_plain_loop():
    net, batches = make_net(), make_batches(12)
    fit(Classifier(net), batches, HesScaleCallback())

    plain = make_net()
    optimizer = AdaHesScale(plain.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(plain(x), y)
        attach(loss, list(plain.parameters()))
        loss.backward()
        optimizer.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "bl89", "hesscale_rank1"])
def test_the_method_reaches_the_engine(method):
    net, batches = make_net(), make_batches(1)
    expected = diagonal(net, batches, method)
    recorder, _ = fit(Classifier(net), batches, HesScaleCallback(method=method))
    assert_same(recorder.diagonals[0], expected)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
def test_another_optimizer_trains_bit_identically_with_and_without_the_callback(optimizer):
    nets, states = [], []
    for callbacks in ([HesScaleCallback(log_every_n_steps=1)], []):
        net = make_net(dropout=0.5)
        torch.manual_seed(7)
        fit(Classifier(net, lambda params: optimizer(params, lr=0.05)), make_batches(4), *callbacks)
        nets.append(net)
        states.append(torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("optimizer", [AdaHesScale, torch.optim.Adam])
def test_every_step_has_a_fresh_diagonal(optimizer):
    class Checker(Recorder):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            assert_same(self.diagonals[-1], diagonal(pl_module.net, [batches[trainer.global_step]]))

    batches = make_batches(5)
    checker = Checker()
    fit(Classifier(make_net(), optimizer), batches, HesScaleCallback(), checker)
    assert len(checker.diagonals) == 5


def test_every_step_has_a_fresh_diagonal_also_when_gradients_are_zeroed_in_place():
    class InPlace(Classifier):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    net, batches = make_net(), make_batches(2)
    expected = diagonal(net, batches[1:])  # at learning rate 0 the network stays what it is
    recorder, _ = fit(InPlace(net, lambda params: torch.optim.SGD(params, lr=0.0)), batches, HesScaleCallback())
    assert_same(recorder.diagonals[1], expected)


@pytest.mark.parametrize("optimizer", [AdaHesScale, torch.optim.Adam])
def test_accumulated_micro_batches_give_the_diagonal_of_their_mean_loss_also_in_a_short_last_window(optimizer):
    batches, windows = make_batches(7), [slice(0, 3), slice(3, 6), slice(6, 7)]

    class Checker(Recorder):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            window = batches[windows[trainer.global_step]]
            # Lightning divides every loss by the full window, also in a short last one.
            expected = [h * (len(window) / 3) for h in diagonal(pl_module.net, window)]
            assert_same(self.diagonals[-1], expected)

    checker = Checker()
    fit(Classifier(make_net(), optimizer), batches, HesScaleCallback(), checker, accumulate_grad_batches=3)
    assert len(checker.diagonals) == 3


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_leaves_the_diagonal_alone(algorithm):
    net, batches = make_net(), make_batches(1)
    expected = diagonal(net, batches)
    recorder, _ = fit(
        Classifier(net, torch.optim.Adam),
        batches,
        HesScaleCallback(),
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
    )
    assert_same(recorder.diagonals[0], expected)


def test_double_precision_gives_double_diagonals():
    net, batches = make_net(dtype=torch.float64), make_batches(1, dtype=torch.float64)
    expected = diagonal(net, batches)
    recorder, _ = fit(Classifier(net), batches, HesScaleCallback(), precision="64-true")
    assert recorder.diagonals[0][0].dtype == torch.float64
    assert_same(recorder.diagonals[0], expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_gives_float32_diagonals_close_to_full_precision(precision):
    net, batches = make_net(), make_batches(1, size=16)
    expected = diagonal(net, batches)
    recorder, _ = fit(Classifier(net), batches, HesScaleCallback(), precision=precision)
    for h, e in zip(recorder.diagonals[0], expected, strict=True):
        assert h.dtype == torch.float32
        assert (h - e).abs().sum() < 0.05 * e.abs().sum()


def scaled_precision(scale: float) -> pl.plugins.MixedPrecision:
    return pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("optimizer", [AdaHesScale, torch.optim.Adam])
def test_the_loss_scale_of_16_mixed_is_taken_out_of_the_diagonal(optimizer, every):
    results = {}
    for scale in (1.0, 256.0):
        net = make_net()
        recorder, _ = fit(
            Classifier(net, optimizer),
            make_batches(4),
            HesScaleCallback(every_n_steps=every),
            plugins=[scaled_precision(scale)],
        )
        results[scale] = (recorder.diagonals[0], [p.detach() for p in net.parameters()])
    assert_same(results[256.0][0], results[1.0][0], rtol=0.02, atol=1e-5)
    assert_same(results[256.0][1], results[1.0][1], rtol=0.02, atol=2e-3)


def test_a_step_that_overflows_in_16_mixed_is_not_logged():
    logger = ListLogger()
    fit(
        Classifier(make_net()),
        make_batches(3),
        HesScaleCallback(log_every_n_steps=1),
        plugins=[scaled_precision(2.0**40)],
        logger=logger,
    )
    assert all(value == value and abs(value) < 1e9 for row in logger.curvature().values() for value in row.values())


class Adversaries(pl.LightningModule):
    """Two optimizers in manual optimization, the second's loss running through the first's network."""

    def __init__(self, optimizer: Any, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = make_net(), nn.Linear(6, 6)
        self.make_optimizer = optimizer
        self.toggle = toggle

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        for optimizer, inputs in zip(self.optimizers(), (lambda: x, lambda: self.second(x).tanh()), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = cross_entropy(self.first(inputs()), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(self.first.parameters()), self.make_optimizer(self.second.parameters())]


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("optimizer", [AdaHesScale, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_manual_optimization_with_two_optimizers_has_fresh_diagonals_in_every_step(optimizer, toggle):
    batches, seen = make_batches(3), []

    class Checker(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            x, y = batches[trainer.global_step // 2]
            index = trainer.global_step % 2
            copy = Adversaries(None, False)
            copy.load_state_dict(pl_module.state_dict())
            loss = cross_entropy(copy.first(copy.second(x).tanh() if index else x), y)
            own = list(copy.second.parameters() if index else copy.first.parameters())
            attach(loss, own)
            loss.backward()
            found = [p.hess_diag for group in optimizer.param_groups for p in group["params"]]
            assert_same(found, [p.hess_diag for p in own])
            seen.append(index)

    fit(Adversaries(optimizer, toggle), batches, HesScaleCallback(), Checker())
    assert seen == [0, 1] * 3


def test_frozen_parameters_get_no_diagonal_and_unfrozen_ones_do():
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.net[0].requires_grad_(batch_idx >= 2)

    # A frozen parameter has no gradient either, so AdaHesScale passes it over.
    recorder, _ = fit(Classifier(make_net()), make_batches(4), Unfreeze(), HesScaleCallback())
    assert [row[0] is None for row in recorder.diagonals] == [True, True, False, False]
    assert all(row[2] is not None for row in recorder.diagonals)


# -- when it is computed and logged


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_diagonal_is_refreshed_every_n_steps(accumulate):
    recorder, _ = fit(
        Classifier(make_net()),
        make_batches(7 * accumulate),
        HesScaleCallback(every_n_steps=3),
        accumulate_grad_batches=accumulate,
    )
    assert [row[0] is not None for row in recorder.diagonals] == [True, False, False, True, False, False, True]


def test_in_manual_optimization_every_optimizer_is_refreshed_on_every_nth_batch():
    # Only its own optimizer's: the second loss also reaches the first network.
    model = Adversaries(lambda params: torch.optim.SGD(params, lr=0.1), toggle=True)
    recorder, _ = fit(model, make_batches(4), HesScaleCallback(every_n_steps=2))
    assert [row[0] is not None for row in recorder.diagonals] == [True, True, False, False, True, True, False, False]


def test_should_refresh_decides_when_to_refresh_and_is_asked_once_for_each_step():
    asked = []

    class Early(HesScaleCallback):
        def should_refresh(self, step: int) -> bool:
            asked.append(step)
            return step < 2

    recorder, _ = fit(Classifier(make_net()), make_batches(8), Early(), accumulate_grad_batches=2)
    assert asked == [0, 1, 2, 3]
    assert [row[0] is not None for row in recorder.diagonals] == [True, True, False, False]


@pytest.mark.parametrize(
    ("own", "trainers", "every", "expected"),
    [
        (None, 4, 1, [3, 7, 11]),  # follows the trainer
        (2, 50, 1, [1, 3, 5, 7, 9, 11]),  # or its own
        (0, 1, 1, []),  # or never
        (4, 50, 3, [3, 9]),  # at the first refreshed step from the one that is due on
    ],
)
def test_curvature_is_logged_on_the_steps_asked_for(own, trainers, every, expected):
    logger = ListLogger()
    callback = HesScaleCallback(every_n_steps=every, log_every_n_steps=own)
    fit(Classifier(make_net()), make_batches(12), callback, logger=logger, log_every_n_steps=trainers)
    assert list(logger.curvature()) == expected
    assert all(set(record) == KEYS for record in logger.curvature().values())


def test_the_logged_values_are_the_statistics_of_the_diagonal():
    logger = ListLogger()
    recorder, trainer = fit(
        Classifier(make_net()), make_batches(3), HesScaleCallback(log_every_n_steps=1), logger=logger
    )
    for step, record in logger.curvature().items():
        for name, statistic in STATISTICS.items():
            assert record[f"curvature/{name}"] == pytest.approx(statistic(recorder.diagonals[step]).item(), rel=1e-6)
    assert {key for key in trainer.callback_metrics if key.startswith("curvature/")} == KEYS
    assert not any(key.startswith("curvature/") for key in trainer.progress_bar_metrics)


def test_several_optimizers_are_logged_apart():
    logger = ListLogger()
    fit(Adversaries(AdaHesScale, False), make_batches(1), HesScaleCallback(log_every_n_steps=1), logger=logger)
    keys = {key for _, record in logger.records for key in record}
    names = {key.removeprefix("curvature/") for key in KEYS}
    assert keys == {f"curvature/optimizer_{index}/{name}" for index in (0, 1) for name in names}


def test_a_step_that_does_not_log_does_not_wait_for_the_device():
    class Hooks(HesScaleCallback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            self.record(super().on_before_optimizer_step, *args)

        def on_train_batch_end(self, *args: Any) -> None:
            self.record(super().on_train_batch_end, *args)

        def record(self, hook: Any, *args: Any) -> None:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                hook(*args)
            calls.append([event.key for event in profile.key_averages() if event.key.startswith("aten::")])

    calls: list[list[str]] = []
    fit(Classifier(make_net()), make_batches(2), Hooks(log_every_n_steps=2))
    assert calls[:2] == [[], []]
    assert "aten::stack" in calls[2]
    assert "aten::stack" in calls[3]


def test_early_stopping_and_checkpoints_can_follow_the_curvature(tmp_path):
    logger, batches = ListLogger(), make_batches(3)
    keep = ModelCheckpoint(tmp_path, monitor="curvature/mean_abs")
    stop = EarlyStopping("curvature/mean_abs", stopping_threshold=1e9, check_on_train_epoch_end=True)
    curvature = HesScaleCallback(log_every_n_steps=1)
    options = {"max_epochs": 5, "enable_checkpointing": True, "logger": logger}
    _, trainer = fit(Classifier(make_net()), batches, curvature, keep, stop, **options)
    assert trainer.global_step == 3  # the first epoch was good enough
    assert keep.best_model_score.item() == pytest.approx(logger.curvature()[2]["curvature/mean_abs"])


def test_the_learning_rate_monitor_reads_adahesscale():
    logger = ListLogger()
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    fit(Classifier(make_net()), make_batches(2), HesScaleCallback(), monitor, logger=logger, log_every_n_steps=1)
    optimizer = AdaHesScale(make_net().parameters()).defaults
    expected = {
        "lr-AdaHesScale": optimizer["lr"],
        "lr-AdaHesScale-momentum": optimizer["betas"][0],
        "lr-AdaHesScale-weight_decay": optimizer["weight_decay"],
    }
    assert expected in [record for _, record in logger.records]


def test_averaged_weights_are_the_same_with_and_without_the_callback():
    def averaged(*callbacks: pl.Callback) -> list[Tensor]:
        net = make_net()
        average = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
        model = Classifier(net, lambda params: torch.optim.SGD(params, lr=0.5))
        fit(model, make_batches(4), average, *callbacks, max_epochs=4)
        return [p.detach().clone() for p in model.parameters()]

    assert_same(averaged(HesScaleCallback()), averaged(), rtol=0, atol=0)


# -- what is left behind, what is refused


def leftovers(model: pl.LightningModule) -> list[str]:
    return [name for name, p in model.named_parameters() if getattr(p, "hess_diag", None) is not None]


def test_nothing_is_left_on_the_parameters_after_training():
    model, callback = Classifier(make_net(), torch.optim.Adam), HesScaleCallback()
    fit(model, make_batches(3), callback)
    assert leftovers(model) == []
    assert callback._attachment is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["between", "during"])
def test_nothing_is_left_attached_when_training_is_interrupted(error, moment):
    class Interrupt(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            if trainer.global_step == 2 and moment == "during":
                loss.register_hook(self.fail)

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2 and moment == "between":
                self.fail(None)

        def fail(self, _: Any) -> None:
            raise error("stop")

    model, callback = Classifier(make_net(), torch.optim.Adam), HesScaleCallback()
    with pytest.raises((error, SystemExit)):
        fit(model, make_batches(5), callback, Interrupt())
    assert leftovers(model) == []
    assert callback._attachment is None
    fit(model, make_batches(2), HesScaleCallback())  # and the model trains again
    assert leftovers(model) == []


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_split_parameters_are_refused(strategy):
    callback = HesScaleCallback()
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[callback])
    with pytest.raises(
        MisconfigurationException, match=f"{strategy.__name__}.*Use strategy='ddp'.*ModelParallelStrategy"
    ):
        callback.setup(trainer, Classifier(make_net()), "fit")


def test_two_callbacks_are_refused():
    with pytest.raises(MisconfigurationException, match="Found 2 HesScaleCallbacks, expected one"):
        fit(Classifier(make_net()), make_batches(1), HesScaleCallback(), HesScaleCallback(method="bl89"))


def test_an_operation_without_a_rule_stops_training_before_any_gradient():
    class Unknown(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.linalg.eigvalsh(self.net[0].weight[:6]).sum()

    model = Unknown(make_net())
    with pytest.raises(UnsupportedOperationError, match="LinalgEigh"):
        fit(model, make_batches(1), HesScaleCallback())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "method='newton', expected one of hesscale"),
        ({"every_n_steps": 0}, "every_n_steps=0, expected at least 1"),
        ({"log_every_n_steps": -1}, "log_every_n_steps=-1, expected at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HesScaleCallback(**arguments)


def test_adahesscale_without_the_callback_says_what_to_add():
    with pytest.raises(RuntimeError, match="HesScaleCallback"):
        fit(Classifier(make_net()), make_batches(1))


# -- across runs and processes


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            raise RuntimeError("crash")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves none
def test_a_run_that_crashed_and_resumed_in_the_middle_of_an_epoch_ends_as_an_uninterrupted_one(tmp_path):
    def run(*callbacks: pl.Callback, checkpoint: str | None = None) -> tuple[pl.LightningModule, ListLogger]:
        logger, model = ListLogger(), Classifier(make_net())
        callback = HesScaleCallback(every_n_steps=2, log_every_n_steps=3)
        trainer = make_trainer(callback, *callbacks, logger=logger, enable_checkpointing=checkpoint is None)
        with nullcontext() if Crash not in map(type, callbacks) else pytest.raises(RuntimeError, match="crash"):
            trainer.fit(model, ResumableLoader(make_batches(10)), ckpt_path=checkpoint)
        return model, logger

    whole, whole_log = run(ModelCheckpoint(tmp_path / "whole"))
    _, first_log = run(ModelCheckpoint(tmp_path / "crashed", filename="{step}", every_n_train_steps=4), Crash())
    resumed, second_log = run(checkpoint=str(tmp_path / "crashed" / "step=4.ckpt"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {**first_log.curvature(), **second_log.curvature()} == whole_log.curvature()
    assert list(second_log.curvature()) == [6, 8]  # the log goes on where it was, not from the resumed step on


def test_the_state_is_kept_apart_from_that_of_another_method():
    assert HesScaleCallback().state_key != HesScaleCallback(method="bl89").state_key


@pytest.mark.parametrize("methods", [("hesscale", "hesscale"), ("hesscale", "bl89")])
def test_two_callbacks_in_one_trainer_are_refused_in_plain_words(methods):
    trainer = make_trainer(*map(HesScaleCallback, methods))  # Lightning's own check is about two states of one name
    with pytest.raises(MisconfigurationException, match="Found 2 HesScaleCallbacks, expected one: each would add"):
        trainer.fit(Classifier(make_net()), make_loader(make_batches(2)))


def test_one_trainer_can_fit_twice():
    logger = ListLogger()
    trainer = make_trainer(HesScaleCallback(log_every_n_steps=2), logger=logger, max_epochs=1)
    model = Classifier(make_net())
    trainer.fit(model, make_loader(make_batches(4)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, make_loader(make_batches(4)))
    assert list(logger.curvature()) == [1, 3, 5, 7]


class Shared(Classifier):
    """Each process takes its own part of every batch; the extra layer is there for one process only, if at all."""

    def __init__(self, net: nn.Module, extra: bool) -> None:
        super().__init__(net)
        self.extra = nn.Linear(6, 6) if extra else None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = (part[self.global_rank :: self.trainer.world_size] for part in batch)
        return cross_entropy(self.net(self.extra(x) if self.extra and self.global_rank == 0 else x), y)


class Saver(Recorder):
    def __init__(self, path: Any) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(self.diagonals, self.path / f"rank_{trainer.global_rank}.pt")


def fit_two_processes(model: pl.LightningModule, path: Any, strategy: str, **options: Any) -> Any:
    trainer = make_trainer(
        HesScaleCallback(), Saver(path), strategy=strategy, devices=2, use_distributed_sampler=False, **options
    )
    trainer.fit(model, make_loader(make_batches(4)))
    return [torch.load(path / f"rank_{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_fork_find_unused_parameters_true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_have_the_diagonal_of_the_global_batch(tmp_path, strategy, accumulate):
    net = make_net()
    expected = diagonal(net, make_batches(4)[:accumulate])
    ranks = fit_two_processes(Shared(net, extra=False), tmp_path, strategy, accumulate_grad_batches=accumulate)
    for found in ranks:
        assert len(found) == 4 / accumulate
        assert_same(found[0], expected)
    for ours, theirs in zip(*ranks, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)


def test_a_parameter_that_one_process_does_not_use_has_the_same_diagonal_on_both(tmp_path):
    ranks = fit_two_processes(Shared(make_net(), extra=True), tmp_path, "ddp_fork_find_unused_parameters_true")
    assert len(ranks[0]) == len(ranks[1]) == 4
    for ours, theirs in zip(*ranks, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)
        assert all(h is not None and h.abs().sum() > 0 for h in ours)


def test_a_trainer_of_the_old_namespace_works():
    old = pytest.importorskip("pytorch_lightning")

    class Old(old.LightningModule):
        training_step, configure_optimizers = Classifier.training_step, Classifier.configure_optimizers

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.optimizer = net, AdaHesScale

    nets = make_net(), make_net()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = old.Trainer(max_epochs=1, callbacks=[HesScaleCallback()], enable_model_summary=False, **quiet)
    trainer.fit(Old(nets[0]), make_loader(make_batches(4)))
    fit(Classifier(nets[1]), make_batches(4), HesScaleCallback())
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
