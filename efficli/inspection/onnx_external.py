"""Data beside an ONNX model: nothing outside its folder, nothing that is also elsewhere, nothing short.

The rules of onnx (canonical containment first) and one more: a second hard link, which onnxruntime loads.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from efficli.checkpoint.files import contained
from efficli.errors import SecurityError
from efficli.inspection.onnx_reader import OnnxTensor
from efficli.inspection.report import Finding, printable

CHECK = "external data"
_TRUST = "no exporter writes this: take the model from a source that you trust"
_NUMBER = re.compile(r"-?\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Beside:
    """A file of external data that may be read."""

    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor whose data lie where they may: bytes [offset, offset + nbytes) of `path`."""

    tensor: OnnxTensor
    path: Path
    offset: int
    nbytes: int


def check_external(model: Path, tensors: Iterable[OnnxTensor]) -> tuple[list[Placed], list[Finding], list[Beside]]:
    """The tensors that can be read, findings (one for each thing that is wrong, not for each tensor), and the files."""
    files: dict[str, Beside | Finding] = {}
    wrong: dict[str, list[str]] = {}
    placed: list[Placed] = []
    for tensor in tensors:
        if tensor.external is None:
            continue
        location = tensor.external.location
        if location not in files:
            files[location] = _open(model, location)
        beside = files[location]
        if isinstance(beside, Finding):
            continue
        one = _place(tensor, beside)
        if isinstance(one, Placed):
            placed.append(one)
        else:
            wrong.setdefault(f"{_named(location)} {one}", []).append(tensor.name)
    findings = [beside for beside in files.values() if isinstance(beside, Finding)]
    for message, names in wrong.items():
        who = printable(names[0], 60) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        hint = "copy or make the model again, with the files beside it"
        findings.append(Finding(check=CHECK, message=f"{message} (tensor {who})", where=model.name, hint=hint))
    return placed, findings, [beside for beside in files.values() if isinstance(beside, Beside)]


def _named(location: str) -> str:
    return f"external data {printable(location, 60)!r}"


def _open(model: Path, location: str) -> Beside | Finding:
    """The file that a location means, or why it is not looked at."""

    def finding(message: str, hint: str, code: int = 1) -> Finding:
        return Finding(check=CHECK, message=f"{_named(location)} {message}", where=model.name, hint=hint, code=code)

    parts = location.split("/")
    if not location:
        return finding("has no location", "make the model again")
    if location.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", location) or "\0" in location:
        return finding("is not a place beside the model", _TRUST, 6)
    if ".." in parts or "\\" in location:
        return finding("leaves the folder of the model", _TRUST, 6)
    parts = [part for part in parts if part not in ("", ".")]
    folder = Path(model.parent)
    try:
        path = contained(folder, "/".join(parts))
    except SecurityError:
        return finding("is a link that leaves the folder of the model", _TRUST, 6)
    try:
        status = path.stat()
    except OSError:
        return finding("is missing", "fetch it too: it holds weights of the model")
    if not stat.S_ISREG(status.st_mode):
        return finding("is not a regular file", "put the file itself there")
    if status.st_nlink > 1:
        return finding(
            f"has {status.st_nlink} links: who changes the other changes the model", "cp it to a new file", 6
        )
    if path.is_relative_to(os.path.realpath(folder)) and path != Path(os.path.realpath(folder)).joinpath(*parts):
        return finding("is a link, which onnx and onnxruntime refuse", "put the file itself there")
    return Beside(path, status.st_size)


def _place(tensor: OnnxTensor, beside: Beside) -> Placed | str:
    """Where the data are, or what is wrong."""
    assert tensor.external is not None
    numbers = []
    for name, text in (("offset", tensor.external.offset), ("length", tensor.external.length)):
        if text is not None and not _NUMBER.fullmatch(text):
            return f"has the {name} {printable(text, 20)!r}"
        numbers.append(None if text is None else int(text))
    offset, needs = numbers[0] or 0, tensor.needs
    length = numbers[1] if numbers[1] is not None else needs
    if offset < 0 or (length is not None and length < 0):
        return f"has a negative offset or length ({offset}, {length})"
    if length is None:
        return f"has the type {tensor.type}, which has no fixed size"
    if needs is not None and length != needs:
        return f"has {length} bytes for a tensor of {needs}"
    past = offset + length - beside.nbytes
    if past > 0:
        return f"ends {past} byte{'s' * (past > 1)} before its tensors do"
    return Placed(tensor, beside.path, offset, length)
