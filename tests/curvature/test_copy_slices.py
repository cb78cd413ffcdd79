"""In-place operations on a part of a tensor: exact where they work entry by entry, refused where they do not."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward, coverage
from hesscale_lightning.curvature.engine import METHODS
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
    Case(
        "index add, places met twice",
        changed(lambda y, v: y[0].index_add_(0, torch.tensor([1, 1, 3]), v, alpha=2)),
        [(3, 4), (3,)],
        NODE,
    ),
    Case("scatter add", changed(lambda y, v: y[:2].scatter_add_(1, TWICE, v)), [(3, 4), (2, 3)], NODE),
    Case("add that broadcasts, scaled", changed(lambda y, v: y[1:].add_(v, alpha=2)), [(3, 4), (2, 1)], NODE),
    Case("fill a column of a constant", placed(lambda y, v: y[:, 1].fill_(v)), [()], NODE),
    Case("the keys' part of a bias", changed(lambda y: y[4:8].zero_()), [(12,)], NODE),
    Case("zero of a view", lambda x: zeroed_view(x), [(12,)], NODE),
]

TWICE = torch.tensor([[0, 0, 3], [2, 1, 2]])


def zeroed_view(x: Tensor) -> Tensor:
    y = x * 1
    y.view(3, 4)[1:, 2].zero_()
    return y


def in_part(method: str) -> Callable[..., Tensor]:
    return changed(lambda y, *values: getattr(y[:, :2], method)(*values))


def in_view_that_lives(method: str) -> Callable[..., Tensor]:
    def operation(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        part = y[:, :2]
        getattr(part, method)()
        return y, part

    return operation


def in_module(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return changed(lambda y: function(y[1:], inplace=True))


def of_another_thread(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Whose nodes count from anew."""

    def operation(x: Tensor) -> Tensor:
        y = x.clone()
        thread = threading.Thread(target=change, args=(y,))
        thread.start()
        thread.join()
        return y

    return operation


ALONE = [
    "abs_", "acos_", "atan_", "cos_", "cosh_", "digamma_", "erf_", "exp_", "expm1_", "frac_", "log1p_", "log2_", "log_",
    "logit_", "neg_", "reciprocal_", "relu_", "rsqrt_", "sigmoid_", "sign_", "sin_", "sinc_", "sinh_", "sqrt_",
    "square_", "tan_", "tanh_",
]  # fmt: skip
SMALL = torch.tensor([[0.3, 0.7, 0.2, 0.5], [0.9, 0.4, 0.6, 0.1], [0.8, 0.35, 0.15, 0.25]])
CURVED = [
    *[Case(method, in_part(method), [SMALL], NODE) for method in ALONE],
    *[
        Case(f"{method} of a view that lives", in_view_that_lives(method), [SMALL], NODE)
        for method in ("exp_", "tanh_", "log_", "square_")
    ],
    *[
        Case(f"F.{function.__name__}", in_module(function), [(3, 4)], NODE)
        for function in (F.silu, F.elu, F.leaky_relu, F.selu, F.hardtanh, F.celu, F.mish, F.hardswish)
    ],
    Case("exp of another thread", of_another_thread(lambda y: y[0].exp_()), [(3, 4)], NODE),
    Case("square", changed(lambda y: y[0].pow_(2)), [(3, 4)], NODE),
    Case("clamp", changed(lambda y: y[0].clamp_(-0.5, 0.5)), [(3, 4)], NODE),
    Case("exp of zeros", changed(lambda y: y[0].zero_().exp_()), [(3, 4)], NODE),  # exp'(0) = 1 looks linear
    Case("square at zero", changed(lambda y: y[0].pow_(2)), [torch.zeros(3, 4)], NODE),  # looks like a filling
    Case("exp in a transpose", changed(lambda y: y.t()[1:3].exp_()), [(3, 4)], NODE),
    Case("exp of all", changed(lambda y: y[:].exp_()), [(3, 4)], NODE),
    Case("exp of nothing", changed(lambda y: y[3:].exp_()), [(3, 4)], NODE),
    Case("exp in channels last", changed(lambda y: y[:, 1].mul_(0.1).exp_()), [CHANNELS_LAST], NODE),
    Case("exp of a sum", changed(lambda y, v: y[0].add_(v.exp(), alpha=2).exp_()), [(3, 4), (4,)], NODE),
    Case("exp in a constant", placed(lambda y, v: (y[1].copy_(v), y[:2].exp_())), [(4,)], NODE),
    Case("multiply", changed(lambda y, v: y[0].mul_(v)), [(3, 4), (4,)], NODE),
    Case("multiply by zeros", changed(lambda y, v: y[0].mul_(v)), [(3, 4), torch.tensor([0.0, 1, 0, 1])], NODE),
    Case("multiply zeros", changed(lambda y, v: y[0].mul_(v)), [torch.zeros(3, 4), (4,)], NODE),
    Case("multiply a column", changed(lambda y, v: y[:, 0].__imul__(v[:, 1])), [(3, 4), (3, 2)], NODE),
    Case("multiply by a number", changed(lambda y, v: y[1:].mul_(v)), [(3, 4), ()], NODE),
    Case("multiply by rows", changed(lambda y, v: y[1:].mul_(v)), [(3, 4), (2, 1)], NODE),
    Case("multiply a constant", placed(lambda y, v: y.add_(2.0)[0].mul_(v)), [(4,)], NODE),
    Case("add a product", changed(lambda y, a, b: y[1:].addcmul_(a, b, value=3)), [(3, 4), (4,), (2, 1)], NODE),
    Case("interpolate", changed(lambda y, a, b: y[1:].lerp_(a, b)), [(3, 4), (4,), (2, 1)], NODE),
    *[
        Case(f"{name} {shape}", changed(change), [(3, 4), shape], NODE, positive=True)
        for name, change in (
            ("divide", lambda y, v: y[1:].div_(v)),
            ("power", lambda y, v: y[1:].pow_(v)),
            ("atan2", lambda y, v: y[1:].atan2_(v)),
            ("hypot", lambda y, v: y[1:].hypot_(v)),
            ("xlogy", lambda y, v: y[1:].xlogy_(v)),
            ("add a quotient", lambda y, v: y[1:].addcdiv_(torch.arange(4.0).double() - 1, v)),
        )
        for shape in ((2, 4), (2, 1), (4,), ())
    ],
    Case(
        "several, one upon the other",
        changed(lambda y, a, b: (y[0].mul_(a), y[:, 1].log_(), y[1:].square_(), y[2].div_(b), y[:, 0].exp_())),
        [(3, 4), (4,), ()],
        NODE,
        positive=True,
    ),
]


@pytest.mark.parametrize("case", [*CASES, *CURVED], ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x.exp_())
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    "operation",
    [
        changed(lambda y: y[0].cumsum_(0)),
        changed(lambda y: y[0].cumprod_(0)),
        changed(lambda y: y[0].zero_().cumprod_(0)),  # one factor at a time looks like none
        changed(lambda y: y[0].copy_(y[1].clone()).addcmul_(*[y[2].clone()] * 2)),
        changed(lambda y: y[0].addcdiv_(*[y[2].clone()] * 2)),
        changed(lambda y: y[:2].addmm_(y[:2, :2].clone(), y[:2].clone())),
        changed(lambda y: OnceDifferentiable.apply(y[0])),
    ],
)
def test_mixing_operations_and_those_that_hide_derivatives_are_refused(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match="out of place"):
        attach(operation(x).square().sum())
    assert x.grad is None


def test_what_was_overwritten_is_an_error_of_torch_before_backward() -> None:
    """A result that the gradient needs as well."""
    x = torch.randn(3, 4, requires_grad=True)
    y = x.clone()
    y[:2].tanh_()
    y[0].zero_()
    loss = y.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        attach(loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "case", [c for c in CURVED if c.name in ("exp_", "square", "divide (2, 1)")], ids=lambda c: c.name
)
def test_curved_in_single_precision(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_curved_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.linspace(0.5, 2, 3000).view(60, 50).to(dtype).requires_grad_()
    w = torch.linspace(1, 2, 60)[:, None].to(dtype).requires_grad_()
    h = torch.linspace(-1, 1, 3000).view(60, 50)
    y = x.clone()
    y[:, 1:].mul_(w)
    y[:, 0].square_()
    backward((y.float().square() * h / 2).sum())
    a, b, y = x.detach().double(), w.detach().double(), y.detach().double()
    expected = h * b.square()
    expected[:, 0] = h[:, 0] * (4 * a[:, 0].square() + 2 * y[:, 0])
    torch.testing.assert_close(x.hess_diag.double(), expected, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(w.hess_diag.double(), (h * a.square())[:, 1:].sum(1, keepdim=True), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_bias_whose_keys_part_is_zeroed(method: str) -> None:
    """As Swin Transformer v2 does."""
    bias, weight = torch.randn(12, requires_grad=True), torch.randn(12, 5, requires_grad=True)
    part = bias.clone()
    part[4:8].zero_()
    backward(F.linear(torch.randn(3, 7, 5), weight, part).tanh().square().sum(), method=method)
    assert bool((bias.hess_diag[4:8] == 0).all())
    assert bool((bias.hess_diag[8:] != 0).all())


def test_probing_curved_operations_runs_no_hook() -> None:
    calls: list[str] = []
    x, w = torch.rand(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    w.register_hook(lambda grad: calls.append("w"))
    y = x * 1
    y.register_hook(lambda grad: calls.append("y"))
    part = y[0]
    part.div_(w)
    part.exp_()
    part.register_hook(lambda grad: calls.append("part"))
    loss = y.square().sum() + part.sum()
    attach(loss)
    assert not calls
    assert x.grad is None
    assert w.grad is None
    loss.backward()
    assert calls.count("w") == 1
    assert w.hess_diag is not None


def test_curved_operation_in_a_checkpointed_block() -> None:
    def block(x: Tensor, w: Tensor) -> Tensor:
        y = x.exp() * w
        y[0].mul_(w)
        y[1].exp_()
        return y * 2

    def diagonals(checkpointed: bool) -> list[Tensor]:
        x, w = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(), torch.linspace(1, 2, 4).requires_grad_()
        y = checkpoint(block, x, w, use_reentrant=False) if checkpointed else block(x, w)
        backward(y.pow(3).sum())
        return [x.hess_diag, w.hess_diag]

    torch.testing.assert_close(diagonals(True), diagonals(False))


def test_coverage_tells_where_a_product_loses_its_cross_term() -> None:
    x, w = torch.rand(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)

    def status(change: Callable[[Tensor], object]) -> str:
        y = x.clone()
        change(y)
        return next(e.status for e in coverage(y.sum()).entries if e.operation == NODE[0])

    assert status(lambda y: y[0].mul_(w)) == "exact"
    assert status(lambda y: y[0].copy_(x[1])) == "exact"
    assert status(lambda y: y[0].mul_(x[1])) == "approximate"
    assert status(lambda y: y[0].cumsum_(0)) == "unsupported"


def test_program_of_a_curved_operation_is_used_again() -> None:
    """What was recognised is another operation's, of the same structure, from step to step."""
    for step in range(8):
        x, w = torch.rand(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
        y = x.clone()
        if step % 3 == 2:
            y[0].copy_(w)
        else:
            y[step % 3].mul_(w)
        loss = y.pow(3).sum()
        backward(loss)
        expected = 6 * y.detach()
        at_w = expected[0] if step % 3 == 2 else expected[step % 3] * x.detach()[step % 3].square()
        torch.testing.assert_close(w.hess_diag, at_w)
        expected[step % 3 if step % 3 < 2 else 0] *= 0 if step % 3 == 2 else w.detach().square()
        torch.testing.assert_close(x.hess_diag, expected)


def test_derivatives_are_let_go() -> None:
    x = torch.rand(3, 4, requires_grad=True)
    y = x.clone()
    y[0].exp_()
    result = weakref.ref(y)
    loss = y.square().sum()
    del y
    attach(loss)
    gc.disable()
    try:
        del loss
        assert result() is None
    finally:
        gc.enable()


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
