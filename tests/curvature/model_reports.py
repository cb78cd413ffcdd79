"""The coverage reports of the model zoo, as a page of the documentation.

    python -m tests.curvature.model_reports

writes docs/models.md.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from hesscale_lightning.curvature import coverage
from tests.curvature.models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models, and where their curvature is approximate

A small instance of each of these runs in the tests, unmodified, in train and eval mode, float32 and float64, and is
compared with a slow, independent implementation of the recursion (`tests/curvature/test_models.py`,
`test_models_slowly.py`; not the speech model with its CTC loss, and attention by its composed backend). Below is the
coverage report of each in eval mode; `python -m tests.curvature.model_reports` writes this page.

An operation is *exact* if it passes on all the curvature that arrives, and *approximate* where the cross term of two
paths that meet is dropped, as at every residual addition. The off-diagonal entries that linear layers and other mixing
operations make are always dropped: that is HesScale.
"""


def page() -> str:
    lines = [HEAD, "| model | exact | approximate | unsupported |", "|---|---|---|---|"]
    details = []
    for model in MODELS:
        torch.manual_seed(0)
        module, loss = model.build(dtype=torch.float64)
        report = coverage(loss(module.eval()), module.parameters())
        lines.append(f"| {model.name} | {len(report.exact)} | {len(report.approximate)} | {len(report.unsupported)} |")
        if report.approximate:
            reasons = Counter((e.operation, e.reason) for e in report.approximate)
            details.append(f"\n## {model.name}\n")
            details += [f"- {name} ({count}): {reason}" for (name, reason), count in sorted(reasons.items())]
    return "\n".join([*lines, *details]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
