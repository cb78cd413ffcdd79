"""Whatever multiplies all gradients after backward multiplies the diagonals too, and nothing else does."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hesscale_lightning.optim import AdaHesScale, StepSizeScaling
from hesscale_lightning.optim.gradient_rescaling import (
    _factor_on_device,
    _factor_on_host,
    gradient_factor,
    place_probes,
)
from tests.optim.reference import Params, ReferenceAdaHesScale, make_params, quadratic_backward


def rescale(params: Params, factor: float) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.mul_(factor)


@pytest.mark.parametrize("max_norm", [1e-6, 1e-3, 0.5, 1e9])
@pytest.mark.parametrize(
    "options", [{}, {"foreach": False}, {"capturable": True}, {"denominator": "abs"}, {"denominator": "sqrt_abs"}]
)
def test_clipping_factors_are_the_weights_of_the_averages(max_norm: float, options: dict[str, Any]) -> None:
    params = make_params(torch.float64)
    optimizer = AdaHesScale(params, lr=0.1, **options)
    reference = ReferenceAdaHesScale(list(params), {"lr": 0.1, **options})
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        optimizer.zero_grad()
        quadratic_backward(params, scale=torch.rand((), generator=generator).item() * 10)
        diagonals = [p.hess_diag for p in params]  # type: ignore[attr-defined]
        if step % 2:
            for p in params:
                p.hess_diag = None  # type: ignore[attr-defined]
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm).item()
        grads = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        reference.step(grads, [None] * len(params) if step % 2 else diagonals, min(1.0, max_norm / (norm + 1e-6)))
    for param, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-6)


def test_a_constant_clipping_factor_changes_nothing() -> None:
    results = []
    for factor in (1.0, 1e-3):
        params = make_params(torch.float64)
        optimizer = AdaHesScale(params, lr=0.1, delta=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            quadratic_backward(params)
            rescale(params, factor)
            optimizer.step()
        assert optimizer.stats["scale"].item() < 1  # the trust region is in units of the unclipped loss
        results.append([*params, optimizer.stats["predicted_decrease"]])
    for plain, clipped in zip(*results, strict=True):
        torch.testing.assert_close(plain, clipped, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"denominator": "abs"}, {"delta": 1e-3}])
def test_factors_that_stay_on_the_device_give_the_same_steps(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator a factor is a tensor that must not be read; here it is one on the CPU."""
    results = []
    for on_device in (False, True):
        if on_device:
            monkeypatch.setattr(
                "hesscale_lightning.optim.gradient_rescaling._factor_on_host",
                lambda norms: torch.tensor(_factor_on_host(norms)),
            )
        params = make_params(torch.float64)
        optimizer = AdaHesScale(params, lr=0.1, weight_decay=0.1, **options)
        for step in range(5):
            optimizer.zero_grad()
            quadratic_backward(params)
            torch.nn.utils.clip_grad_norm_(params, 0.1 * (1 + step))
            optimizer.step()
        results.append(params)
    for host, device in zip(*results, strict=True):
        torch.testing.assert_close(host, device, rtol=1e-5, atol=1e-6)


def test_without_compensation_clipping_shortens_the_step_by_its_factor() -> None:
    moved = []
    for compensate in (True, False):
        params = make_params()
        optimizer = AdaHesScale(params, lr=0.1, delta=None, compensate_clipping=compensate)
        before = params[0].detach().clone()
        quadratic_backward(params)
        norm = torch.nn.utils.clip_grad_norm_(params, 0.01)
        optimizer.step()
        moved.append(params[0].detach() - before)
    torch.testing.assert_close(moved[1], moved[0] * (0.01 / norm), rtol=1e-3, atol=1e-8)


def test_gradients_that_are_not_touched_leave_the_step_as_it_is_without_the_hooks() -> None:
    results = []
    for compensate in (True, False):
        params = make_params()
        optimizer = AdaHesScale(params, lr=0.1, compensate_clipping=compensate)
        for _ in range(5):
            optimizer.zero_grad()
            quadratic_backward(params)
            torch.nn.utils.clip_grad_norm_(params, 1e6)  # does not bind, and multiplies by 1
            optimizer.step()
            assert optimizer.stats["clipping"].item() == 1.0
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("factor", [0.25, 2.0**-16, 3.0])
def test_the_factor_holds_for_gradients_accumulated_over_several_backward_passes(factor: float) -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    for _ in range(4):
        quadratic_backward(params, curvature=2.0)
    rescale(params, factor)
    optimizer.step()
    assert optimizer.stats["clipping"].item() == pytest.approx(factor, rel=1e-6)


def test_record_gradients_makes_only_later_factors_count() -> None:
    """The order of a callback: it unscales diagonals after the scaler unscaled gradients, then comes clipping."""
    results = []
    for scale in (1.0, 2.0**10):
        params = make_params()
        optimizer = AdaHesScale(params, lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            quadratic_backward(params, scale=scale)
            if scale != 1:
                rescale(params, 1 / scale)
                for p in params:
                    p.hess_diag.mul_(1 / scale)  # type: ignore[attr-defined]
                optimizer.record_gradients()
                assert not optimizer._step_supports_amp_scaling  # as a GradScaler asks before it steps
            norm = torch.nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
            assert optimizer.stats["clipping"].item() == pytest.approx(0.1 / norm.item(), rel=1e-4)
        results.append(params)
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-7)


def test_after_a_scaler_has_stepped_plain_steps_see_clipping_again() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    assert not optimizer._step_supports_amp_scaling  # as a GradScaler asks
    for expected in (1.0, 0.5):
        optimizer.zero_grad()
        quadratic_backward(params)
        rescale(params, 0.5)
        optimizer.step()
        assert optimizer.stats["clipping"].item() == pytest.approx(expected)


def test_the_average_of_clipping_factors_is_part_of_the_checkpoint() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    quadratic_backward(params)
    rescale(params, 0.5)
    optimizer.step()
    other = AdaHesScale(make_params())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["clipping_average"] == pytest.approx((0.05, 0.1, 0.00025, 0.001))


def uneven(params: Params) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.3)


def one_parameter_only(params: Params) -> None:
    smallest = min(params, key=torch.Tensor.numel)
    assert smallest.grad is not None
    smallest.grad.mul_(0.5)


def replaced(params: Params) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.mul_(0.5)
        p.grad = p.grad * 3


def zeroed(params: Params) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.zero_()


def not_finite(params: Params) -> None:
    for p in params:
        assert p.grad is not None
        p.grad.mul_(float("inf"))


@pytest.mark.parametrize("change", [uneven, one_parameter_only, replaced, zeroed, not_finite])
def test_in_doubt_the_diagonals_are_left_alone(change: Any) -> None:
    params = make_params(shapes=[(4, 4), (4,), (3,)])
    probes = place_probes(params)
    quadratic_backward(params)
    change(params)
    assert gradient_factor(probes) == 1.0


def test_a_probe_whose_gradient_is_zero_tells_nothing_and_the_other_decides() -> None:
    params = make_params(shapes=[(4, 4), (4,), (3,)])
    with torch.no_grad():
        params[2].zero_()
    probes = place_probes(params)
    quadratic_backward(params)
    for p in params:
        assert p.grad is not None
        p.grad.mul_(0.125)
    assert gradient_factor(probes) == pytest.approx(0.125)


def test_a_note_is_used_once() -> None:
    params = make_params()
    probes = place_probes(params)
    quadratic_backward(params)
    for p in params:
        assert p.grad is not None
        p.grad.mul_(0.5)
    assert gradient_factor(probes) == pytest.approx(0.5)
    assert gradient_factor(probes) == 1.0


def test_groups_clipped_separately_have_separate_factors() -> None:
    params = make_params()
    optimizer = AdaHesScale([{"params": params[:3]}, {"params": params[3:]}])
    quadratic_backward(params)
    norm = torch.nn.utils.clip_grad_norm_(params[3:], 0.1)
    optimizer.step()
    assert optimizer.stats["clipping/0"].item() == 1.0
    assert optimizer.stats["clipping/1"].item() == pytest.approx(0.1 / norm.item(), rel=1e-4)


def test_frozen_parameters_carry_no_probe() -> None:
    params = make_params()
    params[5].requires_grad_(False)  # the smallest
    optimizer = AdaHesScale(params)
    quadratic_backward([p for p in params if p.requires_grad])
    torch.nn.utils.clip_grad_norm_(params, 0.1)
    params[5].hess_diag = None  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.stats["clipping"].item() < 0.1


@given(
    norms=st.lists(
        st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e6, width=32) | st.sampled_from([float("inf")])),
        min_size=1,
        max_size=2,
    )
)
def test_the_factor_is_the_same_on_the_device_as_on_the_host(norms: list[tuple[float, float]]) -> None:
    as_float32 = [(torch.tensor(a).item(), torch.tensor(b).item()) for a, b in norms]
    quotients = [torch.tensor(b) / torch.tensor(a) for a, b in norms if a > 0]
    if any(q == 0 or 0 < q < 1e-30 or q > 1e30 for q in quotients):
        return  # float32 loses what float64 still tells
    on_device = _factor_on_device([(torch.tensor(a), torch.tensor(b)) for a, b in norms]).item()
    assert on_device == pytest.approx(_factor_on_host(as_float32), rel=2e-3)


@pytest.mark.parametrize("wrap", [lambda ps: AdaHesScale(ps), lambda ps: StepSizeScaling(torch.optim.SGD(ps, 0.1))])
def test_an_optimizer_that_is_dropped_leaves_no_hook_behind(wrap: Any) -> None:
    params = make_params()
    optimizer = wrap(params)
    hooks = [p._post_accumulate_grad_hooks for p in params if p._post_accumulate_grad_hooks]  # type: ignore[attr-defined]
    assert [len(hook) for hook in hooks] == [1, 1]
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    assert [len(hook) for hook in hooks] == [0, 0]


def test_loading_a_state_dict_does_not_add_hooks() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    for _ in range(3):
        optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    hooks = [p._post_accumulate_grad_hooks for p in params if p._post_accumulate_grad_hooks]  # type: ignore[attr-defined]
    assert [len(hook) for hook in hooks] == [1, 1]
