"""Modules of public names whose files have moved: what YAML configs, checkpoints and programs call them still works.

``hesscale_lightning.networks`` is the very module ``hesscale_lightning.command_line.networks``, imported when it is
asked for, so that a class has one identity under both paths.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

EARLIER_PATHS = {
    "hesscale_lightning.callback": "hesscale_lightning.trainer.callback",
    "hesscale_lightning.compiled_training": "hesscale_lightning.trainer.compiled_training",
    "hesscale_lightning.cli": "hesscale_lightning.command_line.cli",
    "hesscale_lightning.data": "hesscale_lightning.command_line.data",
    "hesscale_lightning.module": "hesscale_lightning.command_line.module",
    "hesscale_lightning.networks": "hesscale_lightning.command_line.networks",
}


class EarlierPaths(MetaPathFinder, Loader):
    """Imports a module that has moved under the path that it had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answers for the paths of the table only."""
        return ModuleSpec(fullname, self) if fullname in EARLIER_PATHS else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the moved module in place of the empty one; the import system returns what stands in sys.modules."""
        sys.modules[module.__name__] = import_module(EARLIER_PATHS[module.__name__])


def install() -> None:
    """Makes the earlier paths importable; a second call changes nothing."""
    if not any(isinstance(finder, EarlierPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, EarlierPaths())  # first: an editable install's own finder would look for the old file
