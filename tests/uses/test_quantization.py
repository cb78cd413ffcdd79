"""What quantizing costs: exact on a quadratic, rounded to the grid that is promised, and printed by the report."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hesscale_lightning import hess_diag_over, quantization_cost, quantized
from hesscale_lightning.command_line.report import report
from hesscale_lightning.uses.quantization import parse_bits
from tests.lightning_models import Classifier, make_batches, make_net

ALL_BITS = (2, 3, 4, 8, 16)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_values_lie_on_an_even_grid_that_reaches_the_largest(bits):
    w = torch.randn(40, 7, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    q = quantized(w, bits)
    step = w.abs().max() / (2 ** (bits - 1) - 1)
    levels = q / step
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    assert levels.abs().max().item() == pytest.approx(2 ** (bits - 1) - 1)
    assert (w - q).abs().max() <= step / 2 * (1 + 1e-9)
    torch.testing.assert_close(quantized(-w, bits), -q, rtol=0, atol=1e-12)
    torch.testing.assert_close(quantized(q, bits), q)
    assert len(levels.round().unique()) <= 2**bits - 1


def test_zeros_stay_zeros():
    assert quantized(torch.zeros(3), 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_cost_is_the_change_of_a_quadratic_loss_at_its_minimum(bits):
    """Of a linear model whose inputs are uncorrelated: its Hessian is diagonal."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 3, bias=False).double()
    x = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q * torch.logspace(-1, 2, 8, dtype=torch.float64)
    y = layer(x).detach()
    loss = nn.MSELoss()
    diagonals = hess_diag_over(layer, loss, [(x, y)], progress_bar=False)
    (cost,) = quantization_cost({"weight": layer.weight}, diagonals, bits).values()
    with torch.no_grad():
        layer.weight.copy_(quantized(layer.weight, bits))
    assert cost == pytest.approx(loss(layer(x), y).item(), rel=1e-9)


def test_the_report_prints_and_draws_it(tmp_path: Path):
    module = Classifier(make_net())
    found = report(module, make_batches(3), quantize=[8, 4])
    diagonals = hess_diag_over(module, None, make_batches(3), method="hesscale_rank1", progress_bar=False)
    same = report(module, make_batches(3), method="hesscale_gn", quantize=[4], quantize_method="hesscale_gn")
    assert same.quantization[4]["net.0"] != pytest.approx(found.quantization[4]["net.0"], rel=1e-3)
    for bits in (8, 4):
        for layer in ("net.0", "net.3"):
            weight = module.get_submodule(layer).weight
            expected = (diagonals[f"{layer}.weight"] * (weight - quantized(weight, bits)) ** 2).sum() / 2
            assert found.quantization[bits][layer] == pytest.approx(expected.item())
    rows = [line.split() for line in str(found).split("What quantizing")[1].splitlines()]
    assert ["net.0", *(f"{found.quantization[bits]['net.0']:.3g}" for bits in (8, 4))] in rows
    assert ["all", *(f"{sum(found.quantization[bits].values()):.3g}" for bits in (8, 4))] in rows
    found.draw(tmp_path / "with.png")
    report(module, make_batches(3)).draw(tmp_path / "without.png")
    with_it, without = ((tmp_path / f"{name}.png").read_bytes() for name in ("with", "without"))
    assert int.from_bytes(with_it[16:20]) == 1.5 * int.from_bytes(without[16:20])  # a third column


@pytest.mark.parametrize(("text", "bits"), [("8,4", [8, 4]), ("8", [8]), ([6, 3], [6, 3])])
def test_numbers_of_bits_are_read(text, bits):
    assert parse_bits(text) == bits


BAD = {
    "no bits": (lambda: quantized(torch.ones(2), 1), "Found 1 bits, expected 2 to 16"),
    "words": (lambda: parse_bits("eight"), "Found quantize='eight', expected numbers of bits, such as"),
    "too many": (lambda: parse_bits("8,32"), "Found 32 bits"),
    "a shape": (
        lambda: quantization_cost({"w": torch.ones(2)}, {"w": torch.ones(3)}, 4),
        r"Found one of shape \(3,\) for w, expected a diagonal of shape \(2,\)",
    ),
    "a name": (lambda: quantization_cost({"w": torch.ones(2)}, {}, 4), "Found none for w, expected a diagonal"),
    "the report": (lambda: report(Classifier(make_net()), make_batches(1), quantize=[1]), "Found 1 bits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_an_error_that_says_what_to_do(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_grid_of_half_precision_weights_is_as_fine_as_any(dtype):
    torch.manual_seed(0)
    weight = (0.01 * torch.randn(500)).to(dtype)
    cost = quantization_cost({"w": weight}, {"w": torch.ones(500)}, 8)["w"]
    exact = quantization_cost({"w": weight.double()}, {"w": torch.ones(500).double()}, 8)["w"]
    assert cost == pytest.approx(exact, rel=1e-3)
    assert quantized(torch.zeros(0), 4).shape == (0,)


def test_tensors_without_names_are_refused():
    with pytest.raises(TypeError, match="Found a list, expected tensors by name"):
        quantization_cost([torch.ones(2)], {}, 4)
