"""The part of an export that reads weights: write, load, measure, hold against the gates, publish."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efficli import __version__
from efficli.artifact import FileRecord, draft
from efficli.bench.origin import torch_is_installed
from efficli.bench.quality import Certificate, certify_all
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.fingerprint import fingerprint_of
from efficli.data import committed
from efficli.export.card import Row, carry_along, write_card
from efficli.export.gguf.imatrix import Imatrix, compute_imatrix, means
from efficli.export.gguf.job import GgufJob, compare_tokens, prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.verify import Verified, verify_file
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.export.gguf.writer import WrittenFile, write_files
from efficli.ops.storage import remove_tree, write_file
from efficli.pipeline.result import ExportResult
from efficli.progress import Progress
from efficli.recipe import Recipe

PACKAGES = ("gguf", "llama-cpp-python", "numpy", "tokenizers", "torch", "transformers")
"""Versions that the manifest names, where they are installed."""

CALIBRATION = ("calibration-code", "calibration-prose")
IMATRIX_CHUNK, IMATRIX_CHUNKS = 512, 256
"""Tokens of a chunk, and chunks at most, of the text that `--imatrix auto` runs the model over."""

OVERHEAD_BYTES = 1 << 20
"""Room for manifest, card and sums when free space is checked."""


class Clock:
    """Seconds of each part of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        began = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began


@dataclass(slots=True)
class ExportRun:
    """The part of an export that reads weights."""

    recipe: Recipe
    job: GgufJob
    origin: Checkpoint | None
    threads: int | None
    progress: Progress
    clock: Clock

    @property
    def _runs_origin_by_llama(self) -> bool:
        """Whether the base of the certificate must be an F32 file, as PyTorch is not installed."""
        return self.recipe.certificate.enabled and self.origin is not None and not torch_is_installed()

    def write(self, result: ExportResult, force: bool) -> ExportResult:
        """Write, try, measure, hold against the gates, publish."""
        needs = sum(file.nbytes for file in self.job.files) + OVERHEAD_BYTES
        scratch = 4 * self.job.num_weights * (self._runs_origin_by_llama or self.recipe.exports[0].imatrix == "auto")
        inputs = [self.job.checkpoint.root, *([self.origin.root] if self.origin else [])]
        with draft(result.output, inputs=inputs, needs_bytes=needs + scratch, force=force) as drafted:
            work = Path(tempfile.mkdtemp(prefix="work-", dir=drafted.path))  # on an error the draft removes it
            written, base = self._write_files(drafted.path, work)
            verified, rows = self._load(written)
            certificates = self._certify(written, base)
            report = (*result.report, *rows)
            files = tuple(
                replace(file, sha256=w.sha256, sample=v.text, certificate=c)
                for file, w, v, c in zip(result.files, written, verified, certificates, strict=True)
            )
            result = replace(result, files=files, report=report)
            remove_tree(work)
            self._describe(drafted.path, result)
            with self.clock("publish"):
                hashed = [FileRecord(w.path.name, w.nbytes, w.sha256) for w in written]
                drafted.commit(self._manifest(result, written), self._run_report(result, verified), hashed=hashed)
        return replace(result, seconds=dict(self.clock.seconds))

    def _write_files(self, folder: Path, work: Path) -> tuple[list[WrittenFile], Path | None]:
        """Write the files; and, where the certificate needs it, an F32 file of the origin, from the same read."""
        job = self.job
        if self.recipe.exports[0].imatrix == "auto":
            with self.clock("imatrix"):
                job = job.with_imatrix(self._compute_imatrix(work))
        files = [(folder / file.name, job.metadata, file.choice) for file in job.files]
        base = None
        if self._runs_origin_by_llama and self.origin is not None:
            base = work / "origin-f32.gguf"
            other = self.origin.root != job.checkpoint.root
            whole = self._prepare(self.origin, "F32")
            target = (base, whole.metadata, whole.files[0].choice)
            if other:
                write_files(
                    self.origin, whole.tensors, [target], threads=self.threads, hashes=False, progress=self.progress
                )
            else:
                files.append(target)
        with self.clock("write"):
            written = write_files(job.checkpoint, job.tensors, files, threads=self.threads, progress=self.progress)
        return written[: len(job.files)], base

    def _compute_imatrix(self, work: Path) -> Imatrix:
        """The importance matrix on the calibration slices; the model runs from a file in its own precision."""
        ckpt = self.job.checkpoint
        dtypes = {tensor.dtype for tensor in ckpt.tensors.values()}
        kind = dtypes.pop() if dtypes in ({"BF16"}, {"F16"}) else "F32"
        exact = self._prepare(ckpt, kind)
        path = work / exact.files[0].name
        target = (path, exact.metadata, exact.files[0].choice)
        write_files(ckpt, exact.tensors, [target], threads=self.threads, hashes=False, progress=self.progress)
        sums = compute_imatrix(
            path,
            "\n".join(committed(name) for name in CALIBRATION),
            chunk=min(IMATRIX_CHUNK, self.job.shape.max_positions),
            max_chunks=IMATRIX_CHUNKS,
            threads=self.threads,
            progress=self.progress,
        )
        path.unlink()
        return means(sums)

    def _prepare(self, ckpt: Checkpoint, kind: str) -> GgufJob:
        """An export of `ckpt` in one of the unquantized types."""
        pre = self.recipe.exports[0].pre_tokenizer
        return prepare(ckpt, [TypeRequest(type=kind)], own={}, pre_tokenizer=pre)

    def _load(self, written: Sequence[WrittenFile]) -> tuple[list[Verified], list[str]]:
        """Load each file with its runtime and let it write; compare token ids once: the files share one vocabulary."""
        with self.clock("load"):
            verified = []
            for file in written:
                self.progress.start(f"loading {file.path.name}", 0)
                verified.append(verify_file(file.path, threads=self.threads, progress=self.progress))
            self.progress.start("comparing token ids", 0)
            rows = compare_tokens(written[0].path, self.job.checkpoint, self.progress)
            self.progress.finish()
        for row in rows:
            self.progress.note(row)
        return verified, rows

    def _certify(self, written: Sequence[WrittenFile], base: Path | None) -> list[Certificate | None]:
        """Measure every file, then hold all of them against the gates."""
        options, gates = self.recipe.certificate, self.recipe.gates
        if not options.enabled:
            return [None] * len(written)
        with self.clock("certificate"):
            self.progress.start("loading the origin", 0)
            ids = SourceTokenizer(self.job.checkpoint)
            certificates = certify_all(
                [w.path for w in written],
                base or self.origin,
                text=options.text,
                ctx=options.ctx_size,
                seed=self.recipe.seed,
                threads=self.threads,
                tokenize=lambda text: ids.ids(text, add_special=False, parse_special=False),
                origin_name=None if self.origin is None else self.origin.name,
                progress=self.progress,
            )
            self.progress.finish()
        for certificate in certificates:
            certificate.check(gates.max_kld, gates.min_top1)
        return list(certificates)

    def _describe(self, folder: Path, result: ExportResult) -> None:
        """Recipe, licence, model card and card."""
        write_file(folder / "recipe.yaml", self.recipe.to_yaml())
        ckpt = self.job.checkpoint
        carry_along(ckpt, folder)
        rows = [
            Row(f.name, f.type, f"{f.nbytes / 1e6:.1f} MB", f"{f.bits_per_weight:.2f}", _quality(f.certificate))
            for f in result.files
        ]
        told = self.job.metadata.get("general.license")
        write_card(folder, ckpt, rows, result.report, embeds=self.job.embeds, license_id=told.value if told else None)

    def _manifest(self, result: ExportResult, written: Sequence[WrittenFile]) -> dict[str, Any]:
        """Everything that is a function of the inputs."""
        ckpt, source = self.job.checkpoint, written[0].sources
        hashes = {
            name: (tensor.dtype, tensor.shape, source.get(name) or ckpt.hash(name))
            for name, tensor in ckpt.tensors.items()
        }
        fingerprint = fingerprint_of(ckpt.config, hashes)
        origin = ckpt.sidecar.origin if ckpt.sidecar else None
        return {
            "format": "gguf",
            "tool": {"name": "efficli", "version": __version__},
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
            "source": {"name": ckpt.name, "revision": ckpt.revision, "fingerprint": fingerprint},
            "origin": {
                "name": origin.model if origin else ckpt.name,
                "fingerprint": origin.fingerprint if origin else fingerprint,
            },
            "steps": [step.model_dump() for step in ckpt.sidecar.steps] if ckpt.sidecar else [],
            "recipe": self.recipe.to_json(),
            "architecture": self.job.shape.facts.gguf_arch,
            "num_weights": self.job.num_weights,
            "artifacts": [file.to_json(Path()) for file in result.files],
            "tensors": {
                w.path.name: {
                    name: {"type": t.type, "nbytes": t.nbytes, "sha256": t.sha256} for name, t in w.tensors.items()
                }
                for w in written
            },
            "report": list(result.report),
        }

    def _run_report(self, result: ExportResult, verified: Sequence[Verified]) -> dict[str, Any]:
        """What differs from run to run."""
        return {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()},
            "threads": self.threads,
            "seconds": {name: round(value, 3) for name, value in self.clock.seconds.items()},
            "loaded": {f.name: v.to_json() for f, v in zip(result.files, verified, strict=True)},
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _quality(certificate: Certificate | None) -> str:
    """The certificate in a few words."""
    if certificate is None:
        return "not measured"
    if certificate.status != "measured":
        return certificate.status
    figures = certificate.total.figures
    if certificate.kind == "embedding":
        return f"cosine {figures['cosine_mean']:.4f} (smallest {figures['cosine_min']:.4f})"
    return f"KL divergence {figures['kld_mean']:.4g}, top-1 {figures['top1_agreement']:.1%}"
