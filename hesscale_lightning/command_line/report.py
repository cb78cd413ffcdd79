"""The report on a trained model: what curvature meets in its loss, and where its curvature is."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from hesscale_lightning.curvature import CoverageReport, coverage
from hesscale_lightning.curvature.engine import Method
from hesscale_lightning.metrics import layer_shares, max_abs, mean_abs, negative_fraction, trace
from hesscale_lightning.trainer.reevaluation import muted
from hesscale_lightning.trainer.step_log import layer_names
from hesscale_lightning.uses.batch_losses import TrainingStep, size_of
from hesscale_lightning.uses.data_diagonal import hess_diag_over
from hesscale_lightning.uses.quantization import check_bits, quantization_cost
from hesscale_lightning.uses.untouched import untouched


@dataclass(frozen=True)
class ModelReport:
    """A trained model's curvature; prints as the coverage report and a table of layers.

    Attributes:
        coverage: the operations between the training loss and the parameters.
        layers: each layer's diagonals, by the layer's name.
        batches: how many batches the diagonals are the mean of.
        method: the method that computed them.
        quantization: for each number of bits, what rounding a layer's weights costs, by the layer's name.
        quantize_method: the method of the diagonals that this was computed from.
    """

    coverage: CoverageReport
    layers: dict[str, list[Tensor]]
    batches: int
    method: str
    quantization: dict[int, dict[str, float]] = field(default_factory=dict)
    quantize_method: str = "hesscale_rank1"

    def __str__(self) -> str:
        head = ("layer", "parameters", "share", "trace", "mean |h|", "max |h|", "below 0")
        everything = [h for hs in self.layers.values() for h in hs]
        shares = layer_shares(self.layers)
        rows = [_row(name, hs, shares[name].item()) for name, hs in self.layers.items()]
        rows.append(_row("all", everything, 1.0))
        title = f"Curvature of the layers ({self.method}, mean over {self.batches} training batches, evaluation mode)"
        printed = f"Coverage of the training loss\n\n{self.coverage}\n\n{title}\n\n{_table(head, rows)}"
        return f"{printed}\n\n{self._quantization()}" if self.quantization else printed

    def _quantization(self) -> str:
        bits = list(self.quantization)
        layers = list(self.quantization[bits[0]])
        rows = [(layer, *(f"{self.quantization[b][layer]:.3g}" for b in bits)) for layer in layers]
        rows.append(("all", *(f"{sum(self.quantization[b].values()):.3g}" for b in bits)))
        formula = f"sum of h (w - Q(w))^2 / 2 ({self.quantize_method})"
        title = f"What quantizing a layer's weights costs, {formula}, in units of the loss"
        return f"{title}\n\n{_table(('layer', *(f'{b} bits' for b in bits)), rows)}"

    def draw(self, path: Path) -> None:
        """Write a picture: each layer's share of the curvature, the sizes of its entries, and what quantizing costs."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = list(self.layers)
        shares = [100 * share.item() for share in layer_shares(self.layers).values()]
        counts = [sum(h.numel() for h in hs) for hs in self.layers.values()]
        sizes = [100 * count / sum(counts) for count in counts]
        height = max(3.6, 0.55 * len(names) + 1.6)
        columns = 3 if self.quantization else 2
        figure, axes = plt.subplots(1, columns, figsize=(6 * columns, height), layout="constrained", sharey=True)
        left, right = axes[:2]
        positions = range(len(names))
        left.barh([p - 0.19 for p in positions], shares, height=0.36, color="#2563eb", label="curvature, sum of |h|")
        left.barh([p + 0.19 for p in positions], sizes, height=0.36, color="#c9cbd6", label="parameters")
        left.set(xlabel="share, %", yticks=list(positions), yticklabels=names)
        left.legend(frameon=False)
        left.set_title("Where the curvature is", loc="left", fontweight="bold")
        logs = [torch.cat([h.flatten() for h in hs]).abs().clamp(min=1e-12).log10() for hs in self.layers.values()]
        low, high = min(v.min().item() for v in logs), max(v.max().item() for v in logs)
        for position, values in enumerate(logs):
            heights = torch.histc(values.float(), bins=80, min=low, max=high)
            heights = 0.8 * heights / heights.max().clamp(min=1)
            grid = torch.linspace(low, high, 80)
            right.fill_between(
                grid.numpy(),
                position + 0.4,
                (position + 0.4 - heights).numpy(),
                color="#7c3aed",
                alpha=0.55,
                linewidth=0,
            )
            right.axhline(position + 0.4, color="#c9cbd6", linewidth=0.7)
        right.set(xlabel="log10 |h|")
        right.set_title("Sizes of the entries", loc="left", fontweight="bold")
        if self.quantization:
            self._draw_quantization(axes[2], names)
        right.invert_yaxis()
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(length=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def _draw_quantization(self, axis: Any, names: list[str]) -> None:
        colors = ("#2563eb", "#7c3aed", "#db2777", "#ea580c", "#65a30d")
        height = 0.76 / len(self.quantization)
        for number, (bits, costs) in enumerate(self.quantization.items()):
            drawn = [(position, costs[name]) for position, name in enumerate(names) if name in costs]
            bars = axis.barh(
                [position - 0.38 + (number + 0.5) * height for position, _ in drawn],
                [abs(cost) for _, cost in drawn],
                height=height,
                color=colors[number % len(colors)],
                label=f"{bits} bits",
            )
            for bar, (_, cost) in zip(bars, drawn, strict=True):
                if cost < 0:
                    bar.set(fill=False, edgecolor=colors[number % len(colors)])
        axis.set(xscale="log", xlabel="|sum of h (w - Q(w))$^2$ / 2|, units of the loss (hollow: negative)")
        axis.set_title("What quantizing a layer costs", loc="left", fontweight="bold")
        axis.legend(frameon=False)


def report(
    model: pl.LightningModule,
    loader: Iterable[Any],
    batches: int = 8,
    method: Method = "hesscale",
    quantize: Sequence[int] = (),
    quantize_method: Method = "hesscale_rank1",
    progress_bar: bool | None = None,
) -> ModelReport:
    """Reports on a model's training loss and the curvature of its layers, leaving the model as it was.

    The coverage is that of ``training_step`` in training mode. The diagonal is the mean over some batches in evaluation
    mode, so without dropout and with the running statistics of batch norm.

    Args:
        model: the trained model.
        loader: training batches.
        batches: how many of them to use.
        method: as for :func:`hesscale_lightning.attach`.
        quantize: numbers of bits; for each, what rounding a layer's weights (its tensors of two or more dimensions)
            costs, ``sum h (w - Q(w))^2 / 2``.
        quantize_method: the method of these diagonals, which ranks the layers of deep networks best (docs/uses.md).
        progress_bar: whether to show one on standard error; None shows it on a terminal only.

    Raises:
        ValueError: if a number of bits is out of range, there is no batch, or ``training_step``
            returns no loss.
        UnsupportedOperationError: if the loss contains an operation without a rule.
    """
    check_bits(quantize)
    with muted(model), untouched(model, training=True) as parameters:
        taken = list(islice(loader, batches))
        if not taken:
            raise ValueError("Found no training batch, expected at least one to compute curvature from.")
        found = coverage(TrainingStep(model, taken).loss(taken[0], 0), [p for _, p in parameters])
    diagonals = _over(model, taken, method, progress_bar)
    names = layer_names(model)
    layers: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        h = diagonals.get(name.replace("_orig_mod.", ""))
        if h is not None:
            layers.setdefault(names[id(p)], []).append(h)
    quantization: dict[int, dict[str, float]] = {bits: {} for bits in quantize}
    if quantization:
        curvature = diagonals if quantize_method == method else _over(model, taken, quantize_method, progress_bar)
        weights = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters() if p.ndim > 1}
        weights = {name: p for name, p in weights.items() if name in curvature}
        for bits, costs in quantization.items():
            for name, cost in quantization_cost(weights, curvature, bits).items():
                layer = names[id(weights[name])]
                costs[layer] = costs.get(layer, 0.0) + cost
    return ModelReport(found, layers, len(taken), method, quantization, quantize_method)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns with a rule below the head and above the last row."""
    width = max(len(row[0]) for row in (head, *rows))
    lines = ["  ".join([row[0].ljust(width), *(cell.rjust(10) for cell in row[1:])]) for row in (head, *rows)]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _over(model: pl.LightningModule, batches: list[Any], method: Method, bar: bool | None) -> dict[str, Tensor]:
    bar = sys.stderr.isatty() if bar is None else bar
    return hess_diag_over(model, None, batches, method=method, batch_size=_size, distributed=False, progress_bar=bar)


def _size(batch: Any) -> int:
    try:
        return size_of(batch)
    except ValueError:  # a layout that we do not know: all batches alike
        return 1


def _row(name: str, diagonals: list[Tensor], share: float) -> tuple[str, ...]:
    return (
        name,
        f"{sum(h.numel() for h in diagonals):,}",
        f"{100 * share:.1f} %",
        *(f"{statistic(diagonals).item():.3g}" for statistic in (trace, mean_abs, max_abs)),
        f"{100 * negative_fraction(diagonals).item():.1f} %",
    )
