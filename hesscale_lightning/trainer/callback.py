"""The Lightning callback: curvature on every training step of any LightningModule.

Lightning calls, for each batch, ``on_train_batch_start``, ``on_before_backward(loss)``, ``loss.backward()``,
``on_after_backward``, where an optimizer steps ``on_before_optimizer_step``, and ``on_train_batch_end``. The callback
decides in the first whether the step has curvature, attaches it before backward, unscales and reduces the diagonals
before the optimizer steps, and logs in the last. It touches neither gradients nor random numbers, so an optimizer that
does not read the diagonals takes bit-identical steps with and without it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from hesscale_lightning.curvature import UnsupportedOperationError, attach, supported_params
from hesscale_lightning.curvature.engine import METHODS, Method
from hesscale_lightning.optim import StepSizeScaling
from hesscale_lightning.trainer.audit import Audit, Reference
from hesscale_lightning.trainer.eager import EagerSteps, has_compiled_code
from hesscale_lightning.trainer.parameters import clear_diagonals, diagonals_of, parameters_of, reduce_diagonals
from hesscale_lightning.trainer.reevaluation import Reevaluation
from hesscale_lightning.trainer.step_log import StepLog, can_log_histograms, layer_names, note_step, write_histogram

# By name: importing the strategies is slow, and a trainer of another namespace has classes of its own.
_SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


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
    ``curvature/histogram``          with ``histogram``: counts of log10 |h|, to TensorBoard
    ``curvature/actual_decrease``    with ``measure_decrease``: fall of the batch's loss, evaluated again after the step
    ``curvature/gain_ratio``         with ``measure_decrease``: actual over predicted decrease
    ``curvature/audit/relative_l1``  with ``audit``: sum of absolute errors over sum of absolute true entries
    ``curvature/audit/cosine``       with ``audit``: cosine of the angle to the true diagonal
    ``curvature/audit/overhead``     with ``audit``: time of forward, backward and curvature over that without curvature
    ================================ ==================================================================================

    The diagonal is that of the loss which the optimizer minimises: of the mean over the micro-batches when gradients
    are accumulated, of the mean over all processes under DDP, without the loss scale under ``16-mixed``. Gradient
    clipping does not change it. With several optimizers, the keys are ``curvature/optimizer_0/trace`` and so on.

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
        histogram: also log a histogram of the entries' sizes, to loggers that have histograms (TensorBoard).
        delta: shorten the steps of whatever optimizers the module returns, so that the second-order term of no step
            exceeds this, in units of the loss (StepSizeScaling; 1e-4 is a good start); null leaves them alone. Not for
            AdaHesScale, which has ``delta`` itself, and not for LBFGS.
        on_unsupported: what to do where the loss contains an operation without a curvature rule: ``error``, or ``skip``
            the parameters behind it for the rest of the run, with one warning that names them. Skipped parameters get
            no diagonal: they count in no statistic, and AdaHesScale and ``delta`` raise for them, so give those to
            another optimizer.
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
        >>> curvature = HesScaleCallback(log_every_n_steps=10)
        >>> trainer = lightning.Trainer(callbacks=[curvature], logger=False, accelerator="cpu")

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
        if method not in METHODS:
            raise ValueError(f"Found method={method!r}, expected one of {', '.join(METHODS)}.")
        if log_every_n_steps is not None and log_every_n_steps < 0:
            raise ValueError(f"Found log_every_n_steps={log_every_n_steps}, expected at least 0 (0: never log).")
        if delta is not None and not delta > 0:
            raise ValueError(f"Found delta={delta}, expected more than 0 (None: leave the optimizers alone).")
        if on_unsupported not in ("error", "skip"):
            raise ValueError(f"Found on_unsupported={on_unsupported!r}, expected 'error' or 'skip'.")
        if audit not in (None, "exact", "hutchinson"):
            raise ValueError(f"Found audit={audit!r}, expected 'exact', 'hutchinson' or None.")
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("audit_every_n_steps", audit_every_n_steps),
            ("audit_entries", audit_entries),
            ("audit_probes", audit_probes),
        ):
            if value < 1:
                raise ValueError(f"Found {name}={value}, expected at least 1.")
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
        self._attachment: Any = None
        self._skipped: dict[int, Tensor] = {}  # parameters behind an operation without a rule, by id
        self._logs: dict[int, StepLog] = {}  # what this batch's end will log, by the optimizer's index
        self._step = -1  # the step that the decisions below are about
        self._refreshing = self._auditing = False
        self._last_refresh = -1
        self._refresh_before = -1
        self._last_audit = -1
        self._first_backward = True

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
        return self._refreshing

    @property
    def needs_graph(self) -> bool:
        """Whether the step that is going on needs the graph of its loss, which a compiled step does not have."""
        return self._auditing or bool(self._skipped)

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
        if self._reevaluation and not (pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1):
            raise MisconfigurationException(
                "HesScaleCallback found measure_decrease=True with manual optimization or accumulate_grad_batches "
                "above 1, where no single batch has the loss that a step decreases. Set measure_decrease to False."
            )
        self._step = -1
        self._last_refresh = self._refresh_before = self._count_steps(trainer, pl_module) - 1
        self._last_audit = self._last_refresh
        self._skipped = {}
        self._first_backward = True
        self._compiled = has_compiled_code(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the trust region around the optimizers, before their state is restored from a checkpoint."""
        if self.delta is not None:
            trainer.optimizers = [StepSizeScaling(optimizer, self.delta) for optimizer in trainer.optimizers]
        if self.histogram and trainer.is_global_zero and not can_log_histograms(trainer.loggers):
            rank_zero_warn(
                "HesScaleCallback found histogram=True and no logger that has histograms. Add a TensorBoardLogger."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decides about the step to come, and has compiled code run eagerly if it is to have curvature."""
        self._decide(trainer, pl_module)
        if not self._refreshing:
            return
        if self._compiled:
            self._eager.begin()
        if self._reevaluation is not None and self._log_is_due(trainer):
            self._reevaluation.before_forward(pl_module.device)
        if self._audit is not None and self._auditing:
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
        self._detach()
        if not self._refreshing or getattr(pl_module, "curvature_is_compiled", False):
            return  # a compiled step brings its curvature with it
        if self._audit is not None and self._auditing:
            if self.on_unsupported == "skip":  # find out for which parameters there will be no diagonal
                self._attach(loss, parameters, pl_module)
                self._detach()
            self._audit.before_backward(loss, self._wanted(parameters), pl_module, seed=self._step)
        self._attach(loss, parameters, pl_module)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets go of the backward pass that is over."""
        self._detach()
        self._first_backward = False
        if self._audit is not None and self._auditing:
            self._audit.after_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Turns what this process computed into the diagonal of the whole batch's loss, and notes what is logged."""
        parameters = parameters_of([optimizer])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._refreshing and scaler is not None:
            torch._foreach_mul_(diagonals_of(parameters), 1.0 / scaler.get_scale())
        if self._refreshing and trainer.world_size > 1:
            reduce_diagonals(trainer, parameters, self._skipped)
        if (scaler is not None or trainer.world_size > 1) and hasattr(optimizer, "record_gradients"):
            # Our optimizers compare each gradient with what backward left; up to here its changes are accounted for.
            optimizer.record_gradients()
        logging = self._refreshing and (self._auditing or self._log_is_due(trainer))
        if logging and any(getattr(p, "hess_diag", None) is not None and p.grad is not None for p in parameters):
            self._note(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what the step has done, and lets compiled code run compiled."""
        self._eager.end()
        if not self._logs:
            return
        logs, self._logs = list(self._logs.values()), {}
        for log in logs:
            log.after_step()
        if self._reevaluation is not None and self._log_is_due(trainer) and isinstance(outputs, dict):
            self._measure_decrease(trainer, pl_module, logs[0], outputs, batch, batch_idx)
        self._write(trainer, logs)

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
        return {"last_refresh": self._last_refresh, "last_audit": self._last_audit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._last_refresh = state_dict["last_refresh"]
        self._last_audit = state_dict.get("last_audit", self._last_refresh)

    # -- how it is done

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks once for each step whether it is to have a diagonal and an audit."""
        step = self._count_steps(trainer, pl_module)
        if step == self._step:
            return
        self._step = step
        # A trust region without any average, as after a run that had none, needs a first diagonal.
        needed = self.delta is not None and any(not getattr(o, "curvature", True) for o in trainer.optimizers)
        self._refreshing = self.should_refresh(step) or needed
        self._auditing = False
        if not self._refreshing:
            return
        self._refresh_before, self._last_refresh = self._last_refresh, step
        if self._audit is not None and _crosses(self._last_audit, step, self.audit_every_n_steps):
            # DDP with a static graph takes note of its first backward pass, which must be the only one.
            self._auditing = not (self._first_backward and getattr(trainer.model, "static_graph", False))
            if self._auditing:
                self._last_audit = step

    def _attach(self, loss: Tensor, parameters: list[Tensor], pl_module: pl.LightningModule) -> None:
        wanted = self._wanted(parameters)
        try:
            self._attachment = attach(loss, wanted, method=self.method)
        except UnsupportedOperationError as error:
            if self.on_unsupported == "error":
                raise
            _, behind = supported_params(loss, wanted)
            self._skipped |= {id(p): p for p in behind}
            names = [name for name, p in pl_module.named_parameters() if id(p) in self._skipped]
            rank_zero_warn(
                f"HesScaleCallback computes no diagonal for {len(names)} parameters, {', '.join(names)}: {error}"
            )
            self._attachment = attach(loss, self._wanted(wanted), method=self.method)

    def _wanted(self, parameters: list[Tensor]) -> list[Tensor]:
        return [p for p in parameters if id(p) not in self._skipped] if self._skipped else parameters

    @staticmethod
    def _count_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        # With several optimizers, global_step counts each of their steps: every second one would be always the same's.
        return trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx

    def _log_is_due(self, trainer: pl.Trainer) -> bool:
        n: int = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps  # type: ignore[attr-defined]
        return n > 0 and _crosses(self._refresh_before, self._last_refresh, n)

    def _note(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        prefix = f"curvature/optimizer_{index}" if len(trainer.optimizers) > 1 else "curvature"
        if self._log_is_due(trainer):
            layers = layer_names(pl_module) if self.per_layer else None
            log = note_step(prefix, optimizer, layers, self.histogram)
        else:
            log = StepLog(prefix, optimizer, {}, only_audit=True)
        if self._audit is not None and self._auditing:
            figures = self._audit.take(lambda x: trainer.strategy.reduce(x, reduce_op="mean"))
            log.values |= {f"audit/{name}": figure for name, figure in figures.items()}
        self._logs[index] = log

    def _measure_decrease(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        log: StepLog,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
    ) -> None:
        after = self._reevaluation.evaluate(trainer, pl_module, batch, batch_idx)  # type: ignore[union-attr]
        if after is None:
            return
        decrease = trainer.strategy.reduce(outputs["loss"].detach().float() - after, reduce_op="mean")
        log.values["actual_decrease"] = decrease
        if "predicted_decrease" in log.values:
            log.values["gain_ratio"] = decrease / log.values["predicted_decrease"]

    def _write(self, trainer: pl.Trainer, logs: Sequence[StepLog]) -> None:
        record = {key: number for log in logs for key, number in log.numbers().items()}
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and not all(abs(record.get(f"{log.prefix}/trace", 0.0)) < float("inf") for log in logs):
            return  # the loss scale was too large: the scaler skips this step, and there is nothing to report
        # Not self.log: that reaches a logger only on the trainer's own log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics(record, step=self._last_refresh)
        trainer.callback_metrics.update({key: torch.tensor(number) for key, number in record.items()})
        if self.histogram and trainer.is_global_zero:
            for log in logs:
                if log.counts is not None:
                    loggers = can_log_histograms(trainer.loggers)
                    write_histogram(loggers, f"{log.prefix}/histogram", log.counts, self._last_refresh)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._detach()
        self._eager.end()
        self._logs = {}
        if self._audit is not None:
            self._audit.reset()
        clear_diagonals(pl_module.parameters())


def _crosses(before: int, step: int, n: int) -> bool:
    """Whether a multiple of n lies between two steps, counted from 1."""
    return (step + 1) // n > (before + 1) // n
