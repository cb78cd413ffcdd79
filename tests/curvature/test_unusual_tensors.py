"""NaN and infinity, no entries, no dimensions, and every layout in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Probe
from tests.curvature.random_graphs import UNARY
from tests.curvature.slow import Recording
from tests.curvature.test_random_graphs import agree, diagonals

F64 = torch.float64

# -- not finite --------------------------------------------------------------------------------------------------------

Pointwise = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Pointwise] = {
    **{name: function for name, function, _ in UNARY},
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "relu6": F.relu6,
    "celu": F.celu,
    "selu": F.selu,
    "logit": torch.logit,
    "clamp from below": lambda x: x.clamp(min=0.1),
    "x + relu(x)": lambda x: x + x.relu(),
    "x + hardtanh(x)": lambda x: x + F.hardtanh(x),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum of two": lambda x: torch.minimum(x, 2 * x),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_and_infinity_pass_elementwise_operations_as_autograd_lets_them(name: str) -> None:
    """``f'^2 h + f'' g`` with torch's own derivatives at 0.3, NaN and infinities; NaN may stand for any of these."""
    f = FUNCTIONS[name]
    x = torch.tensor([0.3, math.nan, math.inf, -math.inf], dtype=F64, requires_grad=True)
    g, h = torch.full((4,), 0.7, dtype=F64), torch.full((4,), 1.3, dtype=F64)
    y = f(x)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    second = torch.autograd.grad(first.sum(), x, allow_unused=True)[0] if first.requires_grad else None
    expected = (first * first * h + (torch.zeros_like(x) if second is None else second) * g).detach()
    backward(Probe.apply(1, f(x), g, h))
    got = x.hess_diag
    torch.testing.assert_close(torch.where(got.isnan(), expected, got), expected, equal_nan=True, rtol=1e-9, atol=1e-12)
    assert not got[0].isnan()


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Linear(3, 4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU()]
    return nn.Sequential(*body, nn.Linear(4, 3)).double()


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "bl89"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["input", "first weight", "last bias"])
def test_what_makes_gradients_not_finite_makes_diagonals_not_finite(where: str, bad: float, method: str) -> None:
    model = classifier()
    x = torch.randn(5, 3, dtype=F64)
    with torch.no_grad():
        spoiled = {"input": x, "first weight": model[0].weight, "last bias": model[5].bias}[where]
        spoiled.view(-1)[1] = bad
    loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
    backward(loss, model.parameters(), method=method)
    assert any(not p.grad.isfinite().all() for p in model.parameters())
    for name, p in model.named_parameters():
        if p.grad.isnan().any():
            assert not p.hess_diag.isfinite().all(), f"{name} hides it"


# -- no entries, no dimensions, any layout -----------------------------------------------------------------------------

Make = Callable[..., Tensor]


def compare(function: Make, leaves: Sequence[Tensor], method: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with Recording() as recording:
        loss = function(*leaves)
    expected = recording.curvature(loss, leaves, method)
    for k, (got, e) in enumerate(zip(diagonals(loss, list(leaves), method), expected, strict=True)):
        assert e is not None
        agree(got, e, f"leaf {k}")


def filled(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64)


EMPTY: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "linear": (lambda x, w, b: F.linear(x, w, b).tanh().square().sum(), [(0, 3), (2, 3), (2,)]),
    "no inputs": (lambda x, w, b: F.linear(x, w, b).tanh().square().sum(), [(2, 0), (3, 0), (3,)]),
    "linear on sequences": (lambda x, w: F.linear(x, w).exp().sum(), [(0, 2, 3), (2, 3)]),
    "bmm": (lambda x, y: torch.bmm(x, y).exp().sum(), [(0, 2, 3), (0, 3, 2)]),
    "conv": (lambda x, w, b: F.conv1d(x, w, b).exp().sum(), [(0, 2, 4), (3, 2, 2), (3,)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b).square().sum(), [(0, 3), (3,), (3,)]),
    "log_softmax": (lambda x: x.log_softmax(-1).exp().sum(), [(0, 3)]),
    "softmax": (lambda x: x.softmax(0).square().sum(), [(0, 3)]),
    "logsumexp": (lambda x: x.logsumexp(1).square().sum(), [(0, 3)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.zeros(0).long(), reduction="sum"), [(0, 3)]),
    "mse": (lambda x: F.mse_loss(x, torch.zeros_like(x), reduction="sum"), [(0, 3)]),
    "joined": (lambda x, w: (x * torch.sigmoid(x * w) * w).sum(), [(0, 3), (3,)]),
    "broadcast": (lambda x, y: (x * y).exp().sum(), [(0, 1), (1, 3)]),
    "cat": (lambda x, y: torch.cat([x, y]).exp().sum(), [(0, 3), (2, 3)]),
    "split": (lambda x: (x.split(2)[0] * 2).exp().sum(), [(0, 3)]),
    "index": (lambda x: x[torch.zeros(0).long()].exp().sum(), [(3, 2)]),
    "slice": (lambda x: x[1:1].exp().sum() + x.sum().exp(), [(3, 2)]),
    "views": (lambda x: x.t().reshape(3, 0, 1).expand(3, 0, 4).exp().sum(), [(0, 3)]),
    "mean of the rest": (lambda x: (x.sum(0).exp() * 2).mean(), [(0, 3)]),
    "copy into nothing": (lambda x, y: _into_nothing(x, y).square().sum(), [(3, 2), (0, 2)]),
}  # fmt: skip


def _into_nothing(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z[3:] = y
    return z


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("name", EMPTY)
def test_tensors_without_entries(name: str, method: str) -> None:
    function, shapes = EMPTY[name]
    compare(function, [filled(*shape) for shape in shapes], method)


SCALARS: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "product": (lambda a, b: a * b, [(), ()]),
    "square": (lambda a: a * a.tanh(), [()]),
    "power": (lambda a: (a**3).exp(), [()]),
    "times a matrix": (lambda a, x: (a * x).exp().sum(), [(), (2, 3)]),
    "joined with a matrix": (lambda a, x: (a * x * torch.sigmoid(a + x)).sum(), [(), (2, 3)]),
    "stack": (lambda a, b: torch.stack([a, b, a * b]).softmax(0).square().sum(), [(), ()]),
    "dot": (lambda x, y, a: torch.dot(x, y).sigmoid() * a, [(3,), (3,), ()]),
    "select": (lambda x: x[0] * x[1].exp() - x[2], [(3,)]),
    "unbind": (lambda x: (lambda a, b, c: a * b * c)(*x.unbind()), [(3,)]),
    "expand": (lambda a: a.expand(2, 3).exp().mean(), [()]),
    "softmax": (lambda a: a.softmax(0) + a.log_softmax(0) + a.square(), [()]),
    "logsumexp": (lambda a: a.logsumexp(0).square(), [()]),
    "sum and mean": (lambda a: a.sum().square() + a.mean().exp(), [()]),
    "in place": (lambda a, b: (a * 1).mul_(b).add_(a).exp(), [(), ()]),
    "mse": (lambda a, b: F.mse_loss(a, b), [(), ()]),
}


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("name", SCALARS)
def test_tensors_without_dimensions(name: str, method: str) -> None:
    function, shapes = SCALARS[name]
    compare(function, [filled(*shape) for shape in shapes], method)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "turned round": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: torch.cat([x, x])[x.shape[0] :],
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "channels last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    ),
}

LAID_OUT: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    "linear": (lambda x, w: F.linear(x, w).tanh().square().sum(), [(2, 3), (4, 3)]),
    "matmul": (lambda x, y: (x @ y @ x).exp().mean(), [(3, 2), (2, 3)]),
    "joined": (lambda x, y: (x * torch.sigmoid(x * y) * y).sum(), [(2, 3), (2, 3)]),
    "elementwise": (lambda x, y: (F.gelu(x) / (y.square() + 1)).tanh().sum(), [(2, 3), (2, 3)]),
    "softmax": (lambda x, y: (x.softmax(0) * y.log_softmax(1)).sum(), [(2, 3), (2, 3)]),
    "layer_norm": (lambda x, y: F.layer_norm(x + 3 * torch.eye(3), (3,)).mul(y).square().sum(), [(3, 3), (3, 3)]),
    "reductions": (lambda x, y: x.logsumexp(0).square().sum() + y.mean(1).exp().sum(), [(2, 3), (2, 3)]),
    "views": (lambda x, y: (x.reshape(-1)[1:5] * y.t().reshape(-1)[:4]).exp().sum(), [(2, 3), (2, 3)]),
    "in place": (lambda x, y: _row_into(x, y).square().sum(), [(2, 3), (2, 3)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1).tanh().square().sum(), [(2, 2, 3, 3), (2, 2, 2, 2)]),
    "grouped conv2d": (lambda x, w: F.conv2d(x, w, groups=2).tanh().square().sum(), [(2, 2, 3, 3), (2, 1, 2, 2)]),
    "transposed conv2d": (lambda x, w: F.conv_transpose2d(x, w).tanh().sum(), [(1, 2, 2, 2), (2, 2, 2, 2)]),
    "batch_norm": (lambda x, w: (_batch_norm(x) * w).square().sum(), [(2, 2, 3, 3), (2, 2, 3, 3)]),
    "group_norm": (lambda x, w: (F.group_norm(_varied(x), 2) * w).tanh().sum(), [(2, 2, 3, 3), (2, 2, 3, 3)]),
    "pooling": (lambda x, w: (F.avg_pool2d(x, 2) * w).tanh().sum(), [(2, 2, 4, 4), (2, 2, 2, 2)]),
    "interpolation": (lambda x, w: (F.interpolate(x, scale_factor=2) * w).tanh().sum(), [(1, 2, 2, 2), (1, 2, 4, 4)]),
}  # fmt: skip


def _row_into(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[0] = y[1]
    z[1] *= 0.5
    return z * y


def _batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(_varied(x), None, None, training=True)


def _varied(x: Tensor) -> Tensor:
    """Entries of a row that differ, also where the layout made them equal."""
    return x * torch.arange(1, 4, dtype=F64)


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAID_OUT)
def test_layout_in_memory_does_not_matter(name: str, layout: str, method: str) -> None:
    function, shapes = LAID_OUT[name]
    compare(function, [LAYOUTS[layout](filled(*shape)).detach() for shape in shapes], method)
