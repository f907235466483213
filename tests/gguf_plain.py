"""Write output tensors as float32 with the gguf package: a second, plain writer for tests of what goes into a file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from efficli.checkpoint import Checkpoint
from efficli.export.gguf.layout import Field, OutTensor, string
from efficli.export.gguf.source import rows, to_float32

NO_TOKENIZER = {"tokenizer.ggml.model": string("none")}


def write_f32(
    path: Path, arch: str, metadata: dict[str, Field], tensors: list[OutTensor], ckpt: Checkpoint, *, step: int = 7
) -> Path:
    """A GGUF file without a tokenizer; tensors are read `step` rows at a time, so that seams would show."""
    writer = gguf.GGUFWriter(path, arch)
    for key, field in (metadata | NO_TOKENIZER).items():
        writer.add_key_value(key, field.value, field.type, field.item)
    for tensor in tensors:
        total = tensor.num_elements // tensor.shape[-1]
        parts = [to_float32(rows(ckpt, tensor, at, min(at + step, total))) for at in range(0, total, step)]
        writer.add_tensor(tensor.name, np.concatenate(parts).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
