"""The origin of a certificate computes the same whichever transformers wrote config.json and whichever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.bench.origin import TorchModel
from efficli.network.transformers4 import in_old_words
from tests import models
from tests.models import LINEAR, LLAMA3, YARN, as_transformers_4, longrope

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen3", {"rope_parameters": YARN}),
    (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
                "full_attention": LINEAR | {"rope_theta": 3e4},
            }
        },
    ),
    ("llama", {"head_dim": 16, "rope_parameters": longrope(8, 256, factor=4.0)}),
    ("phi3", {"rope_parameters": longrope(8, 256), "original_max_position_embeddings": 256}),
]
NAMES = ["theta", "llama3", "yarn", "gemma3", "longrope", "phi3"]


@pytest.mark.parametrize(("family", "overrides"), CASES, ids=NAMES)
def test_both_layouts(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """A config.json with `rope_parameters` means to the installed release what it means to the one that wrote it."""
    import torch

    model = models.build(family, **overrides)
    folder = models.save(model, tmp_path / "model")
    ids = list(range(3, 93)) * 4
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    told = json.loads((folder / "config.json").read_text())
    new = {key: value for key, value in told.items() if not key.startswith(("rope_", "partial_"))}
    new["rope_parameters"] = overrides["rope_parameters"]
    for config in (new, as_transformers_4(told)):
        (folder / "config.json").write_text(json.dumps(config))
        ((_, found),) = TorchModel(folder, threads=1).logit_blocks(ids)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "overrides"), CASES, ids=NAMES)
def test_old_words(family: str, overrides: dict[str, Any]) -> None:
    """Equal to what the tests' own rewriting makes of it, nested or not."""
    names = ("rope_theta", "rope_scaling", "rope_local_base_freq", "original_max_position_embeddings")
    config = {"model_type": family, **overrides}
    old, expected = in_old_words(config), as_transformers_4(config)
    assert {name: old.get(name) for name in names} == {name: expected.get(name) for name in names}
    assert in_old_words({"text_config": config, "x": 1}) == {"text_config": old, "x": 1}
    assert in_old_words({"hidden_size": 3}) == {"hidden_size": 3}
