"""Find a checkpoint's weight files and merge their headers: one file, or shards named by an index that we resolve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.checkpoint import strict_json
from efficli.checkpoint.files import Stamp, contained, single_name
from efficli.checkpoint.header import TensorRef, is_lfs_pointer, read_header
from efficli.errors import CheckpointError, SecurityError, UnsupportedError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin")
"""Pickles that a trainer leaves beside the weights: never read."""


_SAVE = "files of two versions of the checkpoint are mixed: fetch or save all of them again"


def find_weights(root: Path) -> tuple[tuple[str, ...], Mapping[str, str] | None]:
    """Names of the weight files of `root`, and the index (tensor -> file) where there is one.

    `model.safetensors` goes before an index, as in transformers.
    """
    if _exists(root, SINGLE):
        return (SINGLE,), None
    if _exists(root, INDEX):
        index = read_index(root)
        return tuple(sorted(set(index.values()))), index
    raise _no_weights(root)


@dataclass(frozen=True, slots=True)
class Absent:
    """Weights that are not here, all or some of them."""

    names: frozenset[str]
    """The tensors' names, where an index tells them."""
    note: str = ""
    """What a user should know about the files that are here."""


def find_absent(root: Path) -> Absent | None:
    """What is known of weights that are not in `root`; None where all are. A Git LFS pointer stands for absent weights.

    Weights in other forms (pickles, an adapter, other names) are the error of `find_weights`.
    """
    if not _exists(root, SINGLE) and not _exists(root, INDEX):
        here = {path.name for path in root.iterdir()} - set(_NOT_WEIGHTS)
        if any(name.endswith((".safetensors", PICKLE_INDEX, *PICKLES)) for name in here):
            raise _no_weights(root)
        return Absent(frozenset())
    files, index = find_weights(root)
    names = frozenset(index or ())
    for file in files:
        path = contained(root, file)
        if not path.exists():
            return Absent(names)
        if is_lfs_pointer(path, file):
            return Absent(names, f"{file} is a Git LFS pointer, the weights were not fetched")
    return None


def read_index(root: Path) -> dict[str, str]:
    """The weight map of `root`'s index: every value is the plain name of a safetensors file beside it."""
    weight_map: Any = strict_json.load(contained(root, INDEX), INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map is missing or empty", where=INDEX)
    for file in set(map(str, weight_map.values())):
        if not single_name(file):
            hint = "weights are files beside the index: take the checkpoint from a source that you trust"
            raise SecurityError(f"index points outside the checkpoint: {file!r}", where=INDEX, hint=hint)
        if file.endswith(PICKLES):
            raise pickle_error(root, file)
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"index names {file!r}, which is not a safetensors file", where=INDEX)
    return weight_map


def read_tensors(
    root: Path, files: tuple[str, ...], index: Mapping[str, str] | None
) -> tuple[dict[str, TensorRef], dict[Path, Stamp]]:
    """Every tensor of the weight `files`, checked against the `index`, and each file's stamp."""
    tensors: dict[str, TensorRef] = {}
    stamps: dict[Path, Stamp] = {}
    for file in files:
        path = contained(root, file)
        if not path.exists() and index is not None:
            hint = "fetch that file too; an index and its shards belong together"
            raise CheckpointError(f"index names {file}, which is not here", where=INDEX, hint=hint)
        header = read_header(path, file)
        stamps[path] = header.stamp
        for tensor in header.tensors:
            other = tensors.get(tensor.name)
            if other is not None:
                message = f"tensor {tensor.name!r} is in two shards: {other.file.name} and {file}"
                raise CheckpointError(message, hint=_SAVE)
            if index is not None and index.get(tensor.name) != file:
                said = index.get(tensor.name, "no file")
                message = f"tensor {tensor.name!r} is in {file}, the index says {said}"
                raise CheckpointError(message, where=INDEX, hint=_SAVE)
            tensors[tensor.name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors:
            message = f"index says tensor {name!r} is in {file}, which does not have it"
            raise CheckpointError(message, where=INDEX, hint=_SAVE)
    if not tensors:
        raise CheckpointError("holds no tensors", where=files[0])
    return tensors, stamps


def pickle_error(root: Path, file: str) -> SecurityError:
    """The refusal of a pickle."""
    hint = (
        "load it with transformers on a machine that trusts it, then save_pretrained(), which writes safetensors; "
        "or take a revision that has safetensors"
    )
    return SecurityError("refusing pickle checkpoint; convert to safetensors", where=f"{root.name}/{file}", hint=hint)


def _exists(root: Path, name: str) -> bool:
    """Whether there is a directory entry `name`, also one that leads nowhere."""
    path = root / name
    return path.exists() or path.is_symlink()


def _no_weights(root: Path) -> CheckpointError | SecurityError | UnsupportedError:
    """The error for a folder without model.safetensors and without an index."""
    names = sorted(path.name for path in root.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES) and name not in _NOT_WEIGHTS]
    if PICKLE_INDEX in names or pickles:
        return pickle_error(root, (pickles or [PICKLE_INDEX])[0])
    if "adapter_model.safetensors" in names:
        hint = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
        return UnsupportedError("this is an adapter, not a whole model", where=root.name, hint=hint)
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"found {', '.join(others[:3])}: rename it, or add {INDEX}" if others else "convert pickles to safetensors"
    return CheckpointError(f"neither {SINGLE} nor {INDEX} found", where=root.name, hint=found)
