"""Rehearsal: a recipe on a random clone of its model with two layers; what is missing shows before the long run.

The clone has the model's configuration, tokenizer and family. Where it would be large it is narrower, with heads of
the same size, and with rows that fill the same blocks: what falls back to another type does so in the clone, too. Its
weights are drawn, so that quality, size and speed say nothing, and gates and targets are not held against them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.artifact.temporary import scratch_directory
from efficli.bench.texts import evaluation_texts
from efficli.catalog import load_method
from efficli.checkpoint import Checkpoint, open_checkpoint, open_without_weights
from efficli.checkpoint.digest import SMALL_BYTES, small_file_names
from efficli.checkpoint.files import read_bytes
from efficli.checkpoint.header import BITS
from efficli.checkpoint.safetensors_file import write_file as write_safetensors
from efficli.checkpoint.sidecar import IMATRIX, Allocation, Sidecar, sealed, write_sidecar
from efficli.export.gguf.imatrix import Sums, write_imatrix
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TERNARY
from efficli.families import ModelShape, TensorSpec, expected_tensors, read_shape
from efficli.method import TensorConfig
from efficli.ops.ggml_types import asked_type
from efficli.ops.storage import write_file
from efficli.pipeline.calibration import calibration_texts
from efficli.pipeline.export import run_recipe
from efficli.pipeline.files import allocation_of
from efficli.pipeline.result import ExportResult
from efficli.progress import Progress
from efficli.recipe import Bench, Calibration, Export, Gates, Pass, Recipe
from efficli.surgery import config_of_first_layers, matrices

LAYERS = 2
MOST_WEIGHTS = 72_000_000
"""Of the clone: as many as the longest vocabularies have at the smallest width. More would take too long."""
MOST_EXPERTS = 4
BLOCKS = 256
"""Weights in the largest blocks of ggml's types; all of them divide it."""
_CHARACTERS = 2000
"""Of the text that the clone is measured on, at least; 4 for each token of a window otherwise."""
_CHARACTERS_A_TOKEN = 16
"""No text has more, on average: so much of one fills a window if the whole text does."""


def rehearse(recipe: Recipe, planned: ExportResult, *, threads: int | None, progress: Progress) -> ExportResult:
    """Run every step of the recipe on a clone of its model, whose weights are not read, among temporary files.

    `planned`: the files as the headers of the model itself decide them; the result is these, and the steps as they
    went. Errors are those of the run.
    """
    model, _ = open_without_weights(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    if recipe.certificate.base is not None:
        origin, _ = open_without_weights(recipe.certificate.base, trust_remote_code=recipe.trust_remote_code)
        read_shape(origin.config)
    with scratch_directory() as folder:
        ternary = {asked_type(kind) for export in recipe.exports for kind in export.type} & TERNARY
        make_clone(model, folder / "clone", seed=recipe.seed, values=_values(ternary))
        if (allocation := allocation_of(model)) is not None:
            _allocate(folder / "clone", allocation)
        done = run_recipe(
            _on_clone(recipe, folder),
            folder / "out",
            threads=threads,
            force=False,
            dry_run=False,
            progress=progress,
            command="rehearse",
        )
    if recipe.target or recipe.bench or recipe.gates != Gates():
        progress.note("gates, targets and scenarios are left out: drawn weights of two layers say nothing of them")
    if ternary and not all(export.allow_non_ternary for export in recipe.exports):
        progress.note(
            f"{', '.join(sorted(ternary))}: whether the model's own weights are for it shows when they are read"
        )
    return replace(planned, steps=done.steps, seconds=done.seconds, dry_run=False, command="rehearse")


def _on_clone(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe for the clone in `folder`, with short texts beside it."""
    clone = open_checkpoint(folder / "clone", trust_remote_code=recipe.trust_remote_code)
    evaluation, calibration = folder / "evaluation.txt", folder / "calibration.txt"
    (text, *_) = evaluation_texts(recipe.certificate.text)
    write_file(evaluation, text.content[: max(_CHARACTERS, 4 * recipe.certificate.ctx_size)])
    looked_at = "\n".join(content for _, content in calibration_texts(recipe))
    write_file(calibration, looked_at[: _CHARACTERS_A_TOKEN * recipe.calibration.ctx_size])
    measured_on = str(evaluation) if recipe.certificate.enabled else None
    bench = recipe.bench and Bench(
        n_prompt=(16,), n_gen=(4,), threads=recipe.bench.threads, max_repetitions=5, patience=0.0, starts=False
    )
    return recipe.model_copy(
        update={
            "model": str(clone.root),
            "revision": None,
            "strict": False,  # the model's own headers have been held against it
            "target": (),
            "gates": Gates(),
            "calibration": Calibration(text=str(calibration), ctx_size=recipe.calibration.ctx_size, max_tokens=512),
            "certificate": recipe.certificate.model_copy(update={"text": measured_on, "base": None}),
            "bench": bench,
            "passes": tuple(_pass_on_clone(one, clone) for one in recipe.passes),
            "exports": tuple(_export_on_clone(one, clone) for one in recipe.exports),
        }
    )


def _pass_on_clone(one: Pass, clone: Checkpoint) -> Pass:
    """The pass with values that fit two layers, and without patterns for layers that the clone does not have."""
    hook, config = load_method(one.method).rehearsal, one.config
    if isinstance(config, TensorConfig):
        names = [name for name, found in matrices(clone).items() if not found.layer]
        kept = {key: _matching(getattr(config, key), names) for key in ("include", "exclude")}
        config = config.model_copy(update=kept)
    return one.model_copy(update={"config": config if hook is None else hook(config, LAYERS)})


def _allocate(clone: Path, allocation: Allocation) -> None:
    """Give the clone the allocation of the model, for the tensors that it has; its matrix makes all columns equal."""
    found = open_checkpoint(clone, trust_remote_code=True)  # the model itself was asked; no code is run
    _, tensors, _ = layout(read_shape(found.config), found)
    types = {t.name: allocation.types[t.name] for t in tensors if t.name in allocation.types}
    own = Allocation(types=types)
    if allocation.imatrix is not None:
        shapes = {t.name: (math.prod(t.shape[:-2]), t.shape[-1]) for t in tensors if not t.keep_f32}
        ones = {name: Sums(np.ones(shape, np.float32), np.ones(shape[0], np.int64)) for name, shape in shapes.items()}
        write_imatrix(clone / IMATRIX, ones, dataset="none", chunk=1, chunks=1)
        own = sealed(Allocation(types=types, imatrix=IMATRIX), clone)
    write_sidecar(clone, Sidecar(allocation=own))


def _export_on_clone(export: Export, clone: Checkpoint) -> Export:
    """The export without wishes for layers that the clone does not have; a matrix from a file is of other widths."""
    _, tensors, _ = layout(read_shape(clone.config), clone)
    names = [t.name for t in tensors if not re.match(r"blk\.[1-9]", t.name) and len(t.shape) > 1 and not t.keep_f32]
    wishes = tuple(wish for wish in export.tensor_type if _matching([wish.rpartition("=")[0]], names))
    return export.model_copy(update={"tensor_type": wishes, "imatrix": export.imatrix and "auto"})


def _matching(patterns: Any, names: list[str]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if any(re.search(pattern, name) for name in names))


def _values(ternary: set[str]) -> tuple[int, ...]:
    """What the drawn numbers are multiples of; () for numbers of every size."""
    if not ternary:
        return ()
    return (-1, 1) if "Q1_0" in ternary else (-1, 0, 1)


def make_clone(model: Checkpoint, folder: Path, *, seed: int, values: tuple[int, ...] = ()) -> None:
    """Write a two-layer clone of `model` with drawn weights into the new `folder`; its weights are not read."""
    config = small_config(model.config)
    shape = read_shape(config)
    folder.mkdir()
    for name in small_file_names(model):
        path = model.file(name)
        left_out = name in ("config.json", "efficli.json", "model.safetensors.index.json")
        if path is not None and not left_out and path.stat().st_size <= SMALL_BYTES:
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            write_file(target, read_bytes(path, name, SMALL_BYTES))
    write_file(folder / "config.json", json.dumps(config, indent=2))
    dtype = {"float32": "F32", "float16": "F16"}.get(shape.dtype, "BF16")
    draw = np.random.default_rng(seed)
    specs = expected_tensors(shape)
    made = {spec.name: (dtype, spec.shape, partial(_drawn, spec, shape, draw, values, dtype)) for spec in specs}
    write_safetensors(folder / "model.safetensors", made, {"format": "pt"})


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a clone: two layers, few experts, and as wide as MOST_WEIGHTS allow."""
    shape = read_shape(config)
    cut = _text_part(config_of_first_layers(config, shape.facts, min(LAYERS, shape.num_layers)), shape)
    if shape.num_experts > MOST_EXPERTS:
        cut = _changed(cut, shape, {"num_experts": min(shape.num_experts, max(MOST_EXPERTS, shape.experts_per_token))})
    if shape.facts.scale_from_query_scalar:  # graphs choose another scale by the number of layers
        cut = _changed(cut, shape, {"query_pre_attn_scalar": shape.head_dim})
    smallest = cut
    if num_weights(cut) > MOST_WEIGHTS:
        for smallest in _narrower(cut):
            if num_weights(smallest) <= MOST_WEIGHTS:
                break
    return smallest


def num_weights(config: Mapping[str, Any]) -> int:
    """Weights of the model that a config.json describes."""
    return sum(math.prod(spec.shape) for spec in expected_tensors(read_shape(config)))


def _narrower(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration with smaller and smaller widths."""
    shape = read_shape(config)
    queries = shape.num_heads * shape.head_dim
    together = queries == shape.hidden_size  # some families have no other
    for width in _alike(shape.hidden_size, shape.head_dim if together else 1):
        if together:
            heads = width // shape.head_dim
        else:
            near = [n // shape.head_dim for n in _alike(queries, shape.head_dim)]
            ideal = shape.num_heads * width / shape.hidden_size
            heads = min(near, key=lambda n: abs(n - ideal), default=shape.num_heads)
        ideal = shape.intermediate_size * width / shape.hidden_size
        inner = min(_alike(shape.intermediate_size), key=lambda n: abs(n - ideal), default=shape.intermediate_size)
        values = {"hidden_size": width, "num_attention_heads": heads}
        values["moe_intermediate_size" if shape.facts.experts else "intermediate_size"] = inner
        if shape.facts.grouped:
            most = max(1, heads * shape.num_kv_heads // shape.num_heads)
            values["num_key_value_heads"] = next(n for n in range(most, 0, -1) if heads % n == 0)
        yield _changed(config, shape, values)


def _alike(length: int, multiple_of: int = 1) -> list[int]:
    """Smaller lengths of rows that fill the same blocks as `length`, the largest first.

    Where there is none, those that are the same to blocks of 32 and of 256.
    """
    smaller = [n for n in range(length - 1, 0, -1) if n % multiple_of == 0]
    common = math.gcd(length, BLOCKS)
    exact = [n for n in smaller if math.gcd(n, BLOCKS) == common]
    return exact or [n for n in smaller if all((n % block == 0) == (length % block == 0) for block in (32, BLOCKS))]


def _text_part(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """The configuration of the language model alone, where it is a part of one that also sees."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return dict(config)
    rest = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    own = {"architectures": [shape.facts.architectures[0]], "model_type": shape.facts.model_types[0]}
    return {**rest, **text, **own}


def _changed(config: Mapping[str, Any], shape: ModelShape, values: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with other values, under the names that it has for them."""
    found = dict(config)
    for key, value in values.items():
        names = shape.facts.keys.get(key, (key,))
        found |= dict.fromkeys([name for name in names if name in config] or names[:1], value)
    return found


def _drawn(
    spec: TensorSpec, shape: ModelShape, draw: np.random.Generator, values: tuple[int, ...], dtype: str
) -> bytes:
    """Norms that change nothing; matrices of small numbers, or of few values; little-endian."""
    if len(spec.shape) == 1:
        weight = spec.name.endswith("weight") and spec.role.endswith("norm")
        numbers = np.full(spec.shape, 1.0 - shape.facts.norm_offset if weight else 0.0, np.float32)
    elif values:
        numbers = draw.choice(np.array(values, np.float32), spec.shape) * np.float32(0.03125)
    else:
        numbers = draw.standard_normal(spec.shape, np.float32) * np.float32(0.02)
    return _stored(numbers, dtype)


def _stored(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes; BF16 by cutting, which is exact enough for drawn numbers."""
    if dtype == "BF16":
        found = (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    else:
        found = values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    assert len(found) * 8 == values.size * BITS[dtype]
    return found
