"""Tiny checkpoints as a network's tests need them: experts stacked, an altered copy, the whole Gemma 3."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests import models

STACKED = ("stacked",) if int(version("transformers").partition(".")[0]) >= 5 else ()
"""transformers 4 loads experts from a tensor each only."""


def altered(folder: Path, target: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Path:
    """A copy of a checkpoint whose tensors are what `change` makes of them."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    arrays = change(load_file(next(folder.glob("*.safetensors"))))
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    save_file(arrays, target / "model.safetensors", metadata={"format": "pt"})
    return target


def stacked(arrays: dict[str, Any]) -> dict[str, Any]:
    """The experts of each layer in two tensors, as transformers 5 holds them in memory."""
    parts: dict[str, dict[str, dict[int, NDArray[np.float32]]]] = {}
    kept = {}
    for name, values in arrays.items():
        base, found, rest = name.partition(".experts.")
        if not found:
            kept[name] = values
            continue
        expert, part, _ = rest.split(".")
        parts.setdefault(f"{base}.experts", {}).setdefault(part, {})[int(expert)] = values
    for base, of in parts.items():
        gate, up, down = (
            np.stack([of[f"{part}_proj"][e] for e in range(len(of["up_proj"]))]) for part in ("gate", "up", "down")
        )
        kept |= {f"{base}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{base}.down_proj": down}
    return kept


def whole_gemma3(folder: Path) -> Path:
    """A Gemma 3 with its vision tower, whose layers have the same names as those of the text."""
    import torch
    import transformers

    text = models.SMALL | models.FAMILIES["gemma3"][1]
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    models.perturb(model)
    model.save_pretrained(folder)
    return folder
