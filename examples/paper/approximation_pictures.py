"""The two pictures of ``approximation_quality.py``: errors over cost, and every seed's errors."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from approximation_report import ERROR, PAPER, SUMMARY, Results, estimators, mean, number
from matplotlib.axes import Axes
from pictures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, Label, place, plain, prepare, save

FAMILIES = {  # colour and marker; the colours are told apart by colour-blind readers
    "HesScale": (BLUE, "o"),
    "BL89": (PURPLE, "v"),
    "GGN": (ORANGE, "s"),
    "K-FAC": (MUTED, "D"),
    "Hutchinson": (GREEN, "^"),
    "squared gradient": (INK, "P"),
}


def style(name: str) -> tuple[str, str]:
    return next(found for family, found in FAMILIES.items() if name.startswith(family))


FLOOR = 0.012  # where an error of zero is drawn


def draw_against_cost(results: Results, path: Path) -> None:
    """Error over cost on the digits, untrained and trained, a panel for each activation."""
    prepare()
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.8), sharey=True)
    labels = [draw_network(results, network, axis) for axis, network in zip(axes, results["costs"], strict=True)]
    axes[0].set_ylabel("relative L1 error of the diagonal")
    figure.text(0.012, 0.955, "Error against the exact diagonal, and what it costs", fontsize=15, fontweight="bold")
    explanation = (
        "digits, three hidden layers of 64, batch 32, mean of the seeds; "
        "filled: trained, hollow: untrained; lower left is better"
    )
    figure.text(0.012, 0.915, explanation, color=MUTED, fontsize=10.5)
    figure.tight_layout(rect=(0, 0, 1, 0.9), w_pad=2)
    for axis, its_labels in zip(axes, labels, strict=True):
        place(sorted(its_labels, key=lambda label: (label.color != BLUE, -label.point[0])), axis)
    save(figure, path)


def draw_network(results: Results, network: str, axis: Axes) -> list["Label"]:
    """Draw all but the estimates' names, and return these: where they fit is known when all else is in place."""
    costs = results["costs"][network]
    axis.set(xscale="log", yscale="log", xlim=(0.8, 150), ylim=(FLOOR / 1.3, 250))
    plain(axis.xaxis, [1, 2, 5, 10, 20, 50, 100])
    plain(axis.yaxis, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
    axis.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axis.text(145, 1.06, "an estimate of zeros", ha="right", va="bottom", color=MUTED, fontsize=9.5)
    exact = costs["exact diagonal"][0]
    axis.axvline(exact, color=MUTED, linewidth=1, linestyle=":")
    axis.text(exact * 1.06, 230, "exact diagonal", ha="left", va="top", color=MUTED, fontsize=9.5)
    labels: list[Label] = []
    for name in estimators(results):
        if name == "zero":
            continue
        color, marker = style(name)
        x, size = costs[name][0], 9 if name.startswith("HesScale") else 7
        ends = [mean(results, SUMMARY[f"{network}, {state}"].format(32), name) for state in ("untrained", "trained")]
        before, after = (max(error, FLOOR) for error in ends)
        axis.plot([x, x], [before, after], color=color, linewidth=1.2, alpha=0.5, zorder=2)
        axis.plot(x, before, marker, color="white", markeredgecolor=color, markersize=size, markeredgewidth=1.5)
        axis.plot(x, after, marker, color=color, markersize=size, zorder=3)
        labels.append(Label(name + (" (0)" if max(ends) < 1e-6 else ""), color, (x, after), (x, before)))
    axis.set_xlabel("time of gradient and diagonal, over the gradient's")
    axis.set_title(network, loc="left", fontsize=12, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.15)
    return labels


def draw_by_setting(results: Results, path: Path) -> None:
    """The paper's figure: every seed's error, by estimate, in the paper's setting and on trained digits networks."""
    prepare()
    panels = {
        "the paper's setting": PAPER,
        "digits, tanh MLP, trained": SUMMARY["tanh MLP, trained"].format(1),
        "digits, ReLU MLP, trained": SUMMARY["ReLU MLP, trained"].format(1),
    }
    names = [name for name in estimators(results) if name != "zero"][::-1]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 5.6), sharey=True)
    for axis, (title, setting) in zip(axes, panels.items(), strict=True):
        for row, name in enumerate(names):
            errors = [max(seed[0][ERROR], FLOOR) for seed in results["runs"][setting][name]]
            color, _ = style(name)
            spread = [row + 0.5 * (k / max(1, len(errors) - 1) - 0.5) for k in range(len(errors))]
            axis.plot(errors, spread, "o", color=color, markersize=3, alpha=0.45, markeredgewidth=0)
            center = max(statistics.fmean(errors), FLOOR)
            axis.plot([center, center], [row - 0.36, row + 0.36], color=color, linewidth=2.4)
            exact = max(errors) == FLOOR
            axis.annotate(
                "0" if exact else number(center), (center, row), (6, 8), textcoords="offset points", fontsize=9
            )
        axis.axvline(1, color=MUTED, linewidth=1, linestyle=":")
        axis.set(xscale="log", xlim=(FLOOR / 1.3, 150), ylim=(-0.7, len(names) - 0.1))
        plain(axis.xaxis, [0.01, 0.1, 1, 10, 100])
        axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axis.set_xlabel("relative L1 error")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.grid(alpha=0.15, axis="x")
    axes[0].set_yticks(range(len(names)), names)
    figure.text(0.012, 0.95, "How close to the exact diagonal", fontsize=15, fontweight="bold")
    explanation = "batches of one sample; each dot is a seed, each line their mean; dotted: an estimate of zeros"
    figure.text(0.012, 0.905, explanation, color=MUTED, fontsize=10.5)
    figure.tight_layout(rect=(0, 0, 1, 0.9), w_pad=1.5)
    save(figure, path)
