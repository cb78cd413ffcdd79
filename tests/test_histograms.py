"""Histograms reach TensorBoard, Weights & Biases and MLflow: the real ones where installed, offline."""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from hesscale_lightning import AdaHesScale, HesScaleCallback, attach
from tests.lightning_models import Classifier, fit, make_batches, make_net

EDGES = np.linspace(-12, 6, 73)
STEPS = (1, 3)  # of four, logging every second


def expected() -> dict[int, list[int]]:
    """The histograms of a plain loop's diagonals, counted by numpy."""
    net = make_net()
    optimizer = AdaHesScale(net.parameters())
    counts = {}
    for step, (x, y) in enumerate(make_batches(4)):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        attach(loss)
        loss.backward()
        entries = np.concatenate([p.hess_diag.numpy().ravel() for p in net.parameters()])
        counts[step] = np.histogram(np.log10(np.abs(entries).clip(1e-12)), EDGES)[0].tolist()
        optimizer.step()
    return {step: counts[step] for step in STEPS}


def train(logger: Any) -> None:
    fit(Classifier(make_net()), make_batches(4), HesScaleCallback(histogram=True, log_every_n_steps=2), logger=logger)


def test_tensorboard_receives_the_counts(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    train(logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    found = {}
    for event in events.Histograms("curvature/histogram"):
        value = event.histogram_value
        places = np.searchsorted(EDGES[1:], np.asarray(value.bucket_limit) - 1e-9)
        found[event.step] = np.bincount(places, value.bucket, 72).tolist()
    assert found == expected()


class WithoutPackage:
    """Overrides what a logger asks its package for, before and after training; its log_metrics is not touched."""

    save_dir = name = version = None

    def __init__(self) -> None:
        self._prefix = ""
        self._wandb_init: dict[str, Any] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


class FakeRun:
    """A run of Weights & Biases, with the method that WandbLogger calls."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append(data)


class FakeWandbLogger(WithoutPackage, WandbLogger):
    experiment = FakeRun()


class FakeHistogram(SimpleNamespace):
    """wandb.Histogram, whose signature it has."""

    def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
        counts, edges = np_histogram
        super().__init__(histogram=counts, bins=edges)


def check_weights_and_biases(logged: list[dict[str, Any]]) -> None:
    records = [record for record in logged if "curvature/histogram" in record]
    assert {r["trainer/global_step"]: list(r["curvature/histogram"].histogram) for r in records} == expected()
    for record in records:
        np.testing.assert_allclose(record["curvature/histogram"].bins, EDGES, atol=1e-12)


def test_weights_and_biases_receives_a_histogram(monkeypatch):
    wandb = ModuleType("wandb")
    wandb.Histogram = FakeHistogram
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(FakeWandbLogger())
    check_weights_and_biases(FakeWandbLogger.experiment.logged)


class FakeClient:
    """An MLflow client: what MLFlowLogger calls, and log_dict with its signature."""

    def __init__(self) -> None:
        self.artifacts: dict[str, Any] = {}

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        assert run_id == "run"
        self.artifacts[artifact_file] = json.loads(json.dumps(dictionary))


class FakeMLFlowLogger(WithoutPackage, MLFlowLogger):
    experiment = FakeClient()
    run_id = "run"

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass  # it makes MLflow's own objects of them


def check_mlflow(artifacts: dict[str, Any]) -> None:
    found = {name: content for name, content in artifacts.items() if name.startswith("curvature/histogram/")}
    assert set(found) == {f"curvature/histogram/step_{step:08d}.json" for step in STEPS}
    assert {content["step"]: content["counts"] for content in found.values()} == expected()
    for content in found.values():
        np.testing.assert_allclose(content["log10_edges"], EDGES, atol=1e-12)


def test_mlflow_receives_an_artifact_for_each_step():
    train(FakeMLFlowLogger())
    check_mlflow(FakeMLFlowLogger.experiment.artifacts)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_weights_and_biases_takes_it_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    logged: list[dict[str, Any]] = []
    log = logger.experiment.log
    monkeypatch.setattr(logger.experiment, "log", lambda data, *a, **k: (logged.append(dict(data)), log(data, *a, **k)))
    train(logger)
    logger.experiment.finish()
    check_weights_and_biases(logged)
    (file,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 30  # another process writes it
    while b"curvature/histogram" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_the_real_mlflow_takes_it_in_a_local_file(tmp_path, monkeypatch):
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts"))
    train(logger)
    root = Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file://"))
    check_mlflow({str(p.relative_to(root)): json.loads(p.read_text()) for p in root.rglob("*.json")})
