"""Curvature while Lightning searches for a learning rate or a batch size.

``LearningRateFinder`` and ``BatchSizeFinder`` train for some steps without any of the trainer's callbacks, after which
they put weights, optimizers and callbacks back to what they were. AdaHesScale cannot step there, and where the callback
limits steps the losses would be those of another training. The hooks of the LightningModule are called all the same:
from them the callback gets what it needs for the time in which the trainer does not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from hesscale_lightning.optim import StepSizeScaling
from hesscale_lightning.trainer.optimizer_step import add_trust_regions

HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Searches:
    """Calls a callback's hooks from those of the module while a search has taken it from the trainer.

    Args:
        callback: the callback, with the radius ``delta`` of the trust regions that it puts around the optimizers when
            training begins; None for none.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._module: pl.LightningModule | None = None
        self._made: list[StepSizeScaling] = []

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes hold of the module's hooks, if the trainer has a callback that searches."""
        self.release()
        if not any(isinstance(other, (BatchSizeFinder, LearningRateFinder)) for other in trainer.callbacks):  # type: ignore[attr-defined]
            return
        self._module = pl_module
        for name in HOOKS:
            setattr(pl_module, name, _Hook(self, name, getattr(pl_module, name)))

    def finish(self, trainer: pl.Trainer) -> None:
        """Takes the trust regions of a search away, before training begins with its own."""
        trainer.optimizers = [o.optimizer if o in self._made else o for o in trainer.optimizers]
        self._made = []

    def release(self) -> None:
        """Gives the module's hooks back."""
        module, self._module = self._module, None
        if module is not None:
            for name in HOOKS:
                delattr(module, name)

    def forward(self, name: str, args: tuple[Any, ...]) -> None:
        """Calls the callback's hook, unless the trainer does."""
        assert self._module is not None
        trainer = self._module.trainer
        if self._callback in trainer.callbacks:  # type: ignore[attr-defined]
            return
        if name == "on_train_batch_start" and self._callback.delta is not None:
            before = trainer.optimizers
            if not any(isinstance(optimizer, StepSizeScaling) for optimizer in before):
                add_trust_regions(trainer, self._callback.delta)
                self._made = list(trainer.optimizers)  # type: ignore[arg-type]
        getattr(self._callback, name)(trainer, self._module, *args)


class _Hook:
    """Stands for one hook of a module: the callback's comes first, as in the trainer."""

    def __init__(self, searches: Searches, name: str, own: Callable[..., Any]) -> None:
        self._searches, self._name, self._own = searches, name, own

    def __call__(self, *args: Any) -> Any:
        self._searches.forward(self._name, args)
        return self._own(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self  # a copy of the module, such as one of averaged weights, is not what is trained
