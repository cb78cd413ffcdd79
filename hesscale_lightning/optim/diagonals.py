"""The contract with the curvature engine: where a Hessian diagonal comes from and who clears it.

Before a step every parameter has ``p.grad`` and, if curvature was computed in this step, ``p.hess_diag`` of the same
shape (float32 for a half-precision parameter, else of the parameter's dtype). Like ``.grad`` the diagonal accumulates
over backward passes. An optimizer *takes* the diagonal: once consumed it is removed from the parameter, so that it can
never enter a running average twice, whatever clears the gradients afterwards.
"""

from typing import Any

from torch import Tensor

from hesscale_lightning.optim.parameter_state import state_dtype
from hesscale_lightning.optim.sharded import check_placements


def peek_diagonal(param: Tensor) -> Tensor | None:
    """The diagonal that waits on ``param``, or None; checked for its shape and brought to the state's dtype."""
    diagonal: Tensor | None = getattr(param, "hess_diag", None)
    if diagonal is None:
        return None
    if diagonal.shape != param.shape:
        raise ValueError(
            f"hess_diag has shape {tuple(diagonal.shape)}, but its parameter has shape {tuple(param.shape)}"
        )
    check_placements(param, "hess_diag", diagonal)
    dtype = state_dtype(param)
    return diagonal if diagonal.dtype == dtype else diagonal.to(dtype)


def clear_diagonals(param_groups: list[dict[str, Any]]) -> None:
    """Drop the diagonals of every parameter, as ``zero_grad`` does with the gradients."""
    for group in param_groups:
        for param in group["params"]:
            if getattr(param, "hess_diag", None) is not None:
                param.hess_diag = None


def missing_diagonal_error(optimizer_name: str, group_index: int, index: int, group: dict[str, Any]) -> RuntimeError:
    """The error for a parameter that has a gradient but never had a diagonal.

    Args:
        optimizer_name: class name for the message.
        group_index: position of the param group.
        index: position of the parameter in its group.
        group: the param group itself; names are used when it was built from named parameters.
    """
    name = f"'{group['param_names'][index]}', " if "param_names" in group else ""
    shape = tuple(group["params"][index].shape)
    return RuntimeError(
        f"{optimizer_name}: parameter {index} of group {group_index} ({name}shape {shape}) has a gradient but no "
        "Hessian diagonal (hess_diag is None) and no earlier one to fall back on. Call "
        "hesscale_lightning.attach(loss) before loss.backward(), or add HesScaleCallback() to the Trainer's callbacks."
    )
