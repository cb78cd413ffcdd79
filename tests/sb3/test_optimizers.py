"""Which optimizer a policy gets, a param group for each network, and steps that max_grad_norm does not distort."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch.optim import Optimizer

from hesscale_lightning import AdaHesScale, StepSizeScaling
from sb3_integration import HesScaleActorCriticMixin, HesScaleActorCriticPolicy, HesScaleDQNPolicy
from sb3_integration.loss_seam import optimizers_of
from tests.sb3.cases import CASES, Case, named


def scaled_adam(params: Any, **options: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.Adam(params, **options), delta=1e-3)


# -- which optimizer


@pytest.mark.parametrize("case", [case for case in CASES if not case.setting], ids=str)
def test_the_optimizer_is_adahesscale_unless_chosen(case: Case) -> None:
    assert {type(optimizer) for optimizer in optimizers_of(case.build().policy)} == {AdaHesScale}


@pytest.mark.parametrize("rms_prop_eps", [1e-5, 1e-8])
def test_the_rmsprop_that_a2c_injects_does_not_replace_it(rms_prop_eps: float) -> None:
    model = named("A2C-Discrete").build(rms_prop_eps=rms_prop_eps)
    assert model.policy_kwargs["optimizer_class"] is torch.optim.RMSprop  # what A2C asked for
    assert type(model.policy.optimizer) is AdaHesScale
    assert model.policy.seam.method == "hesscale_gn"


@pytest.mark.parametrize("batch_size", [8, 64])
def test_the_adam_that_qrdqn_injects_does_not_replace_it(batch_size: int) -> None:
    model = named("QRDQN-Discrete").build(batch_size=batch_size)
    assert model.policy_kwargs["optimizer_class"] is torch.optim.Adam
    assert type(model.policy.optimizer) is AdaHesScale


def test_an_adam_that_qrdqn_may_have_injected_is_kept_and_reported() -> None:
    with pytest.warns(UserWarning, match="batch_size=12 .*optimizer_class=AdaHesScale"):
        model = named("QRDQN-Discrete").build(batch_size=12)
    assert type(model.policy.optimizer) is torch.optim.Adam


@pytest.mark.parametrize("name", ["PPO-Box", "A2C-Box", "DQN-Discrete", "SAC-Box", "TD3-Box", "QRDQN-Discrete"])
@pytest.mark.parametrize(
    ("chosen", "made", "options"),
    [
        (torch.optim.SGD, torch.optim.SGD, {"momentum": 0.5}),
        (torch.optim.RMSprop, torch.optim.RMSprop, {"alpha": 0.9}),
        (torch.optim.Adam, torch.optim.Adam, {"eps": 3e-7}),
        (AdaHesScale, AdaHesScale, {"delta": 0.125}),
        (scaled_adam, StepSizeScaling, {"eps": 3e-7}),
    ],
)
def test_a_choice_is_respected(name: str, chosen: Any, made: type[Optimizer], options: dict[str, float]) -> None:
    case = named(name)
    model = case.build(policy_options={"optimizer_class": chosen, "optimizer_kwargs": options})
    for optimizer in optimizers_of(model.policy):
        assert type(optimizer) is made
        for group in optimizer.param_groups:
            assert options.items() <= group.items()
    model.learn(case.timesteps)


def test_a_scaled_optimizer_receives_diagonals() -> None:
    model = named("PPO-Box").build(policy_options={"optimizer_class": scaled_adam}).learn(32)
    assert set(model.policy.optimizer.curvature) == set(model.policy.parameters())


# -- gradient clipping


@pytest.mark.parametrize(
    "name",
    [
        "PPO-Discrete", "PPO-Box", "PPO-Box-gSDE", "PPO-Discrete-NatureCNN", "A2C-Discrete", "A2C-Box", "DQN-Discrete",
        "QRDQN-Discrete", "MaskablePPO-Discrete", "RecurrentPPO-Box",
    ],
)  # fmt: skip
def test_max_grad_norm_does_not_change_a_step(name: str) -> None:
    steps = []
    for limit in (float("inf"), 1e-4):
        case = named(name)
        one_step = {"n_epochs": 1, "batch_size": 16} if "n_epochs" in case.build().__dict__ else {}
        if hasattr(case.build(), "gradient_steps"):
            one_step = {"gradient_steps": 1, "learning_starts": 14, "train_freq": 16}
        model = case.build(max_grad_norm=limit, **one_step)
        before = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
        model.learn(16)
        (optimizer,) = optimizers_of(model.policy)
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}
        clipping = [value for key, value in optimizer.stats.items() if key.startswith("clipping")]
        assert all(0 < value < 0.1 for value in clipping) if limit < 1 else all(value == 1 for value in clipping)
        steps.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach() - before)
    assert steps[0].norm() > 0
    assert (steps[1] - steps[0]).norm() <= 1e-4 * steps[0].norm()


# -- a param group for each network

NETWORKS = {
    "PPO-Discrete": [["actor", "critic"]],
    "PPO-Box-gSDE": [["actor", "critic"]],
    "PPO-Discrete-NatureCNN": [["features", "actor", "critic"]],
    "PPO-Box-NatureCNN-twice": [["actor", "critic"]],
    "A2C-Discrete": [["actor", "critic"]],
    "DQN-Discrete": [["critic"]],
    "QRDQN-Discrete": [["critic"]],
    "SAC-Box": [["actor"], ["critic"]],
    "SAC-Box-shared-NatureCNN": [["actor"], ["critic"]],
    "TD3-Box": [["actor"], ["critic"]],
    "TQC-Box": [["actor"], ["critic"]],
    "CrossQ-Box": [["actor"], ["critic"]],
    "RecurrentPPO-Box": [["actor", "critic"]],
    "RecurrentPPO-Box-shared-LSTM": [["actor", "critic"]],
    "RecurrentPPO-Box-critic-without-LSTM": [["actor", "critic"]],
    "RecurrentPPO-Discrete-NatureCNN": [["features", "actor", "critic"]],
}
ACTOR = {"actor", "action_net", "policy_net", "log_std", "lstm_actor", "pi_features_extractor"}
CRITIC = {"critic", "value_net", "q_net", "quantile_net", "lstm_critic", "vf_features_extractor"}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_group_of_its_own(name: str) -> None:
    policy = named(name).build().policy
    optimizers = list(optimizers_of(policy))
    assert sorted(sorted(g["network"] for g in o.param_groups) for o in optimizers) == sorted(
        sorted(networks) for networks in NETWORKS[name]
    )
    params = dict(policy.named_parameters())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        assert all(params[name] is param for name, param in zip(group["param_names"], group["params"], strict=True))
        for param in group["params"]:
            aliases = [alias for alias, other in policy.named_parameters(remove_duplicate=False) if other is param]
            parts = {part for alias in aliases for part in alias.split(".")}
            owners = {"actor": not parts.isdisjoint(ACTOR), "critic": not parts.isdisjoint(CRITIC)}
            if group["network"] == "features" or {"actor", "critic"} <= parts:  # SAC's actor owns what is shared
                assert "features_extractor" in parts, aliases
                assert group["network"] != "critic"
            else:
                assert owners == {"actor": group["network"] == "actor", "critic": group["network"] == "critic"}, aliases


def options_of(model: Any) -> dict[str, tuple[float, float]]:
    groups = [group for optimizer in optimizers_of(model.policy) for group in optimizer.param_groups]
    return {group["network"]: (group["lr_scale"], group["delta"]) for group in groups}


def learning_rates(model: Any) -> set[float]:
    return {group["lr"] for optimizer in optimizers_of(model.policy) for group in optimizer.param_groups}


OWN_OPTIONS = {
    "actor_optimizer_kwargs": {"lr_scale": 3.0, "delta": 1e-5},
    "critic_optimizer_kwargs": {"lr_scale": 0.5, "delta": 1e-2},
}


@pytest.mark.parametrize("name", ["PPO-Box", "A2C-Box", "SAC-Box", "TD3-Box"])
def test_options_of_networks_survive_schedules_and_loading(name: str, tmp_path: Any) -> None:
    case = named(name)
    model = case.build(policy_options=OWN_OPTIONS, learning_rate=LinearSchedule(1e-3, 1e-4, 1.0))
    expected = {"actor": (3.0, 1e-5), "critic": (0.5, 1e-2)}
    assert options_of(model) == expected
    assert learning_rates(model) == {1e-3}
    model.learn(32)
    assert options_of(model) == expected
    assert list(learning_rates(model)) == [pytest.approx(1e-4)]
    model.save(tmp_path / "model.zip")
    loaded = case.algorithm.load(tmp_path / "model.zip", env=case.environment())
    assert options_of(loaded) == expected
    assert learning_rates(loaded) == learning_rates(model)
    loaded.learn(32)
    assert options_of(loaded) == expected


def test_each_network_takes_its_own_step() -> None:
    case = named("PPO-Discrete")
    plain = {"radius": "loss", "optimizer_kwargs": {"delta": None, "max_update": None, "lr_scale": 1.0}}
    steps = []
    for options in ({}, {"actor_optimizer_kwargs": {"lr_scale": 2.0}}):
        model = case.build(policy_options={**plain, **options}, n_epochs=1, batch_size=16)
        before = {name: param.detach().clone() for name, param in model.policy.named_parameters()}
        model.learn(16)
        steps.append({name: param.detach() - before[name] for name, param in model.policy.named_parameters()})
    for name, step in steps[0].items():
        factor = 2.0 if "policy_net" in name or "action_net" in name else 1.0
        torch.testing.assert_close(steps[1][name], factor * step, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["PPO-Box", "A2C-Discrete", "DQN-Discrete", "SAC-Box"])
def test_a_schedule_may_end_below_zero(name: str) -> None:
    model = named(name).build(learning_rate=lambda progress: 1e-3 * progress)
    model.learn(25)  # collected in rollouts of 16, or 8: more than 25 steps
    assert model.num_timesteps > 25
    (lr,) = learning_rates(model)
    assert lr < 0
    assert all(torch.isfinite(param).all() for param in model.policy.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("PPO-Box", {"actor_optimizer_kwargs": {"lr": 1.0}}, "actor_optimizer_kwargs sets lr.*lr_scale"),
        ("SAC-Box", {"critic_optimizer_kwargs": {"lr": 1.0}}, "critic_optimizer_kwargs sets lr.*lr_scale"),
        ("PPO-Box", {"critic_optimizer_kwargs": {"radius": 1.0}}, "sets radius, which AdaHesScale does not.*delta"),
        ("PPO-Box", {"features_optimizer_kwargs": {"delta": 1.0}}, "features_optimizer_kwargs given.*no such network"),
        ("DQN-Discrete", {"actor_optimizer_kwargs": {"delta": 1.0}}, "actor_optimizer_kwargs given"),
        ("SAC-Box", {"features_optimizer_kwargs": {"delta": 1.0}}, "features_optimizer_kwargs given"),
        ("PPO-Box", {"actor_optimizer_kwargs": {"delta": -1.0}}, "delta"),
        ("PPO-Box", {"optimizer_kwargs": {"delta": -1.0}}, "delta"),
        ("TRPO-Box", {"actor_optimizer_kwargs": {"delta": 1.0}}, "actor_optimizer_kwargs would have no effect: TRPO"),
        ("PPO-Box", {"method": "newton"}, "method must be one of hesscale,.*got 'newton'"),
        (
            "PPO-Box",
            {"optimizer_class": torch.optim.Adam, "actor_optimizer_kwargs": {"lr_scale": 2.0}},
            "sets lr_scale, which Adam does not know.*betas",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(name).build(policy_options=options)


def test_other_optimizers_take_options_of_networks() -> None:
    options = {"optimizer_class": torch.optim.Adam, "actor_optimizer_kwargs": {"betas": (0.5, 0.9)}}
    model = named("PPO-Box").build(policy_options=options).learn(32)
    assert {g["network"]: g["betas"] for g in model.policy.optimizer.param_groups} == {
        "actor": (0.5, 0.9),
        "critic": (0.9, 0.999),
    }
    assert isinstance(model, PPO)


class _OwnAdaHesScale(AdaHesScale):
    """A user's variant."""


@pytest.mark.parametrize("optimizer_class", [_OwnAdaHesScale, functools.partial(AdaHesScale, eps=1e-7)])
def test_variants_of_adahesscale_keep_the_algorithms_defaults(optimizer_class: Any) -> None:
    plain = PPO(HesScaleActorCriticPolicy, "CartPole-v1", device="cpu")
    varied = PPO(
        HesScaleActorCriticPolicy, "CartPole-v1", device="cpu", policy_kwargs={"optimizer_class": optimizer_class}
    )
    for group, expected in zip(varied.policy.optimizer.param_groups, plain.policy.optimizer.param_groups, strict=True):
        assert {k: group[k] for k in ("lr_scale", "delta")} == {k: expected[k] for k in ("lr_scale", "delta")}
    if isinstance(optimizer_class, functools.partial):
        assert varied.policy.optimizer.param_groups[0]["eps"] == 1e-7


def test_the_state_of_another_optimizer_is_refused_before_anything_is_loaded() -> None:
    kwargs: dict[str, Any] = {"device": "cpu", "learning_starts": 8, "seed": 0}
    adam = DQN("MlpPolicy", "CartPole-v1", **kwargs).learn(40)
    ours = DQN(HesScaleDQNPolicy, "CartPole-v1", **kwargs)
    with pytest.raises(ValueError, match="exp_avg_sq"):
        ours.policy.optimizer.load_state_dict(adam.policy.optimizer.state_dict())
    assert not ours.policy.optimizer.state


def test_a_mixin_in_the_second_place_is_refused() -> None:
    with pytest.raises(TypeError, match="write the mixin first"):

        class Wrong(ActorCriticPolicy, HesScaleActorCriticMixin):
            pass


def test_a_frozen_critic_leaves_the_actors_loss_its_curvature() -> None:
    model = PPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=16, batch_size=16, device="cpu")
    for module in (model.policy.value_net, model.policy.mlp_extractor.value_net):
        module.requires_grad_(False)
    before = model.policy.action_net.weight.detach().clone()
    model.learn(16)
    assert not torch.equal(before, model.policy.action_net.weight)


def test_a_loss_of_log_probabilities_alone_has_curvature_where_they_are_tagged() -> None:
    policy = PPO(HesScaleActorCriticPolicy, "CartPole-v1", device="cpu").policy
    _, log_prob, _ = policy.evaluate_actions(torch.randn(8, 4), torch.randint(2, (8,)))
    policy.optimizer.zero_grad()
    (-policy.seam.tag(log_prob).mean()).backward()
    assert policy.action_net.weight.hess_diag is not None
    policy.optimizer.step()
