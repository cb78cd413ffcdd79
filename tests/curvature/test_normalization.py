"""Normalisation layers against dense derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import exact_local_diag
from hesscale_lightning.curvature.registry import Operation
from hesscale_lightning.curvature.rules import normalization
from tests.curvature.oracle import Case, check

MEAN, VARIANCE = torch.randn(3).double(), torch.rand(3).double() + 0.5


def batch_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


def batch_norm_eval(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, MEAN, VARIANCE, w, b, training=False)


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


class FusedRmsNorm:
    """Stands for the node that torch makes on other devices; on the CPU it composes the operation."""

    def __init__(self, x: Tensor, weight: Tensor | None) -> None:
        self._saved_input, self._saved_weight, self._saved_normalized_shape = x, weight, [4]
        self._saved_result1 = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize(("with_g", "with_h"), [(1, 1), (1, 0), (0, 1)])
def test_formula_of_fused_rms_norm_equals_dense_derivatives(with_g: int, with_h: int, with_weight: bool) -> None:
    x, w, g, h = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (4,), (3, 4), (3, 4)))
    inputs = [x, w] if with_weight else [x]
    expected = exact_local_diag(lambda x, w=None: F.rms_norm(x, (4,), w, eps=1e-5), inputs, [g * with_g], [h * with_h])
    node = FusedRmsNorm(x, w if with_weight else None)
    operation = Operation(node, (), [True, with_weight], [False, False], "hesscale", True)
    found = normalization.rms_norm(operation)(g if with_g else None, h if with_h else None)
    for f, e in zip(found, expected, strict=False):
        torch.testing.assert_close(torch.zeros_like(e) if f is None else f, e, rtol=1e-9, atol=1e-12)
