"""Open a checkpoint: find it, refuse what must be refused, read its headers. No weight is read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficli.checkpoint import refuse, strict_json
from efficli.checkpoint.files import Stamp, contained
from efficli.checkpoint.header import TensorRef
from efficli.checkpoint.locate import Place, locate
from efficli.checkpoint.reader import Checkpoint
from efficli.checkpoint.shards import INDEX, Absent, find_absent, find_weights, read_tensors
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
    config, notes = _configuration(place, trust_remote_code)
    ckpt = _open(place, str(model), config, notes)
    refuse.check_quantized(config, ckpt.tensors.values())
    return ckpt


def open_to_inspect(model: str | Path, *, revision: str | None = None) -> Checkpoint:
    """As `open_checkpoint`, for looking only: weights in another quantizer's codes, and code that the configuration
    names (none is run), are no reason to refuse it.
    """
    place = locate(model, revision)
    config, notes = _configuration(place, True)
    return _open(place, str(model), config, notes)


def open_without_weights(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Checkpoint, Absent | None]:
    """As `open_checkpoint`, also where weights are not here: then without tensors, and with what is known of them.

    Of a model of the hub only the small files are fetched; weights that are here are read to their headers. Whether
    they are codes of another quantizer is left to the caller (`refuse.check_quantized`).
    """
    place = locate(model, revision, weights=False)
    config, notes = _configuration(place, trust_remote_code)
    absent = find_absent(place.root)
    if absent is None:
        return _open(place, str(model), config, notes), None
    notes += [absent.note] if absent.note else []
    return _checkpoint(place, str(model), config, notes, {}, {}), absent


def _configuration(place: Place, trust_remote_code: bool) -> tuple[dict[str, Any], list[str]]:
    """config.json, and what is to be said of code that the checkpoint names."""
    notes: list[str] = []
    config = _config(place)
    for name in ("config.json", "tokenizer_config.json"):
        path = contained(place.root, name)
        if path.exists():
            found = config if name == "config.json" else strict_json.load(path, name)
            note = refuse.check_remote_code(found, name, trust_remote_code)
            notes += [note] if note else []
    return config, notes


def _open(place: Place, model: str, config: dict[str, Any], notes: list[str]) -> Checkpoint:
    """Read the headers."""
    files, index = find_weights(place.root)
    if index is None and contained(place.root, INDEX).exists():
        notes.append(f"{files[0]} is read, {INDEX} beside it is not")
    tensors, stamps = read_tensors(place.root, files, index)
    return _checkpoint(place, model, config, notes, tensors, stamps)


def _checkpoint(
    place: Place,
    model: str,
    config: dict[str, Any],
    notes: list[str],
    tensors: dict[str, TensorRef],
    stamps: dict[Path, Stamp],
) -> Checkpoint:
    sidecar = read_sidecar(place.root)
    for name in ("config.json", INDEX, FILE):
        path = contained(place.root, name)
        if path.exists():
            stamps[path] = Stamp.of(path.stat())
    return Checkpoint(
        root=place.root,
        name=place.name,
        model=model,
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
