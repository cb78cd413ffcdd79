"""A LightningModule with a compiled training step trains and logs as without."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from hesscale_lightning import AdaHesScale, CompiledStepMixin, HesScaleCallback, HesScaleModule
from tests.lightning_models import CLASSES, make_batches, make_loader, make_net

CAPTURED = {"backend": "eager", "on_failure": "raise", "silent": True}


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    callbacks = options.pop("callbacks", None)
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False}
    return pl.Trainer(**{**defaults, **options}, callbacks=[HesScaleCallback()] if callbacks is None else callbacks)


def module(compiled: bool, dtype: torch.dtype = torch.float64, **options: Any) -> HesScaleModule:
    made = HesScaleModule(make_net(dtype=dtype), compile_step=compiled, **options)
    made.compile_step_options = CAPTURED
    return made


def loader_of_dicts(count: int) -> DataLoader[Any]:
    return DataLoader([{"x": x, "y": y} for x, y in make_batches(count)], batch_size=None)  # type: ignore[arg-type]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.05},
    "every third step": {"callbacks": lambda: [HesScaleCallback(every_n_steps=3, log_every_n_steps=1)]},
    "gauss-newton, per layer": {"callbacks": lambda: [HesScaleCallback("hesscale_gn", per_layer=True)]},
    "trust region around Adam": {"callbacks": lambda: [HesScaleCallback(delta=1e-4)], "optimizer": torch.optim.Adam},
    "decrease measured": {"callbacks": lambda: [HesScaleCallback(measure_decrease=True, log_every_n_steps=1)]},
    "audited": {"callbacks": lambda: [HesScaleCallback(audit="exact", audit_every_n_steps=2, log_every_n_steps=1)]},
    "Adam alone": {"callbacks": lambda: [], "optimizer": torch.optim.Adam},
    "a schedule": {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_logged_values_are_those_of_the_eager_module(name, tmp_path):
    results = []
    for compiled in (False, True):
        options = dict(SETTINGS[name])
        make = {k: options.pop(k) for k in ("optimizer", "lr_scheduler") if k in options}
        callbacks = options.pop("callbacks", lambda: [HesScaleCallback(log_every_n_steps=1)])()
        model = module(compiled, torch.float32 if "precision" in options else torch.float64, **make)
        fit = trainer(tmp_path, callbacks=callbacks, **{"precision": "64-true", **options})
        loader = make_loader(make_batches(5, dtype=torch.float32 if "precision" in options else torch.float64))
        fit.fit(model, loader)
        metrics = {k: v for k, v in fit.callback_metrics.items() if "overhead" not in k}
        results.append((model, metrics))
    (eager, expected), (compiled_model, metrics) = results
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if "precision" in SETTINGS[name] else {"rtol": 1e-9, "atol": 1e-12}
    for p, q in zip(compiled_model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key].double(), value.double(), rtol=1e-4, atol=1e-6, msg=key)
    assert eager._compiled is None
    assert compiled_model._compiled.programs == (2 if name == "every third step" else 1)


class OwnModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch["x"])
        loss = nn.functional.cross_entropy(output, batch["y"])
        self.log("loss", loss, on_epoch=True)
        self.log_dict({"largest": output.max(), "one": 1.0}, prog_bar=True)
        return {"loss": loss, "output": output.detach()}

    def configure_optimizers(self) -> Any:
        return AdaHesScale(self.parameters())


class Fast(CompiledStepMixin, OwnModule):
    compile_step_options = CAPTURED


class Collector(pl.Callback):
    def __init__(self) -> None:
        self.values: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        kept = {k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("curvature")}
        self.values.append((kept, outputs["loss"].clone(), outputs["output"].clone()))


def test_a_module_of_ones_own_with_the_mixin_before_it(tmp_path):
    collectors = []
    for cls in (OwnModule, Fast):
        collector = Collector()
        batches = loader_of_dicts(4)
        torch.manual_seed(0)
        trainer(tmp_path, callbacks=[HesScaleCallback(), collector]).fit(cls(), batches)
        collectors.append(collector.values)
    assert len(collectors[1]) == 8
    for (metrics, loss, output), (expected, *others) in zip(*collectors, strict=True):
        assert set(metrics) == set(expected)
        torch.testing.assert_close([metrics[k] for k in expected], list(expected.values()))
        torch.testing.assert_close([loss, output], others)


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    def fit(epochs: int, path: Any = None) -> tuple[HesScaleModule, pl.Trainer]:
        model, run = module(True), trainer(tmp_path, max_epochs=epochs, precision="64-true")
        run.fit(model, make_loader(make_batches(5, dtype=torch.float64)), ckpt_path=path)
        return model, run

    whole, _ = fit(4)
    _, first = fit(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, tmp_path / "half.ckpt")
    for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert copy.deepcopy(whole)._compiled.programs == 0


class UsesIndex(Fast):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"] * (1 if batch_idx > 0 else 2)


class UpdatesMetric(Fast):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.accuracy(self.net(batch["x"]), batch["y"])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("cls", "reason"), [(UsesIndex, "uses batch_idx"), (UpdatesMetric, "")])
def test_what_cannot_be_captured_trains_eagerly_and_says_why(cls, reason, tmp_path):
    model = cls()
    model.compile_step_options = {"backend": "eager", "silent": True}
    batches = loader_of_dicts(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path).fit(model, batches)
    told = [str(w.message) for w in caught if "runs eagerly" in str(w.message)]
    assert len(told) == 1
    assert f"{cls.__name__}.training_step" in told[0]
    assert reason in told[0]
    assert all(state["hess_step"] == 6 for state in model.optimizers().optimizer.state.values())


def test_manual_optimization_is_refused_with_advice(tmp_path):
    class Manual(Fast):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    batches = loader_of_dicts(1)
    with pytest.raises(MisconfigurationException, match="Set compile_step to False"):
        trainer(tmp_path).fit(Manual(), batches)


def test_several_processes_are_refused_with_advice(monkeypatch, tmp_path):
    run = trainer(tmp_path)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    model = module(True)
    model._trainer = run
    x, y = make_batches(1, dtype=torch.float64)[0]
    with pytest.raises(MisconfigurationException, match="2 processes"):
        model.training_step((x, y), 0)


def test_validation_and_a_module_without_a_trainer_run_as_they_are():
    model = module(True)
    x, y = make_batches(1, dtype=torch.float64)[0]
    model.log = lambda *_, **__: None
    with torch.no_grad():
        loss: Tensor = model.training_step((x, y), 0)
    assert model._compiled is None
    assert not loss.requires_grad
