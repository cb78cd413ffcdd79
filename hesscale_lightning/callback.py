"""The Lightning callback: curvature on every training step of any LightningModule.

Lightning calls, for each batch, ``on_before_backward(loss)``, ``loss.backward()``, ``on_after_backward`` and, where an
optimizer steps, ``on_before_optimizer_step``. The callback attaches curvature in the first, and unscales, reduces and
logs the diagonals in the last. It touches neither gradients nor random numbers, so an optimizer that does not read the
diagonals takes bit-identical steps with and without it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from hesscale_lightning.curvature import attach
from hesscale_lightning.curvature.engine import METHODS, Method
from hesscale_lightning.metrics import STATISTICS

# By name: importing the strategies is slow, and a trainer of another namespace has classes of its own.
_SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


class HesScaleCallback(Callback):
    r"""Computes the Hessian diagonal beside every gradient, for the optimizer and for the log.

    On each refreshed step, ``p.hess_diag`` holds the diagonal for every parameter of the trainer's optimizers from the
    end of ``backward`` on, as ``p.grad`` holds the gradient, until the gradient is cleared.
    :class:`hesscale_lightning.AdaHesScale` reads it; any other optimizer trains exactly as without the callback.

    Logged to every logger of the trainer, and to ``trainer.callback_metrics`` for ``EarlyStopping`` and the like:

    =============================== ========================================
    ``curvature/trace``             sum of the diagonal
    ``curvature/mean_abs``          mean absolute entry
    ``curvature/max_abs``           largest absolute entry
    ``curvature/negative_fraction`` share of entries below zero
    =============================== ========================================

    The diagonal is that of the loss which the optimizer minimises: of the mean over the micro-batches when gradients
    are accumulated, of the mean over all processes under DDP, without the loss scale under ``16-mixed``. Gradient
    clipping does not change it. With several optimizers, the keys are ``curvature/optimizer_0/trace`` and so on.

    Args:
        method: ``hesscale``, ``hesscale_gn`` (without the curvature made inside the network: never negative for convex
            losses), or ``bl89`` (Becker and LeCun, 1989).
        every_n_steps: compute the diagonal on every n-th optimizer step (on every n-th batch in manual optimization).
            More than 1 saves time where the diagonal is only logged.
        log_every_n_steps: log every n optimizer steps, or at the first refreshed step after that; 0 never logs. The
            default follows the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import lightning
        >>> curvature = HesScaleCallback(log_every_n_steps=10)
        >>> trainer = lightning.Trainer(callbacks=[curvature], logger=False, accelerator="cpu")

    The diagonal is HesScale's of Elsayed et al., "Revisiting Scalable Hessian Diagonal Approximations for Applications
    in Reinforcement Learning", ICML 2024.
    """

    def __init__(
        self, method: Method = "hesscale", every_n_steps: int = 1, log_every_n_steps: int | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"Found method={method!r}, expected one of {', '.join(METHODS)}.")
        if every_n_steps < 1:
            raise ValueError(f"Found every_n_steps={every_n_steps}, expected at least 1 (1: every step).")
        if log_every_n_steps is not None and log_every_n_steps < 0:
            raise ValueError(f"Found log_every_n_steps={log_every_n_steps}, expected at least 0 (0: never log).")
        self.method = method
        self.every_n_steps = every_n_steps
        self.log_every_n_steps = log_every_n_steps
        self._attachment: Any = None
        self._step = -1  # the step that the decision below is about
        self._refreshing = False
        self._last_refresh = -1
        self._refresh_before = -1

    def should_refresh(self, step: int) -> bool:
        """Decides whether the diagonal is computed on a step; override it for another schedule.

        Asked once for each step. In distributed training every process must give the same answer.

        Args:
            step: optimizer steps done so far, or batches in manual optimization.
        """
        return step % self.every_n_steps == 0

    # -- the trainer's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot work, before any data is loaded."""
        if stage != "fit":
            return
        found = {cls.__name__ for cls in type(trainer.strategy).__mro__}.intersection(_SHARDING_STRATEGIES)
        if found:
            raise MisconfigurationException(
                f"HesScaleCallback found the strategy {type(trainer.strategy).__name__}, which splits parameters "
                "between processes; curvature needs whole parameters. Use strategy='ddp' or a single device."
            )
        others = [callback for callback in trainer.callbacks if isinstance(callback, HesScaleCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise MisconfigurationException(
                f"Found {len(others)} HesScaleCallbacks, expected one: each would add its diagonal to p.hess_diag. "
                "To compare methods, train once with each."
            )
        self._step = -1
        self._last_refresh = self._refresh_before = self._count_steps(trainer, pl_module) - 1

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Clears the diagonals with the gradients."""
        _clear(_parameters([optimizer]))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Attaches curvature to the backward pass to come."""
        step = self._count_steps(trainer, pl_module)
        if step != self._step:
            self._step = step
            self._refreshing = self.should_refresh(step)
            if self._refreshing:
                self._refresh_before, self._last_refresh = self._last_refresh, step
        parameters = _parameters(trainer.optimizers)
        # A diagonal lives as long as its gradient. This is what clears it in manual optimization, where no hook tells
        # of zero_grad and only our own optimizers clear it themselves.
        _clear(p for p in parameters if p.grad is None)
        self._detach()
        if self._refreshing:
            self._attachment = attach(loss, parameters, method=self.method)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the backward pass that is over."""
        self._detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Turns what this process computed into the diagonal of the whole batch's loss, and logs it."""
        parameters = _parameters([optimizer])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._refreshing and scaler is not None:
            torch._foreach_mul_(_diagonals(parameters), 1.0 / scaler.get_scale())
        if self._refreshing and trainer.world_size > 1:
            self._reduce(trainer, parameters)
        if (scaler is not None or trainer.world_size > 1) and hasattr(optimizer, "record_gradients"):
            # Our optimizers compare each gradient with what backward left; up to here its changes are accounted for.
            optimizer.record_gradients()
        if self._refreshing and self._log_is_due(trainer):
            self._log(trainer, optimizer, _diagonals(parameters), finite_only=scaler is not None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves nothing attached after an error or an interrupt."""
        self._release(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves nothing attached after training."""
        self._release(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves nothing attached."""
        self._release(pl_module)

    @property
    def state_key(self) -> str:
        """The callback's name in a checkpoint."""
        return self._generate_state_key(method=self.method)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log on the same steps."""
        return {"last_refresh": self._last_refresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._last_refresh = state_dict["last_refresh"]

    # -- how it is done

    @staticmethod
    def _count_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        # With several optimizers, global_step counts each of their steps: every second one would be always the same's.
        return trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx

    @staticmethod
    def _reduce(trainer: pl.Trainer, parameters: Sequence[Tensor]) -> None:
        """Averages the diagonals over the processes, as DDP averages gradients, in one call.

        A parameter that this process did not use takes part with zeros, so the buffer is laid out alike everywhere.
        """
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        diagonals = [getattr(p, "hess_diag", None) for p in parameters]
        flat = torch.cat(
            [
                p.new_zeros(p.numel(), dtype=dtype) if h is None else h.reshape(-1).to(dtype)
                for p, h in zip(parameters, diagonals, strict=True)
            ]
        )
        flat = trainer.strategy.reduce(flat, reduce_op="mean")
        parts = flat.split([p.numel() for p in parameters])
        for p, h, part in zip(parameters, diagonals, parts, strict=True):
            if h is not None:
                h.copy_(part.view_as(h))
            elif p.grad is not None:  # another process used it
                p.hess_diag = part.view_as(p).to(torch.promote_types(p.dtype, torch.float32))  # type: ignore[attr-defined]

    def _log_is_due(self, trainer: pl.Trainer) -> bool:
        n: int = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps  # type: ignore[attr-defined]
        return n > 0 and (self._last_refresh + 1) // n > (self._refresh_before + 1) // n

    def _log(self, trainer: pl.Trainer, optimizer: Optimizer, diagonals: list[Tensor], finite_only: bool) -> None:
        if not diagonals:
            return
        several = len(trainer.optimizers) > 1
        prefix = f"curvature/optimizer_{_index(trainer.optimizers, optimizer)}" if several else "curvature"
        # One transfer from the device for all of them.
        values = torch.stack([statistic(diagonals) for statistic in STATISTICS.values()])
        numbers = values.tolist()
        if finite_only and not all(abs(number) < float("inf") for number in numbers):
            return  # the loss scale was too large: the scaler skips this step, and there is nothing to report
        record = {f"{prefix}/{name}": number for name, number in zip(STATISTICS, numbers, strict=True)}
        # Not self.log: that reaches a logger only on the trainer's own log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(record, step=self._last_refresh)
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in record.items()})

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._detach()
        _clear(pl_module.parameters())


def _parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _diagonals(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [h for p in parameters if (h := getattr(p, "hess_diag", None)) is not None]


def _clear(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        if getattr(p, "hess_diag", None) is not None:
            del p.hess_diag  # type: ignore[attr-defined]


def _index(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> int:
    return next(i for i, other in enumerate(optimizers) if other is optimizer)
