"""Chat templates: what each kind of trouble says. Attacks at length are in tests/test_chat.py."""

from __future__ import annotations

import pytest

from efficli.inspection import llama_view
from efficli.inspection.report import ModelReport
from efficli.inspection.templates import CONVERSATIONS, Chat, check_chat
from tests.inspection.conftest import TEMPLATE

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
WITH_BOS = "{{ bos_token }}" + PLAIN
WITH_EOS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def judged(template: str | None, *, name: str = "default", add_bos: bool = False, add_eos: bool = False) -> ModelReport:
    report = ModelReport(path="x", kind="gguf", nbytes=0)
    templates = {} if template is None else {name: template}
    check_chat(report, Chat(templates=templates, specials=SPECIALS, add_bos=add_bos, add_eos=add_eos))
    return report


@pytest.fixture
def alone(monkeypatch) -> None:
    """Not compared with llama.cpp: one process less."""
    monkeypatch.setattr(llama_view, "is_installed", lambda: False)


def lines(report: ModelReport) -> list[str]:
    assert all(finding.hint for finding in report.findings)
    return [finding.line for finding in report.findings]


def test_one_that_llama_cpp_does_not_know():
    report = judged(PLAIN)
    assert lines(report) == ["llama_chat_apply_template does not know the chat template"]
    assert report.findings[0].code == 1


def test_one_that_llama_cpp_makes_something_else_of():
    """It takes this for ChatML by a word that it contains."""
    report = judged(TEMPLATE.replace("{{ message.content }}", "{{ message.content | upper }}"))
    (line,) = lines(report)
    assert line.startswith("llama_chat_apply_template makes another text of it from character 20 on: template ")
    assert "llama.cpp 'system\\nBe brief" in line


def test_a_begin_token_that_only_the_template_writes_is_no_difference():
    """llama.cpp's tokenizer adds it."""
    report = judged("{{ bos_token }}" + TEMPLATE)
    assert lines(report) == []


def test_begin_tokens_twice(alone):
    (line,) = lines(judged(WITH_BOS, add_bos=True))
    assert line == "the chat template writes '<s>' and the tokenizer adds one more"
    assert lines(judged(WITH_BOS)) == lines(judged(PLAIN, add_bos=True)) == []


def test_end_tokens_twice(alone):
    (line,) = lines(judged(WITH_EOS, add_eos=True))
    assert line == "the chat template ends with '</s>' and the tokenizer adds one more"
    assert lines(judged(WITH_EOS)) == []


def test_one_that_takes_no_conversation(alone):
    (line,) = lines(judged("{{ raise_exception('no') }}"))
    assert line == "chat template failed: no"
    assert lines(judged("{% for %}"))[0].startswith("chat template failed: ")
    assert lines(judged("{{ raise_exception('tools!') }}", name="tool_use")) == []


def test_one_that_takes_no_system_message(alone):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    report = judged(refuses)
    assert lines(report) == []
    assert report.checks[0].seen.startswith(f"renders {len(CONVERSATIONS[1])} messages")


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_one_that_leaves_the_sandbox(name, alone):
    report = judged("{{ ''.__class__.__mro__[1].__subclasses__() }}", name=name)
    (finding,) = report.findings
    assert finding.code == 6
    assert "chat template tried to leave its sandbox" in finding.line


def test_too_large_and_none(alone):
    assert lines(judged(" " * (1 << 20) + "x")) == ["chat template is larger than 1 MiB"]
    assert judged(None).checks[0].seen == "none"
    assert lines(judged(None)) == []
