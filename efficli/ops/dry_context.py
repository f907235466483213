"""How large llama.cpp's compute buffers are: its own reservation, on a file that is only a header.

Source: `no_alloc` of llama_model_params (llama.h: "only load metadata and simulate memory allocations"; llama.cpp uses
it to fit a model to a graphics card) and `llama_context::sched_reserve`, which builds the graph of a full context and
says how much its tensors take. `reserve` runs in a child process (`ops.child`), as llama.cpp aborts on a header that it
dislikes. The sizes are told in the log, with two decimals of a MiB: to 5 KiB.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import asdict, dataclass
from typing import Any

from efficli.errors import UnsupportedError
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.libraries import library_path
from efficli.progress import Progress

_COMPUTE = re.compile(r"compute buffer size = +([0-9.]+) MiB")
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_WITHOUT_MAPPING = 0  # LLAMA_LOAD_MODE_NONE: a mapping and no_alloc contradict each other
_POINTER = ctypes.c_void_p


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", _POINTER),
        ("tensor_buft_overrides", _POINTER),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", _POINTER),
        ("progress_callback", _POINTER),
        ("progress_callback_user_data", _POINTER),
        ("kv_overrides", _POINTER),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    )


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("kinds", ctypes.c_int * 4),
        ("flash_attn_type", ctypes.c_int),
        ("rope", ctypes.c_float * 6),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", _POINTER),
        ("cb_eval_user_data", _POINTER),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("abort_callback", _POINTER),
        ("abort_callback_data", _POINTER),
        ("embeddings", ctypes.c_bool),
        ("offload_kqv", ctypes.c_bool),
        ("no_perf", ctypes.c_bool),
        ("op_offload", ctypes.c_bool),
        ("swa_full", ctypes.c_bool),
        ("kv_unified", ctypes.c_bool),
        ("samplers", _POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _POINTER),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What is asked: contexts of one model, all opened in the same way."""

    header: str
    """Path of a GGUF file with the tensors' real shapes; the data may be a hole."""
    contexts: tuple[int, ...]
    type_k: str = "F16"
    type_v: str = "F16"
    ubatch: int = 512
    outputs: int = 1
    """Positions of a micro-batch whose logits are computed; 0: all of them, which llama.cpp's tools reserve."""
    flash_attn: bool = True


def reserve(argument: dict[str, Any], progress: Progress) -> list[int]:
    """Bytes of the compute buffers for each context of a Reservation (as a dictionary), in a child process.

    UnsupportedError where llama.cpp does not take the header or the cache's types.
    """
    asked = Reservation(**argument)
    library, log = _llama(), list[str]()
    listener = _LOG(lambda level, text, data: log.append(f"{level} {text.decode(errors='replace')}"))
    library.llama_log_set(listener, None)
    library.llama_backend_init()
    params = library.llama_model_default_params()
    params.n_gpu_layers, params.load_mode, params.no_alloc = 0, _WITHOUT_MAPPING, True
    model = library.llama_model_load_from_file(asked.header.encode(), params)
    if not model:
        raise UnsupportedError(f"llama.cpp does not take the header: {_complaint(log)}", where=asked.header)
    return [_compute_bytes(library, log, model, asked, ctx) for ctx in asked.contexts]


def question(asked: Reservation) -> dict[str, Any]:
    """A Reservation as `run_child` sends it."""
    return asdict(asked)


def _compute_bytes(library: ctypes.CDLL, log: list[str], model: int, asked: Reservation, ctx: int) -> int:
    params = library.llama_context_default_params()
    params.n_ctx, params.n_ubatch, params.n_batch = ctx, asked.ubatch, max(params.n_batch, asked.ubatch)
    params.n_outputs_max = asked.outputs
    params.type_k, params.type_v = TYPE_IDS[asked.type_k.upper()], TYPE_IDS[asked.type_v.upper()]
    params.flash_attn_type, params.swa_full = -1 if asked.flash_attn else 0, False
    log.clear()
    context = library.llama_init_from_model(model, params)
    if not context:
        raise UnsupportedError(f"llama.cpp refuses a context of {ctx}: {_complaint(log)}", where=asked.header)
    library.llama_free(context)
    return round(sum(float(size) for line in log for size in _COMPUTE.findall(line)) * (1 << 20))


def _complaint(log: list[str]) -> str:
    """The last error that is not just the news that there was one."""
    errors = [line.partition(" ")[2].strip() for line in log if line.startswith(f"{_ERROR} ")]
    telling = [line for line in errors if "failed to load model" not in line and "failed to initialize" not in line]
    return telling[-1].rpartition("error loading model: ")[2] if telling else "it does not say why"


def _llama() -> ctypes.CDLL:
    """libllama with the prototypes used here; UnsupportedError when its parameters are laid out otherwise."""
    library = ctypes.CDLL(str(library_path("llama")))
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [_LOG, _POINTER]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, ModelParams]),
        "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
        "llama_free": (None, [_POINTER]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    model, context = library.llama_model_default_params(), library.llama_context_default_params()
    found = (model.use_extra_bufts, model.no_alloc, context.n_ctx, context.n_ubatch, context.type_k, context.type_v)
    if found != (True, False, 512, 512, 1, 1) or not context.offload_kqv or context.ctx_other:
        raise UnsupportedError(
            "the installed llama.cpp has another layout of its parameters", hint="pip install 'efficli[gguf]'"
        )
    return library
