"""Fused scaled dot product attention: exact for keys, values and masks, nearly for queries, at attention's own cost.

Per head, with ``S = s q k^T + mask``, ``P = softmax(S)``, ``O = P V``, ``K = P k``, and g, h at ``O``: one entry of S
moves one row of O, so that at the scores, and at a mask that is learned, the curvature is

    E_tj = P_tj^2 sum_e (V_je - O_te)^2 h_te  +  P_tj (1 - 2 P_tj) sum_e (V_je - O_te) g_te

One entry of k moves one column of S, one entry of v one row of V:

    h_k = s^2 E^T q^2,    h_v = (P^2)^T h

One entry of q moves a whole row of S. With ``w_tj = P_tj sum_e (V_je - O_te) g_te`` the exact diagonal is

    h_q = s^2 sum_e (sum_j P_tj (k_jd - K_td) (V_je - O_te))^2 h_te  +  s^2 sum_j w_tj (k_jd - K_td)^2

whose first term costs ``T S D^2`` where attention costs ``T S D``. So the products of different keys in the square are
dropped, as the recursion through the separate operations drops them:

    h_q = s^2 sum_j (P_tj^2 sum_e (V_je - O_te)^2 h_te + w_tj) (k_jd - K_td)^2
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hesscale_lightning.curvature.operation import Operation
from hesscale_lightning.curvature.registry import register_rule
from hesscale_lightning.curvature.values import Value, opaque

# Entries of the largest temporary tensors: on the CPU few enough for its cache, elsewhere enough to keep it busy.
_BLOCK, _BLOCK_ELSEWHERE = 2**16, 2**22
_safe_softmax = torch.ops.aten._safe_softmax.default


def _no_dropout(op: Operation) -> None:
    if op.number("dropout_p"):
        raise op.unsupported(
            "the mask of attention's dropout is not at hand: set its dropout to 0, or compute attention with "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )


@register_rule(
    "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
    approximate="for queries, products of different keys are dropped; keys, values and masks are exact",
    check=_no_dropout,
)  # fmt: skip
def attention(op: Operation, g: Value, h: Value) -> Sequence[Value]:
    """Exact for keys, values and masks; for queries, products of different keys are dropped."""
    query, key, value = op.input(0, "query"), op.input(1, "key"), op.input(2, "value")
    name = "attn_mask" if "ForCpu" in op.name else "attn_bias"
    mask = op.tensor(name) if op.has(name) else None
    needs = (*op.needs, False)[:4]
    results: Sequence[Value] = _diagonals(
        query, key, value, mask, op.number("is_causal"), op.number("scale"), g, h, needs
    )
    if needs[3]:
        results = (*results[:3], results[3].sum_to_size(op.input_shape(3)))
    return results[: len(op.needs)]


@opaque
def _diagonals(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    g: Tensor | None, h: Tensor | None, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Curvature at query, key, value and mask, in blocks of heads and of queries.

    Queries that share a head of keys and values are rows of one matrix: a group, of which there are ``batch * heads of
    keys``. Seven products in all, because what meets the same matrix does so in one: k, v and their squares lie side by
    side.
    """
    batch, heads, length, size = query.shape
    shared, keys, width = heads // key.shape[1], key.shape[-2], value.shape[-1]
    groups, queries = batch * key.shape[1], shared * length
    scale = 1 / math.sqrt(size) if scale is None else scale
    sides = _side_by_side(key, value, scale)
    q, g, h = (None if x is None else x.reshape(groups, queries, x.shape[-1]) for x in (query, g, h))
    assert q is not None
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys).unflatten(1, (-1, shared))  # no copy: a block's at a time
    h_q = q.new_empty(groups, queries, size) if needs[0] else None
    h_k = q.new_zeros(groups, keys, size) if needs[1] else None
    h_v = q.new_zeros(groups, keys, width) if needs[2] and h is not None else None
    h_mask = q.new_zeros(groups, queries, keys) if needs[3] else None
    block = _BLOCK if q.device.type == "cpu" else _BLOCK_ELSEWHERE
    rows = max(1, min(queries, block // max(1, keys)))
    if causal and length >= 64:
        rows = min(rows, -(-length // 4))  # the later keys, which a block does not see, are left out
    together = max(1, block // max(1, rows * keys))
    for first, start in itertools.product(range(0, groups, together), range(0, queries, rows)):
        some, here = slice(first, min(groups, first + together)), slice(start, min(queries, start + rows))
        seen = slice(0, min(keys, here.stop) if causal and shared == 1 else keys)
        side, q_t = sides[some, seen], q[some, here]
        # Of the columns 1, k^2, k, v, 1, v^2:
        k = side[..., 1 + size : 1 + 2 * size]
        k_and_v = side[..., 1 + size : 1 + 2 * size + width]
        v_and_one = side[..., 1 + 2 * size : 2 + 2 * size + width]
        v_and_square = side[..., 1 + 2 * size :]
        p = _probabilities(q_t @ k.mT, mask, causal, some, here, seen, length)
        center, o = (p @ k_and_v).split([size, width], -1)
        at_scores = for_queries = None
        if g is not None:
            g_t = g[some, here]
            for_queries = torch.cat([g_t, -(g_t * o).sum(-1, keepdim=True)], -1) @ v_and_one.mT
            for_queries *= p
            at_scores = torch.addcmul(for_queries, p, for_queries, value=-2)
        if h is not None:
            h_t = h[some, here]
            moved = h_t * o
            square = p.square_()
            if h_v is not None:
                h_v[some, seen].baddbmm_(square.mT, h_t)
            # sum_e (V_je - O_te)^2 h_te
            apart = torch.cat([-2 * moved, (moved * o).sum(-1, keepdim=True), h_t], -1) @ v_and_square.mT
            apart *= square
            if for_queries is None or at_scores is None:
                at_scores = for_queries = apart
            else:
                at_scores += apart
                for_queries += apart
        assert at_scores is not None  # one of g and h is there
        assert for_queries is not None
        if h_k is not None:
            h_k[some, seen].baddbmm_(at_scores.mT, q_t.square(), alpha=scale * scale)
        if h_mask is not None:
            h_mask[some, here, seen] = at_scores
        if h_q is not None:  # sum_j w_tj (k_jd - K_td)^2
            total, twice, once = (for_queries @ side[..., : 1 + 2 * size]).split([1, size, size], -1)
            h_q[some, here] = (center * total).sub_(once, alpha=2).mul_(center).add_(twice)
    return (
        None if h_q is None else h_q.view(query.shape),
        None if h_k is None else h_k.view(key.shape),
        None if h_v is None else h_v.view(value.shape),
        None if h_mask is None else h_mask.view(batch, heads, length, keys),
    )


def _side_by_side(key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The columns 1, k^2, k, v, 1, v^2, with scaled keys.

    A shift of all keys, or of all values, moves no probability; their means are taken off, so that differences of
    squares cancel less.
    """
    groups, keys = key.shape[0] * key.shape[1], key.shape[-2]
    size, width = key.shape[-1], value.shape[-1]
    sides = key.new_empty(groups, keys, 2 + 2 * size + 2 * width)
    one, k_square, k, v, one_too, v_square = sides.split([1, size, size, width, 1, width], -1)
    key, value = key.reshape(groups, keys, size), value.reshape(groups, keys, width)
    torch.sub(key, key.mean(-2, keepdim=True), out=k).mul_(scale)
    torch.sub(value, value.mean(-2, keepdim=True), out=v)
    torch.mul(k, k, out=k_square)
    torch.mul(v, v, out=v_square)
    one.fill_(1)
    one_too.fill_(1)
    return sides


def _probabilities(
    scores: Tensor, mask: Tensor | None, causal: bool, some: slice, here: slice, seen: slice, length: int
) -> Tensor:
    """Softmax over the keys; a query that may see none of them has only zeros.

    Args:
        scores: Of these groups, queries and keys; may be changed.
        mask: ``(batch, heads of keys, sharing heads, T, S)``, or None.
        causal: Whether later keys are hidden.
        some: Which groups these are.
        here: Which queries of each.
        seen: Which keys.
        length: T.
    """
    if not causal and mask is None:
        return scores.softmax(-1)
    entries = torch.arange(here.start, here.stop, device=scores.device)
    head, step = entries // length, entries % length
    if causal:
        later = torch.arange(scores.shape[-1], device=scores.device) > step[:, None]
        scores.masked_fill_(later, -math.inf)
    if mask is None:
        return scores.softmax(-1)
    group = torch.arange(some.start, some.stop, device=scores.device)[:, None]
    heads = mask.shape[1]
    at_block = mask[group // heads, group % heads, head, step, seen]
    if mask.dtype is torch.bool:
        scores.masked_fill_(~at_block, -math.inf)
    else:
        scores.add_(at_block)
    p: Tensor = _safe_softmax(scores, -1)
    return p
