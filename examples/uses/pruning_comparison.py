"""Optimal Brain Damage by HesScale beside magnitude, random and the exact diagonal: accuracy over sparsity.

    python examples/uses/pruning_comparison.py --write docs/uses.md  # everything; called again, it resumes
    python examples/uses/pruning_comparison.py --quick               # fewer seeds and tasks, into outputs/
    python examples/uses/pruning_comparison.py --report              # only tables and picture, from the results

A network is trained, then pruned to one sparsity after the other, by the cost ``h w^2 / 2`` of each weight or by
something else, all layers ranked together. *One shot*: every time from the trained network, nothing after.
*Fine-tuned*: from the network pruned and trained so far, with some steps after each pruning. Units (neurons, channels)
are pruned in hidden layers, each layer by itself, by the sum over their weights and bias.
"""

import copy
import json
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import evaluate, interval, machine, train, verdict
from journal import Journal, arguments, environment, rounded, save, settle, table, write_block
from optimization import TASKS as NETWORKS
from optimization import Data, load
from pictures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, prepare
from pictures import save as save_picture
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from tqdm import tqdm

from hesscale_lightning import hess_diag_over
from hesscale_lightning.command_line.networks import MLP
from hesscale_lightning.uses.masks import LowestImportance, lowest, mask_of, original

RESULTS = "examples/uses/results/pruning_comparison.json"
SEEDS, STEPS, LR = 5, 1500, 3e-3
FINE_STEPS, FINE_LR = 200, 1e-3
SPARSITIES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
UNITS = (0.25, 0.5, 0.625, 0.75, 0.875)  # of each hidden layer

TASKS = {
    **NETWORKS,
    "digits, small": ("digits", "flat", partial(MLP, [64, 20, 10], nn.Tanh)),
    "mnist1d, small": ("mnist1d", "flat", partial(MLP, [40, 24, 10], nn.Tanh)),
}
EXACT = ("digits, small", "mnist1d, small")  # small enough for the exact diagonal
CHOSEN = (*EXACT, "digits, tanh MLP", "digits, CNN", "mnist1d, tanh MLP", "mnist1d, ReLU MLP", "mnist1d, CNN")
DRAWN = ("digits, small", "digits, tanh MLP", "mnist1d, tanh MLP", "mnist1d, CNN")
DIAGONALS = {"HesScale": "hesscale", "HesScaleGN": "hesscale_gn", "rank one": "hesscale_rank1", "exact": "exact"}
METHODS = (*DIAGONALS, "magnitude", "random")
COLOURS = {
    "HesScale": BLUE,
    "HesScaleGN": SKY,
    "rank one": PURPLE,
    "exact": INK,
    "magnitude": ORANGE,
    "random": MUTED,
}
KINDS = {
    "one shot": "weights, one shot",
    "fine-tuned": "weights, fine-tuned",
    "units": "units, fine-tuned",
}
REFERENCE = "magnitude"
Places = list[tuple[nn.Module, str]]


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "weight", None), Tensor)]


def costs(model: nn.Module, places: Places, method: str, data: Data, seed: int) -> dict[tuple[nn.Module, str], Tensor]:
    """What each entry is ranked by; the diagonal is that of all training samples."""
    if method == "magnitude":
        return {place: original(*place).detach().abs() for place in places}
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {place: torch.rand(original(*place).shape, generator=generator) for place in places}
    if method == "exact":
        diagonals = exact_of_two_layers(model, data.x, data.y)
    else:
        batches = list(zip(data.x.split(512), data.y.split(512), strict=True))
        diagonals = hess_diag_over(model, cross_entropy, batches, method=DIAGONALS[method], progress_bar=False)
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {place: original(*place) for place in places}
    return {place: diagonals[names[id(p)]].clamp(min=0) * p.detach() ** 2 / 2 for place, p in parameters.items()}


def exact_of_two_layers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The exact diagonal for ``Linear, Tanh, Linear`` under the mean cross-entropy, in closed form.

    With the outputs' Hessian ``D = diag(p) - p p^T`` of a sample, the pre-activation ``a_k`` has
    ``tanh'^2 (V^T D V)_kk + tanh'' (V^T (p - y))_k``, and a weight of the first layer ``x_i^2`` of that.
    """
    first, _, last = model.children()
    with torch.no_grad():
        a = first(x)
        z = torch.tanh(a)
        p = torch.softmax(last(z), 1)
        v = last.weight
        slope, bend = 1 - z**2, -2 * z * (1 - z**2)
        through = p @ v.square() - (p @ v).square()
        gradient = (p - nn.functional.one_hot(y, p.shape[1])) @ v
        h_first, h_last = slope.square() * through + bend * gradient, p - p**2
        found = []
        for h, inputs in ((h_first, x), (h_last, z)):
            found += [h.T @ inputs.square() / len(x), h.mean(0)]
    places = [(layer, name) for layer in (first, last) for name in ("weight", "bias")]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(original(*place))]: h * mask_of(*place) for place, h in zip(places, found, strict=True)}


def prune_weights(model: nn.Module, method: str, sparsity: float, data: Data, seed: int) -> None:
    places = [(layer, "weight") for layer in layers(model)]
    total = sum(mask_of(*place).numel() for place in places)
    done = sum(int((mask_of(*place) == 0).sum()) for place in places)
    prune.global_unstructured(
        places,
        LowestImportance,
        importance_scores=costs(model, places, method, data, seed),
        amount=round(sparsity * total) - done,
    )


def prune_units(model: nn.Module, method: str, sparsity: float, data: Data, seed: int) -> None:
    hidden = layers(model)[:-1]
    found = costs(model, [(layer, name) for layer in hidden for name in ("weight", "bias")], method, data, seed)
    for layer in hidden:
        weight, bias = found[layer, "weight"].flatten(1), found[layer, "bias"]
        units = (weight.square().sum(1) + bias.square()).sqrt() if method == "magnitude" else weight.sum(1) + bias
        keep = mask_of(layer, "bias").bool()
        left = keep.nonzero().flatten()
        count = round(sparsity * len(keep)) - int((~keep).sum())
        keep[left[lowest(units[left], count)]] = False
        prune.custom_from_mask(layer, "bias", keep)
        shape = [-1] + [1] * (original(layer, "weight").ndim - 1)
        prune.custom_from_mask(layer, "weight", keep.view(shape).expand_as(original(layer, "weight")))


def run_one(key: tuple[str, str, str, int], data: Data, dense: nn.Module) -> list[list[float]]:
    """Training loss and test accuracy at every sparsity."""
    _, kind, method, seed = key
    model = copy.deepcopy(dense)
    found = []
    for level, sparsity in enumerate(UNITS if kind == "units" else SPARSITIES):
        if kind == "one shot":
            model = copy.deepcopy(dense)
        (prune_units if kind == "units" else prune_weights)(model, method, sparsity, data, 100 * seed + level)
        if kind != "one shot":
            train(model, data, FINE_STEPS, FINE_LR, seed=1000 + 10 * seed + level)
        found.append([*evaluate(model, data)])
        model = _without_graph(model)
    return found


def _without_graph(model: nn.Module) -> nn.Module:
    """A masked weight is a result of autograd until the next forward pass, which deepcopy refuses."""
    with torch.no_grad():
        for layer in layers(model):
            for name in ("weight", "bias"):
                if hasattr(layer, f"{name}_mask"):
                    setattr(layer, name, original(layer, name) * mask_of(layer, name))
    return model


def keys_of(tasks: tuple[str, ...], seeds: int) -> list[tuple[str, str, str, int]]:
    """All runs, by task and seed, so that a network is trained once."""
    return [
        (task, kind, method, seed)
        for task, seed, kind, method in product(tasks, range(seeds), KINDS, METHODS)
        if method != "exact" or task in EXACT
    ]


def run(tasks: tuple[str, ...], seeds: int, folder: Path) -> dict[str, Any]:
    """Run what is not done yet, and return the results."""
    torch.set_num_threads(1)
    identity = {"steps": [STEPS, FINE_STEPS], "rates": [LR, FINE_LR], "levels": [[*SPARSITIES], [*UNITS]]}
    journal = Journal(folder / "runs.jsonl", identity)
    networks: dict[tuple[str, int], tuple[Data, nn.Module]] = {}
    keys = keys_of(tasks, seeds)
    for key in tqdm(keys, desc="pruning", unit="run", mininterval=1):
        if key in journal.runs:
            continue
        task, _, _, seed = key
        start = time.thread_time()
        if (task, seed) not in networks:
            torch.manual_seed(seed)
            data, model = load(task, TASKS), TASKS[task][2]()
            train(model, data, STEPS, LR, seed)
            networks = {(task, seed): (data, model)}
        data, model = networks[task, seed]
        found = run_one(key, data, model)
        journal.note([*key], {"found": found, "dense": evaluate(model, data), "seconds": time.thread_time() - start})
    runs: dict[str, dict[str, Any]] = {}
    for task, kind, method, seed in keys:
        kept = journal.runs[task, kind, method, seed]
        group = runs.setdefault(f"{task}, {kind}", {})
        group.setdefault(method, []).append(rounded(kept["found"]))
        group.setdefault("dense", [None] * seeds)[seed] = rounded(kept["dense"])
    return {
        "tasks": list(tasks),
        "seeds": seeds,
        "sparsities": list(SPARSITIES),
        "units": list(UNITS),
        "environment": environment(),
        "minutes": rounded(sum(journal.runs[key]["seconds"] for key in keys) / 60),
        "runs": runs,
    }


def accuracies(results: dict[str, Any], task: str, kind: str, method: str, level: int, what: int = 1) -> list[float]:
    """Test accuracy (or with ``what=0`` the training loss) of each seed."""
    return [seed[level][what] for seed in results["runs"][f"{task}, {kind}"][method]]


def levels_of(results: dict[str, Any], kind: str) -> list[float]:
    return results["units" if kind == "units" else "sparsities"]


def methods_of(results: dict[str, Any], task: str, kind: str) -> list[str]:
    return [method for method in METHODS if method in results["runs"][f"{task}, {kind}"]]


def compared(results: dict[str, Any], kind: str, method: str, other: str, tasks: list[str]) -> dict[str, list[str]]:
    """Where the method's accuracy is higher, lower or undecided, seed by seed: names of task and sparsity."""
    found: dict[str, list[str]] = {"higher": [], "lower": [], "undecided": []}
    for task, (level, sparsity) in product(tasks, enumerate(levels_of(results, kind))):
        pairs = zip(*(accuracies(results, task, kind, name, level) for name in (method, other)), strict=True)
        found[verdict([a - b for a, b in pairs])].append(f"{task} at {100 * sparsity:g} %")
    return found


def tables(results: dict[str, Any]) -> str:
    head = (
        f"{len(results['tasks'])} networks, {results['seeds']} seeds; {results['minutes']:.1f} minutes of processor "
        f"time ({machine(results['environment'])}). A network at a sparsity counts as higher or lower where the 95 % "
        "interval of the paired difference in test accuracy leaves out 0."
    )
    parts = [head, findings(results)]
    for kind, title in KINDS.items():
        parts.append(f"Test accuracy in %, mean of the seeds: {title}.")
        parts.append(accuracy_table(results, kind))
    return "\n\n".join(parts)


def accuracy_table(results: dict[str, Any], kind: str) -> str:
    levels = levels_of(results, kind)
    shown = [k for k, level in enumerate(levels) if level in (0.6, 0.8, 0.9, 0.95, 0.5, 0.75, 0.875)]
    rows = []
    for task in results["tasks"]:
        dense = interval([seed[1] for seed in results["runs"][f"{task}, {kind}"]["dense"]])[0]
        for level in shown:
            row = [task, f"{100 * dense:.1f}", f"{100 * levels[level]:g} %"]
            for method in METHODS:
                if method in methods_of(results, task, kind):
                    row.append(f"{100 * interval(accuracies(results, task, kind, method, level))[0]:.1f}")
                else:
                    row.append("")
            rows.append(row)
    return table(["network", "unpruned", "sparsity", *METHODS], rows)


def findings(results: dict[str, Any]) -> str:
    lines = []
    for kind, title in KINDS.items():
        for method in ("HesScale", "HesScaleGN", "rank one", "random"):
            found = compared(results, kind, method, REFERENCE, results["tasks"])
            total = sum(map(len, found.values()))
            lines.append(
                f"{title}: {method} is higher than magnitude at {len(found['higher'])} of {total} points, lower at "
                f"{len(found['lower'])}{_named(found['lower']) if method != 'random' else ''}."
            )
        exact = [task for task in results["tasks"] if task in EXACT]
        if exact:
            found = compared(results, kind, "HesScale", "exact", exact)
            lines.append(
                f"{title}, on the small networks: HesScale is higher than the exact diagonal at {len(found['higher'])} "
                f"of {sum(map(len, found.values()))} points, lower at {len(found['lower'])}."
            )
    return "\n".join(f"- {line}" for line in lines)


def _named(points: list[str]) -> str:
    shown = [*points[:6], f"and {len(points) - 6} more"] if len(points) > 7 else points
    return f" ({'; '.join(shown)})" if points else ""


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over sparsity: a row for each network, a column for each way of pruning."""
    import matplotlib.pyplot as plt

    prepare()
    tasks = [task for task in results["tasks"] if task in DRAWN]
    figure, axes = plt.subplots(len(tasks), 3, figsize=(13, 2.7 * len(tasks) + 1), squeeze=False, layout="constrained")
    for row, task in enumerate(tasks):
        for axis, (kind, title) in zip(axes[row], KINDS.items(), strict=True):
            levels = [100 * level for level in levels_of(results, kind)]
            for method in methods_of(results, task, kind):
                points = [interval(accuracies(results, task, kind, method, k)) for k in range(len(levels))]
                means = [100 * mean for mean, _ in points]
                halves = [100 * half if half < 1 else 0 for _, half in points]
                style = "--" if method == "exact" else ":" if method == "random" else "-"
                axis.plot(levels, means, style, color=COLOURS[method], label=method, linewidth=1.8, marker=".")
                low = [m - h for m, h in zip(means, halves, strict=True)]
                high = [m + h for m, h in zip(means, halves, strict=True)]
                axis.fill_between(levels, low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
            dense = 100 * interval([seed[1] for seed in results["runs"][f"{task}, {kind}"]["dense"]])[0]
            axis.axhline(dense, color=GREEN, linewidth=0.9, label="unpruned")
            axis.set(ylim=(0, 102))
            axis.set_title(f"{task}\n{title}", fontsize=10, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("pruned, % of " + ("units of each hidden layer" if kind == "units" else "weights"))
        axes[row][0].set_ylabel("test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    save_picture(figure, path)


def main(given: list[str] | None = None) -> None:
    """Run, save, draw and print."""
    parser = arguments(__doc__, "outputs/pruning_comparison")
    parser.add_argument("--seeds", type=int, help="how many seeds (5, with --quick 2)")
    options = settle(parser.parse_args(given), RESULTS, "docs/pruning.png")
    if not options.report:
        tasks = EXACT if options.quick else CHOSEN
        save(run(tasks, options.seeds or (2 if options.quick else SEEDS), options.folder), options.results)
    results = json.loads(options.results.read_text())
    draw(results, options.picture)
    text = tables(results)
    if options.write:
        write_block(options.write, "pruning", text)
    else:
        print(text)
    print(options.results)


if __name__ == "__main__":
    main()
