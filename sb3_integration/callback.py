"""Curvature and step statistics in Stable-Baselines3's logger."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from sb3_integration.loss_seam import optimizers_of
from sb3_integration.policies import HesScaleMixin


class HesScaleLoggingCallback(BaseCallback):
    """Records what the latest steps looked like, once per rollout, as ``hesscale/<network>/<statistic>``.

    Keys of every param group whose optimizer uses diagonals (``<network>`` is actor, critic or features):

    - ``scale``: the trust region's factor, 1 where it did not bind.
    - ``clipping``: the factor by which ``max_grad_norm`` shrank the gradients; it does not shorten the step.
    - ``mean_abs_update``: mean absolute change of a parameter in the step.
    - ``predicted_decrease``: fall of the quadratic model along the step.
    - ``curvature_mean_abs``, ``curvature_max_abs``, ``curvature_trace``, ``curvature_negative_fraction``: of the
      diagonal of one minibatch's loss, in units of the loss over the squared parameter.

    ``hesscale/skipped_steps`` is the number of steps skipped so far, where a
    :class:`hesscale_lightning.SkipNonfinite` was put on an optimizer of the policy.

    Reading a step's statistics costs about one more step, and happens once per rollout and network. An off-policy
    algorithm has a rollout per ``train_freq``; ``every_n_rollouts`` thins it out.

    Args:
        every_n_rollouts: How often to look.
        verbose: As for every callback.

    Raises:
        TypeError: When training starts, if the policy is not one of this package.
        ValueError: When training starts, if no optimizer uses diagonals, or ``every_n_rollouts`` is below 1.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from sb3_integration import HesScaleActorCriticPolicy, HesScaleLoggingCallback
        >>> model = PPO(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=64, device="cpu")
        >>> model = model.learn(192, callback=HesScaleLoggingCallback(), log_interval=100)
        >>> sorted(key for key in model.logger.name_to_value if key.startswith("hesscale/critic/s"))
        ['hesscale/critic/scale']
    """

    def __init__(self, every_n_rollouts: int = 1, verbose: int = 0) -> None:
        super().__init__(verbose)
        if every_n_rollouts < 1:
            raise ValueError(f"every_n_rollouts must be at least 1, got {every_n_rollouts}")
        self.every_n_rollouts = every_n_rollouts
        self._rollouts = 0

    def _on_training_start(self) -> None:
        policy = self.model.policy
        if not isinstance(policy, HesScaleMixin):
            raise TypeError(
                f"HesScaleLoggingCallback needs a policy of sb3_integration, got {type(policy).__name__}: pass for "
                "example HesScaleActorCriticPolicy instead of 'MlpPolicy'"
            )
        if not any(hasattr(optimizer, "awaits_diagonals") for optimizer in optimizers_of(policy)):
            names = sorted({type(optimizer).__name__ for optimizer in optimizers_of(policy)})
            raise ValueError(
                f"HesScaleLoggingCallback has nothing to log: {', '.join(names)} uses no curvature. Use AdaHesScale, "
                "the default of the policies, or a StepSizeScaling"
            )
        policy.seam.statistics.request()

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if (self._rollouts - 1) % self.every_n_rollouts:
            return
        policy = self.model.policy
        assert isinstance(policy, HesScaleMixin)
        for optimizer in optimizers_of(policy):
            if not hasattr(optimizer, "awaits_diagonals"):
                continue
            networks = [group.get("network", str(k)) for k, group in enumerate(optimizer.param_groups)]
            curvature = policy.seam.statistics.of(optimizer)
            for name, value in policy.seam.statistics.told_by(optimizer).items():
                statistic, _, index = name.partition("/")
                if curvature[int(index or 0)]:  # a group that never had gradients, as TRPO's actor, took no step
                    self.logger.record(f"hesscale/{networks[int(index or 0)]}/{statistic}", value.item())
            for network, statistics in zip(networks, curvature, strict=True):
                for name, value in statistics.items():
                    self.logger.record(f"hesscale/{network}/{name}", value.item())
        guards = [getattr(optimizer, "skip_nonfinite", None) for optimizer in optimizers_of(policy)]
        if any(guards):
            skipped = sum(guard.skipped for guard in guards if guard is not None)
            self.logger.record("hesscale/skipped_steps", skipped)
        policy.seam.statistics.request()

    def _on_step(self) -> bool:
        return True
