"""Quality beside speed: what the certificate of an artifact says, or what is measured now; and the gates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from efficli.artifact import read_artifact
from efficli.artifact.manifest import hash_file
from efficli.bench.figures import Quality
from efficli.bench.quality import Certificate, certify_all
from efficli.bench.texts import evaluation_texts
from efficli.checkpoint import Checkpoint
from efficli.errors import EffiError, FitError, GateError
from efficli.ops.byte_size import binary_bytes
from efficli.pipeline.attempt import open_base
from efficli.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Limits that an artifact is held against; None is no limit."""

    max_kld: float | None = None
    min_top1: float | None = None
    max_bytes: int | None = None

    def check(self, path: Path, quality: Quality | None) -> None:
        """GateError for a quality that was not reached, or not measured; FitError for a file that is too large."""
        size = path.stat().st_size
        if self.max_bytes is not None and size > self.max_bytes:
            raise FitError(f"{binary_bytes(size)}, at most {binary_bytes(self.max_bytes)} wanted", where=path.name)
        if self.max_kld is not None:
            found = self._known(quality, quality.kld_mean if quality else None, "KL divergence", path)
            if not found <= self.max_kld:
                raise GateError(f"mean KL divergence {found:.6f}, at most {self.max_kld:g} wanted", where=path.name)
        if self.min_top1 is not None:
            value = quality.top1_agreement if quality else None
            found = self._known(quality, value, "top-1 agreement", path)
            if not found >= self.min_top1:
                raise GateError(f"top-1 agreement {found:.4f}, at least {self.min_top1:g} wanted", where=path.name)

    def _known(self, quality: Quality | None, value: float | None, what: str, path: Path) -> float:
        if value is None:
            embeds = quality is not None and quality.cosine_mean is not None
            hint = "an embedding model has a cosine instead" if embeds else "--base MODEL measures it"
            raise GateError(f"no {what} is known of it, and a gate asks for one", where=path.name, hint=hint)
        return value


def recorded_quality(path: Path, notes: list[str]) -> Quality | None:
    """What the manifest beside a file says of it; None where there is none, or the file is not the one it names.

    A note says if a certificate is there, and of another file: the file is hashed to know.
    """
    try:
        manifest = read_artifact(path.parent).manifest
        for entry in manifest.get("artifacts", ()):
            if entry.get("path") == path.name and entry.get("certificate"):
                if entry.get("sha256") != hash_file(path):
                    notes.append("the certificate beside it is of another file with its name: not used")
                    return None
                return _quality(Certificate.from_json(entry["certificate"]))
    except EffiError:  # no artifact, or one of another version: a file all the same
        return None
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that quality is measured against, and the text that both read."""

    name: str
    origin: Checkpoint | Path
    text: Path | None

    @classmethod
    def open(
        cls,
        name: str,
        text: str | os.PathLike[str] | None,
        stack: ExitStack,
        *,
        trust_remote_code: bool,
        progress: Progress,
    ) -> Self:
        """Find both before anything is measured; what is temporary goes with `stack`."""
        path = None if text is None else Path(text)
        evaluation_texts(path)
        return cls(name=name, origin=open_base(name, stack, None, trust_remote_code, progress), text=path)

    def measure(
        self, paths: Sequence[Path], *, threads: int | None, seed: int, stall_s: float | None, progress: Progress
    ) -> list[Quality | EffiError | None]:
        """The quality of files, or why it could not be measured; the base, the slower side, runs once for all."""
        try:
            found = certify_all(
                paths,
                self.origin,
                text=self.text,
                threads=threads,
                seed=seed,
                origin_name=self.name,
                stall_s=stall_s,
                progress=progress,
            )
        except EffiError as error:
            if len(paths) == 1:
                return [error]
            each = [
                self.measure([path], threads=threads, seed=seed, stall_s=stall_s, progress=progress) for path in paths
            ]
            return [quality for [quality] in each]
        return [_quality(certificate) for certificate in found]


def _quality(certificate: Certificate) -> Quality | None:
    if certificate.status != "measured":
        return None
    figures = certificate.total.figures
    return Quality(
        kld_mean=figures.get("kld_mean"),
        top1_agreement=figures.get("top1_agreement"),
        origin=certificate.origin,
        cosine_mean=figures.get("cosine_mean"),
    )
