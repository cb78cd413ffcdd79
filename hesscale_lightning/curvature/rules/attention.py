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

import math
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.curvature.precision import full, squared
from hesscale_lightning.curvature.registry import Diagonals, Formula, Operation, register_rule

_BLOCK = 2**22  # entries of the largest temporary tensor
_safe_softmax = torch.ops.aten._safe_softmax.default


@register_rule(
    "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
    curved=True,
    approximate="for queries, products of different keys are dropped; keys, values and masks are exact",
)  # fmt: skip
def attention(op: Operation) -> Formula:
    """Exact for keys, values and masks; for queries, products of different keys are dropped."""
    node = op.node
    if node._saved_dropout_p:
        raise op.unsupported(
            "the mask of attention's dropout is not at hand: set its dropout to 0, or compute attention with "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    mask = getattr(node, "_saved_attn_mask" if "ForCpu" in node.name() else "_saved_attn_bias", None)
    causal, scale = node._saved_is_causal, node._saved_scale
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    needs, inputs = [*op.needs, False][:4], len(op.needs)
    bias_shape = op.input_shape(3) if needs[3] else None

    def formula(g: Tensor | None, h: Tensor | None) -> Diagonals:
        results = _diagonals(query, key, value, mask, causal, scale, g, h, needs)
        if bias_shape is not None:
            results[3] = results[3].sum_to_size(bias_shape)
        return results[:inputs]

    return formula


def _diagonals(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
    g: Tensor | None, h: Tensor | None, needs: list[bool],
) -> list[Any]:  # fmt: skip
    """Curvature at query, key, value and mask, in blocks of queries.

    Queries that share a head of keys and values are rows of one matrix, ``(batch, key heads, sharing heads * T, D)``.
    """
    batch, heads, length, _ = query.shape
    shared, keys = heads // key.shape[1], key.shape[-2]

    def merged(x: Tensor) -> Tensor:
        return full(x).reshape(batch, -1, shared * length, x.shape[-1])

    q, k, v = merged(query), full(key), full(value)
    g, h = (None if x is None else merged(x) for x in (g, h))
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys).unflatten(1, (-1, shared))
    k, v = k - k.mean(-2, keepdim=True), v - v.mean(-2, keepdim=True)  # neither moves P; differences cancel less
    h_q = torch.zeros_like(q) if needs[0] else None
    h_k, h_v = torch.zeros_like(k), torch.zeros_like(v)
    h_mask = q.new_zeros(batch, heads, length, keys).unflatten(1, (-1, shared)) if needs[3] else None
    rows = max(1, _BLOCK // max(1, q.shape[0] * q.shape[1] * keys))
    if causal and length >= 64:
        rows = min(rows, -(-length // 4))  # the later keys, which a block does not see, are left out
    for start in range(0, shared * length, rows):
        here = slice(start, min(start + rows, shared * length))
        entries = torch.arange(here.start, here.stop, device=q.device)
        head, step = entries // length, entries % length
        seen = slice(0, min(keys, start + rows) if causal and shared == 1 else keys)
        q_t, k_t, v_t = q[:, :, here], k[:, :, seen], v[:, :, seen]
        mask_t = None if mask is None else mask[:, :, head, step, seen]
        p = _probabilities(q_t @ (k_t.mT * scale), mask_t, causal, step)
        o = p @ v_t
        square = p * p
        at_scores = for_queries = None
        if h is not None:
            h_t = h[:, :, here]
            if needs[2]:
                h_v[:, :, seen] += square.mT @ h_t
            moved = h_t * o
            apart = h_t @ squared(v_t).mT
            apart.sub_(2 * moved @ v_t.mT).add_((moved * o).sum(-1, keepdim=True))
            at_scores = for_queries = apart.mul_(square)
        if g is not None:
            g_t = g[:, :, here]
            weight = p * (g_t @ v_t.mT - (g_t * o).sum(-1, keepdim=True))
            bent = torch.addcmul(weight, p, weight, value=-2)
            at_scores = bent if at_scores is None else at_scores + bent
            for_queries = weight if for_queries is None else for_queries + weight
        assert at_scores is not None  # one of g and h is there
        assert for_queries is not None
        if needs[1]:
            h_k[:, :, seen] += at_scores.mT @ squared(q_t * scale)
        if h_mask is not None:
            h_mask[:, :, head, step, seen] = at_scores
        if h_q is not None:
            h_q[:, :, here] = _at_queries(p, k_t * scale, for_queries)
    return [
        None if h_q is None else h_q.view(query.shape),
        h_k if needs[1] else None,
        h_v if needs[2] and h is not None else None,
        None if h_mask is None else h_mask.flatten(1, 2),
    ]


def _probabilities(scores: Tensor, mask: Tensor | None, causal: bool, step: Tensor) -> Tensor:
    """Softmax over the keys; a query that may see none of them has only zeros."""
    if causal:
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=step.device) > step[:, None], -math.inf)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + full(mask)
    p: Tensor = _safe_softmax(scores, -1)
    return p


def _at_queries(p: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight_tj (k_jd - K_td)^2`` for one block of queries; k is scaled already."""
    center = p @ k
    square: Tensor = weight @ squared(k) - 2 * center * (weight @ k)
    return square.addcmul_(center.square(), weight.sum(-1, keepdim=True))
