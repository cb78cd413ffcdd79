"""A compiled step computes what attach and backward compute, and the optimizer's step what its step computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesscale_lightning import AdaHesScale, StepSizeScaling, attach, compile_step
from hesscale_lightning.compiled_step import Settings, Step
from tests.compiled_step.networks import BY_NAME, CASES, assert_same, clear, loss_fn
from tests.curvature.models import MODELS, Model
from tests.optim.test_adahesscale_update import CONFIGURATIONS

CAPTURED: dict[str, Any] = {"backend": "eager", "on_failure": "raise", "silent": True}


def eager_step(module: nn.Module, x: Tensor, y: Tensor, method: Any = "hesscale") -> Tensor:
    loss = loss_fn(module(x), y)
    if method is not None:
        attach(loss, [p for p in module.parameters() if p.requires_grad], method=method)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_gradients_diagonals_and_buffers_are_those_of_attach_and_backward(case):
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, **CAPTURED)
    for seed in range(3):
        x, y = case.batch(seed)
        clear(module)
        clear(reference)
        torch.manual_seed(seed)
        loss = step(x, y)
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, eager_step(reference, x, y))
        assert not loss.requires_grad
        assert_same(module, reference)
    assert step.programs == 1


@pytest.mark.parametrize("method", ["hesscale_gn", "bl89", "hesscale_rank1", None])
@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_every_method_is_that_of_the_engine(name, method):
    case = BY_NAME[name]
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, method=method, **CAPTURED)
    for seed in range(2):
        x, y = case.batch(seed)
        clear(module)
        clear(reference)
        torch.testing.assert_close(step(x, y), eager_step(reference, x, y, method))
        assert_same(module, reference)


def test_gradients_and_diagonals_add_up_as_backward_adds_them_up():
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, **CAPTURED)
    for seed in range(3):
        x, y = case.batch(seed)
        step(x, y)
        eager_step(reference, x, y)
    assert_same(module, reference)
    for p in (*module.parameters(), *reference.parameters()):
        p.grad = None  # a diagonal lives as long as its gradient
    step(x, y)
    eager_step(reference, x, y)
    assert_same(module, reference)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_family_is_captured(model: Model):
    module, loss = model.build(torch.float64)
    reference, _ = model.build(torch.float64)
    step = _step_without_batch(module, loss)
    for seed in range(2):
        clear(module)
        clear(reference)
        torch.manual_seed(seed)
        if model.name in NOT_CAPTURED:
            with pytest.warns(UserWarning, match=NOT_CAPTURED[model.name]):
                step()
            assert step.programs == 0
            return
        value = step()
        torch.manual_seed(seed)
        expected = loss(reference)
        attach(expected)
        expected.backward()
        torch.testing.assert_close(value, expected.detach())
        assert_same(module, reference, rtol=1e-7, atol=1e-9)
    assert step.programs == 1


def _step_without_batch(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    settings = Settings(backend="eager", silent=True)
    return Step([module], lambda: loss(module), method="hesscale", settings=settings, name="the step")


#: What decides by entries, in the model or in torch.
NOT_CAPTURED = dict.fromkeys(
    (
        "mixture of experts",
        "grouped experts",
        "GRU, packed",
        "LSTM, packed and bidirectional",
        "bags of words, bilinear",
        "likelihoods",
        "speech",
    ),
    "decides by the entries of a tensor",
)


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_whole_training_step_is_the_eager_one_over_100_steps(name, clipped):
    options = {"lr": 0.01, **CONFIGURATIONS[name]}
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters(), **options), AdaHesScale(reference.parameters(), **options)
    bound = 0.5 if clipped else None
    step = compile_step(module, loss_fn, optimizer=optimizer, max_grad_norm=bound, **CAPTURED)
    for seed in range(20 if name == "no_averaging" else 100):  # without averages rounding grows tenfold in ten steps
        x, y = case.batch(seed)
        loss = step(x, y)
        eager.zero_grad()
        torch.testing.assert_close(loss, eager_step(reference, x, y), rtol=1e-6, atol=1e-9)
        if clipped:
            nn.utils.clip_grad_norm_(reference.parameters(), bound)
        eager.step()
        for key, value in optimizer.stats.items():
            torch.testing.assert_close(value.double(), eager.stats[key].double(), rtol=1e-4, atol=1e-9)
    clear(reference)
    assert_same(module, reference, rtol=1e-6, atol=1e-9)
    for p, q in zip(module.parameters(), reference.parameters(), strict=True):
        for key, value in eager.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-5, atol=1e-12)
    assert step.programs == 1


def test_param_groups_of_their_own_options_and_networks():
    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": list(module[0].parameters()), "delta": 1e-5},
            {"params": list(module[2].parameters()), "lr_scale": 3.0, "eps": 1e-4},
        ]

    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()  # the last layer is in no group
    optimizer, eager = AdaHesScale(groups(module)), AdaHesScale(groups(reference))
    step = compile_step(module, loss_fn, optimizer=optimizer, keep_gradients=True, **CAPTURED)
    for seed in range(10):
        x, y = case.batch(seed)
        clear(module)
        clear(reference)
        step(x, y)
        eager_step(reference, x, y)
        diagonals = [p.hess_diag for p in reference.parameters()]  # which the eager step takes
        eager.step()
        for p, h in zip(reference.parameters(), diagonals, strict=True):
            p.hess_diag = h
        assert_same(module, reference)
    for key, value in eager.stats.items():
        torch.testing.assert_close(optimizer.stats[key], value.to(optimizer.stats[key].dtype), rtol=1e-5, atol=1e-9)


def test_parameters_of_the_optimizer_that_are_frozen_and_thawed():
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters()), AdaHesScale(reference.parameters())
    step = compile_step(module, loss_fn, optimizer=optimizer, **CAPTURED)
    for seed, required in enumerate([False, False, True, True, False, True]):
        for m in (module, reference):
            m[2].requires_grad_(required)
        x, y = case.batch(seed)
        step(x, y)
        eager.zero_grad()
        eager_step(reference, x, y)
        eager.step()
    clear(reference)
    assert_same(module, reference)


def test_learning_rate_may_change_at_every_step_and_other_options_get_a_program():
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters()), AdaHesScale(reference.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, eager)]
    step = compile_step(module, loss_fn, optimizer=optimizer, **CAPTURED)
    for seed in range(6):
        x, y = case.batch(seed)
        step(x, y)
        eager.zero_grad()
        eager_step(reference, x, y)
        eager.step()
        for schedule in schedules:
            schedule.step()
        if seed == 2:
            assert step.programs == 1
            for o in (optimizer, eager):
                o.param_groups[0]["delta"] = 1e-2
    clear(reference)
    assert_same(module, reference)
    assert step.programs == 2


def test_a_training_step_goes_on_from_a_checkpoint_and_beside_eager_steps():
    case = BY_NAME["cnn_with_batch_norm"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters()), AdaHesScale(reference.parameters())
    step = compile_step(module, loss_fn, optimizer=optimizer, **CAPTURED)
    for seed in range(9):
        x, y = case.batch(seed, size=5 if seed % 4 == 3 else 8)  # a short batch runs eagerly
        step(x, y)
        eager.zero_grad()
        eager_step(reference, x, y)
        eager.step()
        if seed == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
            eager.load_state_dict(copy.deepcopy(eager.state_dict()))
    clear(reference)
    assert_same(module, reference)
    assert step.programs == 1


@pytest.mark.parametrize("every", [1, 3])
def test_steps_without_curvature_have_a_program_of_their_own(every):
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters()), AdaHesScale(reference.parameters())
    step = compile_step(module, loss_fn, optimizer=optimizer, **CAPTURED)
    for seed in range(8):
        x, y = case.batch(seed)
        step.method = "hesscale" if seed % every == 0 else None
        step(x, y)
        eager.zero_grad()
        eager_step(reference, x, y, step.method)
        eager.step()
    clear(reference)
    assert_same(module, reference)
    assert step.programs == min(every, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.Adam(params, lr=0.01),
        lambda params: StepSizeScaling(torch.optim.Adam(params, lr=0.01), delta=1e-4),
        lambda params: AdaHesScale(params, capturable=True),
    ],
    ids=["adam", "step_size_scaling", "capturable"],
)
def test_other_optimizers_step_eagerly(make):
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = make(module.parameters()), make(reference.parameters())
    step = compile_step(module, loss_fn, optimizer=optimizer, max_grad_norm=0.3, **CAPTURED)
    for seed in range(5):
        x, y = case.batch(seed)
        step(x, y)
        eager.zero_grad()
        eager_step(reference, x, y)
        nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        eager.step()
    clear(reference)
    assert_same(module, reference)
    assert all(p.grad is None and p.hess_diag is None for p in module.parameters())


def test_clipping_between_a_step_and_an_eager_update_is_seen_as_after_backward():
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    optimizer, eager = AdaHesScale(module.parameters()), AdaHesScale(reference.parameters())
    step = compile_step(module, loss_fn, **CAPTURED)
    for seed in range(5):
        x, y = case.batch(seed)
        for o, run in ((optimizer, step), (eager, lambda x, y: eager_step(reference, x, y))):
            o.zero_grad()
            run(x, y)
            nn.utils.clip_grad_norm_([p for g in o.param_groups for p in g["params"]], 0.1)
            o.step()
    assert optimizer.stats["clipping"] < 1
    assert_same(module, reference)
