"""The documentation's table of defaults says what the policies use."""

from __future__ import annotations

from tests.sb3 import defaults_table
from tests.sb3.page import on_page


def test_the_table_of_defaults_is_up_to_date() -> None:
    assert on_page("defaults") == defaults_table.table(), (
        "docs/reinforcement_learning.md is not up to date: run "
        "python -m tests.sb3.defaults_table --write docs/reinforcement_learning.md"
    )
