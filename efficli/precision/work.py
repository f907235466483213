"""The steps of choosing types by what they lose: statistics, error curves, measured losses, search; each is kept.

A second budget on the same model takes all but the search from what is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from efficli.checkpoint import Checkpoint
from efficli.errors import UsageError
from efficli.method import Context
from efficli.ops.byte_size import binary_bytes
from efficli.precision import calibrate as calibration
from efficli.precision.choice import RMSE, Choices, Decision, Limit, decide
from efficli.precision.curves import Curve, curves, nbytes, row_reader
from efficli.precision.encoder import Encoder, Rounding, Statistics
from efficli.precision.losses import Loss, losses
from efficli.precision.measure import Bench, measured, probed
from efficli.precision.search import Found, Task, search
from efficli.precision.view import FileView
from efficli.surgery import matrices

PRESETS = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M",
    "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
"""llama.cpp's mixtures that a choice is compared with."""
ALLOCATION = "allocation"
"""The candidate that the loss model chose."""
LARGEST_PRESETS = 3
"""That are measured, of those within the budget."""
KLD_TYPES = 4
"""Types of each tensor that are measured; the others lie between them."""
OPERATIONS = 4e13
"""That losses are measured with at most, two a weight and token: about 7 minutes of two cores."""
LEAST_POSITIONS, MOST_POSITIONS = 512, 2048
"""Tokens of the selection text that a divergence is measured on."""
MOST_TRIALS = 240
GRAM_BYTES = 8 << 30
"""Of mean(x xᵀ) of all inputs, on disk; a model with more does without."""


@dataclass(slots=True, kw_only=True)
class Workshop:
    """One checkpoint on its way to a choice of types."""

    ckpt: Checkpoint
    view: FileView
    context: Context
    choices: Choices
    rounding: Rounding
    imatrix: Path = field(default=Path(), init=False)
    """The file with the importance matrix."""
    statistics: Statistics = field(default_factory=lambda: Statistics({}), init=False)
    rows: list[str] = field(default_factory=list, init=False)
    """For the report."""
    found: Found | None = field(default=None, init=False)
    _identity: dict[str, Any] = field(default_factory=dict, init=False)

    def calibrate(self, given: Path | None) -> None:
        """Statistics of the calibration text; `given`: an importance matrix to take instead of the computed one."""
        grams = self._gram_bytes() <= GRAM_BYTES
        if self.rounding == "error-feedback" and not grams:
            raise UsageError(
                f"rounding: error-feedback needs {binary_bytes(self._gram_bytes())} of statistics for this model, at "
                f"most {binary_bytes(GRAM_BYTES)} are kept",
                hint="rounding: nearest",
            )
        texts = self.context.need_calibration()
        told = {"calibration": texts.sha256, "grams": grams}

        def fill(folder: Path) -> None:
            calibration.calibrate(
                self.ckpt.root,
                texts,
                folder,
                grams=grams,
                threads=self.context.num_threads,
                progress=self.context.progress,
            )
            sums = calibration.read_sums(folder, self.view.tensors)
            chunk = len(texts.chunks[0])
            self.view.write_imatrix(folder / "imatrix.gguf", sums, chunks=len(texts.chunks), chunk=chunk)

        made = self.context.need_keep()("calibrate", texts.name, "efficli.precision.calibrate", told, fill)
        self.rows += calibration.unseen(calibration.read_sums(made, self.view.tensors))
        self.imatrix = given or made / "imatrix.gguf"
        self._identity = told | {"imatrix": _hash(self.imatrix)}
        squares = self.view.read_imatrix(self.imatrix)
        self.statistics = Statistics(squares, calibration.gram_files(made, self.view.tensors))

    def copy_imatrix(self, path: Path) -> None:
        """Put the importance matrix there."""
        shutil.copyfile(self.imatrix, path)

    def loss_model(self, wanted: str) -> Loss:
        """The loss model to take: `wanted`, or for "auto" the best one that takes minutes."""
        if wanted != "auto":
            if wanted == "hess" and not self.statistics.grams:
                raise UsageError("loss: hess needs statistics that are too large for this model", hint="loss: mse")
            return wanted  # type: ignore[return-value]
        if self._measuring(KLD_TYPES, MOST_POSITIONS) <= OPERATIONS:
            return "kld"
        if self._measuring(1, LEAST_POSITIONS) <= OPERATIONS:
            return "higgs"
        return "hess" if self.statistics.grams else "mse"

    def curves(self, model: Loss) -> dict[str, Curve]:
        """The error curves of all tensors, with what `model` needs measured."""
        told = self._identity | {"model": model, "rounding": self.rounding, "kinds": self.choices.kinds}

        def fill(folder: Path) -> None:
            found = self._made(model)
            (folder / "curves.json").write_text(json.dumps({name: curve.to_json() for name, curve in found.items()}))

        made = self.context.need_keep()("curves", model, "efficli.precision.work", told, fill)
        kept: dict[str, Any] = json.loads((made / "curves.json").read_text())
        return {name: Curve.from_json(curve) for name, curve in kept.items()}

    def _made(self, model: Loss) -> dict[str, Curve]:
        encoder = Encoder(self.statistics, rounding=self.rounding, threads=self.context.num_threads)
        read = row_reader(self.ckpt, matrices(self.ckpt))
        found = curves(self.view.tensors, self.choices.kinds, read, encoder, self.context.progress)
        if model == "higgs":
            return probed(self.bench(1), found, self.context.progress)
        if model == "kld":
            kinds = {name: _spread(curve) for name, curve in found.items()}
            return measured(self.bench(KLD_TYPES), found, kinds, self.context.progress)
        return found

    def losses(self, found: Mapping[str, Curve], model: Loss) -> dict[str, dict[str, float]]:
        """The predicted loss of each type of each tensor; tensors that the network does not reach lose what is typical
        for their size."""
        told = {}
        unreached = []
        for name, curve in found.items():
            try:
                told[name] = losses(curve, model)
            except ValueError:
                unreached.append(name)
        scale = _per_error(found, told) if unreached else 0.0
        for name in unreached:
            told[name] = {kind: scale * point.error for kind, point in found[name].points.items()}
            self.rows.append(f"{name}: its loss could not be measured, and is reckoned from its error")
        return {name: told[name] for name in found}

    def refine(
        self,
        decision: Decision,
        found: Mapping[str, Curve],
        predicted: Mapping[str, Mapping[str, float]],
        limit: Limit,
        tied: Mapping[str, Sequence[str]],
        trials: int | None,
    ) -> Decision:
        """The best of the decision, the presets and what swaps find, measured on the selection text."""
        if trials == 0:
            return decision
        task = Task(
            candidates={ALLOCATION: dict(decision.types)} | self._others(decision, found, limit, tied),
            nbytes=self.choices.costs,
            losses=predicted,
            budget=decision.tensor_budget,
            trials=self._trials() if trials is None else trials,
            groups=tied,
        )
        self.found = search(self.bench(2), task, self.context.progress)
        types = self.found.types
        if self.view.nbytes(types) + self.choices.copied(types) > limit(types):
            row = "the search ends above the limit, which depends on the types, and is not taken"
            return replace(decision, report=(*decision.report, row))
        return replace(
            decision,
            types=types,
            losses={name: predicted[name][kind] for name, kind in types.items()},
            nbytes=self.view.nbytes(types),
            limit=limit(types) - self.choices.copied(types),
            report=(*decision.report, _told(self.found)),
        )

    def presets(self) -> dict[str, dict[str, str]]:
        """llama.cpp's mixtures, as far as all their types are allowed."""
        found = self.view.presets(PRESETS)
        return {
            name: dict(types)
            for name, types in found.items()
            if all(kind in self.choices.nbytes[tensor] for tensor, kind in types.items())
        }

    def _others(
        self, decision: Decision, found: Mapping[str, Curve], limit: Limit, tied: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, str]]:
        """Candidates beside the decision: the largest presets within the budget, and what the errors alone choose."""
        presets = {} if tied else self.view.presets(PRESETS)
        allowed = {name: types for name in presets if (types := self._allowed(presets[name]))}
        sizes = {name: self.view.nbytes(types) for name, types in allowed.items()}
        fitting = [n for n, types in allowed.items() if sizes[n] + self.choices.copied(types) <= limit(types)]
        largest = sorted(fitting, key=lambda name: (-sizes[name], name))[:LARGEST_PRESETS]
        others = {name: allowed[name] for name in largest}
        if decision.model != "hess" and self.statistics.grams:
            told = {name: losses(curve, "hess") for name, curve in found.items()}
            others["hess"] = decide(self.view, self.choices, limit, told, "hess", tied).types
        return {name: types for name, types in others.items() if types and types != decision.types}

    def _allowed(self, types: Mapping[str, str]) -> dict[str, str]:
        """A preset, each of whose types that is no choice is replaced by the best one of no more bytes; or nothing."""
        tensors = {tensor.name: tensor for tensor in self.view.tensors}
        new = {}
        for name, kind in types.items():
            room = nbytes(tensors[name], kind)
            within = [other for other, size in self.choices.nbytes[name].items() if size <= room]
            if not within:
                return {}
            new[name] = kind if kind in within else min(within, key=lambda k: RMSE[k])
        return new

    def bench(self, times: int = 2) -> Bench:
        """What losses are measured with; on fewer positions where `times` measurements a tensor are dear."""
        texts = self.context.need_calibration()
        chunk = len(texts.selection[0])
        most = OPERATIONS / max(1.0, self._measuring(times, 1))
        positions = min(MOST_POSITIONS, max(LEAST_POSITIONS, most))
        count = max(1, math.ceil(positions / chunk))
        return Bench(
            root=self.ckpt.root,
            tensors=self.view.tensors,
            statistics=self.statistics,
            rounding=self.rounding,
            chunks=texts.selection[:count],
            threads=self.context.num_threads,
            seed=self.context.seed,
        )

    def _measuring(self, times: int, positions: int) -> float:
        """Operations of `times` measurements of every tensor: half of the layers are computed on average."""
        return 0.5 * 2 * self.view.num_weights * positions * times * len(self.view.tensors)

    def _trials(self) -> int:
        """Measurements of the search that take minutes."""
        one = self._measuring(1, MOST_POSITIONS) / len(self.view.tensors)
        return int(min(MOST_TRIALS, OPERATIONS / one))

    def _gram_bytes(self) -> int:
        inputs = {(part.name, tensor.columns) for tensor in self.view.tensors for part in tensor.parts}
        return sum(4 * columns**2 for _, columns in inputs)


def _told(found: Found) -> str:
    """The search in one row."""
    others = {name: value for name, value in found.measured.items() if name != ALLOCATION}
    best = min(others, key=lambda name: (others[name], name), default=None)
    beside = f", of {best} {others[best]:.5f}" if best else ""
    return (
        f"KL divergence on {found.positions} positions of the selection text {found.divergence:.5f}; of the allocation "
        f"as computed {found.measured[ALLOCATION]:.5f}{beside}; {found.accepted} changes accepted "
        f"in {found.trials} trials"
    )


def _spread(curve: Curve) -> list[str]:
    """Types whose bytes lie evenly between the smallest and the largest, in logarithm."""
    kinds = [kind for kind, point in curve.points.items() if point.error > 0]
    kinds = [kind for kind in kinds if kind not in ("F16", "BF16")] or kinds
    sizes = np.log([curve.points[kind].nbytes for kind in kinds])
    wanted = np.linspace(sizes.min(), sizes.max(), KLD_TYPES)
    return list(dict.fromkeys(kinds[int(np.abs(sizes - at).argmin())] for at in wanted))


def _per_error(found: Mapping[str, Curve], told: Mapping[str, Mapping[str, float]]) -> float:
    """Median loss of a unit of error, over the tensors whose losses are known."""
    ratios = [
        told[name][kind] / point.error for name in told for kind, point in found[name].points.items() if point.error > 0
    ]
    return float(np.median(ratios)) if ratios else 1.0


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
