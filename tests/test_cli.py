"""The command line runs the example configs, lets every value be changed, and says what is wrong with a wrong one."""

import csv
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from hesscale_lightning.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "examples" / "lightning").glob("*.yaml"))
MLP = ROOT / "examples" / "lightning" / "digits_mlp.yaml"
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1"]
SHORT += ["--trainer.log_every_n_steps", "2"]
NEWTON = "[{class_path: hesscale_lightning.HesScaleCallback, init_args: {method: newton}}]"


@pytest.fixture
def hesscale(tmp_path, monkeypatch):
    """Runs the command line in an empty folder; returns that folder."""

    def run(subcommand: str, config: Path, *options: str) -> Path:
        quiet = ["--trainer.enable_progress_bar", "false"]
        monkeypatch.setattr(sys, "argv", ["hesscale", subcommand, "--config", str(config), *quiet, *options])
        main()
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return run


def read_log(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("outputs/*/version_0/metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], key: str) -> dict[int, float]:
    return {int(row["step"]): float(row[key]) for row in rows if row[key]}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_example_config_trains_and_logs_loss_and_curvature(config, hesscale):
    rows = read_log(hesscale("fit", config, *SHORT))
    losses = column(rows, "train/loss")
    assert list(losses) == [1, 3, 5]
    assert losses[5] < losses[1]
    assert list(column(rows, "curvature/trace")) == [1, 3, 5]
    assert all(value > 0 for value in column(rows, "curvature/max_abs").values())
    assert list(column(rows, "val/accuracy")) == [5]


def test_there_is_a_config_for_a_dense_and_a_convolutional_network():
    assert {"digits_mlp", "digits_cnn"} <= {path.stem for path in CONFIGS}


def test_a_checkpoint_can_be_validated_tested_and_predicted_with(hesscale, capsys):
    folder = hesscale("fit", MLP, *SHORT)
    (checkpoint,) = folder.glob("outputs/digits_mlp/version_0/checkpoints/last.ckpt")
    last = ["--ckpt_path", str(checkpoint), "--trainer.logger", "false"]
    for subcommand, keys in (("validate", ("val/loss", "val/accuracy")), ("test", ("test/loss", "test/accuracy"))):
        capsys.readouterr()
        hesscale(subcommand, MLP, *last)
        printed = capsys.readouterr().out
        assert all(key in printed for key in keys)
    hesscale("predict", MLP, *last)


def test_the_same_run_twice_is_not_an_error_and_gives_the_same_result(hesscale):
    folder = hesscale("fit", MLP, *SHORT)
    hesscale("fit", MLP, *SHORT)
    first, second = (folder / f"outputs/digits_mlp/version_{i}" for i in (0, 1))
    assert (first / "metrics.csv").read_text() == (second / "metrics.csv").read_text()


def test_the_whole_config_is_saved_beside_the_log_and_nowhere_else(hesscale, tmp_path):
    own = tmp_path / "config.yaml"
    own.write_text(MLP.read_text())
    hesscale("fit", own, *SHORT, "--trainer.logger", "false")
    assert own.read_text() == MLP.read_text()
    folder = hesscale("fit", own, *SHORT)
    saved = yaml.safe_load((folder / "outputs/digits_mlp/version_0/config.yaml").read_text())
    assert saved["trainer"]["limit_train_batches"] == 6
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["betas"] == [0.9, 0.999]


def test_the_optimizer_can_be_changed_on_the_command_line(hesscale):
    folder = hesscale("fit", MLP, *SHORT, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.25")
    (path,) = folder.glob("outputs/digits_mlp/version_0/checkpoints/last.ckpt")
    (group,) = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.25
    assert "nesterov" in group


def test_adahesscale_is_the_optimizer_of_a_config_that_names_none(hesscale, tmp_path):
    config = yaml.safe_load(MLP.read_text())
    del config["model"]["init_args"]["optimizer"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    folder = hesscale("fit", path, *SHORT)
    (path,) = folder.glob("outputs/digits_mlp/version_0/checkpoints/last.ckpt")
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    assert all("exp_avg_hess" in state for state in states.values())


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--trainer.longest_run", "3", "longest_run"),
        ("--model.net.depth", "3", "depth"),
        ("--trainer.callbacks", NEWTON, "newton"),
        ("--model.optimizer.lr", "fast", "fast"),
    ],
)
def test_a_wrong_option_is_named_in_the_error(option, value, named, hesscale, capsys):
    with pytest.raises(SystemExit) as stopped:
        hesscale("fit", MLP, option, value)
    assert stopped.value.code != 0
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "documented"),
    [
        ("hesscale_lightning.HesScaleModule", "maps a batch of inputs to predictions"),
        ("hesscale_lightning.DigitsDataModule", "share of all samples for validation"),
        ("hesscale_lightning.HesScaleCallback", "compute the diagonal on every n-th optimizer step"),
    ],
)
def test_help_explains_the_arguments_of_each_class(name, documented, monkeypatch, capsys):
    kind = {"Module": "model", "Callback": "trainer.callbacks"}
    key = "data" if name.endswith("DataModule") else next(kind[end] for end in kind if name.endswith(end))
    monkeypatch.setattr(sys, "argv", ["hesscale", "fit", f"--{key}.help", name])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert documented in " ".join(capsys.readouterr().out.split())


def test_python_m_and_the_console_script_are_the_same_command():
    (script,) = (entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "hesscale")
    assert script.load() is main
    shown = subprocess.run([sys.executable, "-m", "hesscale_lightning", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(subcommand in shown.stdout for subcommand in ("fit", "validate", "test", "predict"))


def test_the_demos_command_trains_from_the_repositorys_root(tmp_path):
    command = ["-m", "hesscale_lightning", "fit", "--config", "examples/lightning/digits_mlp.yaml"]
    options = [*SHORT, "--trainer.logger.save_dir", str(tmp_path)]
    run = subprocess.run([sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "train/loss" in run.stdout + run.stderr  # the progress bar
    assert "curvature/" not in run.stdout + run.stderr
    assert (tmp_path / "digits_mlp" / "version_0" / "metrics.csv").is_file()
