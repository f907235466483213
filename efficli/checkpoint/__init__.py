"""Hugging Face checkpoints: headers first, weights on demand, nothing run and nothing read outside their folder."""

from __future__ import annotations

from efficli.checkpoint.header import TensorRef
from efficli.checkpoint.opening import open_checkpoint, open_without_weights
from efficli.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint", "TensorRef", "open_checkpoint", "open_without_weights"]
