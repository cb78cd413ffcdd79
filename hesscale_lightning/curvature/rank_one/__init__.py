"""``method="hesscale_rank1"``: the rank-one part of a loss's curvature rides on the gradient.

In every sample the Hessian of a loss at the network's output contains a part along the gradient, ``c g g^T``. The chain
rule takes it through any layer exactly, ``J^T (c g g^T) J = c (J^T g) (J^T g)^T``, and ``J^T g`` is the gradient that
autograd delivers anyway. Only the remainder needs HesScale's recursion.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from hesscale_lightning.curvature.graph import Node
from hesscale_lightning.curvature.plan import Plan
from hesscale_lightning.curvature.rank_one.refine import Recipe, aspects_of, make_recipe, signature

__all__ = ["Recipe", "recipe_for"]

_RECIPES_PER_PLAN = 4


def recipe_for(plan: Plan, nodes: Sequence[Node], following: Sequence[Any], outside: Container[int]) -> Recipe:
    """What is done differently at each step: looked up, or decided if no graph of this size has been met lately.

    Args:
        plan: The plan of the graph's structure, which keeps its recipes.
        nodes: The graph's nodes by position.
        following: Their ``next_functions``.
        outside: Cells whose curvature is wanted itself; a plan with such is not kept, so no recipe outlives them.
    """
    recipes = plan.recipes
    if not recipes:
        recipes.append(aspects_of(plan, nodes))
    key = signature(recipes[0], nodes)
    for known, recipe in recipes[1:]:
        if known == key:
            found: Recipe = recipe
            return found
    recipe = make_recipe(plan, nodes, following, outside)
    del recipes[_RECIPES_PER_PLAN:]
    recipes.insert(1, (key, recipe))
    return recipe
