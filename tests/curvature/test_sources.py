"""Rules that bring curvature of their own: ``rule(op)``."""

import pytest
import torch
from torch import nn

from hesscale_lightning.curvature import (
    UnsupportedOperationError,
    attach,
    backward,
    coverage,
    register_rule,
    with_curvature,
)
from hesscale_lightning.curvature.engine import METHODS


class Fisher(torch.autograd.Function):
    """The identity, with the curvature of a Gaussian's mean of variance ``1 / precision`` in place of the loss's."""

    @staticmethod
    def forward(ctx, x, precision):
        ctx.save_for_backward(precision)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@register_rule("FisherBackward")
def fisher(op):
    return op.tensor(0), None


class Odd(torch.autograd.Function):
    """An operation without a rule."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("method", METHODS)
def test_what_arrives_is_replaced(method: str) -> None:
    """The curvature is that of the quadratic with the source's diagonal, whatever the loss; three ways."""
    x, precision = torch.randn(7, 4).double(), torch.rand(7, 3).double()
    expected, found = network(), network()
    for _ in range(4):  # the rules, while recorded, the program
        expected.zero_grad()
        found.zero_grad()
        for module in (expected, found):
            for p in module.parameters():
                p.hess_diag = None
        out = expected(x)
        g = torch.autograd.grad((out**3).exp().mean(), out)[0]
        out = expected(x)
        # 1/2 precision (out - old)^2 has that diagonal; its gradient is made equal so that g f'' terms are as well.
        loss = (precision / 2 * (out - out.detach()) ** 2 + g * out).sum()
        backward(loss, expected.parameters(), method="hesscale" if method == "hesscale_rank1" else method)
        y = Fisher.apply(found(x), precision)
        backward((y**3).exp().mean(), found.parameters(), method=method)
        for p, q in zip(expected.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(q.hess_diag, p.hess_diag)
            torch.testing.assert_close(q.grad, p.grad)


def test_a_loss_without_curvature_gets_the_source_s() -> None:
    module = network()
    for _ in range(4):
        backward(Fisher.apply(module(torch.ones(1, 4).double()), torch.ones(1, 3).double()).sum(), module.parameters())
        assert module[2].bias.hess_diag.tolist() == [1.0, 1.0, 1.0]
        module[2].bias.hess_diag = None


def test_nothing_is_computed_above_a_source() -> None:
    """No hook is put on the operations of the loss, and what only they would need is not asked for."""
    w = torch.ones(3, requires_grad=True)
    handle = attach((Fisher.apply(w, torch.ones(3)) ** 3).tanh().exp().sum(), [w])
    assert [step.rule.name for step in handle._steps] == ["FisherBackward"]
    handle.remove()


def test_other_paths_keep_the_loss_s_curvature() -> None:
    """A tensor used beside a source receives both."""
    for _ in range(4):
        w = torch.full((3,), 2.0, requires_grad=True)
        backward((Fisher.apply(w, torch.full((3,), 5.0)) ** 2).sum() + (w**3).sum(), [w])
        assert w.hess_diag.tolist() == [17.0, 17.0, 17.0]


def test_what_is_unknown_above_is_still_refused() -> None:
    """A rule may come to be needed when the loss changes, so the whole loss has to be supported."""
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match="OddBackward"):
        attach(Odd.apply(Fisher.apply(w, torch.ones(3))).sum(), [w])


def test_coverage_knows_sources() -> None:
    w = torch.ones(3, requires_grad=True)
    report = coverage((Fisher.apply(w, torch.ones(3)) ** 2).sum(), [w])
    assert report.supported
    assert not report.approximate


def test_gauss_newton_ends_at_a_source() -> None:
    """A function below it is part of the network, also with no parameters between it and the loss."""
    torch.manual_seed(0)
    layer, x, precision = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.rand(5, 2).double()
    for _ in range(4):
        y = layer(x).tanh()
        backward((with_curvature(y, precision) * 3).exp().sum(), layer.parameters(), method="hesscale_gn")
        slope = (1 - y**2).detach()
        torch.testing.assert_close(layer.bias.hess_diag, (precision * slope**2).sum(0))
        torch.testing.assert_close(layer.weight.hess_diag, (precision * slope**2).T @ x**2)
        layer.bias.hess_diag = layer.weight.hess_diag = None


@pytest.mark.parametrize("curvature", [0.25, [1.0, 1.0]])
def test_a_curvature_that_is_no_tensor_is_refused(curvature: object) -> None:
    with pytest.raises(TypeError, match=f"curvature must be a tensor, got {type(curvature).__name__}"):
        with_curvature(torch.ones(2, requires_grad=True), curvature)


class Both(torch.autograd.Function):
    """Two outputs of one input, and curvature of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2, x * 3

    @staticmethod
    def backward(ctx, a, b):
        return 2 * a + 3 * b


@register_rule("BothBackward", multi_output=True)
def both(op):
    return op.tensor(0)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_a_source_may_have_several_outputs(used: tuple[bool, bool]) -> None:
    for _ in range(4):
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        backward(sum((y**2).sum() for y, use in zip(Both.apply(w), used, strict=True) if use), [w])
        assert w.hess_diag.tolist() == [1.0, 2.0]
