"""What is known of a model that efficli plans and does not export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from efficli.export.gguf.layout import Field, Metadata, OutTensor
from efficli.planning.cache import CacheLayer
from efficli.planning.foreign.reading import Config, Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """A model as llama.cpp's own converter would write it: every tensor and the metadata of its architecture.

    Names, shapes and what stays F32 are those of llama.cpp's conversion/*.py as vendored by llama-cpp-python 0.3.36.
    """

    architecture: str
    """As config.json names it."""
    gguf_arch: str
    tensors: tuple[OutTensor, ...]
    """In the order of the network. No `sources`: nothing can be written from it."""
    metadata: Metadata
    """Every `{arch}.*` value that the converter writes; `general.*` and `tokenizer.*` belong to others."""
    cache: tuple[CacheLayer, ...]
    num_layers: int
    """Without blocks that predict further tokens."""
    hidden_size: int
    vocab_size: int
    """Rows of the embedding."""
    max_positions: int
    tied: bool
    """The output matrix is the embedding."""
    num_experts: int = 0
    experts_per_token: int = 0
    num_padding: int = 0
    """Elements of `tensors` that are not weights of the checkpoint: rows of zeros, rotary factors."""
    as_source: tuple[str, ...] = ()
    """Matrices that llama.cpp's quantizer leaves as it finds them: F16 or BF16 where the converter wrote such a file,
    F32 where types are chosen from F32."""
    only_types: tuple[str, ...] | None = None
    """The file types that the checkpoint can become, where it is stored in 4 bits already; None: all."""
    notes: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        """Weights of the checkpoint that the file holds."""
        return sum(tensor.num_elements for tensor in self.tensors) - self.num_padding

    @property
    def why_not(self) -> str:
        """Why `export` cannot."""
        return f"efficli export has no table for {self.architecture}; llama.cpp's own converter writes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What one kind of model adds to its sizes: a reader's result, before it becomes a `ForeignModel`."""

    gguf_arch: str
    tensors: list[OutTensor]
    fields: dict[str, Field]
    """Without the architecture's name before the key."""
    cache: list[CacheLayer]
    num_experts: int = 0
    experts_per_token: int = 0
    num_padding: int = 0
    as_source: tuple[str, ...] = ()
    only_types: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


Describe = Callable[[Config, Sizes], Described]
"""Reads what is particular to one kind of model."""


def complete(config: Config, sizes: Sizes, found: Described) -> ForeignModel:
    """The whole from its parts."""
    return ForeignModel(
        architecture=config.architecture,
        gguf_arch=found.gguf_arch,
        tensors=tuple(found.tensors),
        metadata={f"{found.gguf_arch}.{key}": value for key, value in found.fields.items()},
        cache=tuple(found.cache),
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        vocab_size=sizes.vocab,
        max_positions=sizes.positions,
        tied=sizes.tied,
        num_experts=found.num_experts,
        experts_per_token=found.experts_per_token,
        num_padding=found.num_padding,
        as_source=found.as_source,
        only_types=found.only_types,
        notes=found.notes,
    )
