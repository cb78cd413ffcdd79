"""Views, joins, splits, paddings and copies against dense derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import rnn

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, check, with_constants

aten = torch.ops.aten
MASK = torch.tensor([[True, False, True, False], [False, False, True, True], [False, True, False, False]])


def in_place(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Applies ``change`` to a tensor that is not a leaf."""
    return lambda x: change(x.clone())


def pad(mode: str, *sizes: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.pad(x, sizes, mode=mode)


VIEWS = [
    Case("view", lambda x: x.view(2, 6), [(3, 4)], ["ViewBackward0"]),
    Case("view copy", lambda x: torch.view_copy(x, (2, 6)), [(3, 4)], ["ViewBackward0_copy"]),
    Case("view of a number", lambda x: x.view(1, 1), [()], ["ViewBackward0"]),
    Case("reshape that copies", lambda x: x.t().reshape(12), [(3, 4)], ["UnsafeViewBackward0", "CloneBackward0"]),
    Case("reshape alias", lambda x: aten._reshape_alias(x, [12], [1]), [(3, 4)], ["ReshapeAliasBackward0"]),
    Case(
        "reshape alias copy",
        lambda x: torch._reshape_alias_copy(x, [12], [1]),
        [(3, 4)],
        ["ReshapeAliasBackward0_copy"],
    ),
    Case("reshape copy", lambda x: aten._reshape_copy(x, [12]), [(3, 4)], ["ReshapeCopyBackward0"]),
    Case("t", torch.t, [(3, 4)], ["TBackward0"]),
    Case("t of a vector", torch.t, [(3,)], ["TBackward0"]),
    Case("t copy", torch.t_copy, [(3, 4)], ["TBackward0_copy"]),
    Case("t in place", in_place(lambda x: x.t_()), [(3, 4)], ["TBackward1"]),
    Case("transpose", lambda x: x.transpose(0, 2), [(2, 3, 4)], ["TransposeBackward0"]),
    Case("transpose copy", lambda x: torch.transpose_copy(x, 0, -1), [(2, 3, 4)], ["TransposeBackward0_copy"]),
    Case("transpose in place", in_place(lambda x: x.transpose_(0, 1)), [(2, 3, 4)], ["TransposeBackward1"]),
    Case("mT", lambda x: x.mT, [(2, 3, 4)], ["TransposeBackward0"]),
    Case("permute", lambda x: x.permute(2, 0, 1), [(2, 3, 4)], ["PermuteBackward0"]),
    Case("permute copy", lambda x: torch.permute_copy(x, (2, 0, 1)), [(2, 3, 4)], ["PermuteBackward0_copy"]),
    Case("movedim", lambda x: x.movedim(0, 2), [(2, 3, 4)], ["PermuteBackward0"]),
    Case("expand", lambda x: x.expand(2, 3, 4), [(3, 1)], ["ExpandBackward0"]),
    Case("expand copy", lambda x: torch.expand_copy(x, (2, 3, 4)), [(3, 1)], ["ExpandBackward0_copy"]),
    Case("expand a number", lambda x: x.expand(2, 3), [()], ["ExpandBackward0"]),
    Case("repeat", lambda x: x.repeat(2, 1, 3), [(3, 2)], ["RepeatBackward0"]),
    Case("repeat interleave", lambda x: x.repeat_interleave(3), [(4,)], ["ExpandBackward0", "CloneBackward0"]),
    Case("squeeze", lambda x: x.squeeze(), [(1, 3, 1)], ["SqueezeBackward0"]),
    Case("squeeze copy", torch.squeeze_copy, [(1, 3, 1)], ["SqueezeBackward0_copy"]),
    Case("squeeze in place", in_place(lambda x: x.squeeze_()), [(1, 3, 1)], ["SqueezeBackward3"]),
    Case("squeeze dim", lambda x: x.squeeze(-1), [(1, 3, 1)], ["SqueezeBackward1"]),
    Case("squeeze dim copy", lambda x: torch.squeeze_copy(x, -1), [(1, 3, 1)], ["SqueezeBackward1_copy"]),
    Case("squeeze dim in place", in_place(lambda x: x.squeeze_(-1)), [(1, 3, 1)], ["SqueezeBackward4"]),
    Case("squeeze dims", lambda x: x.squeeze((0, 2)), [(1, 3, 1)], ["SqueezeBackward2"]),
    Case("squeeze dims copy", lambda x: torch.squeeze_copy(x, (0, 2)), [(1, 3, 1)], ["SqueezeBackward2_copy"]),
    Case("squeeze dims in place", in_place(lambda x: aten.squeeze_.dims(x, (0, 2))), [(1, 3, 1)], ["SqueezeBackward5"]),
    Case("unsqueeze", lambda x: x.unsqueeze(-1), [(3, 4)], ["UnsqueezeBackward0"]),
    Case("unsqueeze copy", lambda x: torch.unsqueeze_copy(x, -1), [(3, 4)], ["UnsqueezeBackward0_copy"]),
    Case("unsqueeze in place", in_place(lambda x: x.unsqueeze_(-1)), [(3, 4)], ["UnsqueezeBackward1"]),
    Case("select", lambda x: x[:, -1], [(3, 4)], ["SelectBackward0"]),
    Case("select copy", lambda x: torch.select_copy(x, 1, -1), [(3, 4)], ["SelectBackward0_copy"]),
    Case("slice", lambda x: x[:, 1::2], [(3, 4)], ["SliceBackward0"]),
    Case("slice copy", lambda x: torch.slice_copy(x, 1, 1, None, 2), [(3, 4)], ["SliceBackward0_copy"]),
    Case("empty slice", lambda x: x[:, 4:], [(3, 4)], ["SliceBackward0"]),
    Case("narrow", lambda x: x.narrow(0, 1, 2), [(3, 4)], ["SliceBackward0"]),
    Case("narrow copy", lambda x: torch.narrow_copy(x, 0, 1, 2), [(3, 4)], ["NarrowCopyBackward0"]),
    Case("diagonal", lambda x: x.diagonal(1, 0, 2), [(3, 2, 4)], ["DiagonalBackward0"]),
    Case("diag", torch.diag, [(3, 3)], ["DiagonalBackward0_copy"]),
    Case("diag of a vector", torch.diag, [(3,)], ["DiagEmbedBackward0"]),
    Case("diag embed", lambda x: torch.diag_embed(x, 1), [(2, 3)], ["DiagEmbedBackward0"]),
    Case("trace", torch.trace, [(3, 4)], ["TraceBackward0"]),
    Case("windows that overlap", lambda x: x.unfold(1, 3, 1), [(2, 5)], ["UnfoldBackward0"]),
    Case("windows copy", lambda x: torch.unfold_copy(x, 1, 3, 2), [(2, 5)], ["UnfoldBackward0_copy"]),
    Case("as strided, overlapping", lambda x: x.as_strided((3, 2), (2, 1), 1), [(2, 4)], ["AsStridedBackward0"]),
    Case(
        "as strided copy",
        lambda x: torch.as_strided_copy(x, (3, 2), (2, 1)),
        [(2, 4)],
        ["AsStridedBackward0_copy"],
    ),
    Case("as strided in place", in_place(lambda x: x.as_strided_((3, 2), (2, 1))), [(2, 4)], ["AsStridedBackward1"]),
    Case("flip", lambda x: x.flip(0, 1), [(3, 4)], ["FlipBackward0"]),
    Case("roll", lambda x: x.roll((1, -2), (0, 1)), [(3, 4)], ["RollBackward0"]),
    Case("roll the flattened", lambda x: x.roll(5), [(3, 4)], ["RollBackward0"]),
    Case("rot90", lambda x: x.rot90(3, (0, 1)), [(3, 4)], ["Rot90Backward0"]),
    Case("tril", lambda x: x.tril(-1), [(3, 4)], ["TrilBackward0"]),
    Case("triu", lambda x: x.triu(1), [(2, 3, 4)], ["TriuBackward0"]),
    Case("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), [(1, 4, 2, 3)], ["PixelShuffleBackward0"]),
    Case("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), [(1, 1, 4, 6)], ["PixelUnshuffleBackward0"]),
    Case("channel shuffle", lambda x: F.channel_shuffle(x, 2), [(1, 4, 2, 3)], ["ChannelShuffleBackward0"]),
    Case("unfold", lambda x: F.unfold(x, 2, padding=1), [(1, 2, 2, 3)], ["Im2ColBackward0"]),
    Case("fold", lambda x: F.fold(x, (3, 4), 2), [(1, 4, 6)], ["Col2ImBackward0"]),
    Case("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij"), [(3,), (4,)], ["ExpandBackward0"]),
    Case("select's backward", lambda g: aten.select_backward(g, [3, 4], 1, 2), [(3,)], ["SelectBackwardBackward0"]),
    Case(
        "slice's backward", lambda g: aten.slice_backward(g, [3, 6], 1, 1, 6, 2), [(3, 3)], ["SliceBackwardBackward0"]
    ),
    Case(
        "diagonal's backward",
        lambda g: aten.diagonal_backward(g, [3, 4], 1, 0, 1),
        [(3,)],
        ["DiagonalBackwardBackward0"],
    ),
    Case("unfold's backward", lambda g: aten.unfold_backward(g, [5], 0, 3, 1), [(3, 3)], ["UnfoldBackwardBackward0"]),
]

PADS = [
    Case("pad", lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), [(2, 3)], ["ConstantPadNdBackward0"]),
    Case("pad that crops", lambda x: F.pad(x, (-1, 2)), [(2, 3)], ["ConstantPadNdBackward0"]),
    Case("reflect 1-d", pad("reflect", 1, 2), [(2, 2, 4)], ["ReflectionPad1DBackward0"]),
    Case("reflect without batch", pad("reflect", 2, 2), [(2, 4)], ["ReflectionPad1DBackward0"]),
    Case("reflect 2-d", pad("reflect", 1, 2, 0, 1), [(1, 2, 2, 3)], ["ReflectionPad2DBackward0"]),
    Case("reflect 3-d", pad("reflect", 1, 1, 0, 1, 1, 1), [(1, 1, 2, 2, 2)], ["ReflectionPad3DBackward0"]),
    Case("replicate 1-d", pad("replicate", 1, 2), [(2, 2, 4)], ["ReplicationPad1DBackward0"]),
    Case("replicate that crops", pad("replicate", -1, 2), [(2, 2, 4)], ["ReplicationPad1DBackward0"]),
    Case("replicate 2-d", pad("replicate", 1, 2, 0, 1), [(2, 2, 3, 4)], ["ReplicationPad2DBackward0"]),
    Case("replicate 3-d", pad("replicate", 1, 1, 0, 1, 1, 1), [(1, 2, 2, 2, 2)], ["ReplicationPad3DBackward0"]),
    Case("circular 1-d", pad("circular", 1, 2), [(2, 2, 4)], ["torch::autograd::CopySlices"]),
    Case("circular 2-d", pad("circular", 1, 2, 0, 1), [(1, 2, 3, 4)], ["torch::autograd::CopySlices"]),
    Case("circular 3-d", pad("circular", 1, 1, 0, 1, 1, 1), [(1, 1, 2, 3, 2)], ["torch::autograd::CopySlices"]),
]

PARTS = [
    Case("unbind", lambda x: x.unbind(1), [(2, 3)], ["UnbindBackward0"]),
    Case("unbind copy", torch.unbind_copy, [(2, 3)], ["UnbindBackward0_copy"]),
    Case("one of unbind", lambda x: x.unbind(1)[2], [(2, 3)], ["UnbindBackward0"]),
    Case("split", lambda x: x.split(2, 1), [(2, 5)], ["SplitBackward0"]),
    Case("split copy", lambda x: torch.split_copy(x, 2, 1), [(2, 5)], ["SplitBackward0_copy"]),
    Case("split in one", lambda x: x.split(5, 1), [(2, 5)], ["SplitBackward0"]),
    Case("one of split", lambda x: x.split(2, 1)[1], [(2, 5)], ["SplitBackward0"]),
    Case("split in sizes", lambda x: x.split([1, 3, 1], 1), [(2, 5)], ["SplitWithSizesBackward0"]),
    Case("two of split in sizes", lambda x: x.split([1, 3, 1], 1)[1:], [(2, 5)], ["SplitWithSizesBackward0"]),
    Case(
        "split in sizes copy",
        lambda x: torch.split_with_sizes_copy(x, [1, 3, 1], 1),
        [(2, 5)],
        ["SplitWithSizesBackward0_copy"],
    ),
    Case("unsafe split", lambda x: torch.unsafe_split(x, 2, 1), [(2, 5)], ["UnsafeSplitBackward0"]),
    Case(
        "unsafe split in sizes",
        lambda x: torch.unsafe_split_with_sizes(x, [1, 4], 1),
        [(2, 5)],
        ["UnsafeSplitWithSizesBackward0"],
    ),
    Case("chunk", lambda x: x.chunk(3, 1), [(2, 5)], ["SplitBackward0"]),
    Case("tensor split", lambda x: x.tensor_split(3, 1), [(2, 5)], ["SliceBackward0"]),
    Case("part and whole", lambda x: (x.chunk(2)[0], x), [(4, 2)], ["SplitBackward0"]),
]

JOINS = [
    Case("cat", lambda x, y: torch.cat([x, y], 1), [(2, 3), (2, 1)], ["CatBackward0"]),
    Case("cat of one", lambda x: torch.cat([x]), [(2, 3)], ["CatBackward0"]),
    Case("cat of one tensor twice", lambda x: torch.cat([x, x]), [(2, 3)], ["CatBackward0"]),
    Case("cat with a constant", lambda x: torch.cat([torch.ones(1, 3), x]), [(2, 3)], ["CatBackward0"]),
    Case("cat with nothing", lambda x: torch.cat([torch.empty(0), x]), [(2, 3)], ["CatBackward0"]),
    Case("stack", lambda x, y: torch.stack([x, y], -1), [(2, 3), (2, 3)], ["StackBackward0"]),
    Case("column stack", lambda x, y: torch.column_stack([x, y]), [(2,), (2, 3)], ["CatBackward0"]),
    Case("block diagonal", torch.block_diag, [(2, 3), (1, 2)], ["BlockDiagBackward0"]),
    Case("block diagonal of a vector", torch.block_diag, [(3,), (2, 2)], ["BlockDiagBackward0"]),
    Case("block diagonal of numbers", torch.block_diag, [(), (2,), ()], ["BlockDiagBackward0"]),
    Case("block diagonal of one vector", torch.block_diag, [(3,)], ["BlockDiagBackward0"]),
    Case(
        "diagonal scatter", lambda x, y: torch.diagonal_scatter(x, y, 1), [(3, 3), (2,)], ["DiagonalScatterBackward0"]
    ),
    Case(
        "slice scatter",
        lambda x, y: torch.slice_scatter(x, y, 0, 0, 3, 2),
        [(3, 3), (2, 3)],
        ["SliceScatterBackward0"],
    ),
    Case("select scatter", lambda x, y: torch.select_scatter(x, y, 1, 2), [(2, 3), (2,)], ["SelectScatterBackward0"]),
    Case(
        "as strided scatter",
        lambda x, y: torch.as_strided_scatter(x, y, (2,), (2,), 1),
        [(2, 3), (2,)],
        ["AsStridedScatterBackward0"],
    ),
    Case(
        "pack a padded sequence",
        lambda x: rnn.pack_padded_sequence(x, torch.tensor([3, 2])).data,
        [(4, 2, 2)],
        ["PackPaddedSequenceBackward0"],
    ),
    Case(
        "pack a padded sequence, batch first",
        lambda x: rnn.pack_padded_sequence(x, torch.tensor([1, 4]), batch_first=True, enforce_sorted=False).data,
        [(2, 4, 2)],
        ["PackPaddedSequenceBackward0"],
    ),
    Case(
        "pad a packed sequence",
        lambda x: rnn.pad_packed_sequence(rnn.pack_padded_sequence(x, torch.tensor([3, 2])))[0],
        [(4, 2, 2)],
        ["torch::autograd::CopySlices"],
    ),
    Case("pad sequences", lambda x, y: rnn.pad_sequence([x, y]), [(3, 2), (1, 2)], ["torch::autograd::CopySlices"]),
]


def copied(x: Tensor) -> Tensor:
    return torch.empty(3, 4, dtype=x.dtype).copy_(x)


COPIES = [
    Case("clone", torch.clone, [(3, 4)], ["CloneBackward0"]),
    Case("contiguous", lambda x: x.t().contiguous(), [(3, 4)], ["CloneBackward0"]),
    Case("lazy clone", torch._lazy_clone, [(3, 4)], ["LazyCloneBackward0"]),
    Case("alias", aten.alias, [(3, 4)], ["AliasBackward0"]),
    Case("alias copy", torch.alias_copy, [(3, 4)], ["AliasBackward0_copy"]),
    Case("lift", in_place(aten.lift), [(3, 4)], ["LiftBackward0"]),
    Case("lift fresh", in_place(aten.lift_fresh), [(3, 4)], ["LiftFreshBackward0"]),
    Case("lift fresh copy", aten.lift_fresh_copy, [(3, 4)], ["LiftFreshBackward0_copy"]),
    Case("channels last", lambda x: x.to(memory_format=torch.channels_last), [(2, 3, 2, 2)], ["ToCopyBackward0"]),
    Case("copy", copied, [(3, 4)], ["torch::autograd::CopyBackwards"]),
    Case("copy that broadcasts", copied, [(3, 1)], ["torch::autograd::CopyBackwards"]),
    Case("copy over", lambda x, y: x.clone().copy_(y), [(3, 4), (4,)], ["torch::autograd::CopyBackwards"]),
    Case("fill", lambda x: torch.fill(x, 2.0), [(3, 4)], ["FillBackward0"]),
    Case("fill with a tensor", torch.fill, [(3, 4), ()], ["FillBackward1"]),
    Case("fill in place", in_place(lambda x: x.fill_(2.0)), [(3, 4)], ["FillBackward2"]),
    Case("fill with a tensor in place", lambda x, v: x.clone().fill_(v), [(3, 4), ()], ["FillBackward3"]),
    Case("zero in place", in_place(lambda x: x.zero_()), [(3, 4)], ["ZeroBackward0"]),
    Case("masked fill", lambda x: x.masked_fill(MASK, 2.0), [(3, 4)], ["MaskedFillBackward0"]),
    Case("masked fill, broadcast mask", lambda x: x.masked_fill(MASK[0], 2.0), [(3, 4)], ["MaskedFillBackward0"]),
    Case("masked fill, broadcast input", lambda x: x.masked_fill(MASK, 2.0), [(4,)], ["MaskedFillBackward0"]),
    Case("masked fill with a tensor", lambda x, v: x.masked_fill(MASK, v), [(3, 4), ()], ["MaskedFillBackward1"]),
]


@pytest.mark.parametrize("case", [*VIEWS, *PADS, *PARTS, *JOINS, *COPIES], ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


def test_transpose_that_is_asked_for_itself_gets_a_diagonal() -> None:
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inner = w.t()
    outer = inner.t()
    backward((torch.randn(4, 2, dtype=torch.float64) @ outer).tanh().sum(), [w, inner])
    torch.testing.assert_close(inner.hess_diag, w.hess_diag.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("through", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_casts_do_not_round_the_curvature_to_half_precision(dtype: torch.dtype, through: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    h = torch.tensor([1.001, 3.003])
    backward((x.to(through).double().square() * h / 2).sum())
    assert x.hess_diag.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(x.hess_diag.float(), h)


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_join_of_mixed_precision_gives_each_input_its_own(join: Callable[[list[Tensor]], Tensor]) -> None:
    w = torch.tensor([[1.0, 2.0]], requires_grad=True)
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    backward(join([w @ torch.eye(2), x]).pow(3).sum())  # the product needs curvature in single precision
    torch.testing.assert_close(w.hess_diag, 6 * w.detach())
    torch.testing.assert_close(x.hess_diag, 6 * x.detach())


@pytest.mark.parametrize(
    "fill",
    [
        lambda x, v: x.clone().fill_(v),
        lambda x, v: x.masked_fill(torch.tensor([True, True]), v),
        lambda x, v: x.index_fill(0, torch.tensor([0, 1]), v),
    ],
)
def test_value_of_another_precision_gets_its_own(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor(2.0, requires_grad=True)
    y = fill(w, v * torch.ones(()))
    backward(y.pow(3).sum())
    torch.testing.assert_close(v.hess_diag, torch.tensor(24.0))


@pytest.mark.parametrize("case", VIEWS[:3], ids=lambda case: case.name)
def test_single_precision(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_of_channels_last_in_single_precision(mode: str) -> None:
    def operation(x: Tensor) -> Tensor:
        return F.pad(x.to(memory_format=torch.channels_last), (1, 1, 0, 1), mode=mode)

    check(Case("channels last", operation, [(1, 2, 2, 3)]), torch.float32)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_tensors_without_entries(shape: tuple[int, int]) -> None:
    check(Case("views", lambda x: torch.cat([x.t(), x.t()]).view(-1), [shape], ["CatBackward0", "ViewBackward0"]))


@pytest.mark.parametrize("case", with_constants(JOINS), ids=lambda case: case.name)
def test_rule_with_constant_operands(case: Case) -> None:
    check(case)
