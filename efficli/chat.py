"""Render chat templates of checkpoints without trusting them: sandboxed, in a child with limits on time and memory.

jinja2's sandbox keeps a template from Python's internals, but not from looping for ever or filling the memory.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Never

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError, FitError, SecurityError, UnsupportedError
from efficli.ops.child import run_child
from efficli.progress import Progress

if TYPE_CHECKING:
    from jinja2 import Environment

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, and what else a template knows."""

SECONDS = 2
"""Processor time that one conversation may take."""
MEMORY_BYTES = 512 << 20
"""Memory that rendering may take beyond the interpreter's own."""
MAX_CHARACTERS = 16 << 20
"""Longest text that a conversation may become."""
DATE = "26 Jul 2024"
"""What templates are told is today, so that the same messages give the same text on every day."""

_BATCH = 256
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


def template_of(ckpt: Checkpoint) -> tuple[str, dict[str, str]]:
    """The chat template of a checkpoint (the one named `default` of several) and the special tokens that it may use."""
    config = ckpt.json("tokenizer_config.json") or {}
    specials = {}
    for name in _SPECIALS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[name] = token
    path = ckpt.file("chat_template.jinja")
    template = config.get("chat_template") if path is None else path.read_text("utf-8")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        hint = "give plain text, or a model that was trained on conversations"
        raise CheckpointError("has no chat template, which 'messages' need", where=ckpt.name, hint=hint)
    return template, specials


def render(
    template: str,
    conversations: Sequence[Sequence[Message]],
    *,
    specials: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> list[str]:
    """The text of each conversation.

    Errors: SecurityError if the template exceeds a limit or tries to leave the sandbox, CheckpointError if it does not
    parse or refuses the messages.
    """
    out: list[str] = []
    for start in range(0, len(conversations), _BATCH):
        request = {
            "template": template,
            "conversations": [list(map(dict, c)) for c in conversations[start : start + _BATCH]],
            "variables": dict(specials) | {"add_generation_prompt": add_generation_prompt},
        }
        # the limits inside are on processor time; this one is for a child that a C function keeps from seeing them
        timeout = 30 + 2 * SECONDS * len(request["conversations"])
        try:
            out += run_child("efficli.chat:render_here", request, what="rendering the chat template", timeout_s=timeout)
        except (FitError, UnsupportedError):  # killed: by this timeout, or by the kernel's limit on its time
            raise _too_slow() from None
    return out


def render_here(request: dict[str, Any], progress: Progress) -> list[str]:
    """The child's side of `render`: limits itself, then renders each conversation of the `request`."""
    import jinja2
    from jinja2.exceptions import SecurityError as SandboxError

    _limit_memory()
    signal.signal(signal.SIGPROF, _out_of_time)
    out = []
    try:
        _limit_time()  # compiling a template evaluates its constant expressions
        template = _environment().from_string(request["template"])
        for messages in request["conversations"]:
            _limit_time()
            text = []
            length = 0
            for piece in template.generate(messages=messages, **request["variables"]):
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise SecurityError(f"chat template made more than {MAX_CHARACTERS} characters")
                text.append(piece)
            out.append("".join(text))
        signal.setitimer(signal.ITIMER_PROF, 0)
    except MemoryError:
        raise SecurityError(f"chat template needs more than {MEMORY_BYTES >> 20} MiB") from None
    except SandboxError as error:
        raise SecurityError(f"chat template tried to leave its sandbox ({_brief(error)})") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"chat template failed: {_brief(error)}") from None
    except RecursionError:
        raise SecurityError("chat template recurses without end") from None
    return out


def _environment() -> Environment:
    """jinja2 as transformers sets it up for chat templates, immutable and sandboxed, with a fixed date."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant said; the text is as without it."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> Never:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.strptime(DATE, "%d %b %Y").strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def _limit_memory() -> None:
    """From here on this process gets MEMORY_BYTES more address space, and no more."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 (no Path needed for a kernel's file)
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = used + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _limit_time() -> None:
    """SECONDS from now an exception stops Python code; a little later the kernel stops everything."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    # CPU time only: a busy machine must not turn a good template into a refused one
    limit = int(spent.ru_utime + spent.ru_stime) + SECONDS + 2
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _out_of_time(number: int, frame: object) -> Never:
    raise _too_slow()


def _too_slow() -> SecurityError:
    return SecurityError(f"chat template did not render in {SECONDS} s")


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
