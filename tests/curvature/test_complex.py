"""A complex tensor between the loss and a parameter is refused when the loss is attached, and nothing is written."""

import warnings

import pytest
import torch

from hesscale_lightning.curvature import UnsupportedOperationError, attach, coverage, supported_params

A = torch.randn(3, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
B = A.real.abs() + 0.1


def _written_into(w):
    z = torch.zeros(3, 3, dtype=torch.complex64)
    z[0] = w[0].to(torch.complex64)
    return z


LOSSES = {
    "matrix product": lambda w: (w.to(torch.complex64) @ A).abs().pow(2).sum(),
    "angle": lambda w: (w.to(torch.complex64) @ A).angle().sum(),
    "times a complex constant": lambda w: (w * A).abs().sum(),
    "times a complex number": lambda w: (w * 1j).abs().square().sum(),
    "plus a complex number": lambda w: (w + 1j).abs().sum(),
    "plus a complex constant": lambda w: (w + A).abs().sum(),
    "divided": lambda w: (w / A).abs().sum(),
    "to a complex power": lambda w: (w**A).abs().sum(),
    "exponential": lambda w: (1j * w).exp().abs().sum(),
    "fft": lambda w: torch.fft.fft(w).abs().sum(),
    "fft and back": lambda w: torch.fft.irfft(torch.fft.rfft(w)).square().sum(),
    "stft": lambda w: torch.stft(w.flatten(), 4, window=torch.ones(4), return_complex=True).abs().sum(),
    "view_as_complex": lambda w: torch.view_as_complex(w[:, :2].contiguous()).abs().sum(),
    "view_as_real": lambda w: torch.view_as_real(w * A).square().sum(),
    "polar": lambda w: torch.polar(B, w).abs().sum(),
    "complex": lambda w: torch.complex(w, B).abs().square().sum(),
    "real": lambda w: (w * A).real.square().sum(),
    "imag": lambda w: (w * A).imag.square().sum(),
    "norm": lambda w: torch.linalg.vector_norm(w * A) ** 2,
    "conj": lambda w: ((w * A).conj() * (w * A)).real.sum(),
    "conj_physical": lambda w: torch.conj_physical(w * A).abs().sum(),
    "einsum": lambda w: torch.einsum("ij,jk->ik", w.to(torch.complex64), A).abs().square().sum(),
    "sum of casts": lambda w: w.to(torch.complex64).sum().abs(),
    "there and back": lambda w: w.to(torch.complex64).to(torch.float32).square().sum(),
    "summed as real": lambda w: (w * A).sum(dtype=torch.float32).square(),
    "copied": lambda w: torch.zeros(3, 3, dtype=torch.complex64).copy_(w).abs().sum(),
    "copied back": lambda w: torch.zeros(3, 3).copy_(w * A).square().sum(),
    "written into a part": lambda w: _written_into(w).abs().square().sum(),
    "where": lambda w: torch.where(B > 1, w.to(torch.complex64), A).abs().sum(),
    "cat": lambda w: torch.cat([w, A]).abs().sum(),
    "determinant": lambda w: torch.linalg.slogdet(w * A)[1],
    "variance": lambda w: (w * A).var(),
    "eigenvalues": lambda w: torch.linalg.eigvals(w).abs().sum(),
    "dot product": lambda w: torch.vdot(w[0].to(torch.complex64), A[0]).abs(),
    "inside a network": lambda w: torch.softmax((w.tanh() * A).abs(), 1).square().sum(),
}


def _weight():
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _loss(name, w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts that discard the imaginary part
        return LOSSES[name](w)


@pytest.mark.parametrize("name", LOSSES)
def test_complex_tensors_are_refused(name):
    w = _weight()
    loss = _loss(name, w)
    with pytest.raises(UnsupportedOperationError, match="complex") as error:
        attach(loss)
    assert "Path from the loss" in str(error.value)
    assert w.grad is None
    assert not hasattr(w, "hess_diag")
    assert not coverage(loss).supported
    assert supported_params(loss, [w]) == ([], [w])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss.backward()  # the graph is as it was
    assert w.grad is not None
    assert not hasattr(w, "hess_diag")


@pytest.mark.parametrize("method", ["hesscale_gn", "bl89", "hesscale_rank1"])
def test_by_every_method(method):
    with pytest.raises(UnsupportedOperationError, match="complex"):
        attach(_loss("matrix product", _weight()), method=method)


@pytest.mark.parametrize("operation", [torch.mul, torch.add, torch.sub, torch.div, torch.matmul])
def test_a_plan_for_real_tensors_is_not_taken_for_complex_ones(operation):
    """A graph's structure is the same in both."""
    for leave in (torch.abs, lambda z: torch.linalg.vector_norm(z, dim=1), lambda z: z.var(0)):
        for _ in range(3):
            w = _weight()
            loss = leave(operation(w, A.real.contiguous())).sum()
            attach(loss)
            loss.backward()
            assert w.hess_diag.isfinite().all()
        w = _weight()
        z = w if operation is not torch.matmul else w.to(torch.complex64)
        with pytest.raises(UnsupportedOperationError, match="complex"):
            attach(leave(operation(z, A)).sum())


def test_complex_parameters_are_a_type_error():
    w = A.clone().requires_grad_()
    with pytest.raises((TypeError, UnsupportedOperationError), match="complex"):
        attach(w.abs().square().sum())
    assert w.grad is None
    assert not hasattr(w, "hess_diag")


def test_complex_tensors_beside_the_way_do_not_matter():
    """A complex part of the loss that leads to no wanted parameter."""
    w, v = _weight(), _weight()
    loss = w.square().sum() + (v * A).abs().sum()
    attach(loss, [w])
    loss.backward()
    assert torch.equal(w.hess_diag, torch.full((3, 3), 2.0))
    constant = (A * A.conj()).real
    w = _weight()
    loss = (constant * w**2).sum()
    attach(loss)
    loss.backward()
    torch.testing.assert_close(w.hess_diag, 2 * constant)


def test_supported_params_splits_at_complex_tensors():
    w, v = _weight(), _weight()
    assert supported_params(w.square().sum() + (v * A).abs().sum(), [w, v]) == ([w], [v])
