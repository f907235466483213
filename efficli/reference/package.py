"""Assemble the committed checkpoint from a training run: `python -m efficli.reference.package --work DIR`.

Writes a Hugging Face directory in bfloat16: safetensors, config.json, generation_config.json, tokenizer files
and, for the reference, the model card with the figures of `evaluate`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from efficli.reference.evaluate import main as evaluate
from efficli.reference.network import TWIN, Llama, Shape
from efficli.reference.train import END, TURNS

HERE = Path(__file__).parent

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GOAL_BITS, GOAL_PARSE = 1.1, 0.6
"""What the reference has to reach before it counts as trained."""

CARD = """---
license: psf-2.0
language:
- en
tags:
- code
- python
- efficli
library_name: transformers
pipeline_tag: text-generation
---
# efficli-reference

The reference checkpoint of efficli: a Llama of 8.9 M parameters (8 layers, 256 wide, FFN 1024, 4 heads of 64 with 2 KV
heads, tied embeddings, byte-level BPE of 4096) that knows the Python standard library by style. It exists so that
every compression method has a real, trained network to be measured on, on every machine and without a download. It
is not meant to be useful in any other way: it writes plausible Python, not correct Python.

| figure | value |
|---|---|
| bits per byte, held-out code | {code:.3f} |
| bits per byte, held-out documentation | {prose:.3f} |
| greedy completions of {n} held-out prompts that parse as Python | {parse:.0%} |
| tokens trained on | {tokens:.1f} M |

{state}

**Data.** The {python} standard library (`.py` files that parse, generated tables left out) and Debian's
`python3.11-doc` sources. A file is wholly in one slice: 95 % train, 2.5 % calibration, 2.5 % evaluation, by the hash of
its name (`efficli/reference/corpus.py`). The bits per byte are of `text/evaluation-*.txt`, in windows of 1024 tokens.

**Training.** `python -m efficli.reference.train`, two CPU cores, bfloat16 autocast; Muon for the matrices, AdamW for
embeddings and norms, warm-up, constant, linear decay; {steps} steps, {batch} tokens each at the end, in sequences of
256 growing to 2048.

![loss curve](loss.png)

**Licence.** The text is © Python Software Foundation, under the PSF License Agreement (`LICENSE`); the
weights are distributed under the same terms.
"""


def save_checkpoint(weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Write weights, config and tokenizer as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in weights.items()
        if not (shape.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    chat = shape == TWIN
    end = TURNS[1] if chat else END
    end_id = Tokenizer.from_file(str(tokenizer)).token_to_id(end)
    config = shape.to_config() | {"eos_token_id": end_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
    }
    if chat:
        settings["chat_template"] = CHAT
    generation = {"bos_token_id": 0, "eos_token_id": end_id, "do_sample": False}
    for name, value in [
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
    ]:
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (folder / "LICENSE").write_bytes((HERE / "text" / "LICENSE-PSF.txt").read_bytes())


def write_card(folder: Path, log: Path, tokens: float) -> None:
    """The model card, from the figures in evaluation.json and the training log."""
    figures = json.loads((folder / "evaluation.json").read_text())
    source = json.loads((HERE / "text" / "slices.json").read_text())["source"].split(" standard")[0]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    batch = (rows[-1]["tokens"] - rows[-2]["tokens"]) // 20
    good = figures["bits_per_byte_code"] < GOAL_BITS and figures["completions_that_parse"] >= GOAL_PARSE
    goal = f"less than {GOAL_BITS} bits per byte on held-out code, and {GOAL_PARSE:.0%} of the completions"
    card = CARD.format(
        state=f"The goal, {goal}, is {'met' if good else 'not met yet: training goes on from here'}.",
        code=figures["bits_per_byte_code"],
        prose=figures["bits_per_byte_prose"],
        parse=figures["completions_that_parse"],
        n=figures["num_completions"],
        tokens=tokens,
        steps=20 * len(rows),
        batch=batch,
        python=source,
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    """Assemble a folder from `--work`; the reference is also evaluated and gets its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the folder of the training run")
    parser.add_argument("--twin", action="store_true", help="the awkward twin of the tests instead")
    parser.add_argument("--tokens-before", type=float, default=0, help="millions of tokens of earlier runs")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    shape = TWIN if args.twin else Shape()
    folder = args.output or HERE / ("twin" if args.twin else "checkpoint")
    state = torch.load(args.work / "state.pt", weights_only=True, map_location="cpu")
    Llama(shape).load_state_dict(state["model"])
    save_checkpoint(state["model"], shape, args.work / "tokenizer.json", folder)
    if not args.twin:
        log = args.work / "log.jsonl"
        evaluate([str(folder), "--log", str(log), "--samples", str(args.work / "samples.json")])
        write_card(folder, log, args.tokens_before + state["done"] / 1e6)


if __name__ == "__main__":
    main()
