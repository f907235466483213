"""What llama.cpp makes of a vocabulary and of chat templates, asked in a child process."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from efficli.errors import EffiError
from efficli.ops.child import run_child
from efficli.ops.llama import LlamaFile
from efficli.ops.llama_log import WARNING, captured_log, llama_cpp
from efficli.progress import Progress

Conversation = Sequence[Mapping[str, Any]]

_TIMEOUT_S = 120.0
_WARNINGS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyView:
    """A file's vocabulary as llama.cpp loaded it: its size, what it puts round a text, what it warns of."""

    size: int
    has_tokenizer: bool
    add_bos: bool
    add_eos: bool
    bos: int | None
    eos: int | None
    warnings: tuple[str, ...]


def is_installed() -> bool:
    """Whether llama.cpp can be asked at all."""
    return find_spec("llama_cpp") is not None


def open_vocabulary(path: Path) -> VocabularyView:
    """Load the vocabulary of a GGUF file and no weights; an EffiError is what llama.cpp refuses it with."""
    told = run_child(
        "efficli.inspection.llama_view:vocabulary_here",
        {"path": str(path.absolute())},
        what=f"loading the vocabulary of {path.name}",
        timeout_s=_TIMEOUT_S,
    )
    return VocabularyView(**{**told, "warnings": tuple(told["warnings"])})


def vocabulary_here(argument: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The child's part of `open_vocabulary`."""
    with captured_log() as log, LlamaFile(Path(argument["path"]), vocab_only=True) as file:
        library = file.library
        vocabulary = library.llama_model_get_vocab(file.model)
        return {
            "size": file.vocab_size,
            "has_tokenizer": file.has_tokenizer,
            "add_bos": file.add_bos,
            "add_eos": bool(library.llama_vocab_get_add_eos(vocabulary)),
            "bos": file.bos,
            "eos": file.eos,
            "warnings": [line.text for line in log if line.level == WARNING][:_WARNINGS],
        }


def apply_template(template: str, conversations: Sequence[Conversation], *, reply: bool) -> list[str | None]:
    """What llama_chat_apply_template makes of conversations of plain texts; None where it does not know the template.

    `reply`: with what begins the assistant's answer.
    """
    if "\0" in template:
        return [None] * len(conversations)
    argument = {"template": template, "conversations": [list(map(dict, c)) for c in conversations], "reply": reply}
    told: list[str | None] = run_child(
        "efficli.inspection.llama_view:apply_here", argument, what="applying the chat template", timeout_s=_TIMEOUT_S
    )
    return told


def apply_here(argument: dict[str, Any], progress: Progress) -> list[str | None]:
    """The child's part of `apply_template`."""
    library = llama_cpp()
    template = argument["template"].encode("utf-8", "replace")
    out: list[str | None] = []
    for conversation in argument["conversations"]:
        messages = (library.llama_chat_message * len(conversation))(
            *(library.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in conversation)
        )
        room = 1 << 14
        buffer = ctypes.create_string_buffer(room)
        length = library.llama_chat_apply_template(
            template, messages, len(conversation), argument["reply"], buffer, room
        )
        if length > room:
            raise EffiError(f"llama.cpp makes {length} bytes of a short conversation")
        out.append(buffer.raw[:length].decode("utf-8", "replace") if length >= 0 else None)
    return out
