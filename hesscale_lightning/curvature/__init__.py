"""HesScale on the autograd graph: torch only, and nothing here knows of optimizers or frameworks.

A small compiler: ``graph`` reads the autograd graph, ``planning`` makes a ``plan`` of steps by passes (``composite``,
``rank_one``), ``interpreted`` runs the rules of a plan while ``recorder`` takes them down, ``program`` writes what was
taken down as straight-line code, which ``compiled`` runs for later graphs that ``structure`` recognises; ``engine``
puts these together. ``registry`` knows the rules, ``rules`` holds them by family, ``reference`` is the dense oracle.
"""

from hesscale_lightning.curvature import rules as rules
from hesscale_lightning.curvature.attachment import Attachment
from hesscale_lightning.curvature.coverage import CoverageReport, coverage, supported_params
from hesscale_lightning.curvature.engine import METHODS, Method, attach, backward
from hesscale_lightning.curvature.operation import Operation, UnsupportedOperationError
from hesscale_lightning.curvature.reference import exact_hess_diag, exact_local_diag
from hesscale_lightning.curvature.registry import Rule, register_rule, registered_rules
from hesscale_lightning.curvature.rules.sources import with_curvature
from hesscale_lightning.curvature.values import ZERO, opaque

__all__ = [
    "METHODS",
    "ZERO",
    "Attachment",
    "CoverageReport",
    "Method",
    "Operation",
    "Rule",
    "UnsupportedOperationError",
    "attach",
    "backward",
    "coverage",
    "exact_hess_diag",
    "exact_local_diag",
    "opaque",
    "register_rule",
    "registered_rules",
    "supported_params",
    "with_curvature",
]
