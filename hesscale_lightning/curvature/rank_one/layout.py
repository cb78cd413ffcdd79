"""Where a sample's entries lie in a tensor, and which operations keep samples apart.

In row-major order entry ``k`` of a tensor belongs to sample ``(k // inner) % samples``: ``inner`` neighbours belong
together, which takes in a batch in the first dimension as well as one behind time steps. A view keeps that order, so it
keeps samples apart whatever it does; an operation that acts along the dimensions from ``d`` on keeps them apart if each
block of its output behind these dimensions belongs to one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import Rule
from hesscale_lightning.curvature.rules.reduction import reduced_dims

#: The first dimension that an operation acts along, for its input ``i``; None: samples may mix.
FirstDim = Callable[[Operation, int], int | None]

_first_dims: dict[str, FirstDim] = {}

#: Entries stay in row-major order.
ORDER_KEEPING = frozenset(
    {
        "AliasBackward0", "BackwardHookFunctionBackward", "CloneBackward0", "LazyCloneBackward0", "LiftBackward0",
        "LiftFreshBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2",
        "SqueezeBackward3", "SqueezeBackward4", "SqueezeBackward5", "ToCopyBackward0", "UnsafeViewBackward0",
        "UnsqueezeBackward0", "UnsqueezeBackward1", "ViewBackward0", "_DDPSinkBackward",
    }
)  # fmt: skip

#: Losses entry by entry that have no partials, and other operations entry by entry, with broadcasting.
ENTRYWISE = frozenset(
    {
        "HuberLossBackward0", "MseLossBackward0", "SmoothL1LossBackward0", "SoftMarginLossBackward0",
        "ExpandBackward0", "MaskedFillBackward0", "WhereBackward0",
    }
)  # fmt: skip

_PERMUTES = frozenset({"PermuteBackward0", "TransposeBackward0", "TransposeBackward1"})


def _acts_from(*names: str) -> Callable[[FirstDim], FirstDim]:
    def register(first: FirstDim) -> FirstDim:
        _first_dims.update(dict.fromkeys(names, first))
        return first

    return register


@_acts_from(
    "CatBackward0", "CumsumBackward0", "GatherBackward0", "GluBackward0", "IndexSelectBackward0", "KthvalueBackward0",
    "LogSoftmaxBackward0", "MaxBackward0", "MinBackward0", "SafeSoftmaxBackward0", "SelectBackward0", "SliceBackward0",
    "SoftmaxBackward0", "SortBackward0", "SplitBackward0", "SplitWithSizesBackward0", "TopkBackward0",
    "UnbindBackward0", "UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0",
)  # fmt: skip
def _along_dim(op: Operation, i: int) -> int | None:
    return int(op.number("dim")) % max(len(op.input_shape(i)), 1)


@_acts_from("StackBackward0")
def _stacks(op: Operation, _: int) -> int | None:
    return int(op.number("dim")) % len(op.output_shape())


@_acts_from(
    "AmaxBackward0", "AminBackward0", "LogsumexpBackward0", "MeanBackward0", "MeanBackward1", "StdBackward0",
    "SumBackward0", "SumBackward1", "VarBackward0",
)  # fmt: skip
def _along_dims(op: Operation, i: int) -> int | None:
    rank = len(op.input_shape(i))
    if op.name in ("MeanBackward0", "SumBackward0"):
        return 0
    return min(reduced_dims(op.number("dim"), rank), default=0)


#: Those that act along one dimension; of the others, what lies behind the first is not left as it is.
_ONE_DIM = frozenset(_first_dims)


@_acts_from("FusedRmsNormBackward0", "NativeLayerNormBackward0")
def _normalizes_last(op: Operation, i: int) -> int | None:
    return len(op.input_shape(0)) - len(op.number("normalized_shape")) if i == 0 else None


@_acts_from("NativeGroupNormBackward0")
def _normalizes_each(_: Operation, i: int) -> int | None:
    return 1 if i == 0 else None


@_acts_from("CudnnBatchNormBackward0", "NativeBatchNormBackward0")
def _normalizes_batch(op: Operation, i: int) -> int | None:
    """In eval mode the statistics are constants."""
    return None if i or op.number("training") else len(op.input_shape(0))


@_acts_from("ConvolutionBackward0", "ConvolutionBackward1", "MkldnnConvolutionBackward0", "MmBackward0", "MvBackward0")
def _rows_of_first(_: Operation, i: int) -> int | None:
    return 1 if i == 0 else None


@_acts_from("AddmmBackward0")
def _rows_of_second(op: Operation, i: int) -> int | None:
    return 1 if i == 1 else _broadcast_from(op, i) if i == 0 else None


@_acts_from("Im2ColBackward0", "NllLossBackward0", "NllLoss2DBackward0")
def _each(_: Operation, i: int) -> int | None:
    return 1 if i == 0 else None


@_acts_from("BmmBackward0")
def _each_product(_: Operation, __: int) -> int | None:
    return 1


@_acts_from(
    "AdaptiveAvgPool2DBackward0", "AdaptiveMaxPool2DBackward0", "AvgPool2DBackward0", "ConstantPadNdBackward0",
    "MaxPool2DWithIndicesBackward0", "ReflectionPad2DBackward0", "ReplicationPad2DBackward0",
    "UpsampleBilinear2DBackward0", "UpsampleNearest2DBackward0",
)  # fmt: skip
def _images(op: Operation, i: int) -> int | None:
    rank = len(op.input_shape(i))
    if op.name == "ConstantPadNdBackward0":
        return rank - len(op.number("pad")) // 2
    return rank - 2


@_acts_from(
    "ScaledDotProductCudnnAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductFlashAttentionBackward0", "ScaledDotProductFlashAttentionForCpuBackward0",
)  # fmt: skip
def _attends(op: Operation, i: int) -> int | None:
    return len(op.input_shape(i)) - 2 if i < 3 else None


def _broadcast_from(op: Operation, i: int) -> int:
    """The first dimension in which an operation entry by entry broadcasts the input or reduces the output."""
    return _first_difference(op.input_shape(i), op.output_shape())


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    return next((d for d in range(rank) if a[d] != b[d]), rank)


def is_entrywise(rule: Rule) -> bool:
    """Whether every output entry depends on one entry of each input, up to a sum over all output entries."""
    return rule.partials is not None or rule.name in ENTRYWISE


def inner_of_input(op: Operation, rule: Rule, i: int, samples: int, inner: int, output: int = 0) -> int | None:
    """How many neighbours belong to a sample in input ``i``, if they do in the output; None where samples may mix.

    Args:
        op: The operation.
        rule: Its rule.
        i: The input.
        samples: How many samples there are.
        inner: How many neighbours belong together in the output.
        output: Which output.
    """
    if samples == 1:  # nothing to mix
        return op.input_shape(i).numel()
    if op.transposed[i]:
        return None
    name = rule.name
    if name in ORDER_KEEPING:
        return inner
    entrywise = is_entrywise(rule)
    if rule.partials is not None and len(op.needs) == 1 and not rule.reduces:
        return inner
    before, after = op.input_shape(i), op.output_shape(output)
    if name in _PERMUTES:
        return _permuted(op, before, after, samples, inner)
    if entrywise:
        rank = max(len(before), len(after))
        before, after = _padded(before, rank), _padded(after, rank)
        first: int | None = _first_difference(before, after)
    else:
        find = _first_dims.get(name)
        first = None if find is None else find(op, i)
    if first is None or before[:first] != after[:first]:
        return None
    block = math.prod(after[first:])
    if block and inner % block == 0:
        return inner // block * math.prod(before[first:])
    # One dimension is acted along, taken away or put in, and the samples lie behind it.
    behind = before[first + (len(before) >= len(after)) :]
    if name in _ONE_DIM and behind == after[first + (len(after) >= len(before)) :]:
        return inner if math.prod(behind) % (samples * inner) == 0 else None
    return None


def _padded(shape: torch.Size, rank: int) -> torch.Size:
    return torch.Size((1,) * (rank - len(shape)) + tuple(shape))


def _permuted(op: Operation, before: torch.Size, after: torch.Size, samples: int, inner: int) -> int | None:
    """The part of the entries' numbers that counts the samples must stay together and in order."""
    rank = len(after)
    if op.name == "PermuteBackward0":
        order = [d % rank for d in op.number("dims")]
    else:
        order = list(range(rank))
        a, b = op.number("dim0") % rank, op.number("dim1") % rank
        order[a], order[b] = order[b], order[a]
    # What each dimension of the input is made of, as sizes; those that count samples are numbered from the last.
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
    behind, number = 1, 0
    for d in reversed(range(rank)):
        left = after[d]
        for limit, counts in ((inner, False), (inner * samples, True), (behind * left, False)):
            size = 1
            if limit > behind and left > 1:
                size = math.gcd(limit // behind, left) if limit % behind == 0 else 0
                if size != left and behind * size != limit:
                    return None  # samples begin within this dimension, and not at a divisor of its size
                number += counts
                pieces[order[d]].insert(0, (size, number if counts else 0))
                behind, left = behind * size, left // size
    flat = [piece for dimension in pieces for piece in dimension]
    places = [k for k, (_, counts) in enumerate(flat) if counts]
    if not places or math.prod(flat[k][0] for k in places) != samples:
        return None
    found = [flat[k][1] for k in range(places[0], places[-1] + 1)]
    if found != list(range(number, 0, -1)):
        return None
    return math.prod(size for size, _ in flat[places[-1] + 1 :])
