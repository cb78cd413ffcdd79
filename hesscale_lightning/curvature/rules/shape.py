"""Operations that move entries about: views, joins, splits, paddings and copies.

Every output is a copy of one input entry, or a constant. The Jacobian's entries are 0 and 1, each its own square, so
``h_x = J^T h``: what the autograd node itself does to a gradient. Calling a node runs no hook and records no graph, and
it works after backward has passed if the node saved sizes only and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hesscale_lightning.curvature.elementwise import fitted
from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import ZERO, Value

_aten = torch.ops.aten
_pack_padded_sequence_backward = _aten._pack_padded_sequence_backward.default
_pad_backward = {
    f"{kind}Pad{n}DBackward0": getattr(_aten, f"{kind.lower()}_pad{n}d_backward").default
    for kind in ("Reflection", "Replication")
    for n in (1, 2, 3)
}


def transposed(op: Operation, h: Value) -> Value:
    """``J^T h`` by the autograd node."""
    return op.backward(h)


register_rule(
    "AsStridedBackward0", "AsStridedBackward0_copy", "AsStridedBackward1", "ChannelShuffleBackward0", "Col2ImBackward0",
    "ConstantPadNdBackward0", "DiagEmbedBackward0", "DiagonalBackward0", "DiagonalBackward0_copy",
    "DiagonalBackwardBackward0", "ExpandBackward0", "ExpandBackward0_copy", "FlipBackward0", "Im2ColBackward0",
    "NarrowCopyBackward0", "PermuteBackward0", "PermuteBackward0_copy", "PixelShuffleBackward0",
    "PixelUnshuffleBackward0", "RepeatBackward0", "ReshapeAliasBackward0", "ReshapeAliasBackward0_copy",
    "ReshapeCopyBackward0", "RollBackward0", "Rot90Backward0", "SelectBackward0", "SelectBackward0_copy",
    "SelectBackwardBackward0", "SliceBackward0", "SliceBackward0_copy", "SliceBackwardBackward0", "SqueezeBackward0",
    "SqueezeBackward0_copy", "SqueezeBackward1", "SqueezeBackward1_copy", "SqueezeBackward2", "SqueezeBackward2_copy",
    "SqueezeBackward3", "SqueezeBackward4", "SqueezeBackward5", "TBackward0", "TBackward0_copy", "TBackward1",
    "TransposeBackward0", "TransposeBackward0_copy", "TransposeBackward1", "TrilBackward0", "TriuBackward0",
    "UnfoldBackward0", "UnfoldBackward0_copy", "UnfoldBackwardBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0",
    "UnsqueezeBackward0_copy", "UnsqueezeBackward1", "ViewBackward0", "ViewBackward0_copy",
    view=True,
)(transposed)  # fmt: skip

register_rule("TraceBackward0")(transposed)  # a sum, of the entries on the diagonal


@register_rule(*_pad_backward, view=True)
def pad(op: Operation, h: Value) -> Value:
    """Reflection and replication; a border entry is the copy of one input entry."""
    # Of x only the shape and the memory format count. Sizes are negative where the padding crops.
    return _pad_backward[op.name](h, op.input(0, "self"), op.number("padding"))


@register_rule("PackPaddedSequenceBackward0", view=True)
def pack_padded_sequence(op: Operation, h: Value) -> Value:
    """The node has saved a tensor, the number of sequences at each step."""
    shape, lengths = op.number("input_sym_sizes"), op.tensor("result1")
    return _pack_padded_sequence_backward(h, shape, lengths, op.number("batch_first"))


# -- one tensor into several, several into one -----------------------------------------------------------------------


@register_rule(
    "SplitBackward0", "SplitBackward0_copy", "SplitWithSizesBackward0", "SplitWithSizesBackward0_copy",
    "UnbindBackward0", "UnbindBackward0_copy", "UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0",
    multi_output=True, view=True,
)  # fmt: skip
def split(op: Operation, h: Sequence[Value]) -> Value:
    """A part from which no curvature arrived is ``ZERO``, which the node takes for zeros."""
    return op.backward(*h)


@register_rule(
    "AsStridedScatterBackward0", "BlockDiagBackward0", "CatBackward0", "DiagonalScatterBackward0",
    "SelectScatterBackward0", "SliceScatterBackward0", "StackBackward0",
)  # fmt: skip
def join(op: Operation, h: Value) -> Sequence[Value]:
    """Each input takes its part of h, in its own dtype and shape (block_diag makes matrices of vectors)."""
    parts = op.backward(h)
    parts = parts if len(op.needs) > 1 else [parts]
    return [fitted(op, i, part) if op.need(i) else None for i, part in enumerate(parts)]


# -- copies and casts ------------------------------------------------------------------------------------------------


@register_rule(
    "AliasBackward0", "AliasBackward0_copy", "CloneBackward0", "LazyCloneBackward0", "LiftBackward0",
    "LiftFreshBackward0", "LiftFreshBackward0_copy",
    view=True,
)  # fmt: skip
def identity(op: Operation, h: Value) -> Value:
    """``y = x``."""
    return h


def _real(op: Operation) -> None:
    dtype, _ = op.input_meta(0)
    if not dtype.is_floating_point:
        raise op.unsupported(f"a cast of a {dtype} tensor carries no real curvature")


@register_rule("ToCopyBackward0", view=True, check=_real)
def to_copy(op: Operation, h: Value) -> Value:
    """``h``, in the dtype and on the device of the input, but never in half precision, as the node would have it."""
    _, device = op.input_meta(0)
    return h.to(device, op.input_dtype(0))


@register_rule("torch::autograd::CopyBackwards", view=True)
def copy(op: Operation, h: Value) -> Sequence[Value]:
    """``y.copy_(x)``: nothing is left of y, and x may have been broadcast."""
    if not op.need(1):
        return ZERO, ZERO
    _, device = op.input_meta(1)
    return ZERO, h.to(device, op.input_dtype(1)).sum_to_size(op.input_shape(1))


@register_rule("FillBackward0", "FillBackward2", "ZeroBackward0")
def fill(op: Operation, h: Value) -> Value:
    """Nothing is left of x."""
    return ZERO


@register_rule("FillBackward1", "FillBackward3")
def fill_with_tensor(op: Operation, h: Value) -> Sequence[Value]:
    """Nothing is left of x, and every output is the value."""
    return ZERO, fitted(op, 1, h.sum()) if op.need(1) else ZERO


@register_rule("MaskedFillBackward0", "MaskedFillBackward1", view=True)
def masked_fill(op: Operation, h: Value) -> Sequence[Value]:
    """``y = x`` where the mask is False, else a number, or a tensor with one element; x may have been broadcast."""
    mask = op.tensor("mask")
    return (
        h.masked_fill(mask, 0).sum_to_size(op.input_shape(0)) if op.need(0) else ZERO,
        fitted(op, 1, torch.where(mask, h, 0).sum()) if op.need(1) else ZERO,
    )[: len(op.needs)]
