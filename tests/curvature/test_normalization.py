"""Normalisation layers against dense derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check

MEAN, VARIANCE = torch.randn(3).double(), torch.rand(3).double() + 0.5


def batch_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


def batch_norm_eval(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, MEAN.to(x), VARIANCE.to(x), w, b, training=False)


def weight_norm(name: str, direction: tuple[int, ...], size: tuple[int, ...], dim: int) -> Case:
    """Torch's own takes the norm for a constant when it is differentiated twice."""
    dims = [d for d in range(len(direction)) if d != dim]

    def reference(v: Tensor, g: Tensor) -> Tensor:
        return g * v / v.square().sum(dims, keepdim=True).sqrt()

    return Case(
        name, lambda v, g: torch._weight_norm(v, g, dim), [direction, size], ["WeightNormInterfaceBackward0"],
        reference=reference,
    )  # fmt: skip


LAYER, GROUP, BATCH = ["NativeLayerNormBackward0"], ["NativeGroupNormBackward0"], ["NativeBatchNormBackward0"]
CASES = [
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)], LAYER),
    Case(
        "layer_norm of two dimensions",
        lambda x, w, b: F.layer_norm(x, (3, 4), w, b),
        [(2, 3, 4), (3, 4), (3, 4)],
        LAYER,
    ),
    Case("layer_norm of everything", lambda x, w, b: F.layer_norm(x, (4,), w, b), [(4,), (4,), (4,)], LAYER),
    Case("layer_norm without affine", lambda x: F.layer_norm(x, (4,)), [(2, 3, 4)], LAYER),
    Case("layer_norm without bias", lambda x, w: F.layer_norm(x, (4,), w), [(3, 4), (4,)], LAYER),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)], GROUP),
    Case("group_norm of images", lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 2, 2), (4,), (4,)], GROUP),
    Case("group_norm without affine", lambda x: F.group_norm(x, 2), [(2, 4, 2, 2)], GROUP),
    Case("batch_norm", batch_norm, [(5, 3), (3,), (3,)], BATCH),
    Case("batch_norm of images", batch_norm, [(2, 3, 2, 2), (3,), (3,)], BATCH),
    Case("batch_norm without affine", batch_norm, [(5, 3)], BATCH),
    Case("batch_norm in eval mode", batch_norm_eval, [(2, 3, 2, 2), (3,), (3,)], BATCH),
    Case("batch_norm in eval mode without affine", batch_norm_eval, [(5, 3)], BATCH),
    weight_norm("weight_norm of a matrix", (3, 4), (3, 1), 0),
    weight_norm("weight_norm of kernels", (3, 2, 2), (3, 1, 1), 0),
    weight_norm("weight_norm along the last dimension", (2, 3, 4), (1, 1, 4), 2),
    Case("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [(2, 3, 4), (3,), (3,)], BATCH),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


def fused_rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, [4], weight, 1e-5)[0]


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal if weight is None else normal * weight


def of_library(name: str, node: str, operation: Callable[..., Any], training: bool) -> Case:
    def batch_norm_of_library(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        statistics = (None, None) if training else (MEAN.to(x), VARIANCE.to(x))
        return operation(x, w, b, *statistics, training, 0.1, 1e-5)[0]

    reference = batch_norm if training else batch_norm_eval
    return Case(name, batch_norm_of_library, [(2, 3, 2, 2), (3,), (3,)], [node], reference=reference)


RMS = ["FusedRmsNormBackward0"]
OF_DEVICES = [
    Case("fused rms_norm", fused_rms_norm, [(3, 4), (4,)], RMS, reference=rms_norm),
    Case("fused rms_norm of one row", fused_rms_norm, [(4,), (4,)], RMS, reference=rms_norm),
    Case("fused rms_norm without weight", fused_rms_norm, [(2, 3, 4)], RMS, reference=rms_norm),
    of_library("batch_norm of cuDNN", "CudnnBatchNormBackward0", torch.cudnn_batch_norm, True),
    of_library("batch_norm of cuDNN in eval mode", "CudnnBatchNormBackward0", torch.cudnn_batch_norm, False),
    of_library("batch_norm of MIOpen", "MiopenBatchNormBackward0", torch.miopen_batch_norm, True),
    of_library("batch_norm of MIOpen in eval mode", "MiopenBatchNormBackward0", torch.miopen_batch_norm, False),
]


@pytest.mark.parametrize("case", OF_DEVICES, ids=lambda case: case.name)
def test_rule_of_another_device_equals_dense_derivatives(case: Case, device_kernels: None) -> None:
    check(case)
