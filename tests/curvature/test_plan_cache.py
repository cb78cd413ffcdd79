"""A plan made for one graph is never used for another that it does not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import attach, backward, engine
from hesscale_lightning.curvature.compiled import CompiledPass
from tests.curvature.slow import Recording
from tests.curvature.test_random_graphs import agree, diagonals

Made = tuple[Tensor, list[Tensor]]  # a loss and the wanted tensors
Variant = Callable[[Tensor, Tensor, Tensor, Tensor], Made]


def all_of(f: Callable[..., Tensor]) -> Variant:
    """Every leaf that the function takes is wanted."""
    count = f.__code__.co_argcount
    return lambda *leaves: (f(*leaves[:count]), list(leaves[:count]))


def some_of(*which: int) -> Callable[[Callable[..., Tensor]], Variant]:
    """The leaves of these numbers are wanted, whether or not the function uses them."""

    def variant(f: Callable[..., Tensor]) -> Variant:
        count = f.__code__.co_argcount
        return lambda *leaves: (f(*leaves[:count]), [leaves[k] for k in which])

    return variant


def with_inner(f: Callable[..., tuple[Tensor, list[Tensor]]]) -> Variant:
    return lambda *leaves: f(*leaves[: f.__code__.co_argcount])


def end(y: Tensor) -> Tensor:
    return y.exp().sum()


def layers(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = F.linear(x.tanh(), w)
    return end(x)


def frozen(t: Tensor) -> Tensor:
    return t.detach()


#: Groups of graphs that are alike: the same kind of nodes, or the same number of wanted tensors, or both.
VARIANTS: dict[str, Variant] = {
    # the same nodes, wired in another way
    "a b + a c": all_of(lambda a, b, c: end(a * b + a * c)),
    "a b + c b": all_of(lambda a, b, c: end(a * b + c * b)),
    "a b + c c": all_of(lambda a, b, c: end(a * b + c * c)),
    "a a + b c": all_of(lambda a, b, c: end(a * a + b * c)),
    "u u": all_of(lambda a: end((u := a.tanh()) * u)),
    "tanh(a) tanh(a)": all_of(lambda a: end(a.tanh() * a.tanh())),
    "tanh(a) tanh(b)": all_of(lambda a, b: end(a.tanh() * b.tanh())),
    "(x a) (x a)": all_of(lambda a: end((a @ a.new_ones(2, 2)) * (a @ a.new_ones(2, 2)))),
    "u u with u = x a": all_of(lambda a: end((u := a @ a.new_ones(2, 2)) * u)),
    "tanh(tanh(a)) a": all_of(lambda a: end(a.tanh().tanh() * a)),
    "tanh(a) tanh(tanh(a))": all_of(lambda a: end((u := a.tanh()) * u.tanh())),
    "sigmoid(a) - tanh(b)": all_of(lambda a, b: end(a.sigmoid() - b.tanh())),
    "sigmoid(b) - tanh(a)": all_of(lambda a, b: end(b.sigmoid() - a.tanh())),
    "tanh(a) - sigmoid(b)": all_of(lambda a, b: end(a.tanh() - b.sigmoid())),
    "tanh(a) - sigmoid(a)": all_of(lambda a: end(a.tanh() - a.sigmoid())),
    # tied and untied weights
    "layers a b c": all_of(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b a": all_of(lambda a, b: layers(torch.ones(3, 2).double(), a, b, a)),
    "layers a a b": all_of(lambda a, b: layers(torch.ones(3, 2).double(), a, a, b)),
    "layers a a a": all_of(lambda a: layers(torch.ones(3, 2).double(), a, a, a)),
    "layers a b": all_of(lambda a, b: layers(torch.ones(3, 2).double(), a, b)),
    "layers a a": all_of(lambda a: layers(torch.ones(3, 2).double(), a, a)),
    "layers a": all_of(lambda a: layers(torch.ones(3, 2).double(), a)),
    # the same graph with other wanted sets
    "layers a b c, wanted a": some_of(0)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b c, wanted b": some_of(1)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b c, wanted c": some_of(2)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b c, wanted a c": some_of(0, 2)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b c, wanted a d": some_of(0, 3)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "layers a b c, wanted d": some_of(3)(lambda a, b, c: layers(torch.ones(3, 2).double(), a, b, c)),
    "a b, wanted a": some_of(0)(lambda a, b: end(a * b)),
    "a b, wanted b": some_of(1)(lambda a, b: end(a * b)),
    # frozen and unfrozen
    "layers a frozen b c": all_of(lambda a, b, c: layers(torch.ones(3, 2).double(), a, frozen(b), c)),
    "layers frozen a b c": all_of(lambda a, b, c: layers(torch.ones(3, 2).double(), frozen(a), b, c)),
    "a frozen b": all_of(lambda a, b: end(a * frozen(b))),
    "frozen a b": all_of(lambda a, b: end(frozen(a) * b)),
    # transposes, which the graph's walk passes over
    "x a": all_of(lambda a: end(torch.ones(3, 2).double() @ a)),
    "x a^T": all_of(lambda a: end(torch.arange(6.0).view(3, 2).double() @ a.t())),
    "x a^T^T": all_of(lambda a: end(torch.arange(6.0).view(3, 2).double() @ a.t().t())),
    "a a^T": all_of(lambda a: end(a * a.t())),
    "a^T a": all_of(lambda a: end(a.t() * a)),
    "a^T a^T": all_of(lambda a: end(a.t() * a.t())),
    "a a": all_of(lambda a: end(a * a)),
    "a view of a": all_of(lambda a: end(a * a.view_as(a))),
    "tanh(a)^T tanh(a)": all_of(lambda a: end((u := a.tanh()).t() * u)),
    "tanh(a^T) tanh(a)": all_of(lambda a: end(a.t().tanh() * a.tanh())),
    # outputs of one node
    "unbind, first": all_of(lambda a: end(a.unbind(0)[0])),
    "unbind, second": all_of(lambda a: end(a.unbind(0)[1])),
    "unbind, first first second": all_of(lambda a: end((p := a.unbind(0))[0] * p[0] * p[1])),
    "unbind, first second second": all_of(lambda a: end((p := a.unbind(0))[0] * p[1] * p[1])),
    "split, second first": all_of(lambda a: end((p := a.split(1))[1] / p[0].exp())),
    "split, first second": all_of(lambda a: end((p := a.split(1))[0] / p[1].exp())),
    # what is saved in the nodes, and shapes
    "broadcast": all_of(lambda a, b: end(a[0] * b)),
    "broadcast other": all_of(lambda a, b: end(a * b[0])),
    "add alpha": all_of(lambda a, b: end(torch.add(a, b, alpha=3))),
    "add": all_of(lambda a, b: end(torch.add(a, b))),
    "mean 0": all_of(lambda a: end(a.mean(0))),
    "mean 1": all_of(lambda a: end(a.mean((0, 1)))),
    # terms of the loss with a weight, which may be zero
    "a + 0 b": all_of(lambda a, b: end(a) + 0.0 * end(b * b.sigmoid())),
    "a + 1/2 b": all_of(lambda a, b: end(a) + 0.5 * end(b * b.sigmoid())),
    "0 a + b": all_of(lambda a, b: 0.0 * end(a) + end(b * b.sigmoid())),
    "a + 0 of the same": all_of(lambda a: end(u := a.tanh()) + 0.0 * end(u * u.exp())),
    "a + 1/2 of the same": all_of(lambda a: end(u := a.tanh()) + 0.5 * end(u * u.exp())),
    "0 a + 0 b": all_of(lambda a, b: 0.0 * end(a) + 0.0 * end(b)),
    "0 (a + b)": all_of(lambda a, b: 0.0 * (end(a) + end(b))),
    "a b + 0 a b, wanted a": some_of(0)(lambda a, b: end(a * b) + 0.0 * end(a * b)),
    "inner under 0": with_inner(lambda a, b: (end(a) + 0.0 * end((u := b.tanh()) * u), [u, a, b])),
    "a / var": all_of(lambda a: end(a / (1 + a.var(-1, keepdim=True)))),
    "a / var, correction 0": all_of(lambda a: end(a / (1 + a.var(-1, keepdim=True, correction=0)))),
    "clamped": all_of(lambda a: end(a * a.clamp(-1.0, 0.3))),
    "clamped elsewhere": all_of(lambda a: end(a * a.clamp(-0.2, 1.0))),
    "a a^3": all_of(lambda a: end(a * (a * a) ** 1.5)),
    "a a^2": all_of(lambda a: end(a * (a * a) ** 1.0)),
    # tensors inside the graph
    "inner": with_inner(lambda a, b: (end((u := a.tanh()) * b), [u])),
    "inner of two": with_inner(lambda a, b: (end(b * (u := a.tanh())), [u, a])),
    "inner joined otherwise": with_inner(lambda a, b: (end(a * (u := a.tanh())), [u, a])),
    "inner not wanted": with_inner(lambda a, b: (end(a * a.tanh()), [a])),
    "inner and unreached": with_inner(lambda a, b: (end(a * (u := a.tanh())), [b, u])),
    "inner transposed": with_inner(lambda a, b: (end(a * (u := a.t())), [u, a])),
    # in place
    "first row": all_of(lambda a, b: end(_put(a, b, 0))),
    "second row": all_of(lambda a, b: end(_put(a, b, 1))),
    "row without curvature": all_of(lambda a, b: end(a) + _row(2 * a, b).sum()),
}  # fmt: skip


def _put(a: Tensor, b: Tensor, at: int) -> Tensor:
    y = a.tanh()
    y = y + y
    y[at] = b[0]
    return y * y


def _row(y: Tensor, b: Tensor) -> Tensor:
    y[0] = b[0]
    return y


def fresh() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], list[Tensor | None]]:
    """Diagonals by the slow implementation, by variant and method."""
    found = {}
    for name, variant in VARIANTS.items():
        for method in ("hesscale", "hesscale_gn"):
            with Recording() as recording:
                loss, wanted = variant(*fresh())
            found[name, method] = recording.curvature(loss, wanted, method)
    return found


def run(name: str, method: str) -> list[Tensor | None]:
    loss, wanted = VARIANTS[name](*fresh())
    return diagonals(loss, wanted, method)


@pytest.mark.parametrize("first", VARIANTS)
def test_a_plan_is_used_only_where_it_fits(first: str, expected: Any) -> None:
    """Every variant right after ``first``, with no other plan in the cache."""
    for second in VARIANTS:
        for method in ("hesscale", "hesscale_gn"):
            engine._structures.clear()
            run(first, method)
            run(first, method)  # the second time its program is written
            for got, e in zip(run(second, method), expected[second, method], strict=True):
                agree(got, e, f"{second} after {first}, {method}")


def test_plans_of_many_structures_do_not_mix(expected: Any) -> None:
    """All variants and methods in random order, over and over, which also drops plans and makes them anew."""
    order = list(expected) * 10
    random.Random(0).shuffle(order)
    for name, method in order:
        for got, e in zip(run(name, method), expected[name, method], strict=True):
            agree(got, e, f"{name}, {method}")


def test_a_cached_plan_is_used_at_all() -> None:
    """Otherwise the tests above would prove nothing."""
    engine._structures.clear()
    run("layers a b c", "hesscale")
    run("layers a b c", "hesscale")
    loss, wanted = VARIANTS["layers a b c"](*fresh())
    assert isinstance(attach(loss, wanted), CompiledPass)


def test_growing_and_shrinking_graphs() -> None:
    """Depth changes from step to step, as with early exits or sequences of several lengths."""
    weights = fresh()[:2]
    for depth in (1, 3, 2, 5, 1, 4, 4, 2, 3, 8, 1, 3, 2, 5, 5, 4, 1, 3, 8, 2, 8):
        chain = [weights[k % 2] for k in range(depth)]
        with Recording() as recording:
            loss = layers(torch.ones(3, 2).double(), *chain)
        for got, e in zip(diagonals(loss, weights, "hesscale"), recording.curvature(loss, weights), strict=True):
            agree(got, e, f"depth {depth}")


@pytest.mark.parametrize("uses", [3, 4, 8, 9, 20])
def test_weight_and_bias_of_many_uses(uses: int) -> None:
    """Their products are stacked, a few at a time."""
    engine._structures.clear()
    engine._structures.patience = 0
    w, b, x = fresh()[:3]
    for step in range(1, 4):  # by the rules, by the program that is written then, and by it alone
        with Recording() as recording:
            y = x.detach()
            for _ in range(uses):
                y = F.linear(y, w, b[0]).tanh()
            loss = end(y)
        expected = recording.curvature(loss, [w, b])
        for got, e in zip(diagonals(loss, [w, b], "hesscale"), expected, strict=True):
            agree(got, e, f"step {step}")


def test_a_program_keeps_no_gradient_that_it_has_read() -> None:
    engine._structures.clear()
    width = 512  # so that the program goes on while backward runs
    model = torch.nn.Sequential(*[m for _ in range(8) for m in (torch.nn.Linear(width, width), torch.nn.Tanh())])
    attach(first := end(model(torch.ones(256, width))))
    first.backward()
    loss = end(model(torch.ones(256, width)))
    attachment = attach(loss)
    assert isinstance(attachment, CompiledPass)
    kept: list[bool] = []  # when the first layer's gradient is there, which comes last
    grads = attachment._grads
    model[0].weight.register_hook(lambda _: kept.extend(isinstance(g, tuple) for g in grads))
    loss.backward()
    assert kept == [False] * len(grads) != []


def test_branches_taken_by_the_data() -> None:
    a, b = fresh()[:2]
    for step in range(12):
        with Recording() as recording:
            x = a * b if step % 2 else a + b
            x = x.tanh() if step % 3 else x.sigmoid()
            loss = end(x * a) if step % 4 < 2 else end(x)
        for got, e in zip(diagonals(loss, [a, b], "hesscale"), recording.curvature(loss, [a, b]), strict=True):
            agree(got, e, f"step {step}")


def test_a_complex_parameter_is_refused_also_where_a_real_one_came_before() -> None:
    backward(torch.ones(3, requires_grad=True).abs().square().sum())
    with pytest.raises(TypeError, match="complex"):
        backward(torch.ones(3, dtype=torch.complex64, requires_grad=True).abs().square().sum())


def test_unfreezing_between_steps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x = torch.ones(4, 2).double()
    params = list(model.parameters())
    for trainable in ([0, 1, 2, 3], [2, 3], [0, 3], [1, 2], [0, 1, 2, 3]):
        for k, p in enumerate(params):
            p.requires_grad_(k in trainable)
        with Recording() as recording:
            loss = end(model(x))
        wanted = [params[k] for k in trainable]
        expected = dict(zip(trainable, recording.curvature(loss, wanted), strict=True))
        for k, got in enumerate(diagonals(loss, params, "hesscale")):
            agree(got, expected.get(k), f"trainable {trainable}, parameter {k}")


@pytest.mark.parametrize("first", [(1.0, 0.0), (0.0, 1.0)])
def test_terms_may_be_switched_off_where_something_is_prepared(first: tuple[float, float]) -> None:
    """What recognises a graph prepares also for operations that the latest plan had left out."""

    def diagonal(a: float, b: float) -> Tensor:
        w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        x = w * 2
        x[:2] *= w[1:]  # CopySlices, whose rule prepares
        backward((x**3).sum() * a + (w.sin() ** 2).sum() * b, [w])
        found: Tensor = w.hess_diag  # type: ignore[attr-defined]
        return found

    weights = [*[first, first[::-1]] * 3, (0.0, 0.0), (1.0, 1.0), (1.0, 0.0)]
    found = [diagonal(a, b) for a, b in weights]
    for (a, b), h in zip(weights, found, strict=True):
        engine._structures.clear()
        torch.testing.assert_close(h, diagonal(a, b))
