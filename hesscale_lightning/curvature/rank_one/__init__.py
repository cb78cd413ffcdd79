"""``method="hesscale_rank1"``: the rank-one part of a loss's curvature rides on the gradient.

In every sample the Hessian of a loss at the network's output contains a part along the gradient, ``c g g^T``. The chain
rule takes it through any layer exactly, ``J^T (c g g^T) J = c (J^T g) (J^T g)^T``, and ``J^T g`` is the gradient that
autograd delivers anyway. Only the remainder needs HesScale's recursion.
"""

from hesscale_lightning.curvature.rank_one.refine import Change, Refinement

__all__ = ["Change", "Refinement"]
