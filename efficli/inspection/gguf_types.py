"""Which tensors of a GGUF file have another type than its file type stands for, and why; llama.cpp is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType

from efficli.errors import EffiError
from efficli.export.gguf.layout import Field, Metadata, OutTensor
from efficli.export.gguf.parse import ARRAY, GgufHeader
from efficli.export.gguf.types import TypeChoice, TypeRequest, choose_types
from efficli.inspection import llama_view
from efficli.inspection.report import Difference, Finding, ModelReport
from efficli.ops.ggml_types import FILE_TYPES

CHECK = "types"
_NAMES = {number: name for name, number in FILE_TYPES.items()}
_PLAIN_NAME = re.compile(r"[\w.\-]+", re.ASCII)
_PLAIN = frozenset({"F32", "F16", "BF16"})


def file_type_of(metadata: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the file type that the metadata names, or None."""
    number = metadata.get("general.file_type")
    # 1024: "guessed", set by loaders of old files
    return _NAMES.get(number & ~1024) if type(number) is int else None


def check_types(report: ModelReport, header: GgufHeader) -> None:
    """Compare every tensor's type with what llama.cpp's quantizer would choose for the file type.

    Tensors whose rows cannot hold the blocks of their type, and mixtures of somebody's own, are information. A file
    most of whose weights have another type than it is called by is a finding.
    """
    name = file_type_of(header.metadata)
    if name is None:
        report.saw(CHECK, f"general.file_type is {header.metadata.get('general.file_type')}, not known", "skipped")
        return
    if not llama_view.is_installed():
        report.saw(CHECK, "llama-cpp-python is not installed: nothing to compare with", "skipped")
        return
    if not all(map(_PLAIN_NAME.fullmatch, header.tensors)):
        report.saw(CHECK, "names of tensors that llama.cpp does not write", "skipped")
        return
    try:
        choice = _nearest(name, header)
    except EffiError as error:
        report.saw(CHECK, f"llama.cpp says nothing for {name}: {error.message}", "skipped")
        return
    fallen = {fallback.tensor: fallback for fallback in choice.fallbacks}
    differences = []
    for tensor, placed in header.tensors.items():
        wanted = choice.types[tensor]
        if tensor in fallen and placed.type == wanted:
            why = str(fallen[tensor]).partition(": ")[2]
            differences.append(Difference(tensor=tensor, wanted=fallen[tensor].wanted, got=wanted, why=why))
        elif placed.type != wanted:
            why = f"llama.cpp's {name} has {wanted} here"
            differences.append(Difference(tensor=tensor, wanted=wanted, got=placed.type, why=why))
    report.fallbacks = tuple(differences)
    report.judge(CHECK, _misnamed(name, choice, header), _said(name, differences, fallen))


def _said(name: str, differences: list[Difference], fallen: Mapping[str, object]) -> str:
    if not differences:
        return f"those of {name}"
    fell = sum(one.tensor in fallen for one in differences)
    other = len(differences) - fell
    parts = [f"{fell} fell back: their rows do not fill the blocks"] if fell else []
    return f"those of {name}, but " + "; ".join([*parts, f"{other} chosen otherwise"] if other else parts)


def _misnamed(name: str, choice: TypeChoice, header: GgufHeader) -> list[Finding]:
    weights = {tensor: placed.nbytes for tensor, placed in header.tensors.items()}
    other = sum(n for tensor, n in weights.items() if header.tensors[tensor].type != choice.types[tensor])
    if 2 * other <= sum(weights.values()):
        return []
    types = [header.tensors[tensor].type for tensor in sorted(weights, key=lambda t: -weights[t])]
    most = max(set(types), key=lambda t: sum(n for one, n in weights.items() if header.tensors[one].type == t))
    return [
        Finding(
            check=CHECK,
            message=f"general.file_type says {name}, most of its bytes are {most}",
            hint="runtimes go by the tensors and people by the name: correct general.file_type",
        )
    ]


def _nearest(name: str, header: GgufHeader) -> TypeChoice:
    """llama.cpp's choice with or without an importance matrix, whichever is nearer to the file."""
    metadata = _fields(header)
    tensors = [OutTensor(name=tensor, shape=placed.shape, sources=()) for tensor, placed in header.tensors.items()]
    used = any(key.startswith("quantize.imatrix.") for key in header.metadata)
    best: tuple[int, TypeChoice] | None = None
    for with_imatrix in (used, not used) if name not in _PLAIN else (used,):
        request = TypeRequest(type=name, imatrix_follows=with_imatrix, allow_non_ternary=True)
        try:
            choice = choose_types(metadata, tensors, request)
        except EffiError:
            if best is None and with_imatrix != used:
                raise
            continue
        off = sum(header.tensors[tensor].type != kind for tensor, kind in choice.types.items())
        if best is None or off < best[0]:
            best = off, choice
        if off == 0:
            break
    if best is None:
        raise EffiError("it refuses the metadata")
    return best[1]


def _fields(header: GgufHeader) -> Metadata:
    """The metadata that the choice depends on, with its types: nothing of the vocabulary."""
    arch = header.metadata.get("general.architecture")
    out: Metadata = {}
    for key, value in header.metadata.items():
        kind, item = header.kinds[key]
        if not key.startswith(("general.architecture", f"{arch}.")) or (kind == ARRAY and not value):
            continue
        out[key] = Field(value, GGUFValueType(kind), None if item is None else GGUFValueType(item))
    if not isinstance(arch, str) or "general.architecture" not in out:
        raise EffiError("it names no architecture")
    return out
