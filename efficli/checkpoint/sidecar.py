"""`efficli.json` beside a checkpoint's weights: what was done to it, what it stands for, which exact codes were chosen.

Version 1. `origin` is the checkpoint that this one is a compression of: compressing keeps it, fine-tuning sets it.
A pass that chose exact codes for a tensor keeps them (packed blocks) in a file beside the weights, with their hash:
exporters copy them verbatim, and a pass that edits such a tensor drops them and says so. A pass that chose the types
of a file's tensors keeps its choice (the allocation), which holds for these weights: every later pass drops it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from efficli.checkpoint import strict_json
from efficli.checkpoint.files import contained, open_regular, read_exactly, single_name, slabs
from efficli.checkpoint.header import read_header
from efficli.checkpoint.safetensors_file import write_file
from efficli.errors import CheckpointError, SecurityError, UnsupportedError

FILE = "efficli.json"
PACKED = "efficli-packed.safetensors"
"""Where `write_packed` puts blocks: one U8 tensor for each packed tensor, of the same name."""
PACKED_METADATA = {"efficli.version": "1"}
"""The header's metadata of such a file."""

IMATRIX = "imatrix.gguf"
"""Where a pass puts the importance matrix that its allocation was chosen with."""
ALLOCATION_DROPPED = "the allocation of types was chosen for other weights and is dropped"
"""What a pass over a checkpoint with an allocation reports."""

_SHA256 = r"^[0-9a-f]{64}$"
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Step(BaseModel):
    """One pass that was run: its method (`quantize.mixed`), its configuration, and the SHA-256 of its recipe."""

    model_config = _STRICT
    method: str
    config: dict[str, Any] = Field(default_factory=dict)
    recipe: str | None = Field(default=None, pattern=_SHA256)


class Origin(BaseModel):
    """The checkpoint that certificates compare with: its fingerprint, and where it was (a path or a hub id)."""

    model_config = _STRICT
    fingerprint: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    model: str | None = None
    revision: str | None = None


class Packed(BaseModel):
    """Exact codes of a tensor: their format's type (`Q4_K`), the file beside the weights, SHA-256 of the blocks."""

    model_config = _STRICT
    type: str
    file: str
    sha256: str = Field(pattern=_SHA256)

    @field_validator("file")
    @classmethod
    def _plain(cls, file: str) -> str:
        if not single_name(file):
            raise ValueError("must be the plain name of a file beside the weights")
        return file


class Allocation(BaseModel):
    """The type of each weight of a file, chosen together by a pass, and the importance matrix to encode them with.

    Tensors that keep F32 in every file (vectors, norms, routers) need not be named.
    """

    model_config = _STRICT
    format: Literal["gguf"] = "gguf"
    types: dict[str, str] = Field(min_length=1)
    """Name of a tensor in the file -> ggml's type (`Q4_K`)."""
    imatrix: str | None = None
    """The plain name of a file beside the weights, in llama-imatrix's format."""
    imatrix_sha256: str | None = Field(default=None, pattern=_SHA256)
    """Of that file; `sealed` records it."""
    losses: dict[str, float] = Field(default_factory=dict)
    """What each tensor is predicted to lose by its type, as far as the pass knows."""

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.imatrix is not None and not single_name(self.imatrix):
            raise ValueError("imatrix must be the plain name of a file beside the weights")
        if self.imatrix is None and self.imatrix_sha256 is not None:
            raise ValueError("imatrix_sha256 of no imatrix")
        return self


class Sidecar(BaseModel):
    """All of `efficli.json`; what it says is changed only by making a new one."""

    model_config = _STRICT
    version: Literal[1] = 1
    kind: Literal["checkpoint"] = "checkpoint"
    steps: list[Step] = Field(default_factory=list)
    origin: Origin | None = None
    packed: dict[str, Packed] = Field(default_factory=dict)
    allocation: Allocation | None = None


def read_sidecar(root: Path) -> Sidecar | None:
    """The sidecar of the checkpoint folder `root`, or None if it has none."""
    path = contained(root, FILE)
    if not path.exists():
        return None
    found = strict_json.load(path, FILE)
    version = found.get("version")
    if found.get("kind") != "checkpoint":
        raise CheckpointError(f"kind is {found.get('kind')!r}, expected 'checkpoint'", where=FILE)
    if version != 1:
        hint = "it was written by a newer efficli: update"
        raise UnsupportedError(f"version is {version!r}, expected 1", where=FILE, hint=hint)
    try:
        return Sidecar.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}", where=FILE) from None


def write_sidecar(folder: Path, sidecar: Sidecar) -> Path:
    """Write `efficli.json` into `folder` (the caller's own, unpublished); its bytes depend on `sidecar` alone."""
    path = folder / FILE
    text = json.dumps(sidecar.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def compress(parent: Sidecar | None, step: Step, parent_origin: Origin) -> Sidecar:
    """The sidecar after a pass that makes smaller: the origin stays; `parent_origin` describes a parent without one."""
    if parent is None:
        return Sidecar(steps=[step], origin=parent_origin)
    return parent.model_copy(update={"steps": [*parent.steps, step], "origin": parent.origin or parent_origin})


def fine_tune(parent: Sidecar | None, step: Step, origin: Origin) -> tuple[Sidecar, list[str]]:
    """The sidecar after training: `origin` becomes the checkpoint to compare with, what was chosen goes; with notes."""
    notes = [_dropped(name, packed) for name, packed in sorted(parent.packed.items())] if parent else []
    notes += [ALLOCATION_DROPPED] if parent is not None and parent.allocation is not None else []
    steps = [*parent.steps, step] if parent else [step]
    return Sidecar(steps=steps, origin=origin), notes


def edit(sidecar: Sidecar, name: str) -> tuple[Sidecar, str | None]:
    """The sidecar after the tensor `name` was changed: its packed blocks are no longer true; the note says so."""
    packed = dict(sidecar.packed)
    gone = packed.pop(name, None)
    if gone is None:
        return sidecar, None
    return sidecar.model_copy(update={"packed": packed}), _dropped(name, gone)


def write_packed(folder: Path, blocks: Mapping[str, tuple[str, bytes]], file: str = PACKED) -> dict[str, Packed]:
    """Write blocks (tensor name -> type, bytes) beside the weights; returns the sidecar's entries for them."""
    tensors = {name: ("U8", (len(data),), data) for name, (_, data) in blocks.items()}
    write_file(folder / file, tensors, PACKED_METADATA)
    return {
        name: Packed(type=kind, file=file, sha256=hashlib.sha256(data).hexdigest())
        for name, (kind, data) in blocks.items()
    }


def packed_blocks(root: Path, sidecar: Sidecar, name: str) -> bytes:
    """The packed blocks of tensor `name`, verified; a SecurityError if they are not those that the pass chose.

    The file is a safetensors file with a U8 tensor `name`, or, under any other extension, the blocks alone.
    """
    entry = sidecar.packed[name]
    path = contained(root, entry.file)
    if not path.exists():
        raise CheckpointError(f"{FILE} names {entry.file}, which is not here", where=name)
    if entry.file.endswith(".safetensors"):
        data = _tensor_bytes(path, name)
    else:
        with open_regular(path, entry.file) as (descriptor, stamp):
            data = _bytes(descriptor, 0, stamp.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise SecurityError(f"sha256 of the packed blocks of {name!r} differs from {FILE}", where=entry.file)
    return data


def sealed(allocation: Allocation, folder: Path) -> Allocation:
    """The allocation with the SHA-256 of its importance matrix in `folder`; as it is where that is not written."""
    path = None if allocation.imatrix is None else contained(folder, allocation.imatrix)
    if path is None or not path.exists():
        return allocation
    return allocation.model_copy(update={"imatrix_sha256": _file_sha256(path)})


def allocation_imatrix(root: Path, allocation: Allocation) -> Path | None:
    """The importance matrix of an allocation, verified; a SecurityError if it is not the one that the pass used."""
    if allocation.imatrix is None:
        return None
    path = contained(root, allocation.imatrix)
    if not path.exists():
        raise CheckpointError(f"{FILE} names {allocation.imatrix}, which is not here", where=root.name)
    if allocation.imatrix_sha256 is None:
        raise CheckpointError(f"allocation: imatrix_sha256 of {allocation.imatrix} is missing", where=FILE)
    if _file_sha256(path) != allocation.imatrix_sha256:
        raise SecurityError(f"sha256 of the importance matrix differs from {FILE}", where=allocation.imatrix)
    return path


def packed_sizes(root: Path, sidecar: Sidecar) -> dict[str, int]:
    """Bytes of the packed blocks of every tensor that has some; only headers are read."""
    sizes: dict[str, int] = {}
    for file in sorted({entry.file for entry in sidecar.packed.values()}):
        path = contained(root, file)
        if not path.exists():
            raise CheckpointError(f"{FILE} names {file}, which is not here", where=root.name)
        members = [name for name, entry in sidecar.packed.items() if entry.file == file]
        if file.endswith(".safetensors"):
            held = {tensor.name: tensor.nbytes for tensor in read_header(path).tensors}
            if not held.keys() >= set(members):
                missing = sorted(set(members) - held.keys())
                raise CheckpointError(f"holds no packed blocks of {missing[0]!r}", where=file)
            sizes |= {name: held[name] for name in members}
        else:
            sizes |= dict.fromkeys(members, path.stat().st_size)
    return sizes


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for piece in slabs(path, path.name):
        digest.update(piece)
    return digest.hexdigest()


def _tensor_bytes(path: Path, name: str) -> bytes:
    for tensor in read_header(path).tensors:
        if tensor.name == name:
            with open_regular(path, path.name) as (descriptor, _):
                return _bytes(descriptor, tensor.offset, tensor.nbytes)
    raise CheckpointError(f"holds no packed blocks of {name!r}", where=path.name)


def _bytes(descriptor: int, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    read_exactly(descriptor, memoryview(buffer), offset)
    return bytes(buffer)


def _dropped(name: str, packed: Packed) -> str:
    return f"{name}: its {packed.type} blocks were chosen for other values and are dropped"
