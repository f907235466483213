"""Compute buffers as llama.cpp plans them: by asking it, and by the formula; a process, as the kernel counts it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from efficli.errors import UnsupportedError
from efficli.export.gguf.layout import Metadata, string
from efficli.ops.child import run_child
from efficli.ops.ggml_types import TYPE_IDS
from efficli.planning.cache import CacheLayer, cache_layers, kv_bytes
from efficli.planning.repack import repacked_bytes
from efficli.planning.scratch import (
    FORMULA_ERROR,
    FORMULA_ERROR_PLAIN,
    compute_bytes,
    read_network,
    reserve,
    scratch_bytes,
    vocabulary_bytes,
)
from efficli.progress import Progress
from tests.converted import convert
from tests.gguf_reader import Reader
from tests.planning.graphs import write_hybrid, write_mla
from tests.planning.shapes import SHAPES
from tests.planning.sparse import allocated, described, exported, opened
from tests.planning.test_repack import build

CONTEXTS = (512, 3000, 16384)
LOG = 0.005 * (1 << 20) + 1  # two decimals of a MiB


def plain(metadata: Metadata) -> dict[str, Any]:
    """Values without their GGUF types."""
    return {key: field.value for key, field in metadata.items()}


def check(model: Any, metadata: Metadata, vocab_size: int, layers: Sequence[CacheLayer], *, flash_attn: bool) -> None:
    """The formula against llama.cpp's plan of one model, at all contexts."""
    network = read_network(plain(metadata), vocab_size)
    most = FORMULA_ERROR if flash_attn else FORMULA_ERROR_PLAIN
    for ctx in CONTEXTS:
        found = allocated(model, ctx, n_outputs_max=1, flash_attn_type=-1 if flash_attn else 0).compute
        assert compute_bytes(network, layers, ctx, flash_attn=flash_attn) == pytest.approx(found, rel=most), ctx


@pytest.mark.parametrize("name", SHAPES)
def test_formula_is_near_llama_cpps_plan(name: str, tmp_path: Path) -> None:
    config = SHAPES[name] | {"num_hidden_layers": 8}  # layers share their buffers
    shape, metadata, _ = described(tmp_path / "checkpoint", config)
    layers, network = cache_layers(shape), read_network(plain(metadata), shape.vocab_size)
    exported(tmp_path / "x.gguf", config)
    with opened(tmp_path / "x.gguf") as model:
        for flash_attn in (True, False):
            check(model, metadata, shape.vocab_size, layers, flash_attn=flash_attn)
        for ubatch in (64, 1024):
            found = allocated(model, 3000, n_outputs_max=1, n_ubatch=ubatch).compute
            assert compute_bytes(network, layers, 3000, ubatch=ubatch) == pytest.approx(found, rel=FORMULA_ERROR)
        reserved = allocated(model, 3000, n_outputs_max=0).compute  # logits of all positions
        assert compute_bytes(network, layers, 3000, outputs=0) == pytest.approx(reserved, rel=0.2)
        types = {"type_k": TYPE_IDS["Q8_0"], "type_v": TYPE_IDS["Q8_0"]}
        quantized = allocated(model, 3000, n_outputs_max=1, **types).compute
        assert compute_bytes(network, layers, 3000) == pytest.approx(quantized, rel=FORMULA_ERROR)


def test_formula_of_other_graphs(tmp_path: Path) -> None:
    lite = write_mla(
        tmp_path / "mla.gguf",
        width=2048, heads=16, rank=512, rope=64, nope=128, value=128, ffn=10944, expert=1408, experts=64, used=6,
        shared=2, vocab=102400,
    )  # fmt: skip
    with opened(tmp_path / "mla.gguf") as model:
        check(model, lite, 102400, (CacheLayer("latent", 576),) * 3, flash_attn=True)
    heads = (0, 0, 8, 0, 8)
    hybrid = write_hybrid(tmp_path / "x.gguf", width=2048, heads=32, ffn=8192, kv_heads=heads, vocab=65536)
    layers = [CacheLayer("full", 64 * n, 64 * n) if n else CacheLayer("state", state_bytes=16384) for n in heads]
    with opened(tmp_path / "x.gguf") as model:
        check(model, hybrid, 65536, layers, flash_attn=True)


def test_plan_does_not_depend_on_the_weights_type(tmp_path: Path) -> None:
    found = set()
    for kind in ("F32", "F16", "Q4_0", "Q8_0"):
        exported(tmp_path / "x.gguf", SHAPES["smollm2-135m"], kind=kind)
        with opened(tmp_path / "x.gguf") as model:
            found.add(allocated(model, 3000, n_outputs_max=1).compute)
    assert len(found) == 1


def test_reserve_is_llama_cpps_plan(tmp_path: Path) -> None:
    shape, metadata, tensors = described(tmp_path / "checkpoint", SHAPES["gemma-3-1b"])
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    more: Metadata = {"general.name": string("x"), "tokenizer.ggml.model": string("gpt2"), **metadata}
    found = reserve(more, shapes, shape.vocab_size, CONTEXTS)
    everything = reserve(more, shapes, shape.vocab_size, [3000], outputs=0, ubatch=256, flash_attn=False, type_k="F32")
    exported(tmp_path / "x.gguf", SHAPES["gemma-3-1b"])
    with opened(tmp_path / "x.gguf") as model:
        for ctx in CONTEXTS:
            assert found[ctx] == pytest.approx(allocated(model, ctx, n_outputs_max=1).compute, abs=LOG)
        changes = {"n_ubatch": 256, "flash_attn_type": 0, "type_k": TYPE_IDS["F32"]}
        assert everything[3000] == pytest.approx(allocated(model, 3000, **changes).compute, abs=LOG)


def test_between_two_contexts_the_plan_is_near_the_line(tmp_path: Path) -> None:
    exported(tmp_path / "x.gguf", SHAPES["gemma-2-2b"])
    contexts = range(4608, 16385, 512)  # from the window's length on
    with opened(tmp_path / "x.gguf") as model:
        found = [allocated(model, ctx, n_outputs_max=1).compute for ctx in contexts]
    rise = (found[-1] - found[0]) / (len(found) - 1)
    for i, size in enumerate(found):
        assert size == pytest.approx(found[0] + rise * i, abs=1 << 20)


def test_a_header_that_llama_cpp_refuses_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="unknown model architecture: 'nothing'"):
        reserve({"general.architecture": string("nothing")}, {"token_embd.weight": (32, 32)}, 32, [512])


def test_vocabulary() -> None:
    mib = 1 << 20
    measured = {  # of llama.cpp's models/ggml-vocab-*.gguf: tokens, merges, bytes
        "llama-spm": (32000, 0, 4.80 * mib),
        "gpt-2": (50257, 50000, 16.4 * mib),
        "llama-bpe": (128256, 280147, 52.0 * mib),
        "qwen2": (151936, 151387, 46.2 * mib),
        "gemma-4": (262144, 514906, 95.8 * mib),
    }
    for tokens, merges, size in measured.values():
        assert vocabulary_bytes(tokens, merges) == pytest.approx(size, rel=0.21)


def watch(argument: dict[str, Any], progress: Progress) -> dict[str, int]:
    """In a child: anonymous memory before a model is loaded, and after a prompt that fills the context."""
    from efficli.ops.llama_log import llama_cpp

    lib = llama_cpp(stock=True)
    lib.llama_backend_init()
    before = _anonymous()
    params = lib.llama_model_default_params()
    params.use_extra_bufts = argument["repack"]
    model = lib.llama_model_load_from_file(argument["path"].encode(), params)
    wanted = lib.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_threads, wanted.n_threads_batch = argument["ctx"], 2048, 1, 1
    context = lib.llama_init_from_model(model, wanted)
    ids = (lib.llama_token * 512)(*[5 + i % 64 for i in range(512)])
    for _ in range(argument["ctx"] // 512):
        assert lib.llama_decode(context, lib.llama_batch_get_one(ids, 512)) == 0
    return {"before": before, "after": _anonymous()}


def _anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_process_takes_what_was_reckoned(tmp_path: Path) -> None:
    """The reference, read to the end of its context: what the kernel counts, within 1.5 MiB of 16 and 20."""
    (path,) = convert("reference", tmp_path, "Q4_0")
    file = Reader(path)
    metadata, ctx = file.metadata, 512
    tokens, merges = (len(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "merges"))
    network = read_network(metadata, tokens)
    layers = (CacheLayer("full", network.kv, network.kv),) * metadata["llama.block_count"]
    table = {name: (one.type, len(one.data), one.shape) for name, one in file.tensors.items()}
    scratch = scratch_bytes(network, layers, ctx, threads=1, types=("Q4_0",), merges=merges)
    started = 0.9 * (1 << 20)  # libraries, which are loaded before
    for repack in (True, False):
        found = run_child(f"{__name__}:watch", {"path": str(path), "ctx": ctx, "repack": repack}, what="watching")
        reckoned = scratch.total.value + kv_bytes(layers, ctx).nbytes - started
        reckoned += repacked_bytes(table, build()) if repack else 0
        assert found["after"] - found["before"] == pytest.approx(reckoned, abs=1.5 * (1 << 20))


def test_the_range_holds_the_parts_errors() -> None:
    network = read_network(
        {"general.architecture": "llama", "llama.embedding_length": 2048, "llama.feed_forward_length": 8192,
         "llama.attention.head_count": 32, "llama.attention.head_count_kv": [8, 8]}, 128256
    )  # fmt: skip
    layers = (CacheLayer("full", 512, 512),) * 16
    found = scratch_bytes(network, layers, 4096, merges=280_000)
    exact = scratch_bytes(network, layers, 4096, merges=280_000, compute=found.compute)
    assert found.compute == 71315456  # llama.cpp's own plan of Llama 3.2 1B says 68.012 MiB
    assert found.total.low < exact.total.low < exact.total.value == found.total.value
    assert exact.total.high < found.total.high
    parts = found.to_json()
    assert parts["compute"] + parts["work"] + parts["vocabulary"] + parts["process"] == parts["total"]["value"]
    sizes = [scratch_bytes(network, layers, 4096, types=(kind,)).work for kind in ("F32", "Q8_0", "Q4_K", "F16")]
    assert sizes == sorted(set(sizes))
    assert sizes[1:] == [round(512 * 8192 * of) for of in (34 / 32, 292 / 256, 2)]
