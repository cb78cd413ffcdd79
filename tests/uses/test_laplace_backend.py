"""The backend for laplace-torch: equal to the exact Gauss-Newton diagonal where HesScaleGN is exact."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

laplace = pytest.importorskip(
    "laplace", reason="laplace-torch is an extra of its own: pip install 'hesscale_lightning[laplace]'"
)
from laplace.curvature import BackPackGGN, CurvlinopsGGN  # noqa: E402

from hesscale_lightning import HesScaleGGN  # noqa: E402

CLASSES = 3
HIDDEN = {0: [], 1: [8], 2: [8, 8]}


def network(hidden: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(hidden)
    widths = [6, *HIDDEN[hidden]]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)).to(dtype)


def loader(likelihood: str) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(37, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(37, CLASSES, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y.argmax(1) if likelihood == "classification" else y), batch_size=16)


def fitted(net, likelihood, backend, subset="all", **options):
    posterior = laplace.Laplace(
        copy.deepcopy(net),
        likelihood,
        subset_of_weights=subset,
        hessian_structure="diag",
        backend=backend,
        **options,
    )
    posterior.fit(loader(likelihood))
    return posterior


@pytest.mark.parametrize("backend", [BackPackGGN, CurvlinopsGGN])
@pytest.mark.parametrize(
    ("likelihood", "hidden", "subset"),
    [
        ("classification", 2, "last_layer"),
        ("regression", 2, "last_layer"),
        ("classification", 0, "all"),
        ("regression", 0, "all"),
        ("regression", 1, "all"),  # the outputs' Hessian is diagonal, so that nothing is dropped one layer further
    ],
)
def test_the_diagonal_equals_the_exact_one_where_no_layer_lies_between(likelihood, hidden, subset, backend):
    net = network(hidden)
    found, expected = (fitted(net, likelihood, b, subset) for b in (HesScaleGGN, backend))
    torch.testing.assert_close(found.H, expected.H)
    torch.testing.assert_close(torch.as_tensor(found.loss), torch.as_tensor(expected.loss))
    torch.testing.assert_close(found.log_marginal_likelihood(), expected.log_marginal_likelihood())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_below_it_is_nowhere_negative_and_the_last_layers_part_is_exact(likelihood):
    net = network(2)
    found, expected = (fitted(net, likelihood, backend).H for backend in (HesScaleGGN, CurvlinopsGGN))
    assert (found >= 0).all()
    last = sum(p.numel() for p in net[-1].parameters())
    torch.testing.assert_close(found[-last:], expected[-last:])
    assert found.shape == expected.shape
    assert not torch.allclose(found[:-last], expected[:-last], rtol=1e-3)
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    assert cosine > 0.9


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_posterior_predicts(likelihood, subset):
    posterior = fitted(network(1), likelihood, HesScaleGGN, subset)
    posterior.optimize_prior_precision(method="marglik", n_steps=5)
    x = loader(likelihood).dataset.tensors[0][:4]
    if likelihood == "classification":
        probabilities = posterior(x, link_approx="probit")
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4, dtype=torch.float64))
    else:
        mean, variance = posterior(x)
        torch.testing.assert_close(mean, posterior.model(x).detach())
        assert (torch.diagonal(variance, dim1=-2, dim2=-1) > 0).all()


def test_a_subnetwork_has_its_part():
    net = network(2)
    indices = torch.tensor([0, 5, 70])
    part = fitted(net, "classification", HesScaleGGN, "subnetwork", subnetwork_indices=indices)
    torch.testing.assert_close(part.H, fitted(net, "classification", HesScaleGGN).H[indices])


def test_gradients_and_diagonals_are_left_as_they_were():
    net = network(1)
    x, y = loader("classification").dataset.tensors
    for p in net.parameters():
        p.grad, p.hess_diag = torch.ones_like(p), torch.full_like(p, 2)
    del net[0].bias.hess_diag
    before = [(p.grad, getattr(p, "hess_diag", None)) for p in net.parameters()]
    HesScaleGGN(net, "classification").diag(x, y)
    after = [(p.grad, getattr(p, "hess_diag", None)) for p in net.parameters()]
    assert all(a is c and b is d for (a, b), (c, d) in zip(before, after, strict=True))


def fit_structure(structure, backend):
    posterior = laplace.Laplace(
        network(1), "classification", subset_of_weights="all", hessian_structure=structure, backend=backend
    )
    posterior.fit(loader("classification"))
    return posterior.H


def test_a_full_matrix_is_the_exact_one():
    expected = fit_structure("full", CurvlinopsGGN)
    torch.testing.assert_close(fit_structure("full", HesScaleGGN), expected)


def test_factors_are_refused_with_advice():
    with pytest.raises(NotImplementedError, match=r"hessian_structure='kron' with HesScaleGGN.*use hessian_structure="):
        fit_structure("kron", HesScaleGGN)
