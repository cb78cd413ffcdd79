"""``method="hesscale_rank1"``: exact where it promises to be, and closer than HesScale elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.utils.checkpoint import checkpoint

from hesscale_lightning import DigitsDataModule
from hesscale_lightning.curvature import backward, coverage, exact_hess_diag
from hesscale_lightning.curvature.rank_one import per_sample
from tests.curvature.models import MODELS, Model

Act = Callable[[], nn.Module]


def mlp(*sizes: int, act: Act = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def diagonals(loss: Tensor, model: nn.Module, method: Any = "hesscale_rank1") -> list[Tensor]:
    params = list(model.parameters())
    for p in params:
        p.grad = p.hess_diag = None
    backward(loss, params, method=method)
    return [p.hess_diag for p in params]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """L1 distance over the exact diagonal's L1 norm."""
    distance = sum(float((a - b).abs().sum()) for a, b in zip(found, exact, strict=True))
    return distance / sum(float(b.abs().sum()) for b in exact)


def errors(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Of HesScale and of the refined estimate."""
    exact = exact_hess_diag(loss(), model.parameters())
    return error(diagonals(loss(), model, "hesscale"), exact), error(diagonals(loss(), model), exact)


X, T = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 2
Y = torch.linspace(-1, 1, 7, dtype=torch.float64)

SCALAR_HEADS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "mse": (1, lambda y: F.mse_loss(y[:, 0], Y)),
    "mse of a column": (1, lambda y: F.mse_loss(y, Y[:, None], reduction="sum")),
    "mse by hand": (1, lambda y: ((y.squeeze(-1) - Y) ** 2).mean() / 2),
    "two classes": (2, lambda y: F.cross_entropy(y, T)),
    "two soft classes": (2, lambda y: F.cross_entropy(y, torch.stack([Y / 2 + 0.5, 0.5 - Y / 2], 1))),
    "weighted classes": (2, lambda y: F.cross_entropy(y, T, torch.tensor([0.3, 2.0]).double())),
    "smoothed labels": (2, lambda y: F.cross_entropy(y, T, label_smoothing=0.1)),
    "ignored labels": (2, lambda y: F.cross_entropy(y, T.where(T + Y > -0.5, -100))),
    "binary cross-entropy": (1, lambda y: F.binary_cross_entropy_with_logits(y[:, 0], T.double())),
    "huber": (1, lambda y: F.huber_loss(y[:, 0], Y, delta=0.5)),
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("head", SCALAR_HEADS)
def test_piecewise_linear_network_with_one_output_or_two_classes_is_exact(head: str, depth: int) -> None:
    torch.manual_seed(depth)
    outputs, of_output = SCALAR_HEADS[head]
    model = mlp(5, *[6] * depth, outputs, act=nn.ReLU)
    plain, refined = errors(model, lambda: of_output(model(X)))
    assert refined <= 1e-12
    assert depth == 1 or plain > 1e-3


def convolutional(outputs: int) -> nn.Sequential:
    body = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, stride=2, bias=False)]
    return nn.Sequential(*body, nn.LeakyReLU(), nn.Flatten(), nn.Linear(16, outputs)).double()


class Pooled(nn.Module):
    """The same layers at every time step, then their mean; time may come first."""

    def __init__(self, time_first: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.time_first = time_first

    def forward(self, x: Tensor) -> Tensor:
        if self.time_first:
            x = x.transpose(0, 1).contiguous()
        return self.head(self.second(self.first(x).relu()).relu().mean(0 if self.time_first else 1))


class OverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(5, 4, 3, dilation=2), nn.ReLU(), nn.Conv1d(4, 4, 2, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x.transpose(1, 2)).amax(-1))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: convolutional(2), (7, 1, 8, 8)),
        (Pooled, (7, 6, 5)),
        (lambda: Pooled(time_first=True), (7, 6, 5)),
        (OverTime, (7, 6, 5)),
    ],
    ids=["images", "sequences", "sequences, time first", "convolution over time"],
)
def test_weight_that_a_sample_uses_several_times_is_exact_by_gradients_of_single_samples(
    model: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module, x = model().double(), torch.randn(shape, dtype=torch.float64)
    report = coverage(F.cross_entropy(module(x), T), method="hesscale_rank1")
    assert [entry.status for entry in report.refinement or ()] == ["begins"], report
    plain, refined = errors(module, lambda: F.cross_entropy(module(x), T))
    assert refined <= 1e-12
    assert plain > 1e-3


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((5, 3, 9, 8), (4, 3, 3, 2), ((2, 1), (1, 0), (1, 2))),
        ((5, 3, 7, 7), (2, 3, 1, 1), ((2, 2), (0, 0), (1, 1))),
        ((5, 3, 9), (4, 3, 3), ((2,), (1,), (2,))),
    ],
    ids=["two dimensions", "one by one", "one dimension"],
)
def test_kernel_gets_the_squares_of_the_gradients_of_single_samples(
    shape: tuple[int, ...], kernel: tuple[int, ...], settings: tuple[tuple[int, ...], ...], monkeypatch: Any
) -> None:
    """In each of the two ways to compute them, and of the first not all samples at once."""
    torch.manual_seed(0)
    x, w, c = (torch.randn(size, dtype=torch.float64) for size in (shape, kernel, (5, 1)))
    w.requires_grad_()
    y = (F.conv1d if len(kernel) == 3 else F.conv2d)(x, w, None, *settings)
    g = torch.randn_like(y)
    single = [torch.autograd.grad((y[b] * g[b]).sum(), w, retain_graph=True)[0] for b in range(5)]
    exact = sum(c[b] * single[b].square() for b in range(5))
    monkeypatch.setattr(per_sample, "_MOST_AT_ONCE", 2 * w.numel())
    torch.testing.assert_close(per_sample.of_kernel(c, g, x, kernel, *settings), exact)
    by_patches = per_sample._by_patches(g, x, kernel[2:], *settings)
    torch.testing.assert_close(by_patches.view(5, *kernel), torch.stack(single))


def test_last_three_linear_layers_of_a_curved_network_are_exact() -> None:
    """With one output or two classes nothing remains above the first activation that has curvature of its own."""
    torch.manual_seed(0)
    model = mlp(5, 6, 6, 1)
    assert errors(model, lambda: F.mse_loss(model(X)[:, 0], Y))[1] <= 1e-12


ACTION, OLD, GAIN = torch.arange(7) % 4, torch.linspace(-1.5, -1, 7).double(), torch.linspace(-1, 2, 7).double()


def surrogate(log_prob: Tensor, old: Tensor = OLD) -> Tensor:
    ratio = (log_prob - old).exp()
    return -torch.min(GAIN * ratio, GAIN * ratio.clamp(0.8, 1.2)).mean()


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = mlp(5, 6, 6, 4), nn.Parameter(torch.zeros(4).double())

    def log_prob(self) -> Tensor:
        mean = self.mean(X)
        return Normal(mean, torch.ones_like(mean) * self.log_std.exp()).log_prob(torch.ones_like(mean) / 2).sum(-1)


def test_policy_gradients_are_closer_than_by_hesscale() -> None:
    torch.manual_seed(0)
    actor = mlp(5, 6, 6, 4)
    for loss in (
        lambda: surrogate(Categorical(logits=actor(X)).log_prob(ACTION)),
        lambda: surrogate(actor(X).log_softmax(-1).gather(1, ACTION[:, None])[:, 0]),
        lambda: -(GAIN * Categorical(logits=actor(X)).log_prob(ACTION)).mean(),
    ):
        plain, refined = errors(actor, loss)
        assert refined < 0.7 * plain
    policy = Gaussian()
    old = policy.log_prob().detach() + OLD / 10
    plain, refined = errors(policy, lambda: surrogate(policy.log_prob(), old))
    assert refined < 0.7 * plain


@pytest.mark.parametrize("head", ["soft targets", "label smoothing", "class weights", "sum of two batches"])
def test_other_heads_of_several_classes_are_closer_than_by_hesscale(head: str) -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 6, 4)
    soft, weight = torch.randn(7, 4).double().softmax(-1), torch.tensor([1.0, 0.5, 2.0, 1.5]).double()
    losses: dict[str, Callable[[], Tensor]] = {
        "soft targets": lambda: F.cross_entropy(model(X), soft),
        "label smoothing": lambda: F.cross_entropy(model(X), ACTION, label_smoothing=0.1),
        "class weights": lambda: F.cross_entropy(model(X), ACTION, weight),
        "sum of two batches": lambda: F.cross_entropy(model(X), ACTION) + F.cross_entropy(model(2 * X), ACTION),
    }
    plain, refined = errors(model, losses[head])
    assert refined < 0.8 * plain


def digits() -> tuple[Tensor, Tensor]:
    """Images of 4 x 4."""
    data = DigitsDataModule(batch_size=512)
    data.prepare_data()
    data.setup("fit")
    x, y = next(iter(data.train_dataloader()))
    return x.double().view(-1, 8, 8)[:, ::2, ::2].reshape(len(x), 16), y


@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU], ids=["tanh", "relu"])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_digits_are_never_further_off_than_by_hesscale(depth: int, act: Act) -> None:
    """Before and after training, for one sample and for 32; after training less than 0.55 of HesScale's error."""
    x, y = digits()
    torch.manual_seed(depth)
    model = mlp(16, *[12] * depth, 10, act=act)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for steps in (0, 200):
        for _ in range(steps):
            optimizer.zero_grad()
            batch = torch.randint(len(x), (64,))
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        for size in (1, 32):
            plain, refined = errors(model, lambda size=size: F.cross_entropy(model(x[:size]), y[:size]))  # type: ignore[misc]
            assert refined <= plain
            assert steps == 0 or size == 1 or refined <= 0.55 * plain


# -- robustness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_float32_agrees_with_float64_also_where_the_softmax_saturates(scale: float) -> None:
    torch.manual_seed(0)
    double = mlp(5, 6, 6, 4)
    with torch.no_grad():
        double[-1].weight.mul_(scale)
    single = mlp(5, 6, 6, 4).float()
    single.load_state_dict({name: p.float() for name, p in double.state_dict().items()})
    soft = torch.eye(4)[ACTION] * 0.9 + 0.025
    for target in (ACTION, soft):
        wide = target.double() if target.is_floating_point() else target
        expected = diagonals(F.cross_entropy(double(X), wide), double)
        for found, exact in zip(diagonals(F.cross_entropy(single(X.float()), target), single), expected, strict=True):
            assert found.isfinite().all()
            limit = 1e-3 * float(exact.abs().max()) + 1e-7 * scale**2
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=limit)


@pytest.mark.parametrize("offset", [0.0, 1e-12, 1e-4])
def test_residual_of_zero_or_nearly_leaves_the_curvature_finite_and_right(offset: float) -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 1, act=nn.ReLU).float()
    x = X.float()
    target = model(x)[:, 0].detach() + offset
    exact = exact_hess_diag(F.mse_loss(model(x)[:, 0], target), model.parameters())
    for found, true in zip(diagonals(F.mse_loss(model(x)[:, 0], target), model), exact, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-5)


def named(model: Model, training: bool, dtype: torch.dtype, method: Any) -> dict[str, Tensor]:
    module, loss_of = model.build(dtype)
    module.train(training)
    backward(loss_of(module), method=method)
    return {name: p.hess_diag for name, p in module.named_parameters()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_runs_and_where_nothing_is_refined_equals_hesscale(model: Model, training: bool) -> None:
    found = {dtype: named(model, training, dtype, "hesscale_rank1") for dtype in (torch.float32, torch.float64)}
    module, loss_of = model.build(torch.float64)
    module.train(training)
    report = coverage(loss_of(module), method="hesscale_rank1")
    assert report.refinement is not None
    refined = any(entry.status == "begins" for entry in report.refinement)
    plain = named(model, training, torch.float64, "hesscale")
    for name, double in found[torch.float64].items():
        single = found[torch.float32][name]
        assert double.isfinite().all()
        scale = float(double.abs().max())
        torch.testing.assert_close(single.double(), double, rtol=1e-2, atol=1e-4 * scale, msg=name)
        if not refined:
            torch.testing.assert_close(double, plain[name], rtol=1e-12, atol=0)


def test_samples_that_mix_end_it_and_the_report_says_where() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    model = model.double()

    def loss() -> Tensor:
        return F.cross_entropy(model(X), ACTION)

    report = coverage(loss(), method="hesscale_rank1")
    assert ("NativeBatchNormBackward0", "ends") in [(e.operation, e.status) for e in report.refinement or ()]
    assert "samples may mix here" in str(report)
    assert coverage(loss()).refinement is None
    plain, refined = errors(model, loss)
    assert refined < plain
    model.eval()
    report = coverage(loss(), method="hesscale_rank1")
    assert [e.status for e in report.refinement or ()] == ["begins"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: F.gaussian_nll_loss(y[:, 0], Y, y[:, 1].exp()),
        lambda y: Normal(y[:, :2], y[:, 2:].exp()).log_prob(X[:, :2]).sum(-1).mean(),
        lambda y: F.cross_entropy(y, ACTION) + y.square().mean(),
        lambda y: F.ctc_loss(y.log_softmax(-1)[:, None], T[:3] + 1, (7,), (3,)),
    ],
    ids=["gaussian likelihood", "gaussian of two chunks", "two losses", "alignments"],
)
def test_output_whose_hessian_is_not_known_is_left_to_hesscale(loss: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 6, 4)
    for refined, plain in zip(
        diagonals(loss(model(X)), model), diagonals(loss(model(X)), model, "hesscale"), strict=True
    ):
        torch.testing.assert_close(refined, plain, rtol=1e-10, atol=1e-14)


def test_loss_that_mixes_all_samples_in_one_number_makes_them_one_sample() -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 6, 4)
    plain, refined = errors(model, lambda: F.mse_loss(model(X), X[:, :4]).sqrt())
    assert refined < plain


def test_heads_that_share_a_network_end_it_where_they_meet() -> None:
    torch.manual_seed(0)
    body, actor, critic = mlp(5, 6, 6), mlp(6, 4), mlp(6, 1)
    module = nn.ModuleList([body, actor, critic])

    def loss() -> Tensor:
        hidden = body(X).tanh()
        return F.cross_entropy(actor(hidden), ACTION) + F.mse_loss(critic(hidden)[:, 0], Y)

    report = coverage(loss(), method="hesscale_rank1")
    assert {e.reason for e in report.refinement or () if e.status == "ends"} == {
        "its input is used elsewhere too, and not with the same rank-one part"
    }
    for refined, plain in zip(diagonals(loss(), module), diagonals(loss(), module, "hesscale"), strict=True):
        torch.testing.assert_close(refined, plain, rtol=1e-10, atol=1e-14)


def test_plan_serves_batches_of_any_size() -> None:
    """The rows of a sequence's samples are as many as those of a larger batch of shorter ones."""
    torch.manual_seed(0)
    model = Pooled().double()
    for shape in ((7, 6, 5), (7, 3, 5), (3, 7, 5), (7, 6, 5), (1, 4, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        y = torch.arange(shape[0]) % 2
        assert errors(model, lambda x=x, y=y: F.cross_entropy(model(x), y))[1] <= 1e-12  # type: ignore[misc]


def test_wanted_tensor_inside_ends_it() -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 2, act=nn.ReLU)
    found = {}
    for method in ("hesscale", "hesscale_rank1"):
        hidden = model[:2](X)
        loss = F.cross_entropy(model[2](hidden), T)
        backward(loss, [hidden], method=method)
        found[method] = hidden.hess_diag
    torch.testing.assert_close(found["hesscale_rank1"], found["hesscale"], rtol=0, atol=0)
    loss = F.cross_entropy(model[2](hidden := model[:2](X)), T)
    report = coverage(loss, [hidden, *model.parameters()], method="hesscale_rank1")
    assert all(entry.status != "begins" for entry in report.refinement or ())


def test_passes_add_up_and_checkpoints_change_nothing() -> None:
    torch.manual_seed(0)
    model = mlp(5, 6, 6, 4)
    once = diagonals(F.cross_entropy(model(X), ACTION), model)
    checkpointed = model[4](checkpoint(model[:4], X, use_reentrant=False))
    again = diagonals(F.cross_entropy(checkpointed, ACTION), model)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b)
    backward(F.cross_entropy(model(X), ACTION), method="hesscale_rank1")
    for p, b in zip(model.parameters(), again, strict=True):
        torch.testing.assert_close(p.hess_diag, 2 * b)


def test_half_precision_activations_under_autocast() -> None:
    torch.manual_seed(0)
    model = mlp(5, 16, 16, 4).float()
    exact = diagonals(F.cross_entropy(model(X.float()), ACTION), model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X.float()), ACTION)
    for found, expected in zip(diagonals(loss, model), exact, strict=True):
        assert found.dtype == torch.float32
        assert float((found - expected).abs().sum()) <= 0.1 * float(expected.abs().sum())


def test_a_single_sample_and_a_weight_made_of_other_tensors() -> None:
    """With one sample every tensor is that sample's; a weight's own history still takes the whole curvature."""
    torch.manual_seed(0)
    w = torch.randn(1, 3, dtype=torch.float64).requires_grad_()
    x, t = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 1, dtype=torch.float64)
    (exact,) = exact_hess_diag(F.mse_loss(x @ w.T, t), [w])
    backward(F.mse_loss(x @ w.T, t), method="hesscale_rank1")
    torch.testing.assert_close(w.hess_diag, exact)


def test_confidently_wrong_samples_keep_the_sign_in_float32() -> None:
    """p_y is nearly zero there, and so is c: as a difference of numbers near one it would be rounding alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(8, 4)
    with torch.no_grad():
        model[2].weight *= 150
        wrong = model(x).argmin(1)
    backward(F.cross_entropy(model(x), wrong), method="hesscale_rank1")
    h = model[0].weight.hess_diag
    assert h.min() >= 0
    assert h.max() < 1e-5
