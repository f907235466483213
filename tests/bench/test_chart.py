"""The chart: a PNG with every artifact in it, labels that cover nothing, and words for what is missing."""

from __future__ import annotations

import sys
from itertools import combinations

import pytest

from efficli.bench import chart
from efficli.bench.chart import draw
from efficli.bench.figures import BenchResult
from efficli.errors import MissingExtra, OutputError, UsageError
from tests.bench.made_results import MACHINE, artifact, everything, several

PNG = b"\x89PNG\r\n\x1a\n"


def many():
    """Types of one model, close to each other in size and speed."""
    sizes = [138, 110, 99, 97.5, 92, 89, 88, 89.5, 80, 75, 538]
    artifacts = [
        artifact(f"out/SmolLM2-135M-Instruct-type{i}.gguf", mib, 2400 / mib + i / 10, kld=0.001 * i, noise=0.02, seed=i)
        for i, mib in enumerate(sizes)
    ]
    return BenchResult(machine=MACHINE, artifacts=artifacts)


def figure_of(result, monkeypatch, tmp_path):
    """matplotlib's own figure behind the picture."""
    from matplotlib.figure import Figure

    made = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **_: (made.append(self), out.write(PNG)))
    draw(result, tmp_path / "made.png")
    return made[0]


@pytest.mark.parametrize("result", [several(), many(), everything()], ids=["several", "many", "everything"])
def test_it_is_a_picture(result, tmp_path):
    from matplotlib.image import imread

    draw(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (780, 1200)
    assert len({tuple(pixel) for row in pixels[::3, ::3] for pixel in row}) > 20  # dots of several colours


def boxes(figure):
    """Label -> its rectangle; the rectangles of the dots."""
    axes = figure.axes[0]
    labels = {text.get_text(): text.get_window_extent() for text in axes.texts}
    dots = [
        axes.transData.transform(points)[0]
        for points in (group.get_offsets() for group in axes.collections)
        if len(points)
    ]
    return labels, dots


@pytest.mark.parametrize("result", [several(), many()], ids=["several", "many"])
def test_labels_cover_neither_each_other_nor_dots(result, monkeypatch, tmp_path):
    figure = figure_of(result, monkeypatch, tmp_path)
    figure.canvas.draw()
    labels, dots = boxes(figure)
    assert len(labels) == len([one for one in result.artifacts if one.tests])
    frame = figure.axes[0].get_window_extent()
    for one, other in combinations(labels.values(), 2):
        assert not one.shrunk(0.96, 0.9).overlaps(other.shrunk(0.96, 0.9))
    for box in labels.values():
        assert not any(box.contains(*dot) for dot in dots)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_what_it_says(monkeypatch, tmp_path):
    result = several()
    result.artifacts[1].quality = None
    figure = figure_of(result, monkeypatch, tmp_path)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Size and speed: reference-*.gguf"
    assert {text.get_text() for text in axes.texts} == {"Q4_K_M", "Q2_K", "Q8_0 *"}
    assert axes.get_xlabel() == "size of the file, MiB" and axes.get_ylabel() == "decode 128 tokens, tokens/s"
    small = figure.get_supxlabel()
    for words in (
        "2025-11-23",
        "2 threads",
        "Grey: divergence not known",
        "did not settle",
        "busy with something else",
    ):
        assert words in small
    assert "Not drawn, because it was not measured: huge.gguf" in small
    assert figure.axes[1].get_ylabel() == "mean KL divergence from the origin, nats"


def test_without_any_divergence_there_is_no_scale(monkeypatch, tmp_path):
    result = BenchResult(machine=MACHINE, artifacts=[artifact("a.gguf", 5, 100, kld=None)])
    assert len(figure_of(result, monkeypatch, tmp_path).axes) == 1


@pytest.mark.parametrize("kld", [0.0, 0.01])
def test_one_artifact_is_enough_and_no_loss_is_drawn_too(kld, tmp_path):
    one = artifact("a.gguf", 5, 100, kld=0.5)
    one.quality = type(one.quality)(kld_mean=kld, top1_agreement=1.0, origin="a")
    draw(BenchResult(machine=MACHINE, artifacts=[one]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_models_that_write_nothing_are_drawn_by_their_prefill(monkeypatch, tmp_path):
    result = several()
    for one in result.artifacts:
        one.tests = one.tests[:1]
    assert figure_of(result, monkeypatch, tmp_path).axes[0].get_ylabel() == "prefill 512 tokens, tokens/s"


def test_nothing_measured_is_nothing_to_draw(tmp_path):
    result = several()
    result.artifacts = result.artifacts[-1:]
    with pytest.raises(UsageError, match="no artifact has a speed to draw"):
        draw(result, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_file_is_replaced_whole_or_not_at_all(monkeypatch, tmp_path):
    place = tmp_path / "a.png"
    place.write_bytes(b"old")
    monkeypatch.setattr(chart, "_picture", lambda *_: PNG)
    with pytest.raises(OutputError, match="cannot write"):
        draw(several(), tmp_path / "absent" / "a.png")
    monkeypatch.setattr(
        "efficli.ops.storage.sync_file", lambda path: (_ for _ in ()).throw(OutputError("not confirmed"))
    )
    with pytest.raises(OutputError, match="not confirmed"):
        draw(several(), place)
    assert place.read_bytes() == b"old" and list(tmp_path.iterdir()) == [place]
    monkeypatch.undo()
    draw(several(), place)
    assert place.read_bytes().startswith(PNG) and list(tmp_path.iterdir()) == [place]


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra) as caught:
        draw(several(), tmp_path / "a.png")
    assert "matplotlib" in caught.value.message and "efficli[plot]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m-Q4.gguf", "m-Q8.gguf"], ("m-*.gguf", ["Q4", "Q8"])),
        (["a.gguf", "b.gguf"], ("*.gguf", ["a", "b"])),
        (["m-Q4_K_M.gguf", "m-Q4_K_S.gguf"], ("m-*.gguf", ["Q4_K_M", "Q4_K_S"])),
        (["x/m.gguf", "y/m.gguf"], ("*.gguf", ["x/m", "y/m"])),
        (["one", "other"], ("2 artifacts", ["one", "other"])),
        (["m-Q4.gguf", "m-Q4.onnx"], ("m-*", ["Q4.gguf", "Q4.onnx"])),
        (["m", "m-Q4"], ("2 artifacts", ["m", "m-Q4"])),
        (["one.gguf"], ("one.gguf", [""])),
    ],
)
def test_what_names_share_goes_into_the_title(names, expected):
    assert chart._labels(names) == expected


def test_a_name_is_neither_a_formula_nor_an_error(tmp_path):
    for name in ("a$\\frac$b.gguf", "a\udcff\nb.gguf"):
        two = [artifact(f"{n}{name}", 5 + n, 100) for n in (0, 1)]
        for number, artifacts in enumerate(([artifact(name, 5, 100)], two)):
            path = tmp_path / f"{number}.png"
            draw(BenchResult(machine=MACHINE, artifacts=artifacts), path)
            assert path.read_bytes().startswith(b"\x89PNG")
            path.unlink()
