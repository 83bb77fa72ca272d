"""Settings that pretraining and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass

from bort.config import option


@dataclass(frozen=True)
class UpdateSettings:
    """Update: clipping, weight decay, precision."""

    weight_decay: float = option(0.01, "weight decay (none on biases and LayerNorm)", minimum=0.0)
    # Above 0: weights that have had no gradient yet, as those of positions that no sequence has
    # reached, would become 0 / 0.
    epsilon: float = option(1e-6, "Adam epsilon", minimum=1e-30)
    max_norm: float = option(1.0, "gradients are clipped to this global norm", minimum=1e-9)
    dtype: str = option(
        "float32",
        "training precision: float16 needs GPUs; bfloat16 is that of matrix products on CPUs and "
        "needs AVX512-BF16 or AMX; auto: bfloat16 on such CPUs, else float32",
        choices=("float32", "float16", "bfloat16", "auto"),
    )
    compression: str = option(
        "none",
        "precision of the gradients sent between ranks: none (float32) or fp16",
        choices=("none", "fp16"),
    )
    on_nonfinite: str = option(
        "stop",
        "what to do when a gradient is not finite: stop, or skip the step",
        choices=("stop", "skip"),
    )
