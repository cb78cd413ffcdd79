"""Complex tensors between parameters and loss are refused, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesscale_lightning.curvature import UnsupportedOperationError, attach, backward, coverage

A = torch.tensor([[1.0 + 2.0j, 0.5j], [-1.0 + 0.0j, 2.0 - 1.0j]])

GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "product with a complex matrix": lambda w: (w.to(torch.complex64) @ A).abs().pow(2).sum(),
    "product with a complex number": lambda w: (w * (1 + 2j)).abs().sum(),
    "product entry by entry": lambda w: (w * A).abs().sum(),
    "sum with complex numbers": lambda w: (w + A).abs().square().sum(),
    "angle": lambda w: (w.to(torch.complex64) * A).angle().sum(),
    "real part": lambda w: (w * A).real.square().sum(),
    "imaginary part": lambda w: (w * A).imag.exp().sum(),
    "as real": lambda w: torch.view_as_real(w * A).square().sum(),
    "as complex": lambda w: torch.view_as_complex(w).abs().sum(),
    "made of two": lambda w: torch.complex(w, w * 2).abs().sum(),
    "polar": lambda w: torch.polar(w.abs() + 1, w).real.sum(),
    "fourier": lambda w: torch.fft.fft(w).abs().square().sum(),
    "norm": lambda w: torch.linalg.vector_norm(w * A),
    "variance": lambda w: (w * A).var(),
    "conjugate": lambda w: ((w * A) * (w * A).conj()).real.sum(),
    "einsum": lambda w: torch.einsum("ij,jk->ik", w.to(torch.complex64), A).abs().sum(),
    "in a view": lambda w: (w * A).t().abs().sum(),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_complex_tensors_are_refused_before_anything_is_written(name: str) -> None:
    w = torch.tensor([[1.0, 2.0], [-0.5, 3.0]], requires_grad=True)
    loss = GRAPHS[name](w)
    with pytest.raises(UnsupportedOperationError, match=r"complex|no curvature rule"):
        backward(loss)
    assert w.grad is None
    assert getattr(w, "hess_diag", None) is None
    assert not coverage(GRAPHS[name](w)).supported


def test_complex_tensors_are_refused_also_where_real_ones_came_before() -> None:
    """The same nodes, for which there is a program."""
    w = torch.tensor([[1.0, 2.0], [-0.5, 3.0]], requires_grad=True)
    for make in (lambda a: (w * a).abs().sum(), lambda a: (w + a).abs().square().sum()):
        for _ in range(3):
            attach(make(A.real)).remove()
            backward(make(A.real))
        with pytest.raises(UnsupportedOperationError, match="complex"):
            attach(make(A))
