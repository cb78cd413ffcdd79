"""A step that is not finite is skipped, counted and told, by any optimizer; the others are as without the check."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from stable_baselines3 import A2C
from torch import Tensor, nn

from hesscale_lightning import (
    AdaHesScale,
    CalibratedRadius,
    HesScaleCallback,
    SkipNonfinite,
    SkipNonfiniteSteps,
    StepSizeScaling,
    attach,
)
from hesscale_lightning.optim.nonfinite import is_finite
from sb3_integration import HesScaleActorCriticPolicy, HesScaleLoggingCallback
from tests.lightning_models import Classifier, ListLogger, fit, make_batches, make_loader, make_net, make_trainer

OPTIMIZERS: dict[str, Any] = {
    "AdaHesScale": AdaHesScale,
    "AdaHesScale with weight decay": lambda params: AdaHesScale(params, weight_decay=0.1),
    "StepSizeScaling": lambda params: StepSizeScaling(torch.optim.Adam(params), 1e-4),
    "Adam": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused Adam": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


def spoiled(batches: list[tuple[Tensor, Tensor]], *which: int) -> list[tuple[Tensor, Tensor]]:
    """The batches, some of them with an input that is not a number."""
    return [(x.clone().index_put_((torch.tensor(0),), torch.tensor(float("nan"))), y) if k in which else (x, y)
            for k, (x, y) in enumerate(batches)]  # fmt: skip


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        attach(loss)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_with_bad_batches_equals_one_without_them(name):
    batches = make_batches(8)
    nets = make_net(), make_net()
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    guard = SkipNonfinite(optimizers[0])
    train(nets[0], optimizers[0], spoiled(batches, 0, 3, 4))
    train(nets[1], optimizers[1], [batch for k, batch in enumerate(batches) if k not in (0, 3, 4)])
    assert guard.skipped == 3
    assert guard.in_a_row == 0
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    for ours, theirs in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in theirs)


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in OPTIMIZERS for order in ("before", "behind")]
    + [("Adam", "alone"), ("fused Adam", "alone")],
)
def test_lightning_skips_the_bad_batches_and_counts_them(name, order):
    skip, curvature = SkipNonfiniteSteps(), HesScaleCallback(log_every_n_steps=1)
    callbacks = {"before": [skip, curvature], "behind": [curvature, skip], "alone": [skip]}[order]
    batches, nets, logger = make_batches(8), (make_net(), make_net()), ListLogger()
    with pytest.warns(UserWarning, match=r"Skipped step 1, which is not finite: gradient of net.0.weight, "):
        fit(
            Classifier(nets[0], OPTIMIZERS[name]),
            spoiled(batches, 1, 4),
            *callbacks,
            logger=logger,
            log_every_n_steps=1,
        )
    train(
        nets[1], OPTIMIZERS[name](nets[1].parameters()), [batch for k, batch in enumerate(batches) if k not in (1, 4)]
    )
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert skip.skipped == 2
    counts = [record["curvature/skipped_steps"] for _, record in logger.records if "curvature/skipped_steps" in record]
    assert counts == [0, 1, 1, 1, 2, 2, 2, 2]


def test_without_the_callback_one_bad_batch_makes_every_weight_nan():
    net = make_net()
    fit(Classifier(net), spoiled(make_batches(3), 1), HesScaleCallback())
    assert all(p.isnan().all() for p in net.parameters())


def test_a_run_of_bad_batches_is_an_error_and_changes_nothing():
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FloatingPointError, match=r"Skipped 3 steps in a row, .*gradient of net.0.weight"):
        fit(
            Classifier(net), spoiled(make_batches(8), *range(8)), HesScaleCallback(), SkipNonfiniteSteps(max_in_a_row=3)
        )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    guard = SkipNonfinite(optimizer, max_in_a_row=2)
    with pytest.raises(
        FloatingPointError, match=r"Skipped 2 steps in a row, .*\(gradient of 0.weight, .* and 5 more\)"
    ):
        train(net, optimizer, spoiled(make_batches(4), *range(4)))
    assert guard.skipped == 2


def test_the_count_goes_on_in_a_resumed_run(tmp_path):
    skip = SkipNonfiniteSteps()
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    fit(
        Classifier(make_net()),
        spoiled(make_batches(4), 3),
        HesScaleCallback(),
        skip,
        checkpoint,
        enable_checkpointing=True,
    )
    resumed = SkipNonfiniteSteps()
    trainer = make_trainer(HesScaleCallback(), resumed, max_epochs=2)
    trainer.fit(Classifier(make_net()), make_loader(make_batches(4)), ckpt_path=str(tmp_path / "last.ckpt"))
    assert (resumed.skipped, resumed.in_a_row) == (1, 0)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("attribute", ["grad", "hess_diag"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_entry_is_found_and_large_ones_are_finite(entry, attribute, dtype):
    params = [nn.Parameter(torch.zeros(5, 3, dtype=dtype)) for _ in range(3)] + [
        nn.Parameter(torch.zeros(0, dtype=dtype))
    ]
    assert is_finite(params)
    for p in params:
        p.grad = torch.full_like(p, torch.finfo(dtype).max)
        p.hess_diag = torch.full_like(
            p, torch.finfo(torch.float32).min, dtype=torch.promote_types(dtype, torch.float32)
        )
    assert is_finite(params)
    getattr(params[1], attribute)[2, 1] = entry
    assert not is_finite(params)


def test_a_closure_is_refused_with_advice():
    optimizer = AdaHesScale(make_net().parameters())
    guard = SkipNonfinite(optimizer)
    with pytest.raises(ValueError, match=r"Found a closure in AdaHesScale.step\(\)"):
        optimizer.step(lambda: 0.0)
    guard.remove()
    optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("make", [SkipNonfiniteSteps, lambda n: SkipNonfinite(AdaHesScale([torch.ones(1)]), n)])
def test_a_limit_below_one_is_refused(make):
    with pytest.raises(ValueError, match="Found max_in_a_row=0, expected at least 1"):
        make(0)


def test_an_update_that_is_part_of_a_program_is_not():
    """Hooks need a step to be called on, so a compiled step leaves the update outside of its program."""
    from hesscale_lightning.compiled_step.update import can_be_captured

    optimizer = AdaHesScale(make_net().parameters())
    assert can_be_captured(optimizer)
    SkipNonfinite(optimizer)
    assert not can_be_captured(optimizer)


def test_stable_baselines_skips_and_logs():
    model = A2C(HesScaleActorCriticPolicy, "CartPole-v1", n_steps=5, seed=0, device="cpu")
    guard = SkipNonfinite(model.policy.optimizer)
    with torch.no_grad():
        model.policy.value_net.bias.fill_(float("nan"))
    before = copy.deepcopy(model.policy.action_net.state_dict())
    model.learn(25, callback=HesScaleLoggingCallback(), log_interval=1000)
    assert guard.skipped == 5
    assert all(torch.equal(value, before[key]) for key, value in model.policy.action_net.state_dict().items())
    assert model.logger.name_to_value["hesscale/skipped_steps"] == 4  # of the last rollout's beginning


def test_a_skipped_step_teaches_a_measured_radius_nothing():
    net, asked = make_net(), []
    radius = CalibratedRadius(lambda: asked.append(1) or 1e-4, unit=lambda: 2.0, noise_decay=0.9)
    optimizer = AdaHesScale(net.parameters(), delta=1e-3, radius=radius)
    SkipNonfinite(optimizer)
    batches = make_batches(4)
    train(net, optimizer, batches[:3])
    before, measures = copy.deepcopy(optimizer.state_dict()["param_groups"]), len(asked)
    train(net, optimizer, spoiled(batches[3:], 0))
    assert optimizer.state_dict()["param_groups"] == before
    assert len(asked) == measures
    train(net, optimizer, batches[3:])
    assert len(asked) == measures + 1
