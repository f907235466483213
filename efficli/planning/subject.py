"""What is planned: metadata and tensors of a model's files, by `export`'s code where it knows the family.

The output matrix: where the weights' headers or their index are here, they tell whether it is the embedding. `export`
believes config.json, and refuses a checkpoint without the matrix that config.json speaks of; both are said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from efficli import __version__
from efficli.checkpoint import Checkpoint, TensorRef, refuse
from efficli.checkpoint.header import BITS
from efficli.checkpoint.shards import SINGLE, Absent
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.general import general_metadata, model_card
from efficli.export.gguf.graphs import context_length
from efficli.export.gguf.job import describe
from efficli.export.gguf.layout import Metadata, OutTensor, string
from efficli.export.gguf.model import layout
from efficli.export.gguf.vocab import Vocab, read_vocab
from efficli.families import ModelShape, expected_tensors, family_of, own_names, read_shape
from efficli.planning.cache import CacheLayer, cache_layers

if TYPE_CHECKING:
    from efficli.planning.foreign import ForeignModel

HEAD = "lm_head.weight"
BYTES_PER_TOKEN = 50
"""Of a vocabulary in a file, where there is no tokenizer to look at (26 in Gemma 3, 39 in Qwen 2.5, 61 in Llama 3)."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What all files of a model share."""

    architecture: str
    gguf_arch: str
    metadata: Metadata
    tensors: tuple[OutTensor, ...]
    num_weights: int
    unread_nbytes: int = 0
    """Bytes that are reckoned for a vocabulary which could not be read."""
    vocab_size: int
    hidden_size: int
    max_positions: int
    """The longest context that llama.cpp computes right."""
    tied: bool
    basis: Literal["headers", "config"]
    cache: tuple[CacheLayer, ...]
    as_source: frozenset[str] = frozenset()
    """Matrices that llama.cpp's quantizer leaves in the 16 bits that it finds them in."""
    only_types: tuple[str, ...] | None = None
    """The file types that can be had at all; None: all."""
    why_not: str | None = None
    notes: tuple[str, ...] = ()


def read_subject(ckpt: Checkpoint, absent: Absent | None, *, pre_tokenizer: str | None = None) -> Subject:
    """The subject that a checkpoint is, with its weights or without (`absent` of `open_without_weights`).

    Raises as `export` does: UnsupportedError (no family that is known), CheckpointError (no tokenizer, values that
    contradict each other, headers of another shape).
    """
    names = ckpt.tensors.keys() if absent is None else absent.names
    try:
        family_of(ckpt.config)
    except UnsupportedError:
        from efficli.planning.foreign import read_foreign  # noqa: PLC0415 (eight modules that most models do not need)

        foreign = read_foreign(ckpt.config)
        if foreign is None:
            raise
        return _foreign(ckpt, foreign, names, pre_tokenizer)
    return _family(ckpt, absent, names, pre_tokenizer)


def _family(ckpt: Checkpoint, absent: Absent | None, names: Collection[str], pre_tokenizer: str | None) -> Subject:
    """A family that `export` writes."""
    refuse.check_quantized(ckpt.config, ckpt.tensors.values())
    shape = read_shape(ckpt.config)
    notes: list[str] = []
    why_not = None
    if absent is not None:
        ckpt = replace(ckpt, tensors=_stand_ins(ckpt, shape, names))
    if names and shape.facts.head and shape.tied == _has_head(names):
        notes.append(_contradiction(shape.tied))
        if not shape.tied:
            why_not = _objection(shape, ckpt)
            ckpt = replace(ckpt, config=_with_tying(ckpt.config, True))
    described = describe(ckpt, own=_own(ckpt), pre_tokenizer=pre_tokenizer)
    shape = described.shape
    return Subject(
        architecture=shape.architecture,
        gguf_arch=shape.facts.gguf_arch,
        metadata=described.metadata,
        tensors=tuple(described.tensors),
        num_weights=sum(t.num_elements for t in described.tensors),
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        max_positions=context_length(shape),
        tied=shape.tied,
        basis="config" if absent is not None else "headers",
        cache=cache_layers(shape),
        why_not=why_not,
        notes=(*ckpt.notes, *model_card(ckpt).notes, *notes, *described.report, *described.vocab_notes),
    )


def _own(ckpt: Checkpoint) -> dict[str, str]:
    """Values under `efficli.` as an export writes them: of a recipe that is not known, as many digits."""
    return {"version": __version__, "source": ckpt.name, "recipe": "0" * 64}


def with_stand_ins(ckpt: Checkpoint, absent: Absent | None) -> Checkpoint:
    """The checkpoint as its config.json says it would be, where its weights are not here: headers and no values."""
    if absent is None:
        return ckpt
    return replace(ckpt, tensors=_stand_ins(ckpt, read_shape(ckpt.config), absent.names))


def _stand_ins(ckpt: Checkpoint, shape: ModelShape, names: Collection[str]) -> dict[str, TensorRef]:
    """Headers of the weights that config.json stands for; under the names of the index where there is one."""
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    specs = expected_tensors(shape, fused_experts=fused)
    own = own_names(names, shape, specs) if names else {spec.name: spec.name for spec in specs}
    dtype = _DTYPES.get(shape.dtype, "BF16")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (1,))
    shapes |= {own[spec.name]: spec.shape for spec in specs if spec.name in own}
    file, nbytes = ckpt.root / SINGLE, BITS[dtype] // 8
    return {name: TensorRef(name, size, dtype, file, 0, prod(size) * nbytes) for name, size in shapes.items()}


def _has_head(names: Collection[str]) -> bool:
    return any(name == HEAD or name.endswith(f".{HEAD}") for name in names)


def _contradiction(tied: bool) -> str:
    if tied:
        return f"config.json says tied, and the weights have {HEAD}: it is left out, as transformers does not use it"
    return f"config.json says untied, and the weights have no {HEAD}: planned as tied"


def _objection(shape: ModelShape, ckpt: Checkpoint) -> str:
    """What `export` says of a checkpoint without the output matrix that its config.json speaks of."""
    try:
        layout(shape, ckpt)
    except CheckpointError as error:
        return f"{error.line}; {error.hint}" if error.hint else error.line
    raise AssertionError(f"{HEAD} is missing, and not missed")


def _with_tying(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json with the other answer, also in its nested part."""
    out = {**config, "tie_word_embeddings": tied}
    if isinstance(text := config.get("text_config"), Mapping):
        out["text_config"] = {**text, "tie_word_embeddings": tied}
    return out


def _foreign(ckpt: Checkpoint, model: ForeignModel, names: Collection[str], pre_tokenizer: str | None) -> Subject:
    """A family that only the plan knows: the file is what llama.cpp's own converter and its quantizer write."""
    notes: list[str] = []
    if names and model.tied == _has_head(names):
        from efficli.planning.foreign import read_foreign  # noqa: PLC0415 (as above)

        notes.append(_contradiction(model.tied))
        model = read_foreign(_with_tying(ckpt.config, not model.tied)) or model
    vocab, unread = _foreign_vocab(ckpt, model, pre_tokenizer)
    experts = sum(t.num_elements for t in model.tensors if len(t.shape) == 3) if model.num_experts else 0
    general = general_metadata(
        ckpt,
        num_weights=model.num_weights,
        expert_weights=experts,
        num_experts=model.num_experts,
        strips_like_phi3=vocab.strips_like_phi3,
    )
    arch: Metadata = {"general.architecture": string(model.gguf_arch)}
    return Subject(
        architecture=model.architecture,
        gguf_arch=model.gguf_arch,
        metadata=arch | general | model.metadata | vocab.metadata,
        tensors=tuple(replace(t, shape=_as_counted(t.shape)) for t in model.tensors),
        num_weights=model.num_weights,
        unread_nbytes=unread,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        max_positions=model.max_positions,
        tied=model.tied,
        basis="config",
        cache=model.cache,
        as_source=frozenset(model.as_source),
        only_types=model.only_types,
        why_not=model.why_not,
        notes=(*ckpt.notes, *model_card(ckpt).notes, *notes, *model.notes, *vocab.notes),
    )


def _as_counted(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of length 1 before the others: llama.cpp's quantizer does not write them (`ggml_n_dims`)."""
    first = next((i for i, length in enumerate(shape) if length != 1), len(shape) - 1)
    return shape[first:]


def _foreign_vocab(ckpt: Checkpoint, model: ForeignModel, pre_tokenizer: str | None) -> tuple[Vocab, int]:
    """The vocabulary; or an empty one, and the bytes that it is reckoned to have."""
    try:
        return read_vocab(ckpt, model.vocab_size, model.gguf_arch, pre_tokenizer=pre_tokenizer), 0
    except (CheckpointError, UnsupportedError) as error:
        file = ckpt.file("tokenizer.json")
        nbytes = BYTES_PER_TOKEN * model.vocab_size
        what = f"reckoned as {BYTES_PER_TOKEN} bytes for each token"
        if file is not None:
            nbytes, what = file.stat().st_size, "reckoned as large as tokenizer.json"
        note = f"the vocabulary is {what}, as it cannot be read: {error.line}"
        return Vocab({}, model.vocab_size, "bpe", (note,)), nbytes
