"""Record what llama.cpp's own converter makes of the reference and its twin: tensor hashes and metadata.

`pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36`, unpack it, then
`python scripts/converter_hashes.py .../vendor/llama.cpp` writes tests/export/converter_hashes.json, which a test
compares with our files. The converter knows pre-tokenizers by a hash of token ids; ours are registered as gpt-2.
Needs torch, transformers and sentencepiece.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = REPOSITORY / "tests" / "export" / "converter_hashes.json"
RUN = """
import runpy, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + "/gguf-py")
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", {model!r}, "--outfile", {out!r}, "--outtype", {kind!r}]
runpy.run_path({root!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def contents(path: Path) -> dict[str, Any]:
    """Metadata (long arrays as hashes) and, per tensor, type, shape and SHA-256 of the data."""
    reader = GGUFReader(path)
    fields = {}
    for name, field in reader.fields.items():
        value = field.contents()
        if isinstance(value, list) and len(value) > 32:
            value = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        fields[name] = value
    tensors = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape], hashlib.sha256(t.data.tobytes()).hexdigest()]
        for t in reader.tensors
    }
    return {"metadata": fields, "tensors": tensors}


def main() -> None:
    """Convert both checkpoints to F32, F16 and BF16 and write the hashes."""
    root = str(Path(sys.argv[1]).resolve())
    found: dict[str, Any] = {}
    for model, name in (("checkpoint", "reference"), ("twin", "reference-twin")):
        folder = REPOSITORY / "efficli" / "reference" / model
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        found[model] = {"model.safetensors": weights}
        for kind in ("f32", "f16", "bf16"):
            with tempfile.TemporaryDirectory() as work:
                out, named = Path(work) / "model.gguf", Path(work) / name
                named.symlink_to(folder)  # the converter takes the model's name from the folder
                code = RUN.format(root=root, model=str(named), out=str(out), kind=kind)
                subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
                found[model][kind] = contents(out)
    OUT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
