"""The comparisons of the uses: their oracles, that they resume, and that the page says what the results say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("mnist1d")
sys.path.append(str(Path(__file__).parents[2] / "examples/uses"))
sys.path.append(str(Path(__file__).parents[2] / "examples/paper"))
import common
import pruning_comparison as pruning
import quantization_comparison as quantization
from journal import block

from hesscale_lightning import exact_hess_diag

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/uses.md"


@pytest.mark.parametrize(("name", "study"), [("pruning", pruning), ("quantization", quantization)])
def test_the_page_says_what_the_results_say(name, study):
    results = json.loads((ROOT / study.RESULTS).read_text())
    assert block(PAGE, name) == study.tables(results)
    assert results["seeds"] == 5


def test_the_page_says_what_the_results_of_the_posteriors_say():
    pytest.importorskip("laplace", reason="laplace-torch is an extra of its own")
    import laplace_comparison as posteriors

    results = json.loads((ROOT / posteriors.RESULTS).read_text())
    assert block(PAGE, "laplace") == posteriors.tables(results)


@pytest.mark.parametrize("masked", [False, True])
def test_the_closed_form_of_two_layers_is_the_exact_diagonal(masked):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = 2 * torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    if masked:
        prune.random_unstructured(net[0], "weight", 8)
        prune.random_unstructured(net[2], "bias", 1)
    parameters = dict(net.named_parameters())
    expected = exact_hess_diag(cross_entropy(net(x), y), list(parameters.values()))
    found = pruning.exact_of_two_layers(net, x, y)
    for name, h in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], h)


@pytest.mark.parametrize("method", ["HesScale", "rank one", "magnitude", "random"])
def test_a_network_has_the_sparsity_that_was_asked_for(method):
    torch.manual_seed(0)
    data, net = pruning.load("digits, CNN"), pruning.TASKS["digits, CNN"][2]()
    for sparsity in (0.3, 0.8):
        pruning.prune_weights(net, method, sparsity, data, seed=0)
        masks = torch.cat([layer.weight_mask.flatten() for layer in pruning.layers(net)])
        assert (masks == 0).double().mean().item() == pytest.approx(sparsity, abs=1 / len(masks))
    net = pruning.TASKS["digits, CNN"][2]()
    for sparsity in (0.25, 0.5):
        pruning.prune_units(net, method, sparsity, data, seed=0)
        for layer in pruning.layers(net)[:-1]:
            gone = layer.weight_mask.flatten(1).amax(1) == 0
            assert gone.double().mean().item() == sparsity
            assert torch.equal(gone, layer.bias_mask == 0)
    assert not hasattr(pruning.layers(net)[-1], "weight_mask")


def test_rank_correlations_are_scipys():
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randn(2, 9, generator=generator).tolist()
        assert quantization.spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)


def test_probes_find_the_diagonal_of_a_network_whose_hessian_is_diagonal():
    """One sample with one input that is not 0, two classes: off-diagonal entries only between the classes."""
    net = nn.Linear(1, 1).double()
    net.weight.data.fill_(1.0)
    net.bias.requires_grad_(False)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = net.weight

        def forward(self, x):
            return torch.cat([x @ self.weight, torch.zeros_like(x)], 1)

    x = torch.tensor([[2.0]], dtype=torch.float64)
    data = common.Data(x, torch.tensor([0]), x, torch.tensor([0]))
    p = torch.sigmoid(torch.tensor(2.0, dtype=torch.float64))
    found = quantization.hutchinson(Padded(), data, seed=0)["weight"]
    torch.testing.assert_close(found, (4 * p * (1 - p)).view(1, 1))


def test_differences_count_only_where_their_interval_leaves_out_zero():
    assert common.verdict([1.0, 1.1, 0.9, 1.0, 1.0]) == "higher"
    assert common.verdict([-1.0, -1.1, -0.9, -1.0, -1.0]) == "lower"
    assert common.verdict([1.0, -1.0, 0.5, 0.2, -0.4]) == "undecided"
    assert common.verdict([5.0]) == "undecided"


@pytest.mark.parametrize(
    ("study", "arguments"),
    [(pruning, {"tasks": ("digits, small",)}), (quantization, {"tasks": ("digits, MLP of 8 layers",)})],
)
def test_a_study_resumes_where_it_was_and_draws(study, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 5)
    if study is pruning:
        monkeypatch.setattr(study, "FINE_STEPS", 2)
    first = study.run(**arguments, seeds=2, folder=tmp_path)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:2]) + "\n")  # as if it had been stopped after the first
    second = study.run(**arguments, seeds=2, folder=tmp_path)
    assert second["runs"] == first["runs"]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines)
    study.draw(first, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "2 seeds" in study.tables(first)
    monkeypatch.setattr(study, "STEPS", 6)
    with pytest.raises(ValueError, match="holds runs with"):
        study.run(**arguments, seeds=2, folder=tmp_path)
