"""Settings that pretraining and fine-tuning share."""

from __future__ import annotations

from dataclasses import dataclass

from bort.config import option


@dataclass(frozen=True)
class UpdateSettings:
    """How gradients become an update, in pretraining and in fine-tuning."""

    weight_decay: float = option(0.01, "decoupled decay, not on biases and LayerNorm", minimum=0.0)
    epsilon: float = option(1e-6, "added to the root of the second moment", minimum=0.0)
    max_norm: float = option(1.0, "gradients are clipped to this norm", minimum=1e-9)
    dtype: str = option("float32", "type of the network", choices=("float32", "float16"))
    compression: str = option(
        "none",
        "type of the gradients between ranks: none (float32) or fp16",
        choices=("none", "fp16"),
    )
    on_nonfinite: str = option(
        "stop", "when the gradient is not finite: stop, or skip the step", choices=("stop", "skip")
    )
