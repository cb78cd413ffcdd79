"""Embeddings and bags of them against dense derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward
from tests.curvature.oracle import Case, check

TOKENS = torch.tensor([[1, 2, 1], [0, 1, 3]])
OFFSETS = torch.tensor([0, 2, 2])


def bags(mode: str, tokens: Tensor = TOKENS, **settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda table: F.embedding_bag(tokens, table, mode=mode, **settings)


CASES = [
    Case("embedding", lambda w: F.embedding(TOKENS, w), [(4, 3)], ["EmbeddingBackward0"]),
    Case("embedding with padding", lambda w: F.embedding(TOKENS, w, padding_idx=1), [(4, 3)], ["EmbeddingBackward0"]),
    Case("embedding with padding from the end", lambda w: F.embedding(TOKENS, w, -1), [(4, 3)], ["EmbeddingBackward0"]),
    Case("sums of embeddings", bags("sum"), [(4, 3)], ["EmbeddingBagBackward0"]),
    Case("means of embeddings", bags("mean"), [(4, 3)], ["EmbeddingBagBackward0"]),
    Case("maxima of embeddings", bags("max"), [(4, 3)], ["EmbeddingBagBackward0"]),
    *[
        Case(f"{mode} of embeddings with padding", bags(mode, padding_idx=1), [(4, 3)], ["EmbeddingBagBackward0"])
        for mode in ("sum", "mean", "max")
    ],
    *[
        Case(
            f"{mode} of embeddings by offsets, one bag empty",
            bags(mode, TOKENS.view(-1), offsets=OFFSETS),
            [(4, 3)],
            ["EmbeddingBagBackward0"],
        )
        for mode in ("sum", "mean", "max")
    ],
    Case(
        "weighted sums of embeddings",
        lambda w, s: F.embedding_bag(TOKENS, w, mode="sum", per_sample_weights=s),
        [(4, 3), (2, 3)],
        ["EmbeddingBagBackward0"],
    ),
    Case(
        "weighted sums of embeddings with padding",
        lambda w, s: F.embedding_bag(TOKENS, w, mode="sum", per_sample_weights=s, padding_idx=1),
        [(4, 3), (2, 3)],
        ["EmbeddingBagBackward0"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("embed", [F.embedding, F.embedding_bag])
@pytest.mark.parametrize("setting", ["sparse", "scale_grad_by_freq"])
def test_what_is_no_gradient_is_refused(embed: Callable[..., Tensor], setting: str) -> None:
    w = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match=setting):
        attach(embed(TOKENS, w, **{setting: True}).square().sum())


def test_half_precision_embedding_carries_single_precision() -> None:
    w = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    h = torch.tensor([1.001, 2.002, 3.003])
    backward((F.embedding(TOKENS, w).float().square() * h / 2).sum())
    torch.testing.assert_close(w.hess_diag, TOKENS.view(-1).bincount()[:, None] * h)


def test_renormalised_embedding() -> None:
    """``max_norm`` changes the table in place before it is read, which is no part of the graph."""
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    backward(F.embedding(TOKENS, w, max_norm=0.5).square().sum() / 2)
    counts = TOKENS.view(-1).bincount().double()
    torch.testing.assert_close(w.hess_diag, counts[:, None].expand(4, 3))
