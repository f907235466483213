"""Train the reference checkpoint: `python -m efficli.reference.train --work DIR --tokens 20M`.

Tokenizer (byte-level BPE, GPT-2's pre-tokenizer), data and weights come from the text of `corpus`. Matrices are
trained by Muon (Jordan et al. 2024), embeddings and norms by AdamW, under a warm-up, constant, linear-decay
schedule over tokens; the sequence grows from 256 to 2048 so that most tokens are cheap. State is written whole
or not at all every few minutes: a killed run goes on where it was, and `--init` starts a warm restart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F

from efficli.reference.corpus import Document, documents
from efficli.reference.network import TWIN, Llama, Shape

END = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>")
"""Marks of a chat turn; only the twin has them, as added tokens past its BPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does: `tokens` in all, `batch` tokens a step, peak rates, and where the decay begins."""

    tokens: int
    batch: int = 16384
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    warmup: float = 0.02
    decay_from: float = 0.55
    code_share: float = 0.82
    seed: int = 0

    def rate(self, done: int) -> float:
        """Multiplier of the learning rates after `done` tokens."""
        at = done / self.tokens
        if at < self.warmup:
            return max(at, 1 / 1000) / self.warmup
        return 1.0 if at < self.decay_from else max(0.0, (1 - at) / (1 - self.decay_from))

    def sequence(self, done: int) -> int:
        """Sequence length after `done` tokens."""
        at = done / self.tokens
        return 256 if at < 0.3 else 512 if at < 0.7 else 1024 if at < 0.92 else 2048


def train_tokenizer(found: list[Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the train slice; `END` is id 0, and is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (d.text for d in found if d.slice == "train"),
        trainers.BpeTrainer(
            vocab_size=vocab_size - (0 if vocab_size == Shape().vocab_size else len(TURNS)),
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if vocab_size < Shape().vocab_size:  # the twin speaks in turns
        tokenizer.add_special_tokens(list(TURNS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return tokenizer


def prepare(work: Path, shape: Shape) -> None:
    """Write tokenizer.json and tokens.npz into `work`, once: with them a run needs no text, on any machine."""
    if (work / "tokens.npz").exists():
        return
    found = documents()
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(found, shape.vocab_size).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    arrays: dict[str, NDArray[np.uint16 | np.int64]] = {}
    for kind in ("code", "prose"):
        texts = [d.text for d in found if d.slice == "train" and d.kind == kind]
        encoded = [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)]
        arrays[kind] = np.concatenate(encoded)
        arrays[f"{kind}_ends"] = np.cumsum([len(e) for e in encoded])
    with (work / "tokens.partial").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    (work / "tokens.partial").replace(work / "tokens.npz")


class Batches:
    """Packed token batches; documents are shuffled anew each epoch, and END stands before each of them."""

    def __init__(self, tokens: Path, plan: Plan, done: int) -> None:
        self.random = np.random.default_rng(plan.seed + done)
        self.code_share = plan.code_share
        self.queue: dict[str, NDArray[np.int64]] = {}
        with np.load(tokens) as arrays:
            self.ids = {
                kind: np.split(arrays[kind].astype(np.int64), arrays[f"{kind}_ends"][:-1]) for kind in ("code", "prose")
            }

    def row(self, kind: str, length: int) -> NDArray[np.int64]:
        """The next `length` + 1 ids of one kind."""
        queue = self.queue.get(kind, np.zeros(0, np.int64))
        if len(queue) < length + 1:
            order = self.random.permutation(len(self.ids[kind]))
            queue = np.concatenate([queue, *(self.ids[kind][i] for i in order)])
        self.queue[kind] = queue[length:]
        return queue[: length + 1]

    def batch(self, tokens: int, length: int) -> torch.Tensor:
        """(tokens / length, length + 1) int64."""
        kinds = self.random.random(tokens // length) < self.code_share
        return torch.from_numpy(np.stack([self.row("code" if code else "prose", length) for code in kinds]))


def optimizers(model: Llama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [
        torch.optim.Muon(matrices, lr=plan.muon_rate, momentum=0.95, weight_decay=0.03),
        torch.optim.AdamW(others, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Save under another name, then rename."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(work: Path, plan: Plan, shape: Shape, init: Path | None, device: str, save_seconds: float = 240.0) -> None:
    """Run `plan` in `work`, going on from its state if there is one; the state is what it leaves behind."""
    if init and not (work / "tokenizer.json").exists():
        shutil.copyfile(init.parent / "tokenizer.json", work / "tokenizer.json")
    prepare(work, shape)
    torch.manual_seed(plan.seed)
    model = Llama(shape).to(device)
    rules = optimizers(model, plan)
    done, state_file = 0, work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for rule, saved in zip(rules, state["rules"], strict=True):
            rule.load_state_dict(saved)
        done = state["done"]
    elif init:
        model.load_state_dict({k: v.float() for k, v in load_file(init).items()}, strict=False)

    batches = Batches(work / "tokens.npz", plan, done)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    step_loss = torch.compile(loss_of)
    saved_at = started = time.monotonic()
    losses: list[float] = []
    with (work / "log.jsonl").open("a") as log:
        while done < plan.tokens:
            for rule, peak in zip(rules, (plan.muon_rate, plan.adam_rate), strict=True):
                for group in rule.param_groups:
                    group["lr"] = peak * plan.rate(done)
            loss = step_loss(batches.batch(plan.batch, plan.sequence(done)).to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for rule in rules:
                rule.step()
                rule.zero_grad()
            done += plan.batch
            losses.append(loss.item())
            if len(losses) == 20:
                row = {"tokens": done, "loss": round(float(np.mean(losses)), 4), "s": round(time.monotonic() - started)}
                print(json.dumps(row), file=log, flush=True)
                losses.clear()
            if time.monotonic() - saved_at > save_seconds or done >= plan.tokens:
                rule_states = [rule.state_dict() for rule in rules]
                write_whole(state_file, {"model": model.state_dict(), "rules": rule_states, "done": done})
                saved_at = time.monotonic()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="state, log and tokenizer live here")
    parser.add_argument("--tokens", type=float, default=20, help="millions of tokens")
    parser.add_argument("--batch", type=int, default=16384, help="tokens a step")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--decay-from", type=float, default=0.55, help="share of the tokens before the decay")
    parser.add_argument("--init", type=Path, help="model.safetensors to start from, its tokenizer beside it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--twin", action="store_true", help="the awkward twin of the tests instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        tokens=int(args.tokens * 1e6),
        batch=args.batch,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        decay_from=args.decay_from,
        seed=args.seed,
    )
    train(args.work, plan, TWIN if args.twin else Shape(), args.init, args.device)


if __name__ == "__main__":
    main()
