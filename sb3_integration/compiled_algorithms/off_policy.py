"""DQN, SAC, TD3 and DDPG whose updates are compiled: Stable-Baselines3's algorithms with another ``train()``.

The update of a network, from the target's values to its optimizer's step, is one program: one for DQN, one each for
actor and critic of the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import polyak_update
from torch import Tensor, nn

from sb3_integration.compiled_algorithms.updates import CompiledUpdates


class CompiledOffPolicyUpdates(CompiledUpdates, OffPolicyAlgorithm):
    """What the compiled off-policy algorithms have in common."""

    def _sample(self, batch_size: int) -> tuple[Any, Any]:
        """Transitions, and the discount of each or of all."""
        assert self.replay_buffer is not None
        data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        return data, self.gamma if data.discounts is None else data.discounts

    def _record(self, **values: list[Tensor]) -> None:
        """Logs the means of what was gathered over the updates."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, gathered in values.items():
            if gathered:
                numbers = torch.stack([x.detach().reshape(()) for x in gathered])
                self.logger.record(f"train/{name}", np.mean(numbers.cpu().double().numpy()))


class CompiledDQN(CompiledOffPolicyUpdates, DQN):
    """DQN with compiled updates: the arguments, policies and logged values of ``stable_baselines3.DQN``.

    The policy's optimizer is part of the program if it is AdaHesScale, as with the policies of this package; others
    step after it. The first update takes some 10 seconds to compile, later processes find it in Inductor's cache. What
    cannot be captured runs as in DQN, with a warning.

    Example:
        >>> from sb3_integration import CompiledDQN, HesScaleDQNPolicy
        >>> CompiledDQN.compile_step_options = {"backend": "eager", "silent": True}  # compiles nothing
        >>> model = CompiledDQN(HesScaleDQNPolicy, "CartPole-v1", learning_starts=20, device="cpu").learn(40)
        >>> CompiledDQN.compile_step_options = {}

    Equations: Mnih and others, "Human-level control through deep reinforcement learning", Nature 518 (2015), and
    Stable-Baselines3's ``dqn.py``.
    """

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Updates the network with transitions of the replay buffer, as ``DQN.train``."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(gradient_steps):
            data, discounts = self._sample(batch_size)
            step = self._step(
                "the update",
                [self.q_net, self.q_net_target],
                self._loss,
                self.policy.optimizer,
                max_grad_norm=self.max_grad_norm,
            )
            losses.append(self._run(step, *data[:5], discounts))
        self._n_updates += gradient_steps
        self._record(loss=losses)

    def _loss(
        self,
        observations: Any,
        actions: Tensor,
        next_observations: Any,
        dones: Tensor,
        rewards: Tensor,
        discounts: float | Tensor,
    ) -> Tensor:
        with torch.no_grad():
            best = self.q_net_target(next_observations).amax(dim=1, keepdim=True)
            targets = rewards + (1 - dones) * discounts * best
        with self._without_tags():
            values = self.q_net(observations).gather(1, actions.long())
        return F.smooth_l1_loss(values, targets)


class CompiledCriticUpdates(CompiledOffPolicyUpdates):
    """What compiled algorithms with critics ``Q(s, a)`` have in common."""

    actor: Any
    critic: Any
    critic_target: Any
    _critic_factor: ClassVar[float] = 1.0

    def _next_value(self, next_observations: Any, drawn: Tensor) -> Tensor:
        """The value of the states that came next, of shape (batch, 1)."""
        raise NotImplementedError

    def _critic_loss(
        self,
        observations: Any,
        actions: Tensor,
        next_observations: Any,
        dones: Tensor,
        rewards: Tensor,
        discounts: float | Tensor,
        drawn: Tensor,
    ) -> Tensor:
        with self._without_tags():
            with torch.no_grad():
                targets = rewards + (1 - dones) * discounts * self._next_value(next_observations, drawn)
            errors = [F.mse_loss(values, targets) for values in self.critic(observations, actions)]
        return self._critic_factor * torch.stack(errors).sum()


class CompiledSAC(CompiledCriticUpdates, SAC):
    """SAC with compiled updates: the arguments, policies and logged values of ``stable_baselines3.SAC``.

    Critic and actor are updated by a program each, the entropy coefficient by the Adam that SAC makes for it. Within
    an update the critic's random actions are drawn before the actor's, in Stable-Baselines3 after them: runs are equal
    in distribution. With ``use_sde``, whose noise is kept by the actor from call to call, ``train()`` is SAC's own.
    See :class:`CompiledDQN`.

    Example:
        >>> from sb3_integration import CompiledSAC, HesScaleSACPolicy
        >>> CompiledSAC.compile_step_options = {"backend": "eager", "silent": True}  # compiles nothing
        >>> model = CompiledSAC(HesScaleSACPolicy, "Pendulum-v1", learning_starts=20, device="cpu").learn(25)
        >>> CompiledSAC.compile_step_options = {}

    Equations: Haarnoja and others, "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905, and
    Stable-Baselines3's ``sac.py``.
    """

    _critic_factor = 0.5

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Updates the networks with transitions of the replay buffer, as ``SAC.train``."""
        if self.use_sde:
            warnings.warn(
                "use_sde=True: the actor keeps its noise from call to call, which a program cannot; train() is SAC's "
                "own",
                stacklevel=2,
            )
            return super().train(gradient_steps, batch_size)
        self.policy.set_training_mode(True)
        entropy_optimizer = self.ent_coef_optimizer
        optimizers = [self.actor.optimizer, self.critic.optimizer]
        self._update_learning_rate([*optimizers, *([] if entropy_optimizer is None else [entropy_optimizer])])
        told: dict[str, list[Tensor]] = {"ent_coef": [], "actor_loss": [], "critic_loss": [], "ent_coef_loss": []}
        for gradient_step in range(gradient_steps):
            data, discounts = self._sample(batch_size)
            learned = self.log_ent_coef
            ent_coef = self.ent_coef_tensor if learned is None else learned.detach().exp()
            told["ent_coef"].append(ent_coef)
            critic = self._step(
                "the critic's update",
                [self.critic, self.critic_target, self.actor],
                self._critic_loss,
                self.critic.optimizer,
            )
            told["critic_loss"].append(self._run(critic, *data[:5], discounts, ent_coef))
            actor = self._step("the actor's update", [self.actor, self.critic], self._actor_loss, self.actor.optimizer)
            loss, log_prob = self._run(actor, data.observations, ent_coef).unbind()
            told["actor_loss"].append(loss)
            if entropy_optimizer is not None and learned is not None:
                ent_coef_loss = -(learned * (log_prob + self.target_entropy)).mean()
                entropy_optimizer.zero_grad()
                ent_coef_loss.backward()
                entropy_optimizer.step()
                told["ent_coef_loss"].append(ent_coef_loss)
            if gradient_step % self.target_update_interval == 0:
                _move_target(self.critic, self.critic_target, self.tau)
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        self._n_updates += gradient_steps
        self._record(**told)

    def _next_value(self, next_observations: Any, ent_coef: Tensor) -> Tensor:
        next_actions, log_prob = self.actor.action_log_prob(next_observations)
        bonus: Tensor = ent_coef * log_prob.reshape(-1, 1)
        return _lowest(self.critic_target(next_observations, next_actions)) - bonus

    def _actor_loss(self, observations: Any, ent_coef: Tensor) -> tuple[Tensor, Tensor]:
        with self._without_tags(), _held_still(self.critic, but=self.actor):
            actions, log_prob = self.actor.action_log_prob(observations)
            worst = torch.cat(self.critic(observations, actions), dim=1).min(dim=1, keepdim=True).values
            loss = (ent_coef * log_prob.reshape(-1, 1) - worst).mean()
        return loss, torch.stack([loss, log_prob.mean()]).detach()


class CompiledTD3(CompiledCriticUpdates, TD3):
    """TD3 with compiled updates: the arguments, policies and logged values of ``stable_baselines3.TD3``.

    Critic and actor are updated by a program each; see :class:`CompiledDQN`.

    Example:
        >>> from sb3_integration import CompiledTD3, HesScaleTD3Policy
        >>> CompiledTD3.compile_step_options = {"backend": "eager", "silent": True}  # compiles nothing
        >>> model = CompiledTD3(HesScaleTD3Policy, "Pendulum-v1", learning_starts=20, device="cpu").learn(25)
        >>> CompiledTD3.compile_step_options = {}

    Equations: Fujimoto, van Hoof, Meger, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv
    1802.09477, and Stable-Baselines3's ``td3.py``.
    """

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Updates the networks with transitions of the replay buffer, as ``TD3.train``."""
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer])
        told: dict[str, list[Tensor]] = {"actor_loss": [], "critic_loss": []}
        for _ in range(gradient_steps):
            self._n_updates += 1
            data, discounts = self._sample(batch_size)
            noise = torch.empty_like(data.actions).normal_(0, self.target_policy_noise)
            noise.clamp_(-self.target_noise_clip, self.target_noise_clip)
            critic = self._step(
                "the critic's update",
                [self.critic, self.critic_target, self.actor_target],
                self._critic_loss,
                self.critic.optimizer,
            )
            told["critic_loss"].append(self._run(critic, *data[:5], discounts, noise))
            if self._n_updates % self.policy_delay == 0:
                actor = self._step(
                    "the actor's update", [self.actor, self.critic], self._actor_loss, self.actor.optimizer
                )
                told["actor_loss"].append(self._run(actor, data.observations))
                _move_target(self.critic, self.critic_target, self.tau)
                _move_target(self.actor, self.actor_target, self.tau)
                polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
                polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)
        self._record(**told)

    def _next_value(self, next_observations: Any, noise: Tensor) -> Tensor:
        next_actions = (self.actor_target(next_observations) + noise).clamp(-1, 1)
        return _lowest(self.critic_target(next_observations, next_actions))

    def _actor_loss(self, observations: Any) -> Tensor:
        with self._without_tags(), _held_still(self.critic, but=self.actor):
            loss: Tensor = -self.critic.q1_forward(observations, self.actor(observations)).mean()
        return loss


class CompiledDDPG(CompiledTD3, DDPG):
    """DDPG with compiled updates: the arguments, policies and logged values of ``stable_baselines3.DDPG``.

    See :class:`CompiledTD3`.
    """


def _lowest(values: Sequence[Tensor]) -> Tensor:
    """The smallest of the critics' values, which overestimates least."""
    return torch.cat(list(values), dim=1).amin(dim=1, keepdim=True)


@contextmanager
def _held_still(network: nn.Module, *, but: nn.Module) -> Iterator[None]:
    """A network through which a loss leads that is not to move it, but for what it shares with another network."""
    shared = set(but.parameters())
    free = [p for p in network.parameters() if p.requires_grad and p not in shared]
    for p in free:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in free:
            p.requires_grad_(True)


@torch.no_grad()
def _move_target(network: nn.Module, target: nn.Module, tau: float) -> None:
    """``target = (1 - tau) target + tau network``, as ``polyak_update``, in two calls."""
    targets: list[Tensor] = list(target.parameters())
    torch._foreach_mul_(targets, 1 - tau)
    torch._foreach_add_(targets, [p.detach() for p in network.parameters()], alpha=tau)
