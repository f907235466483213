"""llama.cpp's choice of a type for each tensor: its quantizer's dry run on a file that is only a header.

Source: llama_model_quantize of llama.h and llama-quant.cpp (llama-cpp-python 0.3.36). `choose` runs in a child process
(`ops.child`), as llama.cpp aborts on a header that it dislikes. The choices are told only in the log, parsed here.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from efficli.errors import MissingExtra, UnsupportedError
from efficli.ops.child import run_child
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.libraries import library_path
from efficli.progress import Progress

TYPE_COUNT = 43
"""GGML_TYPE_COUNT: "no type given" where a type is optional."""

_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] +(?P<name>\S+) +- \[.*?\], type = +(?P<old>\w+), +size = .*?(?:\((?P<new>\w+)\))?\s*$"
)
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+) .*required for type +(?P<wanted>\w+)\).*-> falling back to +(?P<got>\w+)"
)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class ImatrixData(ctypes.Structure):
    """struct llama_model_imatrix_data."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class TensorOverride(ctypes.Structure):
    """struct llama_model_tensor_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class QuantizeParams(ctypes.Structure):
    """struct llama_model_quantize_params."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(ImatrixData)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(TensorOverride)),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the quantizer is asked; types are ggml's names, `ftype` the number of llama.cpp's file type."""

    header: str
    """Path of a GGUF file whose tensors are F32; the data may be a hole."""
    ftype: int
    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    with_imatrix: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Type per tensor, and for those that could not have the type they should: (wanted, got); or why there is none."""

    types: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, tuple[str, str]] = field(default_factory=dict)
    refused: str | None = None
    """What llama.cpp says against this type for this model."""
    hint: str | None = None


def ask(questions: Sequence[Question]) -> list[Answer]:
    """llama.cpp's answers in the order of the questions, all from one child process (120 s at most).

    MissingExtra without llama-cpp-python. A question that llama.cpp dies of is refused in its answer.
    """
    asked = [asdict(question) for question in questions]
    try:
        told = run_child("efficli.ops.dry_run:choose", asked, what="choosing types", timeout_s=120)
    except MissingExtra:
        raise
    except UnsupportedError as error:
        if len(questions) > 1:  # which one it died of: ask each alone
            return [answer for question in questions for answer in ask([question])]
        return [Answer(refused=error.message, hint=error.hint)]
    return [Answer(**answer) for answer in told]


def choose(argument: list[dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """The child's part of `ask`, as llama.cpp aborts on a header that it dislikes. Questions -> answers, as JSON."""
    library = _llama()
    log: list[str] = []
    listener = _LOG(lambda level, text, data: log.append(text.decode(errors="replace")))
    library.llama_log_set(listener, None)
    answers = []
    for question in argument:
        log.clear()
        code = _quantize(library, Question(**question))
        answer = _refusal(code, "".join(log)) if code else parse("".join(log))
        # not asdict, which copies: thousands of tensors, and dozens of questions
        answers.append({part.name: getattr(answer, part.name) for part in fields(Answer)})
    return answers


def _quantize(library: ctypes.CDLL, question: Question) -> int:
    """Run the quantizer; what it chose is in its log. 0, or the code of its failure."""
    patterns = [TensorOverride(p.encode(), TYPE_IDS[t]) for p, t in question.overrides]
    overrides = (TensorOverride * (len(patterns) + 1))(*patterns)
    # one entry that matches nothing: only its presence changes the choice
    imatrix = (ImatrixData * 2)(ImatrixData(b"-", (ctypes.c_float * 1)(1.0), 1))
    params = library.llama_model_quantize_default_params()
    params.nthread = 1
    params.ftype = question.ftype
    params.pure = question.pure
    params.dry_run = True
    params.output_tensor_type = TYPE_IDS.get(question.output_tensor_type or "", TYPE_COUNT)
    params.token_embedding_type = TYPE_IDS.get(question.token_embedding_type or "", TYPE_COUNT)
    if patterns:
        params.tt_overrides = overrides
    if question.with_imatrix:
        params.imatrix = imatrix
    return int(library.llama_model_quantize(question.header.encode(), b"/dev/null", ctypes.byref(params)))


def _refusal(code: int, log: str) -> Answer:
    reason = re.findall(r"failed to quantize: (.*)", log)
    why = reason[-1] if reason else f"code {code}"
    hint = "its rows do not fill the blocks of this type: choose another" if "fallback" in why else None
    return Answer(refused=f"llama.cpp cannot choose types: {why}", hint=hint)


def parse(log: str) -> Answer:
    """Read the types and fallbacks from the quantizer's log; names in upper case as in `TYPE_IDS`."""
    types: dict[str, str] = {}
    fallbacks: dict[str, tuple[str, str]] = {}
    for line in log.splitlines():
        if tensor := _TENSOR.search(line):
            types[tensor["name"]] = (tensor["new"] or tensor["old"]).upper()
        elif fallback := _FALLBACK.search(line):
            fallbacks[fallback["name"]] = (fallback["wanted"].upper(), fallback["got"].upper())
    return Answer(types, fallbacks)


def _llama() -> ctypes.CDLL:
    """libllama with the prototypes used here; UnsupportedError when its parameters are laid out otherwise."""
    library = ctypes.CDLL(str(library_path("llama")))
    library.llama_log_set.argtypes = [_LOG, ctypes.c_void_p]
    library.llama_log_set.restype = None
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    defaults = library.llama_model_quantize_default_params()
    found = (defaults.ftype, defaults.token_embedding_type, defaults.quantize_output_tensor, defaults.max_buf_size)
    if found != (7, TYPE_COUNT, True, 8 << 30):
        raise UnsupportedError(
            "the installed llama.cpp has another layout of its quantizer's parameters",
            hint="pip install 'efficli[gguf]'",
        )
    return library
