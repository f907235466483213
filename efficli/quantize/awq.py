"""Scale columns so that 4 bits lose less; the norm or matrix before takes it back.

AWQ (Lin et al. 2023, arXiv:2306.00978). Columns that are given large inputs are multiplied by s_j > 1 before they are
quantized, so that they lose less, and what makes those inputs is divided by s_j: the network computes the same, and
so does every runtime. Folded are

    norm -> q, k, v;  norm -> gate, up, or router and experts;  v rows -> attention's output;  up rows -> down

For each of them the exponents of s_j = rms(x_j)^a / rms(W_:j)^b are those of the least error of the outputs on the
calibration text (`precision.scales`). Small models have few channels that stand out, and gain little from that: from
there every channel's scale is moved to where ggml's own rounding of all rows errs least (`precision.descent`). That
gain is of this type and this rounding; it is lost where codes are chosen by other means, such as error feedback.

Post-norm families and activations that are not linear leave less to fold. The pass quantizes nothing: what it writes
is exported after it. It is exact, and for that matrices are written as float32: scales fitted to a rounding do not
survive another one to 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator

from efficli.artifact.temporary import scratch_directory
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.writer import write_checkpoint
from efficli.errors import UsageError
from efficli.folding import Fold, find_folds, folded
from efficli.method import Context, MethodConfig, Outcome
from efficli.ops import ggml
from efficli.ops.ggml_types import tensor_type
from efficli.precision.scales import Found, Method, choose_scales
from efficli.strict_schema import Refused
from efficli.surgery import Matrix, matrices

KIND = "whole-model"
USES = ("calibration",)
_DTYPES = ("torch_dtype", "dtype")
"""Keys of config.json that say how weights are stored."""


class Config(MethodConfig):
    """What the scales are for."""

    type: str = "Q4_0"
    """ggml's type that the matrices will be written as: Q4_0, IQ4_NL, Q8_0, Q4_K, ..."""
    imatrix: bool = False
    """Whether they will be written with an importance matrix, which changes what is best."""

    search: Method = "channels"
    """grid: the exponents of AWQ alone; channels: from there each channel's own scale, which gains more and takes
    longer: about half an hour for half a billion weights on two cores."""

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return tensor_type(value)
        except UsageError as error:
            raise Refused(error.message, error.hint) from None


def run(ckpt: Checkpoint, folder: Path, config: Config, context: Context) -> Outcome:
    """Write the checkpoint with its scales into the empty `folder`.

    UsageError: the type fits no matrix. CheckpointError: weights are not finite, or of a dtype that is no number.
    UnsupportedError: no known family.
    """
    folds, rows = find_folds(ckpt)
    fitting, unfit = _fitting(folds, matrices(ckpt), config.type)
    found: dict[int, Found] = {}
    if not context.headers_only:
        with scratch_directory() as scratch:
            found = choose_scales(
                ckpt.root,
                fitting,
                context.need_calibration().chunks,
                scratch,
                kind=config.type,
                imatrix=config.imatrix,
                method=config.search,
                threads=context.num_threads,
                progress=context.progress,
            )
    tensors = folded(ckpt, [folds[i] for i in fitting], [found[i].scales for i in fitting] if found else [])
    written = write_checkpoint(
        ckpt,
        folder,
        tensors,
        config=_in_float32(ckpt.config),
        headers_only=context.headers_only,
        progress=context.progress,
    )
    report = (*_told(folds, found, config.type), *unfit, *rows, *written.notes)
    return Outcome(report=report, packed=written.packed)


def _fitting(folds: Sequence[Fold], found: Mapping[str, Matrix], kind: str) -> tuple[list[int], list[str]]:
    """Numbers of the folds whose columns fill the type's blocks, and a row for each kind of the others."""
    size = ggml.block_size(kind)
    fits = [fold.num_columns % size == 0 for fold in folds]
    if not any(fits):
        columns = folds[0].num_columns
        raise UsageError(f"type: no matrix can be {kind}: rows of {columns} do not fill its blocks of {size}")
    unfit = dict.fromkeys(
        f"{fold.kind}: left as it is, rows of {fold.num_columns} do not fill blocks of {size}"
        for fold, fit in zip(folds, fits, strict=True)
        if not fit
    )
    return [number for number, fit in enumerate(fits) if fit], list(unfit)


def _in_float32(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that says float32 wherever it says a type: whoever loads it as it says must not round it."""
    new = copy.deepcopy(dict(config))
    text = new.get("text_config")
    for part in (new, text) if isinstance(text, dict) else (new,):
        for key in _DTYPES:
            if key in part:
                part[key] = "float32"
    return new


def _told(folds: Sequence[Fold], found: Mapping[int, Found], kind: str) -> list[str]:
    """A row for each kind of fold: how much smaller the error is, and the exponents."""
    rows = []
    kinds = dict.fromkeys(folds[number].kind for number in found)
    for name in kinds:
        some = [one for number, one in found.items() if folds[number].kind == name and not one.why]
        missed = sum(folds[number].kind == name for number in found) - len(some)
        if some:
            ratio = float(np.exp(np.mean([np.log(one.after / one.before) if one.before > 0 else 0.0 for one in some])))
            changed = [one.input_exponent for one in some if one.after < one.before]
            exponents = f", input exponent {min(changed):g} to {max(changed):g}" if changed else ""
            rows.append(
                f"{name}: {len(changed)} of {len(some)} scaled{exponents}; error of the outputs as {kind} "
                f"{100 * (ratio - 1):+.1f} %"
            )
        if missed:
            rows.append(f"{name}: {missed} left as they are, the calibration text never reaches them")
    return rows
