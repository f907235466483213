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
