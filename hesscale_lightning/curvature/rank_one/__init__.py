"""``method="hesscale_rank1"``: the rank-one part of a loss's curvature rides on the gradient.

In every sample the Hessian of a loss at the network's output contains a part along the gradient, ``c g g^T``. The chain
rule takes it through any layer exactly, ``J^T (c g g^T) J = c (J^T g) (J^T g)^T``, and ``J^T g`` is the gradient that
autograd delivers anyway. Only the remainder needs HesScale's recursion.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.plan import Plan
from hesscale_lightning.curvature.rank_one.decisions import make_recipe
from hesscale_lightning.curvature.rank_one.steps import Parts

__all__ = ["refine"]


def refine(plan: Plan, nodes: Sequence[Node], outside: Container[int]) -> None:
    """Replaces the steps of a plan that meet the rank-one part, and leaves notes on where it begins and ends.

    Args:
        plan: HesScale's, all of its steps.
        nodes: The graph's nodes by position.
        outside: Cells whose curvature is wanted itself.
    """
    recipe = make_recipe(plan, nodes, outside)
    plan.notes = [(plan.steps[note.step].rule.name, note) for note in recipe.notes]
    parts = Parts(recipe.samples, recipe.heads)
    plan.steps = [
        step if use is None else step._replace(carry=parts.carry(use, step), curved=True)
        for step, use in zip(plan.steps, recipe.uses, strict=True)
    ]
