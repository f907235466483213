"""What one token reads of a file: on tensor tables written down by hand, summed here a second time."""

from __future__ import annotations

from math import prod

import pytest

from efficli.errors import CheckpointError
from efficli.target import Share, Work, active_bytes

BITS = {"F32": 32, "F16": 16, "Q4_K": 4.5, "Q6_K": 6.5625, "Q8_0": 8.5}
VOCAB, WIDTH, FFN = 1000, 256, 512


def tensor(kind: str, *shape: int) -> tuple[str, int, tuple[int, ...]]:
    """Type, bytes, shape."""
    return kind, int(prod(shape) * BITS[kind] / 8), shape


def block(number: int, **others: tuple[str, int, tuple[int, ...]]) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Attention and norm of a layer, and what else is named."""
    made = {
        "attn_q": tensor("Q4_K", WIDTH, WIDTH),
        "attn_v": tensor("Q6_K", WIDTH, WIDTH),
        "attn_norm": tensor("F32", WIDTH),
    }
    return {f"blk.{number}.{name}.weight": value for name, value in (made | others).items()}


DENSE = {
    "token_embd.weight": tensor("Q6_K", VOCAB, WIDTH),
    "output_norm.weight": tensor("F32", WIDTH),
    **block(0, ffn_up=tensor("Q4_K", FFN, WIDTH)),
    **block(1, ffn_up=tensor("Q4_K", FFN, WIDTH)),
}
LLAMA = {"general.architecture": "llama", "llama.block_count": 2}
EMBEDDING = DENSE["token_embd.weight"][1]


def total(tensors):
    return sum(nbytes for _, nbytes, _ in tensors.values())


def test_tied_embeddings_are_read_once_as_the_output():
    active = active_bytes(DENSE, LLAMA)
    assert active.nbytes == total(DENSE)
    assert active.weights == sum(prod(shape) for _, _, shape in DENSE.values())
    assert active.output == {"Q6_K": Share(EMBEDDING, VOCAB * WIDTH)}
    assert active.left_out == {}


def test_untied_embeddings_are_looked_up():
    tensors = DENSE | {"output.weight": tensor("Q8_0", VOCAB, WIDTH)}
    active = active_bytes(tensors, LLAMA)
    assert active.nbytes == total(tensors) - EMBEDDING
    assert active.left_out == {"token embeddings, looked up by row": EMBEDDING}
    assert active.output == {"Q8_0": Share(VOCAB * WIDTH * 8.5 / 8, VOCAB * WIDTH)}
    assert active.types["Q8_0"] == active.output["Q8_0"]


def test_the_types_add_up():
    types = active_bytes(DENSE, LLAMA).types
    assert set(types) == {"F32", "Q4_K", "Q6_K"}
    assert types["Q4_K"] == Share(2 * (WIDTH * WIDTH + FFN * WIDTH) * 4.5 / 8, 2 * (WIDTH * WIDTH + FFN * WIDTH))
    assert types["F32"] == Share(3 * WIDTH * 4, 3 * WIDTH)


MOE = {"general.architecture": "qwen3moe", "qwen3moe.expert_count": 8, "qwen3moe.expert_used_count": 2}


def experts(kind="Q4_K"):
    return {f"ffn_{name}_exps": tensor(kind, 8, FFN, WIDTH) for name in ("gate", "up", "down")}


def test_of_merged_experts_only_the_chosen_ones_are_read():
    shared = {"ffn_gate_inp": tensor("F32", 8, WIDTH), "ffn_up_shexp": tensor("Q8_0", FFN, WIDTH)}
    tensors = DENSE | block(0, **experts(), **shared)
    of_experts = 3 * 8 * FFN * WIDTH * 4.5 / 8
    active = active_bytes(tensors, MOE)
    assert active.nbytes == total(tensors) - of_experts * 6 / 8
    assert active.left_out == {"experts that are not chosen": of_experts * 6 / 8}
    every = active_bytes(tensors, MOE | {"qwen3moe.expert_used_count": 8})
    assert every.nbytes == total(tensors)


def test_experts_in_tensors_of_their_own():
    single = {
        f"ffn_{name}.{number}": tensor("Q4_K", FFN, WIDTH) for name in ("gate", "up", "down") for number in range(8)
    }
    merged = active_bytes(DENSE | block(0, **experts()), MOE)
    assert active_bytes(DENSE | block(0, **single), MOE).nbytes == merged.nbytes


def test_biases_and_scales_of_experts_follow_them():
    tensors = DENSE | {"blk.0.ffn_up_exps.bias": tensor("F32", 8, FFN)}
    assert active_bytes(tensors, MOE).nbytes == total(DENSE) + 2 * FFN * 4


@pytest.mark.parametrize(
    "metadata", [LLAMA, {**MOE, "qwen3moe.expert_used_count": 0}, {**MOE, "qwen3moe.expert_used_count": 9}]
)
def test_experts_without_a_number_that_is_used(metadata):
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_gate_exps.weight holds experts, and the metadata have "):
        active_bytes(DENSE | block(0, **experts()), metadata)


def test_per_layer_embeddings_are_looked_up():
    tensors = DENSE | {"per_layer_token_embd.weight": tensor("Q8_0", VOCAB, 2 * WIDTH)}
    tensors |= {"per_layer_model_proj.weight": tensor("F16", 2 * WIDTH, WIDTH)}
    table = int(VOCAB * 2 * WIDTH * 8.5 / 8)
    active = active_bytes(tensors, {"general.architecture": "gemma3n", "gemma3n.block_count": 2})
    assert active.nbytes == total(tensors) - table
    assert active.left_out == {"looked up by row": table}
    assert "Q8_0" not in active.types
    assert active.types["F16"].weights == 2 * WIDTH * WIDTH


def test_blocks_that_predict_further_tokens_are_not_read():
    metadata = {"general.architecture": "glm4moe", "glm4moe.block_count": 2, "glm4moe.nextn_predict_layers": 1}
    last = total({name: t for name, t in DENSE.items() if name.startswith("blk.1.")})
    active = active_bytes(DENSE, metadata)
    assert active.nbytes == total(DENSE) - last
    assert active.left_out == {"blocks that predict further tokens": last}


def test_a_model_that_only_reads_has_no_output():
    tensors = DENSE | {"position_embd.weight": tensor("F32", 512, WIDTH), "token_types.weight": tensor("F32", 2, WIDTH)}
    active = active_bytes(tensors, {"general.architecture": "bert", "bert.attention.causal": False})
    assert active.nbytes == total(DENSE) - EMBEDDING
    assert active.output == {}


def test_an_encoder_is_not_read_for_a_written_token():
    tensors = DENSE | {"enc.blk.0.attn_q.weight": tensor("F16", WIDTH, WIDTH)}
    assert active_bytes(tensors, {"general.architecture": "t5"}).nbytes == total(DENSE)


def test_nothing_gets_lost():
    tensors = DENSE | block(0, **experts()) | {"output.weight": tensor("F16", VOCAB, WIDTH)}
    active = active_bytes(tensors, MOE)
    assert active.nbytes + sum(active.left_out.values()) == total(tensors)


def test_work_of_a_file():
    active = active_bytes(DENSE, LLAMA)
    work = Work.of(active, 10_000_000, kv_bytes_per_token=128, depth=10)
    assert work.active_bytes == total(DENSE) + 1280
    assert work.active_weights == active.weights
    assert work.prompt_types is not None
    assert sum(share.weights for share in work.prompt_types.values()) == active.weights - VOCAB * WIDTH


def test_a_real_header(tmp_path):
    from efficli.export.gguf.parse import read_gguf
    from tests.tiny_gguf import write_tiny

    header = read_gguf(write_tiny(tmp_path / "tiny.gguf"))
    tensors = {name: (found.type, found.nbytes, found.shape) for name, found in header.tensors.items()}
    active = active_bytes(tensors, header.metadata)
    assert "output.weight" in tensors
    assert active.nbytes == total(tensors) - tensors["token_embd.weight"][1]
    assert set(active.types) == {"F32"}
    assert active.nbytes == 4 * active.weights
