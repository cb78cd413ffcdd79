"""Recurrent cells and layers that torch fuses into one node.

A cell is one operation, whose formula is exact. With the pre-activations ``a = W x + V y' + b`` of the LSTM's gates
``i, f, u, o`` and of the GRU's ``r, z, n``:

    LSTM:   c = f c' + i u,   y = o tanh(c)
    GRU:    n = tanh(a_n + r m) with m the hidden state's part,   y = n + z (y' - n)

The curvature of a whole layer has no closed form, so there a rule does what the engine does for a layer that is not
fused: step by step backwards, with the gradient beside it. Each step passes ``f^2 h_c`` to ``c'`` and ``(V^2)^T h_a``
to ``y'``. What is dropped are, as everywhere, off-diagonal entries of each operation's output Hessian: exact for the
parameters of one step, HesScale's approximation over several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

_LSTM = 2  # torch's number of the mode

# -- cells, which torch fuses on CUDA --------------------------------------------------------------------------------


@opaque
def _joined(*parts: Tensor | None) -> Tensor | None:
    """Side by side along the last dimension."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return torch.cat([torch.zeros_like(known[0]) if part is None else part for part in parts], -1)


def _gates(op: Operation, of: str) -> Value:
    """The pre-activations that come from the input, or from the hidden state, with their bias."""
    bias = op.tensor(f"{of}_bias")
    return op.tensor(f"{of}_gates") if bias is None else op.tensor(f"{of}_gates") + bias


def _at_cell_inputs(op: Operation, h_input: Value, h_hidden: Value, h_state: Value) -> Sequence[Value]:
    """In the order of the node's inputs: gates, state, biases."""
    return (
        h_input,
        h_hidden,
        h_state,
        op.need(3) and h_input.sum_to_size(op.input_shape(3)),
        op.need(4) and h_hidden.sum_to_size(op.input_shape(4)),
    )


def _at_gate(slope: Value, bend: Value, factor: Value, g: Value, h: Value) -> Value:
    """At the pre-activation of a gate with first and second derivative ``slope`` and ``bend slope``."""
    moved = slope * factor
    return moved * (moved * h + bend * g)


@register_rule("ThnnFusedLstmCellBackward0", multi_output=True)
def lstm_cell(op: Operation, g: Sequence[Value], h: Sequence[Value]) -> Sequence[Value]:
    """Exact: at the cell ``h_c + (o s')^2 h_y + o s'' g_y`` with ``s = tanh(c)``, at its gates through ``dc/da``."""
    a, before = _gates(op, "input") + _gates(op, "hidden"), op.input(2, "cx")
    size = op.output_shape()[-1]
    i, f, u, o = [a.narrow(-1, k * size, size) for k in range(4)]
    i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
    s = (f * before + i * u).tanh()
    slope = o - o * s * s
    g_c = g[1] + slope * g[0]
    h_c = h[1] + slope * (slope * h[0] - 2 * s * g[0])
    h_a = _joined(
        _at_gate(i - i * i, 1 - 2 * i, u, g_c, h_c),
        _at_gate(f - f * f, 1 - 2 * f, before, g_c, h_c),
        _at_gate(1 - u * u, -2 * u, i, g_c, h_c),
        _at_gate(o - o * o, 1 - 2 * o, s, g[0], h[0]),
    )
    return _at_cell_inputs(op, h_a, h_a, f * f * h_c)


@register_rule("ThnnFusedGruCellBackward0")
def gru_cell(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """Exact: at ``a_n`` ``((1 - z) n')^2 h + (1 - z) n'' g``, at r and m through it, at z ``(y' - n)^2 z'^2 h`` + .."""
    x, hidden, before = _gates(op, "input"), _gates(op, "hidden"), op.input(2, "hx")
    size = op.output_shape()[-1]
    m = hidden.narrow(-1, 2 * size, size)
    r, z = [(x.narrow(-1, k * size, size) + hidden.narrow(-1, k * size, size)).sigmoid() for k in range(2)]
    n = (x.narrow(-1, 2 * size, size) + r * m).tanh()
    slope = (1 - n * n) * (1 - z)
    g_n, h_n = slope * g, slope * (slope * h - 2 * n * g)
    h_r = _at_gate(r - r * r, 1 - 2 * r, m, g_n, h_n)
    h_z = _at_gate(z - z * z, 1 - 2 * z, before - n, g, h)
    return _at_cell_inputs(op, _joined(h_r, h_z, h_n), _joined(h_r, h_z, r * r * h_n), z * z * h)


# -- layers ----------------------------------------------------------------------------------------------------------


def _is_lstm(op: Operation) -> None:
    mode = op.number("mode")
    if mode != _LSTM:
        raise op.unsupported(f"of torch's recurrent modes only the LSTM, {_LSTM}, is known, not {mode}")


@register_rule(
    "MkldnnRnnLayerBackward0",
    multi_output=True,
    approximate="the recursion through the cell's operations, as for an LSTM that is not fused",
    check=_is_lstm,
)
def fused_lstm(op: Operation, g: Sequence[Value], h: Sequence[Value]) -> Sequence[Value]:
    """The recursion through the cell's operations, as for an LSTM that is not fused; the forward pass is run again."""
    inputs = op.input(0, "input"), op.input(1, "weight0"), op.input(2, "weight1")
    biases = (op.input(3, "weight2"), op.input(4, "weight3")) if op.number("has_biases") else ()
    start = op.tensor("hx_"), op.tensor("cx_")
    # The step after has parameters between it and the loss: there Gauss-Newton drops second derivatives.
    last_step_only = op.method == "hesscale_gn"
    h_x, h_w, h_v, h_b, h_y, h_c = _through_lstm(
        inputs, biases, start, op.tensor("result0"), op.number("reverse"), last_step_only, tuple(g), tuple(h),
        tuple(op.needs),
    )  # fmt: skip
    return (
        h_x, h_w, h_v, h_b, h_b,
        op.need(5) and h_y.reshape(op.input_shape(5)),
        op.need(6) and h_c.reshape(op.input_shape(6)),
    )  # fmt: skip


@opaque
def _through_lstm(
    inputs: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, ...],
    start: tuple[Tensor, Tensor],
    y: Tensor,
    reverse: bool,
    last_step_only: bool,
    g: tuple[Tensor | None, ...],
    h: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """At the layer's input, its two weights, a bias, and the state before the first step.

    What does not depend on the step after is computed for all steps at once: of the recursion, only sums, two products
    with coefficients and the product with V are left to each step.
    """
    x, w, v = inputs
    g_y, h_y = g[0], h[0]
    if reverse:
        x, y = x.flip(0), y.flip(0)
        g_y, h_y = (None if t is None else t.flip(0) for t in (g_y, h_y))
    y0, c0 = (t.reshape(y.shape[1:]) for t in start)
    before = torch.cat([y0[None], y[:-1]])
    a = x @ w.t() + before @ v.t()
    for bias in biases:
        a += bias
    steps = _steps(a.unflatten(-1, (4, -1)), c0)
    at_gates, at_cell = _gradients(steps, v, g_y, g[1], g[2], last_step_only)

    def part(t: Tensor | None) -> Tensor:
        return torch.zeros_like(c0) if t is None else t.reshape(c0.shape)

    at_y, at_c = part(h[1]), part(h[2])
    h_a = at_gates  # in its place
    square, moved, kept, slope = v * v, steps.moved.square_(), steps.kept.square(), steps.slope.square_()
    for t in reversed(range(len(x))):
        if h_y is not None:
            at_y = at_y + h_y[t]
        at_c = torch.addcmul(at_c + at_cell[t], slope[t], at_y)
        h_a[t, :, :3].addcmul_(moved[t, :, :3], at_c.unsqueeze(1))
        h_a[t, :, 3].addcmul_(moved[t, :, 3], at_y)
        at_c = kept[t] * at_c
        at_y = h_a[t].flatten(1) @ square
    h_a = h_a.flatten(2)
    flat = h_a.flatten(0, 1)
    return (
        (h_a.flip(0) if reverse else h_a) @ (w * w) if needs[0] else None,
        flat.t() @ x.square().flatten(0, 1) if needs[1] else None,
        flat.t() @ before.square().flatten(0, 1) if needs[2] else None,
        flat.sum(0) if len(needs) > 3 and (needs[3] or needs[4]) else None,
        at_y,
        at_c,
    )


class _Steps(NamedTuple):
    """Of every step at once.

    Attributes:
        moved: ``d(c, c, c, y) / da``, by gate.
        bend: The gates' second derivatives over their first.
        kept: f.
        slope: ``dy/dc``.
        squash: ``tanh(c)``.
    """

    moved: Tensor
    bend: Tensor
    kept: Tensor
    slope: Tensor
    squash: Tensor


def _steps(a: Tensor, c0: Tensor) -> _Steps:
    """From the pre-activations, (steps, samples, 4, size), and the cell before the first."""
    gates = a.sigmoid()
    u = a[:, :, 2].tanh()
    gates[:, :, 2] = u
    i, f, _, o = gates.unbind(2)
    made = i * u
    cells = [c0]
    for t in range(len(a)):
        cells.append(torch.addcmul(made[t], f[t], cells[-1]))
    before, squash = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    moved = gates * (1 - gates)
    moved[:, :, 2] = 1 - u * u
    moved *= torch.stack([u, before, i, squash], 2)
    bend = 1 - 2 * gates
    bend[:, :, 2] -= 1
    return _Steps(moved, bend, f, o - o * squash * squash, squash)


def _gradients(
    steps: _Steps, v: Tensor, g_y: Tensor | None, at_y: Tensor | None, at_c: Tensor | None, last_step_only: bool
) -> tuple[Tensor, Tensor]:
    """What second derivatives add to the curvature at the pre-activations and at the cells: the gradient's recursion.

    Args:
        steps: The steps.
        v: The hidden state's weight.
        g_y: Gradient at the outputs of all steps, or None.
        at_y: At the hidden state after the last, or None.
        at_c: At the cell after the last, or None.
        last_step_only: Drop second derivatives in all other steps.
    """
    at_gates, at_cells = torch.zeros_like(steps.moved), torch.zeros_like(steps.slope)
    if g_y is None and at_y is None and at_c is None:
        return at_gates, at_cells
    like = steps.slope[0]
    y, c = (torch.zeros_like(like) if t is None else t.reshape(like.shape) for t in (at_y, at_c))
    count = len(steps.slope)
    for t in reversed(range(count - 1 if last_step_only else 0, count)):
        if g_y is not None:
            y = y + g_y[t]
        at_cells[t] = y
        c = torch.addcmul(c, steps.slope[t], y)
        torch.mul(steps.moved[t, :, :3], c.unsqueeze(1), out=at_gates[t, :, :3])
        torch.mul(steps.moved[t, :, 3], y, out=at_gates[t, :, 3])
        c, y = steps.kept[t] * c, at_gates[t].flatten(1) @ v
    return at_gates.mul_(steps.bend), at_cells.mul_(steps.slope).mul_(steps.squash).mul_(-2)


def _whole(op: Operation) -> None:
    raise op.unsupported(
        "a recurrent layer fused on the GPU shows nothing of its steps: compute the forward pass under "
        "torch.backends.cudnn.flags(enabled=False), where it is made of cells"
    )


@register_rule("CudnnRnnBackward0", "MiopenRnnBackward0", multi_output=True, check=_whole)
def gpu_layer(op: Operation, h: Sequence[Value]) -> Sequence[Value]:
    """Refused, with advice: under ``torch.backends.cudnn.flags(enabled=False)`` torch computes it cell by cell."""
    raise AssertionError("refused at attach")
