"""Measure the reference checkpoint: `python -m efficli.reference.evaluate FOLDER --log LOG`.

Two figures decide whether it is good enough to compress: bits per byte on held-out code (documentation beside
it), and the share of greedy completions of held-out prompts that parse as Python. Writes `evaluation.json` and,
given the training log, `loss.png`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import re
import tokenize
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from efficli.reference.network import Llama, Shape
from efficli.reference.slices import TEXT

NUM_PROMPTS = 50
NEW_TOKENS = 128


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """The model in float32, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    if model.shape.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


@torch.inference_mode()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, text: str, context: int = 1024) -> float:
    """Bits per UTF-8 byte of `text`: windows of `context` tokens, the second half of each is scored."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    nats, start, scored = 0.0, 0, 1
    while scored < len(ids):
        window = ids[start : start + context]
        losses = F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="none")
        nats += float(losses[scored - start - 1 :].double().sum())
        scored = start + len(window)
        start += context // 2
    return nats / math.log(2) / len(text.encode())


def prompts(code: str, count: int = NUM_PROMPTS) -> list[str]:
    """Beginnings of top-level functions and classes, evenly spread: up to seven lines that parse, cut inside the body.

    The next line of the source is still of the body: what is asked for is a continuation, not something new.
    """
    starts = [m.start() for m in re.finditer(r"^(?:def|class|async def) ", code, re.MULTILINE)]
    found: list[str] = []
    for start in starts:
        lines = code[start : start + 1200].split("\n")[:-1]
        for keep in range(min(7, len(lines) - 1), 1, -1):
            # no line break at the end: it belongs to one token with the indentation that follows
            prompt, rest = "\n".join(lines[:keep]), lines[keep:]
            inside = (
                rest[0].startswith(" ")
                and lines[keep - 1].strip()
                and not any(line[:1].strip() for line in lines[1:keep])
            )
            if inside and _parses(prompt):
                found.append(prompt)
                break
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)] if step >= 1 else found


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def whole_statements(text: str) -> str:
    """`text` up to its last finished logical line that is not the header of a block without a body."""
    ends: list[tuple[int, bool]] = []
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE and token.string:
                ends.append((token.end[0], last == ":"))
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
                last = token.string
    except (tokenize.TokenError, IndentationError):
        pass  # the unfinished end; a wrong middle is found by the parser afterwards
    while ends and ends[-1][1]:
        ends.pop()
    return "\n".join(text.split("\n")[: ends[-1][0]]) + "\n" if ends else ""


@torch.inference_mode()
def complete(model: Llama, tokenizer: Tokenizer, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """The greedy continuation of `prompt`, up to `new_tokens` tokens or the end of text."""
    ids = tokenizer.encode(prompt).ids
    begin = len(ids)
    for _ in range(new_tokens):
        following = int(model(torch.tensor([ids]))[0, -1].argmax())
        if following == 0:
            break
        ids.append(following)
    return str(tokenizer.decode(ids[begin:]))


def parse_share(model: Llama, tokenizer: Tokenizer, code: str) -> tuple[float, list[dict[str, Any]]]:
    """Share of completions whose whole statements parse and add at least one to the prompt, with the samples."""
    samples = []
    for prompt in prompts(code):
        completion = complete(model, tokenizer, prompt)
        whole = whole_statements(prompt + completion)
        good = len(whole) > len(prompt) + 1 and _parses(whole)
        samples.append({"prompt": prompt, "completion": completion, "parses": good})
    return sum(bool(s["parses"]) for s in samples) / len(samples), samples


def plot(log: Path, out: Path) -> None:
    """The loss curve (nats per token against tokens) as a PNG."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], linewidth=1)
    axes.set(xlabel="tokens trained on (millions)", ylabel="training loss (nats per token)", ylim=(1, 6))
    axes.grid(alpha=0.3)
    figure.savefig(out)


def main(arguments: list[str] | None = None) -> None:
    """Evaluate a folder and write what was found beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=Path, help="log.jsonl of the training run, for the loss curve")
    parser.add_argument("--samples", type=Path, help="write prompts and completions here")
    args = parser.parse_args(arguments)
    model, tokenizer = load(args.folder)
    code, prose = ((TEXT / f"evaluation-{kind}.txt").read_text() for kind in ("code", "prose"))
    share, samples = parse_share(model, tokenizer, code)
    result = {
        "bits_per_byte_code": round(bits_per_byte(model, tokenizer, code), 4),
        "bits_per_byte_prose": round(bits_per_byte(model, tokenizer, prose), 4),
        "completions_that_parse": share,
        "num_completions": len(samples),
        "context": 1024,
    }
    (args.folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.samples:
        args.samples.write_text(json.dumps(samples, indent=1) + "\n")
    if args.log:
        plot(args.log, args.folder / "loss.png")


if __name__ == "__main__":
    main()
