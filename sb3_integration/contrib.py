"""Policies for sb3-contrib's algorithms, which have to be installed: ``pip install sb3-contrib``.

TRPO takes :class:`sb3_integration.HesScaleActorCriticPolicy`. Its actor is moved by conjugate gradients and never by an
optimizer, so AdaHesScale drives the critic alone.
"""

from __future__ import annotations

from typing import Any

from sb3_contrib.common.maskable import policies as maskable
from sb3_contrib.common.recurrent import policies as recurrent
from sb3_contrib.crossq import policies as crossq
from sb3_contrib.qrdqn import policies as qrdqn
from sb3_contrib.tqc import policies as tqc

from sb3_integration import defaults
from sb3_integration.policies import HesScaleActionValueMixin, HesScaleActorCriticMixin, HesScaleValueMixin


class HesScaleMaskableActorCriticPolicy(HesScaleActorCriticMixin, maskable.MaskableActorCriticPolicy):
    """Policy for MaskablePPO."""


class HesScaleMaskableActorCriticCnnPolicy(HesScaleActorCriticMixin, maskable.MaskableActorCriticCnnPolicy):
    """Policy for MaskablePPO on images."""


class HesScaleMaskableMultiInputActorCriticPolicy(
    HesScaleActorCriticMixin, maskable.MaskableMultiInputActorCriticPolicy
):
    """Policy for MaskablePPO on dict observations."""


class HesScaleRecurrentActorCriticPolicy(HesScaleActorCriticMixin, recurrent.RecurrentActorCriticPolicy):
    """Policy for RecurrentPPO."""


class HesScaleRecurrentActorCriticCnnPolicy(HesScaleActorCriticMixin, recurrent.RecurrentActorCriticCnnPolicy):
    """Policy for RecurrentPPO on images."""


class HesScaleRecurrentMultiInputActorCriticPolicy(
    HesScaleActorCriticMixin, recurrent.RecurrentMultiInputActorCriticPolicy
):
    """Policy for RecurrentPPO on dict observations."""


class HesScaleQuantileMixin(HesScaleValueMixin):
    """For policies of QR-DQN.

    QR-DQN passes Adam to every policy unless the user names an optimizer. Adam with the very options of QR-DQN,
    ``eps = 0.01 / batch_size`` for a batch size that is a power of two, is therefore taken for "nothing chosen" and
    replaced by AdaHesScale. With another batch size name the optimizer:
    ``policy_kwargs=dict(optimizer_class=AdaHesScale)``.
    """

    def _defaults_if_injected(self, optimizer_class: Any, optimizer_kwargs: Any) -> defaults.OptimizerDefaults | None:
        return self._defaults if defaults.injected_by_qrdqn(optimizer_class, optimizer_kwargs) else None


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
