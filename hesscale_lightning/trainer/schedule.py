"""Which steps have a diagonal, which are audited, and which are logged."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


class Schedule:
    """Decides once for each step, and remembers the last diagonal and the last audit."""

    def __init__(self) -> None:
        self.step = -1  # the step that the decisions below are about
        self.refreshing = self.auditing = False
        self.last_refresh = -1
        self.last_audit = -1
        self._refresh_before = -1
        self._first_backward = True

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins with a run, new or resumed."""
        self.step = -1
        self.last_refresh = self._refresh_before = count_steps(trainer, pl_module) - 1
        self.last_audit = self.last_refresh
        self._first_backward = True

    def decide(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        should_refresh: Callable[[int], bool],
        delta: bool,
        audit_every_n_steps: int | None,
    ) -> None:
        """Asks once for each step whether it is to have a diagonal and an audit.

        Args:
            trainer: the trainer.
            pl_module: its module.
            should_refresh: what the callback answers for a step.
            delta: whether the callback put trust regions around the optimizers.
            audit_every_n_steps: audit every n optimizer steps; None never audits.
        """
        step = count_steps(trainer, pl_module)
        if step == self.step:
            return
        self.step = step
        # A trust region without any average, as after a run that had none, needs a first diagonal.
        needed = delta and any(not getattr(o, "curvature", True) for o in trainer.optimizers)
        self.refreshing = should_refresh(step) or needed
        self.auditing = False
        if not self.refreshing:
            return
        self._refresh_before, self.last_refresh = self.last_refresh, step
        if audit_every_n_steps is not None and _crosses(self.last_audit, step, audit_every_n_steps):
            # DDP with a static graph takes note of its first backward pass, which must be the only one.
            self.auditing = not (self._first_backward and getattr(trainer.model, "static_graph", False))
            if self.auditing:
                self.last_audit = step

    def after_backward(self) -> None:
        """Notes that a backward pass is over."""
        self._first_backward = False

    def log_is_due(self, trainer: pl.Trainer, log_every_n_steps: int | None) -> bool:
        """Whether this step, a refreshed one, is logged.

        Args:
            trainer: the trainer.
            log_every_n_steps: log every n optimizer steps; None follows the trainer, 0 never logs.
        """
        n: int = trainer.log_every_n_steps if log_every_n_steps is None else log_every_n_steps  # type: ignore[attr-defined]
        return n > 0 and _crosses(self._refresh_before, self.last_refresh, n)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log on the same steps."""
        return {"last_refresh": self.last_refresh, "last_audit": self.last_audit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; nothing from an empty one."""
        self.step = -1  # whatever step comes next is decided about anew
        self.last_refresh = state_dict.get("last_refresh", self.last_refresh)
        self.last_audit = state_dict.get("last_audit", self.last_refresh)


def count_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Optimizer steps done so far, or batches in manual optimization."""
    # With several optimizers, global_step counts each of their steps: every second one would be always the same's.
    return trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx


def _crosses(before: int, step: int, n: int) -> bool:
    """Whether a multiple of n lies between two steps, counted from 1."""
    return (step + 1) // n > (before + 1) // n
