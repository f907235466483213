"""Whole checkpoints of every family: a tiny perturbed model with a trained tokenizer of the kind the family ships."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficli.data import committed
from efficli.export.gguf.pretokenizer_table import TABLE
from tests import models
from tests.pico import TEXT
from tests.vocabs import CHAT_TEMPLATE, CORPUS, train_bpe, train_sentencepiece

ROWS = {row.name: row for row in TABLE}
SPACE = "\u2581"
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
"""What tokenizer.json of Llama 2, Mistral and Phi 3 on the hub says, and transformers 4 writes: a space before every
piece of text. transformers 5 writes Metaspace: a space before the text only."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a family's checkpoint looks like: the tokenizer and what differs from `models.FAMILIES`."""

    family: str
    tokenizer: str
    """The name of a pre-tokenizer (byte-level pairs), or `spm`, `gemma`, `wordpiece`."""
    bos: str | None = None
    """Put before every text."""
    folder: str = "Tiny"
    """The model's name; llama.cpp drops white space after Phi 3's tokens where it is in there."""
    nfc: bool = False
    model: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "llama 2": Kind(family="llama", tokenizer="spm"),
    "llama 3": Kind(family="llama", tokenizer="llama-bpe", bos="<s>", model={"rope_parameters": models.LLAMA3}),
    "smollm": Kind(family="llama", tokenizer="smollm", model={"tie_word_embeddings": True}),
    "mistral": Kind(family="mistral", tokenizer="spm"),
    "qwen2": Kind(family="qwen2", tokenizer="qwen2", nfc=True),
    "qwen3": Kind(family="qwen3", tokenizer="qwen2", nfc=True, model={"rope_parameters": models.YARN}),
    "qwen3_moe": Kind(family="qwen3_moe", tokenizer="qwen2", nfc=True),
    "gemma2": Kind(family="gemma2", tokenizer="gemma"),
    "gemma3": Kind(family="gemma3", tokenizer="gemma"),
    "phi3": Kind(family="phi3", tokenizer="spm", folder="Phi-3-tiny", model={"sliding_window": None}),
    "gpt2": Kind(family="gpt2", tokenizer="gpt-2"),
    "granite": Kind(family="granite", tokenizer="smollm"),
    "olmo2": Kind(family="olmo2", tokenizer="smaug-bpe"),
    "smollm3": Kind(family="smollm3", tokenizer="llama-bpe"),
    "bitnet": Kind(family="bitnet", tokenizer="llama-bpe", bos="<s>"),
    "bert": Kind(family="bert", tokenizer="wordpiece", model={"hidden_act": "gelu_new"}),
}
"""Granite cuts words as SmolLM does, OLMo 2 as GPT-4 does (llama.cpp: smaug-bpe), the others as their names say."""


def text() -> str:
    """Code and prose of some 9000 characters: more than 512 tokens in every tokenizer here."""
    return TEXT + committed("evaluation-prose")[:4000] + committed("evaluation-code")[:4000]


def write(folder: Path, kind: Kind, *, dtype: str = "float32", max_shard_size: str = "1GB", **overrides: Any) -> Any:
    """Save model and tokenizer as the installed transformers does; the model, with the weights that were saved."""
    tokenizer = write_tokenizer(folder, kind)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if kind.family == "gpt2":
        del special["pad_token_id"]
    rows = -(-(len(tokenizer) + 1) // 32) * 32  # padded, as most are
    model = models.build(kind.family, **(special | {"vocab_size": rows} | kind.model | overrides))
    import torch

    stored = getattr(torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).float()
    # A copy: the frequencies of the rotary embedding must not be rounded in the model that is compared with.
    copy.deepcopy(model).to(stored).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_tokenizer(folder: Path, kind: Kind) -> Any:
    """Train a tokenizer and save it; transformers' object."""
    import transformers

    if kind.tokenizer in ("spm", "gemma"):
        tokenizer = _sentencepiece(folder, gemma=kind.tokenizer == "gemma")
    elif kind.tokenizer == "wordpiece":
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_wordpiece(), **names)
    else:
        tokenizer = _byte_level(kind)
    if kind.family == "phi3":
        added = transformers.AddedToken
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
        tokenizer.add_tokens([added("</s>", rstrip=True, normalized=False)])
        turns = [added(f"<|{name}|>", rstrip=True) for name in ("user", "end", "assistant")]
        tokenizer.add_tokens(turns, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _sentencepiece(folder: Path, *, gemma: bool) -> Any:
    """As Llama 2's (a space before the text) or Gemma's (none, runs of spaces and line ends as tokens)."""
    import transformers

    source = folder.with_name(folder.name + "-source")
    if not gemma:
        train_sentencepiece(source)
        return transformers.LlamaTokenizerFast.from_pretrained(str(source), add_bos_token=True)
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>"}
    turns, runs = ["<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n", SPACE * 2, SPACE * 4]
    train_sentencepiece(source, add_dummy_prefix=False, control_symbols=turns, user_defined_symbols=runs, **ids)
    tokenizer = transformers.GemmaTokenizerFast
    return tokenizer.from_pretrained(str(source), add_bos_token=True, mask_token=None)


def _byte_level(kind: Kind) -> Any:
    """A byte-level BPE with the pre-tokenizer's rule, a chat template and its end-of-turn token."""
    import transformers
    from tokenizers import normalizers, processors

    built = train_bpe(ROWS[kind.tokenizer], normalizer=normalizers.NFC() if kind.nfc else None)
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<tool_call>"])
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind.bos:
        start = processors.TemplateProcessing(
            single=f"{kind.bos} $A",
            pair=f"{kind.bos} $A {kind.bos} $B:1",
            special_tokens=[(kind.bos, built.token_to_id(kind.bos))],
        )
        built.post_processor = processors.Sequence([built.post_processor, start])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token=kind.bos or ("<|endoftext|>" if kind.family in ("gpt2", "granite") else None),
        eos_token="<|im_end|>" if kind.nfc else "<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _wordpiece() -> Any:
    """As BERT's without case."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    built = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    built.train_from_iterator(CORPUS, trainer)
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return built


def as_transformers_4(folder: Path, target: Path) -> Path:
    """The same checkpoint in the files of transformers 4: config, tokenizer settings, template, tokenizer.model."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(models.as_transformers_4(config), indent=2))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if writes_metaspace(folder):
        tokenizer |= {"normalizer": PREPEND, "pre_tokenizer": None}
        (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("backend", "is_local", "local_files_only", "vocab_file", "extra_special_tokens"):
        settings.pop(key, None)
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["added_tokens_decoder"] = {
        str(row["id"]): {k: v for k, v in row.items() if k != "id"} for row in tokenizer["added_tokens"]
    }
    if (folder / "chat_template.jinja").exists():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text()
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    names = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
    (target / "special_tokens_map.json").write_text(json.dumps(names))
    source = folder.with_name(folder.name + "-source") / "tokenizer.model"
    if source.exists():
        (target / "tokenizer.model").write_bytes(source.read_bytes())
    return target


def writes_metaspace(folder: Path) -> bool:
    """Whether tokenizer.json puts a space before the text only, as transformers 5 writes Llama's."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    return (tokenizer["pre_tokenizer"] or {}).get("type") == "Metaspace"
