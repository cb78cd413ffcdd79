"""The engine against an independent implementation of the recursion, on random graphs and on purpose-made ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hesscale_lightning.curvature import backward, engine
from tests.curvature.random_graphs import FAMILIES, Graph, graphs
from tests.curvature.slow import Recording

Draw = Callable[[st.SearchStrategy[Any]], Any]
Loss = Callable[[Tensor, Tensor], Tensor]

METHODS = ("hesscale", "hesscale_gn")
TOLERANCE = 1e-8


def agree(got: Tensor | None, expected: Tensor | None, where: str = "", tolerance: float = TOLERANCE) -> None:
    """Relative error below the tolerance, at the scale of the largest entry."""
    if expected is None or got is None:
        assert got is None, f"{where}: a diagonal where the loss does not lead"
        assert expected is None, f"{where}: no diagonal"
        return
    assert got.shape == expected.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.numel():
        scale = max(float(expected.abs().max()), 1e-4)  # below, cancellation is all there is
        error = float((got - expected).abs().max())
        assert error <= tolerance * scale, f"{where}: error {error:.2e} at scale {scale:.2e}"


def diagonals(loss: Tensor, wanted: list[Tensor], method: Any) -> list[Tensor | None]:
    """The engine's, on tensors without any before."""
    for t in wanted:
        t.hess_diag = None
    backward(loss, wanted, method=method)
    return [t.hess_diag for t in wanted]


def wanted_of(graph: Graph, tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[k] for k in (*graph.wanted, *graph.inner)]


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_engine_equals_the_slow_recursion(family: str, data: st.DataObject) -> None:
    """By the rules, by the program that is written at the next step, and by the same program for the step after it."""
    graph = data.draw(graphs(family))
    engine._structures.clear()  # test_plan_cache.py has graphs that follow each other
    engine._structures.patience = 0
    for method in METHODS:
        leaves = graph.new_leaves()
        with Recording() as recording:
            loss, tensors = graph.run(leaves)
        wanted = wanted_of(graph, tensors)
        expected = recording.curvature(loss, wanted, method)
        got = diagonals(loss, wanted, method)
        steps = [got]
        for _ in range(2):
            loss, tensors = graph.run(graph.new_leaves())
            steps.append(diagonals(loss, wanted_of(graph, tensors), method))
        for k, (*by_step, e) in enumerate(zip(*steps, expected, strict=True)):
            if e is None and k >= len(graph.wanted):  # an unused output beside one that is used: zeros are as good
                e = torch.zeros_like(wanted[k]) if by_step[0] is not None else None
            for step, a in enumerate(by_step, 1):
                agree(a, e, f"{method}, wanted tensor {k}, step {step}")


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_diagonals_are_linear_in_the_scale_of_the_loss(method: str, data: st.DataObject) -> None:
    graph = data.draw(graphs("everything"))
    leaves = graph.new_leaves()
    wanted = [leaves[k] for k in graph.wanted]
    plain = diagonals(graph.run(leaves)[0], wanted, method)
    for scale in (-3.0, 0.25):
        for once, scaled in zip(plain, diagonals(scale * graph.run(leaves)[0], wanted, method), strict=True):
            agree(scaled, None if once is None else scale * once)


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_diagonals_of_a_sum_of_losses_add_up(method: str, data: st.DataObject) -> None:
    """For losses with leaves in common, but nothing else, so that the same operations are joined in each."""
    graph = data.draw(graphs("everything"))
    other = dataclasses.replace(graph, ends=graph.ends[:1])
    leaves = graph.new_leaves()
    wanted = [leaves[k] for k in graph.wanted]
    one, two = (diagonals(part.run(leaves)[0], wanted, method) for part in (graph, other))
    both = diagonals(graph.run(leaves)[0] + other.run(leaves)[0], wanted, method)
    for a, b, c in zip(one, two, both, strict=True):
        parts = [part for part in (a, b) if part is not None]
        agree(c, torch.stack(parts).sum(0) if parts else None)


def network(draw: Draw) -> tuple[nn.Module, Tensor]:
    """A random network with two to four layers, and a batch of five inputs for it."""
    seed = draw(st.integers(0, 999))
    torch.manual_seed(seed)
    width = draw(st.integers(1, 3))
    x = torch.randn(5, width, dtype=torch.float64)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        following = draw(st.integers(1, 4))
        layers.append(nn.Linear(width, following, bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if following > 1 and draw(st.booleans()):
            layers.append(nn.LayerNorm(following))
        width = following
    layers.append(nn.Linear(width, 3))
    return nn.Sequential(*layers).double(), x


ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.ELU, nn.Softsign, nn.Mish, nn.Identity]
LABELS = torch.tensor([0, 1, 2, 1, 1])
TARGET = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
CONVEX: dict[str, Loss] = {
    "mse": lambda y, t: F.mse_loss(y, TARGET[t]),
    "cross entropy": lambda y, t: F.cross_entropy(y, LABELS[t]),
    "smoothed cross entropy": lambda y, t: F.cross_entropy(y, LABELS[t], label_smoothing=0.2),
    "soft cross entropy": lambda y, t: F.cross_entropy(y, TARGET[t].softmax(-1)),
    "bce": lambda y, t: F.binary_cross_entropy_with_logits(y, TARGET[t].sigmoid()),
    "huber": lambda y, t: F.huber_loss(y, TARGET[t], delta=0.4),
    "logsumexp": lambda y, t: y.logsumexp(-1).sum(),
    "poisson": lambda y, t: F.poisson_nll_loss(y, TARGET[t].abs()),
}


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("name", CONVEX)
@given(data=st.data())
def test_gauss_newton_is_never_negative_for_a_convex_loss(name: str, data: st.DataObject) -> None:
    model, x = network(data.draw)
    params = list(model.parameters())
    for h in diagonals(CONVEX[name](model(x), torch.arange(5)), params, "hesscale_gn"):
        assert h is not None
        assert float(h.min()) >= -1e-14 * float(h.abs().max())


@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_the_order_of_a_batch_does_not_matter(method: str, data: st.DataObject) -> None:
    model, x = network(data.draw)
    params = list(model.parameters())
    order = torch.tensor(data.draw(st.permutations(range(5))))
    loss = CONVEX[data.draw(st.sampled_from(list(CONVEX)))]
    plain = diagonals(loss(model(x), torch.arange(5)), params, method)
    for got, expected in zip(diagonals(loss(model(x[order]), order), params, method), plain, strict=True):
        agree(got, expected)
