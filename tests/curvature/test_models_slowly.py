"""Every model's diagonals against the slow recursion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.curvature.models import MODELS, Model
from tests.curvature.slow import Recording
from tests.curvature.test_random_graphs import METHODS, agree, diagonals

#: What the slow recursion cannot do.
NOT_COMPARED = {"speech": "torch does not differentiate the CTC loss twice"}
#: torch's gradient of hardsigmoid is a multiple of 1/6 in single precision.
TOLERANCE = {"depthwise separable, squeeze and excite": 1e-6}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [m for m in MODELS if m.name not in NOT_COMPARED], ids=lambda model: model.name)
def test_diagonals_of_a_model_equal_the_slow_recursion(model: Model, method: Any) -> None:
    """In float64, with attention as separate operations: where it is fused, the engine's queries are approximate."""
    module, loss_of = model.build(torch.float64)
    params = dict(module.named_parameters())
    with sdpa_kernel(SDPBackend.MATH), Recording() as recording:
        loss = loss_of(module)
    expected = recording.curvature(loss, params.values(), method)
    got = diagonals(loss, list(params.values()), method)
    for name, a, b in zip(params, got, expected, strict=True):
        agree(a, b, name, TOLERANCE.get(model.name, 1e-8))


@pytest.mark.parametrize("model", [m for m in MODELS if m.name not in NOT_COMPARED], ids=lambda model: model.name)
def test_what_is_recorded_is_what_is_computed(model: Model) -> None:
    """Gradients by the slow way are autograd's."""
    module, loss_of = model.build(torch.float64)
    params = list(module.parameters())
    with sdpa_kernel(SDPBackend.MATH), Recording() as recording:
        loss = loss_of(module)
    expected = torch.autograd.grad(loss, params, retain_graph=True)
    for got, e in zip(recording.gradient(loss, params), expected, strict=True):
        agree(got, e, tolerance=TOLERANCE.get(model.name, 1e-8))
