"""The command line runs the example configs, lets every value be changed, and says what is wrong with a wrong one."""

import csv
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from hesscale_lightning import DigitsDataModule, HesScaleModule
from hesscale_lightning.command_line.cli import console, main
from hesscale_lightning.command_line.networks import MLP as MLPNetwork
from hesscale_lightning.command_line.report import report

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


EXPECTED = {
    "digits_mlp",
    "digits_cnn",
    "mnist1d_gru",
    "digits_vit",
    "diabetes_gaussian",
    "digits_adam_logging",
    "digits_step_size_scaling",
    "digits_ddp",
    "digits_fsdp",
    "digits_curvature",
}


def test_there_is_a_config_for_every_kind_of_run():
    assert {path.stem for path in CONFIGS} == EXPECTED


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "digits_fsdp"], ids=lambda path: path.stem)
def test_every_example_config_trains_and_logs_loss_and_curvature(config, hesscale):
    # A forked process goes on in this test; the config's own strategy starts the command once more.
    options = ["--trainer.strategy", "ddp_fork"] if config.stem == "digits_ddp" else []
    steps = 12 if re.search(r"^ +every_n_steps", config.read_text(), re.MULTILINE) else 6
    rows = read_log(hesscale("fit", config, *SHORT, "--trainer.limit_train_batches", str(steps), *options))
    losses = column(rows, "train/loss")
    assert list(losses) == list(range(1, steps, 2))
    assert min(list(losses.values())[-2:]) < losses[1]
    curvature = column(rows, "curvature/trace")
    assert curvature
    assert set(curvature) <= set(range(steps))
    assert all(value > 0 for value in column(rows, "curvature/max_abs").values())
    assert list(column(rows, "val/loss")) == [steps - 1]


_LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("digits_ddp", []), ("digits_fsdp", []), ("digits_fsdp", _LAUNCHER)],
    ids=lambda part: str(part),
)
def test_two_processes_train_as_the_configs_say(tmp_path, name, launcher):
    config = ROOT / "examples" / "lightning" / f"{name}.yaml"
    command = [sys.executable, *launcher, "-m", "hesscale_lightning", "fit", "--config", str(config), *SHORT]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = read_log(tmp_path)
    assert list(column(rows, "curvature/trace")) == [1, 3, 5]
    losses = column(rows, "train/loss")
    assert losses[5] < losses[1]


def test_curvature_logged_beside_adam_leaves_its_training_alone(hesscale, tmp_path):
    config = ROOT / "examples" / "lightning" / "digits_adam_logging.yaml"
    folder = hesscale("fit", config, *SHORT)
    first = column(read_log(folder), "train/loss")
    hesscale("fit", config, *SHORT, "--trainer.callbacks", "[]", "--trainer.logger.name", "bare")
    with (folder / "outputs" / "bare" / "version_0" / "metrics.csv").open(newline="") as file:
        assert column(list(csv.DictReader(file)), "train/loss") == first


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


def test_a_report_prints_coverage_and_layers_and_draws_a_picture(hesscale, capsys):
    folder = hesscale("fit", MLP, *SHORT)
    (checkpoint,) = folder.glob("outputs/digits_mlp/version_0/checkpoints/last.ckpt")
    capsys.readouterr()
    hesscale(
        "report", MLP, "--ckpt", str(checkpoint), "--picture", "picture.png", "--batches", "3", "--quantize", "8,4"
    )
    printed = capsys.readouterr().out
    assert "LogSoftmaxBackward0" in printed
    assert "0 unsupported" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(("net.", "all "))}
    assert list(rows) == ["net.0", "net.2", "net.4", "all"]
    assert all(len(row) == 3 for row in rows.values())  # the last table: a name, 8 bits, 4 bits
    rows = {line.split()[0]: line.split() for line in printed.split("What quantizing")[0].splitlines() if line}
    assert rows["net.0"][1] == "4,160"
    shares = [float(rows[name][2]) for name in ("net.0", "net.2", "net.4")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_shows_its_progress_where_it_is_asked_to_and_never_in_a_pipe(hesscale, capsys):
    hesscale("report", MLP, "--picture", "null", "--batches", "3")
    assert "Hessian diagonal:" not in capsys.readouterr().err
    data = DigitsDataModule(batch_size=500)
    data.setup()
    batches = len(data.train_dataloader())
    model = HesScaleModule(MLPNetwork([64, 10]))
    found = report(model, data.train_dataloader(), batches=batches + 5, progress_bar=True)
    assert found.batches == batches
    assert f"/{batches} [" in capsys.readouterr().err


def test_a_report_on_a_checkpoint_that_is_not_there_says_so(hesscale):
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        hesscale("report", MLP, "--ckpt", "nowhere.ckpt")


SHAPES = {
    "net.0.weight": (64, 64),
    "net.2.weight": (64, 64),
    "net.2.bias": 64,
    "net.4.weight": (10, 64),
    "net.4.bias": 10,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "of 0 bytes, which torch.load cannot read"),
        (b"no checkpoint", "of 13 bytes, which torch.load cannot read"),
        ({"model": {}}, "with a dict without a state_dict"),
        ({"state_dict": {"body.weight": torch.ones(1)}}, r"without net.0.bias, .* and with body.weight"),
        ({"state_dict": "widths"}, r"with net.0.bias of shape \(1,\), and the model needs \(64,\)"),
    ],
    ids=["empty", "no file of torch's", "foreign", "of another model", "other shapes"],
)
def test_a_report_on_a_checkpoint_that_does_not_fit_is_one_clear_line(hesscale, content, message):
    if isinstance(content, bytes):
        Path("bad.ckpt").write_bytes(content)
    else:
        if content.get("state_dict") == "widths":
            names = [f"net.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
            content = {"state_dict": {name: torch.ones(1 if name == "net.0.bias" else SHAPES[name]) for name in names}}
        torch.save(content, "bad.ckpt")
    with pytest.raises(ValueError, match=f"Found bad.ckpt .*{message}.*expected a checkpoint") as raised:
        hesscale("report", MLP, "--ckpt", "bad.ckpt", "--picture", "null")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("--optimizer.lr", "0.1"), "model.init_args.optimizer"),
        (("--model", "no_such_package.Module"), "Python finds no module no_such_package"),
    ],
)
def test_an_optimizer_beside_the_model_and_a_class_that_does_not_exist_get_advice(hesscale, capsys, arguments, advice):
    with pytest.raises(SystemExit):
        hesscale("fit", MLP, *arguments)
    assert advice in capsys.readouterr().err


def test_the_picture_of_a_run_is_drawn_from_its_csv_log(hesscale, monkeypatch):
    config = ROOT / "examples" / "lightning" / "digits_curvature.yaml"
    text = config.read_text().replace("audit_every_n_steps: 50", "audit_every_n_steps: 4")
    Path("config.yaml").write_text(text)
    folder = hesscale("fit", Path("config.yaml"), *SHORT, "--trainer.limit_train_batches", "12")
    script = config.with_name("plot_curvature.py")
    arguments = ["--log", "outputs/digits_curvature/version_0", "--picture", "curvature.png"]
    run = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "curvature.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("outputs/digits_curvature_tensorboard/version_0/events.*"))


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


def test_a_wrong_key_in_a_config_is_answered_with_the_right_one_and_little_else(hesscale, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(MLP.read_text().replace("batch_size: 32", "batchsize: 32"))
    with pytest.raises(SystemExit):
        hesscale("fit", path)
    shown = capsys.readouterr().err
    assert "DigitsDataModule has no argument 'batchsize'; did you mean 'batch_size'? Its arguments are: shape," in shown
    assert len(shown.splitlines()) < 15


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
    assert script.load() is console
    shown = subprocess.run([sys.executable, "-m", "hesscale_lightning", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(subcommand in shown.stdout for subcommand in ("fit", "validate", "test", "predict", "report"))


def test_the_demos_command_trains_from_the_repositorys_root(tmp_path):
    command = ["-m", "hesscale_lightning", "fit", "--config", "examples/lightning/digits_mlp.yaml"]
    options = [*SHORT, "--trainer.logger.save_dir", str(tmp_path)]
    run = subprocess.run([sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "train/loss" in run.stdout + run.stderr  # the progress bar
    assert "curvature/" not in run.stdout + run.stderr
    assert (tmp_path / "digits_mlp" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantize", "4.5"], "Found quantize='4.5', expected numbers of bits, such as 8,4."),
        (["--quantize", "1"], "Found 1 bits, expected 2 to 16"),
        (["--ckpt", "nowhere.ckpt"], "Found no checkpoint at nowhere.ckpt"),
        (["--ckpt", "bad.ckpt"], "Found bad.ckpt of 13 bytes, which torch.load cannot read as weights"),
    ],
    ids=["bits that are none", "too few bits", "no file", "no checkpoint"],
)
def test_the_command_tells_a_wrong_argument_in_one_line(tmp_path, options, said):
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    command = [sys.executable, "-m", "hesscale_lightning", "report", "--config", str(MLP), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"hesscale: error: {said}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_optimizer_of_a_plain_callable_gets_advice(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from collections.abc import Callable\n"
        "from lightning.pytorch import LightningModule\n\n"
        "class Mine(LightningModule):\n"
        "    def __init__(self, optimizer: Callable) -> None:\n"
        "        super().__init__()\n"
    )
    config = "model: {class_path: mine.Mine, init_args: {optimizer: {class_path: hesscale_lightning.AdaHesScale}}}\n"
    (tmp_path / "mine.yaml").write_text(config)
    command = [sys.executable, "-m", "hesscale_lightning", "fit", "--config", "mine.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tmp_path)])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    assert "OptimizerCallable of lightning.pytorch.cli" in done.stderr
