"""Tables and sentences of ``approximation_quality.py``."""

import statistics
from collections import Counter
from typing import Any

from journal import table

PAPER = "the paper's"
TRAINED = "10 epochs"
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
        f"32, on the digits. It took {results['minutes']:.0f} minutes beside other work (one thread, torch "
        f"{machine['torch']}, {machine['machine']})."
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
    order = sorted([OURS, *rivals, *({NEW} & {*names})], key=lambda name: mean(results, PAPER, name))[:4]
    closer: dict[str, list[str]] = {}  # where a rival beats HesScale, by the best of them
    for setting in settings:
        best = min(rivals, key=lambda name: mean(results, setting, name))
        if mean(results, setting, best) < mean(results, setting, OURS):
            closer.setdefault(best, []).append(setting)
    count = len(settings) - sum(map(len, closer.values()))
    curved = [setting for setting in settings if setting == PAPER or setting.startswith("tanh")]
    exact = [setting for setting in curved if mean(results, setting, "GGN, exact") < mean(results, setting, OURS)]
    costs = results["costs"]["tanh MLP"]
    lines = [
        "In the paper's setting the closest are "
        + ", ".join(f"{name} ({number(mean(results, PAPER, name))})" for name in order)
        + ".",
        f"HesScale is closer than every other cheap estimate (all but the exact GGN) on {count} of {len(settings)} "
        "networks."
        + "".join(
            f" {name}, at {costs[name][0]:.1f} times the gradient's time, is closest on {kinds(found)}."
            for name, found in closer.items()
        ),
        f"Where activations have no curvature (ReLU) the exact GGN diagonal, at {costs['GGN, exact'][0]:.1f} times the "
        "gradient's time for ten classes, is the Hessian's. With tanh it is closer than HesScale on "
        + (f"{kinds(exact)}, of {len(curved)}." if exact else f"none of {len(curved)}."),
    ]
    lines += [refined(results, settings)] if NEW in names else []
    return "\n".join(f"- {line}" for line in lines + varied(results))


def kinds(settings: list[str]) -> str:
    """How many there are of each network, and with which batches."""
    networks = Counter(setting.split(",")[0].split(" 64-")[0] for setting in settings)
    large = sum("batch 32" in setting for setting in settings)
    return f"{', '.join(f'{count} {name}' for name, count in networks.items())} ({large} with batches of 32)"


def varied(results: Results) -> list[str]:
    """What width and longer training do to the errors."""
    lines = []
    for network in ("tanh MLP", "ReLU MLP"):
        kinds = {
            "16 wide": f"{network} 64-16-16-16-10, batch 1, {TRAINED}",
            "64 wide": f"{network} 64-64-64-64-10, batch 1, {TRAINED}",
            "64 wide, trained three times as long": f"{network} 64-64-64-64-10, batch 1, 30 epochs",
        }
        if all(setting in results["runs"] for setting in kinds.values()):
            parts = [
                f"{name} {', '.join(number(mean(results, setting, name)) for setting in kinds.values())}"
                for name in (OURS, NEW, "BL89", "GGN, exact", "Hutchinson, 50 probes")
                if name in estimators(results)
            ]
            lines.append(f"What width and longer training do, {network}, {'; '.join(kinds)}: {'; '.join(parts)}.")
    return lines


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
