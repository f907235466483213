"""Load a checkpoint into transformers in float32, with every weight from the checkpoint.

Hugging Face transformers is the definition of what a checkpoint computes; code of the checkpoint itself is never run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from efficli.errors import CheckpointError, MissingExtra
from efficli.network.transformers4 import config_for


def torch_is_installed() -> bool:
    """Whether PyTorch and transformers are there; neither is imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def libraries() -> tuple[Any, Any]:
    """The modules torch and transformers, quiet; MissingExtra without them."""
    if not torch_is_installed():
        raise MissingExtra("torch and transformers", "torch")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def load(loader: Any, root: Path) -> Any:
    """A float32 model in evaluation mode from a local directory, by one of transformers' `AutoModel` classes.

    CheckpointError: transformers cannot load it, or a tensor is missing, which it would fill with random numbers.
    """
    torch, transformers = libraries()
    try:
        model, found = loader.from_pretrained(
            root,
            config=config_for(transformers, root),
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers could not load it: {line}", where=str(root)) from error
    missing = sorted(name for name in found["missing_keys"] if "pooler." not in name)
    if missing:
        raise CheckpointError(f"missing {len(missing)} tensors: {', '.join(missing[:3])}", where=str(root))
    return model.eval()
