"""Folding is exact in every family, and the scales that are chosen lose no more than none would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.catalog import run_method
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.writer import write_checkpoint
from efficli.errors import CheckpointError, UsageError
from efficli.folding import Fold, find_folds, fold_values, folded
from efficli.method import Context
from efficli.ops import ggml
from efficli.precision.scales import choose_scales, quantized
from efficli.precision.view import Calibration
from efficli.progress import Silent
from efficli.quantize.awq import Config
from tests import models
from tests.network.checkpoints import STACKED, altered, stacked, whole_gemma3
from tests.pico import write_llama

Float64 = NDArray[np.float64]
NAME = "quantize.awq"


def save(family: str, folder: Path, **overrides: Any) -> Path:
    if family == "stacked":
        return altered(save("qwen3_moe", folder / "each"), folder / "model", stacked)
    if family == "gemma3 with vision":
        return whole_gemma3(folder / "model")
    return models.save(models.build(family, **overrides), folder / "model")


def logits(folder: Path, **options: Any) -> Float64:
    """Of a text, by transformers; in float64 where it can, so that what differs is what the weights say."""
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"dtype": torch.float32 if "Moe" in architecture else torch.float64} | options
    model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager", **options).eval()
    ids = torch.tensor([np.random.default_rng(0).integers(3, models.VOCAB, 48).tolist()])
    with torch.no_grad():
        out = model(ids)
    values = out.logits if hasattr(out, "logits") else out.last_hidden_state
    found: Float64 = values[0].double().numpy()
    return found


def difference(found: Float64, base: Float64) -> float:
    """Largest, relative to the largest logit."""
    return float(np.abs(found - base).max() / np.abs(base).max())


def fold_all(folder: Path, target: Path, folds: Sequence[Fold] | None = None) -> Path:
    """The checkpoint with random scales from a twentieth to twenty on each of its folds, or on these."""
    ckpt = open_checkpoint(str(folder))
    random = np.random.default_rng(1)
    folds = find_folds(ckpt)[0] if folds is None else folds
    scales = [np.exp(random.uniform(-3, 3, fold.width)) for fold in folds]
    target.mkdir()
    write_checkpoint(ckpt, target, folded(ckpt, folds, scales))
    return target


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in (*models.FAMILIES, *STACKED, "gemma3 with vision")),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_the_network_computes_the_same(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Every fold at once, by factors of up to 400 within one."""
    base = save(family, tmp_path, **overrides)
    new = fold_all(base, tmp_path / "new")
    assert difference(logits(new), logits(base)) < (1e-4 if family in ("qwen3_moe", "stacked") else 1e-5)
    before, after = open_checkpoint(str(base)), open_checkpoint(str(new))
    touched = {name for fold in find_folds(before)[0] for name in fold.tensors}
    for name in before.tensors:
        assert np.array_equal(before.read(name), after.read(name)) == (name not in touched), name
        assert after.tensors[name].dtype == "F32"
