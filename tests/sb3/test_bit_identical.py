"""With an optimizer that uses no curvature, a run is Stable-Baselines3's own, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stable_baselines3 import A2C

from tests.sb3.cases import CASES, Case, named

SETTINGS = ("", "entropy bonus", "gSDE", "gSDE squashed", "separate extractors", "shared NatureCNN", "VecNormalize")
IMAGES = ("PPO-Discrete-NatureCNN", "DQN-Discrete-NatureCNN")
OWN = [case for case in CASES if case.setting in SETTINGS or str(case) in IMAGES]


def assert_identical(case: Case, **arguments: Any) -> None:
    runs = []
    for policy in (case.plain, case.policy):
        torch.manual_seed(1)
        model = case.build(policy, **arguments).learn(case.timesteps)
        runs.append((model.policy.state_dict(), torch.get_rng_state(), model.policy.predict(model.env.reset())[0]))
    (plain, plain_rng, plain_actions), (ours, our_rng, our_actions) = runs
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        assert torch.equal(value, ours[name]), name
    assert torch.equal(plain_rng, our_rng)
    assert (plain_actions == our_actions).all()


@pytest.mark.parametrize("case", OWN, ids=str)
def test_a_run_with_adam_is_that_of_stable_baselines(case: Case) -> None:
    assert_identical(case, policy_options={"optimizer_class": torch.optim.Adam})


@pytest.mark.parametrize("name", ["PPO-Box", "SAC-Box", "CrossQ-Box", "QRDQN-Discrete"])
def test_a_run_with_adam_and_its_options_is_that_of_stable_baselines(name: str) -> None:
    options = {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"eps": 1e-6, "betas": (0.8, 0.99)}}
    assert_identical(named(name), policy_options=options)


@pytest.mark.parametrize("options", [{"eps": 1e-5}, {"alpha": 0.95, "eps": 1e-5, "weight_decay": 0}], ids=str)
def test_a2c_with_an_explicit_rmsprop_is_that_of_stable_baselines(options: dict[str, float]) -> None:
    case = named("A2C-Discrete")
    assert case.algorithm is A2C
    assert_identical(case, policy_options={"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": options})


def test_a2c_without_rmsprop_may_name_adam() -> None:
    assert_identical(named("A2C-Box"), policy_options={"optimizer_class": torch.optim.Adam}, use_rms_prop=False)
