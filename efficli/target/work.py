"""What a model asks of a device for each token: bytes to read, weights to compute with, by type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Self

from efficli.errors import CheckpointError

_EXPERTS = re.compile(r"_exps\.(weight|bias)$|\.ffn_(gate|up|down)\.\d+\.(weight|bias)$")
"""Merged over the experts of a layer, or, in files of early 2024, one tensor each."""
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_LOOKED_UP = ("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")
"""Tables of which a token takes one row."""


class Share(NamedTuple):
    """Of one type."""

    nbytes: float
    weights: float


@dataclass(frozen=True, slots=True)
class Active:
    """What computing one token reads of a file."""

    types: Mapping[str, Share]
    """By ggml's name of the type."""
    output: Mapping[str, Share] = field(default_factory=dict)
    """The part of `types` that only tokens with logits need, so in a prompt only the last."""
    left_out: Mapping[str, float] = field(default_factory=dict)
    """Bytes of the file that a token does not read, by reason."""

    @property
    def nbytes(self) -> float:
        """Bytes per token, without the KV cache."""
        return sum(share.nbytes for share in self.types.values())

    @property
    def weights(self) -> float:
        """Weights per token."""
        return sum(share.weights for share in self.types.values())


def active_bytes(tensors: Mapping[str, tuple[str, int, tuple[int, ...]]], metadata: Mapping[str, Any]) -> Active:
    """What one token reads of these tensors (name: type, bytes, shape in either order), given the GGUF metadata.

    Not read: token embeddings beside an output tensor, per-layer embeddings and position tables (one row is looked up),
    experts that are not chosen, an encoder beside a decoder, blocks for predicting more than one token. A model that
    writes no tokens (it pools, or sees both ways) has no output tensor to read. CheckpointError for experts without a
    number that is used.
    """
    arch = str(metadata.get("general.architecture", ""))
    reader = _Reader(metadata, arch, untied="output.weight" in tensors or _only_reads(metadata, arch))
    types: dict[str, Share] = {}
    output: dict[str, Share] = {}
    left_out: dict[str, float] = {}
    for name, (kind, nbytes, shape) in tensors.items():
        part, reason = reader.part(name)
        types[kind] = _add(types.get(kind), nbytes * part, prod(shape) * part)
        if name == "output.weight" or (name == "token_embd.weight" and part):
            output[kind] = _add(output.get(kind), nbytes * part, prod(shape) * part)
        if reason:
            left_out[reason] = left_out.get(reason, 0.0) + nbytes * (1 - part)
    used = {kind: share for kind, share in types.items() if share.nbytes}
    return Active(used, output, left_out)


def _add(share: Share | None, nbytes: float, weights: float) -> Share:
    return Share(nbytes + (share.nbytes if share else 0), weights + (share.weights if share else 0))


def _only_reads(metadata: Mapping[str, Any], arch: str) -> bool:
    return f"{arch}.pooling_type" in metadata or metadata.get(f"{arch}.attention.causal") is False


class _Reader:
    """Which share of a tensor one token reads."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, *, untied: bool) -> None:
        self.untied = untied
        self.experts = metadata.get(f"{arch}.expert_count"), metadata.get(f"{arch}.expert_used_count")
        blocks, ahead = metadata.get(f"{arch}.block_count"), metadata.get(f"{arch}.nextn_predict_layers")
        self.blocks = blocks - ahead if isinstance(blocks, int) and isinstance(ahead, int) else None

    def part(self, name: str) -> tuple[float, str | None]:
        """The share, and why it is less than all."""
        if name in _LOOKED_UP:
            return 0.0, "looked up by row"
        if name == "token_embd.weight" and self.untied:
            return 0.0, "token embeddings, looked up by row"
        if name.startswith("enc."):
            return 0.0, "encoder"
        block = _BLOCK.match(name)
        if block and self.blocks is not None and int(block[1]) >= self.blocks:
            return 0.0, "blocks that predict further tokens"
        if _EXPERTS.search(name):
            return self.expert_share(name), "experts that are not chosen"
        return 1.0, None

    def expert_share(self, name: str) -> float:
        """Used experts over all."""
        count, used = self.experts
        if not isinstance(count, int) or not isinstance(used, int) or not 0 < used <= count:
            found = f"expert_count {count!r} and expert_used_count {used!r}"
            raise CheckpointError(f"{name} holds experts, and the metadata have {found}")
        return used / count


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A model file and how it is used: what `predict` reckons with."""

    file_bytes: int
    types: Mapping[str, Share]
    """Bytes and weights that one written token reads, by type: `Active.types`."""
    prompt_types: Mapping[str, Share] | None = None
    """The same of a prompt's token, which needs no logits; None: as `types`."""
    kv_bytes_per_token: float = 0.0
    """Of the cache, for each position."""
    depth: int = 0
    """Positions that are in the cache."""
    threads: int | None = None
    """None: as many as the target was calibrated with."""
    peak_anon: int | None = None
    """Bytes of anonymous memory at most (cache, scratch, repacked weights); None where it is not known."""

    @classmethod
    def of(
        cls,
        active: Active,
        file_bytes: int,
        *,
        kv_bytes_per_token: float = 0.0,
        depth: int = 0,
        threads: int | None = None,
        peak_anon: int | None = None,
    ) -> Self:
        """From what `active_bytes` found."""
        prompt = {
            kind: Share(share.nbytes - head.nbytes, share.weights - head.weights)
            for kind, share in active.types.items()
            for head in [active.output.get(kind, Share(0, 0))]
        }
        return cls(
            file_bytes=file_bytes,
            types=active.types,
            prompt_types=prompt,
            kv_bytes_per_token=kv_bytes_per_token,
            depth=depth,
            threads=threads,
            peak_anon=peak_anon,
        )

    @property
    def kv_bytes(self) -> float:
        """Of the cache that a token reads."""
        return self.kv_bytes_per_token * self.depth

    @property
    def active_bytes(self) -> float:
        """Per token, with the cache."""
        return sum(share.nbytes for share in self.types.values()) + self.kv_bytes

    @property
    def active_weights(self) -> float:
        """Per token."""
        return sum(share.weights for share in self.types.values())
