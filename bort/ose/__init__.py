"""OSE: the approximation scheme that finds the architecture (arXiv 2010.08512)."""

from bort.ose.candidates import SearchJournal, process_map
from bort.ose.search import (
    OseResult,
    extract,
    hyperparameter_sets,
    pareto_front,
    w_coefficient,
)

__all__ = [
    "OseResult",
    "SearchJournal",
    "extract",
    "hyperparameter_sets",
    "pareto_front",
    "process_map",
    "w_coefficient",
]
