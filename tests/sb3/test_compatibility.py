"""The documentation's table of algorithms says what the tests find."""

from __future__ import annotations

from tests.sb3 import compatibility
from tests.sb3.page import on_page


def test_the_table_of_algorithms_is_up_to_date() -> None:
    now, written = (compatibility.without_measurements(t) for t in (compatibility.table(), on_page("compatibility")))
    assert written == now, (
        "docs/reinforcement_learning.md is not up to date: run "
        "python -m tests.sb3.compatibility --write docs/reinforcement_learning.md"
    )
