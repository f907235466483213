"""The plan as a table: within 80 columns whatever the devices, marks with their footnotes, what to take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.planning import plan_table
from efficli.planning.plan import PlanResult, plan
from efficli.planning.plan_table import short, size
from efficli.target import target_names
from tests.planning.weightless import REFERENCE, copy_without_weights

LLAMA_3B = {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
SMOL_135M = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


def folder(place: Path, shape: dict[str, Any]) -> str:
    """The reference's tokenizer below a config.json of another shape; no weights."""
    made = copy_without_weights(REFERENCE, place)
    config = json.loads((made / "config.json").read_text()) | shape
    (made / "config.json").write_text(json.dumps(config))
    return str(made)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("plan") / "llama-3b", LLAMA_3B)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("plan") / "smol-135m", SMOL_135M)


class Lines:
    """A screen that keeps what it is shown, tables as the console lays them out."""

    def __init__(self) -> None:
        self.tables: list[plan_table.Table] = []
        self.sentences: list[str] = []

    def table(self, title: str, columns: Any, rows: Any, *, is_data: bool = False) -> None:
        assert is_data
        self.tables.append((title, columns, rows))

    def prose(self, paragraphs: Any, indent: int = 2) -> None:
        self.sentences += list(paragraphs)

    def text(self, text: str) -> None:
        assert text == "\n"

    width = 80

    @property
    def widest(self) -> int:
        """Signs of the widest line of a table: columns are three signs apart."""
        widest = [
            sum(max(map(len, column)) for column in zip(heads, *rows, strict=True)) + 3 * (len(heads) - 1)
            for _, heads, rows in self.tables
        ]
        return max(*widest, *(len(line) for title, _, _ in self.tables for line in title.splitlines()))


def shown(result: PlanResult, *, verbose: bool = False) -> Lines:
    screen = Lines()
    plan_table.show(screen, result, verbose=verbose)
    return screen


@pytest.mark.parametrize("targets", [
    (), ("snapdragon-855-orbit",), ("snapdragon-855-orbit", "phone-mid", "gr740"), tuple(target_names()),
])  # fmt: skip
@pytest.mark.parametrize("ctx", [None, (2048, 8192, 131072)])
def test_no_table_is_wider_than_80(
    large: str, small: str, targets: tuple[str, ...], ctx: tuple[int, ...] | None
) -> None:
    model = large if ctx is None else small
    result = plan(model, targets=targets, ctx=ctx, uplink=256e3 if targets else None, all_types=not targets)
    screen = shown(result)
    assert screen.widest <= 80
    for target in result.targets:
        heads = [head for title, heads, _ in screen.tables for head in (*heads, title)]
        assert any(target.name in line for line in (*heads, *screen.sentences))


def test_every_cell_of_the_matrix_is_the_verdict_of_its_fit(large: str) -> None:
    result = plan(large, targets=("pi5-8gb", "pi4-2gb", "phone-low"), ctx=(2048, 32768))
    cells = {}
    for _, heads, rows in shown(result).tables[:3]:
        if heads[0] == "type" and heads[1] == "size":
            cells |= {(row[0].rstrip("*+!"), head): cell for row in rows for head, cell in zip(heads, row, strict=True)}
    for one in result.fits:
        cell = cells[one.type, f"{one.target} @{short(one.ctx)}"]
        assert cell.split()[0] == one.verdict
        if one.verdict == "NO":
            assert cell == f"NO {one.limited_by}".replace("compute ", "")
        else:
            assert one.decode is not None
            low, high = (float(end) for end in cell.split()[1].split("-"))
            assert (low, high) == pytest.approx((one.decode.low, one.decode.high), rel=0.05)


def test_what_to_take_is_the_largest_that_fits(large: str) -> None:
    result = plan(large, targets=("pi5-8gb",))
    sizes = {file.type: file.nbytes for file in result.files}
    fits = {one.type for one in result.fits if one.verdict == "FIT"}
    best = max(fits - {"F16"}, key=sizes.__getitem__)
    line = next(line for line in shown(result).sentences if line.startswith("pi5-8gb: take "))
    assert line.startswith(f"pi5-8gb: take {best}, the largest that fits, ")
    assert "Q8_0 fits with --no-repack" in line
    assert [file.nbytes for file in result.files] == sorted(sizes.values(), reverse=True)
    assert result.to_json()["recommended"] == [{"target": "pi5-8gb", "ctx": 2048, "type": best}]


def test_16_bits_are_taken_where_nothing_else_is_asked_for() -> None:
    assert "take F16" in shown(plan("reference", targets=("pi5-8gb",), types=("F16",))).sentences[0]
    everything = plan("reference", targets=("pi5-8gb",), all_types=True)
    assert "take Q8_0" in shown(everything).sentences[0], "MXFP4_MOE is as large, and this has no experts"
    assert not {"TQ2_0", "Q2_0"} & {file.type for file in plan("reference").files}


def test_nothing_fits_and_says_why(large: str) -> None:
    result = plan(large, targets=("pi-zero-2w", "gr740"), ctx=(4096,))
    assert result.failure is not None
    assert (result.failure.exit_code, result.to_json()["anything_fits"]) == (4, False)
    assert result.failure.line.startswith("nothing fits pi-zero-2w, gr740: Q2_K with a context of 4096 needs ")
    assert result.failure.line.endswith("expected at most 362 MiB; limited by the weights")
    assert any(line.startswith("pi-zero-2w: nothing fits; Q2_K needs ") for line in shown(result).sentences)
    assert plan("reference", targets=("gr740", "pi5")).failure is None
    alone = plan("reference", targets=("gr740",)).failure
    assert alone is not None and "big-endian" in alone.line
    narrow = plan(large, targets=("pi4-2gb",), ctx=(131072,), types=("IQ1_S",)).failure
    assert narrow is not None
    assert narrow.hint == f"--ctx-size {plan(large, targets=('pi4-2gb',), types=('IQ1_S',)).fits[0].largest_ctx} fits"


def test_marks_have_their_footnotes(small: str) -> None:
    result = plan(small, types=("Q4_K_M", "Q8_0", "IQ2_XS", "TQ2_0", "Q1_0"))
    screen = shown(result)
    assert [row[0] for row in screen.tables[0][2]] == ["Q8_0", "Q4_K_M*", "IQ2_XS*+", "TQ2_0*!"]
    told = "\n".join(screen.sentences)
    assert "Q4_K_M: 166 Q5_0 for Q4_K, 15 Q8_0 for Q6_K" in told
    assert "+ needs an importance matrix (export --imatrix auto): IQ2_XS" in told
    assert "! for weights of two or three values; ruins others, and export refuses: TQ2_0" in told
    assert "not possible: Q1_0: llama.cpp cannot choose types" in told
    with pytest.raises(UnsupportedError, match=r"Q1_0: llama\.cpp cannot choose types"):
        plan(small, types=("Q1_0",))


def test_notes_say_what_sizes_and_speeds_rest_on(tmp_path: Path) -> None:
    bare = copy_without_weights(REFERENCE, tmp_path / "bare")
    told = shown(plan(str(bare), targets=("pi5-8gb",))).sentences
    assert any("sizes are exact, from config.json: the weights are not here" in line for line in told)
    told = shown(plan("reference", targets=("pi5-8gb",)), verbose=True).sentences
    assert any("sizes are exact, from the weights' headers" in line for line in told)
    assert any("geerlingguy" in line for line in told), "sources with -v"
    told = shown(plan("reference", targets=("pi5-8gb",))).sentences
    assert not any("geerlingguy" in line for line in told)
    assert any("speed of llama.cpp (estimate)" in line for line in told)


def test_a_vocabulary_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Of a family that only the plan knows: its experts count, and its latent cache is not that of its heads."""
    deepseek = {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840,
        "rope_theta": 10000, "rms_norm_eps": 1e-6, "hidden_act": "silu", "topk_method": "greedy", "topk_group": 1,
        "n_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "moe_layer_freq": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(deepseek))
    shutil.copy(REFERENCE / "tokenizer.json", tmp_path / "with")
    shutil.copy(REFERENCE / "tokenizer_config.json", tmp_path / "with")
    exact, reckoned = (
        plan(str(tmp_path / name), targets=("pi5-16gb",), types=("Q4_0",)) for name in ("with", "without")
    )
    assert (exact.to_json()["sizes_exact"], reckoned.to_json()["sizes_exact"]) == (True, False)
    assert any(line.startswith("sizes are exact but for the vocabulary") for line in shown(reckoned).sentences)
    assert any(line.startswith("planned only, `efficli export` does not write it") for line in shown(exact).sentences)
    (one,) = exact.fits
    assert one.kv_bytes == 27 * (512 + 64) * 2 * 2048, "latent: one vector for all heads, nothing for values"
    whole = sum(nbytes for _, nbytes, _ in exact.files[0].tensors.values())
    assert one.decode is not None
    assert one.decode.value > 3 * 9.5e9 / whole, "6 of 64 experts are read for a token"


def test_contexts_are_cut_to_the_models() -> None:
    result = plan("reference", targets=("pi5-8gb",), ctx=(512, 4096, 9000))
    assert result.contexts == (512, 2048)
    assert result.notes == ("a context of 4096, 9000 is more than the 2048 that it was made for",)
    assert plan("reference").contexts == (2048,)


def test_links_of_targets_and_of_the_command_line() -> None:
    both = plan("reference", targets=("zynq-ultrascale", "pi5-8gb", "jetson-tx2i", "gr740"), types=("Q4_0",))
    assert [(link.targets, link.uplink.bits_per_s) for link in both.links] == [
        (("zynq-ultrascale",), 256e3), (("jetson-tx2i",), 9600),
    ], "gr740 has a link, and runs no such file"  # fmt: skip
    asked = plan("reference", targets=("zynq-ultrascale", "pi5-8gb"), types=("Q4_0",), uplink=9.6e3, pass_s=360)
    (link,) = asked.links
    assert link.targets == ("zynq-ultrascale", "pi5-8gb")
    found = link.uplink.transfer(asked.files[0].nbytes)
    row = next(rows[0] for title, _, rows in shown(asked).tables if title.startswith("Uplink"))
    assert row == ["Q4_0", "5.18 MiB", str(found.passes), f"{found.days:.1f}", "no"]
    assert found.passes == -(-asked.files[0].nbytes // 302400)
    with pytest.raises(UsageError, match="--pass and --passes-per-day need --uplink"):
        plan("reference", targets=("pi5-8gb",), pass_s=60)


@pytest.mark.parametrize(("wish", "match"), [
    ({"types": ("Q4_0",), "all_types": True}, "--type and --all-types"),
    ({"ctx": (0,)}, "--ctx-size 0"),
    ({"cache_type_k": "q3_k"}, "--cache-type-k 'q3_k'"),
    ({"targets": ("pi9",)}, "unknown target 'pi9'"),
    ({"types": ("Q9",)}, "unknown type 'Q9'"),
])  # fmt: skip
def test_wrong_words(wish: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        plan("reference", **wish)


@pytest.mark.parametrize(("nbytes", "text"), [
    (0, "0"), (512, "0.50 KiB"), (4_920_000_000, "4.58 GiB"), (143_654_912, "137 MiB"), (10 << 20, "10.0 MiB"),
    ((1 << 30) - 1, "1.00 GiB"), (999 << 20, "999 MiB"),
])  # fmt: skip
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_a_folder_with_nothing_but_config_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "least").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, tmp_path / "least")
    full, least = plan("reference", types=("Q4_0",)), plan(str(tmp_path / "least"), types=("Q4_0",))
    assert least.files[0].data_nbytes == full.files[0].data_nbytes
    assert least.model.basis == "config"
