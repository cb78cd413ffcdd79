"""Each operator that torch itself can list: exact, reported as approximate, or refused before anything is written."""

from __future__ import annotations

import warnings

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, attach, coverage, exact_local_diag
from tests.curvature.operator_database import Sample, node_by_node, operators, small_samples
from tests.curvature.oracle import Probe

#: Operators whose backward cannot be differentiated, so that there is nothing to compare with: only finite is demanded.
#: The tables of the families check the rules against the same functions in other words.
WITHOUT_REFERENCE = {
    "nn_functional_ctc_loss",
    "nn_functional_hardsigmoid",
    "nn_functional_multi_margin_loss",
    "nn_functional_multilabel_margin_loss",
}
if Version(torch.__version__) < Version("2.14"):
    WITHOUT_REFERENCE |= {"cdist", "nn_functional_pdist"}
else:  # these have learned it, and fused attention on the CPU has forgotten it
    WITHOUT_REFERENCE |= {
        "nn_functional_scaled_dot_product_attention",
        "torch_ops_aten__scaled_dot_product_flash_attention_for_cpu",
    }

#: Operators of whose samples torch differentiates none in place.
NOT_IN_PLACE = {"acosh", "asinh", "atanh"}

_operators = operators()
_inplace = {
    name for name, op in _operators.items() if op.get_inplace() is not None and name.split("_")[0] not in NOT_IN_PLACE
}
_cases = [(name, False) for name in _operators] + [(name, True) for name in sorted(_inplace)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "inplace"),
    _cases,
    ids=[name + "_" * inplace for name, inplace in _cases],
)
def test_operator(name, inplace):
    samples = small_samples(_operators[name], inplace)
    assert samples, "the database has no sample with a derivative"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in samples:
            _check(sample, name in WITHOUT_REFERENCE)


def test_operators_without_reference_have_none():
    """The list is no excuse for operators that can be checked."""
    for name in WITHOUT_REFERENCE:
        sample = small_samples(_operators[name], limit=1)[0]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"derivative for .* is not implemented"):
            exact_local_diag(sample.function, sample.inputs, *_arriving(sample.function(*sample.fresh())))


def _arriving(outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient and curvature at each output."""
    generator = torch.Generator().manual_seed(3)
    g, h = (
        [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs] for _ in range(2)
    )
    return g, h


def _loss(sample: Sample) -> tuple[list[Tensor], Tensor]:
    inputs = sample.fresh()
    outputs = sample.function(*inputs)
    g, h = _arriving(outputs)
    return inputs, Probe.apply(len(outputs), *outputs, *g, *h)


def _check(sample: Sample, finite_only: bool) -> None:
    inputs, loss = _loss(sample)
    report = coverage(loss)
    first = None
    for _ in range(3):  # planned, followed, followed again
        inputs, loss = _loss(sample)
        try:
            attach(loss)
        except UnsupportedOperationError:
            assert not report.supported, f"attach refuses what coverage does not:\n{report}"
            assert all(x.grad is None and not hasattr(x, "hess_diag") for x in inputs)
            return
        assert report.supported, f"coverage refuses what attach does not:\n{report}"
        loss.backward()
        assert all(x.grad is None or x.hess_diag is not None for x in inputs)
        found = [torch.zeros_like(x) if x.grad is None else x.hess_diag for x in inputs]
        first = first or found
        assert _alike(found, first), "the second pass over one structure differs from the first"
    if finite_only:
        assert all(h.isfinite().all() for h in found)
        return
    outputs = sample.function(*sample.fresh())
    expected = exact_local_diag(sample.function, sample.inputs, *_arriving(outputs))
    if not all(h.isfinite().all() for h in expected):
        return  # the derivative itself is not finite here
    if _alike(found, expected):
        return
    assert all(h.isfinite().all() for h in found)
    if report.approximate:
        return
    inputs, loss = _loss(sample)
    one_by_one = node_by_node(loss, inputs)
    if any("joined" in entry.reason for entry in report.entries) and len(report.entries) > 2:
        return  # more than one operation, and not the nodes that torch has: the random graphs test those
    assert _alike(found, one_by_one), f"found {found}\nthe operator's {expected}\nby nodes {one_by_one}\n{report}"


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    scale = max([float(e.abs().nan_to_num(nan=0.0).max()) for e in expected if e.numel()], default=0.0)
    return all(
        f.shape == e.shape and torch.allclose(f, e, rtol=0, atol=1e-8 * max(scale, 1e-2), equal_nan=True)
        for f, e in zip(found, expected, strict=True)
    )
