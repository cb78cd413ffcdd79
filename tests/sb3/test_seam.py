"""The tag: it changes nothing of torch or Stable-Baselines3, stays on the way to the loss, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from sb3_integration.loss_seam import LossSeam, optimizers_of
from tests.sb3.cases import named

NOTHING_IS_PATCHED = """
import inspect, sys
import torch, stable_baselines3, sb3_contrib
from hesscale_lightning import AdaHesScale
import hesscale_lightning.curvature

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("torch", "stable_baselines3", "sb3_contrib") or "_C" in name:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name, key] = value
            if inspect.isclass(value):
                for attribute, entry in list(vars(value).items()):
                    if callable(entry) or isinstance(entry, (staticmethod, classmethod, property)):
                        found[value, attribute] = entry
    return found

torch.optim.Adam([torch.ones(1)])  # torch wraps the step of an optimizer's class when the first one is made
before = attributes()
import sb3_integration
from sb3_integration import contrib
for algorithm, policy, env in (
    (stable_baselines3.PPO, sb3_integration.HesScaleActorCriticPolicy, "CartPole-v1"),
    (stable_baselines3.SAC, sb3_integration.HesScaleSACPolicy, "Pendulum-v1"),
):
    options = {"n_steps": 8, "batch_size": 8} if algorithm is stable_baselines3.PPO else {"learning_starts": 4}
    algorithm(policy, env, device="cpu", **options).learn(16)
after = attributes()
print(len(before) > 10_000, [key for key, value in before.items() if after.get(key) is not value])
"""


def test_nothing_of_torch_or_stable_baselines_is_patched() -> None:
    found = subprocess.run([sys.executable, "-c", NOTHING_IS_PATCHED], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True []"


# -- what carries the tag


@pytest.fixture
def seam() -> LossSeam:
    return named("PPO-Box").build().policy.seam


def test_results_that_require_grad_are_tagged_and_others_are_not(seam: LossSeam) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = seam.tag(x * 1.0)
    tagged = type(y)
    assert issubclass(tagged, Tensor)
    assert tagged is not Tensor
    plain = torch.randn(4, 3)
    for result in (
        y + plain, plain + y, 0 + y, plain * y, y.flatten(), y[0], torch.cat([plain, y]), torch.exp(y), y.mean(),
        torch.nn.functional.mse_loss(plain, y), sum(y.unbind()), torch.where(y > 0, y, plain), *y.split(2),
        y.max(dim=1).values, y.T, -y, torch.stack([y, y]).sum(), torch.nn.functional.linear(y, plain),
    ):  # fmt: skip
        assert type(result) is tagged
    with torch.no_grad():
        assert type(y * 2) is Tensor
    for result in (y.detach(), y > 0, y.argmax(), y.data, torch.zeros_like(y), y.max(dim=1).indices, y.detach().cpu()):
        assert type(result) is Tensor
    assert isinstance(y.detach().numpy(), np.ndarray)
    assert type(y.mean().item()) is float
    assert type(x) is Tensor


def test_what_does_not_require_grad_stays_as_it_is(seam: LossSeam) -> None:
    x = torch.ones(3)
    assert seam.tag(x) is x
    assert type(x) is Tensor
    assert seam.tag("anything") == "anything"


def test_values_graph_and_gradient_are_the_same(seam: LossSeam) -> None:
    def loss(tag: Any) -> tuple[Tensor, Tensor]:
        x = torch.linspace(-1, 1, 6).requires_grad_()
        return x, (tag(x.exp()) * 2 - torch.cat([tag(x.sin()), torch.ones(1)])[1:]).square().mean()

    (x, plain), (z, tagged) = loss(lambda t: t), loss(seam.tag)
    assert plain.grad_fn.name() == tagged.grad_fn.name()
    plain.backward()
    tagged.backward()
    assert torch.equal(x.grad, z.grad)


def test_a_loss_that_has_arrived_is_a_plain_tensor(seam: LossSeam) -> None:
    x = torch.ones(3, requires_grad=True)
    loss = seam.tag(x * 2).sum()
    assert type(loss) is not Tensor
    loss.backward()
    assert type(loss) is Tensor


def test_a_tagged_tensor_is_saved_and_printed_as_a_plain_one(seam: LossSeam, tmp_path: Any) -> None:
    y = seam.tag(torch.ones(3, requires_grad=True) * 2)
    restored = pickle.loads(pickle.dumps(y))
    assert type(restored) is Tensor
    assert torch.equal(restored, y.detach())
    torch.save(y, tmp_path / "y.pt")
    assert type(torch.load(tmp_path / "y.pt")) is Tensor
    assert "2." in repr(y)


def test_every_policy_has_a_tag_of_its_own() -> None:
    one, two = (named("PPO-Box").build().policy.seam for _ in range(2))
    x = torch.ones(3, requires_grad=True)
    assert type(one.tag(x * 1)) is not type(two.tag(x * 1))
    assert type(one.tag(x * 1)) is type(one.tag(x * 2))


NAMES = ["PPO-Discrete", "A2C-Box", "DQN-Discrete", "SAC-Box", "TD3-Box", "RecurrentPPO-Box", "CrossQ-Box", "TRPO-Box"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_a_policy_keeps_or_returns_is_tagged(name: str) -> None:
    gc.collect()  # what other tests have left in cycles
    case = named(name)
    model = case.build().learn(case.timesteps)
    policy = model.policy
    for module in policy.modules():
        for value in vars(module).values():
            assert not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter)
    tagged = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and type(o).__name__ == "TaggedTensor"]
    assert not tagged
    actions, _ = policy.predict(model.env.reset())
    assert type(actions) is np.ndarray
    observations, _ = policy.obs_to_tensor(model.env.reset())
    with torch.no_grad():
        if hasattr(policy, "predict_values") and "Recurrent" not in name:
            assert type(policy.predict_values(observations)) is Tensor
        if hasattr(policy, "q_net"):
            assert type(policy.q_net(observations)) is Tensor
    for name_of, value in policy.state_dict().items():
        assert type(value) is Tensor, name_of
    assert all(type(p.grad) in (Tensor, type(None)) for p in policy.parameters())


def test_losses_of_optimizers_that_are_not_armed_get_no_curvature() -> None:
    """SAC's actor loss runs through the critic, whose parameters get gradients and no curvature from it."""
    model = named("SAC-Box").build().learn(24)
    model.actor.optimizer.zero_grad()
    actions, log_prob = model.actor.action_log_prob(torch.randn(5, 3))
    (log_prob.mean() - torch.cat(model.critic(torch.randn(5, 3), actions), dim=1).mean()).backward()
    assert all(param.hess_diag is not None for param in model.actor.parameters())
    assert all(getattr(param, "hess_diag", None) is None for param in model.critic.parameters())
    assert any(param.grad is not None for param in model.critic.parameters())


# -- what stays alive


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("name", ["PPO-Box", "DQN-Discrete", "SAC-Box"])
def test_training_does_not_leak(name: str) -> None:
    model = named(name).build().learn(32)

    def train(steps: int) -> None:
        if isinstance(model, OffPolicyAlgorithm):
            model.train(gradient_steps=steps, batch_size=8)
        else:
            for _ in range(steps // 4):  # two epochs of two minibatches
                model.train()

    train(8)
    before = live_tensors(), len(gc.get_objects())
    train(300)
    after = live_tensors(), len(gc.get_objects())
    assert after[0] == before[0]
    assert after[1] - before[1] < 300
    hooks = [len(optimizer._optimizer_step_pre_hooks) for optimizer in optimizers_of(model.policy)]
    assert set(hooks) == {1}


def test_loading_again_and_again_adds_no_hooks() -> None:
    model = named("PPO-Box").build().learn(16)
    state = copy.deepcopy(model.get_parameters())
    for _ in range(3):
        model.set_parameters(copy.deepcopy(state))
    assert len(model.policy.optimizer._optimizer_step_pre_hooks) == 1
    assert all(len(param._post_accumulate_grad_hooks or ()) <= 1 for param in model.policy.parameters())


@pytest.mark.parametrize("name", ["PPO-Box", "SAC-Box"])
def test_a_policy_that_is_dropped_is_freed(name: str) -> None:
    model = named(name).build().learn(32)
    alive = weakref.ref(model.policy)
    del model
    gc.collect()
    assert alive() is None


def test_a_loss_may_outlive_its_policy() -> None:
    model = named("PPO-Box").build()
    observations, _ = model.policy.obs_to_tensor(model.env.reset())
    weight = model.policy.value_net.weight
    loss = (model.policy.predict_values(observations) ** 2).mean()
    del model
    gc.collect()
    loss.backward()
    assert weight.grad is not None
