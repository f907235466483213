"""The files of an export: importance matrix and GGUF files, written now or taken from the cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from efficli import __version__
from efficli.artifact import FileRecord
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.sidecar import IMATRIX, Allocation, allocation_imatrix
from efficli.errors import UsageError
from efficli.export.gguf.imatrix import compute_imatrix, read_imatrix, write_imatrix
from efficli.export.gguf.job import GgufJob, prepare
from efficli.export.gguf.types import TypeRequest
from efficli.export.gguf.writer import WrittenFile, WrittenTensor, write_files
from efficli.families import read_shape
from efficli.ops.ggml_types import MIXED, is_mixed
from efficli.ops.llama_model import available_threads
from efficli.ops.storage import write_file
from efficli.pipeline.calibration import calibration_texts, hashes
from efficli.pipeline.passes import Digests
from efficli.pipeline.plain_file import write_plain
from efficli.pipeline.steps import Steps
from efficli.recipe import Export, Recipe
from efficli.store import package_versions, source_hash

UNUSED = "the allocation of types is not used: another type was asked for"
WRITTEN = "written.json"
_COMPUTES = ("gguf", "llama-cpp-python", "numpy", "tokenizers")
_WRITERS = ("efficli.export.gguf.job", "efficli.export.gguf.writer")
"""Modules that make a file of a checkpoint."""


def prepare_export(ckpt: Checkpoint, recipe: Recipe, export: Export, *, weightless: bool = False) -> GgufJob:
    """What headers decide of one export.

    With `weightless`, `ckpt` is what passes would make: its importance matrix may not be there yet. A report says
    where an allocation of types is not used.
    """
    requests = _requests(ckpt, export, weightless)
    own = {"version": __version__, "source": ckpt.name, "recipe": decides(recipe, export)}
    job = prepare(ckpt, requests, own=own, pre_tokenizer=export.pre_tokenizer, strict=recipe.strict)
    if allocation_of(ckpt) is None:
        return job
    rows = [f"{file.type}: {UNUSED}" for file in job.files if not is_mixed(file.type)]
    return replace(job, report=(*job.report, *rows))


def with_default_types(recipe: Recipe, ckpt: Checkpoint) -> Recipe:
    """The recipe with MIXED in the exports that name no type, where `ckpt` has an allocation of types."""
    if allocation_of(ckpt) is None:
        return recipe
    exports = [
        one.model_copy(update={} if "type" in one.model_fields_set else {"type": (MIXED,)}) for one in recipe.exports
    ]
    return recipe.model_copy(update={"exports": tuple(exports)})


def allocation_of(ckpt: Checkpoint) -> Allocation | None:
    """The types that a pass allocated to the tensors of a checkpoint's file."""
    return None if ckpt.sidecar is None else ckpt.sidecar.allocation


def own_imatrix(ckpt: Checkpoint, export: Export) -> Path | None:
    """The importance matrix beside the weights, for an export as they are allocated that names no other one."""
    allocation = allocation_of(ckpt)
    if allocation is None or export.imatrix is not None or not any(map(is_mixed, export.type)):
        return None
    return allocation_imatrix(ckpt.root, allocation)


def decides(recipe: Recipe, export: Export) -> str:
    """SHA-256 of all in a recipe that decides a file's weights: passes and options, neither gates nor other exports.

    It is in the file's metadata, so that what does not decide the file does not change it either: of texts and
    matrices their content counts, and not where they are.
    """
    told: dict[str, Any] = {"export": export.model_dump(mode="json", exclude={"type", "imatrix"})}
    if recipe.passes:
        told["passes"] = [{"method": one.method, **one.config.model_dump(mode="json")} for one in recipe.passes]
        told["seed"] = recipe.seed
    if export.imatrix == "auto":
        told["calibration"] = recipe.calibration.model_dump(mode="json", exclude={"text"})
        told["texts"] = hashes(calibration_texts(recipe))
    elif export.imatrix is not None:
        told["imatrix"] = _sha256(Path(export.imatrix))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _requests(ckpt: Checkpoint, export: Export, weightless: bool) -> list[TypeRequest]:
    imatrix = None if export.imatrix in (None, "auto") else read_imatrix(Path(str(export.imatrix)))
    allocation = allocation_of(ckpt)
    own, follows = imatrix, export.imatrix == "auto"
    if weightless and allocation is not None and allocation.imatrix is not None and export.imatrix is None:
        follows = True
    elif (path := own_imatrix(ckpt, export)) is not None:
        own = read_imatrix(path)
    overrides = []
    for word in export.tensor_type:
        pattern, equals, kind = word.rpartition("=")
        if not (pattern and equals and kind):
            raise UsageError(f"tensor type {word!r}, expected REGEX=TYPE")
        overrides.append((pattern, kind))
    return [
        TypeRequest(
            type=kind,
            given=allocation.types if is_mixed(kind) and allocation is not None else None,
            overrides=tuple(overrides),
            output_tensor_type=export.output_tensor_type,
            token_embedding_type=export.token_embedding_type,
            pure=export.pure,
            imatrix=own if is_mixed(kind) else imatrix,
            imatrix_follows=follows if is_mixed(kind) else export.imatrix == "auto",
            allow_non_ternary=export.allow_non_ternary,
        )
        for kind in export.type
    ]


@dataclass(slots=True, kw_only=True)
class FileWriter:
    """Writes the files of a run's exports."""

    recipe: Recipe
    checkpoint: Checkpoint
    steps: Steps
    digests: Digests
    threads: int | None
    matrices: dict[str | None, Path] = field(default_factory=dict)
    """Importance matrices of this run, by the pre-tokenizer that they were made with."""

    def write(self, job: GgufJob, export: Export, folder: Path) -> list[WrittenFile]:
        """Write the export's files into `folder`, from one read of the checkpoint, or copy them from the cache."""
        imatrix = None
        if export.imatrix == "auto":
            word = export.pre_tokenizer
            if word not in self.matrices:
                self.matrices[word] = self._imatrix(word) / IMATRIX
            imatrix = self.matrices[word]
            job = job.with_imatrix(read_imatrix(imatrix))
        elif export.imatrix is not None:
            imatrix = Path(export.imatrix)
        else:
            imatrix = own_imatrix(self.checkpoint, export)

        def ingredients() -> dict[str, Any]:
            return {
                "input": self.digests.of(self.checkpoint).value,
                "name": [self.checkpoint.name, self.checkpoint.revision],
                "export": export.model_dump(mode="json", exclude={"imatrix"}),
                "imatrix": None if imatrix is None else _sha256(imatrix),
                "decides": decides(self.recipe, export),
                "version": __version__,
                "source": source_hash(*_WRITERS),
                "versions": package_versions(*_COMPUTES),
            }

        def fill(target: Path) -> None:
            files = [(target / file.name, job.metadata, file.choice) for file in job.files]
            progress = self.steps.progress
            written = write_files(self.checkpoint, job.tensors, files, threads=self.threads, progress=progress)
            if target == folder:
                kept.extend(written)
                return
            write_file(target / WRITTEN, json.dumps([_to_json(file) for file in written]))
            hashed.extend(FileRecord(file.path.name, file.nbytes, file.sha256) for file in written)

        kept: list[WrittenFile] = []
        hashed: list[FileRecord] = []
        needs = sum(file.nbytes for file in job.files)
        what = ", ".join(file.type for file in job.files)
        found = self.steps.produce("write", what, ingredients, fill, needs_bytes=needs, hashed=hashed, here=folder)
        if found == folder:
            return kept
        copied = [_from_json(entry, folder) for entry in json.loads((found / WRITTEN).read_text(encoding="utf-8"))]
        for file in copied:
            self.steps.copy(found, file.path.name, file.path)
        return copied

    def exact_file(self, ckpt: Checkpoint) -> Path:
        """An F32 file of `ckpt` among the run's temporary files."""
        return self._plain_file(ckpt, "F32", self.recipe.exports[0].pre_tokenizer)

    def _plain_file(self, ckpt: Checkpoint, kind: str, pre_tokenizer: str | None) -> Path:
        """A file of one of the unquantized types."""
        return write_plain(
            ckpt,
            kind,
            Path(tempfile.mkdtemp(prefix="plain-", dir=self.steps.scratch)),
            pre_tokenizer=pre_tokenizer,
            threads=self.threads,
            progress=self.steps.progress,
        )

    def _imatrix(self, pre_tokenizer: str | None) -> Path:
        """The folder with the importance matrix of the checkpoint on the calibration texts."""
        options, threads = self.recipe.calibration, self.threads or available_threads()
        texts = calibration_texts(self.recipe)
        # the model runs from a file in its own precision
        dtypes = {tensor.dtype for tensor in self.checkpoint.tensors.values()}
        kind = dtypes.pop() if dtypes in ({"BF16"}, {"F16"}) else "F32"
        chunk = min(options.ctx_size, read_shape(self.checkpoint.config).max_positions)
        most = max(1, options.max_tokens // chunk)

        def ingredients() -> dict[str, Any]:
            return {
                "input": self.digests.of(self.checkpoint).value,
                "texts": hashes(texts),
                "runs_as": kind,
                "chunk": chunk,
                "chunks": most,
                "pre_tokenizer": pre_tokenizer,
                "source": source_hash("efficli.export.gguf.imatrix", "efficli.ops.collect", *_WRITERS),
                "versions": package_versions(*_COMPUTES),
                "threads": threads,
            }

        def fill(folder: Path) -> None:
            path = self._plain_file(self.checkpoint, kind, pre_tokenizer)
            sums = compute_imatrix(
                path,
                "\n".join(text for _, text in texts),
                chunk=chunk,
                max_chunks=most,
                threads=self.threads,
                progress=self.steps.progress,
            )
            path.unlink()
            name = ", ".join(name for name, _ in texts)
            write_imatrix(folder / IMATRIX, sums, dataset=name, chunk=chunk, chunks=most)

        return self.steps.produce("imatrix", ", ".join(name for name, _ in texts), ingredients, fill)


def _to_json(file: WrittenFile) -> dict[str, Any]:
    tensors = {name: asdict(tensor) for name, tensor in file.tensors.items()}
    sources = dict(file.sources)
    return {
        "name": file.path.name,
        "nbytes": file.nbytes,
        "sha256": file.sha256,
        "tensors": tensors,
        "sources": sources,
    }


def _from_json(entry: dict[str, Any], folder: Path) -> WrittenFile:
    tensors = {name: WrittenTensor(**tensor) for name, tensor in entry["tensors"].items()}
    return WrittenFile(folder / entry["name"], entry["nbytes"], entry["sha256"], tensors, entry["sources"])


def same_names(jobs: Sequence[GgufJob]) -> str | None:
    """The name that two exports of a recipe would both write, or None."""
    names = [file.name for job in jobs for file in job.files]
    return next((name for name in names if names.count(name) > 1), None)
