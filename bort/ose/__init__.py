"""OSE: the approximation scheme that finds the architecture (arXiv 2010.08512)."""

from bort.ose.search import (
    Journal,
    OseResult,
    extract,
    hyperparameter_sets,
    pareto_front,
    process_map,
    w_coefficient,
)

__all__ = [
    "Journal",
    "OseResult",
    "extract",
    "hyperparameter_sets",
    "pareto_front",
    "process_map",
    "w_coefficient",
]
