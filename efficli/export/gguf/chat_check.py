"""Do the chat templates that are about to be written render? Tried in a sandbox, with limits (`efficli/chat.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficli.chat import render
from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError
from efficli.export.gguf.vocab_source import read_source
from efficli.export.gguf.vocab_special import read_chat_templates

_USER = {"role": "user", "content": "Hello"}
_SIMPLEST: tuple[Mapping[str, Any], ...] = (_USER,)
_TRIED = (
    ({"role": "system", "content": "Be brief."}, _USER, {"role": "assistant", "content": "Hi."}, _USER),
    (_USER, {"role": "assistant", "content": "Hi."}, _USER),
    _SIMPLEST,
    ({"role": "user", "content": [{"type": "text", "text": "Hello"}]},),
)
"""Conversations, from the most to the least demanding: not every template takes a system message."""


def check_chat_templates(ckpt: Checkpoint) -> list[str]:
    """Render every chat template of `ckpt`; rows for the report.

    SecurityError (exit 6) for a template that takes too long, too much memory, or tries to leave the sandbox;
    CheckpointError where the main one takes no conversation at all. A further template that needs more than messages
    (tools, documents) is a row.
    """
    source = read_source(ckpt)
    texts = {f"{name}_token": source.special_text(name) for name in ("bos", "eos", "unk", "pad")}
    specials = {name: text for name, text in texts.items() if text is not None}
    notes = []
    for name, template in read_chat_templates(ckpt, source).items():
        error = _try(template, specials, _TRIED if name == "default" else (_SIMPLEST,))
        if error is not None and name == "default":
            raise CheckpointError(error.message, where=ckpt.name, hint="correct chat_template, or remove it") from error
        if error is not None:
            notes.append(f"chat template {name!r} does not take plain messages: {error.message}")
    return notes


def _try(
    template: str, specials: Mapping[str, str], conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> CheckpointError | None:
    """None if the template renders any of the conversations; else what it said to the simplest."""
    said = None
    for conversation in conversations:
        try:
            render(template, [conversation], specials=specials, add_generation_prompt=True)
        except CheckpointError as error:
            said = error if said is None or conversation is _SIMPLEST else said
        else:
            return None
    return said
