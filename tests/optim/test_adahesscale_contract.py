"""What torch, Lightning and Stable-Baselines3 expect of an optimizer, and what the diagonal's life cycle promises."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from hesscale_lightning.optim import AdaHesScale
from tests.optim.reference import Params, deliver, make_params, quadratic_backward, random_like


def step_randomly(optimizer: AdaHesScale, params: Params, generator: torch.Generator, steps: int) -> None:
    for step in range(steps):
        deliver(params, random_like(params, generator), random_like(params, generator) if step % 3 != 2 else None)
        optimizer.step()


# ---- closures and gradients


def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        calls.append(quadratic_backward(params))
        return calls[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]  # type: ignore[arg-type, func-returns-value]
    assert len(calls) == 1
    assert optimizer.step() is None  # type: ignore[func-returns-value]


def test_zero_grad_drops_gradients_and_diagonals() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    quadratic_backward(params)
    optimizer.zero_grad()
    assert all(p.grad is None and p.hess_diag is None for p in params)  # type: ignore[attr-defined]
    quadratic_backward(params)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() and p.hess_diag is None for p in params)  # type: ignore[attr-defined, union-attr]


def test_zero_grad_works_before_any_diagonal_exists() -> None:
    params = make_params()
    AdaHesScale(params).zero_grad()
    assert not hasattr(params[0], "hess_diag")


# ---- the diagonal's life cycle


def test_a_diagonal_is_taken_once_even_if_only_the_model_clears_its_gradients() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    for expected in (1, 2, 3):
        for p in params:  # model.zero_grad()
            p.grad = None
        quadratic_backward(params)
        optimizer.step()
        for p in params:
            assert p.hess_diag is None  # type: ignore[attr-defined]
            assert optimizer.state[p]["hess_step"].item() == expected
            # were a diagonal of 2 taken twice, the average would exceed 4
            corrected = optimizer.state[p]["exp_avg_hess"] / (1 - 0.999**expected)
            torch.testing.assert_close(corrected, torch.full_like(p, 4.0), rtol=1e-4, atol=0)


def test_without_a_new_diagonal_the_average_stands_and_its_correction_counts_refreshes() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    quadratic_backward(params)
    optimizer.step()
    before = [optimizer.state[p]["exp_avg_hess"].clone() for p in params]
    for _ in range(9):
        deliver(params, [torch.ones_like(p) for p in params], None)
        optimizer.step()
    for p, average in zip(params, before, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg_hess"], average)
        assert (optimizer.state[p]["step"].item(), optimizer.state[p]["hess_step"].item()) == (10, 1)


def test_gradient_without_any_diagonal_is_an_error_with_advice_and_changes_nothing() -> None:
    params = make_params(shapes=[(2,), (3, 4)])
    optimizer = AdaHesScale([{"params": [("bias", params[0])]}, {"params": [("weight", params[1])]}])
    deliver(params, [torch.ones_like(p) for p in params], [torch.ones_like(p) for p in params])
    params[1].hess_diag = None  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 \('weight', shape \(3, 4\)\)") as error:
        optimizer.step()
    assert "hesscale_lightning.attach(loss) before loss.backward()" in str(error.value)
    assert "HesScaleCallback" in str(error.value)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state
    assert params[0].hess_diag is not None  # type: ignore[attr-defined]


def test_parameters_without_gradient_are_left_alone() -> None:
    params = make_params()
    optimizer = AdaHesScale(params, weight_decay=0.1)
    deliver(params[1:], [torch.ones_like(p) for p in params[1:]], [torch.ones_like(p) for p in params[1:]])
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


def test_a_diagonal_of_another_shape_is_an_error() -> None:
    params = make_params(shapes=[(2, 3)])
    deliver(params, [torch.ones(2, 3)], [torch.ones(3, 2)])
    with pytest.raises(ValueError, match=r"shape \(3, 2\), but its parameter has shape \(2, 3\)"):
        AdaHesScale(params).step()


@pytest.mark.parametrize(("dtype", "given"), [(torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_diagonal_of_another_dtype_is_converted(dtype: torch.dtype, given: torch.dtype, foreach: bool) -> None:
    params = make_params(dtype)
    optimizer = AdaHesScale(params, foreach=foreach)
    deliver(params, [torch.ones_like(p) for p in params], [torch.full(p.shape, 2.0, dtype=given) for p in params])
    optimizer.step()
    average = optimizer.state[params[0]]["exp_avg_hess"]
    torch.testing.assert_close(average, torch.full(average.shape, 0.004))


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    embedding.weight.hess_diag = torch.ones(5, 2)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="sparse"):
        AdaHesScale(embedding.parameters()).step()


# ---- hyperparameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
        ({"lr": torch.ones(2)}, r"one element, but it has shape \(2,\)"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        ({"betas": (1.0, 0.9)}, r"\[0, 1\), got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"\[0, 1\), got \(0.9, -0.1\)"),
        ({"betas": (0.9,)}, r"two numbers in \[0, 1\), got \(0.9,\)"),
        ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
        ({"weight_decay": -1}, "weight_decay must be >= 0, got -1"),
        ({"lr_scale": -2.0}, "lr_scale must be >= 0, got -2.0"),
        ({"max_update": 0.0}, "max_update must be > 0 or None, got 0.0"),
        ({"delta": -1e-4}, "delta must be > 0 or None, got -0.0001"),
        ({"denominator": "mean"}, "one of rms, abs, sqrt_abs, got 'mean'"),
    ],
)
def test_hyperparameters_out_of_range_are_named_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaHesScale(make_params(), **options)
    optimizer = AdaHesScale(make_params())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make_params(), **options})
    assert len(optimizer.param_groups) == 1


def test_every_hyperparameter_is_in_defaults_and_groups() -> None:
    optimizer = AdaHesScale([{"params": make_params(), "lr": 0.5}], lr=0.1)
    names = {"lr", "betas", "eps", "weight_decay", "denominator", "max_update", "delta", "lr_scale", "maximize"}
    assert names <= optimizer.defaults.keys()
    assert names <= optimizer.param_groups[0].keys()
    assert (optimizer.defaults["lr"], optimizer.param_groups[0]["lr"]) == (0.1, 0.5)


def test_lr_scale_survives_what_overwrites_lr() -> None:
    params = make_params(shapes=[(3,), (3,)])
    optimizer = AdaHesScale(
        [{"params": params[:1]}, {"params": params[1:], "lr_scale": 0.1}], lr=1.0, delta=None, max_update=None
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    for group in optimizer.param_groups:  # as Stable-Baselines3 does before each training phase
        group["lr"] = 0.01
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    before = [p.detach().clone() for p in params]
    deliver(params, [torch.ones(3)] * 2, [torch.ones(3)] * 2)
    optimizer.step()
    moved = [old - p.detach() for p, old in zip(params, before, strict=True)]
    torch.testing.assert_close(moved[0], torch.full((3,), 0.5))
    torch.testing.assert_close(moved[1], torch.full((3,), 0.05))


def test_a_schedule_may_end_slightly_below_zero() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = -1e-12
    quadratic_backward(params)
    optimizer.step()
    assert all(torch.allclose(p, old, atol=1e-9) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_schedulers_drive_it(scheduler: str) -> None:
    params = make_params()
    optimizer = AdaHesScale(params, lr=0.1)
    made: Any = {
        "OneCycleLR": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10),
        "CosineAnnealingLR": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "ReduceLROnPlateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }[scheduler]()
    seen = set()
    for _ in range(5):
        quadratic_backward(params)
        optimizer.step()
        made.step(1.0) if scheduler == "ReduceLROnPlateau" else made.step()
        seen.add(optimizer.param_groups[0]["lr"])
    assert len(seen) >= 4


def test_groups_may_be_added_and_may_be_empty() -> None:
    params = make_params()
    optimizer = AdaHesScale([{"params": []}, {"params": params[:2]}])
    quadratic_backward(params)
    optimizer.step()
    before = params[2].detach().clone()
    optimizer.add_param_group({"params": params[2:], "lr": 1.0})
    quadratic_backward(params)
    optimizer.step()
    assert not torch.equal(params[2], before)
    assert set(optimizer.stats) >= {"scale/0", "scale/1", "scale/2", "mean_abs_update/2"}
    assert "mean_abs_update/0" not in optimizer.stats


# ---- checkpoints and copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_reloaded_optimizer_continues_bit_for_bit(dtype: torch.dtype, capturable: bool) -> None:
    def build(seed: int) -> tuple[Params, AdaHesScale]:
        params = make_params(dtype, seed)
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:]}]
        return params, AdaHesScale(groups, lr=0.01, weight_decay=0.1, capturable=capturable)

    params, optimizer = build(0)
    generator = torch.Generator().manual_seed(8)
    step_randomly(optimizer, params, generator, 300)
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_params, resumed = build(1)
    resumed.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, value in zip(resumed_params, saved["params"], strict=True):
            p.copy_(value)
    for p, q in zip(params, resumed_params, strict=True):
        for name, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][name].dtype
            assert torch.equal(value, resumed.state[q][name]), name
            assert value.data_ptr() != resumed.state[q][name].data_ptr()
    other = torch.Generator()
    other.set_state(generator.get_state())
    step_randomly(optimizer, params, generator, 5)
    step_randomly(resumed, resumed_params, other, 5)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed_params, strict=True))


def test_loading_honours_hooks_that_replace_the_state_dict() -> None:
    params = make_params(torch.bfloat16)
    optimizer = AdaHesScale(params)
    quadratic_backward(params)
    optimizer.step()
    other = AdaHesScale(make_params(torch.bfloat16))
    full = optimizer.state_dict()
    other.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    other.load_state_dict({"wrapped": full})
    loaded = other.state_dict()["state"]
    assert torch.equal(loaded[0]["exp_avg_hess"], full["state"][0]["exp_avg_hess"])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_bit_for_bit_and_still_notice_clipping(copier: Any) -> None:
    params = make_params()
    optimizer = AdaHesScale(params, lr=0.1)
    generator = torch.Generator().manual_seed(9)
    step_randomly(optimizer, params, generator, 4)
    copied_params, copied = copier((params, optimizer))
    assert copied_params[0] is copied.param_groups[0]["params"][0]
    assert copied_params[0] is not params[0]
    for some, opt in ((params, optimizer), (copied_params, copied)):
        opt.zero_grad()
        quadratic_backward(some)
        torch.nn.utils.clip_grad_norm_(some, 0.1)
        opt.step()
        assert opt.stats["clipping"].item() < 0.1
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))


def test_options_missing_from_an_old_pickle_take_their_defaults() -> None:
    optimizer = AdaHesScale(make_params())
    state = optimizer.__getstate__()
    del state["param_groups"][0]["delta"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["delta"] == optimizer.defaults["delta"]


# ---- compilation and automatic mixed precision


@pytest.mark.parametrize("options", [{}, {"foreach": False, "capturable": True}])
def test_compiled_step_equals_eager_step(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = make_params(shapes=[(5, 4), (4,)])
        optimizer = AdaHesScale(params, lr=0.3, delta=1e-3, weight_decay=0.1, **options)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(10)
        for index in range(5):
            deliver(params, random_like(params, generator), random_like(params, generator) if index % 2 == 0 else None)
            step()
        results.append(params)
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("max_norm", "options", "tolerance"), [(None, {}, 1e-6), (1.0, {"delta": None}, 0.02)])
def test_grad_scaler_leaves_the_steps_as_they_are_without_it(
    max_norm: float | None, options: dict[str, Any], tolerance: float
) -> None:
    """The loss scale reaches gradients and diagonals; unscaling reaches the gradients only.

    With clipping on top the two factors cannot be told apart: the steps have the right size, but are not the same.
    """
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)):
        params = make_params()
        optimizer = AdaHesScale(params, lr=0.01, **options)
        before = [p.detach().clone() for p in params]
        for _ in range(10):
            optimizer.zero_grad()
            scale = 1.0 if scaler is None else float(scaler.scale(torch.ones(())).item())  # type: ignore[union-attr]
            quadratic_backward(params, scale=scale)
            if scaler is not None and max_norm is not None:
                scaler.unscale_(optimizer)
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, max_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append([p.detach() - old for p, old in zip(params, before, strict=True)])
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=tolerance, atol=1e-6)


def test_a_step_that_grad_scaler_skips_changes_nothing() -> None:
    params = make_params()
    optimizer = AdaHesScale(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    quadratic_backward(params)
    assert params[0].grad is not None
    params[0].grad.fill_(float("inf"))
    before = [p.detach().clone() for p in params]
    scaler.step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert not optimizer.state


# ---- statistics


def test_stats_describe_the_latest_step() -> None:
    params = make_params(torch.float64)
    optimizer = AdaHesScale(params, lr=0.5, delta=1e-2, eps=0.0, max_update=None)
    assert optimizer.stats == {}
    loss = quadratic_backward(params, curvature=3.0).item()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    stats = optimizer.stats
    assert all(value.ndim == 0 for value in stats.values())
    moved = torch.cat([(p.detach() - old).reshape(-1) for p, old in zip(params, before, strict=True)])
    assert stats["mean_abs_update"].item() == pytest.approx(moved.abs().mean().item(), rel=1e-6)
    # The model of a quadratic is exact, so what it predicts is what happens.
    now = sum((1.5 * p.detach() ** 2).sum().item() for p in params)
    assert stats["predicted_decrease"].item() == pytest.approx(loss - now, rel=1e-5)
    assert 0 < stats["scale"].item() < 1
    optimizer.zero_grad()
    assert "predicted_decrease" not in optimizer.stats


def test_training_a_small_network_reaches_a_low_loss_at_any_learning_rate() -> None:
    """The defaults guard against divergence: two classes on a grid, ReLU, exact output-layer curvature only."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(64, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).float()
    for lr in (1e-2, 1e-1, 1.0):
        torch.manual_seed(0)
        hidden, head = torch.nn.Linear(2, 32), torch.nn.Linear(32, 1)
        params = [*hidden.parameters(), *head.parameters()]
        optimizer = AdaHesScale(params, lr=lr)
        worst = 0.0
        for _ in range(200):
            optimizer.zero_grad()
            z = hidden(x)
            logits = head(z.relu()).squeeze(1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
            loss.backward()
            p = logits.detach().sigmoid()
            h = (p * (1 - p) / len(x)).unsqueeze(1)  # diagonal at the logits
            head.weight.hess_diag = (h * z.detach().relu() ** 2).sum(0, keepdim=True)  # type: ignore[assignment]
            head.bias.hess_diag = h.sum(0)  # type: ignore[assignment]
            inner = h * head.weight.detach() ** 2 * (z.detach() > 0)
            hidden.weight.hess_diag = inner.T @ x**2  # type: ignore[assignment]
            hidden.bias.hess_diag = inner.sum(0)  # type: ignore[assignment]
            optimizer.step()
            worst = max(worst, loss.item())
        assert worst < 1.0
        assert loss.item() < 0.4


@pytest.mark.parametrize("stepped", [False, True])
def test_the_state_of_another_optimizer_is_refused_before_anything_is_written(stepped: bool) -> None:
    params = make_params()
    other = torch.optim.Adam(params, lr=0.5)
    if stepped:
        for p in params:
            p.grad = torch.ones_like(p)
        other.step()
    optimizer = AdaHesScale(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before
