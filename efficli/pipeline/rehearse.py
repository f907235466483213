"""Rehearsal: a recipe on a random clone of its model with two layers; what is missing shows before the long run.

The clone has the model's configuration, tokenizer and family; where it would be large its widths are smaller, with the
same head size and the same remainder of 256. Its weights are drawn, so that quality and speed say nothing: gates are
not held against them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.artifact.temporary import scratch_directory
from efficli.catalog import load_method
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.digest import small_file_names
from efficli.checkpoint.files import read_bytes
from efficli.checkpoint.safetensors_file import write_file as write_safetensors
from efficli.data import committed
from efficli.export.gguf.types import TERNARY
from efficli.families import ModelShape, TensorSpec, expected_tensors, read_shape
from efficli.ops.ggml_types import file_type
from efficli.ops.storage import write_file
from efficli.pipeline.export import run_recipe
from efficli.pipeline.result import ExportResult
from efficli.progress import Progress
from efficli.recipe import Bench, Calibration, Gates, Pass, Recipe
from efficli.surgery import config_of_first_layers

LAYERS = 2
MOST_WEIGHTS = 48_000_000
"""Of the clone, its vocabulary apart; more would take longer than a rehearsal may."""
WIDTHS = (4096, 2048, 1024, 768, 512, 256)
MOST_EXPERTS = 4
_TEXT_CHARACTERS = 6000


def rehearse(recipe: Recipe, model: Checkpoint, *, threads: int | None, progress: Progress) -> ExportResult:
    """Run every step of the recipe on a clone of `model` (its weights are not read) in a temporary folder."""
    with scratch_directory() as folder:
        root = folder
        clone = root / "clone"
        ternary = any(file_type(kind) in TERNARY for export in recipe.exports for kind in export.type)
        make_clone(model, clone, seed=recipe.seed, ternary=ternary)
        text = root / "text.txt"
        write_file(text, committed("evaluation-code")[:_TEXT_CHARACTERS])
        shorter = recipe.model_copy(
            update={
                "model": str(clone),
                "revision": None,
                "target": (),
                "gates": Gates(),
                "calibration": Calibration(text=str(text), ctx_size=recipe.calibration.ctx_size, max_tokens=1024),
                "certificate": recipe.certificate.model_copy(update={"text": str(text), "base": None}),
                "bench": recipe.bench and Bench(n_prompt=(16,), n_gen=(4,), patience=0.0, starts=False),
                "passes": tuple(_rehearsed(one) for one in recipe.passes),
            }
        )
        done = run_recipe(
            shorter, root / "out", threads=threads, force=False, dry_run=False, progress=progress, command="rehearse"
        )
    return replace(done, model=model.name)


def _rehearsed(one: Pass) -> Pass:
    hook = load_method(one.method).rehearsal
    return one if hook is None else one.model_copy(update={"config": hook(one.config, LAYERS)})


def make_clone(model: Checkpoint, folder: Path, *, seed: int, ternary: bool = False) -> None:
    """Write a two-layer clone of `model` with drawn weights into the new `folder`."""
    config = small_config(model.config)
    shape = read_shape(config)
    folder.mkdir()
    for name in small_file_names(model):
        path = model.file(name)
        if path is not None and name not in ("config.json", "efficli.json", "model.safetensors.index.json"):
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            write_file(target, read_bytes(path, name, 1 << 28))
    write_file(folder / "config.json", json.dumps(config, indent=2))
    dtype = {"bfloat16": "BF16", "float16": "F16"}.get(shape.dtype, "F32")
    draw = np.random.default_rng(seed)
    tensors = {}
    for spec in expected_tensors(shape):
        values = _drawn(spec, shape, draw, ternary)
        tensors[spec.name] = (dtype, spec.shape, _stored(values, dtype))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a clone: two layers, and widths that keep it small."""
    shape = read_shape(config)
    cut: dict[str, Any] = dict(config_of_first_layers(config, shape.facts, min(LAYERS, shape.num_layers)))
    if shape.num_experts > MOST_EXPERTS:
        experts = max(MOST_EXPERTS, shape.experts_per_token)
        cut = _changed(cut, {"num_experts": experts, "num_local_experts": experts})
    if _body(read_shape(cut)) <= MOST_WEIGHTS:
        return cut
    for width in WIDTHS:
        smaller = _narrowed(cut, width)
        if smaller is not None and _body(read_shape(smaller)) <= MOST_WEIGHTS:
            return smaller
    return cut


def _body(shape: ModelShape) -> int:
    """Weights without those of the vocabulary."""
    return sum(math.prod(spec.shape) for spec in expected_tensors(shape) if spec.role not in ("embedding", "output"))


def _narrowed(config: dict[str, Any], width: int) -> dict[str, Any] | None:
    """The configuration with a smaller hidden size; None where that does not divide into heads of the same size."""
    shape = read_shape(config)
    width += shape.hidden_size % 256
    if width >= shape.hidden_size:
        return None
    group = shape.num_heads // shape.num_kv_heads
    heads = max(1, round(shape.num_heads * width / shape.hidden_size / group)) * group
    if shape.num_heads * shape.head_dim == shape.hidden_size:
        heads, rest = divmod(width, shape.head_dim)
        if rest or heads % group:
            return None
    inner = max(256, round(shape.intermediate_size * width / shape.hidden_size) // 256 * 256)
    inner += shape.intermediate_size % 256
    names = shape.facts.keys
    values = {
        "hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads // group,
        "intermediate_size": inner, "moe_intermediate_size": inner,
    }  # fmt: skip
    renamed = {name: value for key, value in values.items() for name in names.get(key, (key,))}
    return _changed(config, renamed)


def _changed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with other values for keys that it has, at its top and in its text part."""
    found = {key: values.get(key, value) for key, value in config.items()}
    text = config.get("text_config")
    if isinstance(text, Mapping):
        found["text_config"] = {key: values.get(key, value) for key, value in text.items()}
    return found


def _drawn(spec: TensorSpec, shape: ModelShape, draw: np.random.Generator, ternary: bool) -> NDArray[np.float32]:
    """Norms that change nothing; matrices of small numbers, or of three values a matrix."""
    if len(spec.shape) == 1:
        weight = spec.name.endswith("weight") and spec.role.endswith("norm")
        return np.full(spec.shape, 1.0 - shape.facts.norm_offset if weight else 0.0, np.float32)
    if ternary:
        return draw.integers(-1, 2, spec.shape).astype(np.float32) * np.float32(0.03125)
    return draw.standard_normal(spec.shape, np.float32) * np.float32(0.02)


def _stored(values: NDArray[np.float32], dtype: str) -> bytes:
    """Little-endian bytes; BF16 by cutting, which is exact enough for drawn numbers."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
