"""The compiled algorithms make the updates and log the values of Stable-Baselines3's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger

from hesscale_lightning.compiled_step import Step
from sb3_integration import (
    CompiledA2C,
    CompiledDDPG,
    CompiledDQN,
    CompiledPPO,
    CompiledSAC,
    CompiledTD3,
    HesScaleActorCriticPolicy,
    HesScaleDQNPolicy,
    HesScaleLoggingCallback,
    HesScaleSACPolicy,
    HesScaleTD3Policy,
)

CAPTURED = {"backend": "eager", "on_failure": "raise", "silent": True}


class Kept(Logger):
    """Keeps what was recorded last under each key."""

    def __init__(self) -> None:
        super().__init__(None, [])
        self.values: dict[str, Any] = {}

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        self.values[key] = value


def trained(cls: Any, policy: Any, environment: str, steps: int, **options: Any) -> tuple[Any, dict[str, Any]]:
    callback = options.pop("callback", None)
    if "policy_kwargs" in options:
        options["policy_kwargs"] = dict(options["policy_kwargs"])  # SAC writes into it
    model = cls(policy, environment, seed=0, device="cpu", **options)
    model.compile_step_options = CAPTURED
    logger = Kept()
    model.set_logger(logger)
    for radius in getattr(getattr(model.policy, "optimizer", None), "radii", ()):
        if radius is not None:
            radius.warmup = 1  # measured updates are not compiled
    model.learn(steps, callback=callback() if callback else None)
    return model, logger.values


ADAM = {"policy_kwargs": {"optimizer_class": torch.optim.Adam}}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ppo": (PPO, CompiledPPO, {}),
    "ppo, entropy and clipped values": (PPO, CompiledPPO, {"ent_coef": 0.01, "clip_range_vf": 0.2}),
    "ppo, schedules": (
        PPO,
        CompiledPPO,
        {"clip_range": lambda left: 0.1 + 0.1 * left, "learning_rate": lambda left: 1e-3 * left},
    ),
    "ppo, radius of the loss": (PPO, CompiledPPO, {"policy_kwargs": {"radius": "loss"}}),
    "ppo, radius of the loss, target_kl": (
        PPO,
        CompiledPPO,
        {"policy_kwargs": {"radius": "loss"}, "target_kl": 1e-4, "learning_rate": 0.01},
    ),
    "a2c, radius of the loss": (A2C, CompiledA2C, {"policy_kwargs": {"radius": "loss"}}),
    "ppo, target_kl": (PPO, CompiledPPO, {"target_kl": 1e-4, "learning_rate": 0.01}),
    "ppo, short batches": (PPO, CompiledPPO, {"batch_size": 48}),
    "ppo, logged": (PPO, CompiledPPO, {"callback": HesScaleLoggingCallback}),
    "ppo, adam": (PPO, CompiledPPO, ADAM),
    "a2c": (A2C, CompiledA2C, {}),
    "a2c, entropy": (A2C, CompiledA2C, {"ent_coef": 0.01, "normalize_advantage": True}),
    "a2c, adam": (A2C, CompiledA2C, ADAM),
}


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("name", CASES)
def test_first_updates_and_logged_values_are_those_of_the_uncompiled_algorithm(name, environment):
    plain, compiled, options = CASES[name]
    if plain is PPO:
        options = {"n_steps": 128, "n_epochs": 2, "batch_size": 64, **options}
    steps = 256 if plain is PPO else 30
    eager, expected = trained(plain, HesScaleActorCriticPolicy, environment, steps, **options)
    model, values = trained(compiled, HesScaleActorCriticPolicy, environment, steps, **options)
    for (key, p), q in zip(model.policy.named_parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert set(values) == set(expected)
    for key, value in expected.items():
        if key.startswith(("train/", "hesscale/")):
            assert values[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    assert model._n_updates == eager._n_updates
    measured = getattr(model.policy, "policy_radius", None) is not None
    expected_programs = 0 if measured and "target_kl" in options else 1
    assert all(step.programs == expected_programs for step in model._steps.values())


def test_updates_that_a_radius_measures_are_programs_too(monkeypatch):
    """But for the first, of which nothing is known."""
    eager, measured = [], []
    original = Step.eagerly
    monkeypatch.setattr(Step, "eagerly", lambda self, *batch: eager.append(1) or original(self, *batch))
    look = CompiledPPO._look_before
    monkeypatch.setattr(CompiledPPO, "_look_before", lambda self, *batch: measured.append(1) or look(self, *batch))
    model, _ = trained(CompiledPPO, HesScaleActorCriticPolicy, "Pendulum-v1", 256, n_steps=256, n_epochs=4)
    assert len(eager) == 1
    assert len(measured) == 16 // 4
    (steps, *_), *_ = (group["radius_calibration"] for group in model.policy.optimizer.param_groups)
    assert steps == 16


def test_stable_baselines_own_policy_is_compiled_without_curvature():
    eager, _ = trained(PPO, "MlpPolicy", "CartPole-v1", 128, n_steps=128, n_epochs=2)
    model, _ = trained(CompiledPPO, "MlpPolicy", "CartPole-v1", 128, n_steps=128, n_epochs=2)
    for p, q in zip(model.policy.parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert getattr(p, "hess_diag", None) is None


def test_a_saved_model_goes_on(tmp_path):
    model, _ = trained(CompiledPPO, HesScaleActorCriticPolicy, "CartPole-v1", 128, n_steps=64, n_epochs=1)
    model.save(tmp_path / "model")
    loaded = CompiledPPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.compile_step_options = CAPTURED
    before = [p.detach().clone() for p in loaded.policy.parameters()]
    loaded.learn(64)
    assert any(not torch.equal(p, q) for p, q in zip(loaded.policy.parameters(), before, strict=True))
    plain = PPO.load(tmp_path / "model", device="cpu")
    for p, q in zip(plain.policy.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


LOGGED = {"callback": lambda: HesScaleLoggingCallback(every_n_rollouts=4)}
EXTRACTED = {"policy_kwargs": {"share_features_extractor": True, "net_arch": [16]}}
OFF_POLICY: dict[str, tuple[Any, Any, Any, str, dict[str, Any]]] = {
    "dqn": (DQN, CompiledDQN, HesScaleDQNPolicy, "CartPole-v1", {"target_update_interval": 7}),
    "dqn, adam": (DQN, CompiledDQN, HesScaleDQNPolicy, "CartPole-v1", ADAM),
    "dqn, plain policy, n-step returns": (DQN, CompiledDQN, "MlpPolicy", "CartPole-v1", {"n_steps": 3}),
    "dqn, logged": (DQN, CompiledDQN, HesScaleDQNPolicy, "CartPole-v1", LOGGED),
    "sac": (SAC, CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", {}),
    "sac, fixed entropy coefficient": (SAC, CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", {"ent_coef": 0.1}),
    "sac, shared extractor": (SAC, CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", EXTRACTED),
    "sac, adam": (SAC, CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", ADAM),
    "sac, logged": (SAC, CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", LOGGED),
    "td3": (TD3, CompiledTD3, HesScaleTD3Policy, "Pendulum-v1", {}),
    "td3, shared extractor": (TD3, CompiledTD3, HesScaleTD3Policy, "Pendulum-v1", EXTRACTED),
    "td3, logged": (TD3, CompiledTD3, HesScaleTD3Policy, "Pendulum-v1", LOGGED),
    "td3, plain policy": (TD3, CompiledTD3, "MlpPolicy", "Pendulum-v1", {"policy_delay": 1}),
    "ddpg": (DDPG, CompiledDDPG, HesScaleTD3Policy, "Pendulum-v1", {}),
}


@pytest.mark.parametrize("name", OFF_POLICY)
def test_first_updates_of_off_policy_algorithms_are_those_of_the_uncompiled(name, monkeypatch):
    def noise(mean, std):  # the same at every call, because SAC's two draws change places
        return torch.linspace(-1.5, 1.5, mean.numel(), dtype=mean.dtype).reshape(mean.shape)

    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal",
        lambda shape, dtype, device: noise(torch.zeros(shape, dtype=dtype), None),
    )
    plain, compiled, policy, environment, options = OFF_POLICY[name]
    options = {"learning_starts": 20, "train_freq": 1, "batch_size": 16, **options}
    eager, expected = trained(plain, policy, environment, 28, **options)
    model, values = trained(compiled, policy, environment, 28, **options)
    for (key, p), q in zip(model.policy.named_parameters(), eager.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=5e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert set(values) == set(expected)
    for key, value in expected.items():
        if key.startswith(("train/", "hesscale/")):
            assert values[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    assert model._n_updates == eager._n_updates > 5
    assert [step.programs for step in model._steps.values()] == [1] * (1 if plain is DQN else 2)
    assert all(p.requires_grad for p in model.policy.parameters()) is all(
        p.requires_grad for p in eager.policy.parameters()
    )


def test_gsde_of_sac_is_not_compiled():
    with pytest.warns(UserWarning, match="use_sde=True"):
        model, _ = trained(CompiledSAC, HesScaleSACPolicy, "Pendulum-v1", 25, learning_starts=20, use_sde=True)
    assert not model._steps
