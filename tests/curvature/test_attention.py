"""Fused attention against dense derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hesscale_lightning.curvature import UnsupportedOperationError, backward, coverage, exact_local_diag
from hesscale_lightning.curvature.rules import attention
from tests.curvature.oracle import Case, Probe, check, node_names

NODE = "ScaledDotProductFlashAttentionForCpuBackward0"
generator = torch.Generator().manual_seed(3)
VISIBLE = torch.rand((4, 5), generator=generator) > 0.4
VISIBLE[1] = False  # a query that sees nothing
PER_SAMPLE = torch.rand((2, 1, 1, 5), generator=generator) > 0.3
BIAS = torch.randn((2, 2, 4, 5), generator=generator, dtype=torch.float64)
QKV = [(2, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3)]


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=VISIBLE.to(q.device))


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~VISIBLE.to(q.device), -torch.inf)
    return torch._safe_softmax(scores, -1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def grouped_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=BIAS[:1, :1].to(q), enable_gqa=True)


def with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=BIAS.to(q))


def by_hand(function: object) -> object:
    """Torch differentiates its fused attention only once: the same through the composed one."""

    def operation(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*inputs)  # type: ignore[operator]

    return operation


def case(name: str, function: object, inputs: object = QKV, reference: object = None) -> Case:
    """Queries, keys and values: exact as far as the queries are, that is, at a loss."""
    composed = reference or by_hand(function)
    return Case(name, function, inputs, [NODE], reference=composed, at_loss=True)  # type: ignore[arg-type]


def of_keys_and_values(full: Case) -> Case:
    """The same with constant queries: exact everywhere."""
    q = full.tensors()[0].detach()
    return Case(
        f"{full.name}, keys and values",
        lambda k, v: full.operation(q.to(k), k, v),
        full.inputs[1:],
        full.nodes,
        reference=lambda k, v: full.reference(q.to(k), k, v),  # type: ignore[misc]
    )


CASES = [
    case("plain", scaled_dot_product_attention),
    case("causal", lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)),
    case("scaled", lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.9)),
    case("mask", masked, reference=masked_by_hand),
    case("mask of samples", lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=PER_SAMPLE.to(q.device))),
    case("bias", with_bias),
    case("grouped queries", grouped, [(2, 4, 3, 2), (2, 2, 3, 2), (2, 2, 3, 2)]),
    case("grouped queries with bias", grouped_with_bias, [(1, 4, 4, 2), (1, 2, 5, 2), (1, 2, 5, 2)]),
]


CASES += [of_keys_and_values(case) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_dense_derivatives(case: Case) -> None:
    check(case)


def fused(name: str, *arguments: object) -> object:
    """Of another device."""
    operation = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    return lambda q, k, v: operation(q, k, v, *[a.to(q) if isinstance(a, Tensor) else a for a in arguments])[0]


def of_device(name: str, node: str, function: object, reference: object) -> list[Case]:
    whole = Case(name, function, QKV, [node], reference=by_hand(reference), at_loss=True)  # type: ignore[arg-type]
    return [whole, of_keys_and_values(whole)]


def of_bias(b: Tensor) -> Tensor:
    q, k, v = (x.to(b) for x in CONSTANT)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, b.expand(2, 2, 4, 5), True)[0]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


EFFICIENT, FLASH, CUDNN = (f"ScaledDotProduct{name}AttentionBackward0" for name in ("Efficient", "Flash", "Cudnn"))
OTHER = "ScaledDotProductFusedAttentionOverrideableBackward0"
CONSTANT = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in QKV]
OF_DEVICES = [
    *of_device("efficient", EFFICIENT, fused("efficient_attention", None, True), scaled_dot_product_attention),
    *of_device("efficient, causal", EFFICIENT, fused("efficient_attention", None, True, 0.0, True), causal),
    *of_device("efficient, bias", EFFICIENT, fused("efficient_attention", BIAS, True), with_bias),
    *of_device("flash", FLASH, fused("flash_attention"), scaled_dot_product_attention),
    *of_device("flash, causal", FLASH, fused("flash_attention", 0.0, True), causal),
    *of_device("cuDNN", CUDNN, fused("cudnn_attention", None, True), scaled_dot_product_attention),
    *of_device("cuDNN, bias", CUDNN, fused("cudnn_attention", BIAS, True), with_bias),
    *of_device("other devices", OTHER, fused("fused_attention_overrideable", BIAS), with_bias),
    Case(
        "efficient, learned bias", of_bias, [(1, 2, 4, 5)], [EFFICIENT],
        reference=by_hand(lambda b: scaled_dot_product_attention(*CONSTANT, attn_mask=b)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", OF_DEVICES, ids=lambda case: case.name)
def test_rule_of_another_device_equals_dense_derivatives(case: Case, device_kernels: None) -> None:
    check(case)


def test_queries_drop_products_of_different_keys_and_nothing_else() -> None:
    """The exact diagonal is a square of a sum over keys; the rule keeps the squares of its terms."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in QKV)
    h = torch.rand(2, 2, 4, 3, dtype=torch.float64)
    backward(Probe.apply(1, scaled_dot_product_attention(q, k, v), torch.zeros_like(h), h), [q])
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT * scale).softmax(-1).detach()
    apart_k = k.detach().unsqueeze(2) - (p @ k.detach()).unsqueeze(3)  # (.., t, j, d): k_jd - K_td
    apart_v = v.detach().unsqueeze(2) - (p @ v.detach()).unsqueeze(3)
    terms = torch.einsum("bhtj,bhtjd,bhtje->bhtjde", p, apart_k, apart_v) * scale  # of dO_te / dq_td, by key
    torch.testing.assert_close(q.hess_diag, torch.einsum("bhtjde,bhte->bhtd", terms.square(), h), rtol=1e-9, atol=1e-14)
    (exact,) = exact_local_diag(
        by_hand(lambda q: scaled_dot_product_attention(q, k, v)), [q], [torch.zeros_like(h)], [h]
    )
    torch.testing.assert_close(exact, torch.einsum("bhtde,bhte->bhtd", terms.sum(3).square(), h), rtol=1e-9, atol=1e-14)


def test_the_report_says_so() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in QKV)
    (entry,) = coverage(scaled_dot_product_attention(q, k, v).square().sum()).approximate
    assert entry.operation == NODE
    assert "queries" in entry.reason


@pytest.mark.parametrize("block", [1, 40])
@pytest.mark.parametrize("name", ["causal", "mask", "grouped queries", "grouped queries with bias"])
def test_blocks_add_up(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    check(next(case for case in CASES if case.name == name))


@pytest.mark.parametrize("heads", [2, 4])
def test_later_keys_are_left_out_of_long_causal_attention(heads: int) -> None:
    """The same as with a mask, where they are not."""
    found = []
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(70, 70, dtype=torch.bool).tril()}):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, n, 70, 2, dtype=torch.float64, requires_grad=True) for n in (heads, 2, 2))
        loss = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).pow(3).sum()
        assert NODE in node_names(loss)
        backward(loss)
        found.append([q.hess_diag, k.hess_diag, v.hess_diag])
    for causal, with_mask in zip(*found, strict=True):
        torch.testing.assert_close(causal, with_mask, rtol=1e-10, atol=1e-12)


def test_in_float32() -> None:
    check(of_keys_and_values(CASES[1]), torch.float32)


def test_dropout_runs_as_composed_operations() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in QKV)
    loss = scaled_dot_product_attention(q, k, v, dropout_p=0.3).square().sum()
    assert NODE not in node_names(loss)
    backward(loss)
    assert all(x.hess_diag.isfinite().all() for x in (q, k, v))


def test_fused_dropout_is_refused_with_advice(device_kernels: None) -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in QKV)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.1)[0]
    with pytest.raises(UnsupportedOperationError, match="MATH"):
        backward(output.sum())
