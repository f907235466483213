"""A checkpoint much larger than the memory it may use converts, and the memory does not grow with the model."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from efficli.families import expected_tensors, read_shape
from tests.pico import write_llama, write_raw

CONVERT = """
import json, resource, sys
from pathlib import Path
from efficli.checkpoint import open_checkpoint
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops import ggml

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

model, out, kinds, limited = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4] == "limited"
for name in kinds:
    ggml.prepare("Q6_K" if name == "Q4_K_M" else name)
ckpt = open_checkpoint(model)
before = status("VmRSS:")
if limited:
    limit = status("VmSize:") + ckpt.nbytes // 3
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
metadata, tensors, _ = layout(read_shape(ckpt.config), ckpt)
metadata["general.architecture"] = string("llama")
files = [
    (out / f"{name}.gguf", metadata, choose_types(metadata, tensors, TypeRequest(type=name))) for name in kinds
]
written = write_files(ckpt, tensors, files, threads=2)
print(json.dumps({"grown": status("VmHWM:") - before, "nbytes": ckpt.nbytes, "out": [f.sha256 for f in written]}))
"""


def big_llama(folder, layers, hidden=1024, ffn=2816):
    """A Llama whose bfloat16 weights are one random pattern repeated: written in no time and little memory."""
    write_llama(folder, hidden=64, layers=1, ffn=96)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "head_dim": hidden // 4,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    header, offset = {}, 0
    for spec in expected_tensors(read_shape(config)):
        if spec.optional:
            continue
        size = 2 * math.prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [offset, offset + size]}
        offset += size
    weights = np.random.default_rng(0).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    pattern = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shard = folder / "model.safetensors"
    write_raw(shard, json.dumps(header))
    with shard.open("ab") as file:
        for start in range(0, offset, len(pattern)):
            file.write(pattern[: offset - start])
    return folder


def convert(model, out, kinds, limited):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CONVERT, str(model), str(out), kinds, "limited" if limited else "free"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_checkpoint_three_times_its_memory_converts(tmp_path):
    """Address space after imports and a third of the checkpoint's bytes; the same bytes as without a limit."""
    model = big_llama(tmp_path / "model", layers=10)
    limited = convert(model, tmp_path / "limited", "F16,Q8_0", True)
    assert limited["nbytes"] > 220e6
    free = convert(model, tmp_path / "free", "F16,Q8_0", False)
    assert limited["out"] == free["out"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    small, large = (
        convert(big_llama(tmp_path / str(layers), layers), tmp_path / f"out-{layers}", "F16,Q4_0", False)
        for layers in (8, 16)
    )
    assert large["nbytes"] > 1.8 * small["nbytes"]
    assert large["grown"] < 1.1 * small["grown"] + 4e6
    assert large["grown"] < 100e6
