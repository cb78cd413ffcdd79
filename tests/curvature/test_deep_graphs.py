"""Graphs of 50,000 operations in a row: nothing recurses, and what is dropped is freed.

Each in a process of its own, because what goes wrong ends the interpreter.
"""

import subprocess
import sys

import pytest

_START = """
import gc, sys, torch
torch.set_num_threads(1)
from hesscale_lightning.curvature import attach, coverage, supported_params

def build(kind, count):
    w = torch.full((2,), 0.5, requires_grad=True)
    x = w * 1.0
    for _ in range(count):
        if kind == "line":
            x = (x * 0.999).tanh()
        elif kind == "weights":
            x = (x * w).tanh()
        elif kind == "ladder":  # two ways down, each half of the nodes, that no single node divides
            a, b = (x, x) if isinstance(x, torch.Tensor) else x
            x = a * 0.999, b * 0.998
    return w, sum(part.sum() for part in x) if isinstance(x, tuple) else x.sum()
"""

_USES = {
    "backward": "attach(loss); loss.backward(); assert w.hess_diag.isfinite().all(); del loss",
    "dropped": "attach(loss); del loss",
    "removed": "attached = attach(loss); attached.remove(); del loss; del attached",
    "handle kept": "attached = attach(loss); del loss; gc.collect(); del attached",
    "coverage": "assert coverage(loss).supported; del loss",
    "supported": "supported_params(loss, [w]); del loss",
    "refused": """
try:
    attach(torch.linalg.svdvals(loss.expand(2, 2)).sum())
except NotImplementedError:
    pass
else:
    raise AssertionError
del loss
""",
    "walked twice": "coverage(loss); attach(loss); loss.backward(); del loss",
    "alive at the end": "attach(loss); loss.backward()",
    "a part lives on": """
z = loss * 2
attach(z)
del z
other = build(kind, 10)[1]
attach(other)
del loss
""",
}


def _run(source, timeout=300):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _START + source], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("use", _USES)
def test_a_line(use):
    _run(f"kind = 'line'; w, loss = build(kind, 25_000)\n{_USES[use]}")


@pytest.mark.parametrize("use", ["backward", "dropped"])
def test_a_ladder(use):
    _run(f"kind = 'ladder'; w, loss = build(kind, 30_000)\n{_USES[use]}")


def test_a_weight_used_everywhere():
    _run(f"kind = 'weights'; w, loss = build(kind, 12_000)\n{_USES['backward']}")


def test_memory_of_a_loop_does_not_grow():
    """What is kept of a deep graph goes when the next one is walked."""
    _run("""
from hesscale_lightning.curvature import deep_graphs
kept = []
for step in range(4):
    w, loss = build("line", 10_000)
    attach(loss)
    if step % 2:
        loss.backward()
    kept.append(len(deep_graphs._kept))
assert len(set(kept[1:])) == 1, kept
del loss
deep_graphs.release()
assert not deep_graphs._kept
""")


def test_graphs_that_are_not_deep_are_left_alone():
    _run("""
from hesscale_lightning.curvature import deep_graphs
w, loss = build("line", 1_000)
attach(loss)
assert not deep_graphs._kept
""")
