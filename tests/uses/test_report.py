"""The report weighs batches by their samples and leaves the model as it was."""

import torch
from torch.nn.functional import cross_entropy

from hesscale_lightning import backward
from hesscale_lightning.command_line.report import report
from tests.lightning_models import Classifier, make_batches, make_net


def test_a_report_weighs_batches_by_their_samples_and_leaves_gradients_and_diagonals():
    module = Classifier(make_net(dropout=0.5, dtype=torch.float64))
    x, y = (torch.cat(parts) for parts in zip(*make_batches(3, dtype=torch.float64), strict=True))
    backward(cross_entropy(module.net(x), y))
    before = [(p.grad, p.hess_diag) for p in module.parameters()]
    found = report(module, [(x[:10], y[:10]), (x[10:], y[10:])])
    assert all(p.grad is g and p.hess_diag is h for p, (g, h) in zip(module.parameters(), before, strict=True))
    assert module.training
    module.zero_grad()
    backward(cross_entropy(module.eval().net(x), y))
    assert found.batches == 2
    for layer, diagonals in found.layers.items():
        expected = [p.hess_diag for p in module.get_submodule(layer).parameters()]
        torch.testing.assert_close(diagonals, expected)
