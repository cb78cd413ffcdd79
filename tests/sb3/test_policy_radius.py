"""The radius in nats: Fisher information, divergences and losses are what their definitions say, in every space."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from hesscale_lightning import AdaHesScale, StepSizeScaling
from hesscale_lightning.optim.radius import CALIBRATION_KEY
from sb3_integration import HesScaleActorCriticMixin, HesScaleActorCriticPolicy
from sb3_integration.policy_radius import PolicyRadius, kl_divergence, parameters_of
from tests.sb3.cases import CASES, Case, named

ON_POLICY = [case for case in CASES if case.algorithm.__name__ in ("PPO", "A2C", "MaskablePPO", "RecurrentPPO")]
SPACES = [
    "PPO-Discrete", "PPO-Box", "PPO-MultiDiscrete", "PPO-MultiBinary", "PPO-Box-gSDE", "PPO-Box-gSDE-expln",
    "PPO-Box-gSDE-squashed", "PPO-Box-gSDE-one-std-per-feature", "MaskablePPO-Discrete", "MaskablePPO-MultiDiscrete",
    "MaskablePPO-MultiBinary", "PPO-Discrete-NatureCNN", "RecurrentPPO-Box", "RecurrentPPO-Discrete-NatureCNN",
]  # fmt: skip


class Evaluations:
    """Notes the arguments of every evaluation for a loss, and the parameters of what was at hand then."""

    def __init__(self, model: Any) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        policy, evaluate = model.policy, model.policy.evaluate_actions

        def noting(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.calls.append((args, kwargs))
            return evaluate(*args, **kwargs)

        policy.evaluate_actions = noting


def one_minibatch(case: Case, **options: Any) -> Any:
    """A model that has made exactly one step, with its evaluations noted."""
    single = {"n_epochs": 1, "batch_size": 16} if hasattr(case.build(), "n_epochs") else {}
    model = case.build(**single, **options)
    noted = Evaluations(model)
    model.learn(16)
    return model, noted


def exact_information(model: Any, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The Hessian diagonal, by double backward, of torch's divergence from the policy as it is."""
    policy = model.policy
    with torch.no_grad():
        policy.evaluate_actions(*args, **kwargs)
        before = distributions(policy)
    policy.evaluate_actions(*args, **kwargs)
    divergence = torch_divergence(before, distributions(policy))
    params = {n: p for n, p in policy.named_parameters() if n in ("action_net.bias", "log_std")}
    found = {}
    for name, param in params.items():
        (grad,) = torch.autograd.grad(divergence, param, create_graph=True)
        rows = [torch.autograd.grad(entry, param, retain_graph=True)[0] for entry in grad.flatten()]
        found[name] = torch.stack([row.flatten() for row in rows]).diagonal().view_as(param)
    return found


def torch_divergence(before: list[Any], after: list[Any]) -> Tensor:
    total = torch.zeros(())
    for p, q in zip(before, after, strict=True):
        divergence = torch.distributions.kl_divergence(p, q)
        total = total + divergence.reshape(len(divergence), -1).sum(-1).mean()
    return total


@pytest.mark.parametrize("name", SPACES)
def test_the_actor_s_curvature_is_the_hessian_of_the_divergence(name: str) -> None:
    """At the last layer's bias and at log_std, where the diagonal loses nothing, for every distribution."""
    model, noted = one_minibatch(named(name))
    (args, kwargs) = noted.calls[-1]
    policy = model.policy
    policy.optimizer.zero_grad()
    values, log_prob, _ = policy.evaluate_actions(*args, **kwargs)
    (log_prob.exp().mean() + values.square().mean()).backward()
    found = {n: p.hess_diag for n, p in policy.named_parameters() if n in ("action_net.bias", "log_std")}
    expected = exact_information(model, args, kwargs)
    assert set(found) == set(expected)
    for n, h in found.items():
        torch.testing.assert_close(h, expected[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPACES)
def test_divergences_are_those_of_torch(name: str) -> None:
    model, noted = one_minibatch(named(name))
    (args, kwargs) = noted.calls[-1]
    policy = model.policy
    with torch.no_grad():
        policy.evaluate_actions(*args, **kwargs)
        before, old = distributions(policy), parameters_of(policy.action_dist)
        for p in policy.parameters():
            p.add_(0.01 * torch.randn_like(p))
        policy.evaluate_actions(*args, **kwargs)
        found = kl_divergence(old, parameters_of(policy.action_dist))
    expected = torch_divergence(before, distributions(policy))
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-6)
    assert found > 0


def distributions(policy: Any) -> list[Any]:
    dist = policy.action_dist
    found = getattr(dist, "distribution", None)
    found = dist.distributions if found is None else found
    return list(found) if isinstance(found, (list, tuple)) else [found]


@pytest.mark.parametrize("case", ON_POLICY, ids=str)
def test_a_step_stays_within_its_radius(case: Case) -> None:
    """Each of the first twenty steps is measured, and shortened if it goes four times too far."""
    model = case.build()
    radius: PolicyRadius = model.policy.policy_radius
    optimizer, found = model.policy.optimizer, []

    def note(*_: Any) -> None:
        radius._measured = None  # what is at hand is from before it was shortened
        found.append((radius._measure(), [(g["network"], g["delta"]) for g in optimizer.param_groups]))

    optimizer.register_step_post_hook(note)
    model.learn(32)
    assert found
    for measured, deltas in found[:20]:
        divergence, change = measured
        limits = dict(deltas)
        if "features" not in limits:  # whose step adds to both
            assert divergence is None or divergence <= 4.0 * limits["actor"] * 1.001
        assert change is None or math.isfinite(change)


def test_the_critic_s_loss_is_read_from_gradient_and_curvature() -> None:
    """``vf_coef`` times the mean squared error, for whatever ``vf_coef``."""
    for vf_coef in (0.5, 2.0):
        model = named("PPO-Box").build(vf_coef=vf_coef, n_epochs=1, batch_size=16)
        losses = []
        model.policy.optimizer.register_step_pre_hook(
            lambda *_, m=model: losses.append(m.policy.policy_radius.loss())  # noqa: B023
        )
        model.learn(16)
        assert losses[-1] == pytest.approx(vf_coef * model.logger.name_to_value["train/value_loss"], rel=1e-5)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_the_value_of_the_learning_rate_does_not_matter(algorithm: Any) -> None:
    runs = []
    for rate in (3e-6, 3e-4, 0.3):
        options = {"n_steps": 16, "batch_size": 16, "n_epochs": 2} if algorithm is PPO else {"n_steps": 16}
        model = algorithm(HesScaleActorCriticPolicy, "CartPole-v1", seed=0, device="cpu", learning_rate=rate, **options)
        model.learn(64)
        runs.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_a_rate_beyond_its_schedule_takes_no_more_than_the_step_that_fits(copied: bool) -> None:
    """Raised by hand, as ``model.learning_rate`` and ``lr_schedule`` can be at any time."""
    runs = []
    for rate in (1e-3, 0.1):
        model = named("PPO-Box").build(learning_rate=1e-3)
        np.random.seed(0)
        model.learn(16)
        if copied:
            model.policy = pickle.loads(pickle.dumps(model.policy))
        model.learning_rate = rate
        model._setup_lr_schedule()
        model.learn(16)
        runs.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_its_schedule_anneals_the_steps() -> None:
    """At half the rate a step is half as long as the calibration lets it be, and so on down to nothing."""
    model = named("PPO-Box").build(learning_rate=LinearSchedule(1e-2, 0.0, 1.0), n_epochs=1, batch_size=16)
    optimizer, predicted = model.policy.optimizer, []
    optimizer.register_step_post_hook(
        lambda *_: predicted.append([r.size * r.size * r.along for r in optimizer._latest])
    )
    limits: list[list[float]] = []
    limit = optimizer._regions.limit

    def noting(index: int, group: dict[str, Any]) -> float:
        limits.append(limit(index, group))
        return limits[-1]

    optimizer._regions.limit = noting
    model.learn(16 * 4)
    for step, rate in enumerate([0.75, 0.5, 0.25, 0.0]):
        for index in range(2):
            allowed = 2 * limits[2 * step + index]
            if step:  # the first was shortened, by its measure
                assert predicted[step][index] == pytest.approx(rate**2 * allowed)


def test_what_is_shared_moves_neither_too_far() -> None:
    model = named("PPO-Discrete-NatureCNN").build(n_epochs=1, batch_size=16)
    seen: list[float] = []
    radius = model.policy.policy_radius

    def note(*_: Any) -> None:
        radius._measured = None
        seen.append(radius.shared_change())

    model.policy.optimizer.register_step_post_hook(note)
    model.learn(16 * 5)
    assert all(0 < size < 16 for size in seen), seen
    groups = {group["network"]: group for group in model.policy.optimizer.param_groups}
    assert groups["features"]["delta"] == 1.0
    assert groups["features"][CALIBRATION_KEY][0] == len(seen)


def test_what_is_shared_goes_by_the_networks_that_have_a_radius() -> None:
    """A group without one, or of none of the networks, does not count."""
    model = named("PPO-Discrete-NatureCNN").build(n_epochs=1, batch_size=16)
    model.learn(16)
    optimizer = model.policy.optimizer
    extra = torch.nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [("extra", extra)]})
    for group in optimizer.param_groups:
        if group.get("network") == "critic":
            group["delta"] = None
    model.learn(16)
    radius = model.policy.policy_radius
    assert radius.shared_change() == radius.divergence() / 3e-4


def test_adam_s_direction_in_the_same_region() -> None:
    def scaled(params: Any, lr: float, **kwargs: Any) -> StepSizeScaling:
        return StepSizeScaling(torch.optim.Adam(params, lr=lr, **kwargs), denominator="abs", damping=0.01)

    options = {"optimizer_class": scaled, "radius": "kl"}
    model = named("PPO-Box").build(learning_rate=1.0, policy_options=options)
    found: list[float] = []
    radius = model.policy.policy_radius

    def note(*_: Any) -> None:
        radius._measured = None
        found.append(radius.divergence())

    model.policy.optimizer.register_step_post_hook(note)
    model.learn(32)
    assert [g["scaling_delta"] for g in model.policy.optimizer.param_groups] == [3e-4, 1e-3]
    assert all(0 < divergence <= 4 * 3e-4 * 1.001 for divergence in found), found


def test_the_measure_changes_nothing_but_the_step() -> None:
    """Random numbers, gradients and training mode are as they were: with an infinite radius steps are as without."""
    finals = []
    for every in (1, 10**9):
        model = named("PPO-Box").build(
            policy_options={"actor_optimizer_kwargs": {"delta": 1e30}, "critic_optimizer_kwargs": {"delta": 1e30}}
        )
        for radius in model.policy.optimizer.radii:
            radius.every, radius.warmup = every, 0
        np.random.seed(0)
        model.learn(32)
        finals.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    assert torch.equal(*finals)


class Preprocessing(HesScaleActorCriticPolicy):
    """Hands on other observations than it is asked with, in a form of its own."""

    def forward(self, obs: Tensor, deterministic: bool = False) -> Any:
        return super().forward(3 * obs - 2, deterministic)

    def predict_values(self, obs: Tensor) -> Tensor:
        return super().predict_values(3 * obs - 2)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> Any:
        return super().evaluate_actions(3 * obs - 2, actions)


class Twice(HesScaleActorCriticPolicy):
    """Evaluates two batches of different sizes for one loss."""

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        aside = super().evaluate_actions(obs[:3], actions[:3])
        return values + self.weight * aside[0].mean(), log_prob + self.weight * aside[1].mean(), entropy

    weight = 0.1


class TwiceForOne(Twice):
    """The same, and the second goes nowhere."""

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> Any:
        found = HesScaleActorCriticPolicy.evaluate_actions(self, obs, actions)
        HesScaleActorCriticPolicy.evaluate_actions(self, obs[:3], actions[:3])
        return found


@pytest.mark.parametrize("policy", [Preprocessing, Twice, TwiceForOne])
def test_what_is_measured_is_what_was_evaluated_for_the_loss(policy: Any) -> None:
    """Of a policy with an ``evaluate_actions`` of its own, too: a step of zero is measured as zero."""
    model = named("PPO-Box").build(policy=policy)
    radius, optimizer = model.policy.policy_radius, model.policy.optimizer
    found: list[tuple[float | None, float | None]] = []

    def note(*_: Any) -> None:
        radius._measured = None
        found.append(radius._measure())

    optimizer.register_step_post_hook(note)
    model.learn(32)
    assert len(found) == 8
    for divergence, change in found:
        assert divergence is not None
        assert 0.3 * 3e-4 < divergence < 4 * 3e-4
        assert change is not None
        assert 0 < change < math.inf
    found.clear()
    for group in optimizer.param_groups:
        group["delta"] = 1e-30
    model.learn(16)
    for divergence, change in found:
        assert divergence == pytest.approx(0, abs=1e-12)
        assert change == pytest.approx(0, abs=1e-9)


class Constant(torch.nn.Module):
    """The same output whatever the input, a view of a parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.output = torch.nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.output.expand(len(x), -1)


class ConstantActor(HesScaleActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = Constant(self.action_net.out_features)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


@pytest.mark.parametrize("name", ["PPO-Box", "PPO-MultiBinary", "PPO-Discrete"])
def test_parameters_of_a_distribution_may_be_parameters_of_the_network(name: str) -> None:
    """Which the step then changes."""
    model = named(name).build(policy=ConstantActor, n_epochs=1, batch_size=16)
    policy, before, found = model.policy, [], []
    policy.optimizer.register_step_pre_hook(
        lambda *_: before.append([(x[0].clone(), *x[1:]) for x in parameters_of(policy.action_dist)])
    )

    def note(*_: Any) -> None:
        policy.policy_radius._measured = None
        measured = policy.policy_radius.divergence()
        found.append((measured, float(kl_divergence(before[-1], parameters_of(policy.action_dist)))))

    policy.optimizer.register_step_post_hook(note)
    model.learn(32)
    for measured, expected in found:
        assert measured == pytest.approx(expected)
        assert 0 < measured < 4 * 3e-4


class OddDistribution(DiagGaussianDistribution):
    """Of a kind whose divergence is not known."""

    def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> Any:
        self.distribution = torch.distributions.Laplace(mean_actions, log_std.exp())
        return self


class OddPolicy(HesScaleActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = OddDistribution(self.action_space.shape[0])
        super()._build(lr_schedule)


def test_a_distribution_that_is_not_known_is_refused() -> None:
    model = named("PPO-Box").build(policy=OddPolicy)
    with pytest.raises(TypeError, match=r"does not know the KL divergence of OddDistribution, .* Laplace:"):
        model.learn(16)
    named("PPO-Box").build(policy=OddPolicy, policy_options={"radius": "loss"}).learn(16)


class OwnDistribution(ActorCriticPolicy):
    """Leaves ``action_dist`` as it was after the latest rollout."""

    def evaluate_actions(self, obs: Any, actions: Tensor) -> Any:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        dist: Any = DiagGaussianDistribution(self.action_space.shape[0])
        dist = dist.proba_distribution(self.action_net(latent_pi), self.log_std)
        return self.value_net(latent_vf), dist.log_prob(actions), dist.entropy()


class OwnDistributionPolicy(HesScaleActorCriticMixin, OwnDistribution):
    pass


def test_a_distribution_out_of_sight_is_refused() -> None:
    """Not taken for one that no step changes."""
    model = named("PPO-Box").build(policy=OwnDistributionPolicy)
    with pytest.raises(RuntimeError, match="evaluate_actions of OwnDistributionPolicy has not set"):
        model.learn(16)
    named("PPO-Box").build(policy=OwnDistributionPolicy, policy_options={"radius": "loss"}).learn(16)


class WithoutLogStd(HesScaleActorCriticPolicy):
    """Whose standard deviation is a network's output."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        del self.log_std
        self.log_std_net = torch.nn.Linear(self.mlp_extractor.latent_dim_pi, self.action_space.shape[0])
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return self.action_dist.proba_distribution(self.action_net(latent_pi), self.log_std_net(latent_pi))


def test_a_gaussian_without_log_std_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a policy with log_std, which WithoutLogStd has not; pass"):
        named("PPO-Box").build(policy=WithoutLogStd)
    named("PPO-Box").build(policy=WithoutLogStd, policy_options={"radius": "loss"}).learn(16)


class BuiltAlone(HesScaleActorCriticPolicy):
    """Builds itself without asking its base classes, which read the schedule of the learning rate there."""

    def _build(self, lr_schedule: Any) -> None:
        ActorCriticPolicy._build(self, lr_schedule)


def test_a_policy_that_builds_itself_has_the_same_steps() -> None:
    finals = []
    for policy in (HesScaleActorCriticPolicy, BuiltAlone):
        model = named("PPO-Box").build(policy=policy)
        np.random.seed(0)
        model.learn(32)
        finals.append(torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
    assert torch.equal(*finals)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("PPO-Box", {"radius": "nats"}, 'radius must be "kl" or "loss", got \'nats\''),
        ("DQN-Discrete", {"radius": "kl"}, "radius='kl' is for policies of PPO, A2C"),
        ("SAC-Box", {"radius": "kl"}, "radius='kl' is for policies of PPO, A2C"),
        ("TRPO-Box", {"radius": "kl"}, "radius='kl' is for policies of PPO, A2C"),
        ("PPO-Box", {"method": "hesscale"}, "method must be hesscale_gn.*'hesscale'.*radius=\"loss\""),
        ("PPO-Box", {"optimizer_kwargs": {"delta": None}}, 'delta is None.*radius="loss"'),
        ("PPO-Box", {"actor_optimizer_kwargs": {"delta": None}}, 'delta is None.*radius="loss"'),
        ("PPO-Box", {"optimizer_class": torch.optim.Adam, "radius": "kl"}, "needs an optimizer with a trust region"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        named(name).build(policy_options=options)


def test_the_radius_of_the_loss_is_there_still() -> None:
    model = named("PPO-Box").build(policy_options={"radius": "loss", "method": "hesscale"})
    assert model.policy.policy_radius is None
    assert isinstance(model.policy.optimizer, AdaHesScale)
    assert not any(model.policy.optimizer.radii)
    model.learn(32)


def test_dropout_and_batch_normalisation_are_not_measured() -> None:
    """The measure leaves out the same units and leaves running statistics alone: without a step nothing has changed."""
    model = PPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=16, batch_size=16, seed=0, device="cpu")
    policy = model.policy
    layers = [torch.nn.BatchNorm1d(64, affine=False), torch.nn.Dropout(0.5)]
    for net in (policy.mlp_extractor.policy_net, policy.mlp_extractor.value_net):
        net.extend(layers)
    policy.set_training_mode(True)
    observations, actions = torch.randn(16, 4), torch.randint(2, (16,))
    values, log_prob, _ = policy.evaluate_actions(observations, actions)
    (log_prob.mean() + values.square().mean()).backward()
    seen, random = layers[0].num_batches_tracked.clone(), torch.get_rng_state()
    radius = policy.policy_radius
    assert radius.divergence() == 0.0
    assert radius.value_change() == 0.0
    assert torch.equal(layers[0].num_batches_tracked, seen)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        policy.action_net.bias[0] += 0.1
    radius._measured = None
    assert radius.divergence() == pytest.approx(0.1**2 / 8, rel=0.05)  # p (1 - p) / 2 (0.1)^2 where p is nearly 1/2


def test_a_last_layer_that_was_exchanged_is_watched() -> None:
    model = PPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=16, batch_size=16, seed=0, device="cpu")
    policy = model.policy
    policy.value_net = torch.nn.Linear(64, 1)
    values, log_prob, _ = policy.evaluate_actions(torch.randn(16, 4), torch.randint(2, (16,)))
    (log_prob.mean() + values.square().mean()).backward()
    with torch.no_grad():
        policy.value_net.bias += 0.1
    assert policy.policy_radius.value_change() == pytest.approx(0.1**2, rel=1e-4)
