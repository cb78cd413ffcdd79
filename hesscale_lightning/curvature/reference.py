"""Dense references, slow and obviously right, shipped so that users can check rules and models of their own.

Everything here differentiates twice by autograd and visits every entry, so it is for small networks. Use float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def exact_hess_diag(loss: Tensor, params: Iterable[Tensor]) -> list[Tensor]:
    """The exact diagonal of the Hessian of ``loss``, ``d2L/dp_i^2``, one double backward pass for every entry.

    Args:
        loss: A scalar whose graph has not been freed; every operation in it must be twice differentiable.
        params: Tensors of the graph. One that the loss does not reach gets zeros.

    Returns:
        A tensor of each parameter's shape and dtype, in the order of ``params``.

    Raises:
        ValueError: The loss has more than one element.

    Example:
        >>> import torch
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> exact_hess_diag((w**3).sum(), [w])
        [tensor([ 6., 12.])]
    """
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must have one element, got shape {tuple(loss.shape)}: reduce it with mean() or sum()"
        )
    params = list(params)
    gradients = torch.autograd.grad(loss.sum(), params, create_graph=True, allow_unused=True)
    diagonals = []
    for p, g in zip(params, gradients, strict=True):
        entries = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        if g is not None and g.requires_grad:
            for i, entry in enumerate(g.reshape(-1)):
                (row,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
                if row is not None:
                    entries[i] = row.reshape(-1)[i]
        diagonals.append(entries.view(p.shape))
    return diagonals


def exact_local_diag(
    operation: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    g: Sequence[Tensor],
    h: Sequence[Tensor],
) -> list[Tensor]:
    """What a rule must return for one operation ``y_1, y_2, ... = f(x_1, x_2, ...)``, from its dense derivatives.

    ``h_x = sum_j (dy_j/dx)^2 h_j + sum_j g_j d2y_j/dx^2``, the sums running over all entries of all outputs.

    Args:
        operation: The function ``f``; returns a tensor or several.
        inputs: The tensors ``x_i`` to differentiate by.
        g: Gradient of the loss with respect to each output.
        h: Curvature of the loss with respect to each output.

    Returns:
        A tensor of each input's shape.

    Example:
        >>> import torch
        >>> x, one = torch.tensor([2.0]), torch.ones(1)
        >>> exact_local_diag(torch.square, [x], [one], [one])  # (2 x)^2 + 2
        [tensor([18.])]
    """
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = operation(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    score = torch.stack([(y * g_y).sum() for y, g_y in zip(outputs, g, strict=True)]).sum()
    diagonals = exact_hess_diag(score, inputs) if score.requires_grad else [torch.zeros_like(x) for x in inputs]
    for y, h_y in zip(outputs, h, strict=True):
        for entry, weight in zip(y.reshape(-1), h_y.reshape(-1), strict=True):
            if not entry.requires_grad:
                continue
            rows = torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True)
            diagonals = [
                d if row is None else d + row.square() * weight for d, row in zip(diagonals, rows, strict=True)
            ]
    return diagonals
