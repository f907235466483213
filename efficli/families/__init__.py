"""What each model family is (norms, rope, windows, softcaps, biases, names): one table that every reader shares."""

from __future__ import annotations

from efficli.families.rope import Rope, inverse_frequencies
from efficli.families.shape import ModelShape, family_of, known_architectures, read_shape
from efficli.families.table import FAMILIES, Family
from efficli.families.tensors import TensorSpec, check_tensors, expected_tensors, own_names

__all__ = [
    "FAMILIES",
    "Family",
    "ModelShape",
    "Rope",
    "TensorSpec",
    "check_tensors",
    "expected_tensors",
    "family_of",
    "inverse_frequencies",
    "known_architectures",
    "own_names",
    "read_shape",
]
