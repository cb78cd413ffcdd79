"""The estimates that HesScale is compared with are what they are called: dense definitions, other libraries agree."""

import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1] / "examples/paper"))
import estimators as E
from steps import Steps

from hesscale_lightning.curvature import exact_hess_diag
from hesscale_lightning.curvature.engine import METHODS

CLASSES = 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, CLASSES))


def cnn() -> nn.Sequential:
    convolutions = [nn.Conv2d(1, 2, 3, 2, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(18, CLASSES))


NETWORKS = {"MLP": (mlp, (4,)), "CNN": (cnn, (1, 8, 8))}


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network in double precision, and two batches of three samples."""
    torch.manual_seed(0)
    build, shape = NETWORKS[request.param]
    return build().double(), torch.randn(2, 3, *shape, dtype=torch.float64), torch.randint(CLASSES, (2, 3))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(found: list[Tensor], expected: list[list[Tensor]], **tolerance: float) -> None:
    """Compare each parameter's diagonals with those of one batch after the other."""
    for diagonals, by_batch in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(diagonals, torch.stack(by_batch), **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))


def dense_ggn(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """``mean_n diag(J_n^T H_n J_n)``, from each sample's dense Jacobian and softmax's Hessian."""
    params = [*model.parameters()]
    total = [torch.zeros_like(p) for p in params]
    for one in x:
        logits = model(one.unsqueeze(0))[0]
        p = logits.softmax(0).detach()
        hessian = p.diag() - p.outer(p)
        rows = [torch.autograd.grad(logit, params, retain_graph=True) for logit in logits]
        for (k, left), (m, right) in product(enumerate(rows), enumerate(rows)):
            total = [t + hessian[k, m] * a * b / len(x) for t, a, b in zip(total, left, right, strict=True)]
    return total


def test_the_exact_diagonal_is_the_dense_hessians(case) -> None:
    model, x, y = case
    expected = [exact_hess_diag(cross_entropy(model(one), c), model.parameters()) for one, c in zip(x, y, strict=True)]
    close(E.exact(model, x, y, generator()), expected)


def test_the_exact_ggn_is_the_dense_one(case) -> None:
    model, x, y = case
    expected = [dense_ggn(model, one, c) for one, c in zip(x, y, strict=True)]
    close(E.ESTIMATORS["GGN, exact"](model, x, y, generator()), expected)


def test_ggn_and_hessian_agree_in_a_piecewise_linear_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randint(CLASSES, (2, 3))
    for ggn, hessian in zip(
        E.ESTIMATORS["GGN, exact"](model, x, y, generator()), E.exact(model, x, y, generator()), strict=True
    ):
        torch.testing.assert_close(ggn, hessian, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("estimate", "expected", "tolerance"),
    [
        (E.sampled(E.ggn_of, 2), E.ESTIMATORS["GGN, exact"], 0.05),
        (partial(E.hutchinson, 2), E.exact, 0.2),
    ],
    ids=["GGN, sampled", "Hutchinson"],
)
def test_a_monte_carlo_estimate_has_the_right_mean(case, estimate: Any, expected: Any, tolerance: float) -> None:
    """Relative L1 error, which falls with the root of the number of samples; a wrong factor would stay."""
    model, x, y = case
    right = expected(model, x[:1], y[:1], generator())
    copies = [one[:1].expand(2000, *one.shape[1:]) for one in (x, y)]
    found = [diagonals.mean(0) for diagonals in estimate(model, *copies, generator())]
    error = sum(float((a - b[0]).abs().sum()) for a, b in zip(found, right, strict=True))
    assert error < tolerance * sum(float(b.abs().sum()) for b in right)


def test_kfac_is_the_product_of_mean_squares(case) -> None:
    """By its definition, with hooks: over the batch and the positions, ``E[u^2] E[g^2]`` times the positions."""
    model, x, _ = case
    signals = E.signals_by_sampling(2, model(x.flatten(0, 1)), generator())
    logits, layers = E.forward(model, x)
    found = E.kfac_of(model, logits, layers, signals)
    for batch in range(2):
        part = slice(3 * batch, 3 * batch + 3)
        logits, layers = E.forward(model, x[batch : batch + 1])
        zs = [layer.z for layer in layers]
        draws = [torch.autograd.grad(logits, zs, signal[part], retain_graph=True) for signal in signals]
        for k, layer in enumerate(layers):
            gradients = torch.stack([draw[k].flatten(2) if draw[k].ndim > 2 else draw[k][..., None] for draw in draws])
            positions = gradients.shape[-1]
            outer = gradients.square().sum(0).mean((0, 2))
            inner = layer.u[0].square().mean((0, 1)) * positions
            torch.testing.assert_close(found[2 * k][batch].flatten(1), outer.outer(inner))
            torch.testing.assert_close(found[2 * k + 1][batch], outer * positions)


def test_on_one_sample_kfac_of_linear_layers_is_the_sampled_ggn() -> None:
    """So in the paper's setting, batches of one, the two differ by their random numbers only."""
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(2, 1, 4, dtype=torch.float64)
    logits, layers = E.forward(model, x)
    signals = E.signals_by_sampling(3, logits, generator())
    pairs = zip(E.kfac_of(model, logits, layers, signals), E.ggn_of(model, logits, layers, signals), strict=True)
    for kfac, ggn in pairs:
        torch.testing.assert_close(kfac, ggn)


def test_the_squared_gradient_is_that_of_the_mean_loss(case) -> None:
    model, x, y = case
    params = [*model.parameters()]
    expected = []
    for one, classes in zip(x, y, strict=True):
        gradients = torch.autograd.grad(cross_entropy(model(one), classes), params)
        expected.append([gradient.square() for gradient in gradients])
    close(E.squared_gradient(model, x, y, generator()), expected)


def test_every_method_of_the_engine_is_compared() -> None:
    assert set(E.RECURSIONS.values()) == set(METHODS)
    assert set(E.RECURSIONS) <= set(E.ESTIMATORS)


def test_parameters_in_other_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(TypeError, match="Found a LayerNorm, expected parameters in Linear and Conv2d"):
        E.forward(model, torch.randn(2, 3, 4))


def test_a_timed_step_computes_what_the_estimate_does(case) -> None:
    """Gradient and diagonal of every step whose estimate has no random numbers; the others are there and finite."""
    model, x, y = case
    steps = Steps(model, x[0], y[0])
    params = [*model.parameters()]
    gradients = torch.autograd.grad(cross_entropy(model(x[0]), y[0]), params)
    certain = {**E.ESTIMATORS, "exact diagonal": E.exact}
    for name, step in steps.named().items():
        step()
        for p, gradient in zip(params, gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        if name == "gradient":
            continue
        diagonals = [p.hess_diag for p in params]  # type: ignore[attr-defined]
        if any(word in name for word in ("sample", "probe")):
            assert all(d.shape == p.shape and d.isfinite().all() for d, p in zip(diagonals, params, strict=True)), name
            continue
        expected = certain[name](model, x[:1], y[:1], generator())
        for diagonal, right in zip(diagonals, expected, strict=True):
            torch.testing.assert_close(diagonal, right[0], rtol=1e-9, atol=1e-12)


def test_a_timed_steps_hutchinson_estimate_has_the_right_mean(case) -> None:
    model, x, y = case
    torch.manual_seed(0)
    Steps(model, x[0], y[0]).hutchinson(3000)
    exact = E.exact(model, x[:1], y[:1], generator())
    error = sum(float((p.hess_diag - e[0]).abs().sum()) for p, e in zip(model.parameters(), exact, strict=True))  # type: ignore[attr-defined]
    assert error < 0.2 * sum(float(e[0].abs().sum()) for e in exact)


def test_backpack_finds_the_same_ggn_and_hessian(case) -> None:
    pytest.importorskip("backpack")
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagHessian

    model, x, y = case
    ours = (E.ESTIMATORS["GGN, exact"](model, x, y, generator()), E.exact(model, x, y, generator()))
    with backpack(DiagGGNExact(), DiagHessian()):
        extend(nn.CrossEntropyLoss())(extend(model)(x[0]), y[0]).backward()
    for p, ggn, hessian in zip(model.parameters(), *ours, strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, ggn[0])  # type: ignore[attr-defined]
        torch.testing.assert_close(p.diag_h, hessian[0])  # type: ignore[attr-defined]


def test_curvlinops_finds_the_same_kfac() -> None:
    """With the exact output Hessian in place of samples; its biases share the Kronecker product with ones, as here."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, x, y = mlp().double(), torch.randn(1, 3, 4, dtype=torch.float64), torch.randint(CLASSES, (1, 3))
    params = [*model.parameters()]
    kfac = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), params, [(x[0], y[0])], fisher_type=curvlinops.FisherType.TYPE2
    )
    columns = kfac @ torch.eye(sum(p.numel() for p in params), dtype=torch.float64)
    logits, layers = E.forward(model, x)
    found = E.kfac_of(model, logits, layers, E.signals_of_ggn(logits, generator()))
    torch.testing.assert_close(torch.cat([d[0].flatten() for d in found]), columns.diagonal())
