"""Step-size scaling bounds the step of any optimizer and otherwise leaves that optimizer as it is."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop

from hesscale_lightning.optim import AdaHesScale, StepSizeScaling
from tests.optim.reference import Params, deliver, make_params, quadratic_backward, random_like

Maker = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "SGD": lambda ps: SGD(ps, lr=0.5),
    "SGD_momentum": lambda ps: SGD(ps, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda ps: Adam(ps, lr=0.5),
    "Adam_amsgrad": lambda ps: Adam(ps, lr=0.5, amsgrad=True, foreach=False),
    "Adam_fused": lambda ps: Adam(ps, lr=0.5, fused=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.5, weight_decay=0.1),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.5),
    "Adagrad": lambda ps: Adagrad(ps, lr=0.5),
    "NAdam": lambda ps: NAdam(ps, lr=0.5),
    "Rprop": lambda ps: Rprop(ps, lr=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("denominator", ["rms", "abs"])
def test_the_step_is_the_optimizers_times_the_factor(name: str, denominator: Any) -> None:
    """Against the definition in float64, with the plain optimizer restarted from the same point in every step."""
    delta = 1e-2
    params, free = make_params(torch.float64), make_params(torch.float64)
    optimizer = StepSizeScaling(OPTIMIZERS[name](params), delta, denominator=denominator)
    plain = OPTIMIZERS[name](free)
    generator = torch.Generator().manual_seed(1)
    averages = [torch.zeros_like(p) for p in params]
    for step in range(1, 7):
        with torch.no_grad():
            for p, q in zip(params, free, strict=True):
                q.copy_(p)
        before = [p.detach().clone() for p in params]
        size = 1.0 if step != 4 else 1e-9
        grads = [g * size for g in random_like(params, generator)]
        diagonals = random_like(params, generator)
        deliver(params, grads, diagonals)
        deliver(free, grads, None)
        optimizer.step()
        plain.step()
        steps = [q.detach() - old for q, old in zip(free, before, strict=True)]
        averages = [
            0.999 * v + 0.001 * (h**2 if denominator == "rms" else h.abs())
            for v, h in zip(averages, diagonals, strict=True)
        ]
        correction = 1 - 0.999**step
        curvature = [(v / correction).sqrt() if denominator == "rms" else v / correction for v in averages]
        along = sum((d * u**2).sum().item() for d, u in zip(curvature, steps, strict=True))
        factor = min(1.0, math.sqrt(2 * delta / along))
        assert optimizer.stats["scale"].item() == pytest.approx(factor, rel=1e-5)
        for p, old, u in zip(params, before, steps, strict=True):
            torch.testing.assert_close(p.detach(), old + factor * u, rtol=1e-6, atol=1e-12)
    assert all(p.hess_diag is None for p in params)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_radius_that_never_binds_leaves_the_run_bit_identical(name: str) -> None:
    params, free = make_params(), make_params()
    optimizer, plain = StepSizeScaling(OPTIMIZERS[name](params), 1e9), OPTIMIZERS[name](free)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        grads = random_like(params, generator)
        deliver(params, grads, random_like(params, generator))
        deliver(free, grads, None)
        optimizer.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, free, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_scaled_with_float32_averages(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = StepSizeScaling(SGD(params, lr=1.0), 1e-2)
    before = [p.detach().float().clone() for p in params]
    quadratic_backward(params)
    optimizer.step()
    along = sum((2.0 * (p.detach().float() - old) ** 2).sum().item() for p, old in zip(params, before, strict=True))
    assert along / 2 == pytest.approx(1e-2, rel=0.1)
    assert {state["exp_avg_hess"].dtype for state in optimizer.curvature.values()} == {torch.float32}


def test_groups_have_separate_regions() -> None:
    params = make_params()
    optimizer = StepSizeScaling(
        SGD([{"params": params[:3]}, {"params": params[3:], "scaling_delta": 1e-5}], lr=0.5), 1e-3
    )
    before = [p.detach().clone() for p in params]
    quadratic_backward(params)
    optimizer.step()
    sizes = [(2.0 * (p.detach() - old) ** 2).sum().item() / 2 for p, old in zip(params, before, strict=True)]
    assert sum(sizes[:3]) == pytest.approx(1e-3, rel=1e-4)
    assert sum(sizes[3:]) == pytest.approx(1e-5, rel=1e-4)
    assert optimizer.stats["scale/1"] < optimizer.stats["scale/0"]


def test_a_group_added_later_is_scaled_too() -> None:
    params = make_params()
    optimizer = StepSizeScaling(SGD(params[:3], lr=1.0), 1e-3)
    optimizer.add_param_group({"params": params[3:]})
    quadratic_backward(params)
    optimizer.step()
    assert optimizer.param_groups[1]["scaling_delta"] == 1e-3
    assert optimizer.stats["scale/1"] < 1


def test_it_is_an_optimizer_for_schedulers_and_shares_groups_and_state() -> None:
    params = make_params()
    inner = Adam(params, lr=0.1)
    optimizer = StepSizeScaling(inner, 1e-3)
    assert isinstance(optimizer, Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    quadratic_backward(params)
    optimizer.step()
    scheduler.step()
    assert inner.param_groups is optimizer.param_groups
    assert inner.param_groups[0]["lr"] == 0.05
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lr: 0.05" in repr(optimizer)


def test_step_hooks_run_once() -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params), 1e-3)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    quadratic_backward(params)
    optimizer.step()
    assert calls == ["before", "after"]


def test_state_dict_hooks_act_on_what_is_saved_and_loaded() -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params), 1e-3)
    optimizer.register_state_dict_post_hook(lambda _, state: state.update(saved=True))
    seen: list[bool] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["saved"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [True]


def test_closure_is_evaluated_once_with_gradients_enabled_and_its_loss_returned() -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params, lr=1.0), 1e-3)
    losses = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(quadratic_backward(params))
        return losses[-1]

    for step in range(3):
        assert optimizer.step(closure) is losses[step]  # type: ignore[arg-type, func-returns-value]
    assert len(losses) == 3
    assert optimizer.stats["scale"] < 1


def test_zero_grad_drops_gradients_and_diagonals() -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params), 1e-3)
    quadratic_backward(params)
    optimizer.zero_grad()
    assert all(p.grad is None and p.hess_diag is None for p in params)  # type: ignore[attr-defined]


def test_the_average_stands_between_refreshes() -> None:
    params = make_params()
    optimizer = StepSizeScaling(SGD(params, lr=1.0), 1e-3)
    quadratic_backward(params)
    optimizer.step()
    average = optimizer.curvature[params[0]]["exp_avg_hess"].clone()
    deliver(params, [p.detach() for p in params], None)
    optimizer.step()
    assert torch.equal(optimizer.curvature[params[0]]["exp_avg_hess"], average)
    assert optimizer.curvature[params[0]]["hess_step"].item() == 1
    assert optimizer.stats["scale"] < 1


def test_gradient_without_any_diagonal_is_an_error_and_nothing_moves() -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params), 1e-3)
    before = [p.detach().clone() for p in params]
    deliver(params, [torch.ones_like(p) for p in params], None)
    with pytest.raises(RuntimeError, match=r"StepSizeScaling: parameter 0 of group 0 \(shape \(5, 4\)\)"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state


def run(optimizer: Optimizer, params: Params, generator: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        deliver(params, random_like(params, generator), random_like(params, generator))
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_optimizer_continues_bit_for_bit(dtype: torch.dtype) -> None:
    params, resumed_params = make_params(dtype), make_params(dtype, seed=1)
    optimizer = StepSizeScaling(SGD(params, 0.1, momentum=0.9), 1e-3)
    resumed = StepSizeScaling(SGD(resumed_params, 0.1, momentum=0.9), 1.0)
    generator = torch.Generator().manual_seed(3)
    run(optimizer, params, generator, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(params, resumed_params, strict=True):
            q.copy_(p)
    other = torch.Generator()
    other.set_state(generator.get_state())
    run(optimizer, params, generator, 3)
    run(resumed, resumed_params, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed_params, strict=True))
    assert optimizer.stats["scale"] < 1


def test_checkpoints_pass_between_the_wrapped_and_the_plain_optimizer() -> None:
    params, free = make_params(), make_params()
    wrapped, plain = StepSizeScaling(Adam(params), 1e-3), Adam(free)
    run(wrapped, params, torch.Generator().manual_seed(4), 2)
    plain.load_state_dict(wrapped.state_dict())
    assert torch.equal(plain.state[free[0]]["exp_avg"], wrapped.state[params[0]]["exp_avg"])
    wrapped.load_state_dict(plain.state_dict())
    assert torch.equal(plain.state[free[0]]["exp_avg"], wrapped.state[params[0]]["exp_avg"])
    assert not wrapped.curvature


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_bit_for_bit(copier: Any) -> None:
    params = make_params()
    optimizer = StepSizeScaling(Adam(params, lr=1.0), 1e-3)
    run(optimizer, params, torch.Generator().manual_seed(5), 3)
    copied_params, copied = copier((params, optimizer))
    assert copied.optimizer is not optimizer.optimizer
    run(optimizer, params, torch.Generator().manual_seed(6), 3)
    run(copied, copied_params, torch.Generator().manual_seed(6), 3)
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))


def test_clipping_does_not_widen_the_trust_region() -> None:
    sizes = []
    for max_norm in (1e9, 1e-3):
        params = make_params()
        optimizer = StepSizeScaling(Adam(params, lr=1.0), 1e-3)
        before = [p.detach().clone() for p in params]
        quadratic_backward(params)
        torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        sizes.append(sum(((p.detach() - old) ** 2).sum().item() for p, old in zip(params, before, strict=True)))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_grad_scaler_leaves_the_steps_as_they_are_without_it() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)):
        params = make_params()
        optimizer = StepSizeScaling(Adam(params, lr=1.0), 1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            if scaler is None:
                quadratic_backward(params)
                optimizer.step()
            else:
                quadratic_backward(params, scale=float(scaler.scale(torch.ones(())).item()))  # type: ignore[union-attr]
                scaler.step(optimizer)
                scaler.update()
        results.append(params)
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-7)


def test_stats_describe_the_step_that_was_made() -> None:
    params = make_params(torch.float64)
    optimizer = StepSizeScaling(SGD(params, lr=0.3), 1e-2)
    assert optimizer.stats == {}
    loss = quadratic_backward(params, curvature=3.0).item()
    before = torch.cat([p.detach().reshape(-1) for p in params])
    optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in params])
    stats = optimizer.stats
    assert stats["mean_abs_update"].item() == pytest.approx((after - before).abs().mean().item(), rel=1e-6)
    assert stats["predicted_decrease"].item() == pytest.approx(loss - 1.5 * (after**2).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda ps: StepSizeScaling(AdaHesScale(ps)), TypeError, "pass delta to it"),
        (lambda ps: StepSizeScaling(torch.optim.LBFGS(ps)), TypeError, "LBFGS moves"),
        (lambda ps: StepSizeScaling(ps), TypeError, "must be a torch.optim.Optimizer, got list"),
        (lambda ps: StepSizeScaling(SGD(ps), 0.0), ValueError, "delta must be > 0, got 0.0"),
        (lambda ps: StepSizeScaling(SGD(ps), beta=1.0), ValueError, r"beta must be in \[0, 1\), got 1.0"),
        (lambda ps: StepSizeScaling(SGD(ps), denominator="mean"), ValueError, "got 'mean'"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[Params], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(make_params())


def test_a_scaled_optimizer_is_not_scaled_twice():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="already"):
        StepSizeScaling(StepSizeScaling(torch.optim.SGD([p], lr=1.0)))
