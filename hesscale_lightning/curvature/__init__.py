"""HesScale on the autograd graph: torch only, and nothing here knows of optimizers or frameworks.

``graph`` orders the nodes, ``registry`` knows the rules, ``rules`` holds them by family, ``engine`` lets them ride on
backward, ``reference`` is the dense oracle.
"""

from hesscale_lightning.curvature import rules as rules
from hesscale_lightning.curvature.attachment import Attachment
from hesscale_lightning.curvature.coverage import CoverageReport, coverage, supported_params
from hesscale_lightning.curvature.engine import METHODS, Method, attach, backward
from hesscale_lightning.curvature.reference import exact_hess_diag, exact_local_diag
from hesscale_lightning.curvature.registry import (
    Operation,
    Rule,
    UnsupportedOperationError,
    register_rule,
    registered_rules,
)

__all__ = [
    "METHODS",
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
    "register_rule",
    "registered_rules",
    "supported_params",
]
