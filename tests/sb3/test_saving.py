"""A run goes on after loading as if it had never stopped, and copies of a policy are policies of their own."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import suppress
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
from stable_baselines3.common.policies import BasePolicy
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
    trusted = options.get("optimizer_class") is scaled_adam  # a function of this file: code to whoever loads it
    policy = case.policy.load(tmp_path / "policy.pth", device="cpu", trusted=trusted)
    file = io.BytesIO()
    model.policy.save(file)
    file.seek(0)
    assert_equal(case.policy.load(file, trusted=trusted).state_dict(), policy.state_dict())
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


class Attack:
    """What a stranger's file may hold: loading it calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def holding(content: Any) -> io.BytesIO:
    file = io.BytesIO()
    policy = named("PPO-Box").build().policy
    data = {**policy._get_constructor_parameters(), "net_arch": content}
    torch.save({"state_dict": policy.state_dict(), "data": data}, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "attack",
    [
        lambda mark: Attack(Path.touch, mark),
        lambda mark: Attack(getattr, Attack(getattr, BasePolicy, "load"), "__func__"),
        lambda mark: Attack(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()"),
    ],
    ids=["a function", "getattr", "exec"],
)
def test_a_strangers_file_runs_no_code(attack: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(ValueError, match=r"expected a file that a policy's save\(\) has written"):
        HesScaleActorCriticPolicy.load(holding(attack(mark)))
    assert not mark.exists()


def test_a_file_with_code_names_it_and_is_loaded_if_it_is_trusted(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file = holding({"pi": [64, 64], "vf": [64, 64], "own": Attack(Path.touch, mark)})
    with pytest.raises(ValueError, match=r"with .*pathlib.*, and loading would run that code.*trusted=True"):
        HesScaleActorCriticPolicy.load(file)
    assert not mark.exists()
    file.seek(0)
    with suppress(Exception):  # what is left in net_arch is no architecture
        HesScaleActorCriticPolicy.load(file, trusted=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot read"), (b"GIF89a, and so on", "cannot be read|cannot read")]
)
def test_a_file_that_is_no_policy_is_an_error_of_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HesScaleActorCriticPolicy.load(io.BytesIO(content))
    assert "expected a file that a policy's save() has written" in str(caught.value)


def test_a_file_of_weights_alone_says_what_it_holds() -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="with a dict of weight, without data and state_dict"):
        HesScaleActorCriticPolicy.load(file)


def test_a_policy_with_a_partial_optimizer_is_loaded(tmp_path: Path) -> None:
    options = {"optimizer_class": partial(AdaHesScale, eps=1e-3)}
    policy = named("PPO-Box").build(policy_options=options).policy
    policy.save(tmp_path / "policy.pth")
    loaded = HesScaleActorCriticPolicy.load(tmp_path / "policy.pth")
    assert loaded.optimizer.defaults["eps"] == policy.optimizer.defaults["eps"] == 1e-3


@pytest.mark.parametrize("name", ["PPO-Box", "DQN-Discrete"])
def test_a_policy_with_seeded_spaces_is_loaded(name: str) -> None:
    case = named(name)
    policy = case.build().policy
    policy.action_space.seed(3)
    file = io.BytesIO()
    policy.save(file)
    file.seek(0)
    loaded = case.policy.load(file)
    assert np.array_equal(loaded.action_space.sample(), policy.action_space.sample())


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
