"""The studies of the paper's claims: they resume, count rightly, and the page says what their results say."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.append(str(Path(__file__).parents[1] / "examples/paper"))
import approximation_quality as quality
import approximation_report
import computational_cost as cost
import cost_report
import rank_one_training as training
from journal import Journal, arguments, block, settle, write_block
from steps import interleaved

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/approximation.md"
COMMITTED = {
    quality.RESULTS: approximation_report.tables,
    cost.RESULTS: cost_report.tables,
    training.RESULTS: lambda results: {"rank one": training.conclusions(results)},
}
TINY = quality.Amount(paper_seeds=2, paper_samples=100, seeds=1, batches=2, large_batches=1, seconds=0.0)


def page(path: Path, names: list[str]) -> Path:
    """A page with empty blocks."""
    path.write_text("".join(f"# {name}\n<!-- benchmark: {name} -->\nold\n<!-- end -->\n" for name in names) + "tail\n")
    return path


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks that the summary needs, the full one's estimates but for fifty Hessian-vector products each."""
    chosen = [quality.PAPER, *(one for one in quality.DIGITS if one.hidden == 3 or one.network == "CNN")]
    monkeypatch.setattr(quality, "SETTINGS", chosen)
    monkeypatch.setattr(quality, "QUICK", TINY)
    monkeypatch.setitem(quality.ESTIMATORS, "Hutchinson, 50 probes", quality.ESTIMATORS["Hutchinson, 1 probe"])
    monkeypatch.setattr(quality, "interleaved", lambda steps, _: {name: [2.0, 1.5, 2.5, 0.1] for name in steps})


@pytest.mark.usefixtures("cheap")
def test_the_study_of_errors_is_interrupted_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []
    measure, stop = quality.measure, 3

    def counted(setting: Any, seed: int, amount: Any) -> Any:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append((str(setting), seed))
        return measure(setting, seed, amount)

    monkeypatch.setattr(quality, "measure", counted)
    names = ["approximation", "approximation by setting", "approximation, cosine", "approximation by layer"]
    given = ["--quick", f"--folder={tmp_path / 'study'}", f"--write={page(tmp_path / 'page.md', names)}"]
    with pytest.raises(KeyboardInterrupt):
        quality.main(given)
    stop = -1
    quality.main(given)

    assert len(measured) == len(set(measured)) == len(quality.SETTINGS) + 1  # the paper's with two seeds
    results = json.loads((tmp_path / "study_quick/results.json").read_text())
    again = measure(quality.PAPER, 1, TINY)["found"]["HesScale"]  # as in one run without interruption
    assert results["runs"]["the paper's"]["HesScale"][1] == quality.rounded(again)
    for name, text in approximation_report.tables(results).items():
        assert block(tmp_path / "page.md", name) == text
    assert (tmp_path / "page.md").read_text().endswith("tail\n")
    for picture in ("picture.png", "picture_by_setting.png"):
        assert (tmp_path / "study_quick" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_study_of_costs_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        cost.Workload(group, size, (4, size, 3), batch)
        for group, batch in (("depth, batch 1", 1), ("depth, batch 32", 32))
        for size in (2, 4)
    ]
    monkeypatch.setattr(cost, "WORKLOADS", small)
    monkeypatch.setattr(cost, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(cost, "GGN_LIMIT", 32 * 3 * 5)  # lets the batch of 32 through with two units, not with four
    folder = tmp_path / "study"
    cost.main(["--quick", f"--folder={folder}"])
    results = json.loads((tmp_path / "study_quick/results.json").read_text())
    kept = (tmp_path / "study_quick/runs.jsonl").read_text()
    cost.main(["--quick", f"--folder={folder}"])

    assert (tmp_path / "study_quick/runs.jsonl").read_text() == kept  # nothing was measured again
    assert (tmp_path / "study_quick/picture.png").read_bytes().startswith(b"\x89PNG")
    runs = results["runs"]
    assert "GGN, exact" in runs["depth, batch 32"]["2"]["time"]
    assert "GGN, exact" not in runs["depth, batch 32"]["4"]["time"]
    for sizes in runs.values():
        for found in sizes.values():
            assert found["time"]["gradient"][:3] == [1.0, 1.0, 1.0]
            assert found["memory"]["gradient"] == 1.0
            assert found["memory"]["HesScale"] > 1.0  # a diagonal of the gradient's size is kept at least
            assert found["time"]["Hutchinson, 1 probe"][0] > 1.0


def test_a_step_is_timed_against_the_first_of_its_round() -> None:
    calls: list[str] = []

    def work(name: str, amount: int) -> Any:
        return lambda: calls.append(name) or sum(range(amount))

    found = interleaved({"short": work("short", 20_000), "long": work("long", 60_000)}, 0.0)
    assert calls == ["short", "long"] * (len(calls) // 2)
    assert found["short"][:3] == [1.0, 1.0, 1.0]
    assert found["long"][0] == pytest.approx(3.0, rel=0.4)
    assert found["long"][1] <= found["long"][0] <= found["long"][2]


def test_peak_memory_counts_gradients_and_diagonals() -> None:
    """A wide layer and one sample, activations are nothing beside the weights: HesScale needs twice the gradient's."""
    found = cost.measure(cost.Workload("width, batch 32", 512, (512, 512, 10), 1), 0.0)["memory"]
    assert found["HesScale"] == pytest.approx(2.0, rel=0.15)


def test_the_study_of_training_runs_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "digits, tanh MLP"
    monkeypatch.setattr(training, "TASKS", {task: training.TASKS[task]})
    monkeypatch.setattr(training, "STEPS", 20)
    monkeypatch.setattr(training, "POINTS", (10, 20))
    monkeypatch.setattr(training, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(training, "measure_ratio", lambda *_: 1.5)
    trained: list[Any] = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda key, data: trained.append(key) or train(key, data))
    training.main(["--quick", f"--folder={tmp_path / 'study'}", "--seeds=1"])
    training.main(["--quick", f"--folder={tmp_path / 'study'}", "--seeds=2"])

    assert len(trained) == len(set(trained)) == 2 * 2 * 2
    results = json.loads((tmp_path / "study_quick/results.json").read_text())
    losses, accuracies = training.at(results, task, "hesscale_rank1", 1e-2, "time")
    runs = results["runs"][task]["hesscale_rank1, 0.01"]
    assert losses == [seed[0][0] for seed in runs]  # 20 steps in 1.5 times the time: 13, of which 10 are measured
    assert accuracies == [seed[1][0] for seed in runs]
    assert training.at(results, task, "hesscale_rank1", 1e-2, "steps")[0] == [seed[0][1] for seed in runs]
    assert training.conclusions(results) in capsys.readouterr().out


def test_training_is_compared_seed_by_seed() -> None:
    def runs(*losses: float) -> list[Any]:
        return [[[loss] * len(training.POINTS), [0.5] * len(training.POINTS)] for loss in losses]

    by_name = {training.name_of(m, lr): runs(1.0, 4.0) for m in training.METHODS for lr in training.RATES}
    by_name[training.name_of("hesscale_rank1", training.DEFAULT)] = runs(0.5, 2.0)
    results = {"runs": {"task": by_name}, "ratios": {"task": 1.0}}
    found = training.compare(results, "task", "steps", tuned=True)
    assert found.rates == [training.RATES[0], training.DEFAULT]
    assert (found.ratio, found.low, found.high, found.lower) == (0.5, 0.5, 0.5, 2)
    assert found.losses == [2.5, 1.25]


def test_the_papers_network_takes_one_step_of_sgd_for_each_sample() -> None:
    torch.manual_seed(3)
    states = [
        ({name: p.detach().clone() for name, p in model.named_parameters()}, x, y)
        for model, x, y in quality.paper_states(200, torch.Generator().manual_seed(3))
    ]
    torch.manual_seed(3)
    model = quality.PAPER.model()
    assert len(states) == 2
    (before, x, y), (after, *_) = states
    assert x.shape == (100, 1, 6)
    model.load_state_dict(before)
    for one, its_class in zip(x, y, strict=True):
        model.zero_grad()
        cross_entropy(model(one), its_class).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.004 * p.grad
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), after[name])


def test_a_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "runs.jsonl", {"steps": 8}).note(["task", 1], 0.5)
    assert Journal(tmp_path / "runs.jsonl", {"steps": 8}).runs == {("task", 1): 0.5}
    with pytest.raises(ValueError, match=r"'steps': 8.*'steps': 9.*another --folder"):
        Journal(tmp_path / "runs.jsonl", {"steps": 9})


def test_a_quick_run_leaves_the_full_results_alone() -> None:
    parser = arguments(None, "outputs/study")
    quick = settle(parser.parse_args(["--quick"]), "results/full.json", "docs/full.png")
    full = settle(parser.parse_args([]), "results/full.json", "docs/full.png")
    assert (full.folder, full.results) == (Path("outputs/study"), Path("results/full.json"))
    assert quick.folder == Path("outputs/study_quick")
    assert quick.results.parent == quick.picture.parent == quick.folder


def test_only_the_named_block_of_a_page_is_replaced(tmp_path: Path) -> None:
    path = page(tmp_path / "page.md", ["one", "two"])
    write_block(path, "one", "new")
    assert (block(path, "one"), block(path, "two")) == ("new", "old")


@pytest.mark.parametrize("results", COMMITTED)
def test_the_page_says_what_the_committed_results_say(results: str) -> None:
    for name, text in COMMITTED[results](json.loads((ROOT / results).read_text())).items():
        assert block(PAGE, name) == text
    for picture in (quality.PICTURE, cost.PICTURE):
        assert (ROOT / picture).exists()


def test_the_committed_results_cover_everything() -> None:
    """All networks, all estimates, the stated number of seeds: none of a quick run, none of an older list."""
    errors = json.loads((ROOT / quality.RESULTS).read_text())
    assert errors["amount"] == vars(quality.FULL)
    assert [*errors["runs"]] == [str(setting) for setting in quality.SETTINGS]
    for setting, runs in errors["runs"].items():
        assert [*runs] == [*quality.ESTIMATORS]
        seeds = quality.FULL.paper_seeds if setting == str(quality.PAPER) else quality.FULL.seeds
        assert {len(found) for found in runs.values()} == {seeds}
    costs = json.loads((ROOT / cost.RESULTS).read_text())["runs"]
    assert {(group, int(size)) for group, sizes in costs.items() for size in sizes} == {
        (one.group, one.size) for one in cost.WORKLOADS
    }
    trained = json.loads((ROOT / training.RESULTS).read_text())
    assert trained["seeds"] == 20
    assert [*trained["runs"]] == [*training.TASKS]


def test_the_rank_one_part_is_never_farther_off_in_the_committed_results() -> None:
    errors = json.loads((ROOT / quality.RESULTS).read_text())
    for setting in errors["runs"]:
        plain, refined = (
            approximation_report.mean(errors, setting, name) for name in ("HesScale", "HesScale, rank one")
        )
        assert refined <= plain, setting


def test_settings_are_told_apart_by_their_names() -> None:
    names = [str(setting) for setting in quality.SETTINGS]
    assert len(set(names)) == len(names)
    assert replace(quality.DIGITS[0], epochs=1).model()[0].weight.dtype == torch.float64
