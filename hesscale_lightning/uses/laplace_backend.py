"""HesScaleGN for laplace-torch: diagonal posteriors from one backward pass for each batch.

Needs the package ``laplace-torch``: ``pip install 'hesscale_lightning[laplace]'``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hesscale_lightning.curvature import backward

try:
    from laplace.curvature import GGNInterface
except ImportError:  # then there is no Laplace to give the backend to; the class can be imported all the same

    class GGNInterface:  # type: ignore[no-redef]
        """Stands for laplace-torch's."""

        def __init__(self, *args: Any) -> None:
            raise ImportError(
                "The backend for Laplace posteriors needs laplace-torch: pip install 'hesscale_lightning[laplace]'"
            )


class HesScaleGGN(GGNInterface):
    r"""A curvature backend of laplace-torch for ``hessian_structure="diag"``, of all layers, some, or the last one.

    The diagonal of the generalized Gauss-Newton matrix :math:`\sum_n J_n^\top \Lambda_n J_n`, which is what the
    posterior's precision adds to the prior's, as HesScaleGN approximates it: nowhere negative, exact in the last layer,
    and in the others without the off-diagonal entries of the layers between, by one backward pass, whatever the number
    of outputs. It runs on any network that :func:`hesscale_lightning.attach` supports, without per-sample gradients.
    Gradients and diagonals are left as they were. ``"full"`` is laplace-torch's own exact matrix, from Jacobians.

    Args:
        model: As for laplace-torch's backends, which ``laplace.Laplace`` makes itself.
        likelihood: ``"classification"`` (cross-entropy) or ``"regression"`` (a normal distribution).
        last_layer: Whether only the last layer has a posterior.
        subnetwork_indices: Which entries have one; None means all.
        dict_key_x: Where a batch that is a dictionary has its inputs.
        dict_key_y: Where it has its targets.

    Example:
        >>> import torch
        >>> from laplace import Laplace                                               # doctest: +SKIP
        >>> from hesscale_lightning import HesScaleGGN
        >>> posterior = Laplace(                                                      # doctest: +SKIP
        ...     model, "classification", subset_of_weights="all", hessian_structure="diag", backend=HesScaleGGN
        ... )
        >>> posterior.fit(train_loader)                                               # doctest: +SKIP

    Source: Daxberger et al., "Laplace Redux: Effortless Bayesian Deep Learning", NeurIPS 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Any,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of a batch, and the diagonal of its Gauss-Newton matrix.

        Args:
            x: The inputs of a batch.
            y: Its targets.
            kwargs: What laplace-torch gives to all backends; not used.

        Returns:
            The loss, summed over samples, and a vector with an entry for each parameter, in their order.

        Raises:
            UnsupportedOperationError: An operation of the network has no rule.
        """
        before: list[tuple[Any, Any, Any]] = [(p, p.grad, p.__dict__.pop("hess_diag", None)) for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            with torch.enable_grad():
                loss = self.factor * self.lossfunc(self.model(x), y)
                backward(loss, self.params, method="hesscale_gn", inputs=self.params)
            found = [getattr(p, "hess_diag", None) for p in self.params]
        finally:
            for p, grad, h in before:
                p.grad = grad
                p.__dict__.pop("hess_diag", None)
                if h is not None:
                    p.hess_diag = h
        parts = [torch.zeros_like(p) if h is None else h for p, h in zip(self.params, found, strict=True)]
        vector = torch.cat([part.reshape(-1) for part in parts])
        if self.subnetwork_indices is not None:
            vector = vector[self.subnetwork_indices]
        return loss.detach(), vector

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Raises NotImplementedError: HesScale is a diagonal."""
        raise NotImplementedError(
            "Found hessian_structure='kron' with HesScaleGGN, which computes a diagonal: use hessian_structure='diag', "
            "or another backend, such as laplace.curvature.CurvlinopsGGN."
        )
