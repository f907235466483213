"""Measured losses: one tensor at a time against a network put together by hand; noise; the walk; rounded codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.network.divergence import Divergence
from efficli.network.model import Network
from efficli.ops import ggml
from efficli.precision.choice import decide, typical
from efficli.precision.curves import row_reader
from efficli.precision.encoder import Encoder
from efficli.precision.losses import losses
from efficli.precision.measure import NOISE
from efficli.precision.search import Task, Walk
from efficli.precision.typed import TypedNetwork
from efficli.progress import Silent
from efficli.surgery import matrices
from tests import whole
from tests.network.checkpoints import altered, stacked
from tests.precision.here import Shop, drawn, open_shop

FEW = ("Q4_0", "Q5_1", "Q8_0")


@pytest.fixture(scope="module")
def typed(twin: Shop) -> TypedNetwork:
    return TypedNetwork(Network(twin.ckpt, threads=1), twin.view.tensors, Encoder(twin.shop.statistics))


def plain_divergence(found: Shop, types: dict[str, str]) -> float:
    """Of a network whose matrices are replaced by hand."""
    network = Network(found.ckpt, threads=1)
    divergence = Divergence(network, found.shop.context.need_calibration().selection)
    encoder, read = Encoder(found.shop.statistics), row_reader(found.ckpt, matrices(found.ckpt))
    for tensor in found.view.tensors:
        if tensor.name in types:
            for number, part in enumerate(tensor.parts):
                rows = read(part, 0, part.stop - part.start)
                values = network.weight(part.name, part.index)
                values[part.start : part.stop] = encoder.decoded(tensor, number, types[tensor.name], rows)
                network.replace(part.name, values, part.index)
    return divergence.mean()


def test_the_measured_loss_of_a_type_is_the_divergence_with_it_alone(twin: Shop) -> None:
    found = twin.shop.curves("kld")
    assert set(found) == {tensor.name for tensor in twin.view.tensors}
    for name in ("blk.0.attn_k.weight", "blk.2.ffn_down.weight", "output.weight", "token_embd.weight"):
        told = {kind: point.kld for kind, point in found[name].points.items() if point.kld is not None}
        assert 2 <= len(told) <= 4 and "F16" not in told
        for kind in list(told)[:2]:
            assert told[kind] == pytest.approx(plain_divergence(twin, {name: kind}), rel=1e-3, abs=1e-9)
        for row in losses(found[name], "kld").values():
            assert np.isfinite(row) and row >= 0


def test_a_type_can_be_taken_back_whatever_else_is_set(twin: Shop, typed: TypedNetwork) -> None:
    names = [tensor.name for tensor in twin.view.tensors][:4]
    ids = list(twin.shop.context.need_calibration().selection[0])
    network = typed._network
    before = network.forward(ids)
    assert typed.use_all(dict.fromkeys(names, "Q4_0")) == -1
    assert np.abs(network.forward(ids) - before).max() > 1e-3
    typed.noise(names[1], NOISE, 0)
    assert typed.use_all({names[2]: None, names[1]: "Q8_0"}) >= 0
    typed.use_all(dict.fromkeys(names))
    np.testing.assert_array_equal(network.forward(ids), before)
    assert set(typed.types.values()) == {None}


def test_noise_is_as_large_as_it_is_said_to_be(twin: Shop, typed: TypedNetwork) -> None:
    """Twice the amplitude is four times the error; its error is tr(E H Eᵀ) of the noise that the network has."""
    name = "blk.1.ffn_down.weight"
    tensor = typed.tensors[name]
    (part,) = tensor.parts
    own = typed._network.original(part.name)
    error = typed.noise(name, NOISE, 7)
    noise = (typed._network.weight(part.name) - own).astype(np.float64)
    gram = np.asarray(twin.shop.statistics.gram(tensor, 0), np.float64)
    assert error == pytest.approx(np.trace(noise @ gram @ noise.T), rel=1e-3)
    assert noise.std() == pytest.approx(NOISE * np.sqrt(np.square(own.astype(np.float64)).mean()), rel=0.02)
    typed.use(name, None)
    assert typed.noise(name, 2 * NOISE, 7) == pytest.approx(4 * error, rel=1e-3)
    typed.use(name, None)
    assert typed.noise(name, NOISE, 8) != error
    typed.use(name, None)


def test_the_sensitivity_is_divergence_for_each_unit_of_error(twin: Shop, typed: TypedNetwork) -> None:
    """Whatever the size of the error: the divergence is quadratic in it."""
    found = twin.shop.curves("higgs")
    divergence = Divergence(typed._network, twin.shop.context.need_calibration().selection)
    for name in ("blk.0.attn_v.weight", "blk.1.ffn_up.weight", "output.weight"):
        error = typed.noise(name, NOISE, 0)
        measured = divergence.mean()
        typed.use(name, None)
        assert found[name].sensitivity == pytest.approx(measured / error, rel=1e-3)
        half = typed.noise(name, NOISE / 2, 0)
        assert divergence.mean() / half == pytest.approx(measured / error, rel=0.2)
        typed.use(name, None)
        assert set(losses(found[name], "higgs")) == set(found[name].points)


def test_experts_in_a_stack_and_parts_of_a_matrix(tmp_path: Path, in_this_process: None) -> None:
    """Gate and up of a stack are two tensors of the file and one matrix of the network."""
    folder = tmp_path / "apart"
    whole.write(folder, whole.KINDS["qwen3_moe"], num_hidden_layers=1)
    path = altered(folder, tmp_path / "stack", stacked)
    for file in folder.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    ids = drawn(1000, 2)
    found = []
    for model in (folder, path):
        ckpt = open_checkpoint(model)
        shop = open_shop(model, tmp_path / f"kept-{model.name}", ids)
        network = Network(ckpt, threads=1)
        typed = TypedNetwork(network, shop.view.tensors, Encoder(shop.shop.statistics))
        divergence = Divergence(network, ids.selection)
        names = [name for name in typed.tensors if "ffn_gate_exps" in name or "ffn_up_exps" in name]
        assert len(names) == 2 and all(len(typed.tensors[name].parts) == 6 for name in names)
        numbers = []
        for types in ({names[0]: "Q4_0"}, {names[1]: "Q8_0"}, {names[0]: None}, {names[1]: None}):
            typed.use_all(types)
            numbers.append(divergence.mean())
        assert numbers[0] > 1e-6 and numbers[1] > 1e-6 and abs(numbers[3]) < 1e-6
        found.append(numbers)
        told = shop.shop.curves("hess")
        found[-1] += [point.mse for name in names for point in told[name].points.values()]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_the_walk_ends_no_worse_than_any_candidate_and_within_the_budget(twin: Shop) -> None:
    choices, told = twin.shop.choices, typical(twin.view, twin.shop.choices)
    low = twin.view.nbytes({name: next(iter(sizes)) for name, sizes in choices.nbytes.items()})
    budget = int(low * 1.2)
    decision = decide(twin.view, choices, lambda _: budget, told, "size alone", {})
    uniform = dict.fromkeys(choices.nbytes, "IQ4_NL")
    assert twin.view.nbytes(uniform) <= budget
    bench = twin.shop.bench()
    network = Network(twin.ckpt, threads=1)
    typed = TypedNetwork(network, twin.view.tensors, Encoder(twin.shop.statistics))
    task = Task(
        candidates={"allocation": decision.types, "uniform": uniform},
        nbytes=choices.nbytes,
        losses=told,
        budget=decision.tensor_budget,
        trials=30,
        groups={"qkv.0": tuple(f"blk.0.attn_{part}.weight" for part in "qkv")},
    )
    # of a group all have one type in the candidates
    task = replace(
        task,
        candidates={
            name: types | dict.fromkeys(task.groups["qkv.0"], types["blk.0.attn_k.weight"])
            for name, types in task.candidates.items()
        },
    )
    if any(sum(choices.nbytes[n][k] for n, k in t.items()) > task.budget for t in task.candidates.values()):
        pytest.fail("a candidate is above the budget")
    found = Walk(task, typed, Divergence(network, bench.chunks), Silent()).run()
    assert set(found.measured) == {"allocation", "uniform"}
    for name, types in task.candidates.items():
        assert found.measured[name] == pytest.approx(plain_divergence(twin, dict(types)), rel=1e-3)
    assert found.divergence <= min(found.measured.values())
    assert found.divergence == pytest.approx(plain_divergence(twin, found.types), rel=1e-3)
    assert (found.divergence < min(found.measured.values())) == (found.accepted > 0)
    assert 0 < found.trials <= 31
    assert sum(choices.nbytes[name][kind] for name, kind in found.types.items()) <= task.budget
    assert len({found.types[name] for name in task.groups["qkv.0"]}) == 1


def test_error_feedback_is_never_worse_and_is_a_type_like_any_other(kept: Path, in_this_process: None) -> None:
    found = open_shop("reference-twin", kept, drawn(1001, 8), rounding="error-feedback")
    statistics, read = found.shop.statistics, row_reader(found.ckpt, matrices(found.ckpt))
    ours = Encoder(statistics, rounding="error-feedback")
    ggmls = Encoder(statistics)
    gains = []
    for tensor in found.view.tensors[::5]:
        rows = read(tensor.parts[0], 0, tensor.rows)
        gram = statistics.gram(tensor, 0)
        for kind in FEW:
            if gram is None:
                assert not ours.feeds_back(tensor, kind)
                continue
            assert ours.feeds_back(tensor, kind)
            told = []
            for encoder in (ggmls, ours):
                data = encoder.encode(tensor, 0, kind, rows)
                assert len(data) == tensor.rows * ggml.row_bytes(kind, tensor.columns)
                error = (ggml.decode(kind, data, *rows.shape) - rows).astype(np.float64)
                told.append(np.einsum("rc,rc->r", error @ np.asarray(gram, np.float64), error))
            assert (told[1] <= told[0] * (1 + 1e-4)).all()
            gains.append(told[1].sum() / told[0].sum())
    assert gains and max(gains) < 0.9
