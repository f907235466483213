"""The part of a run that reads weights: passes, files, a load of each, certificates, bench, gates, publishing.

    checkpoint -> passes -> imatrix -> write -> load and decode -> certificate -> bench -> gates -> commit

Until the commit nothing is at the output's name but what was there before.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from efficli.artifact import FileRecord, draft
from efficli.bench.quality import Certificate, find_origin
from efficli.bench.wording import count
from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.tensor_types import ALLOCATION, FRONTIER, TENSOR_TYPES, tensor_types_text
from efficli.errors import CheckpointError, EffiError, OutputError, UsageError
from efficli.export.card import Row, carry_along, write_card
from efficli.export.gguf.job import GgufJob, compare_tokens
from efficli.export.gguf.verify import Verified, verify_file
from efficli.export.gguf.writer import WrittenFile
from efficli.network.loading import torch_is_installed
from efficli.ops.ggml_types import is_mixed
from efficli.ops.storage import remove_tree, write_file
from efficli.pipeline import provenance
from efficli.pipeline.bench import bench
from efficli.pipeline.files import FileWriter, allocation_of, prepare_export, same_names
from efficli.pipeline.gates import Judgement, judge_quality, judge_sizes, judge_speed
from efficli.pipeline.passes import Digests, apply_passes
from efficli.pipeline.preflight import input_paths
from efficli.pipeline.quality import Certifier
from efficli.pipeline.result import ExportResult, planned
from efficli.pipeline.steps import Clock, Steps
from efficli.progress import Progress
from efficli.recipe import Recipe
from efficli.store import Store

OVERHEAD_BYTES = 1 << 20
"""Room for manifest, card and sums when free space is checked."""


@dataclass(slots=True, kw_only=True)
class RecipeRun:
    """One run of a recipe."""

    recipe: Recipe
    base: Checkpoint
    result: ExportResult
    """As the headers decide it."""
    jobs: list[GgufJob]
    """One an export; as long as passes have not run, as headers decide what they will make."""
    store: Store | None
    threads: int | None
    progress: Progress
    clock: Clock
    on_judged: Callable[[ExportResult], None] | None = None
    """Hears of every run that came as far as its gates, before the first one that is not met ends it."""
    written: list[WrittenFile] = field(default_factory=list)
    verified: list[Verified] = field(default_factory=list)

    def write(self, force: bool) -> ExportResult:
        """Do all of it; the result as published. Errors are those of `efficli.errors`, the output is then as it was."""
        self._judge(judge_sizes(self.recipe.gates, self.result.files))
        inputs = input_paths(self.recipe, self.base.root)
        with draft(self.result.output, inputs=inputs, needs_bytes=self._needs_bytes(), force=force) as drafted:
            scratch = Path(tempfile.mkdtemp(prefix="work-", dir=drafted.path))  # on an error the draft removes it
            steps = Steps(store=self.store, scratch=scratch, progress=self.progress, clock=self.clock)
            digests = Digests(self.progress)
            origin = self._origin(digests)
            ckpt = self._passed(steps, digests)
            self._write_files(ckpt, steps, digests, drafted.path)
            self._load(ckpt, steps)
            self._certify(ckpt, origin, steps, digests)
            self._measure(steps, drafted.path)
            self.result = replace(self.result, steps=tuple(steps.done))
            if self.on_judged is not None:
                self.on_judged(self.result)
            self._judge(())
            self._describe(drafted.path, ckpt)
            base = ckpt if not self.recipe.passes else self.base
            fingerprint = (
                provenance.fingerprint(ckpt, self.written) if base is ckpt else digests.of(self.base).fingerprint
            )
            told = provenance.lock(self.recipe, self.base, fingerprint)
            write_file(drafted.path / provenance.LOCK, json.dumps(told, indent=2, sort_keys=True) + "\n")
            remove_tree(scratch)
            if scratch.exists():
                raise OutputError(
                    f"cannot remove {scratch.name}, which is no part of the artifact", where=scratch.parent.name
                )
            with self.clock("publish"):
                hashed = [FileRecord(w.path.name, w.nbytes, w.sha256) for w in self.written]
                self.result = replace(self.result, seconds=dict(self.clock.seconds))
                about = provenance.manifest(self.recipe, self.result, self.jobs[0], ckpt, self.written, fingerprint)
                ran = provenance.run_report(self.result, self.verified, self.threads)
                drafted.commit(about, ran, hashed=hashed)
        return replace(self.result, seconds=dict(self.clock.seconds))

    def _needs_bytes(self) -> int:
        files = sum(file.nbytes for job in self.jobs for file in job.files)
        exact = self.recipe.certificate.enabled and not torch_is_installed()
        plain = exact or any(export.imatrix == "auto" for export in self.recipe.exports)
        passes = self.base.nbytes * len(self.recipe.passes) if self.store is None else 0
        weights = max(self.jobs[0].num_weights, sum(math.prod(t.shape) for t in self.base.tensors.values()))
        return files + 4 * weights * plain + passes + OVERHEAD_BYTES

    def _judge(self, more: Sequence[Judgement]) -> None:
        """Add judgements; the first gate that is not met is raised, its run told before."""
        self.result = replace(self.result, gates=(*self.result.gates, *more))
        unmet = [one.error for one in self.result.gates if one.error is not None]
        if unmet:
            if more and self.on_judged is not None:
                self.on_judged(self.result)
            raise unmet[0]

    def _passed(self, steps: Steps, digests: Digests) -> Checkpoint:
        """The checkpoint after the passes, and its exports as its own headers decide them."""
        if not self.recipe.passes:
            return self.base
        ckpt, rows = apply_passes(self.recipe, self.base, steps, digests, threads=self.threads)
        for row in rows:
            self.progress.note(row)
        self.jobs = [prepare_export(ckpt, self.recipe, export) for export in self.recipe.exports]
        files = tuple(planned(job, file) for job in self.jobs for file in job.files)
        report = dict.fromkeys([*rows, *(row for job in self.jobs for row in job.report)])
        self.result = replace(
            self.result, files=files, report=tuple(report), num_weights=self.jobs[0].num_weights, gates=()
        )
        self._judge(judge_sizes(self.recipe.gates, files))
        return ckpt

    def _write_files(self, ckpt: Checkpoint, steps: Steps, digests: Digests, folder: Path) -> None:
        writer = FileWriter(recipe=self.recipe, checkpoint=ckpt, steps=steps, digests=digests, threads=self.threads)
        for job, export in zip(self.jobs, self.recipe.exports, strict=True):
            self.written += writer.write(job, export, folder)

    def _load(self, ckpt: Checkpoint, steps: Steps) -> None:
        """Load each file with its runtime and let it write; compare token ids once for each vocabulary."""
        with steps.timed("load", count(len(self.written), "file")):
            for file in self.written:
                self.progress.start(f"loading {file.path.name}", 0)
                self.verified.append(verify_file(file.path, threads=self.threads, progress=self.progress))
            self.progress.start("comparing token ids", 0)
            found = [compare_tokens(file.path, ckpt, self.progress) for file in self._vocabularies()]
            self.progress.finish()
        rows = list(dict.fromkeys(row for told in found for row in told))
        for row in rows:
            self.progress.note(row)
        files = tuple(
            replace(file, sha256=w.sha256, sample=v.text)
            for file, w, v in zip(self.result.files, self.written, self.verified, strict=True)
        )
        self.result = replace(self.result, files=files, report=(*self.result.report, *rows))

    def _vocabularies(self) -> Iterator[WrittenFile]:
        """The first file of each vocabulary: exports differ in it by their pre-tokenizer alone."""
        seen, start = set(), 0
        for export in self.recipe.exports:
            if export.pre_tokenizer not in seen:
                seen.add(export.pre_tokenizer)
                yield self.written[start]
            start += len(export.type)

    def _certify(self, ckpt: Checkpoint, origin: Checkpoint | None, steps: Steps, digests: Digests) -> None:
        """Measure every file, then hold all of them against the gates."""
        if not self.recipe.certificate.enabled:
            return
        writer = FileWriter(recipe=self.recipe, checkpoint=ckpt, steps=steps, digests=digests, threads=self.threads)
        certifier = Certifier(
            recipe=self.recipe,
            checkpoint=ckpt,
            origin=origin,
            steps=steps,
            digests=digests,
            threads=self.threads,
            exact_file=writer.exact_file,
        )
        found = certifier.certify(self.written)
        files = tuple(replace(file, certificate=c) for file, c in zip(self.result.files, found, strict=True))
        gates = (*self.result.gates, *judge_quality(self.recipe.gates, files))
        self.result = replace(self.result, files=files, gates=gates)

    def _origin(self, digests: Digests) -> Checkpoint | None:
        """What certificates compare with: passes keep the origin of the model that they begin with.

        None where none is made, or where it is not at hand: an error under `strict`, and no gate of quality is met.
        """
        recipe = self.recipe
        if not recipe.certificate.enabled:
            return None
        if recipe.certificate.base is not None:
            return open_checkpoint(recipe.certificate.base, trust_remote_code=recipe.trust_remote_code)
        found = find_origin(self.base, self.progress, trust_remote_code=recipe.trust_remote_code)
        if isinstance(found, Checkpoint):
            if self.base.sidecar is not None and self.base.sidecar.origin is not None:
                digests.learn(found, self.base.sidecar.origin.fingerprint)
            return found
        if recipe.strict:
            raise CheckpointError(f"origin absent: {found}", where=self.base.name, hint=self._name_it)
        self.progress.note(f"origin absent: {found}; {self._name_it}")
        absent = [Certificate(artifact=file.name, origin=None, status="origin absent") for file in self.result.files]
        files = [replace(file, certificate=told) for file, told in zip(self.result.files, absent, strict=True)]
        self._judge(judge_quality(recipe.gates, files))
        return None

    @property
    def _name_it(self) -> str:
        """How to say where an origin is."""
        return "name it with --base MODEL" if self.result.command == "export" else "name it with certificate.base"

    def _measure(self, steps: Steps, folder: Path) -> None:
        """Speed of the files on this machine, where the recipe asks for it."""
        if self.recipe.bench is None or any(not one.met for one in self.result.gates):
            return
        options = self.recipe.bench
        with steps.timed("bench", ", ".join(file.name for file in self.result.files)):
            measured = bench(
                [folder / file.name for file in self.result.files],
                n_prompt=options.n_prompt,
                n_gen=options.n_gen,
                depth=options.depth,
                threads=options.threads,
                repetitions=options.repetitions,
                max_repetitions=options.max_repetitions,
                patience=options.patience,
                scenarios=options.scenario,
                starts=options.starts,
                targets=self.recipe.target,
                seed=self.recipe.seed,
                progress=self.progress,
            )
        for artifact, file in zip(measured.artifacts, self.result.files, strict=True):
            artifact.path = file.name  # not where it was written
            if artifact.model is not None:
                artifact.model = replace(artifact.model, path=file.name)
            if artifact.failure is not None:
                raise failure(artifact.failure.code, artifact.failure.message, file.name, artifact.failure.hint)
        gates = (*self.result.gates, *judge_speed(self.recipe.gates, self.result.files, measured))
        self.result = replace(self.result, bench=measured, gates=gates)

    def _describe(self, folder: Path, ckpt: Checkpoint) -> None:
        """Recipe, allocated types, licence, model card and card."""
        write_file(folder / "recipe.yaml", self.recipe.to_yaml())
        allocation = allocation_of(ckpt)
        if allocation is not None and any(is_mixed(file.type) for file in self.result.files):
            write_file(folder / TENSOR_TYPES, tensor_types_text(allocation.types))
            for name in (ALLOCATION, FRONTIER):
                made = ckpt.file(name)
                if made is not None:
                    write_file(folder / name, made.read_bytes())
        carry_along(ckpt, folder)
        job = self.jobs[0]
        rows = [
            Row(f.name, f.type, f"{f.nbytes / 1e6:.1f} MB", f"{f.bits_per_weight:.2f}", _quality(f.certificate))
            for f in self.result.files
        ]
        told = job.metadata.get("general.license")
        write_card(folder, ckpt, rows, self.result.report, embeds=job.embeds, license_id=told.value if told else None)


def check_names(jobs: Sequence[GgufJob]) -> None:
    """UsageError where two exports of a recipe would write the same file."""
    twice = same_names(jobs)
    if twice is not None:
        raise UsageError(f"two exports write {twice}", hint="one type belongs into one export only")


def failure(code: int, message: str, where: str, hint: str | None) -> EffiError:
    """The error that a measurement ended with, of its own kind."""
    kinds = {kind.exit_code: kind for kind in EffiError.__subclasses__() if kind is not CheckpointError}
    return kinds.get(code, EffiError)(message, where=where, hint=hint)


def _quality(certificate: Certificate | None) -> str:
    if certificate is None:
        return "not measured"
    if certificate.status != "measured":
        return certificate.status
    return provenance.quality_words(certificate.total.figures, certificate.kind)
