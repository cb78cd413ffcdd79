"""Parts of a graph that cannot be seen into: they work, or they are refused with advice; never silent zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward
from hesscale_lightning.curvature.compiled import CompiledPass


class Network(nn.Module):
    """Two blocks, checkpointed or not; counts how often a block runs."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4), nn.LayerNorm(4))
            for _ in range(2)
        )
        self.head = nn.Linear(4, 3)
        self.double()
        self.mode = mode
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:

            def run(x: Tensor, block: nn.Module = block) -> Tensor:
                self.runs += 1
                return x + block(x)

            x = run(x) if self.mode == "plain" else checkpoint(run, x, use_reentrant=self.mode == "reentrant")
        return self.head(x)


X = torch.randn(6, 4).double()
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)  # for dropout
    return F.cross_entropy(model(X), LABEL)


@pytest.mark.parametrize("repeat", [1, 2])
def test_checkpointed_blocks_give_the_same_diagonals(repeat: int) -> None:
    plain, checkpointed = Network("plain"), Network("non-reentrant")
    for _ in range(repeat):
        backward(loss_of(plain))
        backward(loss_of(checkpointed))
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.hess_diag, q.hess_diag)
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_checkpointed_block_is_recomputed_once_more_for_all_its_rules(step: int) -> None:
    """At the first step while backward runs, later, when it is known what the program takes, when it is attached."""
    for _ in range(step):
        model = Network("non-reentrant")
        loss = loss_of(model)
        assert model.runs == 2
        attachment = attach(loss)
        assert model.runs == (4 if isinstance(attachment, CompiledPass) else 2)
        loss.backward()
        assert model.runs == 6


def entropy_and_log_probability(x: Tensor) -> Tensor:
    log_p = x - x.logsumexp(-1, keepdim=True)
    return (log_p * log_p.softmax(-1)).sum(-1) + log_p[:, 0].exp()


@pytest.mark.parametrize(
    "block",
    [lambda x: x.exp() * x.exp().softmax(0), entropy_and_log_probability, lambda x: F.rms_norm(x, (4,))],
    ids=["softmax of columns", "shared members", "norm along rows"],
)
def test_checkpointed_composites_give_the_same_diagonals(block: Callable[[Tensor], Tensor]) -> None:
    """Also where two rules ask for one saved tensor, and when the plan is used again."""
    for _ in range(2):
        plain, checkpointed = X.clone().requires_grad_(), X.clone().requires_grad_()
        backward(block(plain).sin().sum())
        backward(checkpoint(block, checkpointed, use_reentrant=False).sin().sum())
        assert torch.equal(plain.hess_diag, checkpointed.hess_diag)


def test_reentrant_checkpointing_is_refused_with_advice() -> None:
    """Its parameters get gradients that no edge of the graph leads to."""
    model = Network("reentrant")
    loss = F.cross_entropy(model(X.clone().requires_grad_()), LABEL)
    for params in (None, list(model.parameters()), list(model.blocks.parameters())):
        with pytest.raises(UnsupportedOperationError, match="use_reentrant=False"):
            attach(loss, params)


def test_compiled_model_is_refused_with_advice_and_works_where_it_runs_eagerly() -> None:
    model = Network("plain").eval()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(UnsupportedOperationError, match="force_eager"):
        attach(loss_of(compiled), model.parameters())
    with torch.compiler.set_stance("force_eager"):
        backward(loss_of(compiled), model.parameters())
    expected = Network("plain").eval()
    backward(loss_of(expected))
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.hess_diag, q.hess_diag)
