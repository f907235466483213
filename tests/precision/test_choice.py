"""The choice of types within a budget, from headers alone: sizes, what is told of them, groups, what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import FitError, UsageError
from efficli.ops.ggml_types import NEED_IMATRIX
from efficli.pipeline.file_view import GgufView
from efficli.precision.choice import Choices, Decision, choices, decide, groups, typical
from tests.pico import write_llama


@pytest.fixture(scope="module")
def twin() -> GgufView:
    return GgufView(open_checkpoint("reference-twin"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> GgufView:
    """Rows of 256, head and table apart."""
    folder = tmp_path_factory.mktemp("in") / "wide"
    return GgufView(open_checkpoint(write_llama(folder, hidden=256, ffn=512, layers=3, dtype="BF16", tie=False)))


def every(view: GgufView, *wanted: str, lacking: tuple[str, ...] = (), slow: tuple[str, ...] = ()) -> Choices:
    return choices(view, wanted, weighed=view.multiplied, lacking=lacking, slow=slow)


def uneven(view: GgufView, found: Choices) -> dict[str, dict[str, float]]:
    """Losses that differ from tensor to tensor by orders of magnitude."""
    draw = np.random.default_rng(0)
    return {
        name: {kind: loss * scale for kind, loss in told.items()}
        for (name, told), scale in zip(
            typical(view, found).items(), 10 ** draw.uniform(-2, 2, len(view.tensors)), strict=True
        )
    }


def choose(view: GgufView, budget: int, found: Choices, tied: Mapping[str, tuple[str, ...]] | None = None) -> Decision:
    return decide(view, found, lambda _: budget, uneven(view, found), "drawn", tied or {})


def smallest(view: GgufView, found: Choices) -> int:
    return view.nbytes({name: next(iter(sizes)) for name, sizes in found.nbytes.items()})


@pytest.mark.parametrize("name", ["twin", "wide"])
def test_files_are_within_the_budget_and_fill_it(name: str, request: pytest.FixtureRequest) -> None:
    view: GgufView = request.getfixturevalue(name)
    found = every(view)
    low, high = smallest(view, found), view.nbytes(dict.fromkeys(found.nbytes, "F16"))
    before = np.inf
    for budget in np.geomspace(low, high, 12)[1:-1].astype(int).tolist():
        decision = choose(view, budget, found)
        assert decision.nbytes == view.nbytes(decision.types) <= budget == decision.limit
        assert decision.nbytes >= 0.995 * budget or any("the types allow no file" in row for row in decision.report)
        assert decision.gap <= 1e-3
        assert decision.loss < before
        before = decision.loss
        assert set(decision.types) == {tensor.name for tensor in view.tensors}


@pytest.mark.parametrize("name", ["twin", "wide"])
def test_below_the_smallest_file_its_size_is_named_and_that_size_works(
    name: str, request: pytest.FixtureRequest
) -> None:
    view: GgufView = request.getfixturevalue(name)
    found = every(view)
    with pytest.raises(FitError, match="the smallest possible file has") as raised:
        choose(view, 1000, found)
    assert raised.value.exit_code == 4
    size = int(re.findall(r"\((\d+) bytes\)", raised.value.message)[0])
    assert size == smallest(view, found)
    assert choose(view, size, found).nbytes == size
    with pytest.raises(FitError):
        choose(view, size - 1, found)


def test_a_budget_above_all_of_it_says_so_and_takes_f16(twin: GgufView) -> None:
    decision = choose(twin, 1 << 30, every(twin))
    assert set(decision.types.values()) == {"F16"}
    (row,) = [row for row in decision.report if "budget" in row]
    assert row.startswith("the budget of 1.00 GiB is above")
    assert "F16" in row and decision.gap == 0


def test_types_have_whole_blocks_and_need_no_matrix_where_there_is_none(wide: GgufView, twin: GgufView) -> None:
    found = every(wide)
    assert wide.multiplied == set(found.nbytes) - {"token_embd.weight"}
    assert not NEED_IMATRIX & set(found.kinds["token_embd.weight"])
    assert NEED_IMATRIX & set(found.kinds["output.weight"])
    assert found.kinds["token_embd.weight"][0] == "Q2_K"
    for sizes in found.nbytes.values():
        assert list(sizes.values()) == sorted(sizes.values())
        assert not {"IQ1_S", "IQ1_M", "F32"} & set(sizes)
    assert not {kind for kinds in every(twin).kinds.values() for kind in kinds} & {"Q2_K", "Q4_K", "Q6_K", "IQ3_XXS"}


def test_only_wanted_types_that_the_target_loads_and_is_fast_with(wide: GgufView, twin: GgufView) -> None:
    assert set(every(wide, "Q4_0", "Q8_0").kinds["output.weight"]) == {"Q4_0", "Q8_0"}
    assert "IQ3_S" not in every(wide, slow=("IQ3_S", "IQ2_S")).kinds["output.weight"]
    assert any("IQ2_S, IQ3_S" in note for note in every(wide, slow=("IQ3_S", "IQ2_S")).notes)
    assert "Q8_0" not in every(wide, lacking=("Q8_0",)).kinds["output.weight"]
    assert "Q6_K" in every(wide, "Q6_K", slow=("Q6_K",)).kinds["output.weight"]
    with pytest.raises(UsageError, match="types: Q4_0: the target's runtime cannot load them"):
        every(wide, "Q4_0", "Q8_0", lacking=("Q4_0",))
    with pytest.raises(UsageError, match=r"types: no tensor can be Q4_K: rows of \d+ do not fill its blocks of 256"):
        every(twin, "Q4_K", "Q8_0")
    fallen = every(wide, "IQ2_XXS")
    assert fallen.kinds["token_embd.weight"] == ("F16",)
    assert fallen.notes == ("token_embd.weight: none of the types is for it, it stays F16",)


def test_tied_tensors_share_a_type(twin: GgufView) -> None:
    found = every(twin)
    tied = groups(twin.tensors, ("qkv", "gate-up"))
    assert sorted(len(members) for members in tied.values()) == [2, 2, 2, 3, 3, 3]
    budget = (smallest(twin, found) + view_of_f16(twin, found)) // 2
    free, bound = choose(twin, budget, found), choose(twin, budget, found, tied)
    for members in tied.values():
        assert len({bound.types[name] for name in members}) == 1
    assert any(len({free.types[name] for name in members}) > 1 for members in tied.values())
    assert free.loss <= bound.loss and bound.nbytes <= budget


def view_of_f16(view: GgufView, found: Choices) -> int:
    return view.nbytes(dict.fromkeys(found.nbytes, "F16"))


def test_what_is_one_tensor_is_not_tied(tmp_path: Path) -> None:
    from tests import whole

    whole.write(tmp_path / "gpt2", whole.KINDS["gpt2"])
    view = GgufView(open_checkpoint(tmp_path / "gpt2"))
    for word in ("qkv", "gate-up"):
        with pytest.raises(UsageError, match=f"harmonize: {word} ties no two tensors of this model") as raised:
            groups(view.tensors, (word,))
        assert raised.value.exit_code == 2
