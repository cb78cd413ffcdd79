"""Networks whose steps are compiled, in the table that every comparison with the eager engine runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, and random batches for it, in float64."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    classes: int = 3

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()

    def batch(self, seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1000 + seed)
        x = self.inputs(size)
        return (x.double() if x.is_floating_point() else x), torch.randint(self.classes, (size,))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


class Shared(nn.Module):
    """One weight used twice, once transposed, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))) @ self.first.weight)


class Frozen(nn.Module):
    """A frozen layer, and one that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(5, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(torch.tanh(self.below(x)))))


CASES = [
    Case("mlp", mlp, lambda n: torch.randn(n, 5)),
    Case("cnn_with_batch_norm", cnn, lambda n: torch.randn(n, 2, 8, 8)),
    Case(
        "dropout",
        lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)),
        lambda n: torch.randn(n, 5),
    ),
    Case("gru", Recurrent, lambda n: torch.randn(n, 4, 3)),
    Case("transformer", Transformer, lambda n: torch.randint(7, (n, 5))),
    Case("shared_weights", Shared, lambda n: torch.randn(n, 5)),
    Case("frozen_layers", Frozen, lambda n: torch.randn(n, 5)),
]
BY_NAME = {case.name: case for case in CASES}
loss_fn = F.cross_entropy


def clear(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = p.hess_diag = None  # type: ignore[attr-defined]


def assert_same(module: nn.Module, reference: nn.Module, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Gradients, diagonals, parameters and buffers are equal to rounding."""
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        for what in ("grad", "hess_diag"):
            a, b = getattr(p, what, None), getattr(q, what, None)
            assert (a is None) == (b is None), (name, what)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=name, w=what: f"{n}.{w}: {m}")
    for (name, a), b in zip(module.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
