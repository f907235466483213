"""What goes from a checkpoint to the next beside its weights: small files, and packed blocks that are still true."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from efficli.checkpoint.files import single_name, slabs
from efficli.checkpoint.hub import ELSEWHERE
from efficli.checkpoint.reader import Checkpoint
from efficli.checkpoint.safetensors_file import write_file
from efficli.checkpoint.shards import INDEX, PICKLES, SINGLE
from efficli.checkpoint.sidecar import FILE, PACKED, PACKED_METADATA, Packed, edit, packed_blocks, packed_sizes
from efficli.checkpoint.tensor_types import ALLOCATION, FRONTIER, TENSOR_TYPES
from efficli.ops.storage import byte_text, writing

RECIPE = "recipe.yaml"
"""Beside the weights of a compressed checkpoint: the command line that made it, as a recipe."""

MAX_SMALL_BYTES = 1 << 28
"""A larger file beside the weights is no tokenizer and no card."""

_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", ".ot", ".npz")
_MODULE = re.compile(r"\d+_\w+")
"""Folders of sentence-transformers' modules (1_Pooling, 2_Dense): their weights belong to the model."""


def carry_small_files(ckpt: Checkpoint, folder: Path) -> list[str]:
    """Copy every file that is not weights, config.json or sidecar into `folder`; returns what was left out and why.

    What a pass wrote beside the sidecar goes with it: the allocation's imatrix and its text, the recipe.
    A link that leaves the checkpoint is a SecurityError, as everywhere.
    """
    own = {SINGLE, INDEX, FILE, "config.json"}
    if ckpt.sidecar is not None:
        own |= {RECIPE, TENSOR_TYPES, ALLOCATION, FRONTIER, *(entry.file for entry in ckpt.sidecar.packed.values())}
        allocation = ckpt.sidecar.allocation
        own |= {allocation.imatrix} if allocation is not None and allocation.imatrix is not None else set()
    left_out = []
    for name in sorted(set(small_names(ckpt.root)) - own):
        path = ckpt.file(name)
        if path is None:
            continue
        nbytes = path.stat().st_size
        if nbytes > MAX_SMALL_BYTES and not name.endswith(".safetensors"):
            left_out.append(f"{name}: not taken over, it has {byte_text(nbytes)}")
            continue
        target = folder / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        _copy(path, name, target)
    return left_out


def small_names(root: Path) -> Iterator[str]:
    """Names of the small files of a checkpoint and of its folders; hidden ones and other forms of the model apart.

    `folder/name` of those one folder down. Weights of sentence-transformers' modules are among them.
    """
    for path in root.iterdir():
        if path.name.startswith(".") or not single_name(path.name):
            continue
        if path.is_file() and path.suffix not in _WEIGHTS:
            yield path.name
        elif path.is_dir() and not any(fnmatch.fnmatch(f"{path.name}/", place[:-1]) for place in ELSEWHERE):
            for inner in path.iterdir():
                weights = inner.suffix == ".safetensors" and _MODULE.fullmatch(path.name)
                if inner.is_file() and single_name(inner.name) and (weights or inner.suffix not in _WEIGHTS):
                    yield f"{path.name}/{inner.name}"


def _copy(path: Path, name: str, target: Path) -> None:
    """Copy a regular file; an error if it is cut short meanwhile."""
    with writing(target), target.open("xb") as out:
        for piece in slabs(path, name):
            out.write(piece)


def carry_packed(
    ckpt: Checkpoint, folder: Path, kept: Mapping[str, str], edited: Iterable[str], *, headers_only: bool = False
) -> tuple[dict[str, Packed], list[str]]:
    """Write the packed blocks of tensors that are copied (new name -> old name) into `folder`.

    Returns the new sidecar's entries, and a row for each tensor whose values were `edited`: its blocks are dropped.
    With `headers_only` the entries alone are made. Blocks that are not those of the sidecar are a SecurityError.
    """
    sidecar = ckpt.sidecar
    if sidecar is None or not sidecar.packed:
        return {}, []
    dropped = [note for name in edited for note in (edit(sidecar, name)[1],) if note]
    sizes = packed_sizes(ckpt.root, sidecar)
    names = {new: old for new, old in sorted(kept.items()) if old in sizes}
    if names and not headers_only:
        path = folder / PACKED
        with writing(path):
            write_file(
                path,
                {
                    new: ("U8", (sizes[old],), partial(packed_blocks, ckpt.root, sidecar, old))
                    for new, old in names.items()
                },
                PACKED_METADATA,
            )
    return {new: sidecar.packed[old].model_copy(update={"file": PACKED}) for new, old in names.items()}, dropped
