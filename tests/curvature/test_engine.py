"""What attach() and backward() promise, apart from any single rule."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward, exact_hess_diag, register_rule
from tests.curvature.oracle import Probe


def mlp(*sizes: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def batch(n: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, inputs).double(), torch.randint(classes, (n,))


def diagonals(model: nn.Module) -> list[Tensor | None]:
    return [None if (h := getattr(p, "hess_diag", None)) is None else h.clone() for p in model.parameters()]


# -- the recursion
# ------------------------------------------------------------------------------------------------------


def test_hesscale_of_an_mlp_equals_the_published_recursion() -> None:
    """The recursion written out by hand: h_a = W2^T h_z, h_z = s^2 h_a + s' g_a, h_W = h_z x2^T."""
    model = mlp(5, 7, 6, 3)
    x, t = batch(8, 5, 3)
    activations = [x]
    z_values = []
    out = x
    for layer in model:
        out = layer(out)
        out.retain_grad()
        activations.append(out)
        z_values.append(out)
    loss = F.cross_entropy(out, t)
    backward(loss)
    p = out.detach().softmax(-1)
    h = (p - p**2) / len(t)
    for k in range(len(model) - 1, -1, -1):
        layer, below = model[k], activations[k].detach()
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer.weight.hess_diag, h.t() @ below**2, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(layer.bias.hess_diag, h.sum(0), rtol=1e-12, atol=1e-15)
            h = h @ layer.weight.detach() ** 2
        else:
            y, g = z_values[k].detach(), z_values[k].grad
            s = 1 - y**2
            h = s**2 * h - 2 * y * s * g


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "bl89"])
def test_gradients_are_untouched(method: Any) -> None:
    model = mlp(5, 7, 3)
    x, t = batch(8, 5, 3)
    F.cross_entropy(model(x), t).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    backward(F.cross_entropy(model(x), t), method=method)
    for p, g in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, g)


def test_gauss_newton_keeps_only_the_curvature_of_the_loss() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(6, 4, 3)
    backward(F.cross_entropy(model(x), t), method="hesscale_gn")
    y = torch.tanh(model[0](x)).detach()
    p = model(x).detach().softmax(-1)
    h = ((p - p**2) / len(t)) @ model[2].weight.detach() ** 2 * (1 - y**2) ** 2
    torch.testing.assert_close(model[0].weight.hess_diag, h.t() @ x**2, rtol=1e-12, atol=1e-15)


def test_gauss_newton_counts_a_pointwise_head_to_the_loss() -> None:
    model = nn.Sequential(*mlp(4, 5, 2), nn.Tanh())
    x, t = batch(6, 4, 2)
    loss = F.mse_loss(model(x), F.one_hot(t, 2).double())
    backward(loss, [model[2].weight], method="hesscale_gn")
    loss = F.mse_loss(model(x), F.one_hot(t, 2).double())
    (exact,) = exact_hess_diag(loss, [model[2].weight])
    torch.testing.assert_close(model[2].weight.hess_diag, exact, rtol=1e-10, atol=1e-14)


def test_gauss_newton_sees_a_critic_that_is_not_optimised_as_part_of_the_loss() -> None:
    """A deterministic actor: the critic's activations keep their curvature, its weights get no diagonal."""
    actor, critic = mlp(3, 4, 2), mlp(2, 5, 1)
    x, _ = batch(6, 3, 2)
    backward(-critic(actor(x)).mean(), actor.parameters(), method="hesscale_gn")
    dropped = [p.hess_diag.clone() for p in actor.parameters()]
    assert diagonals(critic) == [None] * 4
    backward(-critic(actor(x)).mean(), list(actor.parameters())[2:], method="hesscale")
    torch.testing.assert_close(actor[2].weight.hess_diag, 2 * dropped[2])  # nothing dropped at the actor's output
    assert dropped[2].abs().max() > 0


# -- exact where it must be
# ---------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "relu6": nn.ReLU6,
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
    "prelu": nn.PReLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_chain_of_width_one_is_exact(name: str) -> None:
    """Without off-diagonal entries nothing is dropped, whatever the depth."""
    if name == "hardsigmoid":

        def act(x: Tensor) -> Tensor:  # torch does not differentiate hardsigmoid twice
            return F.relu6(x + 3) / 6

        engine_act: Callable[[Tensor], Tensor] = F.hardsigmoid
    else:
        act = engine_act = ACTIVATIONS[name]().double()
    torch.manual_seed(2)
    for _ in range(10):
        params = [torch.randn(1, 1, dtype=torch.float64, requires_grad=True) for _ in range(6)]
        x, t = torch.randn(1, 1).double(), torch.randn(1, 1).double()

        def loss_with(f: Callable[[Tensor], Tensor], params: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
            for k in range(0, 6, 2):
                x = f(x @ params[k] + params[k + 1])
            return F.mse_loss(x, t)

        exact = exact_hess_diag(loss_with(act, params, x, t), params)
        backward(loss_with(engine_act, params, x, t), params)
        for p, e in zip(params, exact, strict=True):
            torch.testing.assert_close(p.hess_diag, e, rtol=1e-9, atol=1e-12)


X, LABEL = batch(6, 4, 3)
SOFT = torch.rand(6, 3).double().softmax(-1)
REAL = torch.randn(6, 3).double()
WEIGHT = torch.tensor([0.5, 1.0, 2.0]).double()
LOSSES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "mse": lambda z, r: F.mse_loss(z, REAL, reduction=r),
    "cross_entropy": lambda z, r: F.cross_entropy(z, LABEL, reduction=r),
    "cross_entropy weighted": lambda z, r: F.cross_entropy(z, LABEL, WEIGHT, ignore_index=1, reduction=r),
    "cross_entropy smoothed": lambda z, r: F.cross_entropy(z, LABEL, label_smoothing=0.1, reduction=r),
    "cross_entropy soft": lambda z, r: F.cross_entropy(z, SOFT, WEIGHT, reduction=r),
    "bce": lambda z, r: F.binary_cross_entropy(z.sigmoid(), SOFT, reduction=r),
    "bce_with_logits": lambda z, r: F.binary_cross_entropy_with_logits(z, SOFT, pos_weight=WEIGHT, reduction=r),
    "huber": lambda z, r: F.huber_loss(z, REAL, delta=0.5, reduction=r),
    "smooth_l1": lambda z, r: F.smooth_l1_loss(z, REAL, beta=0.5, reduction=r),
    "l1": lambda z, r: F.l1_loss(z, REAL, reduction=r),
    "nll": lambda z, r: F.nll_loss(z.log_softmax(-1), LABEL, reduction=r),
    "kl_div": lambda z, r: F.kl_div(z.log_softmax(-1), SOFT, reduction=r),
    "kl_div log": lambda z, r: F.kl_div(z.log_softmax(-1), SOFT.log(), log_target=True, reduction=r),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_last_linear_layer_is_exact(name: str, reduction: str) -> None:
    layer = mlp(4, 3)

    def loss() -> Tensor:
        value = LOSSES[name](layer(X), reduction)
        return value.sum() if reduction == "none" else value

    exact = exact_hess_diag(loss(), list(layer.parameters()))
    backward(loss())
    for p, e in zip(layer.parameters(), exact, strict=True):
        torch.testing.assert_close(p.hess_diag, e, rtol=1e-9, atol=1e-12)


# -- who receives a diagonal
# --------------------------------------------------------------------------------------------


def test_diagonals_add_up_like_gradients() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    loss = F.cross_entropy(model(x), t, reduction="sum")
    backward(loss)
    whole = diagonals(model)
    for p in model.parameters():
        p.hess_diag = None
    for part in (slice(0, 3), slice(3, 8)):
        backward(F.cross_entropy(model(x[part]), t[part], reduction="sum"))
    for h, p in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(p.hess_diag, h, rtol=1e-12, atol=1e-15)


def test_a_diagonal_lives_as_long_as_its_gradient() -> None:
    """A plain loop with an optimizer that knows nothing of diagonals must not add up those of old steps."""
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(F.cross_entropy(model(x), t))
    once = diagonals(model)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        backward(F.cross_entropy(model(x), t))
    for h, p in zip(once, model.parameters(), strict=True):
        assert torch.equal(p.hess_diag, h)


def test_frozen_and_unreached_parameters_get_none() -> None:
    model = mlp(4, 5, 3)
    model[0].weight.requires_grad_(False)
    spare = nn.Parameter(torch.ones(2))
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t), [*model.parameters(), spare])
    assert getattr(model[0].weight, "hess_diag", None) is None
    assert getattr(spare, "hess_diag", None) is None
    assert model[0].bias.hess_diag.abs().max() > 0


def test_params_selects_and_costs_nothing_elsewhere() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t))
    (_, _, expected, _) = diagonals(model)
    for p in model.parameters():
        p.hess_diag = None
    backward(F.cross_entropy(model(x), t), [model[2].weight])
    assert torch.equal(model[2].weight.hess_diag, expected)
    assert [h is None for h in diagonals(model)] == [True, True, False, True]


def test_backward_inputs_is_respected() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t))
    expected = diagonals(model)
    for p in model.parameters():
        p.hess_diag = p.grad = None
    backward(F.cross_entropy(model(x), t), inputs=[model[0].weight, model[2].bias])
    assert [h is None for h in diagonals(model)] == [False, True, True, False]
    assert torch.equal(model[0].weight.hess_diag, expected[0])
    assert torch.equal(model[2].bias.hess_diag, expected[3])


def test_a_leaf_without_curvature_gets_zeros() -> None:
    w = torch.ones(3, requires_grad=True)
    backward((2 * w).sum())
    assert torch.equal(w.hess_diag, torch.zeros(3))


def test_a_tensor_inside_the_graph_can_be_wanted() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    hidden = model[1](model[0](x))
    out = model[2](hidden)
    backward(F.cross_entropy(out, t), [out, hidden, model[0].bias])
    p = out.detach().softmax(-1)
    torch.testing.assert_close(out.hess_diag, (p - p**2) / 8, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(hidden.hess_diag, out.hess_diag @ model[2].weight.detach() ** 2, rtol=1e-12, atol=1e-15)
    assert model[0].bias.hess_diag is not None
    assert getattr(model[2].weight, "hess_diag", None) is None


def test_a_transposed_tensor_inside_the_graph_can_be_wanted() -> None:
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    turned = w.t()
    backward((turned @ torch.randn(3, 2).double()).exp().sum(), [turned, w])
    assert torch.equal(turned.hess_diag, w.hess_diag.t())


def test_tied_weights_sum_their_uses() -> None:
    """Exact here: both uses meet in a sum, so nothing lies between them."""
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double()

    def loss() -> Tensor:
        return F.linear(x, w).exp().sum() + (y @ w).square().sum()

    exact = exact_hess_diag(loss(), [w])[0]
    backward(loss())
    torch.testing.assert_close(w.hess_diag, exact, rtol=1e-10, atol=1e-12)


def test_diagonals_of_two_leaves_share_no_memory() -> None:
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    backward((a + b).square().sum())
    a.hess_diag.zero_()
    assert torch.equal(b.hess_diag, torch.full((3,), 2.0))


def test_diagonal_is_laid_out_like_its_parameter() -> None:
    conv = nn.Linear(4, 3)
    conv.weight = nn.Parameter(torch.randn(4, 3).t())
    backward(conv(torch.randn(2, 4)).exp().sum())
    assert conv.weight.hess_diag.stride() == conv.weight.stride()
    w = torch.randn(3, requires_grad=True)
    backward(w.sum().exp())
    assert w.hess_diag.stride() == (1,)


def test_half_precision_parameters_get_float32_diagonals() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t))
    expected = diagonals(model)
    half = mlp(4, 5, 3).bfloat16()
    backward(F.cross_entropy(half(x.bfloat16()).float(), t))
    for p, h in zip(half.parameters(), expected, strict=True):
        assert p.hess_diag.dtype is torch.float32
        torch.testing.assert_close(p.hess_diag, h.float(), rtol=0.1, atol=1e-3)


def test_curvature_of_a_float64_loss_on_a_float32_network() -> None:
    model = mlp(4, 5, 3).float()
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x.float()).double(), t))
    assert {p.hess_diag.dtype for p in model.parameters()} == {torch.float32}


# -- errors
# -------------------------------------------------------------------------------------------------------------


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_unsupported_operation_is_refused_before_any_gradient_is_written() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    loss = F.cross_entropy(Unknown.apply(model(x)), t)
    with pytest.raises(UnsupportedOperationError) as info:
        backward(loss)
    message = str(info.value)
    assert "UnknownBackward" in message
    assert "NllLossBackward0 -> LogSoftmaxBackward0 -> UnknownBackward" in message
    assert '@hesscale_lightning.register_rule("UnknownBackward")' in message
    assert all(p.grad is None for p in model.parameters())
    loss.backward()  # and the graph is as it was
    assert diagonals(model) == [None] * 4


def test_unsupported_operation_outside_the_way_does_not_matter() -> None:
    model = mlp(4, 3)
    x, t = batch(8, 4, 3)
    other = torch.randn(3, dtype=torch.float64, requires_grad=True)
    backward(F.cross_entropy(model(x) + Unknown.apply(other), t), model.parameters())
    assert model[0].weight.hess_diag is not None


def loss_without_grad() -> Tensor:
    with torch.no_grad():
        return mlp(4, 3)(X).sum()


def freed_loss() -> Tensor:
    loss = F.cross_entropy(mlp(4, 5, 3)(X), LABEL)
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (loss_without_grad, ValueError, "does not require grad"),
        (lambda: mlp(4, 3)(X), ValueError, r"one element, got shape \(6, 3\)"),
        (freed_loss, RuntimeError, "freed by an earlier backward"),
        (lambda: torch.ones((), requires_grad=True), ValueError, "leaf"),
        (lambda: 1.0, TypeError, "must be a torch.Tensor, got float"),
        (lambda: (torch.ones(2, dtype=torch.complex64, requires_grad=True) * 1j).sum(), TypeError, "real"),
    ],
)
def test_a_loss_that_cannot_be_attached_says_why(make: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        attach(make())


@pytest.mark.parametrize(
    ("params", "text"),
    [(torch.ones(2, requires_grad=True), "single tensor"), ([1.0], "float"), (mlp(2, 2).named_parameters(), "tuple")],
)
def test_wrong_params_say_what_was_found(params: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        attach(mlp(4, 3)(X).sum(), params)


def test_wrong_method_lists_the_right_ones() -> None:
    with pytest.raises(ValueError, match="hesscale, hesscale_gn, bl89, hesscale_rank1, got 'newton'"):
        attach(mlp(4, 3)(X).sum(), method="newton")  # type: ignore[arg-type]


def test_attaching_twice_is_refused_and_removing_allows_it() -> None:
    model = mlp(4, 3)
    loss = F.cross_entropy(model(X), LABEL)
    first = attach(loss)
    with pytest.raises(RuntimeError, match="attached already"):
        attach(loss)
    first.remove()
    assert not first.active
    attach(loss)
    loss.backward()
    assert model[0].weight.hess_diag is not None


def test_rule_that_returns_a_wrong_shape_is_named() -> None:
    register_rule("UnknownBackward")(lambda op, h: h.sum(0))
    try:
        w = torch.randn(3, 2, requires_grad=True)
        with pytest.raises(RuntimeError, match="wrong shape"):
            backward(Unknown.apply(w).exp().sum())
        assert getattr(w, "hess_diag", None) is None
        register_rule("UnknownBackward")(lambda op, h: ())
        with pytest.raises(RuntimeError, match="UnknownBackward returned 0 curvatures for 1 inputs"):
            backward(Unknown.apply(w).exp().sum())
    finally:
        from hesscale_lightning.curvature import registry

        registry._rules.pop("UnknownBackward")
        registry._rule_of_type.clear()
        for listener in registry._listeners:
            listener()


# -- when backward does not go as planned
# -------------------------------------------------------------------------------


def failing(loss_of: Callable[[Tensor], Tensor], model: nn.Sequential, x: Tensor) -> Tensor:
    hidden = model[0](x)
    hidden.register_hook(lambda g: (_ for _ in ()).throw(KeyError("boom")))
    return loss_of(model[2](model[1](hidden)))


def test_a_failing_backward_writes_no_diagonal_and_the_next_one_works() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    loss = failing(lambda z: F.cross_entropy(z, t), model, x)
    attach(loss)
    with pytest.raises(KeyError, match="boom"):
        loss.backward()
    assert diagonals(model) == [None] * 4
    backward(F.cross_entropy(model(x), t))
    assert all(h is not None for h in diagonals(model))


def test_a_graph_whose_backward_failed_can_be_attached_again() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    hidden = model[0](x)
    handle = hidden.register_hook(lambda g: (_ for _ in ()).throw(KeyError("boom")))
    loss = F.cross_entropy(model[2](model[1](hidden)), t)
    attach(loss)
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)
    handle.remove()
    with pytest.raises(RuntimeError, match="did not finish"):
        loss.backward(retain_graph=True)
    backward(loss)
    backward(F.cross_entropy(model(x), t), [model[0].weight])
    torch.testing.assert_close(model[0].weight.hess_diag / 2, diagonals(model)[0] / 2)


def test_retained_graph_delivers_once_for_each_attach() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    loss = F.cross_entropy(model(x), t)
    backward(loss, retain_graph=True)
    once = diagonals(model)
    loss.backward(retain_graph=True)
    for h, p in zip(once, model.parameters(), strict=True):
        assert torch.equal(p.hess_diag, h)
    backward(loss)
    for h, p in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(p.hess_diag, 2 * h)


def test_create_graph_does_not_reach_the_diagonals() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t), create_graph=True)
    assert all(not p.hess_diag.requires_grad for p in model.parameters())
    assert all(p.grad.requires_grad for p in model.parameters())


def test_autograd_grad_leaves_the_attachment_armed() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    loss = F.cross_entropy(model(x), t)
    attach(loss)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert diagonals(model) == [None] * 4
    loss.backward()
    got = diagonals(model)
    for p in model.parameters():
        p.hess_diag = None
    backward(F.cross_entropy(model(x), t))
    for h, p in zip(got, model.parameters(), strict=True):
        assert torch.equal(p.hess_diag, h)


def test_curvature_is_linear_in_the_scale_of_a_loss_made_from_the_attached_one() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)
    backward(F.cross_entropy(model(x), t))
    plain = diagonals(model)
    for p in model.parameters():
        p.hess_diag = None
    loss = F.cross_entropy(model(x), t)
    attach(loss)
    (1024 * loss).backward()
    for h, p in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(p.hess_diag, 1024 * h)


def test_a_lost_attachment_is_an_error_and_not_a_missing_diagonal() -> None:
    model = mlp(4, 5, 3)
    x, t = batch(8, 4, 3)

    def make() -> Tensor:
        loss = F.cross_entropy(model(x), t)
        attach(loss)
        return 2 * loss

    with pytest.raises(RuntimeError, match="no longer exists"):
        make().backward()
    assert all(p.grad is None for p in model.parameters())


def test_two_attached_losses_in_one_backward_pass_are_refused() -> None:
    """Each would take the sum of both gradients for its own."""
    for backward_of in (lambda a, b: torch.autograd.backward([a, b]), lambda a, b: (a + b).backward()):
        w = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        z = w.sin()
        a, b = (z**3).sum(), z.exp().sum()
        attach(a)
        attach(b)
        with pytest.raises(RuntimeError, match="attach their sum"):
            backward_of(a, b)
        assert getattr(w, "hess_diag", None) is None
        w.grad = None
        backward(w.sin().exp().sum())
        (exact,) = exact_hess_diag(w.sin().exp().sum(), [w])
        torch.testing.assert_close(w.hess_diag, exact)


def test_two_losses_of_one_graph_add_up_in_passes_of_their_own() -> None:
    w = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    z = w.sin()
    a, b = (z**3).sum(), z.exp().sum()
    (exact,) = exact_hess_diag(a + b, [w])
    backward(a, retain_graph=True)
    backward(b)
    torch.testing.assert_close(w.hess_diag, exact)


def test_backward_hooks_of_modules_do_not_stand_in_the_way() -> None:
    x, t = batch(8, 4, 3)
    plain, hooked = mlp(4, 5, 3), mlp(4, 5, 3)
    seen: list[Any] = []
    for layer in hooked:
        layer.register_full_backward_hook(lambda *args: seen.append(args))
    backward(F.cross_entropy(plain(x), t))
    backward(F.cross_entropy(hooked(x.requires_grad_()), t))
    assert len(seen) == 3
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.hess_diag, q.hess_diag)


def test_double_backward_in_the_loss_is_refused_with_its_reason() -> None:
    model = mlp(4, 5, 3)
    x, _ = batch(8, 4, 3)
    (g,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedOperationError, match="gradient penalty"):
        attach(g.square().sum())


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_the_dense_reference_takes_parameters_of_any_layout(layout: str) -> None:
    w = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    w = (w.to(memory_format=torch.channels_last) if layout == "channels_last" else w.transpose(0, 1)).requires_grad_()
    (exact,) = exact_hess_diag(w.exp().sum(), [w])
    assert torch.equal(exact, w.detach().exp())
    backward(w.exp().sum())
    torch.testing.assert_close(w.hess_diag, exact)


def test_stop_iteration_in_a_rule_becomes_a_runtime_error() -> None:
    """Lightning takes a StopIteration for the end of the data."""

    def raising(op: Any, h: Any) -> Any:
        raise StopIteration

    register_rule("UnknownBackward")(raising)
    try:
        w = torch.randn(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="StopIteration"):
            backward(Unknown.apply(w).exp().sum())
    finally:
        from hesscale_lightning.curvature import registry

        registry._rules.pop("UnknownBackward")
        registry._rule_of_type.clear()
        for listener in registry._listeners:
            listener()


def test_threads_of_several_networks_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, t = batch(8, 4, 3)

    def run(_: int) -> list[Tensor]:
        model = mlp(4, 5, 3)
        for _ in range(20):
            for p in model.parameters():
                p.hess_diag = None
            backward(F.cross_entropy(model(x), t), model.parameters())
        return [p.hess_diag for p in model.parameters()]

    torch.manual_seed(0)
    models = [mlp(4, 5, 3) for _ in range(4)]
    expected = run(0)
    del models
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: [h.shape for h in run(0)], range(4)))
    assert results == [[h.shape for h in expected]] * 4


# -- nothing stays behind
# -----------------------------------------------------------------------------------------------


def alive() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if isinstance(o, Tensor) or "Backward" in type(o).__name__)


@pytest.mark.parametrize("ending", ["backward", "failure", "never", "create_graph"])
def test_nothing_stays_alive(ending: str) -> None:
    """2,000 steps leave no more tensors and nodes than 20, however they end."""
    model = mlp(3, 4, 2)
    x, t = batch(4, 3, 2)

    def step() -> None:
        for p in model.parameters():
            p.grad = p.hess_diag = None
        if ending == "failure":
            loss = failing(lambda z: F.cross_entropy(z, t).exp(), model, x)
        else:
            loss = F.cross_entropy(model(x), t).exp()  # a root that saves its own output
        attach(loss)
        if ending == "never":
            return
        try:
            loss.backward(create_graph=ending == "create_graph")
        except KeyError:
            assert ending == "failure"
        for p in model.parameters():
            p.grad = None

    watched: list[Any] = []
    for _ in range(20):
        step()
    early = alive()
    for k in range(1980):
        step()
        if k == 990:
            watched.append(alive())
    assert alive() <= early
    assert watched[0] <= early


def test_c_level_memory_does_not_grow() -> None:
    """Cycles through C++ are invisible to the collector, so the memory itself is watched."""
    import resource

    model = mlp(64, 64, 2).float()
    x, t = torch.randn(512, 64), torch.randint(2, (512,))

    def step(run: bool) -> None:
        loss = F.cross_entropy(model(x), t).exp()
        attach(loss)
        if run:
            loss.backward()

    for k in range(100):
        step(k % 2 == 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(600):  # a leak of one step's activations would be 600 * 0.5 MB
        step(k % 2 == 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_importing_the_engine_imports_no_framework() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hesscale_lightning.curvature; "
        "print([m for m in ('lightning', 'torchmetrics') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- users' own operations -------------------------------------------------------------------------------------------


def test_probe_is_a_rule_of_the_users_kind() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    g, h = torch.randn(3).double(), torch.randn(3).double()
    backward(Probe.apply(1, x.exp(), g, h))
    y = x.detach().exp()
    torch.testing.assert_close(x.hess_diag, y**2 * h + y * g)
    torch.testing.assert_close(x.grad, y * g)
