"""Judge a GGUF file's metadata: what is missing, layers against per-layer values, the vocabulary against its rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from efficli.export.gguf.parse import GgufHeader
from efficli.inspection.report import Finding, ModelReport, printable

_BLOCK = re.compile(r"blk\.(\d+)\.")
_PER_LAYER = (
    "attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.sliding_window_pattern",
    "attention.recurrent_layers", "attention.compress_ratios", "swiglu_clamp_exp", "swiglu_clamp_shexp",
    "xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps", "expert_used_count", "activation_sparsity_scale",
)  # fmt: skip
"""Keys whose value may be an array with one item for each layer."""
_TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask", "fim_pre", "fim_suf")
_PLAIN = frozenset({"F32", "F16", "BF16"})
_NO_HEADS = re.compile(r"rwkv|mamba|clip|wavtokenizer")


def check_missing(report: ModelReport, header: GgufHeader) -> None:
    """Keys that a runtime or a person needs."""
    metadata = header.metadata
    runtime = [key for key in _needed(header) if metadata.get(key) in (None, "", [])]
    person = [key for key in ("general.name", "general.license") if metadata.get(key) in (None, "")]
    if "general.license" in person and metadata.get("general.license.name"):
        person.remove("general.license")
    findings = []
    if runtime:
        hint = "convert the model again; gguf-new-metadata (pip install gguf) adds single keys"
        findings.append(Finding(check="metadata", message=f"runtimes need {', '.join(runtime)}: missing", hint=hint))
    if person:
        hint = "whoever gets the file cannot tell what it is or may be used for: gguf-new-metadata adds them"
        findings.append(Finding(check="metadata", message=f"people need {', '.join(person)}: missing", hint=hint))
    wrong = [key for key, value in metadata.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        names = ", ".join(printable(key, 60) for key in wrong[:5])
        hint = "every number that comes out will be NaN: convert the model again"
        findings.append(Finding(check="metadata", message=f"not a finite number: {names}", hint=hint))
    report.judge("metadata", findings, f"{len(metadata)} keys, none that is needed is missing")


def _needed(header: GgufHeader) -> Iterator[str]:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    yield "general.architecture"
    if not isinstance(arch, str):
        return
    yield from (f"{arch}.{key}" for key in ("block_count", "context_length", "embedding_length"))
    if not _NO_HEADS.match(arch):
        yield f"{arch}.attention.head_count"
    if any(tensor.type not in _PLAIN for tensor in header.tensors.values()):
        yield from ("general.file_type", "general.quantization_version")
    yield "tokenizer.ggml.model"
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none"):
        return
    yield from ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    if kind == "gpt2":
        yield from ("tokenizer.ggml.pre", "tokenizer.ggml.merges")
    if metadata.get(f"{arch}.attention.causal") is not False:
        yield "tokenizer.ggml.eos_token_id"


def check_layers(report: ModelReport, header: GgufHeader) -> None:
    """`block_count` against the layers that have tensors, and against arrays with one value for each layer."""
    arch = header.metadata.get("general.architecture")
    count = header.metadata.get(f"{arch}.block_count")
    if type(count) is not int:
        report.saw("layers", "block_count is missing", "skipped")
        return
    found = []
    there = {int(match[1]) for name in header.tensors if (match := _BLOCK.match(name)) and len(match[1]) < 7}
    gaps = sorted(set(range(min(count, 1 << 16))) - there)
    beyond = sorted(layer for layer in there if layer >= count)
    hint = "a tool that drops layers has to number the rest anew and to correct block_count: convert again"
    if there and (gaps or beyond or count > 1 << 16):
        what = f"has no tensors for layer {gaps[0]}" if gaps else f"has tensors for layer {beyond[0]}"
        found.append(Finding(check="layers", message=f"block_count is {count}, and the file {what}", hint=hint))
    lists = 0
    for key in _PER_LAYER:
        value = header.metadata.get(f"{arch}.{key}")
        if isinstance(value, list):
            lists += 1
            if len(value) != count:
                message = f"{arch}.{key} has {len(value)} values, block_count is {count}"
                found.append(Finding(check="layers", message=message, hint=hint))
    report.judge("layers", found, f"{count}, all with tensors" + (f"; {lists} lists of values agree" if lists else ""))


def check_vocabulary(report: ModelReport, header: GgufHeader) -> None:
    """The tokens against the embedding's rows, and everything that is said of single tokens."""
    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    embedding = header.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None
    if not isinstance(tokens, list):
        report.saw("vocabulary", f"no tokens in the file; the embedding has {rows or 'no'} rows", "info")
        return
    count = len(tokens)
    said = f"{count} tokens, {rows} rows of the embedding" if rows is not None else f"{count} tokens"
    report.judge("vocabulary", list(_vocabulary(metadata, count, rows, header)), said)


def _vocabulary(metadata: Mapping[str, Any], count: int, rows: int | None, header: GgufHeader) -> Iterator[Finding]:
    again = "convert the model again, with the tokenizer that belongs to it"

    def finding(message: str) -> Finding:
        return Finding(check="vocabulary", message=message, hint=again)

    if rows is not None and rows != count:
        yield finding(f"tokenizer has {count} ids, embedding {rows} rows")
    output = header.tensors.get("output.weight")
    if output is not None and output.shape[0] != count:
        yield finding(f"tokenizer has {count} ids, output.weight {output.shape[0]} rows")
    for key in ("scores", "token_type"):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, list) and len(value) != count:
            yield finding(f"tokenizer.ggml.{key} has {len(value)} values, there are {count} tokens")
    for name in _TOKEN_IDS:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < count):
            yield finding(f"tokenizer.ggml.{name}_token_id is {printable(value, 20)}, there are {count} tokens")
