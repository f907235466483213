"""A config.json of transformers 5 in the words of transformers 4, which reads past those it does not know.

Given `rope_parameters`, transformers 4 takes its default frequencies and no scaling, without a warning: an origin run
like that would be another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def config_for(transformers: Any, root: Path) -> Any | None:
    """The configuration to load a model with; None where the installed transformers reads config.json as it is."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return None
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    if not any("rope_parameters" in part for part in (config, config.get("text_config") or {})):
        return None
    read = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    return type(read).from_dict(in_old_words(config))


def in_old_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and their like instead of `rope_parameters`; nested configurations too."""
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    if isinstance(old.get("text_config"), Mapping):
        old["text_config"] = in_old_words(old["text_config"])
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return old
    if "full_attention" in parameters:  # Gemma 3: one set for each kind of layer
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    scaling = dict(parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = scaling.pop(key, None)
        if value is not None:
            old[key] = value
    kind = scaling.get("rope_type", "default")
    if kind == "longrope":
        if "original_max_position_embeddings" in scaling:
            old["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        if config.get("model_type") == "phi3":  # its class refuses any other key
            scaling = {"type": kind, **{key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling}}
    old["rope_scaling"] = None if kind == "default" else scaling
    return old
