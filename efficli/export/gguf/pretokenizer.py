"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer.json does; found from its structure, not from a hash.

llama.cpp knows the rules that cut text into words before byte pair merges by name (`tokenizer.ggml.pre`). Its own
converter finds the name by hashing token ids, so that every retrained or extended vocabulary is "not recognized". Here
the steps of the tokenizer (splits, digits, byte level) are compared with those that each name stands for
(`pretokenizer_table.py`). Whether the ids agree is measured after writing (`vocab_check.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from efficli.errors import CheckpointError, UnsupportedError, UsageError, did_you_mean
from efficli.export.gguf.pretokenizer_table import ANY_CASE, GPT2, TABLE, PreTokenizer

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("phi-2", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert"), "gpt-2"),
    **dict.fromkeys(("mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "roberta-bpe"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"), "llama-bpe"),
    **dict.fromkeys(("dbrx", "chatglm-bpe"), "smaug-bpe"),
    **dict.fromkeys(("stablelm2", "hunyuan", "megrez", "deepseek-r1-qwen", "kormo", "grok-2", "solar-open"), "qwen2"),
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm", "hy_v4"), "deepseek-v3"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
    **dict.fromkeys(("bailingmoe2", "llada-moe"), "bailingmoe"),
    "cohere2moe": "tiny_aya",
    "gemma4": "sarvam-moe",
}
"""Names that llama.cpp treats like a name of the table (some differ in how text is put together again)."""

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that change only text that is not in that Unicode form already."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What a tokenizer.json does to text before byte pair merges."""

    normalizers: tuple[str, ...]
    """Names, with their arguments where they have any."""
    splits: tuple[str, ...]
    """Canonical regular expressions that isolate what they match, or a name for a step that is none."""
    byte_level: bool
    prefix_space: bool
    """A space is put before the text."""

    def describe(self) -> str:
        """One line for a message."""
        steps = [*self.normalizers, *self.splits]
        if self.prefix_space:
            steps.append("a space before the text")
        return " → ".join([*steps, "bytes" if self.byte_level else "characters"])


@dataclass(frozen=True, slots=True)
class Detected:
    """The pre-tokenizer that was found, and what a user should know about it."""

    name: str
    notes: tuple[str, ...]
    unicode_form: str | None
    """Text is brought to this Unicode form by the source tokenizer, and is not by llama.cpp."""
    prefix_space: bool = False
    """Forced although the source puts a space before the text, which llama.cpp does not."""
    limit: str = ""
    """What llama.cpp's version of the rule does otherwise."""


def canonical(regex: str) -> str:
    """One spelling for regular expressions that mean the same here.

    Line ends are escaped; contractions get one group; possessive quantifiers become greedy (after these classes no
    other alternative can use what they hold); `{1}` goes.
    """
    out = regex.replace("\r", r"\r").replace("\n", r"\n").replace(r"\/", "/").replace("{1}|", "|")
    out = out.replace("]?+", "]?").replace("]++", "]+")
    for spelling in (
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        "'(?i:[sdmt]|ll|ve|re)",
        "(?i:'s|'t|'re|'ve|'m|'d|'ll)",
        "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    ):
        out = out.replace(spelling, ANY_CASE)
    out = out.replace("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d")
    return out + r"|\s+" if out == GPT2.removesuffix(r"|\s+") else out


def _flatten(node: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened up."""
    if not node:
        return
    if node.get("type") == "Sequence":
        for child in node.get(key) or ():
            yield from _flatten(child, key)
    else:
        yield node


def _split(step: Mapping[str, Any]) -> str:
    """The name of a Split step: its regular expression alone where it isolates what it matches."""
    pattern = step.get("pattern") or {}
    regex = canonical(str(pattern["Regex"])) if "Regex" in pattern else str(pattern.get("String", ""))
    behavior, invert = str(step.get("behavior", "")).lower(), bool(step.get("invert"))
    # Rules that match all text keep the same pieces when what is *not* matched is removed.
    isolates = behavior == "isolated" or (behavior == "removed" and invert and regex.endswith((r"|\s+", r"|\s{1}")))
    return regex if isolates and "Regex" in pattern else f"split {regex!r} {behavior}{' inverted' if invert else ''}"


def read_structure(tokenizer: Mapping[str, Any]) -> Structure:
    """The structure of a parsed tokenizer.json."""
    splits: list[str] = []
    byte_level = prefix_space = False
    for step in _flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = str(step.get("type"))
        if kind == "ByteLevel":
            byte_level = True
            prefix_space |= bool(step.get("add_prefix_space", True))
            splits += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Split":
            splits.append(_split(step))
        elif kind == "Digits":
            splits.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Punctuation":
            behavior = str(step.get("behavior", "Isolated")).lower()
            splits.append("punctuation" if behavior == "isolated" else f"{behavior} punctuation")
        elif kind == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            splits.append(f"Metaspace({scheme}{'' if step.get('split', True) else ', no split'})")
        else:
            splits.append(kind)
    return Structure(tuple(_normalizers(tokenizer.get("normalizer"))), tuple(splits), byte_level, prefix_space)


def _normalizers(node: Mapping[str, Any] | None) -> Iterator[str]:
    for step in _flatten(node, "normalizers"):
        kind = str(step.get("type"))
        if kind == "Replace":
            pattern = step.get("pattern") or {}
            yield f"Replace({next(iter(pattern.values()), '')!r}, {step.get('content')!r})"
        elif kind == "Prepend":
            yield f"Prepend({step.get('prepend')!r})"
        else:
            yield kind


def detect(tokenizer: Mapping[str, Any], *, force: str | None = None) -> Detected:
    """llama.cpp's pre-tokenizer for a byte-level BPE tokenizer.json.

    `force` names one regardless of the structure. Raises UnsupportedError (exit 5) where none fits: it shows the
    structure, the nearest known one and what can be done.
    """
    structure = read_structure(tokenizer)
    whole_words = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    if force is not None:
        return _forced(force, structure)
    form, blockers = None, []
    for name in structure.normalizers:
        if name in UNICODE_FORMS and form is None:
            form = name
        else:
            blockers.append(f"normalizer {name}")
    if structure.prefix_space:
        blockers.append("a space put before the text (add_prefix_space)")
    rows = [row for row in TABLE if row.byte_level == structure.byte_level and row.splits == structure.splits]
    if blockers or not rows:
        raise _unknown(structure, blockers)
    exact = [row for row in rows if row.whole_words == whole_words]
    row = (exact or rows)[0]
    notes = [] if form is None else [_form_note(form)]
    if not exact and (word := unreached_word(tokenizer)) is not None:
        takes, does = ("takes", "does not") if row.whole_words else ("does not take", "does")
        notes.append(
            f"pre-tokenizer {row.name}: llama.cpp {takes} a word that is in the vocabulary as it is, the source {does} "
            f"(ignore_merges): {word!r} is one"
        )
    if row.limit:
        notes.append(f"pre-tokenizer {row.name}: {row.limit}")
    return Detected(row.name, tuple(notes), form, limit=row.limit)


def unreached_word(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that the merges do not make of its characters, or None: then `ignore_merges` changes nothing."""
    model = tokenizer["model"]
    ranks = {tuple(merge.split(" ") if isinstance(merge, str) else merge): i for i, merge in enumerate(model["merges"])}
    added = {token.get("content") for token in tokenizer.get("added_tokens") or ()}
    return next((word for word in model["vocab"] if word not in added and not _is_reached(word, ranks)), None)


def _is_reached(word: str, ranks: Mapping[tuple[str, ...], int]) -> bool:
    parts = list(word)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def _form_note(form: str) -> str:
    return f"the source tokenizer brings text to Unicode {form} first, llama.cpp does not: give it {form} text"


def _forced(name: str, structure: Structure) -> Detected:
    known = {row.name for row in TABLE} | set(ALIASES)
    if name not in known:
        raise UsageError(
            f"--pre-tokenizer {name!r}: not a name that llama.cpp knows",
            hint=did_you_mean(name, known) or f"one of {', '.join(sorted(known))}",
        )
    notes = [f"pre-tokenizer {name} was forced: the source cuts text by {structure.describe()}"]
    form = next((n for n in structure.normalizers if n in UNICODE_FORMS), None)
    if form:
        notes.append(_form_note(form))
    return Detected(name, tuple(notes), form, prefix_space=structure.prefix_space)


def nearest(structure: Structure) -> PreTokenizer:
    """The row of the table whose splits look most alike."""
    text = "\n".join(structure.splits)

    def likeness(row: PreTokenizer) -> float:
        return difflib.SequenceMatcher(None, text, "\n".join(row.splits), autojunk=False).ratio()

    return max((row for row in TABLE if row.byte_level), key=likeness)


def _unknown(structure: Structure, blockers: list[str]) -> UnsupportedError:
    near = nearest(structure)
    found = structure.describe()
    if blockers:
        message = f"tokenizer.json: llama.cpp cannot do {' or '.join(blockers)}; text is cut by {found}"
    else:
        message = f"tokenizer.json: no pre-tokenizer of llama.cpp cuts text by {found}"
    return UnsupportedError(
        f"{message}; the nearest, {near.name}, cuts by {' → '.join(near.splits)}",
        hint=f"--pre-tokenizer {near.name} writes the file with that rule; it is kept only if the token ids of a probe "
        "text come out equal",
    )


def require_bpe(tokenizer: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for byte pair models that llama.cpp's merges cannot express."""
    model = tokenizer.get("model") or {}
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"tokenizer.json: BPE with {key} {model[key]!r}: llama.cpp has no such thing")
    if not isinstance(model.get("vocab"), Mapping) or not isinstance(model.get("merges"), list):
        raise CheckpointError("tokenizer.json: model.vocab and model.merges expected")
