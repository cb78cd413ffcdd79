"""Which operations keep samples apart: what the table says is held to the operations' Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature.rank_one.layout import inner_of_input
from hesscale_lightning.curvature.registry import Operation, find_rule

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "view": (lambda x: x.view(2, 3, 2, 4), (6, 8)),
    "transpose": (lambda x: x.transpose(0, 1), (4, 6, 2)),
    "transpose of the last": (lambda x: x.transpose(1, 2), (4, 3, 2)),
    "permute": (lambda x: x.permute(2, 0, 3, 1), (2, 4, 3, 2)),
    "permute, heads": (lambda x: x.permute(1, 0, 2), (3, 8, 2)),
    "select": (lambda x: x[1], (2, 4, 3)),
    "select behind": (lambda x: x[:, 1], (4, 2, 3)),
    "slice of samples": (lambda x: x[1:3], (4, 3)),
    "cat": (lambda x: torch.cat([x, torch.ones(4, 2).double()], 1), (4, 3)),
    "cat of samples": (lambda x: torch.cat([x, x.detach()]), (4, 3)),
    "stack in front": (lambda x: torch.stack([x, torch.ones(4, 2).double()]), (4, 2)),
    "sum": (lambda x: x.sum(1), (4, 3, 2)),
    "mean in front": (lambda x: x.mean(0), (3, 4, 2)),
    "sum of samples": (lambda x: x.sum(0), (4, 2)),
    "mean of images": (lambda x: x.mean((2, 3)), (4, 2, 3, 2)),
    "expand": (lambda x: x.expand(4, 3), (4, 1)),
    "expand over samples": (lambda x: x.expand(4, 3), (3,)),
    "broadcast product": (lambda x: x * torch.ones(4, 2, 3).double(), (4, 1, 3)),
    "softmax": (lambda x: x.softmax(1), (4, 3, 2)),
    "softmax over samples": (lambda x: x.softmax(0), (4, 3)),
    "linear": (lambda x: x @ torch.ones(3, 2).double(), (6, 3)),
    "batched product": (lambda x: torch.bmm(x, torch.ones(4, 3, 2).double()), (4, 2, 3)),
    "convolution": (lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2).double()), (4, 3, 3, 3)),
    "convolution over time": (lambda x: F.conv1d(x, torch.ones(2, 3, 2).double()), (4, 3, 5)),
    "max-pooling": (lambda x: F.max_pool2d(x, 2), (4, 2, 4, 4)),
    "average pooling of one image": (lambda x: F.avg_pool2d(x, 2), (4, 4, 4)),
    "layer norm": (lambda x: F.layer_norm(x, (3,)), (4, 2, 3)),
    "group norm": (lambda x: F.group_norm(x, 2), (4, 4, 3)),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), (4, 3)),
    "running batch norm": (lambda x: F.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double()), (4, 3)),
    "gated": (lambda x: F.glu(x, 1), (4, 4, 2)),
    "padding": (lambda x: F.pad(x, (1, 1, 0, 1)), (4, 2, 3)),
    "flip": (lambda x: x.flip(0), (4, 3)),
    "roll of samples": (lambda x: x.roll(1, 0), (4, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_that_are_kept_apart_do_not_reach_each_other(name: str) -> None:
    function, shape = CASES[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = function(x)
    node = y.grad_fn
    assert node is not None
    rule = find_rule(node)
    assert rule is not None
    needs = [child is not None for child, _ in node.next_functions]
    place = next(i for i, need in enumerate(needs) if need)
    op = Operation(node, node.next_functions, needs, [False] * len(needs), "hesscale")
    assert op.input_shape(place) == x.shape, "made of several operations"
    jacobian = torch.autograd.functional.jacobian(function, x.detach()).view(y.numel(), x.numel()) != 0
    kept = 0
    for samples in range(2, y.numel() + 1):
        for inner in range(1, y.numel() // samples + 1):
            if y.numel() % (samples * inner):
                continue
            below = inner_of_input(op, rule, place, samples, inner)
            if below is None:
                continue
            kept += 1
            assert x.numel() % (samples * below) == 0
            of_output = torch.arange(y.numel()) // inner % samples
            of_input = torch.arange(x.numel()) // below % samples
            assert not (jacobian & (of_output[:, None] != of_input[None])).any(), (samples, inner, below)
    mixes = ("of samples", "over samples", "batch norm", "flip")
    assert kept or (name.endswith(mixes) and name != "running batch norm"), "nothing is kept apart"


def test_permutations_are_followed_wherever_the_samples_stay_in_order() -> None:
    """All small shapes and orders, against the numbers themselves."""
    for shape in ((2, 3, 4), (4, 2, 2), (6, 1, 4)):
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            x = torch.zeros(shape, requires_grad=True)
            y = x.permute(order)
            node, count = y.grad_fn, math.prod(shape)
            assert node is not None
            rule = find_rule(node)
            assert rule is not None
            op = Operation(node, node.next_functions, [True], [False], "hesscale")
            numbers = torch.arange(count).view(shape).permute(order).flatten()
            for samples in (s for s in range(2, count + 1) if count % s == 0):
                for inner in (m for m in range(1, count // samples + 1) if count // samples % m == 0):
                    below = inner_of_input(op, rule, 0, samples, inner)
                    if below is not None:
                        labels = torch.empty(count, dtype=torch.long)
                        labels[numbers] = torch.arange(count) // inner % samples
                        assert torch.equal(labels, torch.arange(count) // below % samples), (shape, order)
