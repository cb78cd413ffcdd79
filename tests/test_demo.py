"""The demonstration prints the comparison, draws the picture, and fails where the accuracy is too low."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "lightning" / "demo.py"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The script as a module, with runs that have already happened."""
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)

    def train(name: str, color: str, folder: str, options: list[str]) -> Any:
        run = module.Run(name, color, tmp_path / folder, options)
        (run.folder / "checkpoints").mkdir(parents=True)
        torch.save({"global_step": 40}, run.folder / "checkpoints" / "last.ckpt")
        keys = ["step", "train/loss", "val/loss", *(f"curvature/{key}" for key in module_keys)]
        rows = [
            [10, 1.0, "", -5.0, 0.5, 0.1, 0.2],
            [20, 0.5, 0.6, 5.0, 0.4, 0.1, 0.2],
            [30, 0.25, 0.5, 4.0, 0.3, 0.1, 0],
        ]
        lines = [",".join(map(str, row)) for row in [keys, *rows]]
        (run.folder / "metrics.csv").write_text("\n".join(lines))
        return run

    def time_steps(runs: Any) -> None:
        for run in runs:
            run.milliseconds = 2.5

    module_keys = ("trace", "max_abs", "mean_abs", "negative_fraction")
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "time_steps", time_steps)
    monkeypatch.setattr(module, "PICTURE", tmp_path / "outputs" / "demo.png")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--short"])
    monkeypatch.chdir(PATH.parents[2])
    return module


@pytest.mark.parametrize(("accuracy", "status"), [(0.951, 0), (0.949, 1)])
def test_it_shows_the_comparison_and_fails_below_the_required_accuracy(accuracy, status, demo, monkeypatch, capsys):
    results = {"test/accuracy": torch.tensor(accuracy), "test/loss": torch.tensor(0.125)}
    monkeypatch.setattr(demo, "test", lambda run: results)
    assert demo.main() == status
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("AdaHesScale", "Adam"))]
    assert rows == [[name, f"{accuracy:.4f}", "0.1250", "40", "2.50"] for name in ("AdaHesScale", "Adam")]
    assert ("FAILED" in printed) == bool(status)
    assert str(demo.PICTURE) in printed
    assert demo.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_a_running_mean_is_geometric_on_a_logarithmic_axis(demo):
    assert demo.smooth([1.0, 100.0]) == pytest.approx([1.0, 10.0])
    assert demo.smooth([1.0, 3.0], log=False) == pytest.approx([1.0, 2.0])


def test_the_log_is_read_with_its_gaps(demo, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,9,1.5,\n0,19,,2.5\n,29,3.5,\n")
    assert demo.read_log(path) == {"a": [(9, 1.5), (29, 3.5)], "b": [(19, 2.5)]}
