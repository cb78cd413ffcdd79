"""Normalisation layers against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.curvature.oracle import Case, check

MEAN, VARIANCE = torch.randn(3).double(), torch.rand(3).double() + 0.5


def batch_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


def batch_norm_eval(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, MEAN, VARIANCE, w, b, training=False)


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
    Case("instance_norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [(2, 3, 4), (3,), (3,)], BATCH),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)
