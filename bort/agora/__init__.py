"""Agora: fine-tuning with scarce data (arXiv 2010.07990)."""

from bort.agora.algorithm import (
    CLASSIFICATION,
    AgoraResult,
    AgoraSettings,
    Examples,
    Objective,
    agora,
    regression,
)
from bort.agora.store import DiskStore, Store
from bort.grids import combinations as grid

__all__ = [
    "CLASSIFICATION",
    "AgoraResult",
    "AgoraSettings",
    "DiskStore",
    "Examples",
    "Objective",
    "Store",
    "agora",
    "grid",
    "regression",
]
