"""In-place operations on a part of a tensor: exact where they are linear, refused where they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward
from tests.curvature.oracle import Case, check

CHANNELS_LAST = torch.arange(36.0).view(2, 3, 2, 3).to(memory_format=torch.channels_last)
NODE = ["torch::autograd::CopySlices"]


def changed(change: Callable[..., object]) -> Callable[..., Tensor]:
    """Applies ``change`` to a tensor that is not a leaf, and returns that tensor."""

    def operation(x: Tensor, *values: Tensor) -> Tensor:
        y = x.clone()
        change(y, *values)
        return y

    return operation


def placed(change: Callable[..., object]) -> Callable[..., Tensor]:
    """Applies ``change`` to a constant tensor of shape (3, 4)."""

    def operation(*values: Tensor) -> Tensor:
        y = torch.zeros(3, 4, dtype=torch.float64)
        change(y, *values)
        return y

    return operation


def buffer_of_steps(x: Tensor, w: Tensor) -> Tensor:
    y = torch.empty(4, 3, dtype=x.dtype)
    for step in range(4):
        y[step] = x[step] if step % 2 else w
    return y


CASES = [
    Case("copy", changed(lambda y, v: y[1].copy_(v)), [(3, 4), (4,)], NODE),
    Case("copy that broadcasts", changed(lambda y, v: y[1:].copy_(v)), [(3, 4), (4,)], NODE),
    Case("copy into columns", changed(lambda y, v: y[:, ::2].copy_(v)), [(3, 4), (3, 2)], NODE),
    Case("copy into a transpose", changed(lambda y, v: y.t()[1:3].copy_(v)), [(3, 4), (2, 3)], NODE),
    Case("copy into a diagonal", changed(lambda y, v: y.diagonal().copy_(v)), [(3, 4), (3,)], NODE),
    Case("copy into nothing", changed(lambda y, v: y[3:].copy_(v)), [(3, 4), (0, 4)], NODE),
    Case("copy of a number", changed(lambda y, v: y[1, 1].copy_(v)), [(3, 4), ()], NODE),
    Case("copy into a constant", placed(lambda y, v: y[1].copy_(v)), [(4,)], NODE),
    Case("several copies into a constant", buffer_of_steps, [(4, 3), (3,)], NODE),
    Case("copy of a part to another", changed(lambda y: y[0].copy_(y[2].clone())), [(3, 4)], NODE),
    Case("fill", changed(lambda y: y[:, 1].fill_(2.0)), [(3, 4)], NODE),
    Case("copy of a constant", changed(lambda y: y[:, ::3].copy_(torch.ones(3, 2))), [(3, 4)], NODE),
    Case("add of a constant", changed(lambda y: y[1].add_(1.0)), [(3, 4)], NODE),
    Case("part of channels last", changed(lambda y, v: y[:, 1].copy_(v)), [CHANNELS_LAST, (2, 2, 3)], NODE),
    Case("zero", changed(lambda y: y[1:].zero_()), [(3, 4)], NODE),
    Case("setitem", changed(lambda y: y.__setitem__((slice(None), 1), 0.0)), [(3, 4)], NODE),
    Case("fill with a number of the graph", changed(lambda y, v: y[:, 1].fill_(v)), [(3, 4), ()], NODE),
    Case("fill all of a constant", placed(lambda y, v: y[:].fill_(v)), [()], NODE),
    Case("masked fill", changed(lambda y: y[0].masked_fill_(torch.arange(4) > 1, 3.0)), [(3, 4)], NODE),
    Case(
        "masked fill from the graph",
        changed(lambda y, v: y[0].masked_fill_(torch.arange(4) > 1, v)),
        [(3, 4), ()],
        NODE,
    ),
    Case("index copy", changed(lambda y, v: y[:, 1].index_copy_(0, torch.tensor([2, 0]), v)), [(3, 4), (2,)], NODE),
    Case("scatter", changed(lambda y, v: y[1].scatter_(0, torch.tensor([3, 0]), v)), [(3, 4), (2,)], NODE),
    Case("add", changed(lambda y, v: y[1].add_(v, alpha=-3)), [(3, 4), (4,)], NODE),
    Case("add that broadcasts", changed(lambda y, v: y[1:].add_(v)), [(3, 4), (1,)], NODE),
    Case("subtract a number of the graph", changed(lambda y, v: y[0].sub_(v)), [(3, 4), ()], NODE),
    Case("augmented assignment", changed(lambda y, v: y[:, 0].__isub__(v)), [(3, 4), (3,)], NODE),
    Case("add to a constant", placed(lambda y, v: y[1].add_(v)), [(4,)], NODE),
    Case("multiply by a constant", changed(lambda y: y[1].mul_(3.0)), [(3, 4)], NODE),
    Case("multiply by constants", changed(lambda y: y[1:].mul_(torch.arange(4) - 1.0)), [(3, 4)], NODE),
    Case("divide", changed(lambda y: y[1].div_(3.0)), [(3, 4)], NODE),
    Case("part of a part", changed(lambda y, v: y[1:][0][2:].copy_(v)), [(3, 4), (2,)], NODE),
    Case("two parts", changed(lambda y, v: (y[0].copy_(v), y[:, 0].mul_(2.0))), [(3, 4), (4,)], NODE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "operation",
    [
        changed(lambda y: y[0].exp_()),
        changed(lambda y: y[0].zero_().exp_()),  # exp'(0) = 1 looks linear
        changed(lambda y: y[0].pow_(2)),
        changed(lambda y: y[0].tanh_()),
        changed(lambda y: y[0].cumsum_(0)),
        changed(lambda y: y[0].mul_(y[1].clone())),
        changed(lambda y: y[0].sigmoid_()),
        changed(lambda y: y[0].add_(y[1].clone().exp_(), alpha=2).exp_()),
    ],
)
def test_curved_and_mixing_operations_are_refused(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match="out of place"):
        attach(operation(x).square().sum())


def test_one_number_in_an_unknown_part_of_a_constant_is_refused() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    y = torch.zeros(3, 4)
    y[:, 1].fill_(x)
    with pytest.raises(UnsupportedOperationError, match="expand the number"):
        attach(y.square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("into", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_copies_between_precisions_find_every_entry(dtype: torch.dtype, into: torch.dtype) -> None:
    """More entries than the precision can number."""
    x = torch.ones(70, 100, dtype=dtype, requires_grad=True)
    y = torch.zeros(100, 90, dtype=into)
    y.t()[10:80] = x
    h = torch.randn(100, 90)
    backward((y.double().square() * h / 2).sum())
    assert x.hess_diag.dtype is torch.float32
    torch.testing.assert_close(x.hess_diag, h.t()[10:80].contiguous())


def test_probing_leaves_gradients_and_random_numbers_alone() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = x.clone()
    y[1] = x[0]
    state = torch.get_rng_state()
    loss = y.square().sum()
    attach(loss)
    assert x.grad is None
    assert torch.equal(state, torch.get_rng_state())
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * torch.tensor([[2.0], [0.0], [1.0]]))
    torch.testing.assert_close(x.hess_diag, torch.tensor([[4.0], [0.0], [2.0]]).expand(3, 4).contiguous())
