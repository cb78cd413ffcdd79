"""``method="hesscale_rank1"``: exact where it promises to be, and closer than HesScale elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscale_lightning.curvature import backward, exact_hess_diag

Act = Callable[[], nn.Module]


def mlp(*sizes: int, act: Act = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def diagonals(loss: Tensor, model: nn.Module, method: Any = "hesscale_rank1") -> list[Tensor]:
    params = list(model.parameters())
    for p in params:
        p.grad = p.hess_diag = None
    backward(loss, params, method=method)
    return [p.hess_diag for p in params]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """L1 distance over the exact diagonal's L1 norm."""
    distance = sum(float((a - b).abs().sum()) for a, b in zip(found, exact, strict=True))
    return distance / sum(float(b.abs().sum()) for b in exact)


def errors(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Of HesScale and of the refined estimate."""
    exact = exact_hess_diag(loss(), model.parameters())
    return error(diagonals(loss(), model, "hesscale"), exact), error(diagonals(loss(), model), exact)


X, T = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 2
Y = torch.linspace(-1, 1, 7, dtype=torch.float64)

SCALAR_HEADS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "mse": (1, lambda y: F.mse_loss(y[:, 0], Y)),
    "mse of a column": (1, lambda y: F.mse_loss(y, Y[:, None], reduction="sum")),
    "mse by hand": (1, lambda y: ((y.squeeze(-1) - Y) ** 2).mean() / 2),
    "two classes": (2, lambda y: F.cross_entropy(y, T)),
    "two soft classes": (2, lambda y: F.cross_entropy(y, torch.stack([Y / 2 + 0.5, 0.5 - Y / 2], 1))),
    "weighted classes": (2, lambda y: F.cross_entropy(y, T, torch.tensor([0.3, 2.0]).double())),
    "smoothed labels": (2, lambda y: F.cross_entropy(y, T, label_smoothing=0.1)),
    "ignored labels": (2, lambda y: F.cross_entropy(y, T.where(T + Y > -0.5, -100))),
    "binary cross-entropy": (1, lambda y: F.binary_cross_entropy_with_logits(y[:, 0], T.double())),
    "huber": (1, lambda y: F.huber_loss(y[:, 0], Y, delta=0.5)),
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("head", SCALAR_HEADS)
def test_piecewise_linear_network_with_one_output_or_two_classes_is_exact(head: str, depth: int) -> None:
    torch.manual_seed(depth)
    outputs, of_output = SCALAR_HEADS[head]
    model = mlp(5, *[6] * depth, outputs, act=nn.ReLU)
    plain, refined = errors(model, lambda: of_output(model(X)))
    assert refined <= 1e-12
    assert depth == 1 or plain > 1e-3
