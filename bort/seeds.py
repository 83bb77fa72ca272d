"""Seeds for MXNet's generator, which takes 32 bits and cuts off the others in silence."""

from __future__ import annotations

import numpy as np

_BITS = 32


def mxnet_seed(seed: int) -> int:
    """Return the value for `mx.random.seed`: a seed of up to 32 bits as it is, a larger one hashed.

    Without the hash 2^32 + 5 would draw what 5 draws.
    """
    if seed < 2**_BITS:
        return seed
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
