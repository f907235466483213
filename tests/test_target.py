"""Device profiles: every one loads, every figure says where it is from, and what is wrong is told with file:line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from efficli.errors import UsageError
from efficli.target import Figure, Range, load_target, target_names
from efficli.target.profile import FOLDER

TERRESTRIAL = {
    "pi-zero-2w", "pi4-2gb", "pi4-4gb", "pi4-8gb", "pi5-4gb", "pi5-8gb", "pi5-16gb", "snapdragon-695",
    "snapdragon-7-gen-3", "snapdragon-8-gen-2", "snapdragon-8-gen-3", "snapdragon-8-elite", "iphone-a17", "iphone-a18",
    "iphone-a19pro", "x86-laptop",
}  # fmt: skip
SPACE = {
    "zynq7020", "zynq-ultrascale", "versal-ai-edge", "jetson-tx2i", "jetson-orin-nano", "unibap-ix5", "unibap-ix10",
    "myriad2", "myriadx", "gr740", "pic64-hpsc", "snapdragon-855-orbit",
}  # fmt: skip
MINE = """version: 1
about: a board
arch: aarch64
cores:
  - {count: 4, name: Cortex-A72, ghz: 1.5}
runs: [gguf, onnx]
ram:
  total_mib: {value: 1024, source: label, confidence: vendor}
  usable_mib: {value: 800, source: free, confidence: measured}
bandwidth:
  theoretical: {value: 12.8, source: label, confidence: vendor}
"""


def figures(part: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure in a profile."""
    if isinstance(part, Figure):
        yield path, part
    elif isinstance(part, tuple):
        for place, item in enumerate(part):
            yield from figures(item, f"{path}[{place}]")
    elif hasattr(type(part), "model_fields"):
        for name in type(part).model_fields:
            yield from figures(getattr(part, name), f"{path}.{name}")


@pytest.mark.parametrize("name", target_names())
def test_every_profile_loads_and_every_figure_has_a_source(name):
    target = load_target(name)
    assert target.name == name
    assert (FOLDER / f"{name}.yaml").read_text().startswith("version: 1\n")
    found = list(figures(target))
    assert len(found) >= 4
    for path, figure in found:
        assert figure.source.strip(), path
        low, high = figure.range.low, figure.range.high
        assert low <= figure.value <= high, path
        assert low < high or figure.confidence != "estimate", path


def test_the_devices_of_the_survey_are_there():
    assert set(target_names()) >= TERRESTRIAL | SPACE


def test_names_and_aliases_are_unique():
    words = list(target_names())
    for name in target_names():
        words += load_target(name).aliases
    assert sorted(set(words)) == sorted(words)
    assert all(word == word.lower() for word in words)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("pi-zero2w", "pi-zero-2w"), ("pi4-2g", "pi4-2gb"), ("pi4-4g", "pi4-4gb"), ("pi4-8g", "pi4-8gb"),
     ("pi5-4g", "pi5-4gb"), ("pi5-8g", "pi5-8gb"), ("PI5-16G", "pi5-16gb"), ("zynq-us+", "zynq-ultrascale"),
     ("snapdragon-855", "snapdragon-855-orbit"), ("n150", "x86-laptop"), ("intel-n150", "x86-laptop"),
     ("orin-nano", "jetson-orin-nano"), ("phone-low", "snapdragon-695"), ("phone-mid", "snapdragon-7-gen-3"),
     ("phone-high-23", "snapdragon-8-gen-2"), ("phone-high", "snapdragon-8-gen-3"),
     ("phone-flag", "snapdragon-8-elite")],
)  # fmt: skip
def test_an_alias_is_the_same_device(alias, name):
    assert load_target(alias) == load_target(name)


def test_what_does_not_run_there_says_why():
    silent = [name for name in target_names() if not load_target(name).runs]
    assert silent == ["gr740", "myriad2", "myriadx"]
    for name in target_names():
        target = load_target(name)
        assert target.why_not or set(target.runs) == {"gguf", "onnx"}


def test_boards_that_differ_in_memory_alone_share_the_rest():
    small, large = load_target("pi4-2gb"), load_target("pi4-8gb")
    assert small.decode == large.decode
    assert small.ram.usable_mib.value < large.ram.usable_mib.value / 4
    assert small.aliases == ("pi4-2g",)


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        load_target("pi5-8")
    assert caught.value.line == "unknown target 'pi5-8'"
    assert "'pi5-8gb'" in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        load_target("qqqqqq")
    assert caught.value.hint == "`efficli targets` lists them; or give the path of a YAML file"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text(MINE)
    target = load_target(path)
    assert (target.name, target.num_cores, target.decode, target.aliases) == ("board", 4, (), ())
    assert load_target(str(path)) == target


def test_a_file_that_is_like_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\nlike: pi5-8gb\nabout: mine\npower:\n  idle_w: {value: 3, source: meter, confidence: measured}\n"
    )
    mine, pi = load_target(path), load_target("pi5-8gb")
    assert mine.decode == pi.decode
    assert (mine.aliases, mine.about, mine.power.load_w) == ((), "mine", None)
    assert mine.power.idle_w.value == 3


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (MINE + "memory: 3\n", "{}:12: unknown key 'memory'", None),
        (MINE.replace("usable_mib", "usabel_mib"), "{}:9: unknown key 'ram.usabel_mib'",
         "did you mean 'usable_mib' or 'total_mib'?"),
        (MINE.replace("value: 800, ", "value: 800, vlaue: 1, "), "{}:9: unknown key 'ram.usable_mib.vlaue'",
         "did you mean 'value'?"),
        (MINE.replace("ghz: 1.5", "ghz: fast"), "{}:5: cores.0.ghz: 'fast', expected number", None),
        (MINE.replace("count: 4, ", "count: 4, cuont: 4, "), "{}:5: unknown key 'cores.0.cuont'",
         "did you mean 'count'?"),
        (MINE.replace("value: 800, ", "value: 800, low: 900, high: 950, "),
         "{}:9: ram.usable_mib: 900 .. 950 does not hold 800", None),
        (MINE.replace("value: 800, ", "value: 800, low: 700, "),
         "{}:9: ram.usable_mib: has low or high alone, expected both or neither", None),
        (MINE.replace("confidence: measured", "confidence: estimate"),
         "{}:9: ram.usable_mib: an estimate needs low and high", None),
        (MINE.replace("confidence: measured", "confidence: sure"),
         "{}:9: ram.usable_mib.confidence: 'sure', expected 'measured', 'published', 'vendor' or 'estimate'", None),
        (MINE.replace("source: free, ", ""), "{}:9: key 'ram.usable_mib.source' is missing", None),
        (MINE.replace("runs: [gguf, onnx]", "runs: [gguf]"),
         "{}:1: key 'why_not' is missing, and 'runs' does not name both gguf and onnx", None),
        (MINE.replace("value: 800", "value: 1e999"), "{}:9: '1e999' is not a finite number", None),
        (MINE.replace("value: 800", "value: -8"), "{}:9: ram.usable_mib.value: -8, expected greater than 0", None),
        ("version: 1\nlike: pi6-8g\n", "{}:2: like: unknown target 'pi6-8g'",
         "did you mean 'pi5-8gb' or 'pi4-8gb' or 'pi5-4gb'?"),
        (MINE + "link:\n  about: radio\n", "{}:12: key 'link.uplink_kbit_s' is missing", None),
        (MINE + "lacks: [TQ1_0]\n", "{}:1: has 'lacks' or 'lacks_source' alone, expected both or neither", None),
        (MINE.replace("theoretical: {value: 12.8, source: label, confidence: vendor}", "{}"),
         "{}:10: bandwidth: is empty, expected theoretical, memcpy or read", None),
        ("version: 1\nlike: 5\n", "{}:2: like: 5, expected the name of a target", None),
        ("- a\n", "{}:1: expected keys such as version, about, cores and ram", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_line(text, line, hint, tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_target(path)
    assert (caught.value.line, caught.value.hint) == (line.format(path), hint)


def test_a_file_that_is_not_there_or_is_no_text(tmp_path):
    with pytest.raises(UsageError, match="no such target"):
        load_target(tmp_path / "none.yaml")
    (tmp_path / "raw.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"^is no text in UTF-8$"):
        load_target(tmp_path / "raw.yaml")
    with pytest.raises(UsageError, match=r"^is a folder$"):
        load_target(tmp_path)


def test_a_fit_on_few_points_promises_little():
    one = Figure(value=10, source="s", confidence="published", n=1)
    assert (one.range.low, one.range.high) == (6, 14)
    two = Figure(value=10, low=5, high=11, source="s", confidence="published", n=2)
    assert (two.range.low, two.range.high) == (5, 14)
    many = Figure(value=10, low=9, high=11, source="s", confidence="published", n=3)
    assert (many.range.low, many.range.high) == (9, 11)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Range(9.94, 8.31, 11.7), "9.9 t/s (8.3 - 12)"),
        (Range(3, 3, 3), "3 t/s"),
        (Range(1234, 99.4, 4321), "1,200 t/s (99 - 4,300)"),
    ],
)  # fmt: skip
def test_a_range_is_written_with_two_digits(found, text):
    assert found.text("t/s") == text


def test_the_profiles_are_in_the_package():
    assert Path(__file__).resolve().parent.parent / "efficli" / "targets" == FOLDER
    assert {path.suffix for path in FOLDER.iterdir()} == {".yaml"}
