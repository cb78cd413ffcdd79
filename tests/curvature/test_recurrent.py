"""The fused LSTM: against dense derivatives where HesScale is exact, and against the LSTM that is not fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hesscale_lightning.curvature import Method, UnsupportedOperationError, attach, backward
from tests.curvature.device_kernels import gru_cell, lstm_cell
from tests.curvature.oracle import Case, check, node_names

NODE = "MkldnnRnnLayerBackward0"
generator = torch.Generator().manual_seed(4)
X = torch.randn((1, 2, 3), generator=generator)
STATE = torch.randn((2, 1, 2, 4), generator=generator)
SHAPES = [(16, 3), (16, 4), (16,), (16,)]


def one_step(*parameters: Tensor) -> tuple[Tensor, Tensor]:
    output, _, cell = torch.lstm(X, (STATE[0], STATE[1]), parameters, True, 1, 0.0, True, False, False)
    return output, cell


#: Torch fuses in float32 only.
CASES = [Case("parameters of one step", one_step, SHAPES, [NODE])]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without mkldnn")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case, torch.float32)


LSTM_CELL, GRU_CELL = ["ThnnFusedLstmCellBackward0"], ["ThnnFusedGruCellBackward0"]


def fused_lstm_cell(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    output, cell, _ = torch.ops.aten._thnn_fused_lstm_cell(*inputs)
    return output, cell


def fused_gru_cell(*inputs: Tensor) -> Tensor:
    return torch.ops.aten._thnn_fused_gru_cell(*inputs)[0]


OF_DEVICES = [
    Case("LSTM's cell", fused_lstm_cell, [(3, 8), (3, 8), (3, 2), (8,), (8,)], LSTM_CELL, reference=lstm_cell),
    Case("LSTM's cell without bias", fused_lstm_cell, [(3, 8), (3, 8), (3, 2)], LSTM_CELL, reference=lstm_cell),
    Case(
        "LSTM's hidden state alone", lambda *x: fused_lstm_cell(*x)[0], [(3, 8), (3, 8), (3, 2)], LSTM_CELL,
        reference=lambda *x: lstm_cell(*x)[0],
    ),
    Case(
        "LSTM's cell state alone", lambda *x: fused_lstm_cell(*x)[1], [(3, 8), (3, 8), (3, 2)], LSTM_CELL,
        reference=lambda *x: lstm_cell(*x)[1],
    ),
    Case("GRU's cell", fused_gru_cell, [(3, 6), (3, 6), (3, 2), (6,), (6,)], GRU_CELL, reference=gru_cell),
    Case("GRU's cell without bias", fused_gru_cell, [(3, 6), (3, 6), (3, 2)], GRU_CELL, reference=gru_cell),
]  # fmt: skip


@pytest.mark.parametrize("case", OF_DEVICES, ids=lambda case: case.name)
def test_rule_of_another_device_equals_dense_derivatives(case: Case, device_kernels: None) -> None:
    check(case)


def test_a_layer_fused_on_the_gpu_is_refused_with_advice() -> None:
    """Its node can be made without a GPU, of tensors without data."""
    with torch.device("meta"):
        weights = [torch.randn(8, 3, requires_grad=True), torch.randn(8, 2, requires_grad=True)]
        x, hidden, cell = torch.randn(4, 5, 3), torch.randn(1, 5, 2), torch.randn(1, 5, 2)
    output = torch._cudnn_rnn(x, weights, 2, None, hidden, cell, 2, 2, 0, 1, False, 0.0, True, False, [], None)[0]
    loss = output.sum()
    assert "CudnnRnnBackward0" in node_names(loss)
    with pytest.raises(UnsupportedOperationError, match=r"cudnn\.flags"):
        attach(loss)


def final_state(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return (state[0] * 0.7).square().sum() + state[1].sin().sum()


def all_steps(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return (output.tanh() + 0.3 * output).pow(3).sum()


def all_of_it(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return all_steps(output, state) + final_state(output, state)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without mkldnn")
@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "bl89"])
@pytest.mark.parametrize("objective", [final_state, all_steps, all_of_it])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"num_layers": 2},
        {"bidirectional": True},
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
def test_equals_the_layer_that_is_not_fused(
    options: dict[str, Any], objective: Callable[..., Tensor], method: Method
) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, **options)
    directions = 2 if layer.bidirectional else 1
    tensors = [torch.randn(5, 5, 3), *torch.randn(2, layer.num_layers * directions, 5, 4)]
    found = {}
    for fused in (True, False):
        x, hidden, cell = (t.clone().requires_grad_() for t in tensors)
        for p in layer.parameters():
            p.hess_diag = None
        with torch.backends.mkldnn.flags(enabled=fused):
            loss = objective(*layer(x, (hidden, cell)))
        assert (NODE in node_names(loss)) == fused
        backward(loss, method=method)
        found[fused] = [t.hess_diag for t in (x, hidden, cell, *layer.parameters())]
    for fused, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-4, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without mkldnn")
def test_frozen_parameters_get_nothing() -> None:
    layer = nn.LSTM(3, 4)
    layer.weight_ih_l0.requires_grad_(False)
    backward(layer(torch.randn(5, 2, 3))[0].square().sum())
    assert not hasattr(layer.weight_ih_l0, "hess_diag")
    assert layer.weight_hh_l0.hess_diag.shape == layer.weight_hh_l0.shape
