"""A trust region for actor and critic in units that every environment shares.

The actor's step is limited by the KL divergence, in nats, of the action distribution after it from that before, the
critic's by a fraction of its own loss. Both are measured on the minibatch of the step, by evaluating the same actions
once more without gradient. Between measurements the diagonal predicts, for which the actor's is the Fisher information:
the Hessian of that very divergence. It comes from the distribution's parameters, where it is known in closed form:

==================  =================================================
parameter           Fisher information of one sample
==================  =================================================
mean                ``1 / sigma^2``
log_std             2
logit               ``p (1 - p)``
gSDE's log_std      ``sum_actions (d variance / d log_std)^2 / (2 variance^2)``
==================  =================================================

The critic's is Gauss-Newton's of its loss, whose value is ``sum g^2 / (2 h)`` from the gradient and the curvature at
the values if it is quadratic, as the mean squared error is; the scale of the returns and ``vf_coef`` need not be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from hesscale_lightning.curvature import Operation, opaque, register_rule, with_curvature
from hesscale_lightning.optim.radius import CalibratedRadius, average_unit

_MASKED = -1e8  # as sb3-contrib's distributions set the logits of actions that are not allowed


class Evaluation:
    """One evaluation of actions for a loss: how to repeat it, what it gave, and what backward delivered at its values.

    Args:
        radius: Whose it is.
        repeat: Evaluates the same actions once more.
        masks: The actions that are allowed, where there are such masks.

    Attributes:
        random: State of the generators before it, with which it is repeated: dropout leaves out the same.
        before: Parameters of the distribution of actions.
        values: The output of ``value_net``.
        loss: The critic's loss, ``sum g^2 / (2 h)``, a scalar tensor; None before backward.
        curvature: h.
    """

    def __init__(self, radius: PolicyRadius, repeat: Callable[[], Any], masks: Tensor | None) -> None:
        self.radius = radius
        self.repeat = repeat
        self.masks = masks
        device = radius.policy.device
        self.random = [torch.get_rng_state()]
        if device.type == "cuda":
            self.random.append(torch.cuda.get_rng_state(device))
        self.before: list[tuple[Any, ...]] | None = None
        self.values: Tensor | None = None
        self.loss: Tensor | None = None
        self.curvature: Tensor | None = None

    def take(self, g: Tensor, h: Tensor) -> None:
        """Notes the gradient and curvature of one minibatch; of several evaluations this is now the one to measure."""
        self.loss = torch.where(h > 0, g * g / (2 * h), 0.0).sum()
        self.curvature = h.clone()
        self.radius.measure_on(self)


class ValueProbe(torch.autograd.Function):
    """The identity; its rule takes down what passes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, evaluation: Evaluation) -> Tensor:
        """Returns the values."""
        ctx.evaluation = evaluation
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Returns the gradient."""
        return grads[0], None


@register_rule("ValueProbeBackward", prepare=lambda op: op.node.evaluation)
def value_probe(op: Operation, g: Any, h: Any) -> Any:
    """``y = x``, and a note of g and h."""
    return _noted(op.prepared, g, h)


@opaque
def _noted(evaluation: Evaluation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    if g is not None and h is not None:
        evaluation.take(g, h)
    return None if h is None else h.clone()


class PolicyRadius:
    """Measures how far a step moves an actor-critic policy.

    Args:
        policy: Of PPO, A2C or a relative of theirs: with ``action_net``, ``value_net`` and ``evaluate_actions``.

    Raises:
        ValueError: If the policy's action distribution is not known here.
    """

    def __init__(self, policy: Any) -> None:
        refused = why_not(policy)
        if refused:
            raise ValueError(f'radius="kl" {refused}; pass radius="loss"')
        self.policy = policy
        self._hooks = {"action_net": _ActionHook(self), "value_net": _ValueHook(self)}
        self._forget()
        self._watch()

    def _forget(self) -> None:
        self._watched: Evaluation | None = None  # for a loss, under way
        self._of_step: Evaluation | None = None
        self._measuring = False
        self._values: Tensor | None = None  # while measuring
        self._measured: tuple[float | None, float | None] | None = None

    def _watch(self) -> None:
        """Hooks onto the last layers, also those that have been exchanged since."""
        for name, hook in self._hooks.items():
            layer = getattr(self.policy, name)
            if hook not in layer._forward_hooks.values():
                layer.register_forward_hook(hook)

    @contextmanager
    def _repeating(self, evaluation: Evaluation) -> Iterator[None]:
        """What is evaluated here draws the evaluation's random numbers, and leaves no trace in buffers."""
        device = self.policy.device
        kept = [(buffer, buffer.clone()) for buffer in self.policy.buffers()]
        self._measuring = True
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.set_rng_state(evaluation.random[0])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(evaluation.random[1], device)
                yield
        finally:
            self._measuring = False
            for buffer, before in kept:
                buffer.copy_(before)

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy, "_hooks": self._hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def evaluate(self, evaluate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluates actions for a loss: gives the Fisher information, and remembers the outputs.

        Args:
            evaluate: ``evaluate_actions`` of the policy's base class: an override may change what it is asked with.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        self._watch()
        masks = kwargs.get("action_masks", args[2] if len(args) > 2 else None) if self._can_mask() else None
        evaluation = self._watched = Evaluation(self, partial(evaluate, *args, **kwargs), masks)
        earlier = _distribution_of(self.policy.action_dist)
        try:
            outputs = evaluation.repeat()
        finally:
            self._watched = None
        if earlier is not None and _distribution_of(self.policy.action_dist) is earlier:
            raise RuntimeError(
                f"evaluate_actions of {type(self.policy).__name__} has not set policy.action_dist, in which "
                'radius="kl" looks for the distribution of actions: use policy.action_dist.proba_distribution(), or '
                'pass radius="loss"'
            )
        parameters = parameters_of(self.policy.action_dist)
        # Copies: they may be views of the network's parameters, which the step changes.
        evaluation.before = [tuple([None if x is None else x.clone() for x in part]) for part in parameters]
        self.measure_on(evaluation)
        return outputs

    @torch.no_grad()
    def look_before(self, evaluate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
        """Evaluates actions before a step whose loss is computed out of sight, so that the step can be measured.

        Args:
            evaluate: As for :meth:`evaluate`.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            The evaluation, without the curvature at the values, which is up to the caller.
        """
        self._watch()
        evaluation = Evaluation(self, partial(evaluate, *args, **kwargs), None)
        try:
            with self._repeating(evaluation):
                evaluation.repeat()
        finally:
            evaluation.values, self._values = self._values, None
        evaluation.before = parameters_of(self.policy.action_dist)
        self.measure_on(evaluation)
        return evaluation

    def measure_on(self, evaluation: Evaluation) -> None:
        """The next step will be measured by repeating this evaluation."""
        self._of_step = evaluation
        self._measured = None

    def _can_mask(self) -> bool:
        return hasattr(self.policy.action_dist, "apply_masking")

    @property
    def gives_log_std(self) -> bool:
        """Whether actions are being evaluated for a loss, and their distribution has a ``log_std``."""
        return self._watched is not None and isinstance(self.policy.action_space, spaces.Box)

    def log_std(self) -> Tensor:
        """The policy's ``log_std`` with its Fisher information, for a Gaussian without gSDE."""
        log_std: Tensor = self.policy.log_std
        if self._watched is None or not log_std.requires_grad:
            return log_std
        return with_curvature(log_std, log_std.new_full((), 2.0))

    def log_std_of_gsde(self, latent: Tensor) -> Tensor:
        """The same with gSDE, whose variance is ``latent^2 @ std^2``."""
        log_std: Tensor = self.policy.log_std
        if self._watched is None or not log_std.requires_grad:
            return log_std
        with torch.no_grad():
            dist = self.policy.action_dist
            squares = latent.detach().square()
            std = dist.get_std(log_std)
            variance = squares @ std.square() + dist.epsilon
            # d variance_ba / d log_std_ka = squares_bk d (std_ka^2) / d log_std_ka
            slope = torch.func.grad(lambda x: dist.get_std(x).square().sum())(log_std.detach())
            weight = squares.square().t() @ (0.5 / variance.square())  # one column per action
            if not dist.full_std:  # one std per feature, for all actions
                slope, weight = slope / dist.action_dim, weight.sum(-1, keepdim=True)
            information = slope.square() * weight / len(latent)
        return with_curvature(log_std, information)

    def information(self, output: Tensor, latent: Tensor) -> Tensor:
        """The Fisher information at the output of ``action_net``, the mean over the minibatch."""
        with torch.no_grad():
            if isinstance(self.policy.action_space, spaces.Box):
                if self.policy.use_sde:
                    std = self.policy.action_dist.get_std(self.policy.log_std)
                    variance = latent.square() @ std.square() + self.policy.action_dist.epsilon
                    one: Tensor = 1 / variance
                else:
                    one = (-2 * self.policy.log_std).exp()
            else:
                probabilities = self._probabilities(output)
                one = probabilities * (1 - probabilities)
            return one / len(output)

    def _probabilities(self, logits: Tensor) -> Tensor:
        space: Any = self.policy.action_space
        if self._watched is not None and self._watched.masks is not None:
            masks = torch.as_tensor(self._watched.masks, dtype=torch.bool, device=logits.device).reshape(logits.shape)
            logits = logits.masked_fill(~masks, _MASKED)
        if isinstance(space, spaces.Discrete):
            return logits.softmax(-1)
        if isinstance(space, spaces.MultiDiscrete):
            return torch.cat([part.softmax(-1) for part in logits.split(space.nvec.reshape(-1).tolist(), -1)], -1)
        if logits.shape[-1] == 2 * space.n:  # sb3-contrib's masked form of MultiBinary
            logits = logits.unflatten(-1, (-1, 2)).log_softmax(-1).flatten(-2)
            return logits.exp()
        return logits.sigmoid()

    @torch.no_grad()
    def _measure(self) -> tuple[float | None, float | None]:
        """KL divergence and change of the critic's loss that the latest step has made; evaluated once per step."""
        if self._measured is None:
            evaluation = self._of_step
            if evaluation is None or evaluation.before is None:
                return None, None
            try:
                with self._repeating(evaluation):
                    evaluation.repeat()
            finally:
                values, self._values = self._values, None
            divergence = float(kl_divergence(evaluation.before, parameters_of(self.policy.action_dist)))
            change = None
            if evaluation.values is not None and evaluation.curvature is not None and values is not None:
                moved = values - evaluation.values
                change = float((evaluation.curvature.reshape(values.shape) * moved.square()).sum() / 2)
            self._measured = divergence, change
        return self._measured

    def divergence(self) -> float | None:
        """KL divergence of the actions' distribution after the latest step from that before, in nats per sample."""
        return self._measure()[0]

    def value_change(self) -> float | None:
        """``sum h (change of value)^2 / 2``, in units of the loss."""
        return self._measure()[1]

    def shared_change(self) -> float | None:
        """The larger of the two, each as a multiple of its own radius: for what actor and critic share."""
        found = []
        for group in self.policy.optimizer.param_groups:
            delta = group.get("delta", group.get("scaling_delta"))
            if delta is None:
                continue
            if group.get("network") == "actor":
                found.append((self.divergence(), delta))
            elif group.get("network") == "critic":
                unit = average_unit(group)
                found.append((self.value_change(), None if unit is None else delta * unit))
        ratios = [measured / allowed for measured, allowed in found if measured is not None and allowed]
        return max(ratios, default=None)

    def loss(self) -> float | Tensor:
        """The critic's loss on the latest minibatch; not a number where it has none."""
        loss = None if self._of_step is None else self._of_step.loss
        return float("nan") if loss is None else loss

    def of_network(self, network: str, full_rate: float = 1.0) -> CalibratedRadius:
        """What ``delta`` is measured in for "actor", "critic" or "features"."""
        if network == "actor":
            return CalibratedRadius(self.divergence, name="nats", full_rate=full_rate)
        if network == "critic":
            return CalibratedRadius(self.value_change, unit=self.loss, name="parts of the loss", full_rate=full_rate)
        return CalibratedRadius(self.shared_change, name="radii of actor and critic", full_rate=full_rate)


class _ActionHook:
    """Gives the output of ``action_net`` its Fisher information. An object, so that the network can be pickled."""

    def __init__(self, radius: PolicyRadius) -> None:
        self.radius = radius

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.radius._watched is None or not output.requires_grad:
            return None
        return with_curvature(output, self.radius.information(output.detach(), args[0].detach()))


class _ValueHook:
    """Lets the critic's loss be noted at the output of ``value_net``."""

    def __init__(self, radius: PolicyRadius) -> None:
        self.radius = radius

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        radius = self.radius
        if radius._measuring:
            radius._values = output.detach()
        if radius._watched is None or not output.requires_grad:
            return None
        radius._watched.values = output.detach().clone()
        result: Tensor = ValueProbe.apply(output, radius._watched)
        return result


def why_not(policy: Any) -> str:
    """Why the radius cannot be measured for a policy, as the end of a sentence; empty if it can."""
    for name in ("action_net", "value_net", "evaluate_actions", "action_dist"):
        if not hasattr(policy, name):
            return f"needs a policy with {name}, which {type(policy).__name__} has not"
    space = policy.action_space
    if isinstance(space, spaces.Box) and not hasattr(policy, "log_std"):
        return f"needs a policy with log_std, which {type(policy).__name__} has not"
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return f"does not know the Fisher information of actions in {space}"
    return ""


def _distribution_of(dist: Any) -> Any:
    """What an SB3 distribution is made of: one of torch's, or a list of them."""
    found = getattr(dist, "distribution", None)
    return getattr(dist, "distributions", None) if found is None else found


def parameters_of(dist: Any) -> list[tuple[Tensor, ...]]:
    """Parameters of an SB3 distribution, detached: (mean, std), (logits of a softmax,), or (logits of bits, None).

    Raises:
        TypeError: If it is of another kind.
    """
    found = _distribution_of(dist)
    parts: Sequence[Any] = found if isinstance(found, (list, tuple)) else [found]
    made: list[tuple[Any, ...]] = []
    for part in parts:
        if isinstance(part, torch.distributions.Normal):
            made.append((part.loc.detach(), part.scale.detach()))
        elif isinstance(part, torch.distributions.Bernoulli):
            made.append((part.logits.detach(), None))
        elif isinstance(part, torch.distributions.Categorical):
            made.append((part.logits.detach(),))
        else:
            raise TypeError(
                f'radius="kl" does not know the KL divergence of {type(dist).__name__}, which is made of '
                f"{type(part).__name__}: it knows Normal, Categorical and Bernoulli of torch.distributions, as the "
                'policy\'s action_dist has them after evaluate_actions; pass radius="loss"'
            )
    return made


def _doubled(parameters: tuple[Any, ...]) -> list[Any]:
    return [None if x is None else x.double() for x in parameters]


def kl_divergence(before: Sequence[tuple[Any, ...]], after: Sequence[tuple[Any, ...]]) -> Tensor:
    """KL divergence of what was before from what is after, summed over actions, the mean over the minibatch."""
    total: Any = 0.0
    for parameters in zip(before, after, strict=True):
        # In double precision: the divergence is a small difference of large terms.
        old, new = [_doubled(part) for part in parameters]
        if len(old) == 1:
            p = old[0].log_softmax(-1)
            term = (p.exp() * (p - new[0].log_softmax(-1))).sum(-1)
        elif old[1] is None:
            p, q = old[0], new[0]
            sigma = torch.sigmoid(p)
            log = nn.functional.logsigmoid
            term = (sigma * (log(p) - log(q)) + (1 - sigma) * (log(-p) - log(-q))).sum(-1)
        else:
            # 1/2 (r - 1 - log r) for r the ratio of variances, without the cancellation near r = 1
            log_ratio = 2 * (old[1].log() - new[1].log())
            term = (torch.expm1(log_ratio) - log_ratio + ((old[0] - new[0]) / new[1]).square()).sum(-1) / 2
        total = total + term.mean()
    return torch.as_tensor(total)
