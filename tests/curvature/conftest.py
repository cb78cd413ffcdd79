"""Profiles for hypothesis: the same examples in every run, or, with HYPOTHESIS_PROFILE=explore, new ones and many."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.curvature.device_kernels import on_the_cpu

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=500, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=20_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def device_kernels() -> Iterator[None]:
    """Operations that torch has on other devices only, on the CPU as well."""
    with on_the_cpu():
        yield
