"""Small mixtures of experts; see :mod:`tests.curvature.models`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.tasks import Built, language, mean_squared_error, sentences


class MixtureOfExperts(nn.Module):
    """The best two of four experts for each token, gathered, weighted and added back in place."""

    def __init__(self, width: int, experts: int, top: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(experts)
        )
        self.top = top
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chance = self.router(flat).softmax(-1)
        weight, chosen = chance.topk(self.top, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        share = F.one_hot(chosen, len(self.experts)).to(x.dtype).mean((0, 1))
        self.balance = len(self.experts) * (share * chance.mean(0)).sum()
        return out.view_as(x)


class ExpertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.experts = MixtureOfExperts(4, 4, 2)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.experts(self.norm(x)))


def mixture_of_experts() -> Built:
    module, data, loss = language(ExpertModel(), sentences(3))
    return module, data, lambda m, tokens: loss(m, tokens) + 0.1 * m.experts.balance


class GroupedExperts(nn.Module):
    """One expert for each token, all experts in one grouped matrix product (which torch has in float32 only)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 8) * 0.4)
        self.down = nn.Parameter(torch.randn(3, 8, 4) * 0.4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = F.one_hot(chosen, 3).sum(0).cumsum(0)
        y = self.product(F.relu(self.product(x[order], self.up, ends)), self.down, ends)
        back = torch.empty_like(y)
        back[order] = y
        return self.head(back * weight[:, None])

    def product(self, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return F.grouped_mm(x, w, offs=ends.to(torch.int32))
        bounds = pairwise([0, *ends.tolist()])
        return torch.cat([x[a:b] @ w[expert] for expert, (a, b) in enumerate(bounds)])


def grouped_experts() -> Built:
    return GroupedExperts(), (torch.randn(9, 4), torch.randn(9, 1)), mean_squared_error
