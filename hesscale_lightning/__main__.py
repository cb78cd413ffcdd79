"""``python -m hesscale_lightning {fit,validate,test,predict} --config FILE``."""

from hesscale_lightning.command_line.cli import console

if __name__ == "__main__":
    console()
