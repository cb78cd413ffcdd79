"""Curvature that a tensor is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value


class GivenCurvature(torch.autograd.Function):
    """The identity of its first argument; its second is the curvature there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curvature: Tensor) -> Tensor:
        """Returns x."""
        ctx.save_for_backward(curvature)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Returns the gradient."""
        return grads[0], None


@register_rule("GivenCurvatureBackward")
def given_curvature(op: Operation) -> tuple[Value, None]:
    """``y = x`` with the curvature that :func:`with_curvature` was given, in place of the loss's."""
    return op.tensor(0).to(op.input_dtype(0)).expand(op.input_shape(0)), None


def _expands(small: torch.Size, large: torch.Size) -> bool:
    return len(small) <= len(large) and all(n in (1, m) for n, m in zip(reversed(small), reversed(large), strict=False))


def with_curvature(x: Tensor, curvature: Tensor) -> Tensor:
    r"""The tensor itself, at which the loss's curvature is replaced by one that you give.

    For metrics that are not the loss's Hessian. Put it at a network's output: the gradient of the loss passes
    unchanged, the given curvature goes down from there,

    .. math:: h_x = \text{curvature},

    and what only the loss's curvature above would need is not computed. With ``method="hesscale_gn"`` the diagonals
    below are then a generalised Gauss-Newton's, such as the Fisher information's for that of a distribution's
    parameters. The rest of the loss keeps its own curvature, also where it reaches ``x`` beside the result.

    Args:
        x: Any tensor of the network.
        curvature: Not negative if the metric is to be one; of a shape that expands to that of ``x``. It is not
            differentiated.

    Raises:
        TypeError: If the curvature is no tensor.
        ValueError: If the shape does not fit.

    Example:
        The Fisher information of a Gaussian of variance 4 at its mean, whatever is done with it:

        >>> import torch
        >>> from hesscale_lightning.curvature import backward, with_curvature
        >>> mean = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> backward(with_curvature(mean, torch.tensor(1 / 4)).exp().sum())
        >>> mean.hess_diag
        tensor([0.2500, 0.2500])
    """
    if not isinstance(curvature, Tensor):
        raise TypeError(
            f"curvature must be a tensor, got {type(curvature).__name__}: for one number pass "
            "x.new_full((), number), which is given to all entries"
        )
    if curvature.shape != x.shape and not _expands(curvature.shape, x.shape):
        raise ValueError(
            f"curvature has shape {tuple(curvature.shape)}, which does not expand to the tensor's {tuple(x.shape)}: "
            "give one number for all entries, or one for each"
        )
    result: Tensor = GivenCurvature.apply(x, curvature.detach())
    return result
