"""Policies for sb3-contrib's algorithms, which have to be installed: ``pip install sb3-contrib``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from sb3_contrib.common.maskable import policies as maskable
from sb3_contrib.common.recurrent import policies as recurrent
from sb3_contrib.crossq import policies as crossq
from sb3_contrib.qrdqn import policies as qrdqn
from sb3_contrib.tqc import policies as tqc

from sb3_integration import defaults
from sb3_integration.policies import (
    HesScaleActionValueMixin,
    HesScaleActorCriticCnnPolicy,
    HesScaleActorCriticMixin,
    HesScaleActorCriticPolicy,
    HesScaleMultiInputActorCriticPolicy,
    HesScaleValueMixin,
    Radius,
)


class HesScaleCriticOnlyMixin(HesScaleActorCriticMixin):
    """For policies of TRPO, which moves its actor by conjugate gradients and never by an optimizer.

    AdaHesScale drives the critic alone, where it has a features extractor of its own or none with parameters: TRPO lets
    no gradient of the critic reach what the actor shares.

    Raises:
        ValueError: If options are given for the actor, or for what it shares with the critic.
    """

    _defaults: ClassVar = {"loss": defaults.PPO}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [f"{network}_optimizer_kwargs" for network in ("actor", "features")]
        given = [name for name in given if kwargs.get(name)]
        if given:
            raise ValueError(
                f"{', '.join(given)} would have no effect: TRPO moves its actor, and what it shares with the critic, "
                "by conjugate gradients and a line search within target_kl, without an optimizer. Set target_kl, or "
                "critic_optimizer_kwargs"
            )
        super().__init__(*args, **kwargs)


class HesScaleTRPOPolicy(HesScaleCriticOnlyMixin, HesScaleActorCriticPolicy):
    """Policy for TRPO."""


class HesScaleTRPOCnnPolicy(HesScaleCriticOnlyMixin, HesScaleActorCriticCnnPolicy):
    """Policy for TRPO on images; with a shared features extractor only the critic's last layers are moved by it."""


class HesScaleTRPOMultiInputPolicy(HesScaleCriticOnlyMixin, HesScaleMultiInputActorCriticPolicy):
    """Policy for TRPO on dict observations."""


class HesScaleMaskableActorCriticPolicy(HesScaleActorCriticMixin, maskable.MaskableActorCriticPolicy):
    """Policy for MaskablePPO."""


class HesScaleMaskableActorCriticCnnPolicy(HesScaleActorCriticMixin, maskable.MaskableActorCriticCnnPolicy):
    """Policy for MaskablePPO on images."""


class HesScaleMaskableMultiInputActorCriticPolicy(
    HesScaleActorCriticMixin, maskable.MaskableMultiInputActorCriticPolicy
):
    """Policy for MaskablePPO on dict observations."""


class HesScaleRecurrentMixin(HesScaleActorCriticMixin):
    """For policies of RecurrentPPO."""

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update({name: getattr(self, name) for name in ("shared_lstm", "enable_critic_lstm", "lstm_kwargs")})
        lstm: Any = self.lstm_actor
        data.update(lstm_hidden_size=lstm.hidden_size, n_lstm_layers=lstm.num_layers)
        return data


class HesScaleRecurrentActorCriticPolicy(HesScaleRecurrentMixin, recurrent.RecurrentActorCriticPolicy):
    """Policy for RecurrentPPO."""


class HesScaleRecurrentActorCriticCnnPolicy(HesScaleRecurrentMixin, recurrent.RecurrentActorCriticCnnPolicy):
    """Policy for RecurrentPPO on images."""


class HesScaleRecurrentMultiInputActorCriticPolicy(
    HesScaleRecurrentMixin, recurrent.RecurrentMultiInputActorCriticPolicy
):
    """Policy for RecurrentPPO on dict observations."""


class HesScaleQuantileMixin(HesScaleValueMixin):
    """For policies of QR-DQN.

    QR-DQN passes Adam to every policy unless the user names an optimizer. Adam with the very options of QR-DQN,
    ``eps = 0.01 / batch_size`` for a batch size that is a power of two, is therefore taken for "nothing chosen" and
    replaced by AdaHesScale. With another batch size it is kept, with a warning: name the optimizer,
    ``policy_kwargs=dict(optimizer_class=AdaHesScale)``.
    """

    def _defaults_if_injected(
        self, optimizer_class: Any, optimizer_kwargs: Any
    ) -> Mapping[Radius, defaults.OptimizerDefaults] | None:
        if defaults.injected_by_qrdqn(optimizer_class, optimizer_kwargs):
            return self._defaults
        if optimizer_class is torch.optim.Adam and set(optimizer_kwargs or ()) == {"eps"}:
            batch_size = 0.01 / max(optimizer_kwargs["eps"], 1e-8)
            if round(batch_size) >= 1 and abs(batch_size / round(batch_size) - 1) < 1e-9:
                warnings.warn(
                    f"{type(self).__name__} trains with Adam and without curvature: "
                    f"Adam(eps={optimizer_kwargs['eps']:g}) is what QR-DQN passes for batch_size={round(batch_size)} "
                    "if policy_kwargs names no optimizer, but you may have chosen it too. For curvature pass "
                    "policy_kwargs=dict(optimizer_class=AdaHesScale); to keep Adam without this warning name one more "
                    "of its options",
                    stacklevel=2,
                )
        return None


class HesScaleQRDQNPolicy(HesScaleQuantileMixin, qrdqn.QRDQNPolicy):
    """Policy for QR-DQN."""


class HesScaleQRDQNCnnPolicy(HesScaleQuantileMixin, qrdqn.CnnPolicy):
    """Policy for QR-DQN on images."""


class HesScaleQRDQNMultiInputPolicy(HesScaleQuantileMixin, qrdqn.MultiInputPolicy):
    """Policy for QR-DQN on dict observations."""


class HesScaleTQCPolicy(HesScaleActionValueMixin, tqc.TQCPolicy):
    """Policy for TQC."""


class HesScaleTQCCnnPolicy(HesScaleActionValueMixin, tqc.CnnPolicy):
    """Policy for TQC on images."""


class HesScaleTQCMultiInputPolicy(HesScaleActionValueMixin, tqc.MultiInputPolicy):
    """Policy for TQC on dict observations."""


class HesScaleCrossQPolicy(HesScaleActionValueMixin, crossq.CrossQPolicy):
    """Policy for CrossQ."""
