"""Fused recurrent layers: the recursion through the operations of the cell, as if these were nodes of the graph.

The curvature of a whole layer has no closed form, so here a rule does what the engine does for a layer that is not
fused: step by step backwards, with the gradient beside it. For the LSTM, with gates ``i, f, u, o`` of the
pre-activations ``a = W x + V y' + b``:

    c = f c' + i u,    y = o tanh(c)

Each step passes ``f^2 h_c`` to ``c'`` and ``(V^2)^T h_a`` to ``y'``. What is dropped are, as everywhere, off-diagonal
entries of each operation's output Hessian: exact for the parameters of one step, HesScale's approximation over several.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_LSTM = 2  # torch's number of the mode


@register_rule(
    "MkldnnRnnLayerBackward0",
    curved=True,
    multi_output=True,
    approximate="the recursion through the cell's operations, as for an LSTM that is not fused",
)
def fused_lstm(op: Operation) -> Formula:
    """The recursion through the cell's operations, as for an LSTM that is not fused; the forward pass is run again."""
    node = op.node
    if node._saved_mode != _LSTM:
        raise op.unsupported(f"of torch's recurrent modes only the LSTM, {_LSTM}, is known, not {node._saved_mode}")
    inputs = [node._saved_input, node._saved_weight0, node._saved_weight1]
    biases = [node._saved_weight2, node._saved_weight3] if node._saved_has_biases else []
    start = [node._saved_hx_, node._saved_cx_]
    outputs, reverse = node._saved_result0, node._saved_reverse
    last_step_only = op.method == "hesscale_gn"  # the step after has parameters between it and the loss
    needs = op.needs

    def formula(g: Any, h: Any) -> Diagonals:
        x, w, v = (full(t) for t in inputs)
        y = full(outputs)
        g_y, h_y = (None if t is None else t[0] for t in (g, h))
        if reverse:
            x, y = x.flip(0), y.flip(0)
            g_y, h_y = (None if t is None else t.flip(0) for t in (g_y, h_y))
        y0, c0 = (full(t).reshape(y.shape[1:]) for t in start)
        before = torch.cat([y0[None], y[:-1]])
        a = x @ w.t() + before @ v.t()
        for bias in biases:
            a = a + full(bias)
        i, f, u, o = a.chunk(4, -1)
        i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
        cells = [c0]
        for t in range(len(x)):
            cells.append(f[t] * cells[-1] + i[t] * u[t])
        state = _State(g, h, y0)
        h_a = torch.zeros_like(a)
        square = squared(v)
        for t in reversed(range(len(x))):
            state.arrive(g_y, h_y, t)
            gates = (i[t], f[t], u[t], o[t])
            g_a, h_a[t] = state.step(gates, cells[t], cells[t + 1])
            state.back(g_a, h_a[t], v, square)
            if last_step_only:
                state.forget_gradient()
        flat = h_a.flatten(0, 1)
        h_x = (h_a.flip(0) if reverse else h_a) @ squared(w) if needs[0] else None
        h_b = flat.sum(0)
        return (
            h_x,
            flat.t() @ squared(x).flatten(0, 1) if needs[1] else None,
            flat.t() @ squared(before).flatten(0, 1) if needs[2] else None,
            h_b if needs[3] else None,
            h_b if needs[4] else None,
            state.h_y.view(start[0].shape) if needs[5] else None,
            state.h_c.view(start[1].shape) if needs[6] else None,
        )

    return formula


class _State:
    """Gradient (None: dropped) and curvature at the hidden state and at the cell between two steps."""

    def __init__(self, g: Any, h: Any, like: Tensor) -> None:
        zero = torch.zeros_like(like)

        def part(t: Any, k: int) -> Tensor:
            return zero if t is None or t[k] is None else t[k].reshape(like.shape)

        self.g_y = self.g_c = None
        if g is not None:
            self.g_y, self.g_c = part(g, 1), part(g, 2)
        self.h_y, self.h_c = part(h, 1), part(h, 2)

    def arrive(self, g: Tensor | None, h: Tensor | None, t: int) -> None:
        """Adds what comes from the layer's output at step ``t``."""
        if g is not None and self.g_y is not None:
            self.g_y = self.g_y + g[t]
        if h is not None:
            self.h_y = self.h_y + h[t]

    def step(self, gates: tuple[Tensor, ...], before: Tensor, cell: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradient and curvature at the pre-activations, from the state after a step; leaves the cell before it."""
        i, f, u, o = gates
        squash = cell.tanh()
        slope = 1 - squash * squash
        h_c = self.h_c + (o * slope).square() * self.h_y
        if self.g_y is not None:
            h_c = h_c - 2 * squash * slope * o * self.g_y
        slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - u * u, o * (1 - o)], -1)
        factors = torch.cat([u, before, i], -1)  # dc / d(i, f, u)
        h_gates = torch.cat([factors.square() * h_c.repeat(1, 3), squash.square() * self.h_y], -1)
        h_a = slopes.square() * h_gates
        g_a = None
        if self.g_y is not None and self.g_c is not None:
            g_c = self.g_c + o * slope * self.g_y
            g_a = slopes * torch.cat([factors * g_c.repeat(1, 3), squash * self.g_y], -1)
            h_a = h_a + torch.cat([1 - 2 * i, 1 - 2 * f, -2 * u, 1 - 2 * o], -1) * g_a
            self.g_c = f * g_c
        self.h_c = f.square() * h_c
        return g_a, h_a

    def back(self, g_a: Tensor | None, h_a: Tensor, weight: Tensor, square: Tensor) -> None:
        """Passes on to the hidden state before the step."""
        self.g_y = None if g_a is None else g_a @ weight
        self.h_y = h_a @ square

    def forget_gradient(self) -> None:
        """Drops second derivatives from here on."""
        self.g_y = self.g_c = None
