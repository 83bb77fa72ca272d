"""Random generators keyed by what they are for."""

from __future__ import annotations

import zlib

import numpy as np


def generator_for(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return the generator of one purpose, so that no draw depends on what was drawn before."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])
