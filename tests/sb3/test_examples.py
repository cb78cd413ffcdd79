"""The examples of reinforcement learning run, resume, and report what their results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import yaml
from stable_baselines3 import PPO

import sb3_integration
from sb3_integration.loss_seam import optimizers_of

pytest.importorskip("mujoco")

FOLDER = Path(__file__).parents[2] / "examples" / "reinforcement_learning"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reinforcement_learning_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(FOLDER))  # the report imports the study, as a script beside it does
train = load("train")
study = importlib.import_module("study")
report = importlib.import_module("study_report")
sys.path.remove(str(FOLDER))


def test_the_script_trains_both_policies_and_draws_their_curves(tmp_path: Path) -> None:
    code = train.main(train.Arguments(steps=600, environments=2, evaluation_episodes=2, output=tmp_path))
    assert code == 0
    assert (tmp_path / "PPO_CartPole-v1.png").stat().st_size > 10_000
    folder = tmp_path / "PPO_CartPole-v1"
    assert isinstance(PPO.load(folder / "adahesscale" / "model").policy, sb3_integration.HesScaleActorCriticPolicy)
    assert (folder / "stable-baselines3" / "model.zip").exists()


def test_the_script_fails_where_the_return_is_too_low(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train.Arguments(
        steps=64, environments=2, evaluation_episodes=2, plain=False, required_return=501.0, output=tmp_path
    )
    assert train.main(arguments) == 1
    assert "below 501" in capsys.readouterr().err


SHORT = study.Run("A2C", "CartPole-v1", "nats", 1.0, 0, 80)


def run_study(folder: Path, monkeypatch: pytest.MonkeyPatch, seeds: int = 1) -> dict[Any, Any]:
    """The robustness stage, cut down to two short runs, in this process."""
    monkeypatch.setattr(study, "ROBUSTNESS", {"CartPole-v1": 80})
    monkeypatch.setattr(study, "FACTORS", ())
    monkeypatch.setattr(study, "ALGORITHMS", {"A2C": study.A2C})
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    arguments = ["study.py", "--stage=robustness", f"--results={folder}", "--workers=1", f"--seeds={seeds}"]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    return study.finished(folder / "robustness.jsonl")


def test_a_stopped_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_study(tmp_path, monkeypatch)
    assert [(run.method, run.seed) for run in first] == [("nats", 200), ("rmsprop", 200)]
    file = tmp_path / "robustness.jsonl"
    line = file.read_text()
    file.write_text(line + '{"run": {"algorithm": "A2C", "cut o')  # as a kill leaves it
    both = run_study(tmp_path, monkeypatch, seeds=2)
    assert len(both) == 4
    assert {run: both[run] for run in first} == first
    assert file.read_text().startswith(line)


def invented(score: Any, seeds: int = 3) -> dict[Any, Any]:
    """Results with a flat curve for every run of the main stage."""
    found = {}
    for run in study.planned("main"):
        if run.seed < study.SEEDS[0] + seeds:
            found[run] = {"curve": [None] + [float(score(run))] * (study.BINS - 1), "seconds": 1.0, "failure": None}
    return found


def value(run: Any) -> float:
    by_method = {"untrained": 0.0, "nats": 120.0, "adam 3e-4": 50.0, "adam 1e-3": 100.0}
    return by_method.get(run.method, 20.0) + (run.seed - study.SEEDS[0] if run.method == "nats" else 0)


def test_the_report_says_what_the_results_say() -> None:
    text = report.tables(invented(value))
    assert "**PPO**, 5 tasks, 3 of 10 seeds, 150,000 steps (**preliminary**" in text
    assert "| **radius in nats (default)** | 1.21 [" in text
    assert "| adam, tuned per task | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 0 of 15 |" in text
    assert "| adam 3e-4 | 0.50 [0.50, 0.50] |" in text
    assert "| Hopper-v5 | 0 | 121 | " in text
    assert "| **100** |" in text


def test_few_seeds_have_no_interval_and_methods_are_compared_on_the_same_ones() -> None:
    found = invented(value, seeds=2)
    late = next(run for run in found if run.method == "adam 3e-3" and run.seed == study.SEEDS[1])
    del found[late]
    text = report.tables(found)
    assert f"**{late.algorithm}**, 5 tasks, 1 of 10 seeds" in text
    assert "| adam 3e-4 | 0.50 | 0.50 | 1.00 | 0 of 5 |" in text


def test_probabilities_and_means_are_their_definitions() -> None:
    ours, theirs = (
        {"a": np.array([1.0, 3.0]), "b": np.array([5.0, 5.0])},
        {"a": np.array([2.0, 2.0]), "b": np.array([5.0])},
    )
    assert report.improvement(ours, theirs) == pytest.approx((0.5 + 0.5) / 2)
    assert report.interquartile_mean({"a": np.arange(4.0), "b": np.array([100.0, 2.0, 1.0, -50.0])}) == 1.5
    low, high = report.interval(report.interquartile_mean, ours)
    assert 1 < low < high <= 5
    assert report.filled([None, 1.0, None, 3.0]) == [1.0, 1.0, 1.0, 3.0]


def test_collapses_are_counted() -> None:
    found = invented(value)
    run = next(run for run in found if run.method == "nats" and run.algorithm == "PPO")
    found[run] = {**found[run], "curve": [100.0] * 15 + [10.0] * 5}
    assert report.Study(found, "PPO").collapses("nats") == 1
    assert report.Study(found, "A2C").collapses("nats") == 0


def test_robustness_is_judged_by_the_worst_factor() -> None:
    found = {}
    for run in study.planned("robustness"):
        returns = 100.0 if run.method == "nats" else 100.0 / run.factor
        sign = -1.0 if run.environment != "CartPole-v1" else 1.0
        found[run] = {"curve": [returns if sign > 0 else -1e4 / returns] * study.BINS, "seconds": 1.0, "failure": None}
    text = "\n".join(report.robustness(found))
    assert "**radius in nats (default)** stays within 10 % of its best on 6 of 6" in text
    assert "rmsprop stays within 10 % of its best on 0 of 3" in text


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    report.draw(invented(value), tmp_path)
    assert (tmp_path / report.CURVES).stat().st_size > 10_000
    assert (tmp_path / report.PROFILES).stat().st_size > 10_000


def test_a_run_that_breaks_down_keeps_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Any, steps: int, callback: Any) -> None:
        callback.callbacks[0].episodes += [(10, 30.0), (70, 9.0)]
        self.policy.value_net.bias.data.fill_(float("nan"))
        raise ValueError("Expected parameter logits to be finite\nmore")

    monkeypatch.setattr(study.A2C, "learn", learn)
    found = study.train(SHORT)
    assert report.filled(found["curve"])[-1] == 9.0
    assert found["failure"] == "Expected parameter logits to be finite"


def test_another_error_is_not_taken_for_a_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Any, steps: int, callback: Any) -> None:
        raise ValueError("not about parameters")

    monkeypatch.setattr(study.A2C, "learn", learn)
    with pytest.raises(ValueError, match="not about parameters"):
        study.train(SHORT)


@pytest.mark.parametrize("name", [*study.methods("PPO"), *study.variants("PPO")])
def test_every_method_trains(name: str) -> None:
    found = study.train(study.Run("PPO", "CartPole-v1", name, 1.0, 0, 4096))
    assert found["failure"] is None
    assert any(found["curve"])


def test_an_adaptive_rate_seeks_its_target() -> None:
    """From a rate that is far too small: doubled until an update moves the policy by about the target."""
    model = PPO("MlpPolicy", "CartPole-v1", learning_rate=1e-6, n_steps=64, n_epochs=2, device="cpu", seed=0)
    model.learn(64 * 16, callback=study.AdaptiveRate(0.01))
    assert 3e-5 < model.lr_schedule(1.0) <= 1e-6 * 2**15


def test_the_page_quotes_the_stored_results() -> None:
    results = FOLDER / "results"
    found = {**study.finished(results / "main.jsonl"), **study.finished(results / "robustness.jsonl")}
    assert report.tables(found) in (FOLDER.parents[1] / report.PAGE).read_text()


class _Loader(yaml.SafeLoader):
    """Reads the Zoo's ``!!float 5e4``."""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("rl_zoo_*.yml")), ids=lambda path: path.stem)
def test_the_configurations_for_rl_zoo_build_their_policies(path: Path) -> None:
    algorithm = getattr(stable_baselines3, path.stem.removeprefix("rl_zoo_").upper())
    of_the_zoo = {"n_envs", "n_timesteps", "normalize", "policy", "policy_kwargs"}
    for environment, settings in yaml.load(path.read_text(), _Loader).items():
        module, name = settings["policy"].rsplit(".", 1)
        assert module == "sb3_integration"
        kwargs = {key: value for key, value in settings.items() if key not in of_the_zoo}
        policy_kwargs = eval(settings.get("policy_kwargs", "{}"), {"__builtins__": {"dict": dict}})
        model = algorithm(
            getattr(sb3_integration, name), environment, policy_kwargs=policy_kwargs, device="cpu", **kwargs
        )
        assert {type(o).__name__ for o in optimizers_of(model.policy)} == {"AdaHesScale"}
        assert json.dumps(settings)  # plain data: the Zoo copies it to disk
