"""ggml's tensor types and llama.cpp's file types, by name and number (ggml.h of ggml 0.25, llama.h).

A file type (Q4_K_M) is a mixture of tensor types (Q4_K, Q6_K and F32), named for the one that most tensors have.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from efficli.errors import UsageError, did_you_mean


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

FILE_TYPES: Mapping[str, int] = numbered(
    """
    F32 0 F16 1 BF16 32 Q8_0 7 Q4_0 2 Q4_1 3 Q5_0 8 Q5_1 9 Q2_K 10 Q2_K_S 21 Q3_K_S 11 Q3_K_M 12 Q3_K_L 13
    Q4_K_S 14 Q4_K_M 15 Q5_K_S 16 Q5_K_M 17 Q6_K 18 IQ1_S 24 IQ1_M 31 IQ2_XXS 19 IQ2_XS 20 IQ2_S 28 IQ2_M 29
    IQ3_XXS 23 IQ3_XS 22 IQ3_S 26 IQ3_M 27 IQ4_XS 30 IQ4_NL 25 TQ1_0 36 TQ2_0 37 Q1_0 40 Q2_0 41 MXFP4_MOE 38
    """
)
"""llama.cpp's file types by name, with their numbers (enum llama_ftype): the value of `general.file_type`."""

ALIASES: Mapping[str, str] = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})
"""Names that llama.cpp accepts for another."""

MIXED = "MIXED"
"""Not one of llama.cpp's: a type for each tensor, as a pass allocated them to the checkpoint."""

NEED_IMATRIX = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
"""Tensor types that are garbage without an importance matrix, says llama.cpp; and file types named for them."""

_MAIN = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4"}
"""File types whose name does not begin with the tensor type that most of their tensors have."""


def file_type(name: str) -> str:
    """The canonical name of a file type ("q4_k" -> "Q4_K_M"); UsageError with the nearest names otherwise."""
    upper = name.strip().upper()
    upper = ALIASES.get(upper, upper)
    if upper not in FILE_TYPES:
        raise UsageError(f"unknown type '{name}'", hint=_nearest(upper, FILE_TYPES))
    return upper


def is_mixed(name: str) -> bool:
    """Whether a file is asked for with the types that a pass allocated, in any case."""
    return name.strip().upper() == MIXED


def asked_type(name: str) -> str:
    """As `file_type`, MIXED among them: what `--type` takes."""
    return MIXED if is_mixed(name) else file_type(name)


def mostly(num_weights: Mapping[str, int]) -> str:
    """The file type whose main type holds most of the weights; `num_weights`: canonical tensor type -> weights.

    Of several the one that llama.cpp takes the type's own name for (Q4_K: Q4_K_M). F32 where none is named for any.
    """
    named: dict[str, str] = {}
    for name in FILE_TYPES:
        named.setdefault(main_type(name), name)
    named |= {kind: kind for kind in named if kind in FILE_TYPES} | dict(ALIASES)
    held = [kind for kind in TYPE_IDS if kind in named and num_weights.get(kind)]
    return named[max(held, key=lambda kind: num_weights[kind])] if held else "F32"


def tensor_type(name: str) -> str:
    """The canonical name of a tensor's type ("q8_0" -> "Q8_0"); UsageError for a name that is none (as Q4_K_M)."""
    upper = name.strip().upper()
    if upper not in TYPE_IDS:
        kind = "a mixture for whole files" if upper in FILE_TYPES else "unknown"
        raise UsageError(f"type '{name}' of a tensor: {kind}, expected one of {', '.join(TYPE_IDS)}")
    return upper


def main_type(name: str) -> str:
    """The tensor type that most tensors of a file have: "Q4_K_M" -> "Q4_K". `name` is canonical."""
    return _MAIN.get(name) or max((type for type in TYPE_IDS if name.startswith(type)), key=len)


def _nearest(name: str, known: Mapping[str, int]) -> str:
    """A hint with the names most like `name`, or all of them."""
    near = did_you_mean(name.lower(), [one.lower() for one in known])
    if near is None:
        return f"one of {', '.join(known)}"
    return near.upper().replace("DID YOU MEAN", "did you mean").replace(" OR ", " or ")


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
