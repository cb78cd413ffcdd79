"""Every parameter that an algorithm's own train() optimizes receives a diagonal, in every setting."""

from __future__ import annotations

import pytest
import torch
from torch.optim import Optimizer

from hesscale_lightning import AdaHesScale
from sb3_integration.loss_seam import optimizers_of
from tests.sb3.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimized_parameter_receives_a_diagonal(case: Case) -> None:
    model = case.build()
    names = {param: name for name, param in model.policy.named_parameters()}
    before = {param: param.detach().clone() for param in names}
    reached: set[str] = set()

    def look(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    h = param.hess_diag
                    assert h is not None, names[param]
                    assert h.shape == param.shape
                    assert torch.isfinite(h).all(), names[param]
                    reached.add(names[param])

    optimizers = list(optimizers_of(model.policy))
    for optimizer in optimizers:
        assert type(optimizer) is AdaHesScale
        optimizer.register_step_pre_hook(look)
    model.learn(case.timesteps)

    optimized = {names[param] for o in optimizers for group in o.param_groups for param in group["params"]}
    still = {name for name in optimized if name.startswith(case.still)} if case.still else set()
    assert reached == optimized - still
    moved = {name for param, name in names.items() if not torch.equal(param, before[param])}
    assert moved >= optimized - still
    assert all(torch.isfinite(param).all() for param in names)
    assert model.num_timesteps >= case.timesteps
