"""A type for each tensor, so that the file is as good as a byte budget allows.

A multiple-choice knapsack (methods of this kind: HIGGS, Malinovskii et al. 2024, arXiv:2411.17525, section 5; llama.cpp
PR 15550; Q-Palette, 2025, arXiv:2509.20214): of every tensor and every type that its rows can have, what it costs in
bytes and what it loses; then the choice of least loss within the budget, with its proven distance from the optimum, and
at last a search on the measured KL divergence, in which llama.cpp's own presets take part. Embeddings and head are in
the budget like any other tensor, and so are metadata and vocabulary.

The weights stay as they are. What the pass writes beside them: the types (`efficli export` honours them; as text,
`tensor-types.txt`), the importance matrix, and with `rounding: error-feedback` the exact codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.sidecar import IMATRIX, Allocation
from efficli.checkpoint.tensor_types import TENSOR_TYPES, tensor_types_text
from efficli.checkpoint.writer import copied, write_checkpoint
from efficli.errors import UsageError
from efficli.method import Context, Inputs, MethodConfig, Outcome
from efficli.ops.ggml_types import tensor_type
from efficli.ops.storage import sync_file, write_file
from efficli.precision import choice, record
from efficli.precision.encoder import Rounding
from efficli.precision.packing import write_codes
from efficli.precision.view import FileView
from efficli.precision.work import Workshop
from efficli.schema_types import Bytes, Words
from efficli.strict_schema import Refused

KIND = "whole-model"
USES = ("file", "calibration")


class Config(MethodConfig):
    """The budget, and how types are chosen within it."""

    max_bytes: Bytes | None = None
    """Largest size of the whole file: 350MiB; one of this, `bpw` and `fit`."""
    bpw: Annotated[float, Field(gt=0, le=32)] | None = None
    """Bits of a weight on average, as llama-quantize counts them: without metadata and vocabulary."""
    fit: str | None = None
    """A target that must hold the file, its cache and its scratch memory beside the system."""
    ctx_size: Annotated[int, Field(ge=1)] | None = None
    """Tokens of context that `fit` must hold, 2048 without it."""
    loss: Literal["auto", "mse", "hess", "higgs", "kld"] = "auto"
    """What a type loses: the error of the tensor's output (mse, hess), that times the network's sensitivity to noise
    (higgs), or the KL divergence with only this tensor quantized (kld). auto: kld for small models, then higgs."""
    types: Words = ()
    """Types to choose from; without them all that the rows can have and llama.cpp encodes well."""
    target: str | None = None
    """Only types that this target computes as fast as it reads them."""
    harmonize: Annotated[tuple[Literal["qkv", "gate-up"], ...], Field()] = ()
    """Tensors of a layer that share one type, for runtimes that fuse them: qkv, gate-up."""
    rounding: Rounding = "nearest"
    """error-feedback: codes chosen column by column, each making up for the errors before it (GPTQ, LDLQ)."""
    imatrix: str | None = None
    """An importance matrix of llama-imatrix instead of one computed on the calibration text."""
    swaps: Annotated[int, Field(ge=0)] | None = None
    """Measurements of the search at most; 0: the allocation as it is computed. By default as many as take minutes."""

    @field_validator("harmonize", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("types")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(tensor_type(word) for word in value))
        except UsageError as error:
            raise Refused(error.message, error.hint) from None

    @model_validator(mode="after")
    def _one_budget(self) -> Config:
        given = [name for name in ("max_bytes", "bpw", "fit") if getattr(self, name) is not None]
        if len(given) != 1:
            found = "no budget" if not given else " and ".join(f"'{name}'" for name in given)
            at = (given[1],) if given else ("max_bytes",)
            raise Refused(f"{found}, expected one of max_bytes, bpw and fit", "max_bytes: 350MiB", at=at)
        if self.ctx_size is not None and self.fit is None:
            raise Refused("'ctx_size' is for 'fit'", at=("ctx_size",))
        return self


def inputs(config: Config) -> Inputs:
    """What beside the checkpoint decides the result."""
    files = () if config.imatrix is None else (Path(config.imatrix).expanduser(),)
    return Inputs(files=files, targets=tuple(name for name in (config.fit, config.target) if name is not None))


def rehearsal(config: Config, layers: int) -> Config:
    """Bits of a weight instead of bytes, which a model of a few layers has far fewer of; enough of them for any.

    More of the clone's weights are in its table, and in what stays F32, than of the model's.
    """
    updates = {"max_bytes": None, "fit": None, "ctx_size": None, "imatrix": None, "swaps": 2}
    return config.model_copy(update={**updates, "bpw": 32.0 if config.types else 8.5})


def run(ckpt: Checkpoint, folder: Path, config: Config, context: Context) -> Outcome:
    """Choose the types and write them beside the weights into the empty `folder`.

    FitError: the budget is below the smallest possible file, which is named. UsageError: an importance matrix of
    another model, types that no tensor can have. CheckpointError: a calibration text of less than one chunk.
    """
    view = context.need_file()
    lacking = frozenset[str]().union(*(view.lacking(name) for name in inputs(config).targets))
    slow = view.slow(config.target) if config.target else frozenset()
    given = Path(config.imatrix).expanduser() if config.imatrix else None
    weighed = frozenset(view.read_imatrix(given)) if given else view.multiplied
    choices = choice.choices(view, config.types, weighed=weighed, lacking=lacking, slow=slow, holder=config.fit)
    limit = _limit(view, config)
    tied = choice.groups(view.tensors, config.harmonize)
    tensors = [copied(tensor) for tensor in ckpt.tensors.values()]
    if context.headers_only:
        decision = choice.decide(view, choices, limit, choice.typical(view, choices), "size alone", tied)
        written = write_checkpoint(ckpt, folder, tensors, headers_only=True, progress=context.progress)
        allocation = Allocation(types=dict(decision.types), imatrix=IMATRIX)  # which the run will write
        return Outcome(report=(*choices.notes, *written.notes), packed=written.packed, allocation=allocation)
    shop = Workshop(ckpt=ckpt, view=view, context=context, choices=choices, rounding=config.rounding)
    shop.calibrate(given)
    model = shop.loss_model(config.loss)
    curves = shop.curves(model)
    losses = shop.losses(curves, model)
    decision = choice.decide(view, choices, limit, losses, model, tied)
    decision = shop.refine(decision, curves, losses, limit, tied, config.swaps)
    written = write_checkpoint(ckpt, folder, tensors, progress=context.progress)
    shop.copy_imatrix(folder / IMATRIX)
    packed = write_codes(ckpt, folder, shop, decision.types) if config.rounding == "error-feedback" else {}
    write_file(folder / TENSOR_TYPES, tensor_types_text(decision.types))
    drawn = record.write(folder, shop, decision, losses)
    for name in (IMATRIX, TENSOR_TYPES):
        sync_file(folder / name)
    rows = (*shop.rows, *decision.report, *drawn, *written.notes)
    allocation = Allocation(types=dict(decision.types), imatrix=IMATRIX, losses=dict(decision.losses))
    return Outcome(report=rows, packed={**written.packed, **packed}, allocation=allocation)


def _limit(view: FileView, config: Config) -> choice.Limit:
    """Bytes that a file may have."""

    def limit(types: Mapping[str, str]) -> int:
        if config.max_bytes is not None:
            return config.max_bytes
        if config.fit is not None:
            return view.most_bytes(config.fit, config.ctx_size, types)
        assert config.bpw is not None
        return int(view.num_weights * config.bpw / 8) + view.nbytes(types) - view.data_nbytes(types)

    return limit
