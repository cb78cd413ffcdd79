"""The command line: trains, validates, tests, predicts with or reports on what a config file describes.

    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml
    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml --trainer.max_epochs 5
    python -m hesscale_lightning report --config CONFIG --ckpt CHECKPOINT
    python -m hesscale_lightning fit --help

The console script ``hesscale`` is the same command.
"""

import difflib
import inspect
import pickle
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

from hesscale_lightning.command_line.report import report
from hesscale_lightning.curvature.engine import Method
from hesscale_lightning.uses.quantization import parse_bits


class WrongArgumentError(ValueError):
    """An argument of a command does not fit; its message is all that a user needs to see."""


class NoFileError(WrongArgumentError, FileNotFoundError):
    """A file that a command is to read is not there."""


class SaveConfigBesideLog(SaveConfigCallback):
    """Saves the whole config of a run as ``config.yaml`` beside its log, and nowhere if there is no log."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, if there is a log to save it beside."""
        # Lightning would write to the working directory, over a config.yaml that is there.
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class ReadableParser(LightningArgumentParser):
    """A parser whose errors are read first: no page of usage before them, and what a wrong key could have meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error, with advice where a class is given an argument that it does not have, and exit."""
        found = re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message)
        advice = _advice(*found.groups()) if found else ""
        if re.search(r"unrecognized arguments: --optimizer\b|does not accept option 'optimizer\b", message):
            advice = (
                "\n\nThe model takes its optimizer as an argument: write it under model.init_args.optimizer in the "
                "config, or --model.optimizer on the command line."
            )
        if re.search(r"Callable.* expects a function or a callable class", message):
            advice += (
                "\n\nAn argument that takes an optimizer is annotated with OptimizerCallable of "
                "lightning.pytorch.cli, which says what is left to be passed: the parameters."
            )
        missing = re.search(r"No module named '([\w.]+)'", message)
        if missing:
            advice += (
                f"\n\nPython finds no module {missing[1]}: check the spelling of the class_path, and that its folder "
                "is on PYTHONPATH."
            )
        super().error(message + advice, ex)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: ``--help`` shows the usage."""


def _advice(class_path: str, option: str) -> str:
    module, _, name = class_path.rpartition(".")
    accepted = [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "kwargs"]
    near = difflib.get_close_matches(option, accepted, n=1)
    meant = f"; did you mean '{near[0]}'?" if near else "."
    return f"\n\n{name} has no argument '{option}'{meant} Its arguments are: {', '.join(accepted)}."


class ReportingTrainer(Trainer):
    """A Trainer with one more command, ``report``."""

    def report(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt: str | None = None,
        picture: str | None = "outputs/report.png",
        batches: int = 8,
        method: Method = "hesscale",
        quantize: str | list[int] | None = None,
        quantize_method: Method = "hesscale_rank1",
    ) -> None:
        """Print what curvature meets in the training loss, and each layer's curvature; draw a picture of it.

        Args:
            model: the model.
            datamodule: its data; None asks the model for its training batches.
            ckpt: path of a checkpoint whose weights to load; null reports on the model as it is built.
            picture: path of the PNG to write; null writes none.
            batches: how many training batches the diagonal is the mean of.
            method: hesscale, hesscale_gn, hesscale_rank1 or bl89.
            quantize: numbers of bits, such as 8,4; also prints and draws what rounding each layer's weights costs.
            quantize_method: the method of the diagonals for that; hesscale_rank1 ranks layers of deep networks best.
        """
        try:
            bits = [] if quantize is None else parse_bits(quantize)
        except ValueError as error:
            raise WrongArgumentError(*error.args) from None
        if ckpt is not None:
            if not Path(ckpt).is_file():
                raise NoFileError(f"Found no checkpoint at {ckpt}, expected one that `hesscale fit` has written.")
            _load_weights(model, ckpt)
        model.trainer = self
        source = model if datamodule is None else datamodule
        source.prepare_data()
        source.setup("fit")
        result = report(model, source.train_dataloader(), batches, method, bits, quantize_method)
        print(result)  # noqa: T201
        if picture is not None:
            result.draw(Path(picture))
            print(f"\npicture: {Path(picture).resolve()}")  # noqa: T201


def _load_weights(model: LightningModule, ckpt: str) -> None:
    """Loads a checkpoint's weights; raises WrongArgumentError for a file that does not fit, and loads nothing."""
    expected = "expected a checkpoint that `hesscale fit` has written with the same --config"
    try:
        content = torch.load(ckpt, map_location="cpu", weights_only=True)
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
        size = Path(ckpt).stat().st_size
        raise WrongArgumentError(
            f"Found {ckpt} of {size} bytes, which torch.load cannot read as weights; {expected}."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise WrongArgumentError(f"Found {ckpt} with a {type(content).__name__} without a state_dict; {expected}.")
    found, own = content["state_dict"], model.state_dict()
    missing, foreign = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing or foreign:
        named = [f"without {', '.join(missing[:3])}"] * bool(missing) + [f"with {', '.join(foreign[:3])}"] * bool(
            foreign
        )
        raise WrongArgumentError(f"Found {ckpt} {' and '.join(named)}, unlike {type(model).__name__}'s; {expected}.")
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, and the model needs {tuple(value.shape)}"
            raise WrongArgumentError(f"Found {ckpt} with {name} of shape {shapes}; {expected}.")
    model.load_state_dict(found)


class HesScaleCLI(LightningCLI):
    """Lightning's command line for any LightningModule and LightningDataModule, named by their class in the config.

    Args:
        args: the arguments; None takes them from the command line.
        run: whether to run the subcommand; False only builds the model, the data and the trainer.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=ReportingTrainer,
            parser_class=ReadableParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A model takes its optimizer as an argument: one place to choose it.
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigBesideLog,
            save_config_kwargs={"overwrite": True},  # the same run again is not an error
            seed_everything_default=0,
            parser_kwargs={
                "prog": "hesscale",
                "description": "Train, validate, test, predict with or report on what a config file describes.",
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and which of their arguments come from the config's model and data."""
        return {**LightningCLI.subcommands(), "report": {"model", "datamodule"}}


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: the arguments; None takes them from the command line.
    """
    # Lightning 2.6 calls what torch 2.13 deprecates: nothing a user could do about it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    HesScaleCLI(args)


def console() -> None:
    """The command line as a command: arguments that do not fit are told in one line, without a traceback."""
    try:
        main()
    except WrongArgumentError as error:
        sys.exit(f"hesscale: error: {error}")
