"""What the processor of this machine can compute."""

from __future__ import annotations

import functools
from contextlib import suppress

from bort.errors import UserError

# With one of these it multiplies bfloat16 itself, faster than float32.
BFLOAT16_PRODUCTS = frozenset(("avx512_bf16", "amx_bf16"))
# What oneDNN needs to compute in bfloat16 at all (its "avx512_core"), slowly without the above.
BFLOAT16_FLAGS = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl"))


@functools.lru_cache(maxsize=1)
def processor_flags() -> frozenset[str]:
    """Return the instruction sets of the first core, as Linux names them; empty if unknown."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "flags":
                return frozenset(value.split())
    return frozenset()


def computes_bfloat16() -> bool:
    """Return whether oneDNN can compute in bfloat16 here, be it slowly."""
    return processor_flags() >= BFLOAT16_FLAGS


def multiplies_bfloat16() -> bool:
    """Return whether products in bfloat16 are faster here than in float32."""
    return computes_bfloat16() and bool(processor_flags() & BFLOAT16_PRODUCTS)


def require_bfloat16(flag: str) -> None:
    """Raise `UserError`, naming the flag that asks for it, where bfloat16 would be emulated."""
    if not multiplies_bfloat16():
        raise UserError(
            f"{flag} bfloat16: this processor has neither AVX512-BF16 nor AMX and would be slower "
            f"than in float32; give {flag} float32, or auto"
        )
