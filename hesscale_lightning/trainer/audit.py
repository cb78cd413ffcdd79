r"""The audit: how far the diagonal is from the true one, and what it costs, measured while a network trains.

The reference comes from the loss of the very backward pass that the diagonal rides on, by differentiating twice, for a
random subsample of entries:

- *exact*: one double backward pass for each entry;
- *hutchinson*: with :math:`z` random signs on the subsample and 0 elsewhere, :math:`E[z \odot H z]` is the diagonal on
  the subsample; the mean of a few draws costs as many double backward passes. Its error is that of a random sample.

Nothing that trains is touched: gradients are returned and not accumulated, the draws have a generator of their own, and
no second forward pass is run.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from hesscale_lightning.metrics.comparison import compared, comparison_sums

Reference = Literal["exact", "hutchinson"]


class Audit:
    """Compares the diagonals of one or more backward passes with a reference, and times them.

    Args:
        reference: where the true diagonal comes from.
        entries: entries of all parameters together to compare, drawn anew by each audit; a network that has no more is
            compared whole.
        probes: random vectors of the Hutchinson estimate.
    """

    def __init__(self, reference: Reference, entries: int, probes: int) -> None:
        self.reference = reference
        self.entries = entries
        self.probes = probes
        self.reset()

    def reset(self) -> None:
        """Forgets all that was measured."""
        self._sums: list[Tensor] = []
        self._with_curvature = self._without = 0.0
        self._pending: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]] | None = None
        self._clock_started = 0.0

    def before_forward(self, device: torch.device) -> None:
        """Starts the clock of a training step."""
        self._clock_started = _now(device)

    def before_backward(self, loss: Tensor, parameters: Iterable[Tensor], module: nn.Module, seed: int) -> None:
        """Computes the reference for a loss, leaving its graph as it was.

        Args:
            loss: the loss, on which ``backward`` has not been called.
            parameters: the tensors that will receive a diagonal.
            module: the network, whose buffers are to stay as they are.
            seed: what the draw of entries and probes depends on.
        """
        forward = _now(loss.device) - self._clock_started
        wanted = [p for p in parameters if p.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        with unchanged_buffers(module), torch.autocast(loss.device.type, enabled=False):
            reached, index, reference = self._differentiate(loss, wanted, generator)
            backward = _timed(
                lambda: torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True), loss.device
            )
        earlier = [getattr(p, "hess_diag", None) if p.grad is not None else None for p in reached]
        self._pending = reached, index, reference, earlier
        self._without += forward + backward
        self._clock_started = _now(loss.device) - forward

    def after_backward(self) -> None:
        """Compares what the backward pass brought with the reference."""
        if self._pending is None:
            return
        reached, index, reference, earlier = self._pending
        self._pending = None
        if not reached:
            return
        self._with_curvature += _now(reached[0].device) - self._clock_started
        found = []
        for p, where, before in zip(reached, index, earlier, strict=True):
            h = p.hess_diag.detach()  # type: ignore[attr-defined]
            # Diagonals add up over micro-batches; the reference is that of this one.
            found.append((h if before is None else h - before).reshape(-1)[where])
        self._sums.append(comparison_sums(found, reference))

    def take(self, average: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What was measured since the last call: relative L1 error, cosine similarity and overhead.

        Args:
            average: averages a tensor over all processes; called once on each.

        Returns:
            ``relative_l1``, ``cosine``, and ``overhead``: the time of forward, backward and curvature over that of
            forward and backward. Empty if nothing was compared.
        """
        if not self._sums:
            return {}
        sums = torch.stack([part.double() for part in self._sums]).sum(0)
        averaged = average(torch.cat([sums, sums.new_tensor([self._with_curvature, self._without])]))
        self.reset()
        return {**compared(averaged[:5]), "overhead": averaged[5] / averaged[6]}

    def _differentiate(
        self, loss: Tensor, wanted: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters that have drawn entries, their flat positions, and the reference there."""
        try:
            gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
            pairs = [(p, g) for p, g in zip(wanted, gradients, strict=True) if g is not None]
            chosen = self._draw([p.numel() for p, _ in pairs], generator)
            pairs = [pair for pair, where in zip(pairs, chosen, strict=True) if len(where)]
            index = [where.to(p.device) for (p, _), where in zip(pairs, filter(len, chosen), strict=True)]
            estimate = _exact if self.reference == "exact" else self._hutchinson
            return [p for p, _ in pairs], index, estimate(pairs, index, generator)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise MisconfigurationException(
                f"HesScaleCallback's audit needs the second derivatives of the loss, but found: {error}. Set audit to "
                "null for this network, or replace the operation (attention: use torch.nn.attention.sdpa_kernel("
                "SDPBackend.MATH))."
            ) from error

    def _draw(self, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
        total = sum(sizes)
        if total <= self.entries:
            return [torch.arange(size) for size in sizes]
        flat = torch.randint(total, (self.entries,), generator=generator).unique()
        result, start = [], 0
        for size in sizes:
            result.append(flat[(flat >= start) & (flat < start + size)] - start)
            start += size
        return result

    def _hutchinson(
        self, pairs: Sequence[tuple[Tensor, Tensor]], index: Sequence[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        estimates = [p.new_zeros(len(where)) for (p, _), where in zip(pairs, index, strict=True)]
        parameters = [p for p, _ in pairs]
        for _ in range(self.probes):
            signs = [
                (torch.randint(2, (len(where),), generator=generator) * 2 - 1).to(estimate)
                for where, estimate in zip(index, estimates, strict=True)
            ]
            terms = [
                (g.reshape(-1)[where] * z).sum()
                for (_, g), where, z in zip(pairs, index, signs, strict=True)
                if g.requires_grad
            ]
            if not terms:
                break
            products = torch.autograd.grad(torch.stack(terms).sum(), parameters, retain_graph=True, allow_unused=True)
            for estimate, product, where, z in zip(estimates, products, index, signs, strict=True):
                if product is not None:
                    estimate += z * product.reshape(-1)[where] / self.probes
        return estimates


def _exact(pairs: Sequence[tuple[Tensor, Tensor]], index: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    reference = []
    for (p, g), where in zip(pairs, index, strict=True):
        values = p.new_zeros(len(where))
        if g.requires_grad:
            flat = g.reshape(-1)
            for k, position in enumerate(where.tolist()):
                (row,) = torch.autograd.grad(flat[position], p, retain_graph=True, allow_unused=True)
                if row is not None:
                    values[k] = row.reshape(-1)[position]
        reference.append(values)
    return reference


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Puts a module's buffers back: a checkpointed block runs forward again whenever it is differentiated."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _timed(function: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    function()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
