"""Convolutions against dense derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, check, with_constants

aten = torch.ops.aten
NODE = ["ConvolutionBackward0"]


def conv1d(**settings: Any) -> Any:
    return lambda *tensors: F.conv1d(*tensors, **settings)


def conv2d(**settings: Any) -> Any:
    return lambda *tensors: F.conv2d(*tensors, **settings)


def conv_transpose2d(**settings: Any) -> Any:
    return lambda *tensors: F.conv_transpose2d(*tensors, **settings)


CASES = [
    Case("1-d", F.conv1d, [(2, 2, 5), (3, 2, 3), (3,)], NODE),
    Case("1-d without bias", F.conv1d, [(2, 2, 5), (3, 2, 3)], NODE),
    Case("1-d without batch", F.conv1d, [(2, 5), (3, 2, 3), (3,)], NODE),
    Case("1-d same", conv1d(padding="same"), [(1, 2, 4), (2, 2, 3), (2,)], NODE),
    Case("1-d same, even kernel", conv1d(padding="same"), [(1, 2, 4), (2, 2, 2), (2,)], NODE),
    Case("1-d causal", lambda x, w: F.conv1d(F.pad(x, (2, 0)), w), [(1, 2, 4), (2, 2, 3)], NODE),
    Case("2-d", F.conv2d, [(2, 2, 3, 4), (2, 2, 2, 2), (2,)], NODE),
    Case("2-d valid", conv2d(padding="valid"), [(1, 2, 3, 4), (2, 2, 2, 2), (2,)], NODE),
    Case("2-d stride and padding", conv2d(stride=2, padding=(1, 0)), [(1, 2, 4, 5), (2, 2, 3, 2), (2,)], NODE),
    Case("2-d dilation", conv2d(dilation=(2, 1)), [(1, 2, 4, 3), (2, 2, 2, 2), (2,)], NODE),
    Case("2-d same, dilated", conv2d(padding="same", dilation=2), [(1, 1, 3, 4), (2, 1, 2, 3), (2,)], NODE),
    Case("2-d groups", conv2d(groups=2), [(1, 4, 3, 3), (4, 2, 2, 2), (4,)], NODE),
    Case("2-d depthwise", conv2d(groups=3, padding=1), [(1, 3, 2, 3), (6, 1, 3, 3), (6,)], NODE),
    Case("2-d of one pixel", F.conv2d, [(2, 3, 2, 2), (2, 3, 1, 1), (2,)], NODE),
    Case("2-d without batch", F.conv2d, [(2, 3, 3), (2, 2, 2, 2), (2,)], NODE),
    Case("2-d of no images", F.conv2d, [(0, 2, 3, 3), (2, 2, 2, 2), (2,)], NODE),
    Case("3-d", F.conv3d, [(1, 2, 2, 3, 2), (2, 2, 2, 2, 2), (2,)], NODE),
    Case("3-d padding", lambda *t: F.conv3d(*t, padding=1, stride=2), [(1, 1, 2, 2, 3), (2, 1, 2, 3, 2), (2,)], NODE),
    Case("transposed 1-d", F.conv_transpose1d, [(2, 2, 3), (2, 3, 2), (3,)], NODE),
    Case("transposed 2-d", F.conv_transpose2d, [(1, 2, 2, 3), (2, 2, 2, 2), (2,)], NODE),
    Case(
        "transposed 2-d, all settings",
        conv_transpose2d(stride=2, padding=1, output_padding=1, dilation=(1, 2), groups=2),
        [(1, 4, 2, 2), (4, 1, 3, 2), (2,)],
        NODE,
    ),
    Case("transposed 3-d", F.conv_transpose3d, [(1, 2, 2, 2, 1), (2, 2, 2, 1, 2), (2,)], NODE),
    Case("weight is a view", lambda x, w: F.conv2d(x, w.view(2, 2, 2, 2)), [(1, 2, 3, 3), (16,)], NODE),
    Case("fixed weight", lambda x: F.conv2d(x, torch.ones(2, 2, 2, 2, dtype=x.dtype)), [(1, 2, 3, 3)], NODE),
    Case("fixed input", lambda w, b: F.conv2d(torch.ones(1, 2, 3, 3, dtype=w.dtype), w, b), [(2, 2, 2, 2), (2,)], NODE),
    Case(
        "traced",
        lambda x, w, b: aten._convolution(x, w, b, [1], [0], [1], False, [0], 1, False, False, False),
        [(1, 2, 4), (2, 2, 2), (2,)],
        ["ConvolutionBackward1"],
    ),
    Case("time, batch, channel", lambda *t: torch.conv_tbc(*t, 1), [(4, 2, 2), (3, 2, 2), (2,)], ["ConvTbcBackward0"]),
    Case(
        "slow 2-d",
        lambda x, w, b: aten.thnn_conv2d(x, w, [2, 2], b, [1, 2], [1, 0]),
        [(1, 2, 3, 4), (2, 2, 2, 2), (2,)],
        ["SlowConv2DBackward0"],
    ),
    Case(
        "slow 3-d",
        lambda x, w, b: aten.slow_conv3d(x, w, [2, 2, 1], b, [1, 1, 2]),
        [(1, 2, 2, 2, 2), (2, 2, 2, 2, 1), (2,)],
        ["SlowConv3DBackward0"],
    ),
    Case(
        "slow dilated 2-d",
        lambda x, w, b: aten.slow_conv_dilated2d(x, w, [2, 2], b, [1, 1], [0, 1], [2, 1]),
        [(1, 2, 4, 2), (2, 2, 2, 2), (2,)],
        ["SlowConvDilated2DBackward0"],
    ),
    Case(
        "slow dilated 3-d",
        lambda x, w, b: aten.slow_conv_dilated3d(x, w, [2, 1, 1], b, [1, 1, 1], [0, 0, 0], [2, 1, 1]),
        [(1, 2, 4, 2, 2), (2, 2, 2, 1, 1), (2,)],
        ["SlowConvDilated3DBackward0"],
    ),
    Case(
        "slow transposed 2-d",
        lambda x, w, b: aten.slow_conv_transpose2d(x, w, [2, 2], b, [2, 2], [1, 0], [1, 0], [1, 1]),
        [(1, 2, 2, 2), (2, 2, 2, 2), (2,)],
        ["SlowConvTranspose2DBackward0"],
    ),
    Case(
        "slow transposed 3-d",
        lambda x, w, b: aten.slow_conv_transpose3d(x, w, [2, 1, 1], b),
        [(1, 2, 2, 2, 1), (2, 2, 2, 1, 1), (2,)],
        ["SlowConvTranspose3DBackward0"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", with_constants(CASES), ids=lambda case: case.name)
def test_rule_with_constants_among_its_inputs(case: Case) -> None:
    check(case)


ONEDNN = [
    Case(
        "oneDNN by its name",
        lambda x, w, b: torch.mkldnn_convolution(x, w, b, (1, 0), (1, 2), (1, 1), 2),
        [(1, 4, 3, 4), (4, 2, 2, 2), (4,)],
        ["MkldnnConvolutionBackward0"],
    )
]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("case", ONEDNN, ids=lambda case: case.name)
def test_kernel_that_has_single_precision_only(case: Case) -> None:
    check(case, torch.float32)


def channels_last(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last), b, padding=1)


@pytest.mark.parametrize("operation", [F.conv2d, channels_last, conv2d(groups=2, stride=2)])
def test_single_precision(operation: Any) -> None:
    shapes = [(2, 4, 3, 4), (4, 2 if operation not in (F.conv2d, channels_last) else 4, 2, 2), (4,)]
    check(Case("single precision", operation, shapes, NODE), torch.float32)


def test_half_precision_is_raised_before_it_is_squared() -> None:
    """A weight of 2^-10 has a square that float16 rounds by a tenth, and 2^-13 one that it cannot hold."""
    x = torch.full((1, 1, 4), 3.0, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([2.0**-10, 2.0**-13], dtype=torch.float16, requires_grad=True)
    backward(F.conv1d(x, w.view(1, 1, 2)).float().square().sum())
    expected = 2 * torch.tensor([2.0**-20, 2.0**-20 + 2.0**-26, 2.0**-20 + 2.0**-26, 2.0**-26])
    torch.testing.assert_close(x.hess_diag.flatten(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(w.hess_diag, torch.full((2,), 2 * 3 * 9.0), rtol=1e-6, atol=0)


def test_bfloat16_autocast_carries_single_precision() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.conv2d(x, w)
    assert y.dtype is torch.bfloat16
    backward(y.float().square().sum() / 2)
    expected = torch.zeros_like(w, requires_grad=False)
    for i, row in enumerate(x.bfloat16().float().square().sum(0)):
        expected[:, i] = row.unfold(0, 3, 1).unfold(1, 3, 1).sum((0, 1))
    assert w.hess_diag.dtype is torch.float32
    torch.testing.assert_close(w.hess_diag, expected, rtol=1e-5, atol=1e-5)
