"""Small recurrent and state-space models; see :mod:`tests.curvature.models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.tasks import Built, language, mean_squared_error, sentences


class Recurrent(nn.Module):
    """Embedding, recurrent layers, and a linear head on every step, or on the last of a packed sequence."""

    def __init__(self, layer: Callable[..., nn.Module], packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.layer = layer(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 7)
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if not self.packed:
            return self.head(self.layer(x)[0])
        lengths = (tokens != 0).sum(1)
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.layer(x)[0], batch_first=True, total_length=tokens.shape[1])
        return self.head(y)


def recurrent(layer: Callable[..., nn.Module], **options: Any) -> Callable[[], Built]:
    return lambda: language(Recurrent(layer, **options), sentences())


class Cells(nn.Module):
    """The same cells at every step, with the state in hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.RNNCell(2, 3), nn.GRUCell(3, 3), nn.LSTMCell(3, 3)])
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = b = c = d = x.new_zeros(x.shape[0], 3)
        outputs = []
        for x_t in x.unbind(1):
            a = self.cells[0](x_t, a)
            b = self.cells[1](a, b)
            c, d = self.cells[2](b, (c, d))
            outputs.append(self.head(c))
        return torch.stack(outputs, 1)


def cells() -> Built:
    return Cells(), (torch.randn(2, 4, 2), torch.randn(2, 4, 1)), mean_squared_error


class StateSpace(nn.Module):
    """A selective state-space layer: every state is a sum of decayed inputs, by cumulative sums, exp and einsum."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.select = nn.Linear(width, 2 * states + 1)
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log())
        self.step = nn.Parameter(torch.randn(width))
        self.skip = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 7)
        self.embedding = nn.Embedding(7, width)
        self.states = states

    def forward(self, tokens: Tensor) -> Tensor:
        u, gate = self.expand(self.embedding(tokens)).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : tokens.shape[1]].mT)
        into, out, step = self.select(u).split([self.states, self.states, 1], -1)
        step = F.softplus(step + self.step)
        total = torch.cumsum(step, 1)
        since = total[:, :, None] - total[:, None]  # (batch, to, from, width)
        later = torch.ones(since.shape[1:3], dtype=torch.bool).triu(1)
        decay = torch.exp(-since[..., None] * self.log_decay.exp()).masked_fill(later[:, :, None, None], 0)
        y = torch.einsum("btswn,bsn,btn,bsw->btw", decay, into, out, step * u)
        return self.head((y + self.skip * u) * F.silu(gate))


def state_space() -> Built:
    return language(StateSpace(3, 2), sentences())


class LinearRecurrence(nn.Module):
    """A gated linear recurrence, step by step in place, with cumulative products and log-sum-exps."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(2, 6)
        self.head = nn.Linear(9, 1)

    def forward(self, x: Tensor) -> Tensor:
        forget, value, score = self.gates(x).chunk(3, -1)
        forget = forget.sigmoid()
        state = torch.zeros_like(value)
        state[:, 0] = value[:, 0]
        for t in range(1, x.shape[1]):
            state[:, t] = forget[:, t].clone() * state[:, t - 1].clone() + value[:, t]
        pooled = [state.amax(1), state.std(1), torch.cumprod(forget, 1)[:, -1], torch.logcumsumexp(score, 1)[:, -1]]
        return self.head(torch.cat([*pooled, forget.prod(-1).sum(1, keepdim=True)], -1))


def linear_recurrence() -> Built:
    data = torch.randn(3, 4, 2), torch.randn(3, 1)
    return LinearRecurrence(), data, lambda m, x, y: F.huber_loss(m(x), y)
