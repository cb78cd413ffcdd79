"""Pooling and resampling against dense derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscale_lightning.curvature import backward
from tests.curvature.oracle import Case, check

UNPOOL = torch.tensor([[[[0, 3], [8, 10]]]])
UNPOOL_3D = torch.tensor([[[[[0, 3]]], [[[2, 1]]]]])


def of_x(function: Any, *arguments: Any, **settings: Any) -> Any:
    return lambda x: function(x, *arguments, **settings)


def fractional(function: Any, dims: int) -> Any:
    samples = torch.tensor([[[0.3, 0.7, 0.4][:dims]] * 2], dtype=torch.float64)
    return lambda x: function(x, 2, output_size=2, _random_samples=samples)


MAX = [
    Case("max 1-d", of_x(F.max_pool1d, 2), [(1, 2, 6)], ["MaxPool2DWithIndicesBackward0"]),
    Case("max 2-d", of_x(F.max_pool2d, 2), [(2, 2, 4, 4)], ["MaxPool2DWithIndicesBackward0"]),
    Case("max 2-d, overlapping", of_x(F.max_pool2d, 3, stride=1), [(1, 1, 4, 5)], ["MaxPool2DWithIndicesBackward0"]),
    Case(
        "max 2-d, all settings",
        of_x(F.max_pool2d, (2, 3), stride=2, padding=1, dilation=(2, 1), ceil_mode=True),
        [(1, 2, 5, 4)],
        ["MaxPool2DWithIndicesBackward0"],
    ),
    Case("max 2-d, ties", of_x(F.max_pool2d, 2), [torch.ones(1, 1, 4, 4)], ["MaxPool2DWithIndicesBackward0"]),
    Case("max 2-d without batch", of_x(F.max_pool2d, 2), [(2, 4, 4)], ["MaxPool2DWithIndicesBackward0"]),
    Case("max 3-d", of_x(F.max_pool3d, 2, stride=1), [(1, 2, 2, 3, 3)], ["MaxPool3DWithIndicesBackward0"]),
    Case(
        "max 3-d, all settings",
        of_x(F.max_pool3d, 2, stride=(1, 2, 2), padding=(0, 1, 1), dilation=(1, 2, 1), ceil_mode=True),
        [(1, 1, 2, 3, 3)],
        ["MaxPool3DWithIndicesBackward0"],
    ),
    Case("adaptive max 1-d", of_x(F.adaptive_max_pool1d, 3), [(1, 2, 5)], ["AdaptiveMaxPool2DBackward0"]),
    Case("adaptive max 2-d", of_x(F.adaptive_max_pool2d, (3, 2)), [(1, 2, 5, 4)], ["AdaptiveMaxPool2DBackward0"]),
    Case("adaptive max 3-d", of_x(F.adaptive_max_pool3d, (1, 2, 2)), [(1, 2, 2, 3, 2)], ["AdaptiveMaxPool3DBackward0"]),
    Case(
        "fractional max 2-d", fractional(F.fractional_max_pool2d, 2), [(1, 2, 4, 4)], ["FractionalMaxPool2DBackward0"]
    ),
    Case(
        "fractional max 3-d",
        fractional(F.fractional_max_pool3d, 3),
        [(1, 2, 4, 4, 4)],
        ["FractionalMaxPool3DBackward0"],
    ),
    Case("unpool 1-d", of_x(F.max_unpool1d, UNPOOL[:, :, 0], 2), [(1, 1, 2)], ["MaxUnpool2DBackward0"]),
    Case("unpool 2-d", of_x(F.max_unpool2d, UNPOOL, 2), [(1, 1, 2, 2)], ["MaxUnpool2DBackward0"]),
    Case("unpool 2-d without batch", of_x(F.max_unpool2d, UNPOOL[0], 2), [(1, 2, 2)], ["MaxUnpool2DBackward0"]),
    Case("unpool 3-d", of_x(F.max_unpool3d, UNPOOL_3D, 2), [(1, 2, 1, 1, 2)], ["MaxUnpool3DBackward0"]),
    Case("unpool 3-d without batch", of_x(F.max_unpool3d, UNPOOL_3D[0], 2), [(2, 1, 1, 2)], ["MaxUnpool3DBackward0"]),
]

AVERAGE = [
    Case("average 1-d", of_x(F.avg_pool1d, 2), [(1, 2, 5)], ["AvgPool2DBackward0"]),
    Case("average 2-d", of_x(F.avg_pool2d, 2), [(2, 2, 4, 4)], ["AvgPool2DBackward0"]),
    Case("average 2-d, padded", of_x(F.avg_pool2d, (3, 2), 2, 1), [(1, 2, 4, 4)], ["AvgPool2DBackward0"]),
    Case(
        "average 2-d, padding not counted",
        of_x(F.avg_pool2d, 3, 2, 1, count_include_pad=False),
        [(1, 2, 4, 5)],
        ["AvgPool2DBackward0"],
    ),
    Case("average 2-d, ceil", of_x(F.avg_pool2d, 3, 2, 1, ceil_mode=True), [(1, 2, 4, 5)], ["AvgPool2DBackward0"]),
    Case(
        "average 2-d, ceil, padding not counted",
        of_x(F.avg_pool2d, 2, 2, 1, ceil_mode=True, count_include_pad=False),
        [(1, 2, 4, 5)],
        ["AvgPool2DBackward0"],
    ),
    Case(
        "average 2-d, divisor",
        of_x(F.avg_pool2d, 2, 2, 1, ceil_mode=True, divisor_override=3),
        [(1, 2, 4, 5)],
        ["AvgPool2DBackward0"],
    ),
    Case("average 2-d without batch", of_x(F.avg_pool2d, 2, 1), [(2, 3, 3)], ["AvgPool2DBackward0"]),
    Case("average 3-d", of_x(F.avg_pool3d, 2), [(1, 2, 2, 2, 4)], ["AvgPool3DBackward0"]),
    Case(
        "average 3-d, ceil, padding not counted",
        of_x(F.avg_pool3d, 2, 2, 1, ceil_mode=True, count_include_pad=False),
        [(1, 1, 2, 3, 2)],
        ["AvgPool3DBackward0"],
    ),
    Case(
        "average 2-d, negative divisor",
        of_x(F.avg_pool2d, 2, 1, divisor_override=-3),
        [(1, 1, 3, 3)],
        ["AvgPool2DBackward0"],
    ),
    Case(
        "average 3-d, divisor", of_x(F.avg_pool3d, 2, 1, divisor_override=5), [(1, 1, 2, 3, 3)], ["AvgPool3DBackward0"]
    ),
    Case("adaptive average 1-d", of_x(F.adaptive_avg_pool1d, 3), [(1, 2, 5)], ["AdaptiveAvgPool2DBackward0"]),
    Case("adaptive average 2-d", of_x(F.adaptive_avg_pool2d, (2, 3)), [(1, 2, 4, 5)], ["AdaptiveAvgPool2DBackward0"]),
    Case("adaptive average 2-d, even", of_x(F.adaptive_avg_pool2d, 2), [(1, 2, 4, 4)], ["AdaptiveAvgPool2DBackward0"]),
    Case(
        "adaptive average 2-d, both",
        of_x(F.adaptive_avg_pool2d, (3, 2)),
        [(1, 1, 5, 5)],
        ["AdaptiveAvgPool2DBackward0"],
    ),
    Case(
        "adaptive average 2-d, grows",
        of_x(F.adaptive_avg_pool2d, (4, 3)),
        [(1, 1, 2, 3)],
        ["AdaptiveAvgPool2DBackward0"],
    ),
    Case("adaptive average without batch", of_x(F.adaptive_avg_pool2d, 2), [(2, 3, 3)], ["AdaptiveAvgPool2DBackward0"]),
    Case(
        "adaptive average 3-d",
        of_x(F.adaptive_avg_pool3d, (1, 2, 3)),
        [(1, 1, 2, 3, 4)],
        ["AdaptiveAvgPool3DBackward0"],
    ),
]


def resize(size: Any, mode: str, **settings: Any) -> Any:
    return lambda x: F.interpolate(x, size, mode=mode, **settings)


def rescale(factor: Any, mode: str, **settings: Any) -> Any:
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode, **settings)


RESAMPLE = [
    Case("nearest 1-d", resize(7, "nearest"), [(1, 2, 4)], ["UpsampleNearest1DBackward0"]),
    Case("nearest 2-d", rescale(1.7, "nearest"), [(1, 2, 3, 2)], ["UpsampleNearest2DBackward0"]),
    Case("nearest 3-d", resize((3, 2, 1), "nearest"), [(1, 2, 2, 2, 2)], ["UpsampleNearest3DBackward0"]),
    Case("nearest exact 1-d", resize(3, "nearest-exact"), [(1, 2, 4)], ["UpsampleNearestExact1DBackward0"]),
    Case("nearest exact 2-d", rescale(1.7, "nearest-exact"), [(1, 2, 3, 2)], ["UpsampleNearestExact2DBackward0"]),
    Case(
        "nearest exact 3-d", resize((3, 2, 1), "nearest-exact"), [(1, 1, 2, 2, 2)], ["UpsampleNearestExact3DBackward0"]
    ),
    Case("linear", resize(7, "linear"), [(1, 2, 4)], ["UpsampleLinear1DBackward0"]),
    Case("linear, smaller", resize(3, "linear"), [(1, 2, 5)], ["UpsampleLinear1DBackward0"]),
    Case("linear, aligned", resize(7, "linear", align_corners=True), [(1, 2, 4)], ["UpsampleLinear1DBackward0"]),
    Case("linear by a factor", rescale(1.7, "linear"), [(1, 2, 4)], ["UpsampleLinear1DBackward0"]),
    Case(
        "linear by a recomputed factor",
        rescale(1.7, "linear", recompute_scale_factor=True),
        [(1, 2, 4)],
        ["UpsampleLinear1DBackward0"],
    ),
    Case("bilinear", resize((5, 3), "bilinear"), [(1, 2, 3, 4)], ["UpsampleBilinear2DBackward0"]),
    Case("bilinear by two factors", rescale((1.7, 2), "bilinear"), [(1, 2, 3, 2)], ["UpsampleBilinear2DBackward0"]),
    Case(
        "bilinear, aligned",
        resize((4, 5), "bilinear", align_corners=True),
        [(1, 2, 3, 2)],
        ["UpsampleBilinear2DBackward0"],
    ),
    Case("bilinear to one", resize(1, "bilinear", align_corners=True), [(1, 1, 3, 2)], ["UpsampleBilinear2DBackward0"]),
    Case(
        "bilinear, antialiased",
        resize((2, 3), "bilinear", antialias=True),
        [(1, 1, 5, 4)],
        ["UpsampleBilinear2DAaBackward0"],
    ),
    Case("bicubic", resize((5, 3), "bicubic"), [(1, 2, 3, 4)], ["UpsampleBicubic2DBackward0"]),
    Case(
        "bicubic, aligned",
        resize((5, 3), "bicubic", align_corners=True),
        [(1, 1, 3, 4)],
        ["UpsampleBicubic2DBackward0"],
    ),
    Case(
        "bicubic, antialiased",
        rescale((0.6, 0.5), "bicubic", antialias=True),
        [(1, 1, 5, 4)],
        ["UpsampleBicubic2DAaBackward0"],
    ),
    Case("trilinear", resize((3, 2, 4), "trilinear"), [(1, 1, 2, 3, 2)], ["UpsampleTrilinear3DBackward0"]),
    Case(
        "trilinear, aligned",
        rescale((1.5, 2, 1), "trilinear", align_corners=True),
        [(1, 1, 2, 2, 3)],
        ["UpsampleTrilinear3DBackward0"],
    ),
    Case("area", resize((2, 3), "area"), [(1, 1, 4, 4)], ["AdaptiveAvgPool2DBackward0"]),
]


# -- grid samplers, which torch differentiates only once ---------------------------------------------------------------


def hat(d: Tensor) -> Tensor:
    """Bilinear interpolation: the weight of a pixel at distance d."""
    return (1 - d.abs()).clamp(min=0)


def cubic(d: Tensor) -> Tensor:
    """Bicubic interpolation, with A = -0.75."""
    d = d.abs()
    near = 1.25 * d**3 - 2.25 * d**2 + 1
    far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def looked_up(p: Tensor, size: int, padding: str, align_corners: bool) -> Tensor:
    """Where a coordinate beyond the edges is looked up."""
    if padding == "reflection":
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            return p * 0
        p = low + span - ((p - low).remainder(2 * span) - span).abs()
    return p if padding == "zeros" else p.clamp(0, size - 1)


def axis_weights(p: Tensor, size: int, mode: str, padding: str, align_corners: bool) -> Tensor:
    """(.., size): how much of each pixel there is at a coordinate, a smooth function of it as far as it is one."""
    p = (p + 1) / 2 * (size - 1) if align_corners else ((p + 1) * size - 1) / 2
    pixels = torch.arange(size).to(p)
    if mode == "bicubic":  # pixels go on beyond the edges
        beyond = torch.arange(-5 * size, 6 * size).to(p)
        at = looked_up(beyond, size, padding, align_corners)
        return cubic(p[..., None] - beyond) @ (at[:, None] == pixels).to(p)
    p = looked_up(p, size, padding, align_corners)
    if mode == "nearest":
        return (p.round()[..., None] == pixels).to(p)
    return hat(p[..., None] - pixels)


def grid_sample(x: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool) -> Tensor:
    """By a matrix of weights for every axis."""
    settings = mode, padding_mode, align_corners
    weights = [axis_weights(grid[..., k], size, *settings) for k, size in enumerate(reversed(x.shape[2:]))]
    if len(weights) == 2:
        return torch.einsum("ncij,nabi,nabj->ncab", x, weights[1], weights[0])
    return torch.einsum("ncijk,nabdi,nabdj,nabdk->ncabd", x, weights[2], weights[1], weights[0])


def sampling(mode: str, padding: str, align_corners: bool, shape: tuple[int, ...]) -> Case:
    """Grids that reach beyond the edges, at places where no derivative jumps."""
    dims = len(shape) - 2
    size = (shape[0], 3, 2, 2)[: dims + 1]
    grid = torch.rand((*size, dims), generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3 - 1.5
    settings = {"mode": mode, "padding_mode": padding, "align_corners": align_corners}
    return Case(
        f"{mode} {dims}-d, {padding}, {'aligned' if align_corners else 'not aligned'}, {shape[-1]} wide",
        lambda x, grid: F.grid_sample(x, grid, **settings),
        [shape, grid],
        [f"GridSampler{dims}DBackward0"],
        reference=lambda x, grid: grid_sample(x, grid, **settings),
    )


GRIDS = [
    sampling(mode, padding, align_corners, shape)
    for mode, shapes in {
        "bilinear": [(2, 2, 3, 4), (1, 2, 3, 2, 4), (1, 2, 3, 1)],
        "nearest": [(2, 2, 3, 4), (1, 2, 3, 2, 4)],
        "bicubic": [(2, 2, 3, 4), (1, 2, 3, 1)],
    }.items()
    for shape in shapes
    for padding in ("zeros", "border", "reflection")
    for align_corners in (False, True)
]
OF_DEVICES = [
    Case(
        "bilinear of cuDNN",
        torch.cudnn_grid_sampler,
        [(2, 2, 3, 4), GRIDS[0].inputs[1]],
        ["CudnnGridSamplerBackward0"],
        reference=lambda x, grid: grid_sample(x, grid, "bilinear", "zeros", True),
    )
]


@pytest.mark.parametrize("case", GRIDS, ids=lambda case: case.name)
def test_reference_of_grid_sampler_is_torchs(case: Case) -> None:
    assert case.reference is not None
    torch.testing.assert_close(case.operation(*case.tensors()), case.reference(*case.tensors()))


@pytest.mark.parametrize("case", OF_DEVICES, ids=lambda case: case.name)
def test_rule_of_another_device_equals_dense_derivatives(case: Case, device_kernels: None) -> None:
    check(case)


def test_grid_that_is_not_a_number_moves_nothing() -> None:
    x = torch.randn(1, 1, 3, 3, requires_grad=True)
    grid = torch.full((1, 2, 2, 2), torch.nan)
    backward(F.grid_sample(x, grid, align_corners=False).square().sum())
    assert not x.hess_diag.isnan().any()


def test_divisor_of_an_average_need_not_have_a_square_that_fits() -> None:
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    backward((F.avg_pool2d(x, 2, divisor_override=2**40) * 2.0**40).square().sum())
    torch.testing.assert_close(x.hess_diag, torch.full_like(x, 2.0))


@pytest.mark.parametrize("case", [*MAX, *AVERAGE, *RESAMPLE, *GRIDS], ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


FORMATS = [
    of_x(F.max_pool2d, 2),
    of_x(F.avg_pool2d, 2),
    of_x(F.avg_pool2d, 3, 2, 1, ceil_mode=True),
    of_x(F.adaptive_avg_pool2d, 3),
    of_x(F.adaptive_max_pool2d, 3),
    resize((5, 3), "bilinear"),
    resize((5, 3), "nearest"),
]


@pytest.mark.parametrize("operation", FORMATS)
def test_channels_last_in_single_precision(operation: Any) -> None:
    def channels_last(x: Tensor) -> Tensor:
        return operation(x.to(memory_format=torch.channels_last))

    check(Case("channels last", channels_last, [(2, 3, 4, 4)]), torch.float32)


@pytest.mark.parametrize("operation", FORMATS)
def test_input_that_is_expanded(operation: Any) -> None:
    check(Case("expanded", lambda x: operation(x.expand(2, 3, 4, 4)), [(1, 1, 4, 4)]))


@pytest.mark.parametrize("operation", FORMATS)
def test_half_precision_activations_carry_single_precision(operation: Any) -> None:
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    backward((operation(x.bfloat16()).float() * 1.001).square().sum())
    single = x.detach().clone().requires_grad_()
    backward((operation(single.bfloat16().float()) * 1.001).square().sum())
    torch.testing.assert_close(x.hess_diag, single.hess_diag)
