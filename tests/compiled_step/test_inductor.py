"""What Inductor makes of a captured step; everything else is tested on the captured operations, in less time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from hesscale_lightning import AdaHesScale, attach, compile_step
from hesscale_lightning.compiled_step import programs
from tests.compiled_step.networks import assert_same, clear, loss_fn

pytestmark = pytest.mark.skipif(not programs.has_compiler(), reason="Inductor needs a C++ compiler (g++ or clang++)")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator).double(), torch.randint(3, (16,), generator=generator)


def test_a_compiled_training_step_is_the_eager_one():
    module, reference = network(), network()
    optimizer = AdaHesScale(module.parameters(), delta=1e-3)
    eager = AdaHesScale(reference.parameters(), delta=1e-3)
    step = compile_step(
        module, loss_fn, optimizer=optimizer, max_grad_norm=0.5, keep_gradients=True, on_failure="raise", silent=True
    )
    versions = [p._version for p in module.parameters()]
    for seed in range(30):
        loss = step(*batch(seed))
        eager.zero_grad()
        expected = loss_fn(reference(batch(seed)[0]), batch(seed)[1])
        attach(expected)
        expected.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        diagonals = [p.hess_diag for p in reference.parameters()]
        eager.step()
        for p, h in zip(reference.parameters(), diagonals, strict=True):
            p.hess_diag = h
        torch.testing.assert_close(loss, expected.detach())
        assert_same(module, reference)
    assert all(p._version > version for p, version in zip(module.parameters(), versions, strict=True))
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg_hess"], eager.state[q]["exp_avg_hess"])
    torch.testing.assert_close(optimizer.stats["scale"].double(), eager.stats["scale"].double())


def test_dropout_draws_anew_at_every_step_and_as_often_as_it_should():
    module = nn.Sequential(nn.Linear(4, 400, bias=False), nn.Dropout(0.25))
    nn.init.ones_(module[0].weight)
    step = compile_step(module, torch.sum, on_failure="raise", silent=True)
    x = torch.full((8, 4), 0.25)
    kept = []
    for _ in range(20):
        clear(module)
        step(x)
        kept.append(module[0].weight.grad[:, 0] * 0.75 * 4)  # how many of the 8 samples kept the unit
    assert all(not torch.equal(a, b) for a, b in pairwise(kept))
    assert torch.stack(kept).mean() / 8 == pytest.approx(0.75, abs=0.01)  # 64,000 draws
