"""The documentation's table of defaults says what the policies use."""

from __future__ import annotations

from tests.sb3 import defaults_table


def test_the_table_of_defaults_is_up_to_date() -> None:
    assert defaults_table.on_page() == defaults_table.table(), (
        "docs/reinforcement_learning.md is not up to date: run "
        "python -m tests.sb3.defaults_table --write docs/reinforcement_learning.md"
    )
