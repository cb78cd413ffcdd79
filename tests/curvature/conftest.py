"""Profiles for hypothesis: the same examples in every run, or, with HYPOTHESIS_PROFILE=explore, new ones and many."""

import os

import pytest
from hypothesis import HealthCheck, settings

from hesscale_lightning.curvature import engine

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=500, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=20_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    """Every test meets its structures for the first time, so that its programs are written at once."""
    engine._structures.clear()
    engine._structures.patience = 4
