"""The command line: trains, validates, tests or predicts what a config file describes.

    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml
    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml --trainer.max_epochs 5
    python -m hesscale_lightning fit --help

The console script ``hesscale`` is the same command.
"""

import warnings

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback


class SaveConfigBesideLog(SaveConfigCallback):
    """Saves the whole config of a run as ``config.yaml`` beside its log, and nowhere if there is no log."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, if there is a log to save it beside."""
        # Lightning would write to the working directory, over a config.yaml that is there.
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


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
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A model takes its optimizer as an argument: one place to choose it.
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigBesideLog,
            save_config_kwargs={"overwrite": True},  # the same run again is not an error
            seed_everything_default=0,
            parser_kwargs={
                "prog": "hesscale",
                "description": "Train, validate, test or predict what a config file describes, with curvature.",
            },
            args=args,
            run=run,
        )


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: the arguments; None takes them from the command line.
    """
    # Lightning 2.6 calls what torch 2.13 deprecates: nothing a user could do about it.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    HesScaleCLI(args)
