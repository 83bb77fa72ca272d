"""The name under which `predict` and `fill_mask` were documented first; see bort.inference."""

from bort.inference.pipelines import fill_mask, predict

__all__ = ["fill_mask", "predict"]
