"""Certificates of a run's files: those that are in the cache, and one measurement for all the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from efficli.bench.quality import MAX_POSITIONS, Certificate, certify_all
from efficli.bench.texts import evaluation_texts
from efficli.checkpoint import Checkpoint
from efficli.export.gguf.vocab_check import SourceTokenizer
from efficli.export.gguf.writer import WrittenFile
from efficli.network.loading import torch_is_installed
from efficli.ops.llama_model import available_threads
from efficli.ops.storage import write_file
from efficli.pipeline.passes import Digests
from efficli.pipeline.steps import Steps
from efficli.recipe import Recipe
from efficli.store import package_versions, source_hash

RESULT = "certificate.json"
_COMPUTES = ("gguf", "llama-cpp-python", "numpy", "sentencepiece", "tokenizers", "torch", "transformers")
_MODULES = ("efficli.bench.quality", "efficli.bench.measure", "efficli.bench.origin", "efficli.export.gguf.vocab_check")
_WRITERS = ("efficli.export.gguf.job", "efficli.export.gguf.writer")
"""Modules that make the file which stands for the origin where PyTorch is not installed."""


@dataclass(slots=True, kw_only=True)
class Certifier:
    """Measures files of one checkpoint against its origin."""

    recipe: Recipe
    checkpoint: Checkpoint
    origin: Checkpoint | None
    steps: Steps
    digests: Digests
    threads: int | None
    exact_file: Callable[[Checkpoint], Path]
    """Writes an F32 file of the origin: what runs it where PyTorch is not installed."""
    _texts: list[list[str]] | None = None
    """Name and SHA-256 of each text, once they were read."""

    def certify(self, written: Sequence[WrittenFile]) -> list[Certificate]:
        """The certificate of each file, in order; all that are missing are measured with the first of them."""
        missing = [file for file in written if not self.steps.has("certificate", partial(self._made_from, file))]
        measured: dict[str, Certificate] = {}

        def fill(file: WrittenFile, folder: Path) -> None:
            if file.path.name not in measured:
                files = missing if file in missing else [file]  # one that was damaged since then comes by itself
                measured.update(zip((one.path.name for one in files), self._measure(files), strict=True))
            write_file(folder / RESULT, json.dumps(measured[file.path.name].to_json()))

        found = []
        for file in written:
            name = file.path.name
            folder = self.steps.produce("certificate", name, partial(self._made_from, file), partial(fill, file))
            found.append(Certificate.from_json(json.loads((folder / RESULT).read_text(encoding="utf-8"))))
        return found

    def _measure(self, files: Sequence[WrittenFile]) -> list[Certificate]:
        """Measure files in one go: the origin, the slower side, runs once for all."""
        options, progress = self.recipe.certificate, self.steps.progress
        base: Checkpoint | Path | None = self.origin
        if self.origin is not None and not torch_is_installed():
            base = self.exact_file(self.origin)
        progress.start("loading the origin", 0)
        ids = SourceTokenizer(self.checkpoint)
        found = certify_all(
            [file.path for file in files],
            base,
            text=options.text,
            ctx=options.ctx_size,
            seed=self.recipe.seed,
            threads=self.threads,
            tokenize=lambda text: ids.ids(text, add_special=False, parse_special=False),
            origin_name=None if self.origin is None else self.origin.name,
            progress=progress,
        )
        progress.finish()
        return found

    def _made_from(self, file: WrittenFile) -> dict[str, Any]:
        if self._texts is None:
            self._texts = [[text.name, text.sha256] for text in evaluation_texts(self.recipe.certificate.text)]
        return {
            "file": file.path.name,
            "sha256": file.sha256,
            "origin": None if self.origin is None else [self.origin.name, self.digests.of(self.origin).value],
            "tokenizer": self.digests.of(self.checkpoint).value,
            "texts": self._texts,
            "ctx": self.recipe.certificate.ctx_size,
            "positions": MAX_POSITIONS,
            "source": _source(torch_is_installed()),
            "versions": package_versions(*_COMPUTES),
            "seed": self.recipe.seed,
            "threads": self.threads or available_threads(),
        }


@cache
def _source(with_torch: bool) -> str:
    return source_hash(*_MODULES, *(() if with_torch else _WRITERS))
