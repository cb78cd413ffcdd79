"""The demonstration prints the comparison, draws the picture, and fails where the accuracy is too low."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "examples" / "lightning" / "demo.py"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The script as a module, with a command line that has already run."""
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    log = {"curvature/audit/relative_l1": [(100, 0.5), (200, 0.25)]}
    log |= {f"curvature/share/net.{k}": [(10, share), (20, share)] for k, share in ((0, 0.5), (2, 0.25), (4, 0.25))}
    monkeypatch.setattr(module, "command_line", lambda short: log)
    monkeypatch.setattr(module, "PICTURE", tmp_path / "outputs" / "demo.png")
    return module


@pytest.mark.parametrize(("accuracy", "status"), [(0.931, 0), (0.929, 1)])
def test_it_shows_the_comparison_and_fails_below_the_required_accuracy(accuracy, status, demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "train", lambda contender, factor, epochs: demo.Outcome(0.125, accuracy, [0.002]))
    assert demo.main([]) == status
    printed = capsys.readouterr().out
    rows = {
        contender.name: line
        for contender in demo.CONTENDERS
        for line in printed.splitlines()
        if line.startswith(contender.name + "  ")
    }
    assert len(rows) == 3
    for row in rows.values():
        assert row.count(f"1.2e-01  {100 * accuracy:.1f}%") == len(demo.FACTORS)
        assert row.split()[-1] == "2.00"
    assert ("FAILED" in printed) == bool(status)
    assert "25.0% relative L1 error" in printed
    assert demo.PICTURE.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("loss", "lost"), [(0.1, False), (2.2, False), (2.4, True), (math.inf, True), (math.nan, True)]
)
def test_what_ends_worse_than_a_guess_has_diverged(loss, lost, demo):
    assert demo.Outcome(loss, 0.1).diverged is lost
    assert ("!" in demo.table({"Adam": [demo.Outcome(loss, 0.1, [1.0])]})) is lost


@pytest.mark.filterwarnings("ignore")
def test_every_contender_trains(demo):
    for contender in demo.CONTENDERS:
        outcome = demo.train(contender, 1.0, 1)
        assert not outcome.diverged
        assert len(outcome.durations) > 10


def test_the_log_is_read_with_its_gaps(demo, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,9,1.5,\n0,19,,2.5\n,29,3.5,\n")
    assert demo.read_log(path) == {"a": [(9, 1.5), (29, 3.5)], "b": [(19, 2.5)]}
