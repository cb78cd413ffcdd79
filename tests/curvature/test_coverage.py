"""The report says what attach() does, and why a diagonal is not exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscale_lightning.curvature import attach, backward, coverage, exact_hess_diag, supported_params


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_plain_network_is_exact_throughout() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    report = coverage(F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))))
    assert report.supported
    assert not report.approximate
    assert sorted(e.operation for e in report.exact) == [
        "AddmmBackward0", "AddmmBackward0", "LogSoftmaxBackward0", "NllLossBackward0", "TanhBackward0",
    ]  # fmt: skip
    assert "5 exact, 0 approximate, 0 unsupported" in str(report)


def test_residual_addition_is_named_with_the_place_where_its_paths_part() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    hidden = first(torch.randn(4, 3))
    report = coverage((hidden + second(hidden).tanh()).square().mean())
    (entry,) = report.approximate
    assert entry.operation == "AddBackward0"
    assert "paths from AddmmBackward0 meet here" in entry.reason


def test_sum_of_two_losses_is_exact_because_no_curvature_arrives_there() -> None:
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return w.exp().sum() + (w * 2).sin().sum()

    assert not coverage(loss()).approximate
    (exact,) = exact_hess_diag(loss(), [w])
    backward(loss())
    torch.testing.assert_close(w.hess_diag, exact)


def test_tied_weights_are_reported_and_untied_ones_are_not() -> None:
    x, w, v = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    tied = coverage(((x @ w).tanh() @ w).square().sum())
    assert [e.operation for e in tied.approximate] == ["MmBackward0"]
    assert "a leaf of shape (3, 3)" in tied.approximate[0].reason
    assert not coverage(((x @ w).tanh() @ v).square().sum()).approximate


def test_joined_operations_are_exact_and_listed() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    report = coverage((x * x.sigmoid()).exp().sum())
    assert not report.approximate
    assert any(e.reason == "joined: Mul, Sigmoid" for e in report.exact)


def test_unsupported_operation_is_reported_not_raised() -> None:
    w = torch.randn(3, requires_grad=True)
    report = coverage(Opaque.apply(w.exp()).sum())
    assert not report.supported
    assert [e.operation for e in report.unsupported] == ["OpaqueBackward"]
    assert "register_rule" in report.unsupported[0].reason
    assert str(report).splitlines()[2].startswith("unsupported  OpaqueBackward")


def test_report_leaves_the_graph_as_it_was() -> None:
    w = torch.randn(3, requires_grad=True)
    loss = w.exp().sum()
    coverage(loss)
    attach(loss)
    loss.backward()
    torch.testing.assert_close(w.hess_diag, w.detach().exp())


def test_unreached_tensors_are_counted() -> None:
    w, spare = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    report = coverage(w.exp().sum(), [w, spare])
    assert report.unreached == 1
    assert "1 of the wanted tensors are not reached" in str(report)


@pytest.mark.parametrize("bad", [torch.ones(2, requires_grad=True) * 2, torch.ones(())])
def test_bad_losses_are_refused_as_by_attach(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="loss"):
        coverage(bad)


def test_parameters_behind_an_unsupported_operation_are_split_off() -> None:
    """Also one that is reached another way as well: its diagonal would lack a part."""
    head, body, shared = (torch.randn(3, requires_grad=True) for _ in range(3))
    loss = (Opaque.apply(body.exp() * shared) * head * shared).exp().sum()
    reachable, skipped = supported_params(loss, [head, body, shared])
    assert [p is head for p in reachable] == [True]
    assert {id(p) for p in skipped} == {id(body), id(shared)}
    backward(loss, reachable)
    assert head.hess_diag is not None


def test_a_freed_graph_is_told_as_by_attach() -> None:
    w = torch.randn(3, requires_grad=True)
    loss = w.exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"graph of this loss was freed by an earlier backward\(\)"):
        coverage(loss)
