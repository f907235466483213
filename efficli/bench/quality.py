"""The certificate: how far an artifact is from its origin, measured on the same tokens by the real runtimes.

Mean and 99th percentile KL divergence, top-1 agreement and perplexity of language models; cosines of embedding models.
How it is measured is in `measure.py`, what the figures are in `ops/divergence.py`. Both models run in a child process,
so that neither torch's memory nor a crash of llama.cpp is ours. Standard errors take the chunk as the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from efficli.bench.certificate_table import FIGURES, table
from efficli.bench.measure import POOLED, Request
from efficli.bench.texts import evaluation_texts
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.locate import EMBEDDED
from efficli.errors import CheckpointError, GateError, UsageError
from efficli.ops.child import run_child
from efficli.progress import Progress

SCHEMA_VERSION = 1

MAX_POSITIONS = 16384
"""Positions scored by default: below 8-16 k the mean of so skewed a quantity is not settled."""

Status = Literal["measured", "origin absent", "not measured"]


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one text, or of "all" texts together: `n` positions in `chunks` chunks."""

    text: str
    n: int
    chunks: int
    figures: Mapping[str, float | None]
    """Names as in FIGURES, each with its `_stderr`, which is None where one chunk gives none."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """From a flat object: text, n, chunks, and the figures beside them."""
        figures = {k: v for k, v in data.items() if k not in ("text", "n", "chunks")}
        return cls(data["text"], data["n"], data["chunks"], {k: _rounded(v) for k, v in figures.items()})

    def to_json(self) -> dict[str, Any]:
        """As one flat object."""
        return {"text": self.text, "n": self.n, "chunks": self.chunks, **self.figures}


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was measured, on what, and by which runtimes. A function of the inputs: no date, no timing, no path."""

    artifact: str
    """Name of the file."""
    origin: str | None
    """What the base is called."""
    status: Status = "measured"
    kind: Literal["divergence", "embedding", "none"] = "none"
    base_runtime: str | None = None
    """What ran the base: PyTorch, or llama.cpp on an F32 file where PyTorch is not installed."""
    runtime: str | None = None
    ctx: int | None = None
    seed: int | None = None
    texts: tuple[Mapping[str, Any], ...] = ()
    """name, bytes, sha256 and tokens of each text."""
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> Row:
        """The figures over all texts; UsageError where nothing was measured."""
        if not self.rows:
            raise UsageError(f"there is no certificate: {self.status}", where=self.artifact)
        return next((row for row in self.rows if row.text == POOLED), self.rows[-1])

    def __getitem__(self, name: str) -> float:
        """A figure over all texts, by its name in FIGURES."""
        value = self.total.figures.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `efficli.json`."""
        data = asdict(self)
        data["texts"], data["notes"] = [dict(text) for text in self.texts], list(self.notes)
        data["rows"] = [row.to_json() for row in self.rows]
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The certificate that `to_json` wrote; CheckpointError if it is not one."""
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise CheckpointError(f"certificate version {version!r}, expected {SCHEMA_VERSION}")
        try:
            rows = tuple(Row.from_json(row) for row in fields.pop("rows"))
            return cls(**fields | {"texts": tuple(fields["texts"]), "notes": tuple(fields["notes"]), "rows": rows})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"not a certificate: {error}") from error

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows as text: one line a figure, one column a text, `value ± standard error`."""
        return table([(row.text, row.n, row.figures) for row in self.rows])

    def check(
        self, max_kld: float | None = None, min_top1: float | None = None, min_cosine: float | None = None
    ) -> None:
        """Hold the figures over all texts against gates; GateError (exit 3) names figure, error and gate."""
        gates = (("kld_mean", "--max-kld", max_kld), ("top1_agreement", "--min-top1", min_top1))
        for name, flag, limit in (*gates, ("cosine_mean", "--min-cosine", min_cosine)):
            if limit is None:
                continue
            if self.status != "measured":
                raise GateError(f"{flag} {limit:g} cannot be met: {self.status}", where=self.artifact)
            value, error = self.total.figures.get(name), self.total.figures.get(f"{name}_stderr")
            if value is None:
                raise UsageError(f"{flag} does not apply to a certificate of kind {self.kind!r}", where=self.artifact)
            below = flag.startswith("--min")
            if value < limit if below else value > limit:
                measured = f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
                found = f"{FIGURES[name]} is {measured} (n = {self.total.n})"
                wish = f"expected {'at least' if below else 'at most'} {limit:g} ({flag})"
                hint = "nothing was written; take a type with more bits, --imatrix auto, or another limit"
                raise GateError(f"{found}, {wish}", where=self.artifact, hint=hint)


def certify(
    artifact_file: Path,
    origin: Checkpoint | Path | None,
    *,
    text: str | Path | None = None,
    ctx: int = 512,
    max_positions: int | None = MAX_POSITIONS,
    seed: int = 0,
    threads: int | None = None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    origin_name: str | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Measure a GGUF file against its origin, in a child process.

    `origin`: a checkpoint (run by PyTorch in float32), an F32 GGUF file of it (run by llama.cpp: where PyTorch is not
    installed), or None where the origin is not at hand: the certificate then says so. `text`: a UTF-8 file instead of
    the committed evaluation slices. `ctx` tokens a chunk, at most what the model was trained on. `max_positions` bounds
    the work (chunks are sampled under `seed`); None takes all. `tokenize` is the source tokenizer, without special
    tokens; without it the file's own is used. An embedding model is compared line by line, by cosine.
    """
    return certify_all(
        [artifact_file],
        origin,
        text=text,
        ctx=ctx,
        max_positions=max_positions,
        seed=seed,
        threads=threads,
        tokenize=tokenize,
        origin_name=origin_name,
        progress=progress,
    )[0]


def certify_all(
    artifact_files: Sequence[Path],
    origin: Checkpoint | Path | None,
    *,
    text: str | Path | None = None,
    ctx: int = 512,
    max_positions: int | None = MAX_POSITIONS,
    seed: int = 0,
    threads: int | None = None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    origin_name: str | None = None,
    stall_s: float | None = None,
    progress: Progress | None = None,
) -> list[Certificate]:
    """As `certify`, for several files of one model: the origin, the slower side, runs once for all of them.

    `stall_s`: FitError after so many seconds without progress.
    """
    if ctx < 8:
        raise UsageError(f"a context of {ctx} tokens, expected 8 or more")
    if origin is None:
        return [Certificate(artifact=file.name, origin=None, status="origin absent") for file in artifact_files]
    texts = evaluation_texts(text)
    request = Request(
        artifacts=[str(file.absolute()) for file in artifact_files],
        base=str(origin.root if isinstance(origin, Checkpoint) else origin.absolute()),
        base_is_gguf=not isinstance(origin, Checkpoint),
        texts=[(t.name, t.content) for t in texts],
        ids=[list(tokenize(t.content)) for t in texts] if tokenize else None,
        ctx=ctx,
        max_positions=max_positions,
        seed=seed,
        threads=threads,
    )
    what = f"measuring {', '.join(file.name for file in artifact_files)}"
    found = run_child("efficli.bench.measure:measure", request.to_json(), what=what, stall_s=stall_s, progress=progress)
    name = origin_name or origin.name
    return [_certificate(file.name, name, seed, one) for file, one in zip(artifact_files, found, strict=True)]


def _certificate(artifact: str, origin: str, seed: int, found: Mapping[str, Any]) -> Certificate:
    """The certificate from what `measure` gave."""
    fields = dict(found)
    rows = tuple(Row.from_json(row) for row in fields.pop("rows"))
    texts, notes = tuple(fields.pop("texts")), tuple(fields.pop("notes"))
    return Certificate(artifact=artifact, origin=origin, seed=seed, rows=rows, texts=texts, notes=notes, **fields)


def find_origin(
    checkpoint: Checkpoint, progress: Progress | None = None, *, trust_remote_code: bool = False
) -> Checkpoint | str:
    """The checkpoint that certificates of this one compare with, or the reason why it is not at hand.

    Itself, unless its sidecar names an origin. That one counts only as a local directory (or "reference") whose
    fingerprint is the one recorded: nothing is downloaded here.
    """
    origin = checkpoint.sidecar.origin if checkpoint.sidecar else None
    if origin is None:
        return checkpoint
    if origin.model is None:
        return "the checkpoint does not say where it is"
    if origin.model not in EMBEDDED and not Path(origin.model).is_dir():
        return f"{origin.model} is not here, and is not downloaded for this"
    found = open_checkpoint(origin.model, trust_remote_code=trust_remote_code)
    return found if found.fingerprint(progress) == origin.fingerprint else f"{origin.model} has changed since"


def _rounded(value: float | None) -> float | None:
    """Eight significant digits: a difference in the last bit of a sum is not a difference of bytes."""
    return value if value is None or not math.isfinite(value) else float(f"{value:.8g}")
