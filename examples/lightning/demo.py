"""The demonstration behind `make demo`: trains digits with curvature and with Adam, compares them, draws a picture.

    python examples/lightning/demo.py [--short]

Both runs are ordinary command lines, printed before they start, and differ only in the optimizer (Adam without the
curvature callback, so that it pays nothing for it). The numbers come from what the runs leave behind, the last
checkpoint, which is tested on digits no run has seen, and the CSV log. The time of a step is measured afterwards: both
optimizers take turns, so that a busy machine slows both.
"""

import argparse
import csv
import json
import logging
import math
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from torch import Tensor

from hesscale_lightning.command_line.cli import HesScaleCLI

CONFIG = Path("examples/lightning/digits_mlp.yaml")
PICTURE = Path("outputs/demo.png")
SHORT_EPOCHS = 12
TIMED_STEPS = 150
REQUIRED_ACCURACY = 0.95
ADAM_LR = 0.01  # the best of 0.001, 0.003 and 0.01 on the validation digits

INK, MUTED, BLUE, ORANGE = "#1a1a2e", "#8a8a9a", "#2563eb", "#ea7317"


@dataclass
class Run:
    """A training run: what it is called, the options that set it apart, and what it left behind."""

    name: str
    color: str
    folder: Path
    options: list[str]
    milliseconds: float = math.nan

    @property
    def checkpoint(self) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)
        return content

    @property
    def log(self) -> dict[str, list[tuple[int, float]]]:
        return read_log(self.folder / "metrics.csv")


class StepClock(Callback):
    """Notes how long each training step takes, from getting the batch to the end of the update and its callbacks."""

    def __init__(self) -> None:
        self.durations: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.durations.append(time.perf_counter() - self._start)


def train(name: str, color: str, folder: str, options: list[str]) -> Run:
    """Run the command line's fit."""
    command = ["-m", "hesscale_lightning", "fit", "--config", str(CONFIG), *options]
    print(f"\n$ python {shlex.join(command)}\n", flush=True)
    subprocess.run([sys.executable, *command], check=True)
    versions = Path("outputs", folder).glob("version_*")
    return Run(name, color, max(versions, key=lambda path: path.stat().st_mtime), options)


def build(run: Run) -> HesScaleCLI:
    """Build what a run's command line describes, without running it."""
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
    return HesScaleCLI(
        ["--config", str(CONFIG), *run.options, *quiet, "--trainer.max_steps", str(TIMED_STEPS)], run=False
    )


def time_steps(runs: Sequence[Run], rounds: int = 3) -> None:
    """Measure the median time of a training step, the runs taking turns."""
    clocks = [StepClock() for _ in runs]
    for _ in range(rounds):
        for run, clock in zip(runs, clocks, strict=True):
            cli = build(run)
            cli.trainer.callbacks.append(clock)
            cli.trainer.fit(cli.model, cli.datamodule)
    for run, clock in zip(runs, clocks, strict=True):
        run.milliseconds = 1000 * statistics.median(clock.durations)


def test(run: Run) -> Mapping[str, Tensor]:
    """Evaluate a run's last weights on the test digits."""
    cli = build(run)
    cli.model.load_state_dict(run.checkpoint["state_dict"])
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return cli.trainer.callback_metrics


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read Lightning's CSV log: for each key, the steps on which it was logged and its values."""
    log: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("epoch", "step"):
                    log.setdefault(key, []).append((int(row["step"]), float(value)))
    return log


def table(runs: Sequence[Run], tested: Sequence[Mapping[str, Tensor]]) -> str:
    """Format the comparison."""
    head = f"{'optimizer':<14}{'test accuracy':>14}{'test loss':>12}{'steps':>8}{'ms per step':>13}"
    rows = [
        f"{run.name:<14}{result['test/accuracy']:>14.4f}{result['test/loss']:>12.4f}"
        f"{run.checkpoint['global_step']:>8}{run.milliseconds:>13.2f}"
        for run, result in zip(runs, tested, strict=True)
    ]
    return "\n".join([head, "-" * len(head), *rows])


def draw(curved: Run, plain: Run, path: Path) -> None:
    """Draw loss and curvature over time into one PNG."""
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")

    for run in (curved, plain):
        steps, losses = zip(*run.log["train/loss"], strict=True)
        left.plot(steps, losses, color=run.color, alpha=0.2, linewidth=0.8)
        left.plot(steps, smooth(losses), color=run.color, linewidth=1.8, label=f"{run.name}, training")
        steps, losses = zip(*run.log["val/loss"], strict=True)
        left.plot(steps, losses, color=run.color, linewidth=1.4, linestyle=(0, (4, 2)), label=f"{run.name}, validation")
    left.set(yscale="log", xlabel="step", ylabel="cross-entropy")
    title(
        left,
        "Loss",
        f"scikit-learn digits, tanh MLP 64-64-64-10, {curved.checkpoint['global_step']} steps of 32 samples",
    )
    left.legend(frameon=False, fontsize=9.5)

    series = (("trace", BLUE), ("max_abs", "#7c3aed"), ("mean_abs", "#0d9488"))
    labels = {"trace": "trace", "max_abs": "max |h|", "mean_abs": "mean |h|"}
    for key, color in series:
        steps, values = zip(*curved.log[f"curvature/{key}"], strict=True)
        drawable = [value if value > 0 else math.nan for value in values]  # a trace can be negative, early on
        right.plot(steps, drawable, color=color, alpha=0.2, linewidth=0.8)
        right.plot(steps, smooth(values, log=key != "trace"), color=color, linewidth=1.8, label=labels[key])
    right.set(yscale="log", xlabel="step", ylabel="curvature")
    share = right.twinx()
    steps, values = zip(*curved.log["curvature/negative_fraction"], strict=True)
    share.fill_between(
        steps, [100 * value for value in smooth(values, log=False)], color=ORANGE, alpha=0.18, linewidth=0
    )
    share.set(ylim=(0, 100), ylabel="entries below zero, %")
    share.yaxis.label.set_color(ORANGE)
    share.tick_params(axis="y", colors=ORANGE)
    right.set_zorder(share.get_zorder() + 1)
    right.patch.set_visible(False)
    title(right, "Curvature", f"Hessian diagonal h on {curved.name}'s path, as HesScaleCallback logs it")
    right.legend(frameon=False, fontsize=9.5)

    for axis in (left, right, share):
        axis.spines["top"].set_visible(False)
        axis.tick_params(length=3)
    for axis in (left, right):
        axis.spines["right"].set_visible(False)
        axis.grid(alpha=0.15)
        axis.margins(x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def title(axis: Axes, text: str, subtitle: str) -> None:
    axis.set_title(text, loc="left", fontsize=14, fontweight="bold", pad=24)
    axis.text(0, 1.03, subtitle, transform=axis.transAxes, color=MUTED, fontsize=10)


def smooth(values: Sequence[float], span: int = 12, log: bool = True) -> list[float]:
    """Running mean, geometric for what is drawn on a logarithmic axis."""
    into, back = (lambda v: math.log(max(v, 1e-12)), math.exp) if log else (float, float)
    result, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean += (into(value) - mean) / min(count, span)
        result.append(back(mean))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Train digits with curvature and with Adam, compare, draw.")
    parser.add_argument("--short", action="store_true", help=f"train for {SHORT_EPOCHS} epochs, as CI does")
    short = ["--trainer.max_epochs", str(SHORT_EPOCHS)] if parser.parse_args().short else []
    del sys.argv[1:]  # LightningCLI warns when it is given arguments while the command line has some

    callbacks = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
    without_curvature = json.dumps([c for c in callbacks if not c["class_path"].endswith("HesScaleCallback")])
    adam = ["--model.optimizer", "torch.optim.Adam", "--model.optimizer.lr", str(ADAM_LR)]
    adam += ["--trainer.callbacks", without_curvature, "--trainer.logger.name", "digits_mlp_adam"]

    curved = train("AdaHesScale", BLUE, "digits_mlp", short)
    plain = train("Adam", ORANGE, "digits_mlp_adam", short + adam)
    draw(curved, plain, PICTURE)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    tested = [test(curved), test(plain)]
    time_steps([curved, plain])
    print(f"\nTested on digits that neither run has seen:\n\n{table([curved, plain], tested)}\n")
    print(f"loss and curvature over time: {PICTURE.resolve()}")
    accuracy = tested[0]["test/accuracy"]
    if accuracy < REQUIRED_ACCURACY:
        print(f"FAILED: {curved.name}'s test accuracy is {accuracy:.4f}, expected at least {REQUIRED_ACCURACY}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
