"""Hooks that change a gradient are noticed, those that only look are not, and neither costs a step without any."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hesscale_lightning.curvature import attach
from hesscale_lightning.curvature.gradient_hooks import Registrations, Watch
from hesscale_lightning.curvature.graph import trace


def _nodes(loss):
    return trace(loss.grad_fn, None).nodes


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


def _in_place(g):
    g.mul_(2)


def _swapped(g):
    return g.t() if g.dim() == 2 and g.shape[0] == g.shape[1] else g.flip(0)


CHANGES = [lambda g: g * 0, lambda g: g * 0.5, lambda g: g.clamp(-1e-4, 1e-4), _in_place, _swapped]
LOOKS = [lambda g: None, lambda g: g, lambda g: g.norm() and None, lambda g: g.detach(), lambda g: g.clone()]


def _watched(loss):
    """What a watch notices; the engine, which puts one on the graph itself, refuses that and nothing else."""
    watch = Watch(loss)
    attachment = attach(loss)
    refused = None
    try:
        loss.backward()
    except RuntimeError as error:
        refused = str(error)
    assert bool(watch.changed) is (refused is not None and "a hook changed the gradient" in refused)
    assert not attachment.active
    watch.remove()
    return watch.changed


def _tensor_hook(hook, x, where):
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    z = (x @ w).tanh()
    y = z @ w if where != "branching" else z * w + (z @ w).sigmoid() + z
    (y if where == "output" else z).register_hook(hook)
    return y.square().sum()


@pytest.mark.parametrize("where", ["line", "branching", "output"])
@pytest.mark.parametrize("hook", CHANGES)
def test_a_tensor_hook_that_changes_the_gradient(hook, where):
    assert _watched(_tensor_hook(hook, torch.randn(4, 4, dtype=torch.float64), where))


@pytest.mark.parametrize("where", ["line", "branching", "output"])
@pytest.mark.parametrize("hook", LOOKS)
def test_a_tensor_hook_that_looks(hook, where):
    assert _watched(_tensor_hook(hook, torch.randn(4, 4, dtype=torch.float64), where)) == []


def test_a_hook_on_the_loss():
    w = torch.randn(3, requires_grad=True)
    loss = w.square().sum()
    loss.register_hook(lambda g: g * 2)
    assert _watched(loss) == ["SumBackward0"]


def test_a_hook_registered_after_attach():
    w = torch.randn(3, requires_grad=True)
    z = w * 2
    loss = z.square().sum()
    watch = Watch(loss)
    attach(loss)
    z.register_hook(lambda g: g * 2)
    with pytest.raises(RuntimeError, match="a hook changed the gradient before MulBackward0"):
        loss.backward()
    assert watch.changed == ["MulBackward0"]
    assert getattr(w, "hess_diag", None) is None


def test_node_prehooks():
    w = torch.randn(3, requires_grad=True)
    z = w * 2
    loss = z.square().sum()
    z.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))
    assert _watched(loss) == ["MulBackward0"]


def test_module_full_backward_hooks():
    for changes in (True, False):
        for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            model = _model()

            def hook(module, first, *_, changes=changes):
                return tuple(g * 2 for g in first) if changes else None

            getattr(model[2], register)(hook)
            found = _watched(model(torch.randn(5, 3)).square().sum())
            assert bool(found) is changes, (register, found)


def test_multi_grad_hooks_only_look():
    w = torch.randn(3, requires_grad=True)
    z, y = w * 2, w * 3
    torch.autograd.graph.register_multi_grad_hook([z, y], lambda grads: None)
    assert _watched((z * y).sum()) == []


def test_hooks_of_leaves_are_no_concern():
    """They change what is added to ``.grad``, and no gradient that curvature is computed with."""
    model = _model()
    for p in model.parameters():
        p.register_hook(lambda g: g * 0)
    x = torch.randn(5, 3)
    loss = model(x).square().sum()
    assert _watched(loss) == []
    other = _model()
    loss = other(x).square().sum()
    attach(loss)
    loss.backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert not p.grad.any()
        torch.testing.assert_close(p.hess_diag, q.hess_diag)


def test_several_outputs_and_shared_tensors():
    w = torch.randn(4, 6, requires_grad=True)
    a, b, c = w.chunk(3, 1)
    values, _ = (a * b).sort(0)
    loss = (torch.stack([values, c, a]).softmax(0) * values).std()
    assert _watched(loss) == []
    a, b, c = w.chunk(3, 1)
    b.register_hook(lambda g: g + 1)
    assert _watched((a * b * c + b).exp().sum())


def test_a_transformer_without_hooks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    assert _watched(layer(torch.randn(2, 5, 8)).square().mean()) == []


def test_a_watch_keeps_nothing_alive():
    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.held = held = Mark()
            marks.append(weakref.ref(held))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Mark:
        pass

    marks = []
    for through in (True, False):
        w = torch.randn(3, requires_grad=True)
        loss = Held.apply(w * 2).sum()
        watch = Watch(loss)
        if through:
            loss.backward()
            assert not watch._given
        del loss, watch
        gc.collect()
        assert marks.pop()() is None


# -- the counter


def test_no_registration_no_suspicion():
    registrations, model, x = Registrations(), _model(), torch.randn(5, 3)
    registrations.suspected(_nodes(model(x).sum()))  # something may have been registered before
    for _ in range(3):
        loss = model(x).square().sum()
        assert not registrations.suspected(_nodes(loss))
        before = torch.utils.hooks.RemovableHandle.next_id
        attach(loss)
        registrations.ours(torch.utils.hooks.RemovableHandle.next_id - before)
        loss.backward()


@pytest.mark.parametrize("kind", ["tensor", "module", "leaf", "node"])
def test_a_registration_is_noticed(kind):
    registrations, model, x = Registrations(), _model(), torch.randn(5, 3)
    registrations.suspected(_nodes(model(x).sum()))
    y = model(x)
    if kind == "tensor":
        y.register_hook(lambda g: None)
    elif kind == "module":
        model[0].register_full_backward_hook(lambda *_: None)
        y = model(x)
    elif kind == "leaf":
        model[0].weight.register_hook(lambda g: None)
    else:
        y.grad_fn.register_prehook(lambda g: None)
    assert registrations.suspected(_nodes(y.sum()))
    assert registrations.suspected(_nodes(y.mean()))  # the same graph, asked about later
    assert registrations.suspected(_nodes(model(x).sum())) is (kind == "module")


def test_older_graphs_stay_suspected():
    registrations, model, x = Registrations(), _model(), torch.randn(5, 3)
    registrations.suspected(_nodes(model(x).sum()))
    hooked, other = model(x), model(x)
    hooked.register_hook(lambda g: g * 2)
    assert registrations.suspected(_nodes(other.sum()))
    assert not registrations.suspected(_nodes(model(x).sum()))
    assert registrations.suspected(_nodes(hooked.sum()))
    assert registrations.suspected(_nodes((hooked * model(x)).sum()))
