"""The optimizer that a policy uses where ``policy_kwargs`` says nothing, per family of algorithms.

With ``radius="kl"`` the size of steps is given in nats and in fractions of the critic's loss, and no learning rate is
needed (see :mod:`sb3_integration.policy_radius`). With ``radius="loss"`` AdaHesScale's ``lr`` is the fraction of a
damped Newton step; Stable-Baselines3's rates are made for Adam, whose update has no units, so ``lr_scale`` translates
the one into the other, and ``delta`` bounds how far the quadratic model may move the loss in one step. Where the values
come from: docs/reinforcement_learning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from hesscale_lightning.curvature.engine import Method
from hesscale_lightning.optim import AdaHesScale


@dataclass(frozen=True)
class OptimizerDefaults:
    """What a family of algorithms starts from.

    Attributes:
        method: curvature estimate, as for :func:`hesscale_lightning.attach`.
        optimizer_kwargs: AdaHesScale's options.
        critic: Those that are different for the critic.
        features: Those that are different for what actor and critic share.
    """

    method: Method
    optimizer_kwargs: Mapping[str, Any]
    critic: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    features: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


# A radius in nats for the actor, as a fraction of its loss for the critic, as a multiple of both for what they share.
# The floor of the actor's metric is absolute, eps^2 = 1e-3: Fisher information has no units of a reward, and a softmax
# that is sure of its actions has none left.
_NATS = {
    "denominator": "sqrt_abs",
    "max_update": None,
    "delta": 3e-4,
    "damping": 0.01,
    "eps": 1e-3**0.5,
}
PPO_KL = OptimizerDefaults(
    "hesscale_gn", _NATS, critic={"delta": 1e-3, "eps": 1e-8}, features={"delta": 1.0, "eps": 1e-8}
)
A2C_KL = OptimizerDefaults(
    "hesscale_gn",
    {**_NATS, "betas": (0.9, 0.99)},  # a rollout is a step: there are few, and the policy changes over each
    critic={"delta": 3e-2, "eps": 1e-8},
    features={"delta": 1.0, "eps": 1e-8},
)
# A radius in units of the loss: the critic's has the scale of the squared returns, the actor's that of the advantages.
PPO = OptimizerDefaults("hesscale_gn", {"lr_scale": 3.0, "eps": 1e-5, "delta": 1e-5}, critic={"delta": 1e-3})
A2C = OptimizerDefaults("hesscale_gn", {"lr_scale": 1.0, "eps": 1e-5, "delta": 1e-5}, critic={"delta": 1e-3})
DQN = OptimizerDefaults("hesscale", {"lr_scale": 10.0, "eps": 1e-5})
ACTOR_CRITIC_OFF_POLICY = OptimizerDefaults("hesscale", {"lr_scale": 10.0, "eps": 1e-5})


def injected_by_a2c(optimizer_class: type[Optimizer] | None, optimizer_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether it was A2C that chose this optimizer, because nobody else had: RMSprop with A2C's options and any eps."""
    kwargs = dict(optimizer_kwargs or {})
    return (
        optimizer_class is torch.optim.RMSprop
        and set(kwargs) == {"alpha", "eps", "weight_decay"}
        and kwargs["alpha"] == 0.99
        and kwargs["weight_decay"] == 0
    )


def injected_by_qrdqn(optimizer_class: type[Optimizer] | None, optimizer_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether it was QR-DQN that chose this optimizer: Adam with ``eps = 0.01 / batch_size``, a power of two."""
    kwargs = dict(optimizer_kwargs or {})
    if optimizer_class is not torch.optim.Adam or set(kwargs) != {"eps"} or not kwargs["eps"] > 0:
        return False
    batch_size = 0.01 / kwargs["eps"]
    return any(abs(batch_size / 2**k - 1) < 1e-9 for k in range(16))


@dataclass(frozen=True)
class Resolved:
    """The optimizer to build, and what the param groups of some networks set apart from the rest."""

    optimizer_class: Any
    optimizer_kwargs: dict[str, Any] | None
    critic: dict[str, Any]
    features: dict[str, Any]
    uses_defaults: bool


def is_adahesscale(optimizer_class: Any) -> bool:
    """Whether the defaults are meant for it: AdaHesScale (None), a subclass, or a partial of these."""
    made_of = optimizer_class.func if isinstance(optimizer_class, partial) else optimizer_class
    return made_of is None or (isinstance(made_of, type) and issubclass(made_of, AdaHesScale))


def resolve(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any] | None, defaults: OptimizerDefaults) -> Resolved:
    """AdaHesScale, or one that is made of it, with the defaults under the user's options; or what the user chose."""
    if optimizer_class is None:
        optimizer_class = AdaHesScale
    chosen = dict(optimizer_kwargs or {})
    fixed = set(chosen)
    if isinstance(optimizer_class, partial):
        fixed |= set(optimizer_class.keywords)
    if not is_adahesscale(optimizer_class):
        return Resolved(optimizer_class, None if optimizer_kwargs is None else chosen, {}, {}, False)
    options = {name: value for name, value in defaults.optimizer_kwargs.items() if name not in fixed}
    # An option that the user sets for all networks is meant for each of them.
    critic = {name: value for name, value in defaults.critic.items() if name not in fixed}
    features = {name: value for name, value in defaults.features.items() if name not in fixed}
    return Resolved(optimizer_class, {**options, **chosen}, critic, features, True)
