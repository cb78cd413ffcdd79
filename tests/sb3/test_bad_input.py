"""What cannot work fails at the first train(), says what to do, and leaves policy, data and files as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, register_rule
from sb3_integration import HesScaleActorCriticPolicy, HesScaleDQNPolicy, HesScaleSACPolicy
from tests.sb3.cases import named


class Untagged(HesScaleActorCriticPolicy):
    """Goes around the mixin's evaluate_actions."""

    def evaluate_actions(self, obs: Any, actions: Tensor) -> Any:
        return ActorCriticPolicy.evaluate_actions(self, obs, actions)


class UntaggedValue(HesScaleDQNPolicy):
    def _tag_outputs(self) -> None:
        pass


class UntaggedCritic(HesScaleSACPolicy):
    def _tag_outputs(self) -> None:
        pass


class Twice(torch.autograd.Function):
    """An operation that the engine cannot know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Double(Twice):
    """Another one, for which a test registers a rule."""


class Extractor(FlattenExtractor):
    def __init__(self, observation_space: Any, operation: type[torch.autograd.Function] = Twice) -> None:
        super().__init__(observation_space)
        self.linear = torch.nn.Linear(self.features_dim, self.features_dim)
        self.operation = operation

    def forward(self, observations: Tensor) -> Tensor:
        return self.operation.apply(self.linear(super().forward(observations)))


CASES = [
    ("PPO-Box", Untagged, {}, RuntimeError, r"without curvature.*Untagged has tagged.*super\(\).*optimizer_class"),
    ("A2C-Discrete", Untagged, {}, RuntimeError, r"without curvature.*Untagged has tagged.*super\(\).*optimizer_class"),
    ("DQN-Discrete", UntaggedValue, {}, RuntimeError, "without curvature.*UntaggedValue has tagged"),
    ("SAC-Box", UntaggedCritic, {}, RuntimeError, "without curvature.*UntaggedCritic has tagged"),
    *[
        (name, None, {"features_extractor_class": Extractor}, UnsupportedOperationError, "TwiceBackward.*register_rule")
        for name in ("PPO-Box", "A2C-Discrete", "DQN-Discrete", "SAC-Box", "TD3-Box", "QRDQN-Discrete")
    ],
]


def data_of(model: Any) -> list[np.ndarray]:
    buffer = model.rollout_buffer if hasattr(model, "rollout_buffer") else model.replay_buffer
    return [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize(
    ("name", "policy", "options", "error", "message"), CASES, ids=lambda x: x if isinstance(x, str) else None
)
def test_the_first_train_fails_with_advice_and_changes_nothing(
    name: str, policy: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    case = named(name)
    model = case.build(policy, policy_options=options)
    model.save(tmp_path / "model.zip")
    file = (tmp_path / "model.zip").read_bytes()
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    collected: list[list[np.ndarray]] = []
    train = model.train

    def observed(*args: Any, **kwargs: Any) -> None:
        collected.append([data.copy() for data in data_of(model)])
        train(*args, **kwargs)

    model.train = observed
    with pytest.raises(error, match=f"(?s){message}"):
        model.learn(case.timesteps)

    assert len(collected) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert all(getattr(param, "hess_diag", None) is None for param in model.policy.parameters())
    # A rollout buffer flattens its arrays when it is read; what is in them stays.
    for now, then in zip(data_of(model), collected[0], strict=True):
        assert np.array_equal(np.sort(now, axis=None), np.sort(then, axis=None))
    del model.train
    assert (tmp_path / "model.zip").read_bytes() == file
    loaded = case.algorithm.load(tmp_path / "model.zip")
    assert all(torch.equal(value, before[name]) for name, value in loaded.policy.state_dict().items())
    model.save(tmp_path / "later.zip")  # and what the run had collected is not lost
    case.algorithm.load(tmp_path / "later.zip")


def test_the_same_model_trains_on_once_the_operation_has_a_rule() -> None:
    options = {"features_extractor_class": Extractor, "features_extractor_kwargs": {"operation": Double}}
    model = named("PPO-Box").build(policy_options=options)
    with pytest.raises(UnsupportedOperationError, match="DoubleBackward"):
        model.learn(16)

    @register_rule("DoubleBackward")
    def double(op: Any, h: Any) -> Any:
        return 4 * h

    model.learn(16)
    assert all(int(state["step"]) == 4 for state in model.policy.optimizer.state.values())


def test_adam_needs_no_rule() -> None:
    options = {"features_extractor_class": Extractor, "optimizer_class": torch.optim.Adam}
    named("PPO-Box").build(policy_options=options).learn(32)


def test_a_loss_that_reaches_only_some_parameters_with_curvature_is_refused() -> None:
    """A second loss of the user's own, which no output has tagged, brings gradients without curvature."""
    model = named("PPO-Box").build()
    policy = model.policy
    observations, _ = policy.obs_to_tensor(model.env.reset())
    policy.optimizer.zero_grad()
    (policy.predict_values(observations) ** 2).mean().backward()
    policy.get_distribution(observations).entropy().mean().backward()
    with pytest.raises(RuntimeError, match=r"without curvature.*log_std.*has tagged"):
        policy.optimizer.step()


def test_gradients_that_were_not_cleared_by_the_optimizer_are_refused() -> None:
    """It is armed by its own zero_grad(); stepping on old averages without a word would be worse than failing."""
    model = named("PPO-Box").build().learn(16)
    observations, _ = model.policy.obs_to_tensor(model.env.reset())
    model.policy.zero_grad()
    (model.policy.predict_values(observations) ** 2).mean().backward()
    with pytest.raises(RuntimeError, match=r"without curvature.*the optimizer's own zero_grad\(\)"):
        model.policy.optimizer.step()


def test_a_closure_may_compute_the_loss() -> None:
    model = named("PPO-Box").build().learn(16)
    policy = model.policy
    observations, _ = policy.obs_to_tensor(model.env.reset())

    def closure() -> Tensor:
        policy.optimizer.zero_grad()
        loss = (policy.predict_values(observations) ** 2).mean()
        loss.backward()
        return loss.detach()

    policy.optimizer.step(closure)
    assert int(policy.optimizer.state[policy.value_net.weight]["hess_step"]) == 5


def test_a_step_of_ones_own_goes_through_a_tag_too() -> None:
    model = named("PPO-Box").build()
    policy = model.policy
    observations, _ = policy.obs_to_tensor(model.env.reset())
    values, log_prob, entropy = policy.evaluate_actions(observations, torch.zeros(2, 2))
    policy.optimizer.zero_grad()
    ((values**2).mean() - log_prob.mean() - entropy.mean()).backward()
    policy.optimizer.step()
    assert all(int(state["step"]) == 1 for state in policy.optimizer.state.values())
    assert isinstance(model, PPO)
