"""Curvature on one backward pass at a time: attached before it, let go after it."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, attach, supported_params
from hesscale_lightning.curvature.engine import Method


class BackwardPass:
    """Attaches curvature to a loss, and knows the parameters that an operation without a rule cuts off."""

    def __init__(self) -> None:
        self.attachment: Any = None
        self.skipped: dict[int, Tensor] = {}  # parameters behind an operation without a rule, by id

    def attach(
        self,
        loss: Tensor,
        parameters: list[Tensor],
        pl_module: pl.LightningModule,
        method: Method,
        on_unsupported: Literal["error", "skip"],
    ) -> None:
        """Has the loss's backward pass leave a diagonal on each parameter that is not skipped.

        Args:
            loss: the loss, on which ``backward`` is about to be called.
            parameters: the parameters of the trainer's optimizers.
            pl_module: the module, for the parameters' names.
            method: the engine's method.
            on_unsupported: ``error``, or ``skip`` the parameters behind an operation without a rule.
        """
        wanted = self.wanted(parameters)
        try:
            self.attachment = attach(loss, wanted, method=method)
        except UnsupportedOperationError as error:
            if on_unsupported == "error":
                raise
            _, behind = supported_params(loss, wanted)
            self.skipped |= {id(p): p for p in behind}
            names = [name for name, p in pl_module.named_parameters() if id(p) in self.skipped]
            rank_zero_warn(
                f"HesScaleCallback computes no diagonal for {len(names)} parameters, {', '.join(names)}: {error}"
            )
            self.attachment = attach(loss, self.wanted(wanted), method=method)

    def detach(self) -> None:
        """Lets go of the backward pass. Harmless without one."""
        if self.attachment is not None:
            self.attachment.remove()
            self.attachment = None

    def wanted(self, parameters: list[Tensor]) -> list[Tensor]:
        """The parameters that are not skipped."""
        return [p for p in parameters if id(p) not in self.skipped] if self.skipped else parameters
