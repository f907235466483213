"""Chat templates: do they render, does llama.cpp make the same of them, is a begin or end token written twice?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efficli.chat import SECONDS, render_here
from efficli.errors import CheckpointError, EffiError, FitError, SecurityError, UnsupportedError
from efficli.inspection import llama_view
from efficli.inspection.report import Finding, ModelReport, printable
from efficli.ops.child import run_child
from efficli.progress import Progress

CHECK = "chat template"
ENDS_CHECK = "begin and end tokens"
MAX_BYTES = 1 << 20

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Hello"}
_REPLY = {"role": "assistant", "content": "Hi."}
_AGAIN = {"role": "user", "content": "And?"}
CONVERSATIONS = ((_SYSTEM, _USER, _REPLY, _AGAIN), (_USER, _REPLY, _AGAIN), (_USER,))
"""From the most to the least demanding: not every template takes a system message, or an answer."""

_JINJA = "with llama.cpp, use --jinja; where a program has no such option, compare what it sends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A model's templates by name (the main one is "default"), its special tokens' texts, what its tokenizer adds."""

    templates: Mapping[str, str] = field(default_factory=dict)
    specials: Mapping[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, ..., as templates name them."""
    add_bos: bool | None = None
    """None where that is not known."""
    add_eos: bool | None = None


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation that a template took, and its text with what begins the next answer."""

    conversation: tuple[Mapping[str, Any], ...]
    text: str
    closed: str
    """The same up to its last answer, with nothing begun behind it; "" where that is not taken, or has no answer."""


def check_chat(report: ModelReport, chat: Chat) -> None:
    """Judge the templates and what they do together with the tokenizer."""
    findings: list[Finding] = []
    main: _Rendered | None = None
    for name, template in chat.templates.items():
        try:
            rendered = _render(template, chat, simplest=name != "default")
        except SecurityError as error:
            findings.append(Finding.of(_placed(error, name), CHECK))
        except EffiError as error:
            # further templates may want tools or documents, which nobody gives them here
            if name == "default":
                findings.append(Finding.of(_placed(error, name), CHECK))
        else:
            main = rendered if name == "default" else main
    said = f"renders {len(main.conversation)} messages" if main else "none"
    if main is not None:
        compared, found = _compare(chat.templates["default"], main, chat)
        findings += found
        said += f"; {compared}"
    elif chat.templates and "default" not in chat.templates:
        said = f"no default, only {', '.join(printable(name, 20) for name in list(chat.templates)[:4])}"
    report.judge(CHECK, findings, said, "ok" if main else "info")
    _check_ends(report, chat, main)


def _placed(error: EffiError, name: str) -> EffiError:
    """The error, with the template that it is of."""
    hint = error.hint or "correct chat_template, or take it from the model's first publisher"
    where = None if name == "default" else f"chat template {printable(name, 20)!r}"
    return type(error)(error.message, where=where, hint=hint)


def _render(template: str, chat: Chat, *, simplest: bool) -> _Rendered:
    """The most demanding conversation that the template takes; what it says to the simplest if it takes none."""
    if len(template.encode("utf-8", "replace")) > MAX_BYTES:
        raise CheckpointError("chat template is larger than 1 MiB")
    argument = {
        "template": template,
        "conversations": CONVERSATIONS[-1:] if simplest else CONVERSATIONS,
        "specials": dict(chat.specials),
    }
    try:
        told = run_child(
            "efficli.inspection.templates:try_here", argument, what="rendering the chat template", timeout_s=60
        )
    except (FitError, UnsupportedError):  # killed: by this timeout, or by the kernel's limit on its time
        raise SecurityError(f"chat template did not render in {SECONDS} s") from None
    return _Rendered(tuple(told["conversation"]), told["text"], told["closed"])


def try_here(argument: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The child's part: render conversations until one is taken; that one once more, up to its last answer."""
    said: EffiError | None = None

    def text_of(conversation: Any, *, reply: bool) -> str:
        variables = argument["specials"] | {"add_generation_prompt": reply}
        request = {"template": argument["template"], "conversations": [conversation], "variables": variables}
        (text,) = render_here(request, progress)
        return text

    for conversation in argument["conversations"]:
        try:
            text = text_of(conversation, reply=True)
        except CheckpointError as error:
            said = error
            continue
        try:
            closed = text_of(conversation[:-1], reply=False) if len(conversation) > 1 else ""
        except CheckpointError:
            closed = ""
        return {"conversation": conversation, "text": text, "closed": closed}
    assert said is not None
    raise said


def _compare(template: str, rendered: _Rendered, chat: Chat) -> tuple[str, list[Finding]]:
    """The same conversation by llama.cpp's own function, which knows templates by what they contain."""
    if not llama_view.is_installed():
        return "llama-cpp-python is not installed, not compared", []
    try:
        (told,) = llama_view.apply_template(template, [rendered.conversation], reply=True)
    except EffiError as error:
        return "llama.cpp not asked", [Finding.of(error, CHECK)]
    if told is None:
        message = "llama_chat_apply_template does not know the chat template"
        return "not known to llama.cpp", [Finding(check=CHECK, message=message, hint=_JINJA)]
    bos = chat.specials.get("bos_token", "")
    plain = rendered.text.removeprefix(bos) if bos else rendered.text
    told = told.removeprefix(bos) if bos else told
    if told == plain:
        return "llama.cpp's function makes the same text", []
    at = next((i for i, (a, b) in enumerate(zip(plain, told, strict=False)) if a != b), min(len(plain), len(told)))
    there = f"{plain[max(0, at - 8) : at + 16]!r}, llama.cpp {told[max(0, at - 8) : at + 16]!r}"
    message = f"llama_chat_apply_template makes another text of it from character {at} on: template {there}"
    return "llama.cpp's function differs", [Finding(check=CHECK, message=message, hint=_JINJA)]


def _check_ends(report: ModelReport, chat: Chat, main: _Rendered | None) -> None:
    """A begin token that the template writes and the tokenizer adds once more; the same of the end token."""
    bos, eos = chat.specials.get("bos_token", ""), chat.specials.get("eos_token", "")
    adds = [name for name, added in (("a begin", chat.add_bos), ("an end", chat.add_eos)) if added]
    said = f"the tokenizer adds {' and '.join(adds) or 'neither'} token" if chat.add_bos is not None else "not known"
    findings = []
    if main is not None and chat.add_bos is not None:
        writes_bos = bool(bos) and main.text.startswith(bos)
        if writes_bos and chat.add_bos:
            findings.append(
                Finding(
                    check=ENDS_CHECK,
                    message=f"the chat template writes {printable(bos, 40)!r} and the tokenizer adds one more",
                    hint="tokenize rendered conversations without special tokens (add_special_tokens=False)",
                )
            )
        if chat.add_eos and eos and main.closed.rstrip().endswith(eos):
            findings.append(
                Finding(
                    check=ENDS_CHECK,
                    message=f"the chat template ends with {printable(eos, 40)!r} and the tokenizer adds one more",
                    hint="tokenize rendered conversations without special tokens (add_special_tokens=False)",
                )
            )
        said += f", the template {'writes the begin token' if writes_bos else 'does not write it'}" if bos else ""
    report.judge(ENDS_CHECK, findings, said, "ok" if chat.add_bos is not None else "skipped")
