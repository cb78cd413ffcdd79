"""What every test begins with."""

import pytest

from hesscale_lightning.curvature import engine


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    """Every test meets its structures of graphs for the first time, so that their programs are written at once."""
    engine._structures.clear()
    engine._structures.patience = 4
