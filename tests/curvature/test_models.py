"""Unmodified models of every family: the diagonals are all there, and attaching changes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesscale_lightning.curvature import attach
from tests.curvature.models import MODELS, Model

METHODS: tuple[Any, ...] = ("hesscale", "hesscale_gn")
Tensors = dict[str, Tensor]


def run(model: Model, training: bool, dtype: torch.dtype, method: Any) -> tuple[nn.Module, Tensors, Tensors]:
    """The module, gradients and diagonals by name after one backward, with dropout always the same."""
    module, loss_of = model.build(dtype)
    module.train(training)
    loss = loss_of(module)
    if method is not None:
        attach(loss, method=method)
    loss.backward()
    named = dict(module.named_parameters())
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    diagonals = {name: p.hess_diag for name, p in named.items() if getattr(p, "hess_diag", None) is not None}
    return module, gradients, diagonals


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_model_runs_unmodified(model: Model, training: bool) -> None:
    """In both precisions and by both methods, beside the same gradients to the last bit."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        module, plain, _ = run(model, training, dtype, None)
        assert plain.keys() == dict(module.named_parameters()).keys()
        for method in METHODS:
            _, gradients, diagonals = run(model, training, dtype, method)
            for name, p in module.named_parameters():
                assert torch.equal(gradients[name], plain[name]), f"the gradient of {name} has changed"
                assert diagonals[name].shape == p.shape
                assert diagonals[name].dtype == p.dtype == dtype
                assert diagonals[name].isfinite().all(), name
            found[dtype, method] = diagonals
    for method in METHODS:
        single, double = found[torch.float32, method], found[torch.float64, method]
        for name, expected in double.items():
            assert float(expected.abs().sum()) > 0, f"nothing but zeros for {name}"
            scale = float(expected.abs().max())
            torch.testing.assert_close(single[name].double(), expected, rtol=1e-2, atol=1e-4 * scale, msg=name)
