"""Inspect: what is at a path, each model in it by its own reader, and hashes for all that has some."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from efficli.artifact.manifest import MANIFEST
from efficli.checkpoint.files import open_regular, read_exactly
from efficli.checkpoint.locate import EMBEDDED
from efficli.checkpoint.opening import open_to_inspect
from efficli.checkpoint.shards import INDEX, SINGLE
from efficli.checkpoint.sidecar import IMATRIX
from efficli.errors import CheckpointError, EffiError, UnsupportedError
from efficli.inspection.checkpoint_folder import inspect_checkpoint
from efficli.inspection.gguf_file import Hashes, inspect_gguf
from efficli.inspection.hashes import Expected, check_files, read_expected
from efficli.inspection.onnx_file import inspect_onnx
from efficli.inspection.report import Check, Finding, Inspection, ModelReport
from efficli.progress import Progress, Silent

_HINT = "give a checkpoint's folder, an artifact, a .gguf or .onnx file, a hub id such as org/name, or 'reference'"


def inspect(
    path: str | os.PathLike[str], *, revision: str | None = None, scan: bool = True, progress: Progress | None = None
) -> Inspection:
    """Look at a checkpoint (folder, hub id, `reference`), an artifact, or GGUF and ONNX files; nothing of it is run.

    Without `scan` no weight is read: neither values nor hashes are judged. What a user should act on is in
    `all_findings`, and `exit_code` is 0, 1 or, where a hash or a limit of security is concerned, 6. What cannot be
    read at all is an error of `efficli.errors`; in a folder of several models it is a finding, and the others go on.
    """
    progress = progress or Silent()
    word = os.fspath(path)
    place = Path(word).expanduser()
    if not word or (word in EMBEDDED and not isinstance(path, Path)) or not os.path.lexists(place):
        return _checkpoint(word, revision, scan, progress)
    if place.is_dir():
        return _folder(place, revision, scan, progress)
    return _file(place, scan, progress)


def _checkpoint(word: str | Path, revision: str | None, scan: bool, progress: Progress) -> Inspection:
    """What is read as a checkpoint, or refused as none."""
    try:
        ckpt = open_to_inspect(word, revision=revision)
    except CheckpointError as error:
        if error.message.startswith("no such checkpoint") and "did you mean" not in (error.hint or ""):
            error.hint = _HINT
        raise
    report = inspect_checkpoint(ckpt, read_expected(ckpt.root), scan=scan, progress=progress)
    return Inspection(path=os.fspath(word), kind="checkpoint", models=[report])


def _file(path: Path, scan: bool, progress: Progress) -> Inspection:
    """One file, by what it begins with; its name decides where that tells nothing."""
    kind = _kind(path)
    expected = read_expected(path.parent)
    report = _model(path, kind, expected, scan, progress)
    own = [found for found in expected.findings if found.where and Path(found.where).name in (path.name, MANIFEST)]
    return Inspection(path=str(path), kind="onnx" if kind == "onnx" else "gguf", models=[report], findings=own)


def _kind(path: Path) -> str:
    with open_regular(path, path.name) as (descriptor, stamp):
        start = bytearray(min(4, stamp.size))
        read_exactly(descriptor, memoryview(start), 0)
    if path.suffix.lower() == ".onnx":
        return "onnx"
    if start == b"GGUF" or path.suffix.lower() == ".gguf":
        return "gguf"
    hint = f"give its folder: {path.parent}" if path.suffix == ".safetensors" else _HINT
    raise UnsupportedError("neither a GGUF nor an ONNX file", where=path.name, hint=hint)


def _model(path: Path, kind: str, expected: Expected, scan: bool, progress: Progress) -> ModelReport:
    if kind == "onnx":
        return inspect_onnx(path, expected, scan=scan, progress=progress)
    hashes = Hashes(
        file=expected.files.get(path.name),
        tensors=expected.tensors.get(path.name, {}),
        sources=tuple(expected.sources),
    )
    return inspect_gguf(path, scan=scan, hashes=hashes, progress=progress)


def _folder(root: Path, revision: str | None, scan: bool, progress: Progress) -> Inspection:
    """Every model of a folder, then its other files against their hashes."""
    has_weights = any(os.path.lexists(root / name) for name in (SINGLE, INDEX))
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in (".gguf", ".onnx"))
    files = [path for path in files if not (has_weights and path.name == IMATRIX)]  # which is no model
    if not files:
        return _checkpoint(root, revision, scan, progress)
    expected = read_expected(root)
    is_artifact = MANIFEST in expected.sources
    out = Inspection(path=str(root), kind="artifact" if is_artifact else "folder", findings=list(expected.findings))
    if has_weights:
        ckpt = open_to_inspect(root, revision=revision)
        out.models.append(inspect_checkpoint(ckpt, Expected(), scan=scan, progress=progress))
    judged = set() if scan else {path.name for path in files}
    for path in files:
        try:
            out.models.append(_model(path, path.suffix.lower()[1:], expected, scan, progress))
        except EffiError as error:
            out.findings.append(Finding.of(error, "file"))
        else:
            judged.add(path.name)
    if len(out.models) > 1:
        for model in out.models:  # of one model it goes without saying
            name = Path(model.path).name
            model.findings = [replace(found, where=found.where or name) for found in model.findings]
    if is_artifact and expected.manifest is not None:
        out.findings += [
            Finding(
                check="hashes",
                message=f"{MANIFEST} does not name it: nobody vouches for it",
                where=path.name,
                hint="take it out of the artifact, or export anew",
            )
            for path in files
            if path.name not in expected.files
        ]
    if expected.files:
        found = check_files(root, expected, judged, large=scan)
        out.findings += found
        others = len(expected.files.keys() - judged)
        said = f"{others} other files as in {' and '.join(expected.sources)}" if not found else f"{len(found)} findings"
        out.checks.append(Check(name="hashes", status="finding" if found else "ok", seen=said))
    return out
