"""The types of a file's tensors as a text: what llama-quantize reads with --tensor-type-file."""

from __future__ import annotations

import re
from collections.abc import Mapping

TENSOR_TYPES = "tensor-types.txt"
"""The name of the text beside weights, or beside the file that was written so."""

ALLOCATION, FRONTIER = "allocation.json", "frontier.png"
"""What the types were chosen from, beside them: as numbers, and as a picture."""

_SPECIAL = re.compile(r"[][\\.^$*+?(){}|]")


def tensor_types_text(types: Mapping[str, str]) -> str:
    """One `^name$=type` a line: tensor names as regular expressions of ECMAScript, types in lower case.

    Blocks are in the order of their numbers. llama-quantize splits the text at white space and each word at its first
    `=`, and searches the expressions in the names; it knows no comments.
    """
    return "".join(f"^{_SPECIAL.sub(_escaped, name)}$={types[name].lower()}\n" for name in sorted(types, key=_order))


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]


def _order(name: str) -> list[tuple[str, int]]:
    """A key that sorts blk.2 before blk.10."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
