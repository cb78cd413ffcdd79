"""The documentation's table of algorithms says what the tests find."""

from __future__ import annotations

import pytest

from tests.sb3 import compatibility


@pytest.mark.skipif(not compatibility.PAGE.exists(), reason="the page is not written yet")
def test_the_table_of_algorithms_is_up_to_date() -> None:
    now, written = (compatibility.without_measurements(t) for t in (compatibility.table(), compatibility.on_page()))
    assert written == now, (
        "docs/reinforcement_learning.md is not up to date: run "
        "python -m tests.sb3.compatibility --write docs/reinforcement_learning.md"
    )
