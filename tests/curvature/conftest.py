"""Profiles for hypothesis: the same examples in every run, or, with HYPOTHESIS_PROFILE=explore, new ones and many."""

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=500, derandomize=True, **_COMMON)
settings.register_profile("explore", max_examples=20_000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
