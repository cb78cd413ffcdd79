"""The example networks learn from what they should look at, and the Gaussian loss is the likelihood's."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from hesscale_lightning import DiabetesDataModule, attach, exact_hess_diag
from hesscale_lightning.command_line.networks import GaussianNLL, GRUClassifier, VisionTransformer


def test_the_recurrent_network_reads_the_sequence_in_order():
    torch.manual_seed(0)
    net, x = GRUClassifier(1, 8, 3, stride=4), torch.randn(2, 40, 1)
    expected, _ = net.recurrent(x.reshape(2, 10, 4))
    assert torch.equal(net(x), net.head(expected[:, -1]))
    assert not torch.allclose(net(x), net(x.flip(1)))


def test_the_vision_transformer_knows_where_a_patch_is():
    torch.manual_seed(0)
    net = VisionTransformer(8, 2, 1, width=16, depth=1, heads=2, out_features=3).eval()
    x = torch.randn(2, 1, 8, 8)
    shuffled = x.roll(2, dims=3)  # the same patches at other places
    assert not torch.allclose(net(x), net(shuffled), atol=1e-4)
    with torch.no_grad():
        net.positions.zero_()
    assert torch.allclose(net(x), net(shuffled), atol=1e-5)


def test_patches_that_do_not_tile_the_image_are_refused():
    with pytest.raises(ValueError, match="patch_size=3 for image_size=8"):
        VisionTransformer(8, 3, 1, width=16, depth=1, heads=2, out_features=3)


def test_the_gaussian_loss_is_the_log_likelihood_and_its_diagonal_is_exact_at_the_output():
    torch.manual_seed(0)
    prediction = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, dtype=torch.float64)
    loss = GaussianNLL()(prediction, target)
    density = Normal(prediction[:, 0], (0.5 * prediction[:, 1]).exp())
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(loss + constant, -density.log_prob(target).mean())
    (expected,) = exact_hess_diag(loss, [prediction])
    attach(loss, [prediction])
    loss.backward()
    torch.testing.assert_close(prediction.hess_diag, expected)


def test_measurements_and_targets_of_the_regression_are_standardised_by_the_training_part():
    data = DiabetesDataModule(seed=3)
    data.setup()
    first = data.train_set.tensors
    data.setup()  # once is enough
    assert data.train_set.tensors[1] is first[1]
    for tensor in first:
        assert tensor.mean().item() == pytest.approx(0, abs=1e-5)
        assert tensor.std().item() == pytest.approx(1, abs=1e-5)
    sizes = [len(part) for part in (data.train_set, data.val_set, data.test_set)]
    assert sizes == [288, 66, 88]
    x, y = next(iter(data.val_dataloader()))
    assert x.shape[1:] == (10,)
    assert y.dtype == torch.float32
    assert nn.functional.mse_loss(torch.zeros_like(y), y).item() < 2
