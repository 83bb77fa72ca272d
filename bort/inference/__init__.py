"""Use of a trained model: prediction, ONNX export and int8."""

from bort.inference.pipelines import fill_mask, predict
from bort.inference.runtime import load_runtime

__all__ = ["fill_mask", "load_runtime", "predict"]
