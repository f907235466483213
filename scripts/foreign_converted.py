"""Record what llama.cpp's own converter makes of tiny models of families that efficli does not export.

`pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36`, unpack it, then
`python -m scripts.foreign_converted .../vendor/llama.cpp [NAME ...]` builds a random checkpoint of every configuration
in tests/planning/foreign_tiny.json with transformers, converts it to F16 and writes names, types and shapes of all
tensors and the `{arch}.*` metadata to tests/planning/foreign_converted.json. Vocabularies are the reference's.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from scripts.converter_hashes import RUN

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "tests" / "planning"
TOKENIZER = REPOSITORY / "efficli" / "reference" / "checkpoint"


def build(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint with random weights; config.json is as given, not as transformers completes it."""
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    torch.manual_seed(0)
    architecture = config["architectures"][0]
    model = getattr(transformers, architecture)(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if architecture == "Qwen3NextForCausalLM":  # published checkpoints have a block that predicts a further token
        weights = load_file(folder / "model.safetensors")
        last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
        block = {name: t.clone() for name, t in weights.items() if name.startswith(f"model.layers.{last}.")}
        weights |= {name.replace(f"model.layers.{last}.", "mtp.layers.0."): t for name, t in block.items()}
        weights["mtp.fc.weight"] = torch.zeros(hidden, 2 * hidden)
        weights |= {
            f"mtp.{name}.weight": torch.zeros(hidden)
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def contents(path: Path) -> dict[str, Any]:
    """Metadata of the architecture, with GGUF types, and all tensors: type and shape in numpy's order."""
    reader = GGUFReader(path)
    arch = str(reader.fields["general.architecture"].contents())
    fields = {
        name.removeprefix(arch + "."): [[kind.name for kind in field.types], plain(field.contents())]
        for name, field in reader.fields.items()
        if name.startswith(arch + ".")
    }
    tensors = {t.name: [t.tensor_type.name, [int(n) for n in reversed(t.shape)]] for t in reader.tensors}
    return {"arch": arch, "fields": fields, "tensors": tensors}


def plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def main() -> None:
    """Convert all configurations, or those that are named, and write the table."""
    root = str(Path(sys.argv[1]).resolve())
    configs = json.loads((FOLDER / "foreign_tiny.json").read_text())
    out = FOLDER / "foreign_converted.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    for name in sys.argv[2:] or configs:
        with tempfile.TemporaryDirectory() as work:
            folder, file = Path(work) / name, Path(work) / "model.gguf"
            folder.mkdir()
            build(configs[name], folder)
            code = RUN.format(root=root, model=str(folder), out=str(file), kind="f16")
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            found[name] = contents(file)
    lines = [f" {json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found)]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
