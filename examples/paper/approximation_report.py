"""Tables and pictures of ``approximation_quality.py``."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from journal import table
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

PAPER = "the paper's"
UNTRAINED, TRAINED = "untrained", "10 epochs"
SUMMARY = {  # columns of the first table
    "the paper's setting": PAPER,
    "tanh MLP, untrained": "tanh MLP 64-64-64-64-10, batch {}, untrained",
    "tanh MLP, trained": "tanh MLP 64-64-64-64-10, batch {}, 10 epochs",
    "ReLU MLP, untrained": "ReLU MLP 64-64-64-64-10, batch {}, untrained",
    "ReLU MLP, trained": "ReLU MLP 64-64-64-64-10, batch {}, 10 epochs",
    "CNN, untrained": "CNN, batch {}, untrained",
    "CNN, trained": "CNN, batch {}, 10 epochs",
}
ERROR, COSINE = 0, 1
OURS, NEW = "HesScale", "HesScale, rank one"

Results = dict[str, Any]


def mean(results: Results, setting: str, estimator: str, figure: int = ERROR, layer: int = 0) -> float:
    """Mean over the seeds; layer 0 stands for all layers together."""
    return statistics.fmean(seed[layer][figure] for seed in results["runs"][setting][estimator])


def number(value: float) -> str:
    """Two or three digits, and 0 for what rounding left of it."""
    if abs(value) < 5e-4:
        return "0"
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def estimators(results: Results) -> list[str]:
    return [*results["runs"][PAPER]]


def marked(values: dict[str, float]) -> dict[str, str]:
    """As text, the lowest in bold; the exact GGN is none of the cheap estimates and does not take part."""
    lowest = min(value for name, value in values.items() if name != "GGN, exact")
    return {
        name: f"**{number(v)}**" if v == lowest and name != "GGN, exact" else number(v) for name, v in values.items()
    }


def tables(results: Results) -> dict[str, str]:
    """The blocks of the page, by the names of their marks."""
    return {
        "approximation": "\n\n".join([preface(results), summary(results), findings(results)]),
        "approximation by setting": by_setting(results, ERROR),
        "approximation, cosine": by_setting(results, COSINE),
        "approximation by layer": by_layer(results),
    }


def preface(results: Results) -> str:
    amount, machine = results["amount"], results["environment"]
    return (
        f"{amount['paper_seeds']} seeds of {amount['paper_samples']:,} samples in the paper's setting; "
        f"{amount['seeds']} seeds, each with {amount['batches']} batches of 1 and {amount['large_batches']} batches of "
        f"32, on the digits. It took {results['minutes']:.0f} minutes (one thread, torch {machine['torch']}, "
        f"{machine['machine']})."
    )


def summary(results: Results) -> str:
    """Error of every estimate on one network of each kind, on batches of one and of 32, and its cost."""
    cells: dict[str, list[str]] = {name: [] for name in estimators(results)}
    for pattern in SUMMARY.values():
        sizes = [1] if pattern == PAPER else [1, 32]
        found = [marked({name: mean(results, pattern.format(size), name) for name in cells}) for size in sizes]
        for name in cells:
            cells[name].append(" / ".join(one[name] for one in found))
    costs = results["costs"]["tanh MLP"]
    rows = [[name, f"{costs[name][0]:.1f}" if name in costs else "1.0", *found] for name, found in cells.items()]
    return table(["estimate", "time, gradient = 1", *SUMMARY], rows)


def by_setting(results: Results, figure: int) -> str:
    rows = []
    for setting in results["runs"]:
        values = {name: mean(results, setting, name, figure) for name in estimators(results) if name != "zero"}
        texts = marked(values) if figure == ERROR else {name: f"{value:.2f}" for name, value in values.items()}
        rows.append([setting, *texts.values()])
    return table(["network", *(name for name in estimators(results) if name != "zero")], rows)


def by_layer(results: Results) -> str:
    """Error of every estimate in each layer, first to last."""
    chosen = [PAPER, *(SUMMARY[f"{network}, trained"].format(1) for network in ("tanh MLP", "ReLU MLP", "CNN"))]
    rows = []
    for name in estimators(results):
        layers = [range(1, len(results["runs"][setting][name][0])) for setting in chosen]
        rows.append(
            [name]
            + [
                " / ".join(number(mean(results, setting, name, layer=layer)) for layer in found)
                for setting, found in zip(chosen, layers, strict=True)
            ]
        )
    return table(["estimate", *chosen], rows)


def findings(results: Results) -> str:
    """What follows from the numbers, in sentences."""
    settings, names = [*results["runs"]], estimators(results)
    rivals = [name for name in names if name not in (OURS, NEW, "HesScaleGN", "GGN, exact", "zero")]
    order = sorted([OURS, *rivals], key=lambda name: mean(results, PAPER, name))[:4]
    closer: dict[str, list[str]] = {}  # where a rival beats HesScale, by the best of them
    for setting in settings:
        best = min(rivals, key=lambda name: mean(results, setting, name))
        if mean(results, setting, best) < mean(results, setting, OURS):
            closer.setdefault(best, []).append(setting)
    count = len(settings) - sum(map(len, closer.values()))
    curved = [s for s in settings if s == PAPER or s.startswith("tanh")]
    exact = [s for s in curved if mean(results, s, "GGN, exact") < mean(results, s, OURS)]
    lines = [
        "In the paper's setting the closest are "
        + ", ".join(f"{name} ({number(mean(results, PAPER, name))})" for name in order)
        + ".",
        f"HesScale is closer than every other cheap estimate (all but the exact GGN) on {count} of {len(settings)} "
        "networks." + "".join(f" {name} is closer on {len(s)}: {'; '.join(s)}." for name, s in closer.items()),
        "Where activations have no curvature (ReLU) the exact GGN diagonal is the Hessian's. With tanh it is closer "
        + (
            f"than HesScale on {len(exact)} of {len(curved)}: {'; '.join(exact)}."
            if exact
            else "than HesScale on none."
        ),
    ]
    return "\n".join(f"- {line}" for line in lines + ([refined(results, settings)] if NEW in names else []))


def refined(results: Results, settings: list[str]) -> str:
    """What the rank-one part adds to HesScale."""
    ratios = {s: mean(results, s, NEW) / mean(results, s, OURS) for s in settings}
    higher = [s for s in settings if ratios[s] > 1]
    pairs = [
        (ours[0][ERROR], new[0][ERROR])
        for runs in results["runs"].values()
        for ours, new in zip(runs[OURS], runs[NEW], strict=True)
    ]
    trained = {s: ratio for s, ratio in ratios.items() if "MLP" in s and s.endswith("epochs")}
    cheap = [name for name in estimators(results) if name != "GGN, exact"]
    closest = [s for s in settings if min(cheap, key=lambda name: mean(results, s, name)) == NEW]
    return (
        f"HesScale with the rank-one part is the closest of all cheap estimates on {len(closest)} of {len(settings)} "
        f"networks. Its error is larger than HesScale's on {len(higher)} of them{': ' if higher else ''}"
        f"{'; '.join(higher)}, and with {sum(new > ours for ours, new in pairs)} of {len(pairs)} seeds. On the "
        f"{len(trained)} trained MLPs it is {number(min(trained.values()))} to {number(max(trained.values()))} times "
        f"HesScale's, in the median {number(statistics.median(trained.values()))}; the largest: "
        f"{max(trained, key=lambda setting: trained[setting])}."
    )


INK, MUTED, BLUE, ORANGE, GREEN, PURPLE = "#1a1a2e", "#77778a", "#0072b2", "#d55e00", "#009e73", "#aa4499"
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


def prepare() -> None:
    plt.rcParams.update({"font.size": 11, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK})


def plain(axis: Any, ticks: list[float]) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


FLOOR = 0.012  # where an error of zero is drawn


def draw_against_cost(results: Results, path: Path) -> None:
    """Error over cost on the digits, untrained and trained, a panel for each activation."""
    prepare()
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.8), sharey=True)
    labels = [draw_network(results, network, axis) for axis, network in zip(axes, results["costs"], strict=True)]
    axes[0].set_ylabel("relative L1 error of the diagonal")
    figure.text(0.012, 0.955, "Error against the exact diagonal, and what it costs", fontsize=15, fontweight="bold")
    explanation = (
        f"digits, three hidden layers of 64, batch 32, mean of {results['amount']['seeds']} seeds; "
        "filled: trained, hollow: untrained; lower left is better"
    )
    figure.text(0.012, 0.915, explanation, color=MUTED, fontsize=10.5)
    figure.tight_layout(rect=(0, 0, 1, 0.9), w_pad=2)
    for axis, its_labels in zip(axes, labels, strict=True):
        place(its_labels, axis)
    save(figure, path)


def draw_network(results: Results, network: str, axis: Axes) -> list["Label"]:
    """Draw all but the estimates' names, and return these: where they fit is known when all else is in place."""
    costs = results["costs"][network]
    axis.set(xscale="log", yscale="log", xlim=(0.85, 300), ylim=(FLOOR / 1.3, 250))
    plain(axis.xaxis, [1, 2, 5, 10, 20, 50, 100, 200])
    plain(axis.yaxis, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
    axis.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axis.text(290, 1.06, "an estimate of zeros", ha="right", va="bottom", color=MUTED, fontsize=9.5)
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


@dataclass(frozen=True)
class Label:
    """A text, the point that it belongs to, and another point that it must not cover."""

    text: str
    color: str
    point: tuple[float, float]
    other: tuple[float, float]


def place(labels: list[Label], axis: Axes) -> None:
    """Write each label as near to its point as it fits without covering a point or another label."""
    figure = axis.figure
    figure.canvas.draw()
    pixels = figure.dpi / 72
    corners = [axis.transData.transform(point) for label in labels for point in (label.point, label.other)]
    taken = [Bbox.from_extents(x - 5 * pixels, y - 5 * pixels, x + 5 * pixels, y + 5 * pixels) for x, y in corners]
    taken += [text.get_window_extent() for text in axis.texts]
    levels = [level * sign for level in range(6) for sign in (1, -1)]
    offsets = [(9 * side, 12.5 * level) for level in levels for side in ((1, -1) if level == 0 else (0, 1, -1))]
    line = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    for label in sorted(labels, key=lambda one: one.point, reverse=True):
        for dx, dy in offsets:
            note = axis.annotate(
                label.text,
                label.point,
                (dx, dy),
                textcoords="offset points",
                ha={9: "left", 0: "center", -9: "right"}[dx],
                va="center",
                color=label.color,
                fontsize=9.5,
                arrowprops=None if abs(dy) < 15 else line | {"color": label.color},
            )
            note.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(note)
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        taken.append(box)


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


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
