"""The Lightning callback that skips steps whose gradient or diagonal is not finite."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from hesscale_lightning.optim.nonfinite import drop, is_finite, nonfinite_names, too_many
from hesscale_lightning.trainer.parameters import parameters_of


class SkipNonfiniteSteps(Callback):
    """Skips the optimizer steps at which a gradient or a diagonal has an entry that is infinite or not a number.

    One such step would make every weight NaN. A skipped one leaves weights and the optimizer's state as they are: its
    gradients and diagonals are dropped. The first one is told in a warning that names the parameters. Works with any
    optimizer, beside :class:`hesscale_lightning.HesScaleCallback` or without it, in any order. Under ``16-mixed`` the
    loss scale's own check skips such steps, and this callback does nothing. The check reads all gradients once, and one
    number from the device; under DDP the processes decide together.

    Logged: ``curvature/skipped_steps``, the number of steps skipped so far; on the way it is saved in checkpoints.

    Args:
        max_in_a_row: raise an error after so many skipped steps in a row: then it is not one bad batch.

    Raises:
        ValueError: if ``max_in_a_row`` is below 1.
        FloatingPointError: in training, after too many skipped steps in a row.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[SkipNonfiniteSteps()], logger=False, accelerator="cpu")
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"Found max_in_a_row={max_in_a_row}, expected at least 1.")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Drops gradients and diagonals that are not finite."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        parameters = parameters_of([optimizer])
        if trainer.strategy.reduce_boolean_decision(is_finite(parameters), all=True):
            self.in_a_row = 0
            return
        where = nonfinite_names(parameters, optimizer, dict(pl_module.named_parameters()))
        if self.in_a_row >= self.max_in_a_row:
            raise too_many(self.in_a_row, where)
        if self.skipped == 0:
            rank_zero_warn(
                f"Skipped step {trainer.global_step}, which is not finite: {where}. Later ones are only counted, in "
                "curvature/skipped_steps."
            )
        drop(parameters)
        self.skipped += 1
        self.in_a_row += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs how many steps were skipped."""
        pl_module.log("curvature/skipped_steps", float(self.skipped), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run counts on from."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]
