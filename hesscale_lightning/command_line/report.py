"""The report on a trained model: what curvature meets in its loss, and where its curvature is."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from hesscale_lightning.curvature import CoverageReport, backward, coverage
from hesscale_lightning.curvature.engine import Method
from hesscale_lightning.metrics import layer_shares, max_abs, mean_abs, negative_fraction, trace
from hesscale_lightning.trainer.audit import unchanged_buffers
from hesscale_lightning.trainer.reevaluation import muted
from hesscale_lightning.trainer.step_log import layer_names


@dataclass(frozen=True)
class ModelReport:
    """A trained model's curvature; prints as the coverage report and a table of layers.

    Attributes:
        coverage: the operations between the training loss and the parameters.
        layers: each layer's diagonals, by the layer's name.
        batches: how many batches the diagonals are the mean of.
        method: the method that computed them.
    """

    coverage: CoverageReport
    layers: dict[str, list[Tensor]]
    batches: int
    method: str

    def __str__(self) -> str:
        head = ("layer", "parameters", "share", "trace", "mean |h|", "max |h|", "below 0")
        everything = [h for hs in self.layers.values() for h in hs]
        shares = layer_shares(self.layers)
        rows = [_row(name, hs, shares[name].item()) for name, hs in self.layers.items()]
        rows.append(_row("all", everything, 1.0))
        width = max(len(row[0]) for row in (head, *rows))
        lines = ["  ".join([row[0].ljust(width), *(cell.rjust(10) for cell in row[1:])]) for row in (head, *rows)]
        rule = "-" * len(lines[0])
        title = f"Curvature of the layers ({self.method}, mean over {self.batches} training batches, evaluation mode)"
        table = "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
        return f"Coverage of the training loss\n\n{self.coverage}\n\n{title}\n\n{table}"

    def draw(self, path: Path) -> None:
        """Write a picture: each layer's share of the curvature, and the sizes of its entries."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = list(self.layers)
        shares = [100 * share.item() for share in layer_shares(self.layers).values()]
        counts = [sum(h.numel() for h in hs) for hs in self.layers.values()]
        sizes = [100 * count / sum(counts) for count in counts]
        height = max(3.6, 0.55 * len(names) + 1.6)
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), layout="constrained", sharey=True)
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
        right.invert_yaxis()
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(length=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def report(
    model: pl.LightningModule,
    loader: Iterable[Any],
    batches: int = 8,
    method: Method = "hesscale",
    progress: bool | None = None,
) -> ModelReport:
    """Reports on a model's training loss and the curvature of its layers, leaving the model as it was.

    The coverage is that of ``training_step`` in training mode. The diagonal is the mean over some batches in evaluation
    mode, so without dropout and with the running statistics of batch norm.

    Args:
        model: the trained model.
        loader: training batches.
        batches: how many of them to use.
        method: as for :func:`hesscale_lightning.attach`.
        progress: whether to show a progress bar on standard error; None shows it on a terminal only.

    Raises:
        ValueError: if there is no batch, or ``training_step`` returns no loss.
        UnsupportedOperationError: if the loss contains an operation without a rule.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = layer_names(model)
    was_training = model.training
    for p in parameters:
        p.grad = p.hess_diag = None  # type: ignore[attr-defined]
    found: CoverageReport | None = None
    used = 0
    with torch.enable_grad(), muted(model), unchanged_buffers(model), torch.random.fork_rng():
        total = min(batches, len(loader)) if isinstance(loader, Sized) else batches
        hidden = None if progress is None else not progress  # tqdm's None: hidden unless on a terminal
        bar = tqdm(islice(loader, batches), "curvature", total, unit="batch", disable=hidden)
        for index, batch in enumerate(bar):
            if found is None:
                found = coverage(_loss(model.train(), batch, index), parameters)
            backward(_loss(model.eval(), batch, index), parameters, method=method)
            used += 1
    model.train(was_training)
    if found is None:
        raise ValueError("Found no training batch, expected at least one to compute curvature from.")
    layers: dict[str, list[Tensor]] = {}
    for p in parameters:
        h = getattr(p, "hess_diag", None)
        if h is not None:
            layers.setdefault(names[id(p)], []).append(h / used)
        p.grad = p.hess_diag = None  # type: ignore[attr-defined]
    return ModelReport(found, layers, used, method)


def _loss(model: pl.LightningModule, batch: Any, index: int) -> Tensor:
    output = model.training_step(batch, index)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"Found {type(loss).__name__} from training_step, expected the loss as a tensor.")
    return loss


def _row(name: str, diagonals: list[Tensor], share: float) -> tuple[str, ...]:
    return (
        name,
        f"{sum(h.numel() for h in diagonals):,}",
        f"{100 * share:.1f} %",
        *(f"{statistic(diagonals).item():.3g}" for statistic in (trace, mean_abs, max_abs)),
        f"{100 * negative_fraction(diagonals).item():.1f} %",
    )
