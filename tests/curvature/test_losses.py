"""Losses against dense derivatives, with every reduction."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check, with_constants

generator = torch.Generator().manual_seed(3)
TARGET = torch.randn((4, 3), generator=generator, dtype=torch.float64)
PROBABILITY = torch.rand((4, 3), generator=generator, dtype=torch.float64)
SIGN = torch.randint(0, 2, (4, 3), generator=generator).double() * 2 - 1
WEIGHT = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
POSITIVE = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
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
    for reduction in ("mean", "sum", "none"):
        yield from cases_over_classes(reduction)
    yield Case("kl_div batchmean", lambda x: F.kl_div(x, PROBABILITY, reduction="batchmean"), [(4, 3)])
    yield from cases_of_binary_cross_entropy()
    yield Case("mse of two inputs", F.mse_loss, [(4, 3), (4, 3)], ["MseLossBackward0"])
    yield Case("huber of two inputs", F.huber_loss, [(4, 3), (4, 3)], ["HuberLossBackward0"])
    yield Case("smooth_l1 of two inputs", F.smooth_l1_loss, [(4, 3), (4, 3)], ["SmoothL1LossBackward0"])


LABELS = torch.tensor([[1, 2, -1], [0, -1, 0], [2, 1, 0], [-1, 0, 0]])
SEQUENCES = torch.tensor([[1, 2, 1], [2, 0, 0], [1, 1, 0]])  # 3 samples, 5 steps, 3 classes, of which 0 is blank
STEPS = torch.randn((5, 3, 3), generator=generator, dtype=torch.float64)
LENGTHS, TARGET_LENGTHS = torch.tensor([5, 3, 4]), torch.tensor([3, 1, 2])


def cases_over_classes(r: str) -> Iterator[Case]:
    margin, label = ["MultiMarginLossBackward0"], ["MultilabelMarginLossBackward0"]
    for p in (1, 2):
        for weight in (None, WEIGHT):
            name = f"{'weighted ' if weight is not None else ''}multi_margin {r} with p = {p}"

            def loss(x: Tensor, p: int = p, weight: Tensor | None = weight) -> Tensor:
                return F.multi_margin_loss(x, LABEL, p, 0.8, weight, reduction=r)

            def by_hand(x: Tensor, p: int = p, weight: Tensor | None = weight) -> Tensor:
                right = F.one_hot(LABEL, 3).bool()
                losses = (0.8 - x[right].unsqueeze(1) + x).clamp(min=0).pow(p).masked_fill(right, 0).sum(1) / 3
                return reduced(losses if weight is None else losses * weight[LABEL], r)

            yield Case(name, loss, [(4, 3)], margin, reference=by_hand)

    def margins(x: Tensor) -> Tensor:
        losses = []
        for row, labels in zip(x, LABELS, strict=True):
            right = [*labels.tolist(), -1]
            right = right[: right.index(-1)]
            wrong = [k for k in range(3) if k not in right]
            terms = [(1 - row[j] + row[k]).clamp(min=0) for j in right for k in wrong]
            losses.append((torch.stack(terms).sum() if terms else row.sum() * 0) / 3)
        return reduced(torch.stack(losses), r)

    def several(x: Tensor) -> Tensor:
        return F.multilabel_margin_loss(x, LABELS, reduction=r)

    yield Case(f"multilabel_margin {r}", several, [(4, 3)], label, reference=margins)
    yield Case(
        f"ctc {r}",
        lambda x: F.ctc_loss(x, SEQUENCES, LENGTHS.tolist(), TARGET_LENGTHS.tolist(), reduction=r),
        [STEPS.log_softmax(-1)],
        ["CtcLossBackward0"],
        reference=lambda x: ctc_by_hand(x, r),
    )


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def ctc_by_hand(x: Tensor, reduction: str) -> Tensor:
    """Minus the logarithm of the sum over all alignments, plus that of the normaliser, as torch's gradient has it."""
    losses = []
    for n in range(3):
        length, labels = int(LENGTHS[n]), SEQUENCES[n][: TARGET_LENGTHS[n]].tolist()
        alignments = [
            torch.stack([x[t, n, k] for t, k in enumerate(steps)]).sum()
            for steps in itertools.product(range(3), repeat=length)
            if [k for k, _ in itertools.groupby(steps) if k] == labels
        ]
        losses.append(x[:length, n].logsumexp(-1).sum() - torch.stack(alignments).logsumexp(0))
    total = torch.stack(losses)
    return (total / TARGET_LENGTHS).mean() if reduction == "mean" else reduced(total, reduction)


def cases_of_binary_cross_entropy() -> Iterator[Case]:
    """Also in the target, and where paths from one tensor meet in input and target."""
    plain, of_logits = F.binary_cross_entropy, F.binary_cross_entropy_with_logits
    for r in ("mean", "sum", "none"):
        for name, loss, node in (
            ("bce", lambda x, t, r=r: plain(x.sigmoid(), t, WEIGHT, reduction=r), "BinaryCrossEntropyBackward0"),
            (
                "bce with logits",
                lambda x, t, r=r: of_logits(x, t, WEIGHT, reduction=r, pos_weight=POSITIVE),
                "BinaryCrossEntropyWithLogitsBackward0",
            ),
        ):
            yield Case(f"{name} {r} of two inputs", loss, [(4, 3), PROBABILITY], [node])
            yield Case(f"{name} {r} of one input", lambda x, loss=loss: loss(x, x.sigmoid()), [(4, 3)], [node])


CASES = list(cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)
