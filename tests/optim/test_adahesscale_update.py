"""The update equals its equations, for every option, on every path."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hesscale_lightning.optim import AdaHesScale
from tests.optim.reference import ReferenceAdaHesScale, deliver, make_params, random_like

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bare": {"max_update": None, "delta": None},
    "clamp": {"max_update": 0.5, "delta": None},
    "trust_region": {"max_update": None, "delta": 1e-3, "lr": 0.3},
    "clamp_and_trust_region": {"max_update": 0.7, "delta": 1e-3, "lr": 0.3},
    "abs": {"denominator": "abs", "delta": None},
    "abs_trust_region": {"denominator": "abs", "delta": 1e-3, "lr": 0.3},
    "sqrt_abs": {"denominator": "sqrt_abs", "delta": None},
    "sqrt_abs_trust_region": {"denominator": "sqrt_abs", "delta": 1e-3, "lr": 0.3},
    "damping": {"damping": 0.1, "lr": 0.1},
    "damping_abs": {"damping": 0.1, "denominator": "abs", "delta": 1e-3, "lr": 0.3},
    "damping_sqrt_abs": {"damping": 0.1, "denominator": "sqrt_abs", "delta": 1e-3, "lr": 0.3},
    "large_eps": {"eps": 0.1, "lr": 0.1},
    "weight_decay": {"weight_decay": 0.1, "lr": 0.05},
    "maximize": {"maximize": True, "lr": 0.05},
    "betas": {"betas": (0.5, 0.9), "delta": None},
    "no_averaging": {"betas": (0.0, 0.0), "delta": None},
    "lr_scale": {"lr": 0.01, "lr_scale": 3.0, "weight_decay": 0.1},
    "lr_tensor": {"lr": torch.tensor(0.02), "weight_decay": 0.1},
    "lr_tensor_of_one_element": {"lr": torch.tensor([0.02])},
}
PATHS: dict[str, dict[str, Any]] = {
    "foreach": {},
    "single": {"foreach": False},
    "capturable": {"capturable": True},
    "capturable_single": {"capturable": True, "foreach": False},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])
def test_every_configuration_follows_the_equations(name: str, path: str, dtype: torch.dtype, tolerance: float) -> None:
    options = CONFIGURATIONS[name]
    params = make_params(dtype)
    reference = ReferenceAdaHesScale(list(params), options)
    optimizer = AdaHesScale(params, **options, **PATHS[path])
    generator = torch.Generator().manual_seed(1)
    scales = []
    for step in range(12):
        grads, diagonals = random_like(params, generator), random_like(params, generator)
        fresh = step % 3 != 1  # every third step brings no diagonal
        deliver(params, grads, diagonals if fresh else None)
        optimizer.step()
        reference.step(grads, list(diagonals) if fresh else [None] * len(params))
        scales.append(optimizer.stats["scale"].item())
        assert scales[-1] == pytest.approx(reference.scale, rel=1e-4)
    for param, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(param.detach().double(), expected, rtol=tolerance, atol=tolerance)
    if "trust_region" in name:
        assert max(scales) < 1, "this case is meant to exercise the trust region"


@pytest.mark.parametrize(("decay", "torch_class"), [(0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)])
@pytest.mark.parametrize("foreach", [True, False])
def test_with_absolute_gradients_as_diagonal_it_is_adam(decay: float, torch_class: Any, foreach: bool) -> None:
    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:3], "lr": 1e-2}, {"params": params[3:], "lr": 1e-3, "betas": (0.8, 0.99)}]

    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    optimizer = AdaHesScale(groups(ours), weight_decay=decay, max_update=None, delta=None, foreach=foreach)
    adam = torch_class(groups(theirs), weight_decay=decay)
    generator = torch.Generator().manual_seed(2)
    for _ in range(100):
        grads = random_like(ours, generator)
        deliver(ours, grads, [grad.abs() for grad in grads])
        deliver(theirs, grads, None)
        optimizer.step()
        adam.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_adam_with_l2_penalty_is_not_what_weight_decay_means() -> None:
    """Guards the reduction test above: it can tell decoupled decay from a penalty."""
    ours, theirs = make_params(torch.float64), make_params(torch.float64)
    optimizer = AdaHesScale(ours, lr=1e-2, weight_decay=0.1, max_update=None, delta=None)
    adam = torch.optim.Adam(theirs, lr=1e-2, weight_decay=0.1)
    grads = random_like(ours, torch.Generator().manual_seed(2))
    for params, opt in ((ours, optimizer), (theirs, adam)):
        deliver(params, grads, [grad.abs() for grad in grads])
        opt.step()
    assert not torch.allclose(ours[0], theirs[0], atol=1e-4)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    present=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    options=st.sampled_from(sorted(CONFIGURATIONS)),
)
@settings(max_examples=60, deadline=None)
def test_both_paths_agree_for_any_shapes_and_any_parameters_left_out(
    shapes: list[tuple[int, ...]], present: list[int], options: str
) -> None:
    """Parameters take part in some steps only: bit i of ``present[step]`` leaves parameter i out."""
    both = []
    for foreach in (True, False):
        params = make_params(shapes=shapes)
        optimizer = AdaHesScale(params, **CONFIGURATIONS[options], foreach=foreach)
        generator = torch.Generator().manual_seed(3)
        for left_out in present:
            deliver(params, random_like(params, generator), random_like(params, generator))
            for index, param in enumerate(params):
                if left_out >> index & 1:
                    param.grad = param.hess_diag = None  # type: ignore[attr-defined]
            optimizer.step()
        both.append(params)
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_parameters_with_fewer_steps_or_refreshes_have_corrections_of_their_own(path: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "delta": None}
    params = make_params(torch.float64)
    references = [ReferenceAdaHesScale([p], options) for p in params]
    optimizer = AdaHesScale(params, **options, **PATHS[path])
    generator = torch.Generator().manual_seed(12)
    for step in range(8):
        grads, diagonals = random_like(params, generator), random_like(params, generator)
        deliver(params, grads, diagonals)
        for index, (param, reference) in enumerate(zip(params, references, strict=True)):
            if step % (index + 1):  # parameter i takes part in every (i + 1)-th step
                param.grad = param.hess_diag = None  # type: ignore[attr-defined]
            elif step % 4 and index % 2:  # and parameters 1, 3, 5 have fewer refreshes than steps
                param.hess_diag = None  # type: ignore[attr-defined]
                reference.step([grads[index]], [None])
            else:
                reference.step([grads[index]], [diagonals[index]])
        optimizer.step()
    for param, reference in zip(params, references, strict=True):
        torch.testing.assert_close(param.detach(), reference.params[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["defaults", "bare", "abs", "clamp_and_trust_region", "sqrt_abs_trust_region"])
def test_large_tensors_follow_the_equations(name: str, path: str) -> None:
    """Above a size the CPU path visits tensors one by one and reuses buffers."""
    options = CONFIGURATIONS[name]
    params = make_params(torch.float64, shapes=[(300, 300), (7,), (100, 100)])
    reference = ReferenceAdaHesScale(list(params), options)
    optimizer = AdaHesScale(params, **options, **PATHS[path])
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        grads, diagonals = random_like(params, generator), random_like(params, generator)
        deliver(params, grads, diagonals)
        optimizer.step()
        reference.step(grads, list(diagonals))
        assert optimizer.stats["scale"].item() == pytest.approx(reference.scale, rel=1e-4)
    for param, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-6)


def test_no_entry_moves_further_than_max_update_times_lr() -> None:
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = AdaHesScale(params, lr=0.01, max_update=2.0, delta=None)
    grads = random_like(params, torch.Generator().manual_seed(5))
    deliver(params, grads, [torch.zeros_like(p) for p in params])
    optimizer.step()
    for param, old, grad in zip(params, before, grads, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.02 * grad.sign())


def test_second_order_term_stays_within_delta_in_every_group_separately() -> None:
    params = make_params()
    optimizer = AdaHesScale(
        [{"params": params[:2]}, {"params": params[2:4], "delta": 1e-6}, {"params": params[4:], "delta": None}],
        lr=0.5,
        delta=1e-2,
    )
    grads = random_like(params, torch.Generator().manual_seed(6))
    before = [p.detach().clone() for p in params]
    deliver(params, grads, [torch.ones_like(p) for p in params])
    optimizer.step()
    moved = [(p.detach() - old) for p, old in zip(params, before, strict=True)]
    sizes = [sum((u**2).sum().item() / 2 for u in part) for part in (moved[:2], moved[2:4], moved[4:])]
    assert sizes[0] == pytest.approx(1e-2, rel=1e-4)
    assert sizes[1] == pytest.approx(1e-6, rel=1e-4)
    assert sizes[2] > 1e-2
    assert optimizer.stats["scale/2"].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_averages_and_the_float32_update(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    params = make_params(dtype)
    reference = ReferenceAdaHesScale(list(params), options)
    optimizer = AdaHesScale(params, **options)
    generator = torch.Generator().manual_seed(7)
    grads = random_like(params, generator)
    # 1e-6 squared is below the smallest float16
    diagonals = [torch.rand(p.shape, generator=generator) * 1e-6 for p in params]
    deliver(params, grads, diagonals)
    optimizer.step()
    reference.step(grads, list(diagonals))
    for param, expected in zip(params, reference.params, strict=True):
        assert {t.dtype for t in optimizer.state[param].values()} == {torch.float32}
        assert (optimizer.state[param]["exp_avg_hess"] > 0).all()
        torch.testing.assert_close(param.detach().double(), expected, rtol=2e-2, atol=2e-2)
