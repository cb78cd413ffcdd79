"""The command line: trains, validates, tests or predicts what a config file describes.

    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml
    python -m hesscale_lightning fit --config examples/lightning/digits_mlp.yaml --trainer.max_epochs 5
    python -m hesscale_lightning fit --help

The console script ``hesscale`` is the same command.
"""

import warnings

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI


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
            # The same run again is not an error.
            save_config_kwargs={"overwrite": True},
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
