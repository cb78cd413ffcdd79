"""What HesScaleCallback does beyond the diagonal: trust region, audit, more to log, skipped parameters."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from hesscale_lightning import AdaHesScale, HesScaleCallback, StepSizeScaling, attach, exact_hess_diag
from hesscale_lightning import metrics as m
from hesscale_lightning.trainer.audit import Audit
from tests.lightning_models import Classifier, ListLogger, fit, make_batches, make_loader, make_net, make_trainer


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# -- delta


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_delta_scales_the_modules_optimizer_as_a_plain_loop_does_also_with_a_schedule():
    net, batches, logger = make_net(), make_batches(6), ListLogger()
    callback = HesScaleCallback(delta=1e-3, log_every_n_steps=1)
    _, trainer = fit(Scheduled(net), batches, callback, logger=logger)

    plain = make_net()
    inner = torch.optim.SGD(plain.parameters(), lr=1.0)
    optimizer = StepSizeScaling(inner, 1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(inner, gamma=0.5)
    scales = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(plain(x), y)
        attach(loss)
        loss.backward()
        optimizer.step()
        scales.append(optimizer.stats["scale"].item())
        schedule.step()
    assert same_weights(net, plain)
    assert [record["curvature/scale"] for record in logger.curvature().values()] == pytest.approx(scales)
    assert min(scales) < 0.5
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1 / 64)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves none
def test_the_trust_region_survives_a_checkpoint(tmp_path):
    def run(steps: int, *callbacks: Any, checkpoint: Any = None) -> Classifier:
        model = Classifier(make_net(), adam)
        curvature = HesScaleCallback(delta=1e-5, every_n_steps=3)
        trainer = make_trainer(curvature, *callbacks, max_epochs=steps, enable_checkpointing=bool(callbacks))
        trainer.fit(model, make_loader(make_batches(4)), ckpt_path=checkpoint)
        return model

    run(1, ModelCheckpoint(tmp_path, filename="one"))
    assert "step_size_scaling" in torch.load(tmp_path / "one.ckpt", weights_only=True)["optimizer_states"][0]
    assert same_weights(run(2, checkpoint=tmp_path / "one.ckpt"), run(2))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_without_a_trust_region_can_be_continued_with_one(tmp_path):
    batches = make_batches(4)
    keep = ModelCheckpoint(tmp_path, filename="one")
    make_trainer(keep, enable_checkpointing=True).fit(Classifier(make_net(), adam), make_loader(batches))
    trainer = make_trainer(HesScaleCallback(delta=1e-4, every_n_steps=3), max_epochs=2)
    trainer.fit(Classifier(make_net(), adam), make_loader(batches), ckpt_path=tmp_path / "one.ckpt")
    assert trainer.global_step == 8


def test_the_learning_rate_monitor_reads_the_scaled_optimizer():
    logger = ListLogger()
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    model = Classifier(make_net(), adam)
    fit(model, make_batches(2), HesScaleCallback(delta=1e-4), monitor, logger=logger, log_every_n_steps=1)
    assert {"lr-Adam": 0.05, "lr-Adam-momentum": 0.9, "lr-Adam-weight_decay": 0} in [r for _, r in logger.records]


@pytest.mark.parametrize(
    ("optimizer", "message"), [(AdaHesScale, "pass delta to it"), (torch.optim.LBFGS, "several times in one step")]
)
def test_what_cannot_be_scaled_is_refused(optimizer, message):
    with pytest.raises(TypeError, match=message):
        fit(Classifier(make_net(), optimizer), make_batches(1), HesScaleCallback(delta=1e-4))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_the_trust_region_binds_in_every_precision(precision):
    logger = ListLogger()
    double = torch.float64 if precision == "64-true" else torch.float32
    model = Classifier(make_net(dtype=double), lambda params: torch.optim.SGD(params, lr=10.0))
    callback = HesScaleCallback(delta=1e-4, log_every_n_steps=1)
    options: dict[str, Any] = {"precision": precision, "logger": logger, "gradient_clip_val": 1e3}
    if precision == "16-mixed":
        import lightning.pytorch as pl

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {**options, "plugins": [pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}
        del options["precision"]
    fit(model, make_batches(3, dtype=double), callback, **options)
    scales = [record["curvature/scale"] for record in logger.curvature().values()]
    assert len(scales) == 3
    assert all(0 < scale < 0.1 for scale in scales)


# -- audit


class Normalized(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.mark.parametrize("reference", ["exact", "hutchinson"])
@pytest.mark.parametrize("optimizer", [AdaHesScale, adam])
def test_an_audit_does_not_disturb_training(optimizer, reference):
    nets, states = [], []
    for audit in (None, reference):
        net = Normalized()
        torch.manual_seed(5)
        callback = HesScaleCallback(audit=audit, audit_every_n_steps=2, audit_probes=3)
        fit(Classifier(net, optimizer), make_batches(6), callback)
        nets.append(net.state_dict())
        states.append(torch.get_rng_state())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert torch.equal(*states)


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_exact_audit_is_the_distance_to_the_exact_diagonal(method, accumulate):
    batches, logger, net = make_batches(2), ListLogger(), make_net()
    found, exact = [], []
    for x, y in batches[:accumulate]:
        copy = make_net()
        loss = cross_entropy(copy(x), y) / accumulate
        exact += exact_hess_diag(loss, list(copy.parameters()))
        attach(loss, method=method)
        loss.backward()
        found += [p.hess_diag for p in copy.parameters()]
    callback = HesScaleCallback(method, audit="exact", audit_every_n_steps=1, log_every_n_steps=1)
    fit(Classifier(net, adam), batches, callback, logger=logger, accumulate_grad_batches=accumulate)
    record = logger.curvature()[0]
    assert record["curvature/audit/relative_l1"] == pytest.approx(m.relative_l1_error(found, exact).item(), rel=1e-4)
    assert record["curvature/audit/cosine"] == pytest.approx(m.cosine_similarity(found, exact).item(), rel=1e-4)
    assert record["curvature/audit/overhead"] > 0


def test_the_overhead_is_the_time_with_curvature_over_the_time_without(monkeypatch):
    # Forward takes 1, the backward pass without curvature 2, attaching and the backward pass with it 4.
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("hesscale_lightning.trainer.audit._now", lambda device: next(clock))
    net, (x, y) = make_net(), make_batches(1)[0]
    audit = Audit("exact", 10, 1)
    audit.before_forward(torch.device("cpu"))
    loss = cross_entropy(net(x), y)
    audit.before_backward(loss, net.parameters(), net, seed=0)
    attach(loss)
    loss.backward()
    audit.after_backward()
    assert audit.take(lambda x: x)["overhead"].item() == pytest.approx((1 + 4) / (1 + 2))


def test_an_audit_of_the_last_layer_alone_finds_no_error():
    logger, net = ListLogger(), make_net()
    net[0].requires_grad_(False)
    model = Classifier(net, lambda params: adam(p for p in params if p.requires_grad))
    fit(model, make_batches(2), HesScaleCallback(audit="exact", audit_every_n_steps=1), logger=logger)
    for record in logger.curvature().values():
        assert record["curvature/audit/relative_l1"] < 1e-5
        assert record["curvature/audit/cosine"] == pytest.approx(1)


def test_a_subsample_is_drawn_over_all_parameters_and_hutchinson_comes_close_to_the_exact_diagonal():
    def reference(kind: Any, entries: int, probes: int = 1) -> tuple[Tensor, list[int]]:
        net, (x, y) = make_net(dtype=torch.float64), make_batches(1, 16, torch.float64)[0]
        loss = cross_entropy(net(x), y)
        audit = Audit(kind, entries, probes)
        audit.before_backward(loss, net.parameters(), net, seed=3)
        _, index, values, _ = audit._pending
        attach(loss)
        loss.backward()
        audit.after_backward()
        assert set(audit.take(lambda x: x)) == {"relative_l1", "cosine", "overhead"}
        return torch.cat(values), [len(where) for where in index]

    net = make_net(dtype=torch.float64)
    x, y = make_batches(1, 16, torch.float64)[0]
    whole = torch.cat([h.flatten() for h in exact_hess_diag(cross_entropy(net(x), y), list(net.parameters()))])
    assert torch.allclose(reference("exact", 1000)[0], whole)
    exact, sizes = reference("exact", 40)
    assert len(sizes) == 4
    assert 20 < sum(sizes) <= 40
    estimate, same_sizes = reference("hutchinson", 40, probes=600)
    assert same_sizes == sizes
    assert m.relative_l1_error([estimate], [exact]).item() < 0.2


def test_a_loss_that_cannot_be_differentiated_twice_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("the derivative for 'once' is not implemented.")

    class Model(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return Once.apply(super().training_step(batch, batch_idx))

    with pytest.raises(MisconfigurationException, match=r"needs the second derivatives.*'once'.*audit to null"):
        fit(Model(make_net(), adam), make_batches(1), HesScaleCallback(audit="exact", audit_every_n_steps=1))


def test_audits_come_every_n_steps_and_do_not_add_to_the_rest_of_the_log():
    logger = ListLogger()
    callback = HesScaleCallback(audit="exact", audit_every_n_steps=3, log_every_n_steps=4)
    fit(Classifier(make_net(), adam), make_batches(9), callback, logger=logger)
    audited = [step for step, record in logger.curvature().items() if "curvature/audit/cosine" in record]
    logged = [step for step, record in logger.curvature().items() if "curvature/trace" in record]
    assert audited == [2, 5, 8]
    assert logged == [3, 7]


# -- what else is logged


def test_layers_are_logged_by_the_name_of_their_module():
    logger = ListLogger()
    recorder, _ = fit(
        Classifier(make_net()), make_batches(1), HesScaleCallback(log_every_n_steps=1, per_layer=True), logger=logger
    )
    record, diagonals = logger.curvature()[0], recorder.diagonals[0]
    layers = {"net.0": diagonals[:2], "net.3": diagonals[2:]}
    for name, share in m.layer_shares(layers).items():
        assert record[f"curvature/share/{name}"] == pytest.approx(share.item(), rel=1e-5)
        assert record[f"curvature/mean_abs/{name}"] == pytest.approx(m.mean_abs(layers[name]).item(), rel=1e-5)


def test_the_effective_learning_rate_of_sgd_is_its_learning_rate_and_its_decrease_is_predicted():
    logger = ListLogger()
    model = Classifier(make_net(), lambda params: torch.optim.SGD(params, lr=0.25))
    fit(model, make_batches(2), HesScaleCallback(log_every_n_steps=1), logger=logger)
    for record in logger.curvature().values():
        assert record["curvature/effective_lr"] == pytest.approx(0.25, rel=1e-4)
        assert record["curvature/predicted_decrease"] > 0
        assert "curvature/scale" not in record


def test_clipping_shows_in_the_effective_learning_rate():
    logger = ListLogger()
    model = Classifier(make_net(), lambda params: torch.optim.SGD(params, lr=0.25))
    fit(model, make_batches(1), HesScaleCallback(log_every_n_steps=1), logger=logger, gradient_clip_val=1e-3)
    assert logger.curvature()[0]["curvature/effective_lr"] < 0.025


def test_a_histogram_reaches_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Classifier(make_net()), make_batches(4), HesScaleCallback(histogram=True, log_every_n_steps=2), logger=logger)
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    written = events.Histograms("curvature/histogram")
    assert [event.step for event in written] == [1, 3]
    assert all(event.histogram_value.num == sum(p.numel() for p in make_net().parameters()) for event in written)
    assert [event.step for event in events.Scalars("curvature/trace")] == [1, 3]


def test_a_histogram_without_a_logger_that_takes_it_is_warned_about():
    with pytest.warns(UserWarning, match=r"histogram=True and no logger that has histograms"):
        fit(Classifier(make_net()), make_batches(1), HesScaleCallback(histogram=True), logger=ListLogger())


class Noisy(Classifier):
    """Everything that a second evaluation could disturb: dropout, batch norm, a metric, and the log."""

    def __init__(self) -> None:
        super().__init__(Normalized(), lambda params: torch.optim.SGD(params, lr=0.01))
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.accuracy.update(logits, y)
        loss = cross_entropy(logits, y)
        self.log("train/loss", loss, on_step=True)
        return loss


def test_the_actual_decrease_is_measured_without_disturbing_anything():
    results = []
    for measure in (False, True):
        model, logger = Noisy(), ListLogger()
        torch.manual_seed(5)
        callback = HesScaleCallback(measure_decrease=measure, log_every_n_steps=2)
        fit(model, make_batches(8, 16), callback, logger=logger, log_every_n_steps=1)
        losses = [record["train/loss"] for _, record in logger.records if "train/loss" in record]
        results.append((model.state_dict(), model.accuracy.compute(), losses, torch.get_rng_state()))
    assert all(torch.equal(results[0][0][key], results[1][0][key]) for key in results[0][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert torch.equal(results[0][3], results[1][3])
    assert len(logger.curvature()) == 4
    for record in logger.curvature().values():
        # A small step, and the same dropout before and after it: the model is right.
        assert record["curvature/gain_ratio"] == pytest.approx(1, abs=0.1)
        assert record["curvature/actual_decrease"] > 0


def test_a_decrease_that_no_batch_has_is_refused():
    callback = HesScaleCallback(measure_decrease=True)
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches above 1"):
        fit(Classifier(make_net()), make_batches(2), callback, accumulate_grad_batches=2)


# -- on_unsupported


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Behind(Classifier):
    """The first layer is behind an operation without a rule."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net[3](Opaque.apply(self.net[1](self.net[0](x)))), y)


@pytest.mark.parametrize("audit", [None, "exact"])
def test_skip_leaves_out_the_parameters_behind_an_unsupported_operation_and_names_them_once(audit):
    callback = HesScaleCallback(on_unsupported="skip", audit=audit, audit_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"no diagonal for 2 parameters, net.0.weight, net.0.bias:") as warned:
        recorder, _ = fit(Behind(make_net(), adam), make_batches(3), callback)
    assert len([w for w in warned if "computes no diagonal" in str(w.message)]) == 1
    for row in recorder.diagonals:
        assert [h is None for h in row] == [True, True, False, False]


@pytest.mark.parametrize(("optimizer", "refused"), [(AdaHesScale, True), (adam, False)])
def test_adahesscale_still_refuses_parameters_without_a_diagonal(optimizer, refused):
    expectation = pytest.raises(RuntimeError, match="no Hessian diagonal") if refused else nullcontext()
    with pytest.warns(UserWarning, match="computes no diagonal"), expectation:
        fit(Behind(make_net(), optimizer), make_batches(1), HesScaleCallback(on_unsupported="skip"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0.0}, "delta=0.0, expected more than 0"),
        ({"on_unsupported": "ignore"}, "on_unsupported='ignore', expected 'error' or 'skip'"),
        ({"audit": "often"}, "audit='often', expected 'exact', 'hutchinson' or None"),
        ({"audit_every_n_steps": 0}, "audit_every_n_steps=0, expected at least 1"),
        ({"audit_entries": 0}, "audit_entries=0, expected at least 1"),
        ({"audit_probes": 0}, "audit_probes=0, expected at least 1"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HesScaleCallback(**arguments)
