"""When a program is made, when it is used again, and what happens where there can be none."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesscale_lightning import AdaHesScale, CaptureError, UnsupportedOperationError, attach, compile_step
from hesscale_lightning.compiled_step import programs
from tests.compiled_step.networks import BY_NAME, assert_same, clear, loss_fn

CAPTURED: dict[str, Any] = {"backend": "eager", "silent": True}


def eager_step(module: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = loss_fn(module(x), y)
    attach(loss)
    loss.backward()


def test_train_and_eval_mode_have_a_program_each():
    case = BY_NAME["cnn_with_batch_norm"]
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    for seed, training in enumerate([True, False, True, False]):
        x, y = case.batch(seed)
        for m in (module, reference):
            m.train(training)
            clear(m)
        step(x, y)
        eager_step(reference, x, y)
        assert_same(module, reference)
    assert step.programs == 2


def test_dropout_draws_anew_at_every_step():
    module = BY_NAME["dropout"].build()
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    x, y = BY_NAME["dropout"].batch(0)
    losses = {step(x, y).item() for _ in range(20)}
    assert len(losses) == 20


def test_capturing_draws_no_random_numbers_and_changes_nothing():
    case = BY_NAME["cnn_with_batch_norm"]
    module = nn.Sequential(case.build(), nn.Dropout(0.5))
    before = copy.deepcopy(module.state_dict())
    step = compile_step(module, lambda y, t: loss_fn(y, t).item(), on_failure="raise", **CAPTURED)
    x, y = case.batch(0)
    state = torch.get_rng_state()
    with pytest.raises(CaptureError):
        step(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in module.parameters())


def test_autocast_has_a_program_and_is_that_of_the_eager_step():
    case = BY_NAME["mlp"]
    module, reference = case.build().float(), case.build().float()
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    for seed, on in enumerate([False, True, False, True]):
        x, y = case.batch(seed)
        clear(module)
        clear(reference)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            step(x.float(), y)
            eager_step(reference, x.float(), y)
        assert_same(module, reference, rtol=1e-5, atol=1e-6)
    assert step.programs == 2


def test_parameters_frozen_and_thawed_later_are_noticed():
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    x, y = case.batch(0)
    for required in (True, False, True):
        for m in (module, reference):
            m[0].weight.requires_grad_(required)
            clear(m)
        step(x, y)
        eager_step(reference, x, y)
        assert (module[0].weight.grad is not None) == required
        assert_same(module, reference)
    assert step.programs == 2


def test_exchanged_parameters_and_modules_and_dtypes_are_noticed():
    case = BY_NAME["mlp"]
    module = case.build()
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    x, y = case.batch(0)

    def check(x: Tensor) -> None:
        reference = copy.deepcopy(module)
        clear(module)
        clear(reference)
        step(x, y)
        eager_step(reference, x, y)
        assert_same(module, reference, rtol=1e-9 if x.dtype == torch.float64 else 1e-4, atol=1e-6)

    check(x)
    module[0].weight = nn.Parameter(torch.randn(8, 5).double())
    check(x)
    module[1] = nn.Sigmoid()
    check(x)
    module.float()
    check(x.float())
    module[0].weight.data = torch.randn(8, 5)
    check(x.float())
    handle = module[2].register_forward_hook(lambda m, a, y: 2 * y)
    check(x.float())
    handle.remove()
    check(x.float())


@pytest.mark.parametrize("short_batch", ["eager", "compile"])
def test_a_short_last_batch(short_batch):
    case = BY_NAME["mlp"]
    module, reference = case.build(), case.build()
    step = compile_step(module, loss_fn, short_batch=short_batch, on_failure="raise", **CAPTURED)
    for seed, size in enumerate([8, 8, 5, 8, 5]):
        x, y = case.batch(seed, size)
        clear(module)
        clear(reference)
        step(x, y)
        eager_step(reference, x, y)
        assert_same(module, reference)
    assert step.programs == (1 if short_batch == "eager" else 2)


def test_no_more_programs_than_allowed_and_one_warning():
    case = BY_NAME["mlp"]
    step = compile_step(case.build(), loss_fn, max_programs=2, short_batch="compile", **CAPTURED)
    with warnings.catch_warnings(record=True) as caught:
        for size in (3, 4, 5, 6, 7, 5):
            step(*case.batch(0, size))
    assert step.programs == 2
    (warning,) = caught
    assert "max_programs" in str(warning.message)
    step.clear()
    assert step.programs == 0


def test_layouts_and_arguments_that_are_no_tensors_have_programs():
    module = BY_NAME["mlp"].build()
    step = compile_step(module, lambda y, t, options: options["weight"] * loss_fn(y, t), **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    one = step(x, y, {"weight": 1.0})
    torch.testing.assert_close(step(x, y, {"weight": 2.0}), 2 * one)
    torch.testing.assert_close(step(x, y, {"weight": torch.tensor(3.0)}), 3 * one)
    torch.testing.assert_close(step(x.t().contiguous().t(), y, {"weight": 1.0}), one)
    assert step.programs == 4


def test_further_results_of_the_loss_function_are_returned():
    module = BY_NAME["mlp"].build()
    step = compile_step(module, lambda y, t: (loss_fn(y, t), {"output": y, "name": "y"}), **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    loss, others = step(x, y)
    torch.testing.assert_close(others["output"], module(x).detach())
    torch.testing.assert_close(loss, loss_fn(module(x), y).detach())
    assert others["name"] == "y"
    assert not others["output"].requires_grad


def test_a_module_may_return_the_loss_itself_and_a_loss_have_parameters():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0).double())

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return loss_fn(self.scale * y, t)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = BY_NAME["mlp"].build(), Loss()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.loss(self.net(x), t)

    x, y = BY_NAME["mlp"].batch(0)
    together, net, loss = Both(), BY_NAME["mlp"].build(), Loss()
    compile_step(together, **CAPTURED)(x, y)
    compile_step(net, loss, **CAPTURED)(x, y)
    reference = Both()
    value = reference(x, y)
    attach(value)
    value.backward()
    assert_same(together, reference)
    assert_same(net, reference.net)
    assert_same(loss, reference.loss)


def test_a_constant_that_is_changed_in_place_is_what_it_is_now():
    weight = torch.ones(3).double()
    module = BY_NAME["mlp"].build()
    step = compile_step(module, lambda y, t: loss_fn(y, t, weight=weight), on_failure="raise", **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    for value in (1.0, 3.0):
        weight[0] = value
        torch.testing.assert_close(step(x, y), loss_fn(module(x), y, weight=weight).detach())
    assert step.programs == 1


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else 2 * y


class Masking(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[x[:, 0] > 0]).mean(0).expand(len(x), 3)


@pytest.mark.parametrize("make", [Branching, Masking])
def test_what_decides_by_entries_runs_eagerly_and_says_once_why_and_where(make):
    module, reference = make(), make()
    reference.load_state_dict(module.state_dict())
    step = compile_step(module, loss_fn, **CAPTURED)
    with warnings.catch_warnings(record=True) as caught:
        for seed in range(4):
            x, y = BY_NAME["mlp"].batch(seed)
            clear(module)
            clear(reference)
            step(x, y)
            eager_step(reference, x, y)
            assert_same(module, reference)
    (warning,) = caught
    assert re.search(r"decides by the entries of a tensor.*test_programs\.py", str(warning.message))
    assert step.programs == 0
    with pytest.raises(CaptureError, match="decides by the entries"):
        compile_step(module, loss_fn, on_failure="raise", **CAPTURED)(x, y)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


class Remembering(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.latest = self.layer(x)
        return self.latest


@pytest.mark.parametrize(("make", "name"), [(Counting, "calls"), (Remembering, "latest")])
def test_a_module_that_keeps_something_is_refused_and_left_as_it_was(make, name):
    module = make()
    step = compile_step(module, loss_fn, **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    with pytest.warns(UserWarning, match=f"changes 0.{name}"):
        step(x, y)
    step(x, y)
    step(x, y)
    assert step.programs == 0
    assert module.calls == (3 if make is Counting else 0)


def test_a_buffer_that_the_module_exchanges_is_updated():
    class Average(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()
            self.register_buffer("mean", torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y - self.mean

    module, reference = Average(), Average()
    reference.load_state_dict(module.state_dict())
    step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    for seed in range(3):
        x, y = BY_NAME["mlp"].batch(seed)
        clear(module)
        clear(reference)
        step(x, y)
        eager_step(reference, x, y)
        assert_same(module, reference)


@pytest.mark.parametrize("on_failure", ["eager", "raise"])
def test_an_operation_without_a_rule_raises_what_attach_raises(on_failure):
    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    module = BY_NAME["mlp"].build()
    step = compile_step(module, lambda y, t: loss_fn(Odd.apply(y), t), on_failure=on_failure, **CAPTURED)
    with pytest.raises(UnsupportedOperationError, match="Odd"):
        step(*BY_NAME["mlp"].batch(0))
    assert all(p.grad is None for p in module.parameters())


def test_a_step_that_raises_leaves_nothing_behind():
    module = BY_NAME["mlp"].build()
    step = compile_step(module, loss_fn, optimizer=AdaHesScale(module.parameters()), **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    before = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shape"):
            step(x[:, :4], y)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    step(x, y)
    with pytest.raises(RuntimeError, match="shape"):
        step(x[:, :4], y)
    step(x, y)
    assert step.programs == 1


def test_hooks_on_parameters_that_change_gradients_are_refused_and_others_run():
    module = BY_NAME["mlp"].build()
    step = compile_step(module, loss_fn, **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    ran = []
    module[0].weight.register_post_accumulate_grad_hook(lambda p: ran.append(p.grad is not None))
    step(x, y)
    assert ran == [True]
    handle = module[0].weight.register_hook(lambda g: None)
    with pytest.warns(UserWarning, match="register_hook"):
        step(x, y)
    handle.remove()
    step(x, y)
    assert step.programs == 1


def test_two_thousand_steps_keep_nothing():
    module = BY_NAME["mlp"].build()
    optimizer = AdaHesScale(module.parameters())
    step = compile_step(module, loss_fn, optimizer=optimizer, on_failure="raise", **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    for _ in range(5):
        step(x, y)
    before = tensors()
    gc.disable()
    try:
        for _ in range(2000):
            step(x, y)
    finally:
        gc.enable()
    assert tensors() <= before
    alive = weakref.ref(module)
    del module, optimizer, step
    gc.collect()
    assert alive() is None


def test_a_module_that_holds_its_step_is_copied_and_pickled():
    module = BY_NAME["mlp"].build()
    module.training_step = compile_step(module, loss_fn, on_failure="raise", **CAPTURED)
    x, y = BY_NAME["mlp"].batch(0)
    module.training_step(x, y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        clear(other)
        other.training_step(x, y)
        assert other.training_step.programs == 1
        assert other[0].weight.grad is not module[0].weight.grad
        torch.testing.assert_close(other[0].weight.hess_diag, module[0].weight.hess_diag)


def test_without_a_compiler_steps_run_eagerly_and_say_how_to_get_one(monkeypatch):
    monkeypatch.setattr(programs, "has_compiler", lambda: False)
    module = BY_NAME["mlp"].build()
    step = compile_step(module, loss_fn, silent=True)
    x, y = BY_NAME["mlp"].batch(0)
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler.*g\+\+"):
        step(x, y)
    assert module[0].weight.hess_diag is not None
    with pytest.raises(CaptureError, match=r"C\+\+ compiler"):
        compile_step(module, loss_fn, on_failure="raise", silent=True)(x, y)


def test_progress_is_told_on_standard_error(capsys):
    step = compile_step(BY_NAME["mlp"].build(), loss_fn, backend="eager")
    for _ in range(2):
        step(*BY_NAME["mlp"].batch(0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compile_step: capturing the step of Sequential (hesscale, batch of 8x5, 8)"
    assert lines[1].startswith("compile_step: ready after")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "method must be one of"),
        ({"backend": "jax"}, "backend must be one of 'inductor', 'eager', got 'jax'"),
        ({"on_failure": "ignore"}, "on_failure must be one of"),
        ({"short_batch": "pad"}, "short_batch must be one of"),
        ({"max_programs": 0}, "max_programs must be at least 1, got 0"),
        ({"max_grad_norm": 1.0}, "without an optimizer"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        compile_step(BY_NAME["mlp"].build(), loss_fn, **arguments)
