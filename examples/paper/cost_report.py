"""Tables and picture of ``computational_cost.py``."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from journal import table
from matplotlib.axes import Axes
from pictures import BLUE, GREEN, MUTED, ORANGE, PURPLE, SKY, plain, prepare, save

Results = dict[str, Any]
ADAM = "Adam's step"
# What the paper reports over a step of Adam.
PUBLISHED = {"HesScale, bare update": 2.2, "HesScaleGN, bare update": 1.3, "Hutchinson, 1 probe, bare update": 3.6}
STYLES: dict[str, dict[str, Any]] = {
    "HesScale": {"color": BLUE, "marker": "o", "linewidth": 2.2},
    "HesScale, rank one": {"color": SKY, "marker": "o", "linewidth": 1.8},
    "HesScaleGN": {"color": BLUE, "marker": "D", "linewidth": 1.4, "linestyle": (0, (4, 2))},
    "BL89": {"color": PURPLE, "marker": "v", "linewidth": 1.4},
    "GGN, 1 sample": {"color": ORANGE, "marker": "s", "linewidth": 1.8, "linestyle": (0, (4, 2))},
    "GGN, exact": {"color": ORANGE, "marker": "s", "linewidth": 1.8},
    "Hutchinson, 1 probe": {"color": GREEN, "marker": "^", "linewidth": 1.8},
    "Adam": {"color": MUTED, "marker": "P", "linewidth": 1.4},
}


# Of each group that grows: title and axis of its panels, and what a network is called in tables.
GROUPS = {
    "depth, batch 1": ("512 wide, batch 1 (the paper's)", "matrices of 512 x 512", "{} x 512-512, batch 1"),
    "depth, batch 32": ("512 wide, batch 32", "matrices of 512 x 512", "{} x 512-512, batch 32"),
    "width, batch 32": ("one hidden layer, batch 32", "units of the hidden layer", "64-{}-10, batch 32"),
}


def spread(found: list[float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def measured(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Every network's name and figures."""
    return [
        (GROUPS[group][2].format(size) if group in GROUPS else group, found)
        for group, sizes in results["runs"].items()
        for size, found in sizes.items()
    ]


def adam(found: dict[str, Any]) -> float:
    """Time of Adam's step over the gradient's."""
    return 1 / found["over Adam"]["gradient"][0]


def tables(results: Results) -> dict[str, str]:
    """The blocks of the page, by the names of their marks."""
    return {
        "cost": "\n\n".join([preface(results), time_table(results), findings(results)]),
        "cost over Adam": over_adam(results),
        "cost in memory": memory_table(results),
    }


def preface(results: Results) -> str:
    machine = results["environment"]
    return (
        f"At least {results['seconds']:g} seconds and eleven rounds for each table and network. It took "
        f"{results['minutes']:.0f} minutes with a load of {results['load']:.1f} on the machine; what is counted is the "
        f"thread's own time (torch {machine['torch']}, {machine['machine']}). Median (quartiles) of the ratios; empty: "
        "exact GGN would hold more than ten million numbers at once."
    )


def estimates(results: Results) -> list[str]:
    first = next(iter(results["runs"].values()))
    return [name for name in next(iter(first.values()))["time"] if name != "gradient"]


def time_table(results: Results) -> str:
    rows = [
        [name, f"{found['parameters']:,}", f"{found['time']['gradient'][3]:.2f} ms"]
        + [spread(found["time"][one]) if one in found["time"] else "" for one in estimates(results)]
        + [f"{adam(found):.2f}"]
        for name, found in measured(results)
    ]
    return table(["network", "parameters", "gradient", *estimates(results), ADAM], rows)


def memory_table(results: Results) -> str:
    rows = [
        [name] + [f"{found['memory'][one]:.2f}" if one in found["memory"] else "" for one in estimates(results)]
        for name, found in measured(results)
    ]
    return table(["network", *estimates(results)], rows)


def over_adam(results: Results) -> str:
    networks = measured(results)
    names = [name for name in networks[0][1]["over Adam"] if name not in ("Adam", "gradient")]
    published = ["the authors', published", ""] + [f"{PUBLISHED[n]}" if n in PUBLISHED else "" for n in names]
    rows = [
        [name, f"{found['over Adam']['Adam'][3]:.2f} ms", *(spread(found["over Adam"][one]) for one in names)]
        for name, found in networks
    ]
    paper = [found["over Adam"] for found in results["runs"]["depth, batch 1"].values()]
    medians = {name: [one[name][0] for one in paper] for name in PUBLISHED}
    ranges = [
        f"{name} {min(found):.2f} to {max(found):.2f} (published {PUBLISHED[name]})" for name, found in medians.items()
    ]
    sentence = f"Over Adam's step on the paper's networks with batches of one: {'; '.join(ranges)}."
    return f"{sentence}\n\n{table(['network', ADAM, *names], [published, *rows])}"


def findings(results: Results) -> str:
    """How the ratios change with size, in sentences."""
    lines = []
    for group, sizes in results["runs"].items():
        if group not in GROUPS:
            continue
        first, last = next(iter(sizes)), [*sizes][-1]
        parts = [
            f"{name} {sizes[first]['time'][name][0]:.2f} to {sizes[last]['time'][name][0]:.2f}"
            for name in estimates(results)
            if name in sizes[last]["time"]
        ]
        names = " to ".join(GROUPS[group][2].format(size) for size in (first, last))
        lines.append(f"From {names}: {', '.join(parts)} times the gradient's time.")
    everywhere = [found for _, found in measured(results)]
    for name in ("HesScale", "HesScale, rank one", "Hutchinson, 1 probe"):
        if name in estimates(results):
            ratios, memory = ([found[kind][name] for found in everywhere] for kind in ("time", "memory"))
            medians = [ratio[0] for ratio in ratios]
            lines.append(
                f"{name} over all networks: {min(medians):.2f} to {max(medians):.2f} times the gradient's time, "
                f"{min(memory):.2f} to {max(memory):.2f} times its peak memory."
            )
    if "HesScale, rank one" in estimates(results):
        extra = [found["time"]["HesScale, rank one"][0] / found["time"]["HesScale"][0] for found in everywhere]
        lines.append(
            f"The rank-one part makes a step {min(extra):.2f} to {max(extra):.2f} times as long as HesScale's."
        )
    return "\n".join(f"- {line}" for line in lines)


def draw(results: Results, path: Path) -> None:
    """Time and peak memory over the gradient's as networks grow."""
    prepare()
    groups = [group for group in GROUPS if group in results["runs"]]
    figure, axes = plt.subplots(2, len(groups), figsize=(13, 8), sharex="col", sharey="row")
    for column, group in enumerate(groups):
        sizes = results["runs"][group]
        draw_group(axes[0][column], sizes, "time")
        draw_group(axes[1][column], sizes, "memory")
        title, axis, _ = GROUPS[group]
        axes[0][column].set_title(f"tanh MLP, {title}", loc="left", fontsize=11.5, fontweight="bold")
        axes[1][column].set_xlabel(axis)
    axes[0][0].set_ylabel("time of a step, gradient = 1")
    axes[1][0].set_ylabel("peak memory, gradient = 1")
    figure.text(0.012, 0.965, "What a diagonal costs as networks grow", fontsize=15, fontweight="bold")
    explanation = "gradient and estimate over the gradient alone, one thread; shaded: quartiles. " + left_out(results)
    figure.text(0.012, 0.935, explanation, color=MUTED, fontsize=10.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 0.92), w_pad=1.5)
    save(figure, path)


def left_out(results: Results) -> str:
    missing = any("GGN, exact" not in found["time"] for _, found in measured(results))
    return "Exact GGN ends where it would need too much memory" if missing else ""


def draw_group(axis: Axes, sizes: dict[str, Any], kind: str) -> None:
    for name, style in STYLES.items():
        if name == "Adam":
            lines = {int(size): [adam(found)] * 3 for size, found in sizes.items()} if kind == "time" else {}
        else:
            known = {int(size): found[kind][name] for size, found in sizes.items() if name in found[kind]}
            lines = {size: found if isinstance(found, list) else [found] * 3 for size, found in known.items()}
        if not lines:
            continue
        axis.plot([*lines], [found[0] for found in lines.values()], label=name, markersize=5, **style)
        low, high = ([found[k] for found in lines.values()] for k in (1, 2))
        axis.fill_between([*lines], low, high, color=style["color"], alpha=0.15, linewidth=0)
    ticks = [int(size) for size in sizes]
    axis.set(xscale="log", yscale="log")
    plain(axis.xaxis, [float(tick) for tick in ticks])
    bottom, top = axis.get_ylim()
    choice = [1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100]
    plain(axis.yaxis, [float(tick) for tick in choice if tick <= 10 ** math.ceil(math.log10(top)) and bottom])
    axis.axhline(1, color=MUTED, linewidth=1, linestyle=":")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.15)
