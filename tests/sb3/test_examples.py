"""The examples of reinforcement learning run, resume, and report what their results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from stable_baselines3 import PPO

import sb3_integration

pytest.importorskip("mujoco")
pytest.importorskip("seaborn")

FOLDER = Path(__file__).parents[2] / "examples" / "reinforcement_learning"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reinforcement_learning_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


compare, train = load("compare"), load("train")
PAIR = ("PPO", "CartPole-v1")


def study(folder: Path, seeds: int = 2) -> Any:
    return compare.Study([PAIR], seeds, 80, folder / "results.jsonl", folder)


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


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    small = study(tmp_path, seeds=1)
    first, second, *_ = small.first_stage()
    done = compare.complete(small, [first], workers=1)
    line = small.results.read_text()
    small.results.write_text(line + '{"algorithm": "PPO", "cut o')  # as a kill leaves it
    both = compare.complete(small, [first, second], workers=1)
    assert set(both) == {first, second}
    assert both[first] == done[first]
    assert small.results.read_text().startswith(line)


def results_of(small: Any, score: Any) -> dict[Any, dict[str, Any]]:
    def row(run: Any) -> dict[str, Any]:
        return {"score": score(run), "curve": [score(run)] * compare.BINS, "seconds": 3600.0, "broken": ""}

    results = {run: row(run) for run in small.first_stage()}
    return results | {run: row(run) for run in small.second_stage(results)}


def test_the_best_rate_is_adams_and_the_second_stage_starts_from_it(tmp_path: Path) -> None:
    small = study(tmp_path)
    results = results_of(small, lambda run: 400.0 if run.lr == 3e-3 else 10.0)
    assert small.best_rate(PAIR, results) == 3e-3
    rates = {run.lr for run in small.second_stage(results) if run.optimizer == "adam"}
    assert rates == {3e-2, 3e-1}


def test_the_report_says_what_the_results_say(tmp_path: Path) -> None:
    small = study(tmp_path)
    scores = {"adam": 100.0, "adam + scaling": 200.0, "adahesscale": 300.0, "adahesscale without scaling": 50.0}
    text = compare.tables(small, results_of(small, lambda run: scores[run.optimizer] + run.seed))
    assert "| PPO | CartPole-v1 | 250 | 100 (100 to 101) at 0.0003 | 300 (300 to 301) |" in text
    assert "| 100 | 100 (100 to 101) | 200 (200 to 201) | 50 (50 to 51) | 300 (300 to 301) |" in text
    assert "AdaHesScale at its default has the higher mean on 1 (PPO CartPole-v1) of 1." in text
    assert "At 100 times the rate the highest mean is that of adahesscale on 1 (PPO CartPole-v1)." in text
    assert "26 runs, of which 0 broke down" in text


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    small = study(tmp_path)
    results = results_of(small, lambda run: float(run.seed))
    compare.draw_curves(small, results, tmp_path / "curves.png")
    compare.draw_robustness(small, results, tmp_path / "robustness.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "robustness"))


def test_a_run_that_breaks_down_counts_as_its_worst_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Any, steps: int, callback: Any) -> None:
        callback.episodes += [(10, 30.0), (20, 9.0), (30, 12.0)]
        self.policy.value_net.bias.data.fill_(float("nan"))
        raise ValueError("Expected parameter logits to be finite\nmore")

    monkeypatch.setattr(PPO, "learn", learn)
    row = compare.train(compare.Run(*PAIR, "adam", 1.0, 0, 32))
    assert row["score"] == 9.0
    assert row["broken"] == "Expected parameter logits to be finite"


def test_another_error_is_not_taken_for_a_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(self: Any, steps: int, callback: Any) -> None:
        raise ValueError("not about parameters")

    monkeypatch.setattr(PPO, "learn", learn)
    with pytest.raises(ValueError, match="not about parameters"):
        compare.train(compare.Run(*PAIR, "adam", 1.0, 0, 32))


def test_the_page_quotes_the_stored_results() -> None:
    results = compare.load(FOLDER.parents[1] / compare.RESULTS)
    full = compare.Study([(a, e) for a in compare.ALGORITHMS for e in compare.STEPS], 5, 1, compare.RESULTS, FOLDER)
    page = (FOLDER.parents[1] / compare.PAGE).read_text()
    assert compare.tables(full, results) in page


class _Loader(yaml.SafeLoader):
    """Reads the Zoo's ``!!float 5e4``."""


def test_the_configuration_for_rl_zoo_builds_its_policies() -> None:
    for environment, settings in yaml.load((FOLDER / "rl_zoo_ppo.yml").read_text(), _Loader).items():
        module, name = settings["policy"].rsplit(".", 1)
        assert module == "sb3_integration"
        kwargs = {key: settings[key] for key in ("n_steps", "batch_size", "gamma") if key in settings}
        policy_kwargs = eval(settings.get("policy_kwargs", "{}"), {"__builtins__": {"dict": dict}})
        model = PPO(getattr(sb3_integration, name), environment, policy_kwargs=policy_kwargs, device="cpu", **kwargs)
        assert type(model.policy.optimizer).__name__ == "AdaHesScale"
        assert json.dumps(settings)  # plain data: the Zoo copies it to disk
