"""Operations that move entries about: views, joins, splits, paddings and copies.

Every output is a copy of one input entry, or a constant. The Jacobian's entries are 0 and 1, each its own square, so
``h_x = J^T h``: what the autograd node itself does to a gradient. Calling a node runs no hook and records no graph, and
it works after backward has passed if the node saved sizes only and no tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import HALF
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_aten = torch.ops.aten
_pack_padded_sequence_backward = _aten._pack_padded_sequence_backward.default
_pad_backward = {
    "ReflectionPad1DBackward0": _aten.reflection_pad1d_backward.default,
    "ReflectionPad2DBackward0": _aten.reflection_pad2d_backward.default,
    "ReflectionPad3DBackward0": _aten.reflection_pad3d_backward.default,
    "ReplicationPad1DBackward0": _aten.replication_pad1d_backward.default,
    "ReplicationPad2DBackward0": _aten.replication_pad2d_backward.default,
    "ReplicationPad3DBackward0": _aten.replication_pad3d_backward.default,
}


def by_node(op: Operation) -> Formula:
    """``J^T h`` by the autograd node, which must not have saved a tensor."""
    node = op.node
    if len(node.next_functions) > 1:
        formula: Formula = node  # returns a tuple already
        return formula
    return lambda h: (node(h),)


def with_stand_in(backward: Any, x: Tensor, *settings: Any) -> Formula:
    """``backward(h, x, *settings)``, for an operation that takes x only for its shape and memory format.

    An empty tensor of the same strides stands in for x, so that x need not be held. One of another memory format would
    make the operation several times slower.
    """
    shape, strides = x.shape, x.stride()
    return lambda h: (backward(h, h.new_empty_strided(shape, strides), *settings),)


def carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which curvature of a tensor of ``dtype`` is carried."""
    return torch.float32 if dtype in HALF else dtype


def signed(number: int) -> int:
    """A number as it was saved: nodes show negative ones as 64 bits without sign."""
    return number - 2**64 if number >= 2**63 else number


def dim_of(op: Operation) -> int:
    """The dimension that the operation works along."""
    return signed(op.node._saved_dim)


def as_inputs(op: Operation, formula: Formula) -> Formula:
    """``formula``, with each curvature in the dtype of its input where the operation promoted float32 to float64."""
    if op.node._input_metadata[0].dtype is not torch.float64:
        return formula
    dtypes = [carried(op.input_meta(i)[0]) if needed else torch.float64 for i, needed in enumerate(op.needs)]
    if all(dtype is torch.float64 for dtype in dtypes):
        return formula
    return lambda h: [r if r is None else r.to(dtype) for r, dtype in zip(formula(h), dtypes, strict=True)]


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
)(by_node)  # fmt: skip

register_rule("TraceBackward0")(by_node)  # a sum, of the entries on the diagonal


@register_rule(*_pad_backward, view=True)
def pad(op: Operation) -> Formula:
    """Reflection and replication; a border entry is the copy of one input entry."""
    padding = [signed(size) for size in op.node._saved_padding]  # negative where it crops
    return with_stand_in(_pad_backward[op.node.name()], op.node._saved_self, padding)


@register_rule("PackPaddedSequenceBackward0", view=True)
def pack_padded_sequence(op: Operation) -> Formula:
    """The node has saved a tensor, the number of sequences at each step."""
    shape, lengths = op.node._saved_input_sym_sizes, op.node._saved_result1
    batch_first = op.node._saved_batch_first
    return lambda h: (_pack_padded_sequence_backward(h, shape, lengths, batch_first),)


# -- one tensor into several, several into one -----------------------------------------------------------------------


@register_rule(
    "SplitBackward0", "SplitBackward0_copy", "SplitWithSizesBackward0", "SplitWithSizesBackward0_copy",
    "UnbindBackward0", "UnbindBackward0_copy", "UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0",
    multi_output=True, view=True,
)  # fmt: skip
def split(op: Operation) -> Formula:
    """A part from which no curvature arrived is None, which the node takes for zeros."""
    node = op.node
    return lambda h: (node(*h),)


@register_rule(
    "AsStridedScatterBackward0", "BlockDiagBackward0", "CatBackward0", "DiagonalScatterBackward0",
    "SelectScatterBackward0", "SliceScatterBackward0", "StackBackward0",
)  # fmt: skip
def join(op: Operation) -> Formula:
    """Each input takes its part of h."""
    return as_inputs(op, by_node(op))


# -- copies and casts ------------------------------------------------------------------------------------------------


@register_rule(
    "AliasBackward0", "AliasBackward0_copy", "CloneBackward0", "LazyCloneBackward0", "LiftBackward0",
    "LiftFreshBackward0", "LiftFreshBackward0_copy",
    view=True,
)  # fmt: skip
def identity(op: Operation) -> Formula:
    """``y = x``."""
    return lambda h: (h,)


@register_rule("ToCopyBackward0", view=True)
def to_copy(op: Operation) -> Formula:
    """``h``, in the dtype and on the device of the input, but never in half precision, as the node would have it."""
    dtype, device = op.input_meta(0)
    dtype = carried(dtype)
    if not dtype.is_floating_point:
        raise op.unsupported(f"a cast of a {dtype} tensor carries no real curvature")
    return lambda h: (h.to(device, dtype),)


@register_rule("torch::autograd::CopyBackwards", view=True)
def copy(op: Operation) -> Formula:
    """``y.copy_(x)``: nothing is left of y, and x may have been broadcast."""
    if not op.needs[1]:
        return lambda h: (None, None)
    dtype, device = op.input_meta(1)
    dtype, shape = carried(dtype), op.input_shape(1)
    return lambda h: (None, h.to(device, dtype).sum_to_size(shape))


@register_rule("FillBackward0", "FillBackward2", "ZeroBackward0")
def fill(op: Operation) -> Formula:
    """Nothing is left of x."""
    return lambda h: (None,)


@register_rule("FillBackward1", "FillBackward3")
def fill_with_tensor(op: Operation) -> Formula:
    """Nothing is left of x, and every output is the value."""
    return lambda h: (None, h.sum())


@register_rule("MaskedFillBackward0", view=True)
def masked_fill(op: Operation) -> Formula:
    """``y = x`` where the mask is False, else a number; x may have been broadcast."""
    mask, shape = op.node._saved_mask, op.input_shape(0)
    return lambda h: (h.masked_fill(mask, 0).sum_to_size(shape),)


@register_rule("MaskedFillBackward1", view=True)
def masked_fill_with_tensor(op: Operation) -> Formula:
    """``y = x`` where the mask is False, else a tensor with one element; x may have been broadcast."""
    mask, (need_x, need_value) = op.node._saved_mask, op.needs
    shape = op.input_shape(0) if need_x else torch.Size()

    def formula(h: Tensor) -> Diagonals:
        return (
            h.masked_fill(mask, 0).sum_to_size(shape) if need_x else None,
            torch.where(mask, h, 0).sum() if need_value else None,
        )

    return formula
