"""Leave out the last layers: less to store and to read on every runtime.

The plainest way to make a model shallower, and the one that others are compared with: late layers change the hidden
state least, the last one of all apart (Gromov et al. 2024, arXiv:2403.17887; Men et al. 2024, arXiv:2403.03853).
Lu et al. 2024 (arXiv:2411.15558) find that dropping the last quarter and fine-tuning the output matrix with the last
three remaining layers beats layers chosen by metrics. Without fine-tuning expect it to cost a lot: multiple choice
holds up to a point and then falls at once, perplexity and generated text suffer from the first layer on. Models with
a norm before and after each sub-layer (Gemma 2 and 3) take it worst.

A model of L layers h_{l+1} = f_l(h_l), l = 0 ... L-1, becomes y = head(norm(h_{L-N})).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.writer import copied, write_checkpoint
from efficli.errors import CheckpointError, UsageError
from efficli.families import read_shape
from efficli.method import Context, MethodConfig, Outcome
from efficli.ops.storage import byte_text
from efficli.surgery import config_of_first_layers, layer_number

KIND = "whole-model"


class Config(MethodConfig):
    """How many layers."""

    remove: Annotated[int, Field(ge=1)]
    """Layers to leave out, counted from the last."""


def run(ckpt: Checkpoint, folder: Path, config: Config, context: Context) -> Outcome:
    """Write the checkpoint without its last `config.remove` layers into the empty `folder`.

    UsageError: no layer would remain. CheckpointError: a layer that is to go holds no tensors.
    """
    shape = read_shape(ckpt.config)
    keep = shape.num_layers - config.remove
    if keep < 1:
        raise UsageError(f"remove: {config.remove} of {shape.num_layers} layers, expected at least one to remain")
    pattern = layer_number(shape.facts)
    layer_of = {name: int(match[1]) for name in ckpt.tensors if (match := pattern.match(name))}
    missing = sorted(set(range(shape.num_layers)) - set(layer_of.values()))
    if missing:
        raise CheckpointError(f"layer {missing[0]} has no tensors", where=ckpt.name)
    gone = [tensor for name, tensor in ckpt.tensors.items() if layer_of.get(name, -1) >= keep]
    tensors = [copied(tensor) for name, tensor in ckpt.tensors.items() if layer_of.get(name, -1) < keep]
    written = write_checkpoint(
        ckpt,
        folder,
        tensors,
        config=config_of_first_layers(ckpt.config, shape.facts, keep),
        headers_only=context.headers_only,
        progress=context.progress,
    )
    last = shape.num_layers - 1
    which = f"layer {last}" if config.remove == 1 else f"layers {keep} to {last}"
    size = byte_text(sum(tensor.nbytes for tensor in gone))
    rest = "1 layer remains" if keep == 1 else f"{keep} layers remain"
    row = f"{which} of {shape.num_layers} left out: {len(gone)} tensors, {size}; {rest}"
    return Outcome(report=(row, *written.notes), packed=written.packed)


def rehearsal(config: Config, layers: int) -> Config:
    """No more than a clone of `layers` layers can lose."""
    return config.model_copy(update={"remove": min(config.remove, layers - 1)})
