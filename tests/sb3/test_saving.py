"""A run goes on after loading as if it had never stopped, and copies of a policy are policies of their own."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv

from hesscale_lightning import AdaHesScale, StepSizeScaling
from sb3_integration import HesScaleActorCriticPolicy
from sb3_integration.loss_seam import optimizers_of
from tests.sb3.cases import named
from tests.sb3.environments import Noise


def scaled_adam(params: Any, **options: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, **options), delta=1e-3)


NAMES = [
    "PPO-Discrete-NatureCNN", "PPO-Box-NatureCNN-twice", "A2C-Discrete", "DQN-Discrete", "TD3-Box", "QRDQN-Discrete",
    "TQC-Box", "CrossQ-Box", "MaskablePPO-Discrete", "RecurrentPPO-Box", "TRPO-Box",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "options of networks": {
        "actor_optimizer_kwargs": {"lr_scale": 2.0, "delta": 1e-5},
        "critic_optimizer_kwargs": {"lr_scale": 0.5, "delta": 1e-3},
        "method": "hesscale_gn",
    },
    "scaled Adam": {"optimizer_class": scaled_adam},
}
SET = ("PPO-Box", "A2C-Discrete", "DQN-Discrete", "SAC-Box", "TD3-Box")
MAIN = [("PPO-Box", options) for options in OPTIONS] + [("SAC-Box", options) for options in OPTIONS]
RUNS = MAIN + [(name, "defaults") for name in NAMES]


def continue_as(model: Any, other: Any) -> None:
    """Gives a model the data of another, so that both train on the same."""
    for name in ("rollout_buffer", "replay_buffer", "_last_obs"):
        if hasattr(other, name):
            setattr(model, name, copy.deepcopy(getattr(other, name)))
    model.set_logger(other.logger)
    model._current_progress_remaining = other._current_progress_remaining


def train(model: Any) -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    for _ in range(2):
        if isinstance(model, OffPolicyAlgorithm):
            model.train(gradient_steps=3, batch_size=8)
        else:
            model.train()


def assert_equal(one: Any, other: Any) -> None:
    """The same numbers in nested containers, to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def assert_same_training(model: Any, other: Any) -> None:
    before = copy.deepcopy(model.policy.state_dict())
    train(model)
    train(other)
    assert any(not torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert_equal(model.policy.state_dict(), other.policy.state_dict())
    for one, two in zip(optimizers_of(model.policy), optimizers_of(other.policy), strict=True):
        # torch adds an option to every optimizer that was loaded
        assert_equal(without_differentiable(one.state_dict()), without_differentiable(two.state_dict()))


def without_differentiable(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{key: value for key, value in g.items() if key != "differentiable"} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def trained(request: pytest.FixtureRequest) -> Any:
    name, options = request.param
    case = named(name)
    model = case.build(policy_options=OPTIONS[options], learning_rate=lambda progress: 1e-3 + 1e-3 * progress)
    return case, OPTIONS[options], model.learn(case.timesteps)


def test_training_goes_on_after_save_and_load(trained: Any, tmp_path: Path) -> None:
    case, _, model = trained
    model.save(tmp_path / "model.zip")
    loaded = case.algorithm.load(tmp_path / "model.zip", device="cpu")
    assert type(loaded.policy) is case.policy
    continue_as(loaded, model)
    assert_same_training(model, loaded)


@pytest.mark.parametrize("trained", [run for run in RUNS if run[0] in SET], indirect=True, ids=str)
def test_training_goes_on_after_set_parameters(trained: Any) -> None:
    case, options, model = trained
    other = case.build(policy_options=options, seed=5, learning_rate=model.learning_rate)
    other.set_parameters(copy.deepcopy(model.get_parameters()))
    if getattr(model, "log_ent_coef", None) is not None:  # which Stable-Baselines3 does not count as a parameter
        other.log_ent_coef.data.copy_(model.log_ent_coef.data)
    continue_as(other, model)
    assert_same_training(model, other)


def exchange_policy(model: Any, policy: Any) -> None:
    model.policy = policy
    if hasattr(model, "_create_aliases"):
        model._create_aliases()


def test_training_goes_on_with_a_policy_that_was_saved_alone(trained: Any, tmp_path: Path) -> None:
    case, options, model = trained
    model.policy.save(tmp_path / "policy.pth")
    policy = case.policy.load(tmp_path / "policy.pth", device="cpu")
    file = io.BytesIO()
    model.policy.save(file)
    file.seek(0)
    assert_equal(case.policy.load(file).state_dict(), policy.state_dict())
    other = case.build(policy_options=options, seed=5, learning_rate=model.learning_rate)
    if getattr(model, "log_ent_coef", None) is not None:
        other.log_ent_coef.data.copy_(model.log_ent_coef.data)
        other.ent_coef_optimizer.load_state_dict(copy.deepcopy(model.ent_coef_optimizer.state_dict()))
    exchange_policy(other, policy)
    continue_as(other, model)
    if hasattr(other, "batch_norm_stats"):
        other.batch_norm_stats, other.batch_norm_stats_target = [], []
    assert_same_training(model, other)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
    "cloudpickle": lambda policy: cloudpickle.loads(cloudpickle.dumps(policy)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", ["PPO-Box", "A2C-Discrete", "DQN-Discrete", "SAC-Box", "TD3-Box", "RecurrentPPO-Box"])
def test_a_copy_of_a_policy_trains_by_itself(name: str, copied: str) -> None:
    case = named(name)
    model = case.build().learn(case.timesteps)
    # A distribution may still hold the graph of the last minibatch, which no policy of Stable-Baselines3 lets copy.
    state = {"state": None, "episode_start": np.ones(2)} if "Recurrent" in name else {}
    model.policy.predict(model.env.reset(), **state)
    duplicate = COPIES[copied](model.policy)
    assert duplicate.seam is not model.policy.seam
    assert duplicate.seam.policy is duplicate
    assert {len(optimizer._optimizer_step_pre_hooks) for optimizer in optimizers_of(duplicate)} == {1}
    original = {name: value.clone() for name, value in model.policy.state_dict().items()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers_of(model.policy)]

    other = case.build(seed=5)
    exchange_policy(other, duplicate)
    continue_as(other, model)
    if getattr(model, "log_ent_coef", None) is not None:
        other.log_ent_coef.data.copy_(model.log_ent_coef.data)
        other.ent_coef_optimizer.load_state_dict(copy.deepcopy(model.ent_coef_optimizer.state_dict()))
    train(other)

    assert_equal(dict(model.policy.state_dict()), original)
    assert_equal([optimizer.state_dict() for optimizer in optimizers_of(model.policy)], states)
    assert all(getattr(param, "hess_diag", None) is None for param in model.policy.parameters())
    train(model)
    assert_equal(dict(model.policy.state_dict()), dict(duplicate.state_dict()))


def test_a_policy_of_plain_stable_baselines_can_be_loaded(tmp_path: Path) -> None:
    plain = named("PPO-Box").build("MlpPolicy")
    plain.policy.save(tmp_path / "policy.pth")
    policy = HesScaleActorCriticPolicy.load(tmp_path / "policy.pth")
    assert_equal(policy.state_dict(), plain.policy.state_dict())


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_environments_in_processes_and_an_evaluation_that_keeps_the_best(tmp_path: Path) -> None:
    environments = SubprocVecEnv([partial(Noise, "Discrete") for _ in range(2)], start_method="fork")
    try:
        model = PPO(HesScaleActorCriticPolicy, environments, n_steps=8, batch_size=8, n_epochs=2, seed=0, device="auto")
        evaluation = EvalCallback(
            named("PPO-Discrete").environment(), eval_freq=8, n_eval_episodes=2, best_model_save_path=str(tmp_path),
            log_path=str(tmp_path), verbose=0,
        )  # fmt: skip
        model.learn(48, callback=evaluation)
    finally:
        environments.close()
    best = PPO.load(tmp_path / "best_model.zip", env=named("PPO-Discrete").environment())
    assert type(best.policy) is HesScaleActorCriticPolicy
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 3
    steps = {int(state["step"]) for state in best.policy.optimizer.state.values()}
    assert steps <= {0, 4, 8, 12}
    best.learn(16)
    assert all(int(state["step"]) == max(steps, default=0) + 4 for state in best.policy.optimizer.state.values())


def test_the_device_is_found() -> None:
    case = named("SAC-Box")
    model = case.build(device="auto")
    assert isinstance(model, SAC)
    model.learn(case.timesteps)
    assert {param.device.type for param in model.policy.parameters()} == {
        "cuda" if torch.cuda.is_available() else "cpu"
    }
    assert type(model.actor.optimizer) is AdaHesScale
