"""The study behind the optimizers' defaults: it resumes, counts rightly, and the document says what its results say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
TASK = "digits, ReLU MLP"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("optimization_example", ROOT / "examples/paper/optimization.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


study = load_script()


def arguments(folder: Path, seeds: list[int]) -> list[str]:
    optimizers = [name for name in study.METHODS if name != "AdaHessian"]  # its package is not a dependency
    options = {"steps": 8, "seeds": seeds, "lrs": [1e-3, 1e-2], "tasks": [TASK], "optimizers": optimizers}
    options |= {"timing_rounds": 1, "folder": str(folder)}
    paths = {"results": "results.json", "document": "conclusions.md", "picture": "picture.png"}
    options |= {name: str(folder / file) for name, file in paths.items()}
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in options.items()]


def run_of(loss: float | None, accuracy: float = 0.5, worst: float | None = 2.0) -> dict[str, Any]:
    end = [loss, accuracy]
    return {"initial": 2.0, "worst": worst, "curve": [loss] * study.POINTS, "time": end, "steps": end}


def results_of(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    settings = {
        "steps": 8,
        "batch_size": 4,
        "seeds": [0, 1],
        "lrs": [1e-3, 1e-2],
        "tasks": [TASK],
        "optimizers": list(runs),
    }
    milliseconds = {TASK: dict.fromkeys(runs, 1.0)}
    environment = {"python": "3", "torch": "2", "machine": "none"}
    rest = {"settings": settings, "environment": environment, "minutes": 1.0, "milliseconds": milliseconds}
    return {**rest, "runs": {TASK: runs}}


def test_the_study_runs_end_to_end_and_a_second_call_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = study.train
    monkeypatch.setattr(study, "train", lambda key, *rest: trained.append(key) or train(key, *rest))

    study.main(arguments(tmp_path, seeds=[0]))
    first, results = trained.copy(), json.loads((tmp_path / "results.json").read_text())
    trained.clear()
    study.main(arguments(tmp_path, seeds=[0, 1]))
    again = json.loads((tmp_path / "results.json").read_text())

    count = 2 * (len(study.METHODS) - 1)
    assert len(first) == len(trained) == count
    assert {key[-1] for key in first} == {0}
    assert {key[-1] for key in trained} == {1}
    assert again["milliseconds"] == results["milliseconds"]
    for optimizer, by_lr in results["runs"][TASK].items():
        for lr, found in by_lr.items():
            assert again["runs"][TASK][optimizer][lr][:1] == found
            assert found[0]["steps"][0] < found[0]["initial"]
    assert study.conclusions(again) in (tmp_path / "conclusions.md").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    study.main(arguments(tmp_path, seeds=[0]))
    with pytest.raises(ValueError, match=r"'steps': 8.*'steps': 9.*another --folder"):
        study.main([*arguments(tmp_path, seeds=[0]), "--steps=9"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tasks=[iris]", r"Found 'iris', expected one of 'digits, tanh MLP'"),
        ("--optimizers=[LBFGS]", r"Found 'LBFGS', expected one of 'AdaHesScale'"),
        ("--optimizers=[AdaHesScale]", r"expected 'Adam' among them"),
    ],
)
def test_unknown_names_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.main([option])


def test_a_run_whose_loss_is_not_finite_stops_and_is_counted() -> None:
    data = study.load(TASK)
    found = study.train(
        (TASK, "SGD, momentum 0.9", 1e30, 0), data, study.Settings(steps=8), dict.fromkeys(study.METHODS, 1)
    )
    assert found["worst"] is None
    assert found["steps"] == [None, 0.0]

    results = results_of(
        {"Adam": {"1e-03": [run_of(1.0), run_of(3.0)], "1e-02": [run_of(None, worst=None), run_of(1.0)]}}
    )
    failed = study.failures(results, "Adam")
    assert (failed.runs, failed.infinite, failed.diverged, failed.worst) == (4, 1, 1, 1.0)
    assert study.tune(results, TASK, "Adam", "time").lr == "1e-03"


def test_the_range_of_learning_rates_is_counted_on_the_means_over_seeds() -> None:
    by_lr = {
        "1e-03": [run_of(0.1, 0.90), run_of(0.3, 0.90)],
        "1e-02": [run_of(0.4, 0.895), run_of(0.4, 0.895)],
        "1e-01": [run_of(0.4, 0.8), run_of(0.41, 0.8)],
    }
    tuned = study.tune(results_of({"Adam": by_lr}), TASK, "Adam", "steps")
    assert (tuned.lr, tuned.losses, tuned.flat, tuned.accurate) == ("1e-03", [0.1, 0.3], 2, 2)


def test_a_loss_counts_as_lower_only_if_it_is_with_every_seed() -> None:
    def tuned(*losses: float) -> Any:
        return study.Tuned("1e-03", list(losses), [], 1, 1)

    assert study.verdict(tuned(1, 2), tuned(2, 3)) == 1
    assert study.verdict(tuned(2, 3), tuned(1, 2)) == -1
    assert study.verdict(tuned(1, 3), tuned(2, 2)) == 0


def test_adahessian_takes_the_damped_newton_step_of_a_separable_quadratic() -> None:
    pytest.importorskip("pytorch_optimizer")

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

    model, curvature = Quadratic(), torch.tensor([1.0, 100.0])
    method = study.AdaHessian(model, 0.5)
    method.step((curvature * model.weight**2).sum() / 2)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([0.5, -1.0]), rtol=1e-4, atol=1e-4)


def test_the_document_says_what_the_committed_results_say() -> None:
    results = json.loads((ROOT / study.RESULTS).read_text())
    text = (ROOT / study.DOCUMENT).read_text()
    block = text.split(study.BEGIN)[1].split(study.END)[0]
    assert block.strip() == study.conclusions(results)
    assert results["settings"]["tasks"] == list(study.TASKS)
    assert results["settings"]["optimizers"] == list(study.METHODS)
    assert (ROOT / study.PICTURE).exists()
