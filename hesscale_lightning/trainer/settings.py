"""What the callback refuses: arguments out of range, and trainers and modules that it cannot work with."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hesscale_lightning.curvature.engine import METHODS

# By name: importing the strategies is slow, and a trainer of another namespace has classes of its own.
_SHARDING_STRATEGIES = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_arguments(
    method: str,
    log_every_n_steps: int | None,
    delta: float | None,
    on_unsupported: str,
    audit: str | None,
    counts: dict[str, int],
) -> None:
    """Raises ValueError for an argument out of range; every one of ``counts`` must be at least 1."""
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
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"Found {name}={value}, expected at least 1.")


def check_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, callback: type[Callback], measure_decrease: bool
) -> None:
    """Raises MisconfigurationException for what cannot work, before any data is loaded."""
    found = {cls.__name__ for cls in type(trainer.strategy).__mro__}.intersection(_SHARDING_STRATEGIES)
    if found:
        raise MisconfigurationException(
            f"HesScaleCallback found the strategy {type(trainer.strategy).__name__}, which splits parameters "
            "between processes; curvature needs whole parameters. Use strategy='ddp' or a single device."
        )
    others = [other for other in trainer.callbacks if isinstance(other, callback)]  # type: ignore[attr-defined]
    if len(others) > 1:
        raise MisconfigurationException(
            f"Found {len(others)} HesScaleCallbacks, expected one: each would add its diagonal to p.hess_diag. "
            "To compare methods, train once with each."
        )
    if measure_decrease and not (pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1):
        raise MisconfigurationException(
            "HesScaleCallback found measure_decrease=True with manual optimization or accumulate_grad_batches "
            "above 1, where no single batch has the loss that a step decreases. Set measure_decrease to False."
        )
