"""The Lightning callback: curvature on every training step of any LightningModule.

Lightning calls, for each batch, ``on_train_batch_start``, ``on_before_backward(loss)``, ``loss.backward()``,
``on_after_backward``, where an optimizer steps ``on_before_optimizer_step``, and ``on_train_batch_end``. The callback
decides in the first whether the step has curvature, attaches it before backward, unscales and reduces the diagonals
before the optimizer steps, and logs in the last. It touches neither gradients nor random numbers, so an optimizer that
does not read the diagonals takes bit-identical steps with and without it.
"""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from hesscale_lightning.curvature.engine import Method
from hesscale_lightning.trainer.audit import Audit, Reference
from hesscale_lightning.trainer.backward_pass import BackwardPass
from hesscale_lightning.trainer.eager import EagerSteps, has_compiled_code
from hesscale_lightning.trainer.histograms import warn_without_histograms
from hesscale_lightning.trainer.optimizer_step import add_trust_regions, complete_diagonals
from hesscale_lightning.trainer.parameters import clear_diagonals, parameters_of
from hesscale_lightning.trainer.reevaluation import Reevaluation
from hesscale_lightning.trainer.schedule import Schedule
from hesscale_lightning.trainer.searches import Searches
from hesscale_lightning.trainer.settings import check_arguments, check_split, check_split_options, check_trainer
from hesscale_lightning.trainer.step_logger import StepLogger, add_decrease


class HesScaleCallback(Callback):
    r"""Computes the Hessian diagonal beside every gradient, for the optimizer and for the log.

    On each refreshed step, ``p.hess_diag`` holds the diagonal for every parameter of the trainer's optimizers from the
    end of ``backward`` on, as ``p.grad`` holds the gradient, until the gradient is cleared.
    :class:`hesscale_lightning.AdaHesScale` reads it; any other optimizer trains exactly as without the callback, unless
    ``delta`` asks for shorter steps.

    Logged to every logger of the trainer, and to ``trainer.callback_metrics`` for ``EarlyStopping`` and the like:

    ================================ ==================================================================================
    ``curvature/trace``              sum of the diagonal
    ``curvature/mean_abs``           mean absolute entry
    ``curvature/max_abs``            largest absolute entry
    ``curvature/negative_fraction``  share of entries below zero
    ``curvature/effective_lr``       mean absolute step over mean absolute gradient (before clipping)
    ``curvature/predicted_decrease`` fall of the batch's loss along the step, by gradient and diagonal
    ``curvature/scale``              with a trust region: the factor by which it shortened the step (1: not at all);
                                     ``scale/0``, ``scale/1`` with several param groups
    ``curvature/share/LAYER``        with ``per_layer``: the layer's share in the sum of all absolute entries
    ``curvature/mean_abs/LAYER``     with ``per_layer``: the layer's mean absolute entry
    ``curvature/histogram``          with ``histogram``: counts of ``log10(abs(h))``
    ``curvature/actual_decrease``    with ``measure_decrease``: fall of the batch's loss, evaluated again after the step
    ``curvature/gain_ratio``         with ``measure_decrease``: actual over predicted decrease
    ``curvature/audit/relative_l1``  with ``audit``: sum of absolute errors over sum of absolute true entries
    ``curvature/audit/cosine``       with ``audit``: cosine of the angle to the true diagonal
    ``curvature/audit/overhead``     with ``audit``: time of forward, backward and curvature over that without curvature
    ================================ ==================================================================================

    The diagonal is that of the loss which the optimizer minimises: of the mean over accumulated micro-batches and over
    processes (DDP and ModelParallelStrategy), without the loss scale under ``16-mixed``. Gradient clipping does not
    change it. With several optimizers, the keys are ``curvature/optimizer_0/trace`` and so on.

    Code compiled by ``torch.compile`` runs eagerly on the steps that compute a diagonal, so with a compiled network
    choose ``every_n_steps`` above 1. Parts that are compiled outside of the module cannot be found, and raise.

    Args:
        method: ``hesscale``, ``hesscale_gn`` (without the curvature made inside the network: never negative for convex
            losses), ``hesscale_rank1`` (a closer estimate for about the same cost, where samples do not mix), or
            ``bl89`` (Becker and LeCun, 1989).
        every_n_steps: compute the diagonal on every n-th optimizer step (on every n-th batch in manual optimization).
            More than 1 saves time; AdaHesScale and ``delta`` use their running averages in between.
        log_every_n_steps: log every n optimizer steps, or at the first refreshed step after that; 0 never logs. The
            default follows the trainer's ``log_every_n_steps``.
        per_layer: also log each layer's share and mean absolute entry.
        histogram: also log a histogram of the entries' sizes, to TensorBoard, Weights & Biases and MLflow.
        delta: shorten the steps of whatever optimizers the module returns, so that the second-order term of no step
            exceeds this, in units of the loss (StepSizeScaling; 1e-4 is a good start); null leaves them alone. Not for
            AdaHesScale, which has ``delta`` itself, and not for LBFGS.
        on_unsupported: what to do where the loss contains an operation without a curvature rule: ``error``, or ``skip``
            the parameters behind it for the rest of the run, with one warning that names them. They count in no
            statistic, and AdaHesScale and ``delta`` raise for them, so give those to another optimizer.
        audit: compare the diagonal with the true one on some steps: ``exact`` (one double backward pass for each
            compared entry), ``hutchinson`` (a random estimate on the compared entries), or null for no audit. Needs
            a loss that can be differentiated twice. Tensor hooks of the network run more often on these steps.
        audit_every_n_steps: audit every n optimizer steps, at refreshed steps.
        audit_entries: how many entries, drawn at random, an audit compares; a network with no more is compared whole.
        audit_probes: random vectors of the ``hutchinson`` estimate, one double backward pass each. Its error,
            which adds to the logged one, falls with the square root of their number.
        measure_decrease: evaluate the batch's loss again after the steps that are logged, for ``actual_decrease`` and
            ``gain_ratio``: one more forward pass, by ``training_step`` with the same dropout, nothing logged,
            and buffers and metrics put back. For automatic optimization without gradient accumulation.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(callbacks=[HesScaleCallback(per_layer=True)], logger=False, accelerator="cpu")

    The diagonal is HesScale's of Elsayed et al., "Revisiting Scalable Hessian Diagonal Approximations for Applications
    in Reinforcement Learning", ICML 2024.
    """

    def __init__(
        self,
        method: Method = "hesscale",
        every_n_steps: int = 1,
        log_every_n_steps: int | None = None,
        per_layer: bool = False,
        histogram: bool = False,
        delta: float | None = None,
        on_unsupported: Literal["error", "skip"] = "error",
        audit: Reference | None = None,
        audit_every_n_steps: int = 100,
        audit_entries: int = 256,
        audit_probes: int = 32,
        measure_decrease: bool = False,
    ) -> None:
        counts = {
            "every_n_steps": every_n_steps,
            "audit_every_n_steps": audit_every_n_steps,
            "audit_entries": audit_entries,
            "audit_probes": audit_probes,
        }
        check_arguments(method, log_every_n_steps, delta, on_unsupported, audit, counts)
        self.method = method
        self.every_n_steps = every_n_steps
        self.log_every_n_steps = log_every_n_steps
        self.per_layer = per_layer
        self.histogram = histogram
        self.delta = delta
        self.on_unsupported = on_unsupported
        self.audit_every_n_steps = audit_every_n_steps
        self._audit = None if audit is None else Audit(audit, audit_entries, audit_probes)
        self._reevaluation = Reevaluation() if measure_decrease else None
        self._eager = EagerSteps()
        self._compiled = False
        self._schedule = Schedule()
        self._backward = BackwardPass()
        self._logger = StepLogger()
        self._searches = Searches(self)

    def should_refresh(self, step: int) -> bool:
        """Decides whether the diagonal is computed on a step; override it for another schedule.

        Asked once for each step. In distributed training every process must give the same answer.

        Args:
            step: optimizer steps done so far, or batches in manual optimization.
        """
        return step % self.every_n_steps == 0

    @property
    def refreshing(self) -> bool:
        """Whether the step that is going on is to have a diagonal."""
        return self._schedule.refreshing

    @property
    def needs_graph(self) -> bool:
        """Whether the step that is going on needs the graph of its loss, which a compiled step does not have."""
        return self._schedule.auditing or bool(self._backward.skipped)

    # -- the trainer's hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot work, before any data is loaded."""
        if stage != "fit":
            return
        check_trainer(trainer, pl_module, HesScaleCallback, self._reevaluation is not None)
        check_split_options(trainer, self.method, self._audit is not None)
        self._searches.prepare(trainer, pl_module)
        self._schedule.start(trainer, pl_module)
        self._backward.skipped = {}
        self._compiled = has_compiled_code(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the trust region around the optimizers, before their state is restored from a checkpoint."""
        self._searches.finish(trainer)
        check_split(trainer, pl_module)  # parameters are not split before
        if self.delta is not None:
            add_trust_regions(trainer, self.delta)
        if self.histogram:
            warn_without_histograms(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decides about the step to come, and has compiled code run eagerly if it is to have curvature."""
        self._decide(trainer, pl_module)
        if not self._schedule.refreshing:
            return
        if self._compiled:
            self._eager.begin()
        if self._reevaluation is not None and self._log_is_due(trainer):
            self._reevaluation.before_forward(pl_module.device)
        if self._audit is not None and self._schedule.auditing:
            self._audit.before_forward(pl_module.device)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Clears the diagonals with the gradients."""
        clear_diagonals(parameters_of([optimizer]))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Attaches curvature to the backward pass to come."""
        self._decide(trainer, pl_module)
        parameters = parameters_of(trainer.optimizers)
        # A diagonal lives as long as its gradient. This is what clears it in manual optimization, where no hook tells
        # of zero_grad and only our own optimizers clear it themselves.
        clear_diagonals(p for p in parameters if p.grad is None)
        self._backward.detach()
        if not self._schedule.refreshing or getattr(pl_module, "curvature_is_compiled", False):
            return  # a compiled step brings its curvature with it
        if self._audit is not None and self._schedule.auditing:
            if self.on_unsupported == "skip":  # find out for which parameters there will be no diagonal
                self._backward.attach(loss, parameters, pl_module, self.method, self.on_unsupported)
                self._backward.detach()
            wanted = self._backward.wanted(parameters)
            self._audit.before_backward(loss, wanted, pl_module, seed=self._schedule.step)
        self._backward.attach(loss, parameters, pl_module, self.method, self.on_unsupported)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the backward pass that is over."""
        self._backward.detach()
        self._schedule.after_backward()
        if self._audit is not None and self._schedule.auditing:
            self._audit.after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Turns what this process computed into the diagonal of the whole batch's loss, and notes what is logged."""
        complete_diagonals(trainer, optimizer, self._schedule.refreshing, self._backward.skipped)
        if not self._schedule.refreshing or not (self._schedule.auditing or self._log_is_due(trainer)):
            return
        if any(getattr(p, "hess_diag", None) is not None and p.grad is not None for p in parameters_of([optimizer])):
            figures: dict[str, Tensor] = {}
            if self._audit is not None and self._schedule.auditing:
                figures = self._audit.take(lambda x: trainer.strategy.reduce(x, reduce_op="mean"))
            self._logger.note(
                trainer, pl_module, optimizer, self._log_is_due(trainer), figures, self.per_layer, self.histogram
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the step has done, and lets compiled code run compiled."""
        self._eager.end()
        logs = self._logger.take()
        if not logs:
            return
        if self._reevaluation is not None and self._log_is_due(trainer) and isinstance(outputs, dict):
            add_decrease(logs[0], trainer, outputs, self._reevaluation.evaluate(trainer, pl_module, batch, batch_idx))
        self._logger.write(trainer, logs, self._schedule.last_refresh)

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

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Saves what a resumed run needs; Lightning would refuse two callbacks with a state_dict in its own words."""
        checkpoint["callbacks"][self.state_key] = self._schedule.state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Restores it."""
        self._schedule.load_state_dict(checkpoint["callbacks"].get(self.state_key, {}))

    @property
    def _attachment(self) -> Any:
        """What is attached now; None between the backward passes."""
        return self._backward.attachment

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        every = None if self._audit is None else self.audit_every_n_steps
        self._schedule.decide(trainer, pl_module, self.should_refresh, self.delta is not None, every)

    def _log_is_due(self, trainer: pl.Trainer) -> bool:
        return self._schedule.log_is_due(trainer, self.log_every_n_steps)

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._searches.release()
        self._backward.detach()
        self._eager.end()
        self._logger.reset()
        if self._audit is not None:
            self._audit.reset()
        clear_diagonals(pl_module.parameters())
