"""Special ids, what is put before and after a text, and the chat template: the rest of `tokenizer.*`.

Follows what llama.cpp's converter reads where the two agree with transformers (gguf.SpecialVocab); where they do not,
the tokenizer's own post-processor decides, as it does in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFValueType

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError
from efficli.export.gguf.layout import Metadata, array, boolean, string, u32
from efficli.export.gguf.vocab_source import ENDS_KNOWN, Source

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # GGUF's spelling of the keys
MAX_TEMPLATE_BYTES = 1 << 20
"""No chat template may be larger (1 MiB)."""


@dataclass(slots=True)
class Specials:
    """Special ids by name, and whether bos, eos and a separator are put round a text."""

    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def metadata(self) -> Metadata:
        """The `tokenizer.ggml.*_token_id` and `add_*_token` fields."""
        out: Metadata = {f"tokenizer.ggml.{_KEYS.get(n, n)}_token_id": u32(i) for n, i in self.ids.items()}
        return out | {f"tokenizer.ggml.add_{name}_token": boolean(value) for name, value in self.add.items()}


def read_specials(ckpt: Checkpoint, source: Source, size: int) -> Specials:
    """Special ids of a vocabulary of `size` ids, and what its post-processor adds."""
    out = Specials()
    ids = {text: number for number, text in source.pieces.items() if number < size}
    texts = {name: text for name in NAMES if (text := source.special_text(name)) is not None}
    texts.setdefault("bos", texts.get("cls", ""))
    texts.setdefault("eos", texts.get("sep", ""))
    _post_process(source, texts, out)
    for name, text in texts.items():
        if text and text in ids:
            out.ids[name] = ids[text]
    config: Mapping[str, Any] = ckpt.config
    for holder in (config, config.get("text_config") or {}):
        for name in NAMES:
            number = holder.get(f"{name}_token_id")
            if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
                out.ids.setdefault(name, number)
    for name, number in source.spm.ids.items() if source.tokenizer is None and source.spm else ():
        out.ids.setdefault(name, number)
    if source.kind == "unigram" and isinstance(unknown := source.model.get("unk_id"), int):
        out.ids.setdefault("unk", unknown)
    _ends(ckpt, source, out, size)
    _defaults(source, out)
    return out


def _processors(node: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if not node:
        return
    if node.get("type") == "Sequence":
        for child in node.get("processors") or ():
            yield from _processors(child)
    else:
        yield node


def _post_process(source: Source, texts: dict[str, str], out: Specials) -> None:
    """Read the post-processor: which tokens stand before and after a text. `texts` is corrected where it disagrees."""
    for step in _processors((source.tokenizer or {}).get("post_processor")):
        match step.get("type"):
            case "TemplateProcessing":
                _template(step, texts, out)
            case "RobertaProcessing" | "BertProcessing" as kind:
                out.add |= {"bos": True, "eos": True, "sep": True} if kind == "RobertaProcessing" else {"bos": True}
                for name, key in (("cls", "cls"), ("sep", "sep")):
                    if isinstance(step.get(key), Sequence) and step[key]:
                        texts.setdefault(name, str(step[key][0]))
                texts["bos"] = texts["bos"] or texts.get("cls", "")
                texts["eos"] = texts["eos"] or texts.get("sep", "")
            case "ByteLevel":
                out.add.setdefault("bos", False)
                out.add.setdefault("eos", False)


def _template(step: Mapping[str, Any], texts: dict[str, str], out: Specials) -> None:
    single = list(_template_items(step.get("single")))
    if "A" not in (name for name, special in single if not special):
        return
    middle = single.index(("A", False))
    before, after = ([name for name, _ in part] for part in (single[:middle], single[middle + 1 :]))
    if len(before) > 1 or len(after) > 1:
        out.notes.append(
            f"the source tokenizer puts {before} before and {after} after a text, llama.cpp one token each"
        )
    out.add |= {"bos": bool(before), "eos": bool(after)}
    if before and before[0] not in (texts["bos"], texts.get("cls")):
        texts["bos"] = before[0]
    elif before:
        texts["bos"] = texts["bos"] or before[0]
    if after and after[-1] != texts["eos"]:
        if texts["eos"]:
            texts["eot"] = texts["eos"]
        texts["eos"] = after[-1]
    _separator(list(_template_items(step.get("pair"))), before, after, texts, out)


def _separator(
    pair: list[tuple[str, bool]], before: list[str], after: list[str], texts: dict[str, str], out: Specials
) -> None:
    """Whether the template of two texts puts a separator between them (llama.cpp's `add_sep_token`)."""
    start = 1 if before and pair[:1] == [(before[0], True)] else 0
    stop = len(pair) - 1 if after and pair[-1:] == [(after[-1], True)] else len(pair)
    core = pair[start:stop]
    if len(core) < 3 or core[0] != ("A", False) or core[-1] != ("B", False):
        return
    known = (texts.get("sep"), texts["eos"])
    add = core[1][1] and core[1][0] in known and not after
    add = add or (len(core) == 4 and core[2][1] and core[2][0] in known)
    out.add["sep"] = add
    if add and texts["eos"]:
        texts.setdefault("sep", texts["eos"])


def _template_items(rows: Any) -> Iterator[tuple[str, bool]]:
    """(name, is a special token) of each item of a template."""
    for row in rows or ():
        for key in ("SpecialToken", "Sequence"):
            if isinstance(row, Mapping) and key in row:
                yield str(row[key].get("id")), key == "SpecialToken"


def _defaults(source: Source, out: Specials) -> None:
    """What tokenizer_config.json says where the post-processor is silent, then llama.cpp's default, written out."""
    legacy_llama = source.tokenizer is None and source.kind == "spm"
    for name, default in (("bos", legacy_llama), ("eos", False)):
        said = source.config.get(f"add_{name}_token")
        if said is True and name not in out.add and source.tokenizer is not None:
            out.notes.append(
                f"{name} is added as tokenizer_config.json says; transformers 5 looks at tokenizer.json alone"
            )
        out.add.setdefault(name, said if isinstance(said, bool) else default)
        if out.add[name] and name not in out.ids:
            out.add[name] = False
            out.notes.append(f"the source tokenizer adds a {name} token that is not in its vocabulary")


def _ends(ckpt: Checkpoint, source: Source, out: Specials, size: int) -> None:
    """Further ends of generation, of config.json and generation_config.json, that llama.cpp does not know by text."""
    pieces = source.pieces
    for holder in (ckpt.json("generation_config.json") or {}, ckpt.config):
        listed = holder.get("eos_token_id")
        for number in listed if isinstance(listed, list) else [listed]:
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < size:
                continue
            if "eos" not in out.ids:
                out.ids["eos"] = number
            if number in out.ids.values() or pieces.get(number) in ENDS_KNOWN:
                continue
            free = next((name for name in ("eot", "eom") if name not in out.ids), None)
            if free is None:
                out.notes.append(f"token {number} also ends a text, GGUF has no more places for such tokens")
            else:
                out.ids[free] = number


def read_chat_templates(ckpt: Checkpoint, source: Source) -> dict[str, str]:
    """Name -> Jinja template; the main one is "default". Empty where the checkpoint has none.

    A file wins over tokenizer_config.json, as in transformers.
    """
    templates: dict[str, str] = {}
    listed = source.config.get("chat_template")
    if listed is None:
        listed = (ckpt.json("chat_template.json") or {}).get("chat_template")
    if isinstance(listed, str):
        templates["default"] = listed
    elif isinstance(listed, list):
        for row in listed:
            if not isinstance(row, Mapping) or not isinstance(row.get("template"), str):
                raise CheckpointError(
                    "tokenizer_config.json: chat_template is neither a text nor a list of named texts"
                )
            templates[str(row.get("name", ""))] = row["template"]
    elif listed is not None:
        raise CheckpointError("tokenizer_config.json: chat_template is neither a text nor a list of named texts")
    if (text := _template_file(ckpt, "chat_template.jinja")) is not None:
        templates["default"] = text
    folder = ckpt.root / "additional_chat_templates"
    for path in sorted(folder.glob("*.jinja")) if folder.is_dir() else ():
        if (text := _template_file(ckpt, f"additional_chat_templates/{path.name}")) is not None:
            templates[path.stem] = text
    for name, template in templates.items():
        if len(template.encode()) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"chat template {name!r} is larger than 1 MiB")
    return templates


def _template_file(ckpt: Checkpoint, name: str) -> str | None:
    path = ckpt.file(name)
    if path is None:
        return None
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{name} is larger than 1 MiB")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8") from error


def template_metadata(templates: Mapping[str, str]) -> Metadata:
    """The `tokenizer.chat_template*` fields; names keep letters and digits, as GGUF has them."""
    out: Metadata = {}
    names = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    others = sorted(set(names) - {"default", ""})
    for name in others:
        out[f"tokenizer.chat_template.{name}"] = string(names[name])
    if others:
        out["tokenizer.chat_templates"] = array(others, GGUFValueType.STRING)
    if "default" in names:
        out["tokenizer.chat_template"] = string(names["default"])
    return out
