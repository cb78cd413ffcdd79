"""Kernels on the CPU for operations that torch has on other devices only, so that their nodes can be made here.

Torch makes a node by the operation and not by the device, so with a kernel for the CPU, of ordinary operations, the
node is the real one: with its name, its outputs and what it saves. Only its own backward is a stand-in, which returns
zeros: a case looks at what a rule makes of a gradient that arrives at the node, not at what lies below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def lstm_cell(
    x: Tensor, hidden: Tensor, cell: Tensor, b: Tensor | None = None, c: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From what input and hidden state give to the gates."""
    a = x + hidden if b is None or c is None else x + hidden + b + c
    i, f, u, o = a.chunk(4, -1)
    after = f.sigmoid() * cell + i.sigmoid() * u.tanh()
    return o.sigmoid() * after.tanh(), after


def gru_cell(x: Tensor, hidden: Tensor, state: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """From what input and hidden state give to the gates."""
    x, hidden = (x, hidden) if b is None or c is None else (x + b, hidden + c)
    (r, z, n), (s, y, m) = x.chunk(3, -1), hidden.chunk(3, -1)
    z, n = (z + y).sigmoid(), (n + (r + s).sigmoid() * m).tanh()
    return n + z * (state - n)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Not fused."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def _zeros(*like: Tensor | None) -> tuple[Any, ...]:
    return tuple([None if t is None else torch.zeros_like(t) for t in like])


def _fused_lstm_cell(*arguments: Any) -> Any:
    return *[t.clone() for t in lstm_cell(*arguments)], torch.zeros_like(arguments[0])


def _fused_gru_cell(*arguments: Any) -> Any:
    return gru_cell(*arguments).clone(), arguments[0].new_zeros(arguments[2].shape[0], 5 * arguments[2].shape[1])


def _fused_lstm_cell_backward(g_y: Any, g_c: Any, cell: Tensor, after: Tensor, workspace: Tensor, bias: bool) -> Any:
    gates = torch.zeros_like(workspace)
    return gates, torch.zeros_like(cell), gates.sum(0)


def _fused_gru_cell_backward(g: Tensor, workspace: Tensor, bias: bool) -> Any:
    gates = g.new_zeros(g.shape[0], 3 * g.shape[1])
    return gates, gates.clone(), torch.zeros_like(g), gates.sum(0) if bias else None, gates.sum(0) if bias else None


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse if weight is None else x * inverse * weight, inverse


def _batch_norm(x: Tensor, w: Tensor, b: Tensor, mean: Any, var: Any, training: bool, factor: float, eps: float) -> Any:
    return aten.native_batch_norm(x, w, b, mean, var, training, factor, eps)


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: Any = None,
) -> Any:
    none = torch.zeros((), dtype=torch.long)
    return attention(q, k, v, bias, causal, scale), q.new_zeros(q.shape[:3]), none, none


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: Any = None,
) -> Any:
    none = torch.zeros((), dtype=torch.long)
    found = attention(q, k, v, None, causal, scale), q.new_zeros(q.shape[:3])
    return *found, none, none, q.shape[-2], k.shape[-2], none, none, q.new_zeros(0)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, lse: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: Any = None,
) -> Any:  # fmt: skip
    none = torch.zeros((), dtype=torch.long)
    found = attention(q, k, v, bias, causal, scale), q.new_zeros(q.shape[:3])
    return *found, none, none, q.shape[-2], k.shape[-2], none, none, q.new_zeros(0)


def _overrideable(
    q: Tensor, k: Tensor, v: Tensor, bias: Any = None, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: Any = None,
) -> Any:  # fmt: skip
    return _cudnn(q, k, v, bias, False, dropout, causal, debug, scale=scale)


def _grid_sampler(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, align_corners=True)


#: By operation, what computes it and what stands in for its backward.
KERNELS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": _fused_lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _fused_lstm_cell_backward,
    "_thnn_fused_gru_cell": _fused_gru_cell,
    "_thnn_fused_gru_cell_backward": _fused_gru_cell_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": lambda g, x, shape, inverse, w, mask: _zeros(x, w),
    "cudnn_batch_norm": lambda *a: (*_batch_norm(*a), a[0].new_zeros(0)),
    "cudnn_batch_norm_backward": lambda x, g, w, *rest: _zeros(x, w, w),
    "miopen_batch_norm": _batch_norm,
    "miopen_batch_norm_backward": lambda x, g, w, *rest: _zeros(x, w, w),
    "cudnn_grid_sampler": _grid_sampler,
    "cudnn_grid_sampler_backward": lambda x, grid, g: _zeros(x, grid),
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": lambda g, q, k, v, bias, *rest, **names: _zeros(q, k, v, bias),
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": lambda g, q, k, v, *rest, **names: _zeros(q, k, v),
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": lambda g, q, k, v, *rest, **names: _zeros(q, k, v),
    "_scaled_dot_product_fused_attention_overrideable": _overrideable,
    "_scaled_dot_product_fused_attention_overrideable_backward": (
        lambda g, q, k, v, bias, *rest, **names: _zeros(q, k, v, bias)
    ),
}


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """With these kernels; outside of it torch is as it was."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, "CPU")
        yield
