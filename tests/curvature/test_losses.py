"""Losses against dense derivatives, with every reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check

generator = torch.Generator().manual_seed(3)
TARGET = torch.randn((4, 3), generator=generator, dtype=torch.float64)
PROBABILITY = torch.rand((4, 3), generator=generator, dtype=torch.float64)
SIGN = torch.randint(0, 2, (4, 3), generator=generator).double() * 2 - 1
WEIGHT = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
LABEL = torch.tensor([0, 2, 1, 2])
IMAGE_LABEL = torch.randint(0, 3, (2, 2, 2), generator=generator)

#: Name, loss of (input, reduction), shape of the input, node.
LOSSES: list[tuple[str, Callable[[Tensor, str], Tensor], tuple[int, ...], str]] = [
    ("mse", lambda x, r: F.mse_loss(x, TARGET, reduction=r), (4, 3), "MseLossBackward0"),
    ("huber", lambda x, r: F.huber_loss(x, TARGET, delta=0.7, reduction=r), (4, 3), "HuberLossBackward0"),
    ("smooth_l1", lambda x, r: F.smooth_l1_loss(x, TARGET, beta=0.7, reduction=r), (4, 3), "SmoothL1LossBackward0"),
    ("l1", lambda x, r: F.l1_loss(x, TARGET, reduction=r), (4, 3), "AbsBackward0"),
    ("soft_margin", lambda x, r: F.soft_margin_loss(x, SIGN, reduction=r), (4, 3), "SoftMarginLossBackward0"),
    (
        "bce",
        lambda x, r: F.binary_cross_entropy(x.sigmoid(), PROBABILITY, reduction=r),
        (4, 3),
        "BinaryCrossEntropyBackward0",
    ),
    (
        "weighted bce",
        lambda x, r: F.binary_cross_entropy(x.sigmoid(), PROBABILITY, WEIGHT, reduction=r),
        (4, 3),
        "BinaryCrossEntropyBackward0",
    ),
    (
        "bce with logits",
        lambda x, r: F.binary_cross_entropy_with_logits(x, PROBABILITY, reduction=r),
        (4, 3),
        "BinaryCrossEntropyWithLogitsBackward0",
    ),
    (
        "weighted bce with logits",
        lambda x, r: F.binary_cross_entropy_with_logits(x, PROBABILITY, WEIGHT, pos_weight=WEIGHT + 1, reduction=r),
        (4, 3),
        "BinaryCrossEntropyWithLogitsBackward0",
    ),
    ("nll", lambda x, r: F.nll_loss(x, LABEL, reduction=r), (4, 3), "NllLossBackward0"),
    ("weighted nll", lambda x, r: F.nll_loss(x, LABEL, WEIGHT, reduction=r), (4, 3), "NllLossBackward0"),
    (
        "nll ignoring a class",
        lambda x, r: F.nll_loss(x, LABEL, ignore_index=2, reduction=r),
        (4, 3),
        "NllLossBackward0",
    ),
    ("nll of one sample", lambda x, r: F.nll_loss(x, LABEL[0], reduction=r), (3,), "NllLossBackward0"),
    ("nll of images", lambda x, r: F.nll_loss(x, IMAGE_LABEL, WEIGHT, reduction=r), (2, 3, 2, 2), "NllLoss2DBackward0"),
    ("cross_entropy", lambda x, r: F.cross_entropy(x, LABEL, reduction=r), (4, 3), "LogSoftmaxBackward0"),
    ("weighted cross_entropy", lambda x, r: F.cross_entropy(x, LABEL, WEIGHT, reduction=r), (4, 3), "NllLossBackward0"),
    (
        "cross_entropy ignoring a class",
        lambda x, r: F.cross_entropy(x, LABEL, ignore_index=2, reduction=r),
        (4, 3),
        "NllLossBackward0",
    ),
    (
        "smoothed cross_entropy",
        lambda x, r: F.cross_entropy(x, LABEL, WEIGHT, label_smoothing=0.2, ignore_index=1, reduction=r),
        (4, 3),
        "LogSoftmaxBackward0",
    ),
    (
        "cross_entropy of soft targets",
        lambda x, r: F.cross_entropy(x, PROBABILITY, WEIGHT, label_smoothing=0.1, reduction=r),
        (4, 3),
        "LogSoftmaxBackward0",
    ),
    (
        "cross_entropy of images",
        lambda x, r: F.cross_entropy(x, IMAGE_LABEL, reduction=r),
        (2, 3, 2, 2),
        "NllLoss2DBackward0",
    ),
    ("kl_div", lambda x, r: F.kl_div(x, PROBABILITY, reduction=r), (4, 3), "MulBackward0"),
    ("kl_div of log targets", lambda x, r: F.kl_div(x, TARGET, reduction=r, log_target=True), (4, 3), "SubBackward0"),
    ("poisson nll", lambda x, r: F.poisson_nll_loss(x, PROBABILITY, reduction=r), (4, 3), "ExpBackward0"),
]


def cases() -> Iterator[Case]:
    for name, loss, shape, node in LOSSES:
        for reduction in ("mean", "sum", "none"):
            mixes = name in ("smoothed cross_entropy", "cross_entropy of soft targets")  # sums over classes
            yield Case(
                f"{name} {reduction}", lambda x, loss=loss, r=reduction: loss(x, r), [shape], [node], at_loss=mixes
            )
    yield Case("kl_div batchmean", lambda x: F.kl_div(x, PROBABILITY, reduction="batchmean"), [(4, 3)])
    yield Case("mse of two inputs", F.mse_loss, [(4, 3), (4, 3)], ["MseLossBackward0"])
    yield Case("huber of two inputs", F.huber_loss, [(4, 3), (4, 3)], ["HuberLossBackward0"])
    yield Case("smooth_l1 of two inputs", F.smooth_l1_loss, [(4, 3), (4, 3)], ["SmoothL1LossBackward0"])


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)
