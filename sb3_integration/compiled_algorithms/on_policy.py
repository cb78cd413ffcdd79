"""PPO and A2C whose updates are compiled: Stable-Baselines3's algorithms with another ``train()``.

An update of a minibatch, from ``evaluate_actions`` to the optimizer's step, is one program
(:mod:`hesscale_lightning.compiled_step`). Everything else is Stable-Baselines3's own: rollouts, arguments, policies,
saving.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

from hesscale_lightning.compiled_step import Step
from sb3_integration.compiled_algorithms.updates import CompiledUpdates


class CompiledOnPolicyUpdates(CompiledUpdates, OnPolicyAlgorithm):
    """What CompiledPPO and CompiledA2C have in common."""

    def _policy_step(self, *, updates: bool) -> Step:
        """The update of a minibatch, or its gradient alone."""
        step = self._step(
            "the update" if updates else "the gradient",
            [self.policy],
            self._loss,
            self.policy.optimizer,
            updates=updates,
            max_grad_norm=self.max_grad_norm,
        )
        if updates:
            step.look_before = None if getattr(self.policy, "policy_radius", None) is None else self._look_before
        return step

    def _update(self, *batch: Any) -> Tensor:
        """Updates the policy; returns what ``_loss`` returns beside the loss."""
        told: Tensor = self._run(self._policy_step(updates=True), *batch)
        return told

    def _loss(self, *batch: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _look_before(self, observations: Any, actions: Tensor, *others: Any) -> None:
        """Evaluates what the next update will be measured on, and the curvature of its loss at the values."""
        policy: Any = self.policy
        evaluation = policy.look_before(observations, self._as_evaluated(actions))
        if evaluation.values is not None:
            evaluation.curvature = self._value_curvature(evaluation.values, *others)

    def _value_curvature(self, values: Tensor, *others: Any) -> Tensor:
        raise NotImplementedError

    def _as_evaluated(self, actions: Tensor) -> Tensor:
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def _evaluate(self, observations: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``evaluate_actions`` without a tag on the values, and without a trace on the policy."""
        policy: Any = self.policy
        actions = self._as_evaluated(actions)
        with self._without_tags():
            distribution, policy.action_dist = policy.action_dist, copy.copy(policy.action_dist)
            try:
                values, log_prob, entropy = policy.evaluate_actions(observations, actions)
            finally:
                policy.action_dist = distribution
        return values.flatten(), log_prob, entropy

    def _begin_training(self) -> None:
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)

    def _record_explained_variance_and_std(self) -> None:
        buffer = self.rollout_buffer
        self.logger.record(
            "train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        )
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())


class CompiledPPO(CompiledOnPolicyUpdates, PPO):
    """PPO with compiled updates: the arguments, policies and logged values of ``stable_baselines3.PPO``.

    The policy's optimizer is part of the program if it is AdaHesScale, as with the policies of this package; others,
    and all with ``target_kl``, which decides before each update, step after it. With a radius in nats an
    update that is measured takes two evaluations without gradient more; the first runs eagerly, and with ``target_kl``
    all do. The first update takes 10 to
    30 seconds to compile, later processes find it in Inductor's cache. What cannot be captured runs as in PPO, with a
    warning.

    Example:
        >>> from sb3_integration import CompiledPPO, HesScaleActorCriticPolicy
        >>> CompiledPPO.compile_step_options = {"backend": "eager", "silent": True}  # compiles nothing
        >>> model = CompiledPPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=64, device="cpu").learn(64)
        >>> CompiledPPO.compile_step_options = {}

    Equations: Schulman and others, "Proximal Policy Optimization Algorithms", arXiv 1707.06347, and
    Stable-Baselines3's ``ppo.py``.
    """

    def train(self) -> None:
        """Updates the policy with the rollout buffer, as ``PPO.train``."""
        self._begin_training()
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        bounds = torch.tensor([1 - clip_range, 1 + clip_range, clip_range], device=self.device)
        bound_vf = clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            bound_vf = torch.tensor(clip_range_vf, device=self.device)
        told: list[Tensor] = []
        last_epoch = 0
        for epoch in range(self.n_epochs):
            last_epoch, stopped = len(told), False
            for data in self.rollout_buffer.get(self.batch_size):
                batch = (*data[:6], bounds, bound_vf, self.ent_coef, self.vf_coef, self.normalize_advantage)
                if self.target_kl is None:
                    told.append(self._update(*batch))
                else:
                    told.append(self._gradient(*batch))
                    kl = told[-1][4].item()
                    if kl > 1.5 * self.target_kl:
                        stopped = True
                        self.policy.optimizer.zero_grad()
                        if self.verbose >= 1:
                            print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")  # noqa: T201
                        break
                    torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                    self.policy.optimizer.step()
            self._n_updates += 1
            if stopped:
                break
        values = torch.stack(told).cpu().double().numpy()
        for k, name in enumerate(("policy_gradient_loss", "value_loss", "entropy_loss", "clip_fraction")):
            self.logger.record(f"train/{name}", np.mean(values[:, k]))
        self.logger.record("train/approx_kl", np.mean(values[last_epoch:, 4]))
        self.logger.record("train/loss", float(values[-1, 5]))
        self._record_explained_variance_and_std()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)

    def _gradient(self, *batch: Any) -> Tensor:
        self.policy.optimizer.zero_grad()
        step = self._policy_step(updates=False)
        # A radius in nats asks what was evaluated for the loss, and the optimizer steps by itself here.
        measured = getattr(self.policy, "policy_radius", None) is not None
        _, told = step.eagerly(*batch) if measured else step(*batch)
        result: Tensor = told
        return result

    def _loss(
        self,
        observations: Any,
        actions: Tensor,
        old_values: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        returns: Tensor,
        bounds: Tensor,
        bound_vf: Tensor | None,
        ent_coef: float,
        vf_coef: float,
        normalize_advantage: bool,
    ) -> tuple[Tensor, Tensor]:
        values, log_prob, entropy = self._evaluate(observations, actions)
        if normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        low, high, clip_range = bounds.unbind()
        ratio = torch.exp(log_prob - old_log_prob)
        policy_loss = -torch.min(advantages * ratio, advantages * torch.clamp(ratio, low, high)).mean()
        if bound_vf is not None:
            values = old_values + torch.clamp(values - old_values, -bound_vf, bound_vf)
        value_loss = F.mse_loss(returns, values)
        entropy_loss = -torch.mean(-log_prob if entropy is None else entropy)
        loss = policy_loss + ent_coef * entropy_loss + vf_coef * value_loss
        with torch.no_grad():
            clip_fraction = torch.mean((torch.abs(ratio - 1) > clip_range).float())
            log_ratio = log_prob - old_log_prob
            approx_kl = torch.mean((torch.exp(log_ratio) - 1) - log_ratio)
            told = torch.stack([policy_loss, value_loss, entropy_loss, clip_fraction, approx_kl, loss])
        return loss, told

    def _value_curvature(self, values: Tensor, old_values: Tensor, *others: Any) -> Tensor:
        bound_vf, _, vf_coef, _ = others[-4:]
        curvature = torch.full_like(values, 2 * vf_coef / len(values))
        if bound_vf is None:
            return curvature
        moved: Tensor = (values - old_values.reshape(values.shape)).abs()
        inside: Tensor = curvature * (moved <= bound_vf)
        return inside


class CompiledA2C(CompiledOnPolicyUpdates, A2C):
    """A2C with compiled updates: the arguments, policies and logged values of ``stable_baselines3.A2C``.

    See :class:`CompiledPPO`.

    Example:
        >>> from sb3_integration import CompiledA2C, HesScaleActorCriticPolicy
        >>> CompiledA2C.compile_step_options = {"backend": "eager", "silent": True}  # compiles nothing
        >>> model = CompiledA2C(HesScaleActorCriticPolicy, "CartPole-v1", device="cpu").learn(20)
        >>> CompiledA2C.compile_step_options = {}
    """

    def train(self) -> None:
        """Updates the policy with the rollout buffer, as ``A2C.train``."""
        self._begin_training()
        for data in self.rollout_buffer.get(batch_size=None):
            batch = (data.observations, data.actions, data.advantages, data.returns)
            told = self._update(*batch, self.ent_coef, self.vf_coef, self.normalize_advantage)
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, value in zip(("entropy_loss", "policy_loss", "value_loss"), told.tolist(), strict=True):
            self.logger.record(f"train/{name}", value)
        self._record_explained_variance_and_std()

    def _loss(
        self,
        observations: Any,
        actions: Tensor,
        advantages: Tensor,
        returns: Tensor,
        ent_coef: float,
        vf_coef: float,
        normalize_advantage: bool,
    ) -> tuple[Tensor, Tensor]:
        values, log_prob, entropy = self._evaluate(observations, actions)
        if normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = -(advantages * log_prob).mean()
        value_loss = F.mse_loss(returns, values)
        entropy_loss = -torch.mean(-log_prob if entropy is None else entropy)
        loss = policy_loss + ent_coef * entropy_loss + vf_coef * value_loss
        return loss, torch.stack([entropy_loss, policy_loss, value_loss]).detach()

    def _value_curvature(self, values: Tensor, *others: Any) -> Tensor:
        _, vf_coef, _ = others[-3:]
        return torch.full_like(values, 2 * vf_coef / len(values))
