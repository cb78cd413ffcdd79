"""Joining along rows where it is easy to take one dimension for another: against the slow recursion."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesscale_lightning.curvature import engine, exact_hess_diag, registered_rules
from tests.curvature import slow
from tests.curvature.slow import Recording
from tests.curvature.test_random_graphs import METHODS, agree, diagonals

ROW = torch.tensor([[0.5, -1.0, 0.2], [-0.3, 0.1, 0.4], [1.0, 0.7, -0.2]], dtype=torch.float64)
Case = tuple[Callable[..., Tensor], list[tuple[int, ...]]]
CASES: dict[str, Case] = {
    "x and its sum without a last dimension": (lambda x: (x.sum(0) * x).square().sum(), [(3,)]),
    "x and its mean, broadcast along columns": (lambda x: (x.mean(-1) * x).square().sum(), [(3, 3)]),
    "x and its kept mean": (lambda x: (x * torch.sigmoid(x.mean(-1, keepdim=True))).exp().sum(), [(3, 3)]),
    "x unsqueezed twice": (lambda x: (x.unsqueeze(-1) * x.unsqueeze(-1)).exp().sum(), [(3, 3)]),
    "x and exp(x) unsqueezed": (lambda x: (x.unsqueeze(-1) * x.exp().unsqueeze(-1)).tanh().sum(), [(3, 3)]),
    "softmax unsqueezed": (
        lambda x: (x.softmax(-1).unsqueeze(-1) * x.softmax(-1).unsqueeze(-1)).exp().sum(),
        [(3, 3)],
    ),
    "rows of one entry beside longer ones": (
        lambda x, y: (torch.lerp(x, x, 0.3).mean(0, keepdim=True) * y).square().sum(),
        [(1,), (3,)],
    ),
    "alike for all entries": (
        lambda x, y: (torch.lerp(x, x, 0.3).mean(0, keepdim=True) * y).square().sum(),
        [(3,), (3,)],
    ),
    "expanded to longer rows": (
        lambda x: ((x * x).sum(-1, keepdim=True).expand(2, 5).softmax(-1) * torch.arange(5).double()).sum().exp(),
        [(2, 3)],
    ),
    "maximum in double precision": (
        lambda x: torch.lerp(x.max(0).values, x.tanh(), 0.3).square().sum(),
        [(3,)],
    ),
    "masks in double precision": (
        lambda x: (0.3 * x.clamp(-0.5, 0.5) - x.mean(-1, keepdim=True) * 0.1).exp().sum(),
        [(2, 3)],
    ),
    "no curvature arrives": (lambda x: torch.lerp(x + x, (x + x).mean(-1, keepdim=True), 0.3)[0].sum(), [(2, 3)]),
    "entropy of columns": (
        lambda x: ((w := x - x.logsumexp(0, keepdim=True)).exp() * w).sum(),
        [(3, 3)],
    ),
    "entropy of rows": (
        lambda x: ((w := x - x.logsumexp(1, keepdim=True)).exp() * w).sum(),
        [(3, 3)],
    ),
    "a mask between two normalisations": (
        lambda x: (
            ((w := (x.log_softmax(-1) + 0).masked_fill(ROW > 0, -1.0)) - w.logsumexp(-1, keepdim=True)).exp().sum()
        ),
        [(3, 3)],
    ),
    "a mask that broadcasts its tensor": (
        lambda x: (torch.where(ROW > 0, x * x.tanh(), 1.0) * x.sum(-1, keepdim=True)).square().sum(),
        [(3,)],
    ),
    "a mask between two tensors": (
        lambda x, y: ((w := torch.where(ROW > 0, x, y)) * w.softmax(-1)).sum().exp(),
        [(3, 3), (3, 3)],
    ),
    "paths that meet again below a value that others use": (
        lambda x, y: (
            (
                (v := y.exp()).log() * v.square() - ((u := x + 0.3 * v) - x).square().sum(-1, keepdim=True) * u.sin()
            ).sum()
            + u.square().square().sum()
        ),
        [(3, 3), (3, 3)],
    ),
    "paths that meet again, and below that once more": (
        lambda x, y: (
            (w := ((z := torch.addcmul(x, x, y, value=0.5)) * x.sigmoid()).tanh()).tanh().square().sum()
            + ((w * y) * w).square().square().sum()
            + z.sin().sum()
        ),
        [(2, 3), (2, 3)],
    ),
    "a squashed sample that a critic judges too": (
        lambda x, y: (
            (
                ((u := x + 0.3 * (v := y.exp())) - x).square().div(2 * v.square()).add(v.log()).sum(-1)
                - (1.1 - (a := u.tanh()).square()).log().sum(-1)
            ).sum()
            + (a @ ROW).square().sum()
        ),
        [(3, 3), (3, 3)],
    ),
}


def leaves_of(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in case[1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_rows_are_joined_only_where_they_line_up(name: str, method: str) -> None:
    engine._structures.clear()
    leaves = leaves_of(CASES[name])
    with Recording() as recording:
        loss = CASES[name][0](*leaves)
    for got, expected in zip(diagonals(loss, leaves, method), recording.curvature(loss, leaves, method), strict=True):
        agree(got, expected)


def test_an_entropy_of_rows_is_exact() -> None:
    engine._structures.clear()
    (x,) = leaves_of(CASES["entropy of rows"])
    (exact,) = exact_hess_diag(CASES["entropy of rows"][0](x), [x])
    agree(diagonals(CASES["entropy of rows"][0](x), [x], "hesscale")[0], exact)


@pytest.mark.parametrize(
    "order",
    [("columns", "rows"), ("rows", "columns"), ("rows", "columns", "rows", "columns")],
    ids=lambda order: ", ".join(order),
)
def test_a_plan_for_another_dimension_is_not_used(order: tuple[str, ...]) -> None:
    """The graphs of both entropies have the same nodes, and only that of rows can be joined along rows."""
    engine._structures.clear()
    for which in order:
        function = CASES[f"entropy of {which}"][0]
        leaves = leaves_of(CASES[f"entropy of {which}"])
        with Recording() as recording:
            loss = function(*leaves)
        got = diagonals(loss, leaves, "hesscale")
        agree(got[0], recording.curvature(loss, leaves)[0], which)


def test_the_slow_recursion_knows_every_operation_that_may_be_joined() -> None:
    """Its lists are a second, independent statement of the definition, so a new operation must be added to both."""
    lists = slow.ELEMENTWISE | slow.MEETING_LOSSES | {"log_sigmoid"}
    known = {name.replace("_", "") for name in lists}
    joined = [name for name, rule in registered_rules().items() if rule.partials is not None]
    names = {re.sub(r"Backward\d*$", "", name).lower() for name in joined if name.endswith(tuple("0123456789"))}
    assert names - known == set(), "add them to ELEMENTWISE in slow.py"
