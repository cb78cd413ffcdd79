"""The diagonal over a data set is that of all samples' mean loss, and the model is afterwards what it was."""

import copy
import io
import random
from contextlib import nullcontext

import lightning.pytorch as pl
import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from hesscale_lightning import HessDiagState, UnsupportedOperationError, backward, exact_hess_diag, hess_diag_over
from hesscale_lightning.curvature.engine import METHODS
from tests.lightning_models import CLASSES, FEATURES, Classifier

SIZES = (5, 5, 2, 4)  # of the batches: unequal, so that the weights count


def network(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)]
    net = nn.Sequential(*layers).to(dtype)
    net(torch.randn(30, FEATURES, dtype=dtype))  # running statistics that are not 0 and 1
    return net


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), FEATURES, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (sum(SIZES),), generator=generator)


def batches(dtype=torch.float64):
    x, y = data(dtype)
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def at_once(net, method):
    """The diagonal of the mean loss of all samples, in one batch, in evaluation mode."""
    net = copy.deepcopy(net).eval()
    x, y = data(next(net.parameters()).dtype)
    loss = cross_entropy(net(x), y)
    if method == "exact":
        return dict(zip(dict(net.named_parameters()), exact_hess_diag(loss, net.parameters()), strict=True))
    backward(loss, method=method)
    return {name: p.hess_diag for name, p in net.named_parameters()}


def over(net, loader=None, **options):
    loader = batches(next(net.parameters()).dtype) if loader is None else loader
    return hess_diag_over(net, cross_entropy, loader, progress_bar=False, **options)


def assert_same(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.mark.parametrize("method", [*METHODS, "exact"])
def test_it_is_the_diagonal_of_all_samples_in_one_batch(method):
    net = network()
    assert_same(over(net, method=method), at_once(net, method))


def test_a_sum_is_the_mean_times_the_samples():
    net = network()
    expected = {name: sum(SIZES) * h for name, h in over(net).items()}
    assert_same(over(net, reduction="sum"), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_sums_over_its_batch_gives_the_same(reduction):
    net = network()
    found = hess_diag_over(
        net,
        nn.CrossEntropyLoss(reduction="sum"),
        batches(),
        loss_reduction="sum",
        reduction=reduction,
        progress_bar=False,
    )
    assert_same(found, over(net, reduction=reduction))


def test_a_step_may_take_any_batch_and_is_weighted_by_its_size():
    net = network()
    dictionaries = [{"name": ["text"] * len(x), "x": x, "labels": y} for x, y in batches()]
    found = hess_diag_over(
        net,
        None,
        dictionaries,
        step=lambda model, batch: cross_entropy(model(batch["x"]), batch["labels"]),
        progress_bar=False,
    )
    assert_same(found, over(net))
    doubled = over(net, [dictionaries[0], dictionaries[2]] and batches()[:2], batch_size=lambda batch: 7)
    equal = over(net, batches()[:2])
    assert_same(doubled, equal)  # both batches have five samples


def test_float64_sums_hold_what_float32_sums_lose():
    """Adding 1 to 2 ** 24 is lost in float32."""
    weight = nn.Parameter(torch.ones(1))
    model = nn.Module()
    model.weight = weight
    curvatures = [2.0**24, 1.0, 1.0]
    options = {"step": lambda m, c: (m.weight**2).sum() * c.sum() / 2, "reduction": "sum", "progress_bar": False}
    found = {
        dtype: hess_diag_over(model, None, [torch.tensor([c]) for c in curvatures], dtype=dtype, **options)["weight"]
        for dtype in (torch.float32, torch.float64)
    }
    assert found[torch.float64].dtype == torch.float64
    assert found[torch.float64].item() == 2.0**24 + 2
    assert found[torch.float32].item() == 2.0**24


def test_half_precision_is_summed_in_float32():
    found = over(network(torch.bfloat16), dtype=None)
    assert {h.dtype for h in found.values()} == {torch.float32}
    assert_same(found, at_once(network(torch.bfloat16), "hesscale"), rtol=0.1, atol=0.02)


def test_what_no_loss_reaches_gets_zeros_and_what_is_frozen_nothing():
    net = network()
    net.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    net[0].weight.requires_grad_(False)
    found = over(net)
    assert "0.weight" not in found
    assert found["unused"].tolist() == [0, 0, 0]


class Interrupting:
    """Batches that end in Ctrl-C."""

    def __init__(self, after, error=KeyboardInterrupt):
        self.after, self.error = after, error

    def __iter__(self):
        yield from batches()[: self.after]
        raise self.error


def condition(net):
    """All that must not change."""
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "grads": {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in net.named_parameters()},
        "diagonals": {
            name: (id(p.hess_diag), p.hess_diag.clone()) if hasattr(p, "hess_diag") else None
            for name, p in net.named_parameters()
        },
        "modes": [module.training for module in net.modules()],
        "buffers": [id(buffer) for buffer in net.buffers()],
        "torch": torch.get_rng_state(),
        "python": random.getstate()[1],
        "numpy": numpy.random.get_state()[1],
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("outcome", ["done", "interrupted", "in backward", "unsupported"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_afterwards_what_it_was(outcome, training):
    net = network(dropout=0.5)
    net[4].eval()  # a mode of its own
    backward(cross_entropy(net(data()[0]), data()[1]), [net[0].weight, net[0].bias])
    net[4].bias.grad = None
    del net[0].bias.hess_diag
    steps = []
    net[0].weight.register_post_accumulate_grad_hook(steps.append)

    def step(model, batch):
        random.random(), numpy.random.rand(), torch.rand(1)
        loss = cross_entropy(model(batch[0]), batch[1])
        if outcome == "in backward":
            model[0].weight.grad = torch.ones_like(model[0].weight)

            def stop(_):
                raise KeyboardInterrupt

            next(iter(loss.grad_fn.next_functions))[0].register_prehook(stop)
        if outcome == "unsupported":
            loss = Unknown.apply(loss)
        return loss

    errors = {
        "interrupted": KeyboardInterrupt,
        "in backward": KeyboardInterrupt,
        "unsupported": UnsupportedOperationError,
    }
    loader = Interrupting(2) if outcome == "interrupted" else batches()
    with torch.no_grad():
        before = condition(net)
        with pytest.raises(errors[outcome]) if outcome in errors else nullcontext():
            hess_diag_over(net, None, loader, step=step, training=training, progress_bar=False)
        assert_unchanged(before, condition(net))
    assert not steps
    cross_entropy(net(data()[0]), data()[1]).backward()
    assert len(steps) == 1  # the hook works again


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g


def test_training_mode_is_what_its_name_says():
    net = network()
    x, y = batches()[0]
    loss = cross_entropy(copy.deepcopy(net).train()(x), y)
    expected = exact_hess_diag(loss, list(copy.deepcopy(net).parameters()))
    assert all(not h.any() for h in expected)  # a copy is not reached
    twin = copy.deepcopy(net).train()
    backward(cross_entropy(twin(x), y))
    assert_same(over(net, [(x, y)], training=True), {name: p.hess_diag for name, p in twin.named_parameters()})
    assert (over(net, [(x, y)])["0.weight"] - twin[0].weight.hess_diag).abs().max() > 1e-4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_goes_on_from_a_saved_state(error):
    net, state = network(), HessDiagState()
    with pytest.raises(error):
        over(net, Interrupting(2, error), state=state)
    assert (state.batches, state.samples) == (2, 10)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    resumed = HessDiagState()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(over(net, state=resumed), over(net), rtol=0, atol=0)
    assert resumed.batches == len(SIZES)


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_resumed_pass_over_shuffled_data_takes_the_batches_that_are_left(own_generator):
    net = network()

    def loader():
        generator = torch.Generator().manual_seed(3) if own_generator else None
        return DataLoader(TensorDataset(*data()), batch_size=5, shuffle=True, generator=generator)

    state = HessDiagState()
    first = loader()
    over(net, first, state=state, batches=1)
    if own_generator:
        assert torch.equal(first.generator.get_state(), torch.Generator().manual_seed(3).get_state())
    torch.manual_seed(17)  # another process
    second = first if own_generator else loader()
    if own_generator:
        second.generator.manual_seed(5)
    for _ in range(3):
        over(net, second, state=state, batches=1)
    assert_same(over(net, second, state=state), at_once(net, "hesscale"))


def test_in_parts_of_some_batches_it_is_the_same():
    net, state = network(), HessDiagState()
    for _ in SIZES:
        found = over(net, state=state, batches=1)
    assert_same(found, over(net), rtol=0, atol=0)


class Logging(Classifier):
    """Logs, keeps a metric, and transforms its batches."""

    def __init__(self, net, factor=1.0):
        super().__init__(net)
        self.metric = MeanMetric()
        self.factor = factor

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * self.factor, batch[1]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss.detach())
        self.log("loss", self.metric)
        return {"loss": loss}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches()


def test_a_lightning_module_brings_its_loss_and_its_data():
    net = network()
    module = Logging(net)
    module.metric.update(3.0)
    for source in (Data(), batches()):
        found = hess_diag_over(module, None, source, progress_bar=False)
        assert_same(found, {f"net.{name}": h for name, h in over(net).items()})
    module.train_dataloader = batches
    found = hess_diag_over(module, None, None, progress_bar=False)
    assert_same(found, {f"net.{name}": h for name, h in over(net).items()})
    assert module.metric.compute() == 3
    assert module.metric.update_count == 1


def test_a_training_step_need_not_take_the_index_of_the_batch():
    """Lightning's loop calls one that takes the batch alone, too."""

    class WithoutIndex(Classifier):
        def training_step(self, batch):
            return cross_entropy(self.net(batch[0]), batch[1])

    net = network()
    assert_same(
        hess_diag_over(WithoutIndex(net), None, batches(), progress_bar=False),
        {f"net.{name}": h for name, h in over(net).items()},
    )


def test_hooks_that_transform_batches_are_called():
    net = network()
    scaled = [(2 * x, y) for x, y in batches()]
    found = hess_diag_over(Logging(net, factor=2.0), None, batches(), progress_bar=False)
    assert_same(found, {f"net.{name}": h for name, h in over(net, scaled).items()})


def test_compiled_code_is_run_eagerly():
    net = network()
    expected = over(net)
    compiled = torch.compile(net, backend="eager")
    assert_same(over(compiled, batches()), expected)


def test_the_progress_bar_counts_batches_from_where_the_pass_goes_on(capfd):
    net, state = network(), HessDiagState()
    hess_diag_over(net, cross_entropy, batches(), batches=1, state=state, progress_bar=False)
    assert "batch" not in capfd.readouterr().err
    hess_diag_over(net, cross_entropy, batches(), batches=2, state=state)
    assert "1/3" in capfd.readouterr().err


class Manual(Classifier):
    def __init__(self):
        super().__init__(network())
        self.automatic_optimization = False


BAD = {
    "a method": (
        lambda: over(network(), method="hessian"),
        ValueError,
        "Found method='hessian', expected one",
    ),
    "a reduction": (lambda: over(network(), reduction="max"), ValueError, "Found reduction='max'"),
    "no batch at all": (lambda: over(network(), []), ValueError, "Found no training batch"),
    "a number of batches": (lambda: over(network(), batches=0), ValueError, "Found batches=0, expected at least 1"),
    "a dtype": (lambda: over(network(), dtype=torch.float16), ValueError, "Found dtype=torch.float16, expected"),
    "no model": (lambda: hess_diag_over(cross_entropy, None, []), TypeError, "expected a torch.nn.Module"),
    "no loss": (lambda: hess_diag_over(network(), None, batches()), TypeError, "Found no loss_fn with a Sequential"),
    "two losses": (lambda: over(network(), step=cross_entropy), TypeError, "Found both loss_fn and step"),
    "a batch that is no pair": (
        lambda: over(network(), [torch.ones(2, FEATURES)]),
        TypeError,
        r"a tensor of shape \(2, 6\), expected a pair \(x, y\).*give step=",
    ),
    "a loss for each sample": (
        lambda: hess_diag_over(network(), nn.CrossEntropyLoss(reduction="none"), batches(), progress_bar=False),
        TypeError,
        r"Found a loss that is a tensor of shape \(5,\), expected a tensor with one element",
    ),
    "tensors of several sizes": (
        lambda: over(network(), [(torch.ones(2, FEATURES), torch.ones(3))]),
        ValueError,
        r"tensors of \[2, 3\] samples, expected.*give batch_size=",
    ),
    "nothing to train": (
        lambda: over(network().requires_grad_(False)),
        ValueError,
        "Found no parameter that requires grad",
    ),
    "manual optimization": (lambda: hess_diag_over(Manual(), None, batches()), ValueError, "with manual optimization"),
    "no data": (lambda: over(network(), 3), TypeError, "Found data of type int, expected batches"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_an_error_that_says_what_to_do(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_another_call_is_refused():
    net, state = network(), HessDiagState()
    over(net, state=state)
    with pytest.raises(ValueError, match="go on as it was begun"):
        over(net, state=state, method="bl89")
    with pytest.raises(ValueError, match=r"differs from the model's 2 in 0.bias, 0.weight"):
        over(nn.Linear(FEATURES, CLASSES).double(), state=state)
    with pytest.raises(ValueError, match="without batches, order, samples, settings, sums"):
        state.load_state_dict({})
    assert state.batches == len(SIZES)


def test_what_else_requires_grad_is_left_alone():
    """A parameter of the loss and an input that require grad keep their gradients; a buffer that was None is None."""

    class Caching(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("cache", None)

        def forward(self, x):
            self.cache = x.detach()
            return super().forward(x)

    model, factor = Caching(), nn.Parameter(torch.tensor(2.0))
    factor.grad, x = torch.tensor(5.0), torch.randn(4, 3, requires_grad=True)
    hess_diag_over(model, lambda y, target: factor * (y - target).square().mean(), [(x, torch.zeros(4, 1))])
    assert factor.grad == 5.0
    assert x.grad is None
    assert model.cache is None


@pytest.mark.parametrize("shuffle", ["python", "numpy"])
def test_an_order_drawn_by_other_generators_is_resumed(shuffle):
    class Shuffled(torch.utils.data.Sampler):
        def __iter__(self):
            order = list(range(24))
            random.shuffle(order) if shuffle == "python" else numpy.random.shuffle(order)
            return iter(order)

        def __len__(self):
            return 24

    seen, state, model = [], HessDiagState(), nn.Linear(1, 1)
    data = torch.utils.data.TensorDataset(torch.arange(24.0)[:, None], torch.zeros(24, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=Shuffled())

    def step(model, batch):
        seen.extend(batch[0].flatten().tolist())
        return model(batch[0]).square().mean()

    for _ in range(6):
        random.random(), numpy.random.random()
        hess_diag_over(model, None, loader, step=step, batches=1, state=state, progress_bar=False)
    assert sorted(seen) == list(range(24))


def test_persistent_workers_are_refused_when_going_on():
    data = torch.utils.data.TensorDataset(torch.randn(8, 1), torch.zeros(8, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)
    state, loss = HessDiagState(), nn.MSELoss()
    hess_diag_over(nn.Linear(1, 1), loss, loader, batches=1, state=state, progress_bar=False)
    with pytest.raises(ValueError, match="persistent_workers=True"):
        hess_diag_over(nn.Linear(1, 1), loss, loader, batches=1, state=state, progress_bar=False)
