"""Open a checkpoint: find it, refuse what must be refused, read its headers. No weight is read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficli.checkpoint import refuse, strict_json
from efficli.checkpoint.files import Stamp, contained
from efficli.checkpoint.locate import Place, locate
from efficli.checkpoint.reader import Checkpoint
from efficli.checkpoint.shards import INDEX, find_weights, read_tensors
from efficli.checkpoint.sidecar import FILE, read_sidecar
from efficli.errors import CheckpointError, UnsupportedError


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Checkpoint:
    """The checkpoint that `model` means: a directory, `org/name[@revision]`, `reference` or `reference-twin`.

    Reads configuration, index and headers, in milliseconds, whatever the size of the weights. Nothing of the checkpoint
    is run: with `trust_remote_code` an `auto_map` is ignored instead of refused.
    """
    if allow_pickle:
        hint = "torch.load(..., weights_only=True) and safetensors.torch.save_file convert one"
        raise UnsupportedError("pickle checkpoints are not read, also with --allow-pickle", hint=hint)
    place = locate(model, revision)
    root = place.root
    notes: list[str] = []
    config = _config(place)
    for name in ("config.json", "tokenizer_config.json"):
        path = contained(root, name)
        if path.exists():
            found = config if name == "config.json" else strict_json.load(path, name)
            note = refuse.check_remote_code(found, name, trust_remote_code)
            notes += [note] if note else []
    files, index = find_weights(root)
    if index is None and contained(root, INDEX).exists():
        notes.append(f"{files[0]} is read, {INDEX} beside it is not")
    tensors, stamps = read_tensors(root, files, index)
    refuse.check_quantized(config, tensors.values())
    sidecar = read_sidecar(root)
    for name in ("config.json", INDEX, FILE):
        path = contained(root, name)
        if path.exists():
            stamps[path] = Stamp.of(path.stat())
    return Checkpoint(
        root=root,
        name=place.name,
        model=str(model),
        revision=place.revision,
        config=config,
        tensors=tensors,
        sidecar=sidecar,
        notes=tuple(notes),
        _stamps=stamps,
    )


def _config(place: Place) -> dict[str, Any]:
    path = contained(place.root, "config.json")
    if not path.exists():
        hint = "give the folder that holds config.json, the tokenizer and the weights"
        inner = sorted(path.parent.name for path in place.root.glob("*/config.json"))
        if inner:
            hint = f"did you mean {' or '.join(repr(str(place.root / name)) for name in inner[:3])}?"
        if (place.root / "SHA256SUMS").exists():
            hint = "this is an artifact; give the checkpoint that it was made from"
        raise CheckpointError("config.json not found", where=place.name, hint=hint)
    return strict_json.load(path, "config.json")
