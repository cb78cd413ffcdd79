"""The logged statistics where parameters are split between processes: each sums its part, and the sums are added up.

Every process computes them, at the same steps and in the same order, and gets the same numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hesscale_lightning.metrics import log_histogram
from hesscale_lightning.metrics.distribution import BINS
from hesscale_lightning.optim.sharded import whole

Places = Sequence[Any]  # of each tensor: hesscale_lightning.optim.sharded.layout, None where nothing is split


def diagonal_statistics(diagonals: Sequence[Tensor], places: Places) -> dict[str, Tensor]:
    """What ``hesscale_lightning.metrics.STATISTICS`` are of whole diagonals.

    Args:
        diagonals: this process's part of each; it may be empty.
        places: over what each is split.
    """
    hs = [_wide(h) for h in diagonals]
    rows = [torch.stack([h.sum(), h.abs().sum(), (h < 0).sum(dtype=h.dtype), _entries(h)]) for h in hs]
    trace, size, negative, entries = whole(rows, places).unbind()
    largest = whole([h.abs().amax() if h.numel() else h.new_zeros(()) for h in hs], places, largest=True)
    return {
        "trace": trace,
        "mean_abs": size / entries,
        "max_abs": largest,
        "negative_fraction": negative / entries,
    }


def layer_statistics(layers: Mapping[str, Sequence[tuple[Tensor, Any]]]) -> dict[str, Tensor]:
    """Each layer's share and mean absolute entry.

    Args:
        layers: by the layer's name, its diagonals, each with its place.
    """
    places = list(dict.fromkeys(place for parts in layers.values() for _, place in parts))
    first = next(h for parts in layers.values() for h, _ in parts)
    rows = torch.zeros(len(places), len(layers), 2, dtype=_wide(first).dtype, device=first.device)
    for index, parts in enumerate(layers.values()):
        for h, place in parts:
            rows[places.index(place), index] += torch.stack([_wide(h).abs().sum(), _entries(_wide(h))]).to(rows)
    sizes, entries = whole(list(rows), places).unbind(1)
    shares = sizes / sizes.sum().clamp(min=torch.finfo(sizes.dtype).tiny)
    named = {f"share/{name}": share for name, share in zip(layers, shares, strict=True)}
    return named | {f"mean_abs/{name}": mean for name, mean in zip(layers, sizes / entries, strict=True)}


def histogram(diagonals: Sequence[Tensor], places: Places) -> Tensor:
    """Counts of ``log10 |h|``, of shape (BINS,)."""
    return whole(
        [log_histogram([h]) if h.numel() else h.new_zeros(BINS, dtype=torch.float32) for h in diagonals], places
    )


def step_statistics(
    steps: Sequence[Tensor], gradients: Sequence[Tensor], diagonals: Sequence[Tensor], places: Places
) -> dict[str, Tensor]:
    """``effective_lr`` and ``predicted_decrease`` of a step; arguments as for :func:`diagonal_statistics`."""
    rows = []
    for step, gradient, diagonal in zip(steps, gradients, diagonals, strict=True):
        u, g, h = _wide(step), _wide(gradient), _wide(diagonal)
        rows.append(torch.stack([u.abs().sum(), g.abs().sum(), (g * u).sum(), (h * u * u).sum()]))
    moved, slope, along, bend = whole(rows, places).unbind()
    return {"effective_lr": moved / slope, "predicted_decrease": -(along + 0.5 * bend)}


def _entries(h: Tensor) -> Tensor:
    return h.new_tensor(float(h.numel()))


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
