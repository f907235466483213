"""Folding is exact in every family, and the scales that are chosen lose no more than none would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.catalog import run_method
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.writer import write_checkpoint
from efficli.errors import CheckpointError, UsageError
from efficli.folding import Fold, find_folds, fold_values, folded
from efficli.method import Context
from efficli.precision.scales import Found, quantized, read_scales, serve
from efficli.precision.view import Calibration
from efficli.progress import Silent
from efficli.quantize.awq import Config
from tests import models
from tests.network.checkpoints import STACKED, altered, stacked, whole_gemma3
from tests.pico import write_llama

Float64 = NDArray[np.float64]
NAME = "quantize.awq"


def save(family: str, folder: Path, **overrides: Any) -> Path:
    if family == "stacked":
        return altered(save("qwen3_moe", folder / "each"), folder / "model", stacked)
    if family == "gemma3 with vision":
        return whole_gemma3(folder / "model")
    return models.save(models.build(family, **overrides), folder / "model")


def logits(folder: Path, **options: Any) -> Float64:
    """Of a text, by transformers; in float64 where it can, so that what differs is what the weights say."""
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"dtype": torch.float32 if "Moe" in architecture else torch.float64} | options
    model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager", **options).eval()
    ids = torch.tensor([np.random.default_rng(0).integers(3, models.VOCAB, 48).tolist()])
    with torch.no_grad():
        out = model(ids)
    values = out.logits if hasattr(out, "logits") else out.last_hidden_state
    found: Float64 = values[0].double().numpy()
    return found


def difference(found: Float64, base: Float64) -> float:
    """Largest, relative to the largest logit."""
    return float(np.abs(found - base).max() / np.abs(base).max())


def fold_all(folder: Path, target: Path, folds: Sequence[Fold] | None = None) -> Path:
    """The checkpoint with random scales from a twentieth to twenty on each of its folds, or on these."""
    ckpt = open_checkpoint(str(folder))
    random = np.random.default_rng(1)
    folds = find_folds(ckpt)[0] if folds is None else folds
    scales = [np.exp(random.uniform(-3, 3, fold.width)) for fold in folds]
    target.mkdir()
    write_checkpoint(ckpt, target, folded(ckpt, folds, scales))
    return target


VARIANTS = [
    *(pytest.param(family, {}, id=family) for family in (*models.FAMILIES, *STACKED, "gemma3 with vision")),
    *(
        pytest.param(family, overrides, id=f"{family} with biases", marks=pytest.mark.slow)
        for family, overrides in (
            ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
            ("granite", {"attention_bias": True, "mlp_bias": True}),
            ("qwen3", {"attention_bias": True}),
        )
    ),
]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_the_network_computes_the_same(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Every fold at once, by factors of up to 400 within one."""
    base = save(family, tmp_path, **overrides)
    new = fold_all(base, tmp_path / "new")
    assert difference(logits(new), logits(base)) < (1e-4 if family in ("qwen3_moe", "stacked") else 1e-5)
    before, after = open_checkpoint(str(base)), open_checkpoint(str(new))
    touched = {name for fold in find_folds(before)[0] for name in fold.tensors}
    for name in before.tensors:
        assert np.array_equal(before.read(name), after.read(name)) == (name not in touched), name
        assert after.tensors[name].dtype == "F32"


def without(fold: Fold, which: str) -> Fold:
    """A fold that forgets something."""
    if which == "offset":
        return replace(fold, divided=tuple(replace(one, offset=0.0) for one in fold.divided))
    if which == "bias":
        return replace(fold, divided=tuple(one for one in fold.divided if not one.tensor.endswith("bias")))
    if which == "reader":
        return replace(fold, multiplied=fold.multiplied[:-1])
    if which == "what is before":
        return replace(fold, divided=())
    return replace(fold, run=1, repeats=fold.repeats)  # query heads take turns, as if groups were interleaved


@pytest.mark.parametrize(
    ("family", "kind", "which"),
    [
        ("gemma2", "attn_norm -> attn_q, attn_k, attn_v", "offset"),
        ("gpt2", "attn_norm -> attn_qkv", "bias"),
        ("gpt2", "attn_v -> attn_out", "bias"),
        ("qwen2", "attn_v -> attn_out", "bias"),
        ("qwen2", "attn_v -> attn_out", "heads"),
        ("llama", "attn_norm -> attn_q, attn_k, attn_v", "reader"),
        ("qwen3_moe", "ffn_norm -> router, expert_gate, expert_up", "reader"),
        ("bitnet", "ffn_sub_norm -> ffn_down", "what is before"),
    ],
)
def test_a_fold_that_forgets_something_is_seen(family: str, kind: str, which: str, tmp_path: Path) -> None:
    """So that the test above can fail."""
    base = save(family, tmp_path)
    fold = next(fold for fold in find_folds(open_checkpoint(str(base)))[0] if fold.kind == kind)
    right = fold_all(base, tmp_path / "right", [fold])
    wrong = fold_all(base, tmp_path / "wrong", [without(fold, which)])
    assert difference(logits(right), logits(base)) < 1e-4 < 1e-3 < difference(logits(wrong), logits(base))


def test_what_each_family_folds(tmp_path: Path) -> None:
    """And why the rest is not."""
    told = {}
    for family in ("bert", "gpt2", "olmo2", "bitnet", "phi3", "qwen3_moe"):
        folds, reasons = find_folds(open_checkpoint(str(save(family, tmp_path / family))))
        told[family] = list(dict.fromkeys(fold.kind for fold in folds)), [row.partition(":")[0] for row in reasons]
    values = "attn_v -> attn_out"
    assert told == {
        "bert": ([values], ["attn_q, attn_k, attn_v, ffn_up", "ffn_down"]),
        "gpt2": (["attn_norm -> attn_qkv", values, "ffn_norm -> ffn_up"], ["ffn_down"]),
        "olmo2": ([values, "ffn_up -> ffn_down"], ["attn_q, attn_k, attn_v, ffn_gate, ffn_up"]),
        "bitnet": (
            [
                "attn_norm -> attn_q, attn_k, attn_v",
                "attn_sub_norm -> attn_out",
                "ffn_norm -> ffn_gate, ffn_up",
                "ffn_sub_norm -> ffn_down",
            ],
            [],
        ),
        "phi3": (["attn_norm -> attn_qkv", values, "ffn_norm -> ffn_gate_up", "ffn_up -> ffn_down"], []),
        "qwen3_moe": (
            [
                "attn_norm -> attn_q, attn_k, attn_v",
                values,
                "ffn_norm -> router, expert_gate, expert_up",
                "expert_up -> expert_down",
            ],
            [],
        ),
    }


def test_a_row_is_scaled_in_the_matrix_of_its_expert_only(tmp_path: Path) -> None:
    """Of a stack, whose other matrices keep their bits."""
    if not STACKED:
        return
    ckpt = open_checkpoint(str(save("stacked", tmp_path)))
    fold = next(fold for fold in find_folds(ckpt)[0] if fold.name == "layer 1, expert 3: expert_up -> expert_down")
    ups, downs = (ckpt.read(name) for name in fold.tensors)
    scales = np.linspace(0.5, 2, fold.width)
    for index in range(len(ups)):
        up = fold_values(ups[index], fold.tensors[0], index, False, [(fold, scales)])
        down = fold_values(downs[index], fold.tensors[1], index, False, [(fold, scales)])
        assert np.array_equal(up[: fold.width], ups[index][: fold.width])  # the gate
        assert np.array_equal(up, ups[index]) == np.array_equal(down, downs[index]) == (index != 3)


def text(count: int = 4) -> list[list[int]]:
    return [list(map(int, row)) for row in np.random.default_rng(3).integers(3, models.VOCAB, (count, 32))]


def search(root: Path, folder: Path, folds: Sequence[int], **options: Any) -> dict[int, Found]:
    """`choose_scales` in this process."""
    argument = {"chunks": text(), "kind": "Q4_0", "imatrix": False, "method": "grid", "threads": 1} | options
    folder.mkdir()
    serve({"root": str(root), "folds": list(folds), "out": str(folder)} | argument, Silent())
    return read_scales(folder)


def inputs(root: Path, name: str, chunks: Sequence[Sequence[int]]) -> Float64:
    """Every row that the module with the parameter `name` is given."""
    import torch
    import transformers

    architecture = json.loads((root / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(root, attn_implementation="eager").eval()
    rows: list[Any] = []
    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for chunk in chunks:
            model(torch.tensor([chunk]))
    found: Float64 = torch.cat(rows).double().numpy()
    return found


@pytest.mark.parametrize("imatrix", [False, True])
def test_the_scales_lose_least_of_all_exponents(imatrix: bool, tmp_path: Path) -> None:
    """By the definition, with the inputs themselves in the place of their sums: |(Q(W s) / s - W) x|² on average."""
    root = save("llama", tmp_path, head_dim=32)
    ckpt = open_checkpoint(str(root))
    folds = find_folds(ckpt)[0]
    chosen = [4, 5, 6, 7]
    found = search(root, tmp_path / "search", chosen, imatrix=imatrix)
    assert list(found) == chosen
    for number, one in found.items():
        fold = folds[number]
        x = inputs(root, fold.multiplied[0].tensor, text())
        weights = [ckpt.read(other.tensor) for other in fold.multiplied]

        def loss(scales: Float64, fold: Fold = fold, x: Float64 = x, weights: list[Any] = weights) -> float:
            by = fold.columns(scales)
            importance = ((x * x).mean(0) / by**2).astype(np.float32) if imatrix else None
            total = 0.0
            for weight in weights:
                error = quantized("Q4_0", (weight * by).astype(np.float32), importance) / by - weight
                total += float(((x @ error.T) ** 2).sum(1).mean())
            return total

        ones = np.ones(fold.width)
        assert one.before == pytest.approx(loss(ones), rel=1e-3)
        assert one.after == pytest.approx(loss(one.scales), rel=5e-3)
        assert np.log(one.scales).mean() == pytest.approx(0, abs=1e-9)
        size = np.sqrt(fold.pooled((x * x).mean(0)))
        others = [loss(size**a / np.exp(a * np.log(size).mean())) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert one.after <= min(others) * 1.001
        assert one.after <= one.before


@pytest.mark.parametrize(("family", "kind", "imatrix"), [("llama", "Q4_0", False), ("gpt2", "IQ4_NL", True)])
def test_channels_lose_less_than_exponents(family: str, kind: str, imatrix: bool, tmp_path: Path) -> None:
    """By the definition again, on whole matrices: with a group of query heads, and with matrices stored (in, out)."""
    root = save(family, tmp_path, **({"head_dim": 32} if family == "llama" else {}))
    ckpt, options = open_checkpoint(str(root)), {"kind": kind, "imatrix": imatrix}
    folds = find_folds(ckpt)[0]
    chosen = [1] if kind == "IQ4_NL" else [0, 1, 2]  # its encoder is slow
    grid = search(root, tmp_path / "grid", chosen, **options)
    found = search(root, tmp_path / "channels", chosen, method="channels", **options)
    for number, one in found.items():
        fold = folds[number]
        x = inputs(root, fold.multiplied[0].tensor, text())
        weights = [ckpt.read(other.tensor) for other in fold.multiplied]
        weights = [weight.T if family == "gpt2" else weight for weight in weights]

        def loss(scales: Float64, fold: Fold = fold, x: Float64 = x, weights: list[Any] = weights) -> float:
            by = fold.columns(scales).astype(np.float32)
            importance = ((x * x).mean(0) / by**2).astype(np.float32) if imatrix else None
            errors = [quantized(kind, weight * by, importance) / by - weight for weight in weights]
            return float(sum(((x @ error.T) ** 2).sum(1).mean() for error in errors))

        assert one.before == pytest.approx(loss(np.ones(fold.width)), rel=5e-3)
        assert one.after == pytest.approx(loss(one.scales), rel=5e-3)
        assert one.after < 0.95 * grid[number].after


def outliers(arrays: dict[str, Any]) -> dict[str, Any]:
    """A model whose norms make eight channels 30 times as large as the others, and whose matrices take it back."""
    for name, values in arrays.items():
        if name.endswith("layernorm.weight"):
            values[::8] *= 30
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            values[:, ::8] /= 3
    return arrays


def test_channels_with_large_inputs_are_protected(tmp_path: Path) -> None:
    """What AWQ is for: the error falls by much, and in the network as in the sums."""
    root = altered(save("llama", tmp_path / "plain", head_dim=32), tmp_path / "model", outliers)
    folds = find_folds(open_checkpoint(str(root)))[0]
    norms = [number for number, fold in enumerate(folds) if "norm" in fold.kind]
    found = search(root, tmp_path / "search", norms)
    assert all(one.after < 0.7 * one.before for one in found.values())
    scaled = [(folds[number], one.scales) for number, one in found.items()]
    rounded_before = quantize(root, tmp_path / "before", [])
    rounded_after = quantize(root, tmp_path / "after", scaled)
    base = logits(root)
    errors = [float(np.square(logits(folder) - base).mean()) for folder in (rounded_before, rounded_after)]
    assert errors[1] < 0.8 * errors[0]


def quantize(root: Path, target: Path, scaled: Sequence[tuple[Fold, Float64]]) -> Path:
    """The checkpoint with these folds, the matrices that norms feed rounded to Q4_0."""
    ckpt = open_checkpoint(str(root))
    readers = {one.tensor for fold in find_folds(ckpt)[0] if "norm" in fold.kind for one in fold.multiplied}

    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        new = {name: fold_values(values, name, 0, False, scaled) for name, values in arrays.items()}
        return {name: quantized("Q4_0", values, None) if name in readers else values for name, values in new.items()}

    return altered(root, target, change)


@pytest.mark.parametrize("family", ["qwen3_moe", *STACKED])
def test_experts_that_saw_nothing_keep_their_scales(family: str, tmp_path: Path) -> None:
    """Two tokens reach few of six experts; those they reach lose no more than before."""
    root = save(family, tmp_path, **({} if family == "stacked" else {"moe_intermediate_size": 64}))
    folds = find_folds(open_checkpoint(str(root)))[0]
    wanted = [n for n, fold in enumerate(folds) if fold.num_columns % 32 == 0]
    found = search(root, tmp_path / "search", wanted, chunks=[[5, 6]])
    missed = [n for n, one in found.items() if one.why]
    assert list(found) == wanted
    assert all("expert" in folds[n].name for n in missed)
    assert all(np.array_equal(found[n].scales, np.ones(folds[n].width)) for n in missed)
    assert all(one.after <= one.before for one in found.values())
    if family == "qwen3_moe":
        assert 0 < len(missed) < len([n for n in wanted if "expert_down" in folds[n].kind])


def run(
    root: Path, folder: Path, chunks: Sequence[Sequence[int]] = (), *, headers_only: bool = False, **keys: Any
) -> Any:
    """The pass, as a recipe runs it."""
    folder.mkdir()
    tokens = tuple(tuple(chunk) for chunk in chunks or text())
    texts = Calibration(name="text", sha256="0" * 64, chunks=tokens, selection=tokens[:1])
    context = Context(threads=1, calibration=lambda: texts, headers_only=headers_only)
    return run_method(NAME, open_checkpoint(str(root)), folder, Config(**keys), context)


@pytest.mark.slow
def test_the_pass_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    """Loaded as its config.json says it computes the same; headers alone say the same sizes; its report."""
    root = write_llama(tmp_path / "model", dtype="BF16", layers=2)
    outcome = run(root, tmp_path / "new", type="iq4_nl", imatrix=True)
    assert [row.partition(":")[0] for row in outcome.report] == [
        "attn_norm -> attn_q, attn_k, attn_v",
        "attn_v -> attn_out",
        "ffn_norm -> ffn_gate, ffn_up",
        "ffn_up -> ffn_down",
    ]
    assert all("of 2 scaled" in row and "as IQ4_NL -" in row for row in outcome.report)
    assert difference(logits(tmp_path / "new", dtype="auto"), logits(root)) < 1e-4
    run(root, tmp_path / "planned", headers_only=True, type="iq4_nl")
    planned, new = open_checkpoint(str(tmp_path / "planned")), open_checkpoint(str(tmp_path / "new"))
    assert {n: (t.dtype, t.shape) for n, t in planned.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in new.tensors.items()
    }
    assert planned.config == new.config
    assert new.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert new.tensors["model.layers.0.input_layernorm.weight"].dtype == "F32"
    step = new.sidecar.steps[-1] if new.sidecar else None
    assert step is not None
    assert (step.method, step.config) == (NAME, {"type": "IQ4_NL", "imatrix": True, "search": "channels"})


def test_rows_that_do_not_fill_blocks_are_left(tmp_path: Path) -> None:
    """Of some folds: a row each kind; of all: an error."""
    root = save("qwen3_moe", tmp_path)
    outcome = run(root, tmp_path / "some", headers_only=True)
    assert outcome.report == ("expert_up -> expert_down: left as it is, rows of 48 do not fill blocks of 32",)
    with pytest.raises(UsageError, match="no matrix can be Q4_K: rows of 64 do not fill its blocks of 256"):
        run(root, tmp_path / "none", headers_only=True, type="Q4_K")


def test_bad_input(tmp_path: Path) -> None:
    """A type that is none; weights that are not finite."""
    with pytest.raises(ValueError, match="Q4_9"):
        Config(type="Q4_9")

    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
        return arrays

    root = altered(save("llama", tmp_path / "good"), tmp_path / "bad", spoil)
    with pytest.raises(CheckpointError, match="holds NaN") as caught:
        fold_all(root, tmp_path / "new")
    assert caught.value.line == "model.layers.1.mlp.up_proj.weight: holds NaN or infinite values"
