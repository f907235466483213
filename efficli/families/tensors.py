"""Which tensors a checkpoint of a given shape must hold, and what to say where it does not."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from efficli.errors import CheckpointError, UnsupportedError
from efficli.families.shape import ModelShape
from efficli.families.weights import FUSED_EXPERTS, Weight
from efficli.progress import Progress


class HasShape(Protocol):
    """A tensor known by its header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns, as stored."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint holds: Hugging Face name, shape as stored, what it is, where it belongs."""

    name: str
    shape: tuple[int, ...]
    role: str
    optional: bool = False
    layer: int | None = None
    expert: int | None = None


def expected_tensors(shape: ModelShape, *, fused_experts: bool = False) -> list[TensorSpec]:
    """All tensors of the model under the family's usual names, in the order of the network.

    `fused_experts`: all experts of a layer are one tensor, gate and up together, as in transformers 5.
    """
    facts = shape.facts
    weights = facts.weights
    if fused_experts:
        weights = tuple(w for w in weights if "{e}" not in w.name) + FUSED_EXPERTS
    prefix = facts.prefixes[0]
    specs: list[TensorSpec] = []
    body = [w for w in weights if "{i}" in w.name]
    first = weights.index(body[0])
    for weight in (w for w in weights[:first] if "{i}" not in w.name):
        specs.extend(_specs(weight, shape, prefix, None))
    for layer in range(shape.num_layers):
        for weight in body:
            specs.extend(_specs(weight, shape, prefix, layer))
    for weight in (w for w in weights[first:] if "{i}" not in w.name):
        specs.extend(_specs(weight, shape, prefix, None))
    if facts.head and not shape.tied:
        specs.append(TensorSpec(facts.head, (shape.vocab_size, shape.hidden_size), "output"))
    return specs


def _specs(weight: Weight, shape: ModelShape, prefix: str, layer: int | None) -> Iterator[TensorSpec]:
    """The tensors that one row of the table stands for in one layer."""
    if weight.when and not getattr(shape, weight.when):
        return
    size = tuple(_length(term, shape) for term in weight.shape)
    experts = range(shape.num_experts) if "{e}" in weight.name else (None,)
    for expert in experts:
        name = prefix + weight.name.format(i=layer, e=expert)
        yield TensorSpec(name, size, weight.role, layer=layer, expert=expert)


def _length(term: str, shape: ModelShape) -> int:
    """The length that "D", "3D" or "Q+2K" stands for."""
    letters = {
        "V": shape.vocab_size,
        "D": shape.hidden_size,
        "F": shape.intermediate_size,
        "M": shape.intermediate_size,
        "Q": shape.num_heads * shape.head_dim,
        "K": shape.num_kv_heads * shape.head_dim,
        "H": shape.head_dim,
        "P": shape.max_positions,
        "T": shape.num_token_types,
        "E": shape.num_experts,
    }
    return sum(int(part[:-1] or 1) * letters[part[-1]] for part in term.split("+"))


def check_tensors(
    tensors: Mapping[str, HasShape], shape: ModelShape, *, strict: bool, progress: Progress
) -> dict[str, TensorSpec]:
    """The checkpoint's own tensor names with what each is; nothing is read.

    CheckpointError names tensors that are missing or have another shape than config.json says. Tensors that are not
    expected are a note, an error under `strict`; known ballast (rotary tables, masks, a tied output matrix, a pooler, a
    vision tower) is passed over.
    """
    facts = shape.facts
    if shape.dense_layers:
        raise UnsupportedError(
            f"layers {', '.join(map(str, shape.dense_layers))} have no experts, expected experts in every layer",
            where="config.json",
        )
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in tensors)
    specs = expected_tensors(shape, fused_experts=fused)
    names = own_names(tensors, shape, specs)
    found = {names[spec.name]: spec for spec in specs if spec.name in names}
    missing = [spec.name for spec in specs if spec.name not in names]
    if missing:
        raise _missing(missing, len(specs), shape)
    for name, spec in found.items():
        if tuple(tensors[name].shape) != spec.shape:
            raise CheckpointError(
                f"{name} is {_by(tensors[name].shape)}, config says {_by(spec.shape)}",
                hint="config.json and the weights are of different models: take both from the same place",
            )
    ballast = re.compile("|".join(facts.ignored)) if facts.ignored else None
    heads = {prefix.removesuffix("model.") + facts.head for prefix in facts.prefixes} if facts.head else set()
    unexpected = [
        name
        for name in tensors
        if name not in found and not (ballast and ballast.search(name)) and not (shape.tied and name in heads)
    ]
    if unexpected:
        line = f"{len(unexpected)} unexpected tensors: {_some(unexpected)}" if len(unexpected) > 1 else (
            f"unexpected tensor: {unexpected[0]}"
        )  # fmt: skip
        if strict:
            raise CheckpointError(line, hint="without --strict it is left out, and said so")
        progress.note(f"{line}; left out")
    return found


def own_names(tensors: Container[str], shape: ModelShape, specs: list[TensorSpec]) -> dict[str, str]:
    """Usual name -> the checkpoint's name, which may have another prefix or BERT's old gamma and beta."""
    facts = shape.facts
    usual = facts.prefixes[0]
    anchor = specs[0].name[len(usual) :]
    prefix = next((p for p in facts.prefixes if p + anchor in tensors), usual)
    own = {}
    for spec in specs:
        if spec.role == "output":
            candidates = [spec.name, prefix.removesuffix("model.") + spec.name, prefix + spec.name]
        else:
            name = prefix + spec.name[len(usual) :]
            candidates = [name]
            if "LayerNorm." in name:
                candidates.append(name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("bias", "beta"))
        match = next((name for name in candidates if name in tensors), None)
        if match is not None:
            own[spec.name] = match
    return own


def _missing(missing: list[str], total: int, shape: ModelShape) -> CheckpointError:
    """The error for absent tensors."""
    hint = "fetch or save the whole checkpoint again, or correct config.json if it is another model's"
    if missing == [shape.facts.head]:
        hint = 'config.json says untied; set "tie_word_embeddings": true if the output is the embedding'
    return CheckpointError(f"missing {len(missing)} of {total} tensors: {_some(missing)}", hint=hint)


def _some(names: list[str]) -> str:
    """Up to three names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _by(lengths: tuple[int, ...]) -> str:
    """A shape as 64×32."""
    return "×".join(map(str, lengths)) or "a single number"
