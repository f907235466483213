"""ggml's tensor types and their numbers (enum ggml_type of ggml.h, ggml 0.25)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def numbered(text: str) -> Mapping[str, int]:
    """A table written as "NAME 1 OTHER 2"."""
    words = text.split()
    return MappingProxyType(dict(zip(words[::2], map(int, words[1::2]), strict=True)))


TYPE_IDS: Mapping[str, int] = numbered(
    """
    F32 0 F16 1 BF16 30 Q4_0 2 Q4_1 3 Q5_0 6 Q5_1 7 Q8_0 8 Q2_K 10 Q3_K 11 Q4_K 12 Q5_K 13 Q6_K 14
    IQ1_S 19 IQ1_M 29 IQ2_XXS 16 IQ2_XS 17 IQ2_S 22 IQ3_XXS 18 IQ3_S 21 IQ4_NL 20 IQ4_XS 23
    TQ1_0 34 TQ2_0 35 MXFP4 39 NVFP4 40 Q1_0 41 Q2_0 42
    """
)
"""Types that a weight can be stored in, with their numbers in a GGUF file (enum ggml_type)."""

BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    dict.fromkeys(("Q4_0", "IQ4_NL"), (32, 18))
    | {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
    | {"Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "MXFP4": (32, 17), "NVFP4": (64, 36)}
    | {"Q1_0": (128, 18), "Q2_0": (64, 18)}
    | {"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
    | {"IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82)}
    | {"IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66)}
)
"""Weights in a block of each type, and the bytes that it takes; for reading without the library."""
