"""Where an artifact came from: its manifest, its lock file, and the report of the run, which is not hashed."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efficli import __version__
from efficli.bench.texts import evaluation_texts
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.digest import small_files
from efficli.checkpoint.fingerprint import fingerprint_of
from efficli.export.gguf.job import GgufJob
from efficli.export.gguf.verify import Verified
from efficli.export.gguf.writer import WrittenFile
from efficli.ops.llama_model import available_threads
from efficli.pipeline.calibration import calibration_texts
from efficli.pipeline.result import ExportResult
from efficli.recipe import Recipe

LOCK = "efficli.lock"
"""In an artifact: what else decided its bytes, beside the recipe."""

PACKAGES = ("gguf", "llama-cpp-python", "numpy", "sentencepiece", "tokenizers", "torch", "transformers")
"""Versions that are recorded, where they are installed."""


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def manifest(
    recipe: Recipe, result: ExportResult, job: GgufJob, ckpt: Checkpoint, written: Sequence[WrittenFile], base: str
) -> dict[str, Any]:
    """Everything that is a function of the inputs; `base` is the fingerprint of the recipe's model."""
    origin = ckpt.sidecar.origin if ckpt.sidecar else None
    if origin is not None and origin.fingerprint == base:
        origin = None  # the recipe's model itself, by the name that it has here
    return {
        "format": "gguf",
        "tool": {"name": "efficli", "version": __version__},
        "versions": versions(),
        "source": {"name": ckpt.name, "revision": ckpt.revision, "fingerprint": base},
        "origin": {
            "name": ckpt.name if origin is None else origin.model,
            "fingerprint": base if origin is None else origin.fingerprint,
        },
        "steps": [step.model_dump() for step in ckpt.sidecar.steps] if ckpt.sidecar else [],
        "recipe": recipe.to_json(),
        "architecture": job.shape.facts.gguf_arch,
        "num_weights": job.num_weights,
        "artifacts": [file.to_json(Path()) for file in result.files],
        "tensors": {
            w.path.name: {
                name: {"type": t.type, "nbytes": t.nbytes, "sha256": t.sha256} for name, t in w.tensors.items()
            }
            for w in written
        },
        "gates": [gate.to_json() for gate in result.gates if gate.gate != "min_decode"],
        "report": list(result.report),
    }


def fingerprint(ckpt: Checkpoint, written: Sequence[WrittenFile]) -> str:
    """The checkpoint's fingerprint, from the hashes that its reader made on the way."""
    sources = written[0].sources
    hashes = {
        name: (tensor.dtype, tensor.shape, sources.get(name) or ckpt.hash(name))
        for name, tensor in ckpt.tensors.items()
    }
    return fingerprint_of(ckpt.config, hashes)


def lock(recipe: Recipe, base: Checkpoint, base_fingerprint: str) -> dict[str, Any]:
    """What a second run must find the same to write the same bytes."""
    calibrates = any(export.imatrix == "auto" for export in recipe.exports)
    matrices = [export.imatrix for export in recipe.exports if export.imatrix not in (None, "auto")]
    texts = evaluation_texts(recipe.certificate.text) if recipe.certificate.enabled else []
    return {
        "version": 1,
        "model": {
            "name": base.name,
            "revision": base.revision,
            "fingerprint": base_fingerprint,
            "files": small_files(base),
        },
        "seed": recipe.seed,
        "packages": {"efficli": __version__, **versions()},
        "python": platform.python_version(),
        "calibration": {name: _sha256(text) for name, text in calibration_texts(recipe)} if calibrates else {},
        "evaluation": {text.name: text.sha256 for text in texts},
        "imatrix": {str(path): hashlib.sha256(Path(str(path)).read_bytes()).hexdigest() for path in matrices},
    }


def run_report(result: ExportResult, verified: Sequence[Verified], threads: int | None) -> dict[str, Any]:
    """What differs from run to run."""
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()},
        "threads": threads or available_threads(),
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
        "steps": [step.to_json() for step in result.steps],
        "bench": result.bench and result.bench.to_json(),
        "gates": [gate.to_json() for gate in result.gates if gate.gate == "min_decode"],
        "loaded": {f.name: v.to_json() for f, v in zip(result.files, verified, strict=True)},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def quality_words(figures: Mapping[str, float | None], kind: str) -> str:
    """The certificate in a few words."""
    if kind == "embedding":
        return f"cosine {figures['cosine_mean']:.4f} (smallest {figures['cosine_min']:.4f})"
    return f"KL divergence {figures['kld_mean']:.4g}, top-1 {figures['top1_agreement']:.1%}"
