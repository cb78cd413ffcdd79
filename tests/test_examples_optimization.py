"""The study of optimizers: it resumes, counts rightly, and the page says what its results say."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("mnist1d")

FOLDER = Path(__file__).parents[1] / "examples" / "paper"
sys.path.insert(0, str(FOLDER))  # the script imports what lies beside it
study = importlib.import_module("optimization")
journal = importlib.import_module("journal")
sys.path.remove(str(FOLDER))

TASK, SCALED = "digits, ReLU MLP", "digits, ReLU MLP, inputs badly scaled"
NAMES = [name for name in study.METHODS if name != "Schedule-Free AdamW"]  # its package is not a dependency


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes a study of two tasks and two rates from a journal."""

    def make() -> Any:
        made = study.Study(journal.Journal(tmp_path / "runs.jsonl", {"of": "a test"}), NAMES, quick=True)
        made.rates, made.seeds, made.steps, made.tasks = [1e-3, 1e-2], [10, 11], 8, [TASK, SCALED]
        return made

    return make


def test_it_runs_and_a_second_call_trains_only_what_is_missing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    train = study.train
    monkeypatch.setattr(study, "train", lambda *run: trained.append(run[:5]) or train(*run))
    monkeypatch.setattr(study, "measure_costs", lambda task, data, names, rounds: dict.fromkeys(names, 1.0))
    tiny().run()
    # of each optimizer on each task: two rates with one seed, then two fresh seeds for each budget
    assert len(trained) == len(NAMES) * 2 * (2 + 2 * 2)
    trained.clear()
    again = tiny()
    again.tuning = [0, 1]
    again.run()
    assert {run[3] for run in trained if run[3] in (0, 1)} == {1}
    text = study.sections(again)
    assert all(f"| {name} |" in text for name in NAMES)
    assert "1 tasks with standardised inputs." in text


def invented(tiny: Any, losses: dict[str, float], cost: float = 1.0) -> Any:
    made = tiny()
    made.names = list(losses)
    for task in made.tasks:
        made.journal.runs["costs", task] = {name: 1.0 if name == study.REFERENCE else cost for name in losses}
        for name, loss in losses.items():
            for lr in made.rates:
                for seed in made.tuning:
                    found = [2.0, loss * (1 + (lr != 1e-3)), 0.9]
                    made.journal.runs["tuning", task, name, lr, seed, made.steps] = found
            for budget in ("steps", "time"):
                for seed in made.seeds:
                    key = (budget, task, name, 1e-3, seed, made.length(task, name, budget))
                    made.journal.runs[key] = [2.0, loss, 0.9]
    return made


def test_rows_are_ratios_to_adam(tiny: Any) -> None:
    made = invented(tiny, {"Adam": 0.1, "AdaHesScale": 0.05, "SGD, Nesterov momentum": 3.0}, cost=2.0)
    adam, ours, sgd = study.rows(made, [TASK])
    assert adam == ["Adam", "1.00", "1.00", "", "1.00", "", "90.0", "2.0", "0 of 2"]
    assert ours == ["AdaHesScale", "2.00", "0.50", "1 / 0 / 0", "0.50", "1 / 0 / 0", "90.0", "2.0", "0 of 2"]
    assert sgd[2:4] == ["30.00", "0 / 0 / 1"]
    assert sgd[-1] == "2 of 2"  # above the initial loss
    assert made.length(TASK, "AdaHesScale", "time") == 4


def test_a_run_that_is_not_finite_is_never_the_best(tiny: Any) -> None:
    made = invented(tiny, {"Adam": 0.1})
    made.journal.runs["tuning", TASK, "Adam", 1e-3, made.tuning[0], made.steps] = [2.0, None, 0.1]
    assert made.best_rate(TASK, "Adam") == 1e-2
    assert made.tuned(TASK, "Adam", 1e-3) == math.inf


def test_the_schedule_warms_up_and_decays() -> None:
    values = [study.schedule(k / 400) for k in range(400)]
    assert 0 < values[0] < 0.1
    assert max(values) == pytest.approx(1.0, abs=0.01)
    assert values.index(max(values)) == pytest.approx(20, abs=1)
    assert values[-1] < 1e-4


def test_badly_scaled_inputs_are_the_same_samples() -> None:
    plain, scaled = study.load(TASK), study.load(SCALED)
    ratio = (scaled.x / plain.x).nan_to_num()
    factors = ratio.abs().amax(0)
    assert 50 < factors.max() <= 100
    assert torch.equal(plain.y, scaled.y)


def test_the_shaped_rule_follows_its_equation() -> None:
    """Two steps by hand: NAdam's step over the root of curvature, whose reciprocal has mean one."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = study.ShapedNAdam([p], lr=0.1, decay=0.5)
    h = torch.tensor([1.0, 3.0])
    for grad in (torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])):
        p.grad, p.hess_diag = grad, h.clone()  # type: ignore[attr-defined]
        optimizer.step()
    state = optimizer.state[p]
    relative = state["h"] / state["h"].mean()
    shape = (relative + 0.01) ** -0.5
    torch.testing.assert_close(state["shape"], shape / shape.mean())
    m1, m2 = torch.tensor([0.1, -0.1]), torch.tensor([0.29, -0.04])
    v1, v2 = torch.tensor([0.05, 0.05]), torch.tensor([0.2475, 0.06])
    first = (m1 * 0.9 / (1 - 0.81) + torch.tensor([1.0, -1.0])) / ((v1 / 0.05).sqrt() + 1e-8)
    second = (m2 * 0.9 / (1 - 0.729) + torch.tensor([2.0, 0.5]) * 0.1 / 0.19) / ((v2 / (1 - 0.95**2)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), -0.1 * (shape / shape.mean()) * (first + second))


def test_the_page_quotes_the_results() -> None:
    results = FOLDER / "results" / "optimization.jsonl"
    names = list(study.METHODS)
    found = journal.Journal(results, {"steps": study.STEPS, "batch": study.BATCH, "quick": False, "optimizers": names})
    assert (
        study.sections(study.Study(found, names, quick=False))
        in (FOLDER.parents[1] / "docs/optimization.md").read_text()
    )
