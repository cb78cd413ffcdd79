"""The losses with which the small models of the tests are trained, and their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A module, its data, and the loss as a function of both.
Built = tuple[nn.Module, tuple[Tensor, ...], Callable[..., Tensor]]


def mean_squared_error(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of one prediction for each target."""
    return F.mse_loss(m(x), y)


def classification(module: nn.Module, *shape: int) -> Built:
    """Three classes."""
    data = torch.randn(shape), torch.randint(3, shape[:1])
    return module, data, lambda m, x, y: F.cross_entropy(m(x), y)


def language(module: nn.Module, tokens: Tensor) -> Built:
    """Prediction of the next token; 0 is padding."""

    def loss(m: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)

    return module, (tokens,), loss


def sentences(batch: int = 2, length: int = 6, vocabulary: int = 7) -> Tensor:
    """Random tokens; the last sentence is shorter by two, and padded."""
    tokens = torch.randint(1, vocabulary, (batch, length))
    tokens[-1, -2:] = 0
    return tokens
