"""How close cheap estimates of the Hessian's diagonal come to the exact one.

    python examples/paper/approximation_quality.py --write docs/approximation.md  # everything; called again, it resumes
    python examples/paper/approximation_quality.py --quick                        # fewer seeds, into outputs/
    python examples/paper/approximation_quality.py --report                       # only draw, from the results

Two settings. The paper's: a tanh network 6-16-16-16-10 sees 1,000 samples one by one, with 40 seeds. Inputs are
standard normal, classes those of a random network with noise, as in the authors' code; after each hundred samples the
network takes one step of SGD on each of them. And the digits: networks untrained and trained, on batches of their
training samples.

For an estimate h of the exact diagonal e of a batch: the relative L1 error is the sum of |h - e| over all entries and
batches, over that of |e|; an estimate of zeros has 1. The cosine similarity is that of the two long vectors.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from approximation_pictures import draw_against_cost, draw_by_setting
from approximation_report import tables
from estimators import ESTIMATORS, Diagonals, exact
from journal import Journal, arguments, environment, rounded, save, settle, write_block
from steps import Steps, interleaved
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hesscale_lightning.command_line.data import DigitsDataModule
from hesscale_lightning.command_line.networks import MLP
from hesscale_lightning.metrics.comparison import compared, comparison_sums

RESULTS = "examples/paper/results/approximation_quality.json"
PICTURE = "docs/approximation.png"
TIMED = ("tanh MLP", "ReLU MLP")  # the networks whose errors are drawn against cost
EPOCHS = 10
BATCH = 32  # samples in a batch of training


@dataclass(frozen=True)
class Setting:
    """One network, how long it was trained, and the size of the batches whose diagonals are estimated."""

    data: str
    network: str
    hidden: int = 3
    size: int = 1
    epochs: int = 0
    width: int = 64

    def __str__(self) -> str:
        if self.data == "paper":
            return "the paper's"
        name = self.network if self.network == "CNN" else f"{self.network} 64-{f'{self.width}-' * self.hidden}10"
        return f"{name}, batch {self.size}, " + (f"{self.epochs} epochs" if self.epochs else "untrained")

    def model(self) -> nn.Sequential:
        """A new network, in double precision."""
        if self.data == "paper":
            return MLP([6, 16, 16, 16, 10], nn.Tanh).double()
        if self.network == "CNN":
            layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
            return nn.Sequential(*layers, nn.Linear(64, 10)).double()
        activation = {"tanh MLP": nn.Tanh, "ReLU MLP": nn.ReLU}[self.network]
        return MLP([64, *[self.width] * self.hidden, 10], activation).double()


PAPER = Setting("paper", "tanh MLP")
DIGITS = [
    Setting("digits", network, hidden, size, epochs)
    for network, depths in (("tanh MLP", (2, 3, 4)), ("ReLU MLP", (2, 3, 4)), ("CNN", (2,)))
    for hidden in depths
    for size in (1, 32)
    for epochs in (0, EPOCHS)
]
# What width and longer training do.
VARIED = [
    Setting("digits", network, epochs=epochs, width=width)
    for network in ("tanh MLP", "ReLU MLP")
    for width, epochs in ((16, 0), (16, EPOCHS), (16, 3 * EPOCHS), (64, 3 * EPOCHS))
]
SETTINGS = [PAPER, *DIGITS, *VARIED]


@dataclass(frozen=True)
class Amount:
    """How much is measured: seeds of both settings, batches of 1 and of 32 samples for each seed of the digits."""

    paper_seeds: int = 40
    paper_samples: int = 1000
    seeds: int = 5
    batches: int = 100
    large_batches: int = 10
    seconds: float = 15.0  # of timing, for each network


FULL, QUICK = Amount(), Amount(paper_seeds=4, seeds=1, seconds=5.0)

States = Iterator[tuple[nn.Sequential, Tensor, Tensor]]  # a network, and the batches to look at in this state


def paper_states(samples: int, generator: torch.Generator) -> States:
    """The network of the paper's setting before each hundred samples, with these samples as batches of one."""
    model = PAPER.model()
    inner = 2 + torch.randn(6, 32, generator=generator, dtype=torch.float64)
    outer = torch.randn(32, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, 1, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, 1, 10, generator=generator, dtype=torch.float64)
    y = ((x @ inner).tanh() @ outer + noise).argmax(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.004)
    for inputs, classes in zip(x.split(100), y.split(100), strict=True):
        yield model, inputs, classes
        for one, its_class in zip(inputs, classes, strict=True):
            optimizer.zero_grad()
            cross_entropy(model(one), its_class).backward()
            optimizer.step()


def digits_states(setting: Setting, batches: int, generator: torch.Generator) -> States:
    """The network, trained if wanted, and randomly chosen training samples."""
    data = DigitsDataModule(shape="image" if setting.network == "CNN" else "flat")
    data.setup()
    assert data.train_set is not None
    x, y = data.train_set.tensors
    x = x.double()
    model = setting.model()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(setting.epochs):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    chosen = torch.randperm(len(x), generator=generator)[: batches * setting.size]
    for index in chosen.view(batches, setting.size).split(max(1, 160 // setting.size)):
        yield model, x[index], y[index]


def by_layer(diagonals: Diagonals) -> list[Diagonals]:
    """Weight and bias of each layer."""
    return [diagonals[k : k + 2] for k in range(0, len(diagonals), 2)]


def measure(setting: Setting, seed: int, amount: Amount) -> dict[str, Any]:
    """Relative L1 error and cosine similarity of every estimate, in total and for each layer."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if setting == PAPER:
        states = paper_states(amount.paper_samples, generator)
    else:
        states = digits_states(setting, amount.batches if setting.size == 1 else amount.large_batches, generator)
    start = time.perf_counter()
    sums: dict[str, list[Tensor]] = {}
    for model, x, y in states:
        reference = by_layer(exact(model, x, y, generator))
        for name, estimator in ESTIMATORS.items():
            found = by_layer(estimator(model, x, y, generator))
            new = [comparison_sums(one, other) for one, other in zip(found, reference, strict=True)]
            sums[name] = [old + one for old, one in zip(sums.get(name, [0] * len(new)), new, strict=True)]
    return {
        "seconds": time.perf_counter() - start,
        "found": {name: figures(layers) for name, layers in sums.items()},
    }


def figures(layers: list[Tensor]) -> list[list[float]]:
    """Error and cosine similarity: of all layers together, then of each."""
    both = [compared(sums) for sums in (torch.stack(layers).sum(0), *layers)]
    return [[float(one["relative_l1"]), float(one["cosine"].nan_to_num())] for one in both]


def run(amount: Amount, folder: Path) -> dict[str, Any]:
    """Run what is not done yet, and return the results of the study."""
    torch.set_num_threads(1)
    identity = {name: vars(amount)[name] for name in ("paper_samples", "batches", "large_batches")}
    journal = Journal(folder / "runs.jsonl", identity | {"estimators": [*ESTIMATORS], "epochs": EPOCHS})
    keys = [
        (setting, seed)
        for setting in SETTINGS
        for seed in range(amount.paper_seeds if setting == PAPER else amount.seeds)
    ]
    for setting, seed in tqdm(keys, desc="networks", unit="network", smoothing=0.05, mininterval=1):
        if (str(setting), seed) not in journal.runs:
            journal.note([str(setting), seed], measure(setting, seed, amount))
    done = [(str(setting), journal.runs[str(setting), seed]) for setting, seed in keys]
    runs: dict[str, dict[str, list[Any]]] = {}
    for setting, found in done:
        for name, figures_of in found["found"].items():
            runs.setdefault(setting, {}).setdefault(name, []).append(rounded(figures_of))
    minutes = rounded(sum(found["seconds"] for _, found in done) / 60)
    costs = rounded({network: measure_costs(network, amount.seconds) for network in TIMED})
    return {
        "amount": vars(amount),
        "environment": environment(),
        "minutes": minutes,
        "costs": costs,
        "runs": runs,
    }


def measure_costs(network: str, seconds: float) -> dict[str, list[float]]:
    """Median, and quartiles, of a step's time over the gradient's, for 32 samples in single precision."""
    torch.manual_seed(0)
    model = Setting("digits", network).model().float()
    steps = Steps(model, torch.randn(32, 64), torch.randint(10, (32,)))
    return interleaved(steps.named(), seconds)


def main(given: list[str] | None = None) -> None:
    """Run, save, draw and print."""
    parser = arguments(__doc__, "outputs/approximation_quality")
    parser.add_argument("--strips", type=Path, help="the second picture, of every network (likewise)")
    options = settle(parser.parse_args(given), RESULTS, PICTURE)
    strips = options.strips or options.picture.with_stem(options.picture.stem + "_by_setting")
    if not options.report:
        save(run(QUICK if options.quick else FULL, options.folder), options.results)
    results = json.loads(options.results.read_text())
    draw_against_cost(results, options.picture)
    draw_by_setting(results, strips)
    for name, text in tables(results).items():
        if options.write:
            write_block(options.write, name, text)
        else:
            print(text, end="\n\n")
    print(f"{options.results}\n{options.picture}\n{strips}")


if __name__ == "__main__":
    main()
