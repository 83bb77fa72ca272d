"""The name under which `load_runtime` was documented first; see bort.inference."""

from bort.inference.runtime import load_runtime

__all__ = ["load_runtime"]
