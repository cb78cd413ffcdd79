"""torch.distributed.checkpoint has an optimizer make its state by a trial step; it must be none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

from hesscale_lightning import AdaHesScale, StepSizeScaling, attach

Make = Callable[[Any], Any]


def scaled(params: Any) -> StepSizeScaling:
    return StepSizeScaling(torch.optim.SGD(params, lr=1.0, momentum=0.9), 1e-3)


OPTIMIZERS: dict[str, Make] = {
    "AdaHesScale": lambda params: AdaHesScale(params, lr=0.5, weight_decay=0.1),
    "AdaHesScale, lr a tensor": lambda params: AdaHesScale(params, lr=torch.tensor(0.5)),
    "StepSizeScaling": scaled,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = cross_entropy(net(torch.randn(8, 4, generator=generator)), torch.randint(3, (8,), generator=generator))
        attach(loss)
        loss.backward()
        optimizer.step()


def weights(net: nn.Module) -> list[Any]:
    return [p.detach().tolist() for p in net.parameters()]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_asking_for_the_state_of_a_fresh_optimizer_changes_nothing(make: Make) -> None:
    asked, untouched = network(), network()
    optimizer, other = make(asked.parameters()), make(untouched.parameters())
    get_optimizer_state_dict(asked, optimizer)
    assert weights(asked) == weights(untouched)
    train(asked, optimizer, range(4))
    train(untouched, other, range(4))
    assert weights(asked) == weights(untouched)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_was_made_on_trial_is_no_curvature_to_step_with(make: Make) -> None:
    net = network()
    optimizer = make(net.parameters())
    get_optimizer_state_dict(net, optimizer)
    net(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="no Hessian diagonal"):
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_of_rate_zero_is_no_trial_if_there_are_gradients(make: Make) -> None:
    net = network()
    optimizer = make(net.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    net(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="no Hessian diagonal"):
        optimizer.step()


@pytest.mark.parametrize("saved_after", [0, 3])
def test_a_run_goes_on_from_the_state_that_was_got(saved_after: int) -> None:
    net = network()
    optimizer = AdaHesScale(net.parameters(), lr=0.5)
    train(net, optimizer, range(saved_after))
    resumed = copy.deepcopy(net)
    fresh = AdaHesScale(resumed.parameters(), lr=0.1)
    set_optimizer_state_dict(resumed, fresh, copy.deepcopy(get_optimizer_state_dict(net, optimizer)))
    train(net, optimizer, range(saved_after, 6))
    train(resumed, fresh, range(saved_after, 6))
    assert weights(resumed) == weights(net)
