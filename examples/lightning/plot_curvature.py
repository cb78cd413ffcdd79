"""Trains digits with everything that HesScaleCallback can log, and draws one picture of the run.

    python examples/lightning/plot_curvature.py [--log FOLDER] [--picture PNG] [options of the command line]

Without --log it runs `digits_curvature.yaml` first, which logs to CSV and to TensorBoard (`tensorboard --logdir
outputs` shows the same numbers and the histogram). The picture is drawn from the CSV log.
"""

import argparse
import csv
import math
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

CONFIG = Path("examples/lightning/digits_curvature.yaml")
INK, MUTED = "#1a1a2e", "#8a8a9a"
BLUE, ORANGE, PURPLE, GREEN = "#2563eb", "#ea7317", "#7c3aed", "#0d9488"

Series = list[tuple[int, float]]


def train(options: list[str]) -> Path:
    """Run the command line's fit; returns the folder of its CSV log."""
    command = [sys.executable, "-m", "hesscale_lightning", "fit", "--config", str(CONFIG), *options]
    subprocess.run(command, check=True)
    return max(Path("outputs/digits_curvature").glob("version_*"), key=lambda path: path.stat().st_mtime)


def read_log(path: Path) -> dict[str, Series]:
    """Read Lightning's CSV log: for each key, the steps on which it was logged and its values."""
    log: dict[str, Series] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("epoch", "step"):
                    log.setdefault(key, []).append((int(row["step"]), float(value)))
    return log


def smooth(values: list[float], span: int = 8) -> list[float]:
    """Running mean over the last ``span`` values."""
    return [sum(values[max(0, i - span + 1) : i + 1]) / (i + 1 - max(0, i - span + 1)) for i in range(len(values))]


def line(axis: Axes, series: Series, color: str, label: str, log: bool = False, style: str = "-") -> None:
    """A thin line of the values and a thick one of their running mean, geometric on a logarithmic axis."""
    steps = [step for step, _ in series]
    values = [value if value > 0 or not log else math.nan for _, value in series]
    axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
    if log:
        known = [(step, math.log(value)) for step, value in series if value > 0]
        steps, mean = [step for step, _ in known], [math.exp(v) for v in smooth([v for _, v in known])]
    else:
        mean = smooth(values)
    axis.plot(steps, mean, color=color, linewidth=1.9, label=label, linestyle=style)


def title(axis: Axes, text: str, subtitle: str) -> None:
    axis.set_title(text, loc="left", fontsize=13, fontweight="bold", pad=22)
    axis.text(0, 1.035, subtitle, transform=axis.transAxes, color=MUTED, fontsize=9.5)


def draw(log: dict[str, Series], path: Path) -> None:
    """Draw loss, curvature by layer, step size, predicted against actual decrease, and the audit."""
    plt.rcParams.update({"font.size": 10.5, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.06)
    (loss, entries, shares), (size, gain, audit) = axes

    line(loss, log["train/loss"], BLUE, "training", log=True)
    steps, values = zip(*log["val/loss"], strict=True)
    loss.plot(steps, values, color=ORANGE, linewidth=1.6, label="validation")
    loss.set(yscale="log", ylabel="cross-entropy")
    title(loss, "Loss", "scikit-learn digits, tanh MLP 64-64-64-10, AdaHesScale")

    line(entries, log["curvature/max_abs"], PURPLE, "max |h|", log=True)
    line(entries, log["curvature/mean_abs"], GREEN, "mean |h|", log=True)
    entries.set(yscale="log", ylabel="Hessian diagonal")
    title(entries, "Size of the curvature", "of single entries, along the optimizer's path")

    names = [key for key in log if key.startswith("curvature/share/")]
    steps = [step for step, _ in log[names[0]]]
    stack = [smooth([100 * value for _, value in log[name]]) for name in names]
    labels = [name.rpartition("/")[2] for name in names]
    colors = [plt.get_cmap("viridis")(0.15 + 0.7 * i / max(1, len(names) - 1)) for i in range(len(names))]
    shares.stackplot(steps, stack, labels=labels, colors=colors, alpha=0.85, linewidth=0)
    shares.set(ylim=(0, 100), ylabel="share in the sum of |h|, %")
    title(shares, "Where it is", "share of each layer")

    line(size, log["curvature/effective_lr"], BLUE, "effective learning rate", log=True)
    line(size, log["curvature/scale"], ORANGE, "scale of the trust region", log=True)
    size.set(yscale="log", ylabel="factor", xlabel="step")
    title(size, "How far it steps", "mean |step| over mean |gradient|; scale 1: not shortened")

    predicted, actual = dict(log["curvature/predicted_decrease"]), dict(log["curvature/actual_decrease"])
    pairs = [(step, predicted[step], actual[step]) for step in predicted if step in actual]
    points = gain.scatter(
        [p for _, p, _ in pairs],
        [a for _, _, a in pairs],
        c=[s for s, _, _ in pairs],
        s=18,
        cmap="viridis",
        linewidths=0,
    )
    positive = [value for _, p, a in pairs for value in (p, a) if value > 0]
    bounds = (min(positive) / 1.5, max(positive) * 1.5)
    gain.plot(bounds, bounds, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), label="as predicted")
    gain.set(xscale="log", yscale="log", xlim=bounds, ylim=bounds, xlabel="predicted", ylabel="measured")
    figure.colorbar(points, ax=gain, label="step", pad=0.01).outline.set_visible(False)
    title(gain, "Is the quadratic model right?", "decrease of the batch's loss by one step")

    error, cosine = log["curvature/audit/relative_l1"], log["curvature/audit/cosine"]
    audit.plot(*zip(*error, strict=True), color=PURPLE, marker="o", markersize=4, label="relative L1 error")
    audit.plot(*zip(*cosine, strict=True), color=GREEN, marker="o", markersize=4, label="cosine similarity")
    audit.set(ylim=(0, max(1.05, 1.1 * max(value for _, value in error))), xlabel="step")
    overhead = sorted(value for _, value in log["curvature/audit/overhead"])
    title(
        audit,
        "Audit against the exact diagonal",
        f"300 random entries; forward + backward x {overhead[len(overhead) // 2]:.2f}",
    )

    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(length=3)
        axis.grid(alpha=0.15)
        if axis is not gain:
            axis.margins(x=0.01)
        axis.legend(frameon=axis is shares, fontsize=9, loc="upper left" if axis is gain else "best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, help="folder with a metrics.csv to draw; without it, train first")
    parser.add_argument("--picture", type=Path, default=Path("outputs/curvature.png"), help="the PNG to write")
    args, options = parser.parse_known_args()
    folder = args.log or train(options)
    draw(read_log(folder / "metrics.csv"), args.picture)
    print(f"curvature of the run: {args.picture.resolve()}")


if __name__ == "__main__":
    main()
