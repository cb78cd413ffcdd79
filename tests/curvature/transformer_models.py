"""Small transformers, each written as people write theirs; see :mod:`tests.curvature.models`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.tasks import Built, classification, language, sentences

VOCABULARY = 7


class SelfAttention(nn.Module):
    """One projection for query, key and value, and the fused attention where torch has one."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).split(x.shape[-1], -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Block(nn.Module):
    """Attention and a perceptron, each normalised before and added to the stream."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = SelfAttention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norms[0](x)))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class GPT(nn.Module):
    """Causal, with learned positions and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 4), nn.Embedding(8, 4)
        self.blocks = nn.Sequential(Block(4, 2, True, 0.1), Block(4, 2, True, 0.1))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def gpt() -> Built:
    return language(GPT(), sentences())


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 5, 4) * 0.2)
        self.body = nn.Sequential(Block(4, 2, False), nn.LayerNorm(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.body(x)[:, 0])


def vision_transformer() -> Built:
    return classification(VisionTransformer(), 2, 2, 4, 4)


class ShiftedWindows(nn.Module):
    """Attention within windows that are rolled by half their size, with a table of biases by relative position."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.heads = window, shift, heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + window - 1
        self.register_buffer("relative", apart[0] * (2 * window - 1) + apart[1])
        region = torch.zeros(1, size, size, 1)
        for number, part in enumerate((slice(0, -window), slice(-window, -shift or None), slice(-shift, None))):
            region[:, part] += 3 * number
            region[:, :, part] += number
        region = self.windows(region).squeeze(-1)
        self.register_buffer("apart", region[:, None] != region[:, :, None] if shift else None)

    def windows(self, x: Tensor) -> Tensor:
        """``(batch * windows, window^2, width)`` from ``(batch, rows, columns, width)``."""
        b, n, _, c = x.shape
        w = self.window
        return x.view(b, n // w, w, n // w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _, c = x.shape
        w = self.window
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        q, k, v = self.qkv(self.windows(y)).view(-1, w * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.relative.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1).unsqueeze(0)
        if self.apart is not None:
            mask = self.apart.repeat(b, 1, 1).unsqueeze(1)
            scores = scores.masked_fill(mask, -100.0)
        y = self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, w * w, c))
        y = y.view(b, n // w, n // w, w, w, c).permute(0, 1, 3, 2, 4, 5).reshape(b, n, n, c)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class WindowTransformer(nn.Module):
    """Two kinds of windows, then neighbours merged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.blocks = nn.Sequential(ShiftedWindows(4, 2, 4, 2, 0), ShiftedWindows(4, 2, 4, 2, 1))
        self.merge = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.merge(x).mean((1, 2)))


def window_transformer() -> Built:
    return classification(WindowTransformer(), 2, 1, 8, 8)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: pairs of features turned by an angle that grows with the position."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LlamaLayer(nn.Module):
    """Grouped queries, rotary embedding, a sliding window, RMSNorm and a gated perceptron."""

    def __init__(self, width: int, heads: int, shared: int, window: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.window = heads, heads // shared, window
        size = width // heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(size)])
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * self.kv_heads * size, bias=False)
        self.gate_up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norms[0](x)
        q = self.query(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(y).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norms[2](q), cos, sin), rotate(k, cos, sin)
        apart = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        near = (apart >= 0) & (apart < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList([LlamaLayer(8, 4, 2, 3), LlamaLayer(8, 4, 2, 8)])
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        angles = (torch.arange(tokens.shape[1])[:, None] * torch.tensor([1.0])).repeat(1, 2)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def llama() -> Built:
    return language(Llama(), sentences())


class BERT(nn.Module):
    """torch's own encoder, with a padding mask, embeddings of three kinds, and a tied head with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 4, padding_idx=0)
        self.positions, self.segments = nn.Embedding(8, 4), nn.Embedding(2, 4)
        self.norm = nn.LayerNorm(4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.transform = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        segments = (torch.arange(tokens.shape[1]) > 2).long().expand_as(tokens)
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])) + self.segments(segments)
        x = self.encoder(self.norm(x), src_key_padding_mask=tokens == 0)
        return F.linear(self.transform(x), self.tokens.weight, self.bias)


def bert() -> Built:
    tokens = sentences()
    hidden = (torch.rand(tokens.shape) < 0.4) & (tokens != 0)
    labels = torch.where(hidden, tokens, -100)
    masked = torch.where(hidden, VOCABULARY - 1, tokens)
    return BERT(), (masked, labels), lambda m, x, y: F.cross_entropy(m(x).transpose(1, 2), y)


class T5(nn.Module):
    """Encoder and decoder with a learned bias by bucketed distance, unscaled scores, RMSNorm and a gated perceptron."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.distance = nn.ModuleList([nn.Embedding(4, heads), nn.Embedding(4, heads)])
        self.attention = nn.ModuleList([nn.Linear(width, 4 * width, bias=False) for _ in range(3)])
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(5)])
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.heads = heads

    def attend(self, layer: nn.Linear, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        q_weight, k_weight, v_weight, o_weight = layer.weight.chunk(4)
        q, k, v = (
            F.linear(t, w).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t, w in ((x, q_weight), (memory, k_weight), (memory, v_weight))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return F.linear(y.transpose(1, 2).flatten(2), o_weight)

    def bias(self, table: nn.Embedding, length: int, causal: bool) -> Tensor:
        apart = torch.arange(length)[:, None] - torch.arange(length)
        bias = table(apart.abs().clamp(max=3)).permute(2, 0, 1)
        return bias.masked_fill(apart < 0, -torch.inf) if causal else bias

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embedding(source)
        here = self.norms[0](memory)
        memory = memory + self.attend(
            self.attention[0], here, here, self.bias(self.distance[0], source.shape[1], False)
        )
        here = self.norms[1](memory)
        memory = memory + self.down(F.gelu(self.gate(here), approximate="tanh") * self.up(here))
        x = self.embedding(target)
        here = self.norms[2](x)
        x = x + self.attend(self.attention[1], here, here, self.bias(self.distance[1], target.shape[1], True))
        x = x + self.attend(self.attention[2], self.norms[3](x), memory, None)
        return self.norms[4](x) @ self.embedding.weight.t() / math.sqrt(x.shape[-1])


def t5() -> Built:
    def loss(m: Any, source: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(m(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())

    return T5(), (sentences(2, 5), sentences(2, 4)), loss


class Attentive(nn.Module):
    """torch's MultiheadAttention: between two sequences, with masks, and with the weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(4, 2, dropout=0.1, kdim=3, vdim=2, batch_first=True, add_bias_kv=True)
        self.self_attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = torch.zeros(key.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        x = x + self.cross(x, key, value, key_padding_mask=hidden, need_weights=False)[0]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.self_attention(x, x, x, attn_mask=causal)
        return self.head(x + y) + weights.square().sum((1, 2))[:, None, None]


def multihead_attention() -> Built:
    data = torch.randn(2, 3, 4), torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 3, 1)
    return Attentive(), data, lambda m, x, key, value, y: F.mse_loss(m(x, key, value), y)
