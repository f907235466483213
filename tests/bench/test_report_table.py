"""Tables that a reader understands without a manual: what stands in them, and that they fit a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from efficli.bench.figures import BenchResult, Quality, Series
from efficli.bench.report_table import footnotes, report_tables
from efficli.bench.wording import conditions, cut_names, figure, number, short_names
from efficli.console import Terminal
from efficli.ops.statistics import Quantiles
from tests.bench.made_results import MACHINE, artifact, everything, series, several, speed


def tables(result):
    """Rows by title and first cell."""
    return {title: {row[0].strip(): row[1:] for row in rows} for title, _, rows in report_tables(result)}


def drawn(result, width):
    """The lines that a terminal of that width shows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, no_color=True)
    for _, columns, rows in report_tables(result):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    return console.file.getvalue().splitlines()


def long_names():
    """As export names the files of a model with a long name, on a machine where nothing settles."""
    result = everything()
    for one in result.artifacts:
        one.path = one.path.replace("reference", "SmolLM2-135M-Instruct")
        one.tests = [speed(t.test.n_prompt, t.test.n_gen, 98765, noise=0.3, depth=t.test.n_depth) for t in one.tests]
        one.starts = [
            replace(start, **{phase: series(1234, 0.4, "ms") for phase in ("process", "load", "first_token", "total")})
            for start in one.starts
        ]
    return result


def one_artifact():
    result = everything()
    result.artifacts, result.comparisons = result.artifacts[:1], []
    return result


@pytest.mark.parametrize(
    "result", [several(), everything(), one_artifact(), long_names()], ids=["several", "everything", "one", "long"]
)
def test_nothing_is_folded_at_80_columns(result):
    """As many lines as in a terminal that has room for everything, but for the sentences of failures."""
    result.artifacts = [one for one in result.artifacts if one.failure is None]
    for one in result.artifacts:
        for scenario in one.scenarios:
            scenario.failure = None
    assert drawn(result, 80) == drawn(result, 400)


def test_every_row_has_a_cell_for_every_column():
    for _, columns, rows in [*report_tables(everything()), *report_tables(one_artifact())]:
        assert rows and {len(row) for row in rows} == {len(columns)}
        assert all(isinstance(cell, str) for row in rows for cell in row)


def test_a_figure_that_settled_is_a_median_and_one_that_did_not_is_a_range():
    found = tables(several())["Prefill (reading a prompt), 512 tokens"]
    assert found["reference-Q4_K_M.gguf"][0] == "7715 (7707 - 7779)"
    assert found["reference-Q8_0.gguf"][0] == "4620 - 6162 *"
    notes = footnotes(several())
    assert any(note.startswith("* did not settle") for note in notes)
    assert any("reference-Q8_0.gguf ran: busy neighbour" in note and "python3 pid 123" in note for note in notes)


def test_quiet_figures_have_no_excuse():
    notes = footnotes(BenchResult(machine=MACHINE, artifacts=several().artifacts[:2]))
    assert not any("*" in note or "busy" in note or "did not" in note for note in notes)


def test_one_repeat_says_so():
    found = Series.of([100.0], "tokens/s", 0.05)
    assert figure(found) == "100 *"
    result = BenchResult(machine=MACHINE, artifacts=[artifact("a.gguf", 5, 100)])
    result.artifacts[0].tests[0] = replace(result.artifacts[0].tests[0], rate=found)
    assert any("one repeat only" in note for note in footnotes(result))
    assert not any("did not settle" in note for note in footnotes(result))


def test_the_confidence_is_that_of_the_repeats():
    note = next(note for note in footnotes(several()) if "confidence" in note)
    assert note.endswith("of 93.8 % (5 repeats), 95 % (more)")
    many = BenchResult(machine=MACHINE, comparisons=several().comparisons)
    assert any(note.endswith("confidence of 95 %") for note in footnotes(many))


def test_a_failure_has_a_row_wherever_others_have_a_figure():
    found = tables(several())
    assert found["Prefill (reading a prompt), 512 tokens"]["huge.gguf"][0] == "failed"


def test_a_failure_alone_is_no_table():
    result = several()
    result.artifacts, result.comparisons = result.artifacts[-1:], []
    assert report_tables(result) == []


def test_what_was_interrupted_says_what_was_not_reached():
    result = several()
    result.interrupted = True
    second = result.artifacts[1]
    second.planned = tuple(one.test for one in second.tests)
    second.tests, second.memory = second.tests[:1], None
    found = tables(result)
    assert found["Prefill (reading a prompt), 512 tokens"]["reference-Q2_K.gguf"][0].startswith("88")
    rows = next(rows for title, _, rows in report_tables(result) if title.startswith("Decode"))
    assert [row[1] for row in rows if "Q2_K" in row[0]] == ["not reached", "not reached"]
    assert footnotes(result)[0].startswith("interrupted")


def test_planned_tests_that_nobody_reached_are_there():
    result = several()
    result.interrupted = True
    for one in result.artifacts:
        one.planned, one.tests = tuple(test.test for test in several().artifacts[0].tests), []
    titles = [title for title, _, _ in report_tables(result)]
    assert any(title.startswith("Prefill") for title in titles) and any(title.startswith("Decode") for title in titles)


def test_an_embedding_model_does_not_write():
    result = several()
    embedding = result.artifacts[1]
    embedding.model = replace(embedding.model, generates=False)
    embedding.tests = embedding.tests[:1]
    rows = next(rows for title, _, rows in report_tables(result) if title.startswith("Decode"))
    assert {row[1] for row in rows if "Q2_K" in row[0]} == {"writes no text"}


def test_threads_are_named_where_they_differ():
    result = BenchResult(machine=MACHINE, artifacts=[artifact("a.gguf", 5, 100)])
    one = result.artifacts[0]
    one.tests = [one.tests[1], replace(one.tests[1], test=replace(one.tests[1].test, threads=1))]
    rows = next(rows for title, _, rows in report_tables(result) if title.startswith("Decode"))
    assert [row[0] for row in rows] == ["128 tokens, 2 threads", "128 tokens, 1 thread"]


def test_joules_have_a_column_where_they_were_measured():
    result = several()
    assert any("no joules: no RAPL" in note for note in footnotes(result))
    one = result.artifacts[0]
    one.tests[1] = replace(one.tests[1], energy=Series.of([0.0412, 0.0413, 0.0411, 0.0412, 0.0414], "J/token", 0.05))
    one.energy_source = "RAPL package-0"
    found = tables(result)["Energy, decode 128 tokens"]
    assert found == {"reference-Q4_K_M.gguf": ["0.0412 (0.0411 - 0.0414)", "5"]}
    assert any("J/token: from RAPL package-0" in note for note in footnotes(result))


def test_a_start_that_was_not_cold_is_told():
    result = several()
    one = result.artifacts[0]
    one.starts = [replace(one.starts[0], resident=0.12), one.starts[1]]
    assert any("did not start really cold: 12% of the file" in note for note in footnotes(result))
    one.starts = [replace(one.starts[0], resident=None), one.starts[1]]
    assert any("may not have started cold" in note for note in footnotes(result))


def test_phases_of_a_start_and_their_sum():
    rows = next(rows for title, _, rows in report_tables(one_artifact()) if title.startswith("Start"))
    assert [row[0] for row in rows] == ["process", "+ load", "+ first token", "= in all"]
    for column in (1, 2):
        *phases, total = (float(row[column].split()[0]) for row in rows)
        assert sum(phases) == pytest.approx(total, rel=0.02)
    assert {row[3] for row in rows} == {"5"}


def test_comparisons_are_ratios_with_an_interval_and_a_verdict():
    found = tables(several())["reference-Q2_K.gguf over reference-Q4_K_M.gguf: ratio of tokens/s, in turns"]
    assert found["prefill 512 tokens"] == ["1.14 (1.12 - 1.15)", "faster", "7"]
    assert found["decode 128 tokens"][0].endswith("*")


def test_scenarios_show_objectives_times_and_goodput():
    found = tables(everything())["Scenario wake-up (a device wakes up and needs one token), answer within 2 s"]
    assert found["reference-Q4_K_M.gguf"] == ["227 (223 - 232)", "231", "100 (57 - 100)", "5"]
    assert found["reference-Q8_0.gguf"][0] == "failed"
    title, columns, rows = next(table for table in report_tables(one_artifact()) if "chat" in table[0])
    assert title.endswith(": reference-Q4_K_M.gguf") and columns[1:] == ["median, ms", "p95", "in time, %", "n"]
    assert [row[0] for row in rows] == ["first token within 1 s", "each token within 150 ms", "all of them (goodput)"]
    assert rows[-1][3:] == ["90 (60 - 98)", "10"]
    notes = footnotes(everything())
    assert "reference-Q2_K.gguf, chat: ended after 4 of 10 requests" in notes
    assert any(note.startswith("chat: the file has no chat template") for note in notes)


def test_predictions_stand_beside_what_was_measured_and_say_what_they_are():
    title, columns, rows = next(table for table in report_tables(one_artifact()) if "Predictions" in table[0])
    assert title == "Predictions, not measurements: reference-Q4_K_M.gguf"
    assert columns[1:] == ["measured here", "pi5-8gb (predicted)", "zynq7020 (predicted)"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["decode, tokens/s"][0] == "1101"
    value, low, _, high = cells["decode, tokens/s"][1].replace("(", "").replace(")", "").split()
    assert float(low) <= float(value) <= float(high)
    assert cells["prefill, tokens/s"][2] == "not known" and cells["memory"][1].endswith(": fits")
    reasons = [note for note in footnotes(one_artifact()) if note.startswith(("predicted by", "pi5-8gb"))]
    assert "t_token" in reasons[0] and "GB/s" in reasons[1] and "microSD" in reasons[1]
    several_targets = [table for table in report_tables(everything()) if "Predictions" in table[0]]
    assert [table[1][2] for table in several_targets] == [
        f"{name} (predicted)" for name in ("pi5-8gb", "zynq7020", "snapdragon-7-gen-3")
    ]
    alone = [table[1][1:] for table in report_tables(one_artifact()) if "Predictions" in table[0]][1]
    assert alone == ["measured here", "snapdragon-7-gen-3 (predicted)"]  # a long name has a table of its own


def test_notes_of_an_artifact_are_kept():
    result = several()
    result.artifacts[1].notes.append("the context was cut to 1024")
    assert "reference-Q2_K.gguf: the context was cut to 1024" in footnotes(result)


def test_conditions_come_last_and_name_what_decides():
    assert footnotes(several())[-1] == conditions(several())
    for word in ("Xeon", "2 threads", "context 640", "f16/f16", "llama-cpp-python 0.3.36", "5 repeats", "2025-11-23"):
        assert word in conditions(several())


@pytest.mark.parametrize(
    ("value", "text"),
    [(7715.4, "7715"), (123456.0, "123456"), (93.66, "93.7"), (9.123, "9.12"), (0.0927, "0.0927"),
     (1.98e-4, "0.000198"), (0.0, "0"), (99.96, "100.0")],
)  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


def test_names_are_as_short_as_they_can_be():
    assert short_names(["a/b/x.gguf", "a/c/x.gguf", "y.gguf"]) == {
        "a/b/x.gguf": "b/x.gguf", "a/c/x.gguf": "c/x.gguf", "y.gguf": "y.gguf",
    }  # fmt: skip
    assert short_names(["x", "x"]) == {"x": "x"}
    assert short_names(["a\nb", "ü\udcff"]) == {"a\nb": r"a\nb", "ü\udcff": r"ü\udcff"}
    assert short_names(["x.gguf", "a/x.gguf"])["a/x.gguf"] == "a/x.gguf"
    assert list(short_names(["x.gguf", "a/x.gguf"]).values()) == ["x.gguf", "a/x.gguf"]


def test_long_names_are_cut_where_their_ends_tell_them_apart():
    long = [f"SmolLM2-135M-Instruct-{type}.gguf" for type in ("Q4_K_M", "Q2_K")]
    assert list(cut_names([*long, "a.gguf"], 22).values()) == ["..Q4_K_M.gguf", "..Q2_K.gguf", "a.gguf"]
    same = [f"{model}-Instruct-Q2_K.gguf" for model in ("SmolLM2-135M", "SmolLM2-360M")]
    assert list(cut_names(same, 25).values()) == [f"..{name[-23:]}" for name in same]
    assert cut_names(same, 22) == {name: name for name in same}
    assert all(f"..{one}.gguf: SmolLM2-135M-Instruct-{one}.gguf" in footnotes(long_names()) for one in ("Q2_K", "Q8_0"))


def test_quantiles_of_tokens():
    one = replace(speed(0, 8, 100), tpot=Quantiles(n=8, p50=9.5, p95=12.0, p99=120.0))
    result = BenchResult(machine=MACHINE, artifacts=[replace(artifact("a", 1, 100), tests=[one])])
    assert next(rows for title, _, rows in report_tables(result) if "Decode" in title)[0][2:5] == [
        "9.50",
        "12.0",
        "120",
    ]


def test_brackets_in_a_name_are_no_markup(capsys):
    result = several()
    result.artifacts[0].path = "out/m[b]-[red].gguf"
    for title, columns, rows in report_tables(result):
        Terminal().table(title, columns, rows, is_data=True)
    assert "m[b]-[red].gguf" in capsys.readouterr().out


def test_quality_is_told_of_models_that_write_and_of_those_that_embed():
    result = several()
    result.artifacts[1].quality = Quality(kld_mean=None, top1_agreement=None, origin="minilm", cosine_mean=0.99962)
    found = [table for table in report_tables(result) if table[0].startswith("Quality")]
    assert [columns for _, columns, _ in found] == [
        ["", "mean KL divergence", "top-1 agreement"],
        ["", "mean cosine of embeddings"],
    ]
    assert found[1][2] == [["reference-Q2_K.gguf", "0.999620"]]
    assert "minilm" in found[1][0]
