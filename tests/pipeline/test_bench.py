"""The command: what is measured of which files, what fails alone, what is refused before anything runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import gguf
import numpy as np
import pytest

import efficli
from efficli import cli
from efficli.bench import gguf_engine
from efficli.bench.figures import BenchResult
from efficli.errors import CheckpointError, MissingExtra, UnsupportedError, UsageError
from efficli.progress import Silent
from tests.bench.measuring import Interrupting, children, interrupt
from tests.pipeline.bench_words import QUICK, codes, labels
from tests.tiny_architectures import write_encoder, write_recurrent, write_windowed
from tests.tiny_gguf import write_tiny

SCENARIO = """\
name: short
kind: request
chat: true
n_gen: 4
requests: 5
prompts: [def read, class Stack]
objectives: {ttft_ms: 60000, tpot_ms: 60000}
"""


# what is measured


def test_everything_of_a_file(spoken, tmp_path):
    (tmp_path / "s.yaml").write_text(SCENARIO)
    result = efficli.bench(
        spoken["Q4_0"],
        **QUICK | {"starts": True, "threads": (2, 1), "depth": (16, 0), "n_gen": (4,)},
        scenarios=(str(tmp_path / "s.yaml"),),
        targets=("pi5-8gb",),
    )
    [one] = result.artifacts
    assert one.failure is None
    assert labels(result) == [["pp24 @ d16", "tg4 @ d16", "pp24", "tg4"] * 2]
    assert [told.test.threads for told in one.tests] == [2] * 4 + [1] * 4
    assert (one.settings.threads, one.settings.ctx) == (2, 256)  # as much as the scenario would like
    assert [start.cold for start in one.starts] == [True, False]
    assert one.memory.peak_anon > one.memory.before_anon > 0
    [scenario] = one.scenarios
    assert len(scenario.samples) == 5
    assert scenario.goodput.share == 1.0
    assert scenario.notes == ["the file has no chat template: prompts are sent as plain text"]
    [prediction] = one.predictions
    assert prediction.to_json()["predicted"] is True
    assert prediction.memory.anon_known
    assert one.energy_source
    assert one.notes == ["starts and scenarios with 2 threads, the first of --threads"]
    assert one.disturbance.seconds > 0
    told = json.loads(json.dumps(result.to_json()))
    assert set(told["machine"]) == {"cpu_info", "cores", "memory_bytes", "system", "versions"}
    assert len(told["results"]) == 8
    assert (told["interrupted"], told["seconds"] > 0) == (False, True)
    assert children() == set()


def test_defaults_are_shortened_to_the_context_that_was_trained(tiny):
    planned = efficli.bench([tiny], dry_run=True).artifacts[0]
    assert [test.label for test in planned.planned] == ["pp128", "pp256", "tg128"]
    assert (planned.settings.ctx, planned.tests, planned.model) == (256, [], None)
    longer = efficli.bench([tiny], ctx=1000, dry_run=True).artifacts[0]
    assert [test.label for test in longer.planned] == ["pp128", "pp512", "tg128"]
    assert longer.settings.ctx == 1000
    deep = efficli.bench([tiny], depth=(0, 200), dry_run=True).artifacts[0]
    assert [test.label for test in deep.planned] == [
        "pp128", "pp256", "tg128", "pp56 @ d200", "tg56 @ d200",
    ]  # fmt: skip


def test_only_what_was_asked_for(tiny):
    assert labels(efficli.bench([tiny], **QUICK | {"n_prompt": (0,)})) == [["tg8"]]
    assert labels(efficli.bench([tiny], **QUICK | {"n_gen": (0,), "n_prompt": (3, 3, 5)})) == [["pp3", "pp5"]]


def test_an_embedding_model_is_measured_as_far_as_it_goes(tmp_path):
    (tmp_path / "s.yaml").write_text(SCENARIO)
    path = write_encoder(tmp_path / "e.gguf")
    result = efficli.bench([path], **QUICK | {"depth": (0, 9)}, scenarios=(str(tmp_path / "s.yaml"),))
    [one] = result.artifacts
    assert (labels(result), one.failure, one.scenarios) == ([["pp24"]], None, [])
    told = "an embedding model: it reads and does not write, so there is no decode speed, no depth, no scenario"
    assert one.notes == [told]
    assert one.model.generates is False


@pytest.mark.parametrize("write", [write_windowed, write_recurrent])
def test_windows_and_states_are_measured_at_a_depth(write, tmp_path):
    result = efficli.bench([write(tmp_path / "m.gguf")], **QUICK | {"depth": (100,)})
    assert codes(result) == [None]
    assert labels(result) == [["pp24 @ d100", "tg8 @ d100"]]


def test_all_files_of_a_directory(tiny, tmp_path):
    for name in ("b", "a"):
        shutil.copy(tiny, tmp_path / f"{name}.gguf")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")  # to open it would be to wait
    result = efficli.bench(tmp_path, **QUICK)
    assert [Path(one.path).name for one in result.artifacts] == ["a.gguf", "b.gguf"]
    assert labels(result) == [["pp24", "tg8"]] * 2


# failures


def test_one_that_fails_does_not_stop_the_others(tiny, tmp_path):
    (tmp_path / "text.gguf").write_text("not a model, and long enough for a header of one")
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-5000])
    (tmp_path / "empty").mkdir()
    write_tiny(tmp_path / "arch.gguf", arch="nosuch")
    write_tiny(tmp_path / "lacks.gguf", without="blk.1.ffn_up.weight")
    names = ("text.gguf", "cut.gguf", "arch.gguf", "lacks.gguf", "absent.gguf", "empty")
    result = efficli.bench([*(tmp_path / name for name in names), tiny], **QUICK)
    assert codes(result) == [1, 1, 5, 1, 1, 1, None]
    lines = [one.failure.line for one in result.artifacts[:-1]]
    for line, words in zip(
        lines,
        ("not a GGUF", "past the file", "unknown model architecture: 'nosuch'", "'blk.1.ffn_up.weight' not found",
         "no such file or directory", "no .gguf file in it"),
        strict=True,
    ):  # fmt: skip
        assert words in line
        assert "\n" not in line
    assert all(name in line for name, line in zip(names, lines, strict=True))
    assert labels(result)[-1] == ["pp24", "tg8"]
    assert json.loads(json.dumps(result.to_json()))["artifacts"][2]["error"]["code"] == 5


def test_memory_and_time_that_do_not_suffice(tiny, tmp_path):
    large = write_tiny(tmp_path / "large.gguf", vocab=300_000)  # 77 MB
    small = efficli.bench([large, tiny], **QUICK, memory_limit=75_000_000)
    assert codes(small) == [4, None]
    assert re.search(
        r"out of memory while loading large\.gguf: [\d.]+ MiB of its own and [\d.]+ MiB of files, "
        r"the limit is 71\.53 MiB",
        small.artifacts[0].failure.line,
    )
    short = efficli.bench([tiny], **QUICK, time_limit=0.001)
    assert codes(short) == [4]
    assert short.artifacts[0].failure.line.endswith("took more than 0.001 s, and was stopped")
    assert "--time-limit" in short.artifacts[0].failure.hint


def test_a_prompt_longer_than_a_context_is_that_files_failure(tiny, tmp_path):
    longer = write_encoder(tmp_path / "longer.gguf")  # 512 positions, the other has 256
    result = efficli.bench([tiny, longer], **QUICK | {"n_prompt": (300,)})
    assert codes(result) == [2, None]
    failure = result.artifacts[0].failure
    assert "a prompt of 300 tokens is longer than the context of 256" in failure.line
    assert failure.hint == "--ctx-size 300 measures it all the same"
    assert labels(result)[1] == ["pp300"]
    deep = efficli.bench([tiny], **QUICK | {"n_prompt": None}, depth=(256,))
    assert "a depth of 256 leaves no room in the context of 256" in deep.artifacts[0].failure.line


def test_a_part_of_a_model_is_not_measured(tmp_path):
    """Its other files would be read too, and not be dropped from the page cache, nor counted."""
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    [one] = efficli.bench(tmp_path, **QUICK).artifacts
    assert one.failure.code == 5
    assert "is one of 2 parts of a model" in one.failure.line


def test_a_cache_type_that_does_not_fit_the_file(tiny):
    """Heads of 8 do not fill a block of 32."""
    result = efficli.bench([tiny], **QUICK, cache_type_k="q8_0")
    assert codes(result) == [5]
    assert "\n" not in result.artifacts[0].failure.line


# what makes no sense


@pytest.mark.parametrize(("options", "words"), [
    ({"threads": (0,)}, "--threads 0, expected a number from 1"),
    ({"threads": (1, 60_000)}, "--threads 60000, expected at most 512"),
    ({"n_prompt": (-1, 5)}, "--n-prompt -1,5, expected numbers from 0"),
    ({"n_gen": ()}, "--n-gen '', expected a number"),
    ({"depth": (-1,)}, "--depth -1"),
    ({"ctx": 0}, "--ctx-size 0"),
    ({"ctx": 2**32 + 64}, "--ctx-size 4294967360, expected 1 to 2147483647"),
    ({"n_prompt": (2**40,)}, "--n-prompt 1099511627776, expected a number from 0 to 2147483647"),
    ({"ctx": 16}, None),
    ({"repetitions": 4}, "--repetitions 4, expected 5 or more"),
    ({"max_repetitions": 4}, "--max-repetitions 4 is less than --repetitions 5"),
    ({"cache_type_k": "q9"}, "--cache-type-k 'q9' is no type of the KV cache"),
    ({"cache_type_v": "q8_0", "flash_attn": "off"}, "needs flash attention"),
    ({"flash_attn": "maybe"}, "--flash-attn 'maybe'"),
    ({"patience": -1.0}, "--patience -1, expected 0 seconds or more"),
    ({"patience": math.nan}, "--patience nan"),
    ({"time_limit": 0}, "--time-limit 0"),
    ({"time_limit": math.nan}, "--time-limit nan"),
    ({"memory_limit": 0}, "--memory-limit 0"),
    ({"text": "x"}, "--text without --base"),
    ({"targets": ("pi9",)}, "pi9"),
    ({"scenarios": ("chatt",)}, "no such scenario: chatt"),
    ({"compare": True}, "--compare takes two artifacts or more"),
    ({"compare": True, "scenarios": ("chat",)}, "--compare and --scenario"),
    ({"power_command": "/no/such/meter"}, "'/no/such/meter' cannot be run"),
    ({"power_command": "echo much"}, "printed 'much', expected watts"),
])  # fmt: skip
def test_usage_errors_come_before_anything_runs(tiny, options, words):
    result = BenchResult(machine={})
    if words is None:  # one file's trouble
        assert "longer than the context of 16" in efficli.bench([tiny], **QUICK | options).artifacts[0].failure.line
        return
    with pytest.raises(UsageError, match=re.escape(words)):
        efficli.bench([tiny], **QUICK | options, into=result)
    assert not any(one.is_measured for one in result.artifacts)


def test_two_scenarios_of_one_name_are_refused(tiny, tmp_path):
    """One would hide the other in every table."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(SCENARIO)
    with pytest.raises(UsageError, match="2 scenarios are called short"):
        efficli.bench([tiny], **QUICK, scenarios=[str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])


def test_without_a_runtime_the_extra_is_named(tiny, monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sys.modules["efficli.pipeline.bench"], "version", absent)
    with pytest.raises(MissingExtra) as caught:
        efficli.bench([tiny], **QUICK)
    assert caught.value.hint == "pip install 'efficli[gguf]'"


def test_a_limit_that_cannot_be_held_is_refused(tiny, monkeypatch):
    # as where there is no /proc
    monkeypatch.setattr(sys.modules["efficli.pipeline.bench"], "memory_of", lambda pid: None)
    with pytest.raises(UnsupportedError, match="--memory-limit: this system does not tell"):
        efficli.bench([tiny], **QUICK, memory_limit=1 << 30)


def test_what_is_predicted_is_what_stands_beside_it(tiny):
    """The decode with least before it, in whatever order depths are given."""
    predicted = [
        efficli.bench([tiny], depth=depth, targets=("pi5-8gb",), dry_run=True).artifacts[0].predictions
        for depth in ((100, 0), (0,), (100,))
    ]
    assert predicted[0] == predicted[1] != predicted[2]


def test_no_artifact_and_a_base_that_is_not_there(tiny, tmp_path):
    with pytest.raises(UsageError, match="no artifact to measure"):
        efficli.bench([])
    result = BenchResult(machine={})
    with pytest.raises(CheckpointError, match="no such file or directory") as caught:
        efficli.bench([tiny], **QUICK, base="/absent/base.gguf", into=result)
    assert caught.value.where == "/absent/base.gguf"
    with pytest.raises(CheckpointError, match="no such text"):
        efficli.bench([tiny], **QUICK, base=str(tiny), text=tmp_path / "none.txt", into=result)
    assert not any(one.is_measured for one in result.artifacts)


# in turns


def test_those_that_take_turns_run_the_same_tests(tiny, tmp_path):
    """Lengths by default are those of the shortest context, and an embedding model takes part as far as it can."""
    longer = write_encoder(tmp_path / "longer.gguf")
    plain = {"threads": (1,), "starts": False, "patience": 0.0}
    result = efficli.bench([longer, tiny], **plain, compare=True)
    assert labels(result) == [["pp128", "pp256"]] * 2
    assert [one.notes[-1] for one in result.artifacts] == [
        "pp512 left out: not all of these artifacts can do it",
        "tg128 left out: not all of these artifacts can do it",
    ]
    assert [(one.test.label, one.first, one.other) for one in result.comparisons] == [
        (label, str(longer), str(tiny)) for label in ("pp128", "pp256")
    ]
    assert [one.settings.ctx for one in result.artifacts] == [256, 256]
    with pytest.raises(UsageError, match="no test that all of these artifacts can do"):
        efficli.bench([longer, tiny], **plain, compare=True, depth=(9,))


def test_in_turns_too_a_failure_is_one_line_and_predictions_know_the_memory(tiny, tmp_path):
    other = shutil.copy(tiny, tmp_path / "other.gguf")
    result = efficli.bench(
        [tmp_path / "absent.gguf", tiny, other], **QUICK, compare=True, targets=("pi5-8gb",), repetitions=6
    )
    assert codes(result) == [1, None, None]
    assert [(one.first, one.other) for one in result.comparisons] == [(str(tiny), str(other))] * 2
    assert all(one.predictions[0].memory.anon_known for one in result.artifacts[1:])
    [alone] = efficli.bench([tmp_path / "absent.gguf", tiny], **QUICK, compare=True).artifacts[1:]
    assert len(alone.tests) == 2


# Ctrl-C


@pytest.mark.parametrize(("compare", "word"), [(False, "speed"), (True, "in turns")])
def test_an_interrupt_leaves_what_was_measured(tiny, tmp_path, compare, word):
    other = shutil.copy(tiny, tmp_path / "other.gguf")
    result = BenchResult(machine={})
    step = 3 if compare else 13  # the first artifact has ten steps
    with pytest.raises(KeyboardInterrupt):
        efficli.bench(
            [tiny, other],
            **QUICK | {"max_repetitions": 5},
            compare=compare,
            into=result,
            progress=Interrupting(word, step, interrupt),
        )
    assert result.interrupted
    assert result.seconds > 0
    measured = [[told.rate.estimate.n for told in one.tests] for one in result.artifacts]
    assert measured == ([[2, 1], [2, 1]] if compare else [[5, 5], [2, 1]])
    assert [one.ratios.estimate.n for one in result.comparisons] == ([2, 1] if compare else [])
    told = json.loads(json.dumps(result.to_json()))
    assert told["interrupted"] is True
    assert len(told["results"]) == 4
    assert children() == set()


# energy


def test_a_meter_that_ends_on_the_way_costs_its_figures_only(tiny, tmp_path):
    command = (
        f'"{sys.executable}" -c "print(5, flush=True); import time; time.sleep(0.3); raise SystemExit(\'broken\')"'
    )

    class Waiting(Silent):
        """Until the meter has failed."""

        def start(self, task: str, total: float, unit: str = "") -> None:
            if "speed" in task:
                import time

                time.sleep(1.5)

    result = efficli.bench([tiny], **QUICK, power_command=command, progress=Waiting())
    [one] = result.artifacts
    assert (one.failure, labels(result)) == (None, [["pp24", "tg8"]])
    assert all(told.energy is None for told in one.tests)
    assert any("broken" in note for note in one.notes)
    assert one.energy_source.startswith("power command: ")


def test_joules_of_a_command_that_says_five_watts(tiny):
    result = efficli.bench(
        [tiny], **QUICK | {"n_prompt": (200,)}, power_command="sh -c 'while echo 5; do sleep 0.01; done'"
    )
    for told in result.artifacts[0].tests:
        seconds = sorted(told.samples_ns)[len(told.samples_ns) // 2] / 1e9
        assert told.energy.estimate.median == pytest.approx(5 * seconds / told.test.tokens, rel=0.1)


def test_a_process_that_ends_itself_is_the_failure_of_its_file_and_no_others(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gguf_engine, "_SESSION", "tests.bench.measuring:open_or_leave")
    leaves = tmp_path / "leaves.gguf"
    leaves.write_bytes(tiny.read_bytes())
    bad, good = efficli.bench([leaves, tiny], **QUICK).artifacts
    assert good.failure is None and len(good.tests) == 2
    assert (bad.failure.code, bad.tests) == (70, [])
    assert bad.failure.message == "the child process failed while running leaves.gguf (exit code 1)"
    assert bad.failure.log == "the library has had enough"
    words = ["bench", str(leaves), str(tiny), "-p", "8", "-n", "4", "--no-starts", "--patience", "0"]
    assert cli.main(words) == 70
    told = capsys.readouterr()
    assert "the library has had enough\nerror: the child process failed while" in told.err
    assert "prefill" in told.out.lower()
