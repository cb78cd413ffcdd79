"""Curvature and step statistics in Stable-Baselines3's logger: names, values, every format, and no work unasked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hesscale_lightning import AdaHesScale, StepSizeScaling
from sb3_integration import HesScaleLoggingCallback
from sb3_integration.curvature_statistics import CurvatureStatistics
from sb3_integration.loss_seam import optimizers_of
from tests.sb3.cases import named

STATISTICS = {
    "scale", "clipping", "mean_abs_update", "predicted_decrease", "curvature_mean_abs", "curvature_max_abs",
    "curvature_trace", "curvature_negative_fraction",
}  # fmt: skip


def scaled_adam(params: Any, **options: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, **options))


def logged(path: Path) -> list[dict[str, float]]:
    """The rows of a run that have curvature in them."""
    rows = [json.loads(line) for line in (path / "progress.json").read_text().splitlines()]
    found = [{key: value for key, value in row.items() if key.startswith("hesscale/")} for row in rows]
    return [row for row in found if row]


def run(name: str, path: Path, callback: Any, timesteps: int = 64, formats: Any = ("json",), **arguments: Any) -> Any:
    model = named(name).build(**arguments)
    model.set_logger(configure(str(path), list(formats)))
    return model.learn(timesteps, callback=callback, log_interval=1)


@pytest.mark.parametrize(
    ("name", "networks", "options"),
    [
        ("PPO-Box", {"actor", "critic"}, {}),
        ("PPO-Discrete-NatureCNN", {"features", "actor", "critic"}, {}),
        ("A2C-Discrete", {"actor", "critic"}, {}),
        ("DQN-Discrete", {"critic"}, {}),
        ("SAC-Box", {"actor", "critic"}, {}),
        ("TD3-Box", {"actor", "critic"}, {}),
        ("RecurrentPPO-Box", {"actor", "critic"}, {}),
        ("TRPO-Box", {"critic"}, {}),
        ("PPO-Box", {"actor", "critic"}, {"optimizer_class": scaled_adam}),
        ("SAC-Box", {"actor", "critic"}, {"optimizer_class": scaled_adam}),
    ],
)
def test_statistics_of_every_network_are_logged(
    name: str, networks: set[str], options: dict[str, Any], tmp_path: Path
) -> None:
    run(name, tmp_path, HesScaleLoggingCallback(), policy_options=options)
    rows = logged(tmp_path)
    assert len(rows) > 1
    measured = {"calibration"} if name.startswith(("PPO", "A2C", "RecurrentPPO")) and not options else set()
    for row in rows[1:]:
        names = STATISTICS | measured
        assert set(row) == {f"hesscale/{network}/{statistic}" for network in networks for statistic in names}
        for network in networks:
            value = {statistic: row[f"hesscale/{network}/{statistic}"] for statistic in STATISTICS}
            assert all(np.isfinite(list(value.values())))
            assert 0 < value["scale"] <= 1
            assert 0 < value["clipping"] <= 1 + 1e-6
            assert 0 <= value["curvature_negative_fraction"] <= 1
            assert 0 < value["curvature_mean_abs"] <= value["curvature_max_abs"]
            assert value["mean_abs_update"] > 0


class Spy(BaseCallback):
    """Notes the diagonals of the first step after each request, to compare them with what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.diagonals: list[torch.Tensor] = []

    def _on_training_start(self) -> None:
        self.fresh = True
        for optimizer in optimizers_of(self.model.policy):
            optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.fresh:
            (group,) = [group for group in optimizer.param_groups if group["network"] == "critic"]
            self.diagonals.append(torch.cat([param.hess_diag.flatten() for param in group["params"]]))
            self.fresh = False

    def _on_rollout_end(self) -> None:
        self.fresh = True

    def _on_step(self) -> bool:
        return True


def test_values_are_those_of_the_step(tmp_path: Path) -> None:
    spy = Spy()
    run("PPO-Box", tmp_path, [HesScaleLoggingCallback(), spy])
    rows = logged(tmp_path)
    assert len(rows) == 3  # of four rollouts; the first had no step before it
    for row, h in zip(rows, spy.diagonals, strict=False):
        assert row["hesscale/critic/curvature_trace"] == pytest.approx(h.sum().item(), rel=1e-5)
        assert row["hesscale/critic/curvature_max_abs"] == pytest.approx(h.abs().max().item(), rel=1e-5)
        assert row["hesscale/critic/curvature_mean_abs"] == pytest.approx(h.abs().mean().item(), rel=1e-5)
        assert row["hesscale/critic/curvature_negative_fraction"] == pytest.approx((h < 0).float().mean().item())


def test_every_format_of_the_logger_receives_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("PPO-Box", tmp_path, HesScaleLoggingCallback(), formats=("csv", "stdout", "tensorboard"))
    with open(tmp_path / "progress.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert {key for key in last if key.startswith("hesscale/")} == {
        f"hesscale/{network}/{statistic}"
        for network in ("actor", "critic")
        for statistic in STATISTICS | {"calibration"}
    }
    printed = capsys.readouterr().out
    assert "hesscale/" in printed
    assert "curvature_mean_abs" in printed
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = events.Scalars("hesscale/critic/curvature_trace")
    assert values[-1].value == pytest.approx(float(last["hesscale/critic/curvature_trace"]), rel=1e-4)


def test_names_are_not_cut_together_on_the_screen(tmp_path: Path) -> None:
    """The table on stdout cuts long names, and raises if two become the same."""
    run("PPO-Discrete-NatureCNN", tmp_path, HesScaleLoggingCallback(), timesteps=48, formats=("stdout",))


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_it_runs_beside_a_progress_bar(tmp_path: Path) -> None:
    model = named("PPO-Box").build()
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(64, callback=HesScaleLoggingCallback(), log_interval=1, progress_bar=True)
    assert logged(tmp_path)


def test_every_nth_rollout_is_looked_at(tmp_path: Path) -> None:
    run("PPO-Box", tmp_path, HesScaleLoggingCallback(every_n_rollouts=3), timesteps=16 * 7)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert ["hesscale/critic/scale" in row for row in rows] == [False, False, False, True, False, False, True]


def test_the_run_is_the_same_with_and_without_it(tmp_path: Path) -> None:
    for name in ("PPO-Box", "SAC-Box"):
        with_it = run(name, tmp_path, HesScaleLoggingCallback()).policy.state_dict()
        without = run(name, tmp_path, None).policy.state_dict()
        assert all(torch.equal(value, without[key]) for key, value in with_it.items())


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    looks: list[None] = []
    describe = "sb3_integration.curvature_statistics._describe"
    monkeypatch.setattr(describe, lambda group: looks.append(None) or {"curvature_trace": torch.zeros(())})
    monkeypatch.setattr(AdaHesScale, "stats", property(lambda self: looks.append(None) or {}))
    return looks


def test_nothing_is_computed_when_nobody_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looks = count_looks(monkeypatch)
    run("PPO-Box", tmp_path, None)
    assert not looks
    run("PPO-Box", tmp_path, HesScaleLoggingCallback(), timesteps=48)
    # Of twelve steps the first after each of three rollouts; then the optimizer's own statistics as often.
    assert len(looks) == 3 * 2 + 3


def test_a_request_is_answered_once_by_each_optimizer() -> None:
    model = named("SAC-Box").build()
    statistics = CurvatureStatistics()
    for param in model.policy.parameters():
        param.hess_diag = torch.ones_like(param)
    statistics.take(model.actor.optimizer)
    assert statistics.of(model.actor.optimizer) == [{}]
    statistics.request()
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        statistics.take(optimizer)
        first = statistics.of(optimizer)
        assert first[0]["curvature_max_abs"] == 1
        statistics.take(optimizer)
        assert statistics.of(optimizer) is first


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        ("MlpPolicy", {}, TypeError, "needs a policy of sb3_integration, got ActorCriticPolicy.*HesScaleActorCritic"),
        (None, {"optimizer_class": torch.optim.Adam}, ValueError, "nothing to log: Adam uses no curvature"),
    ],
)
def test_use_without_curvature_is_refused(
    policy: str | None, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = named("PPO-Box").build(policy, policy_options=options)
    with pytest.raises(error, match=message):
        model.learn(16, callback=HesScaleLoggingCallback())


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_rollouts must be at least 1, got 0"):
        HesScaleLoggingCallback(every_n_rollouts=0)
