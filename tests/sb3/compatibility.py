"""The table of what works with which algorithm, for the documentation.

    python -m tests.sb3.compatibility --write docs/reinforcement_learning.md

runs every case of :mod:`.cases` in float64 and replaces the text between the page's markers.
"""

from __future__ import annotations

import re

from tests.sb3.cases import CASES, Case
from tests.sb3.exactness import TOLERANCE, inexact, output_errors
from tests.sb3.page import write

HEAD = [
    "| algorithm | actions | runs | settings | exact at the output | largest relative error |",
    "|---|---|---|---|---|---|",
]
NOTES = {"TRPO": "critic only"}
#: What cannot run, by algorithm and actions, and why.
IMPOSSIBLE = {("RecurrentPPO", "MultiBinary"): "no: sb3-contrib's own policy fails"}


def table() -> str:
    """A row for every algorithm and action space, from runs of its cases."""
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        rows.setdefault((case.algorithm.__name__, case.actions), []).append(case)
    lines = [*HEAD]
    for (algorithm, actions), cases in rows.items():
        right: list[float] = []
        wrong: dict[str, float] = {}
        for case in cases:
            for output, error in output_errors(case).items():
                if error < TOLERANCE:
                    right.append(error)
                else:
                    wrong[f"{output} with {case.setting or 'plain options'}"] = error
        exact = f"except {', '.join(wrong)}" if wrong else "yes"
        measured = [f"{max(right):.0e}", *(f"{output}: {error:.1f}" for output, error in wrong.items())]
        runs = f"yes ({NOTES[algorithm]})" if algorithm in NOTES else "yes"
        settings = ", ".join(case.setting or "plain" for case in cases)
        lines.append(f"| {algorithm} | {actions} | {runs} | {settings} | {exact} | {', '.join(measured)} |")
    lines += [f"| {algorithm} | {actions} | {why} | | | |" for (algorithm, actions), why in IMPOSSIBLE.items()]
    reasons = {reason: None for case in CASES if (reason := inexact(case))}
    return "\n".join([*lines, "", *(f"- Not exact: {reason}." for reason in reasons)]).rstrip() + "\n"


def without_measurements(text: str) -> str:
    """The table's rows without their last column, whose last digits differ between machines."""
    return re.sub(r"[^|\n]*\|$", "|", text, flags=re.MULTILINE)


if __name__ == "__main__":
    write("compatibility", table, __doc__)
