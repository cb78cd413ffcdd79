"""What the callback refuses: arguments out of range, and trainers and modules that it cannot work with."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hesscale_lightning.curvature.engine import METHODS
from hesscale_lightning.optim.sharded import is_distributed

# By name: importing the strategies is slow, and a trainer of another namespace has classes of its own.
_REFUSED = ("FSDPStrategy", "DeepSpeedStrategy")
_MODEL_PARALLEL = "ModelParallelStrategy"


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


def is_model_parallel(trainer: pl.Trainer) -> bool:
    """Whether the trainer's strategy is Lightning's ModelParallelStrategy, for fully_shard and tensor parallelism."""
    return any(cls.__name__ == _MODEL_PARALLEL for cls in type(trainer.strategy).__mro__)


def check_trainer(
    trainer: pl.Trainer, pl_module: pl.LightningModule, callback: type[Callback], measure_decrease: bool
) -> None:
    """Raises MisconfigurationException for what cannot work, before any data is loaded."""
    if {cls.__name__ for cls in type(trainer.strategy).__mro__}.intersection(_REFUSED):
        raise MisconfigurationException(
            f"HesScaleCallback found the strategy {type(trainer.strategy).__name__}, which splits parameters "
            "between processes; curvature needs whole parameters. Use strategy='ddp' or a single device, or "
            "ModelParallelStrategy with fully_shard in configure_model."
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


def check_split_options(trainer: pl.Trainer, method: str, audit: bool) -> None:
    """Raises MisconfigurationException for options that do not work where parameters are split between processes."""
    if not is_model_parallel(trainer):
        return
    refused = {
        "an audit": (audit, "which differentiates twice through parameters that are split; set audit to null"),
        "method='hesscale_rank1'": (method == "hesscale_rank1", "which needs whole parameters; use 'hesscale'"),
    }
    for option, (found, advice) in refused.items():
        if found:
            raise MisconfigurationException(
                f"HesScaleCallback found {option} with the strategy {type(trainer.strategy).__name__}, {advice}."
            )


def check_split(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raises MisconfigurationException unless parameters are split so that processes get one gradient.

    Asked when ``configure_model`` and ``configure_optimizers`` have run: at ``setup`` nothing is split yet.
    """
    if not is_model_parallel(trainer):
        return
    mesh = pl_module.device_mesh
    assert mesh is not None
    copies = mesh["data_parallel"].size()
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
    if not held.intersection(map(id, named.values())):
        raise MisconfigurationException(
            f"HesScaleCallback found no parameter of {type(pl_module).__name__} in its optimizers, expected the "
            "parameters as configure_model leaves them: make the optimizers in configure_optimizers, from "
            "self.parameters()."
        )
    if copies == 1:
        return
    alone = [name for name, p in named.items() if id(p) in held and not _is_averaged(p, mesh)]
    if alone:
        raise MisconfigurationException(
            f"HesScaleCallback found data_parallel_size={copies} and {len(alone)} parameters that no fully_shard "
            f"splits, {', '.join(alone[:3])}: their gradients would differ between processes. Call "
            "fully_shard(module, mesh=self.device_mesh['data_parallel']) on the modules that hold them, in "
            "configure_model."
        )


def _is_averaged(parameter: Any, mesh: Any) -> bool:
    """Whether a parameter is spread over all that have data of their own."""
    if not is_distributed(parameter):
        return False
    own = parameter.device_mesh
    return bool(own.size() == mesh.size() or own == mesh["data_parallel"])
