"""The demonstration behind `make demo`: the same training at learning rates over three decades, and its curvature.

    python examples/lightning/demo.py [--short]

1. One ordinary command line, printed before it starts, trains digits with curvature: its log has every layer's
   curvature and the audit against the exact diagonal.
2. The same network is trained anew by Adam, by Adam within a trust region (`HesScaleCallback(delta=...)`), and by
   AdaHesScale, at 0.1, 1, 10 and 100 times the default learning rate of each. The runs take turns, so that a busy
   machine slows all of them, and are tested on digits that none has seen.
"""

import argparse
import csv
import logging
import math
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import torch
import yaml
from hesscale_lightning.networks import MLP
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from hesscale_lightning import AdaHesScale, DigitsDataModule, HesScaleCallback, HesScaleModule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = Path("examples/lightning/digits_mlp.yaml")
PICTURE = Path("outputs/demo.png")
EPOCHS, SHORT_EPOCHS = 20, 3
FACTORS = (0.1, 1.0, 10.0, 100.0)  # times the default learning rate
CHANCE = math.log(10)  # cross-entropy of a guess
REQUIRED_ACCURACY = 0.93

INK, MUTED, BLUE, ORANGE, TEAL = "#1a1a2e", "#8a8a9a", "#2563eb", "#ea7317", "#0d9488"


@dataclass(frozen=True)
class Contender:
    """An optimizer with its default learning rate, and the callback that it needs."""

    name: str
    color: str
    default: float
    optimizer: Callable[..., torch.optim.Optimizer]
    callbacks: Callable[[], list[Callback]]


CONTENDERS = [
    Contender("Adam", ORANGE, 1e-3, torch.optim.Adam, list),
    Contender(
        "Adam, trust region", TEAL, 1e-3, torch.optim.Adam, lambda: [HesScaleCallback(delta=1e-4, log_every_n_steps=0)]
    ),
    Contender("AdaHesScale", BLUE, 1e-2, AdaHesScale, lambda: [HesScaleCallback(log_every_n_steps=0)]),
]


@dataclass
class Outcome:
    """What came of one run: the mean training loss of its last epoch, and its accuracy on the test digits."""

    loss: float
    accuracy: float
    durations: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether it ended worse than a guess."""
        return not self.loss < CHANCE


class Watch(Callback):
    """Notes the training loss of the last epoch, and how long each step takes, its callbacks included."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.durations: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.losses.clear()

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.durations.append(time.perf_counter() - self._start)
        self.losses.append(float(outputs["loss"]))


def command_line(short: bool) -> dict[str, list[tuple[int, float]]]:
    """Run the command line's fit, audited and with every layer's curvature; return its log."""
    callbacks = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
    (curvature,) = [c for c in callbacks if c["class_path"].endswith("HesScaleCallback")]
    curvature["init_args"].update(per_layer=True, audit="exact", audit_every_n_steps=100, audit_entries=300)
    command = ["-m", "hesscale_lightning", "fit", "--config", str(CONFIG)]
    command += ["--trainer.callbacks", yaml.safe_dump(callbacks, default_flow_style=True, width=10_000).strip()]
    command += ["--trainer.logger.name", "demo"]
    command += ["--trainer.max_epochs", str(SHORT_EPOCHS if short else EPOCHS)]
    print(f"\n$ python {shlex.join(command)}\n", flush=True)
    subprocess.run([sys.executable, *command], check=True)
    return read_log(max(Path("outputs/demo").glob("version_*"), key=lambda p: p.stat().st_mtime) / "metrics.csv")


def train(contender: Contender, factor: float, epochs: int) -> Outcome:
    """Train the network of the config once, and test it."""
    L.seed_everything(0, verbose=False)
    rate = factor * contender.default
    module = HesScaleModule(
        MLP([64, 64, 64, 10], activation=nn.Tanh),
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
        optimizer=lambda params: contender.optimizer(params, lr=rate),
    )
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*contender.callbacks(), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = DigitsDataModule(shape="flat", batch_size=32)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return Outcome(statistics.mean(watch.losses), float(trainer.callback_metrics["test/accuracy"]), watch.durations)


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read Lightning's CSV log: for each key, the steps on which it was logged and its values."""
    log: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("epoch", "step"):
                    log.setdefault(key, []).append((int(row["step"]), float(value)))
    return log


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Format the comparison: loss at the end, accuracy, and time of a step."""
    head = (
        f"{'at times the default rate':<26}" + "".join(f"{factor:>16g}" for factor in FACTORS) + f"{'ms per step':>14}"
    )
    rows = []
    for name, row in outcomes.items():
        cells = [f"{o.loss:.1e} {100 * o.accuracy:5.1f}%" + ("!" if o.diverged else " ") for o in row]
        milliseconds = 1000 * statistics.median(t for o in row for t in o.durations)
        rows.append(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells) + f"{milliseconds:>14.2f}")
    return "\n".join([head, "-" * len(head), *rows])


def draw(outcomes: dict[str, list[Outcome]], log: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw what the rates came to, how true the diagonal was, and each layer's curvature, into one PNG."""
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.6), layout="constrained", width_ratios=(1.25, 1, 1)
    )

    for contender in CONTENDERS:
        losses = [min(o.loss, 1e3) if math.isfinite(o.loss) else 1e3 for o in outcomes[contender.name]]
        left.plot(FACTORS, losses, "o-", color=contender.color, linewidth=2, label=contender.name)
    left.axhline(CHANCE, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    left.text(FACTORS[0], CHANCE * 1.05, "a guess", color=MUTED, fontsize=9.5, va="bottom")
    left.set(xscale="log", yscale="log", xlabel="learning rate over the optimizer's default", ylabel="training loss")
    left.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
    left.minorticks_off()
    title(left, "A rate that is wrong", "loss at the end of the same training; above the dashed line it is lost")
    left.legend(frameon=False, fontsize=9.5)

    steps, errors = zip(*log["curvature/audit/relative_l1"], strict=True)
    middle.plot(steps, [100 * error for error in errors], "o-", color=BLUE, linewidth=2)
    middle.set(xlabel="step", ylabel="relative L1 error, %", ylim=(0, None))
    title(middle, "How true the diagonal is", "HesScale against the exact Hessian diagonal")

    layers = sorted(key for key in log if key.startswith("curvature/share/"))
    shares = [[100 * value for _, value in log[key]] for key in layers]
    steps = [step for step, _ in log[layers[0]]]
    colors = ["#bfdbfe", "#60a5fa", BLUE, "#1e3a8a"][: len(layers)]
    labels = [f"layer {k + 1}" for k in range(len(layers))]
    right.stackplot(steps, shares, labels=labels, colors=colors)
    right.set(xlabel="step", ylabel="share of the curvature, %", ylim=(0, 100))
    title(right, "Where the curvature is", "each layer's share, as HesScaleCallback logs it")
    right.legend(frameon=True, fontsize=9.5, loc="lower right", framealpha=0.85)

    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=3)
        axis.grid(alpha=0.15)
        axis.margins(x=0.03)
    right.margins(x=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def title(axis: Axes, text: str, subtitle: str) -> None:
    axis.set_title(text, loc="left", fontsize=14, fontweight="bold", pad=24)
    axis.text(0, 1.03, subtitle, transform=axis.transAxes, color=MUTED, fontsize=10)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train digits at many learning rates, compare, draw.")
    parser.add_argument("--short", action="store_true", help=f"train for {SHORT_EPOCHS} epochs, as CI does")
    short = parser.parse_args(arguments).short

    log = command_line(short)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    outcomes: dict[str, list[Outcome]] = {contender.name: [] for contender in CONTENDERS}
    print("\nThe same training at other learning rates ...", flush=True)
    runs = [(factor, contender) for factor in FACTORS for contender in CONTENDERS]
    for factor, contender in tqdm(runs, unit="run", disable=None):  # a bar on terminals only
        outcomes[contender.name].append(train(contender, factor, SHORT_EPOCHS if short else EPOCHS))
    draw(outcomes, log, PICTURE)
    print(f"\nTraining loss at the end, and accuracy on unseen digits (!: worse than a guess):\n\n{table(outcomes)}\n")
    print(f"audit: {log['curvature/audit/relative_l1'][-1][1]:.1%} relative L1 error against the exact diagonal")
    print(f"picture: {PICTURE.resolve()}")
    accuracy = outcomes["AdaHesScale"][FACTORS.index(1.0)].accuracy
    required = 0.8 if short else REQUIRED_ACCURACY
    if accuracy < required:
        print(f"FAILED: AdaHesScale's test accuracy is {accuracy:.4f}, expected at least {required}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
