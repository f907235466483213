"""Chat templates: equal to transformers' rendering; hostile ones are refused within seconds (reliability row 36)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from efficli.chat import render, template_of
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, SecurityError
from tests.pico import write_llama

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": " What is 2 + 2? é 你好 "}, {"role": "assistant", "content": "4 <b>&"}]


def test_equal_to_transformers(tmp_path: Path) -> None:
    import transformers

    extras = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    marks = "{% generation %}said{% endgeneration %}"
    write_llama(tmp_path / "m", chat_template=CHATML + extras + marks)
    template, specials = template_of(open_checkpoint(tmp_path / "m"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m").apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )
    assert render(template, [TALK, TALK[:1]], specials=specials, add_generation_prompt=True)[0] == theirs
    assert theirs.startswith("<|endoftext|><|im_start|>user\nWhat is 2 + 2? é 你好<|im_end|>")


def test_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", chat_template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert template_of(open_checkpoint(folder))[0] == "new"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no chat template"):
        template_of(open_checkpoint(write_llama(tmp_path / "m")))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not render in 2 s"),
        ("{{ 10 ** (10 ** 9) }}", "did not render in 2 s"),
        ("{{ 'a' * 10 ** 10 }}", "needs more than 512 MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "made more than"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "leave its sandbox"),
        ("{{ messages.append(1) }}", "leave its sandbox"),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", "leave its sandbox"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses"),
    ],
)
def test_hostile(template: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(SecurityError, match=expected):
        render(template, [TALK], specials={})
    assert time.monotonic() - start < 30  # on a busy machine; the child's limit is on processor time
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if %}", "chat template failed: Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "chat template failed: roles must alternate"),
        ("{{ 1 / 0 }}", "chat template failed: division by zero"),
        ("{{ messages[0].content.nothing.more }}", "chat template failed: .*no attribute"),
    ],
)
def test_broken(template: str, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        render(template, [TALK], specials={})


def test_each_conversation_has_its_own_time() -> None:
    # some 0.7 s each; together more than one may take
    template = "{% for i in range(6000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}x"
    assert render(template, [TALK] * 4, specials={}) == ["x"] * 4
