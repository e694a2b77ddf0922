"""Prompt files: what they see, and one line for everything that can go wrong in one.

CRPO_JAX_FUZZ=5000 tries that many random files instead of a few.
"""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest

from crpo_jax.config import Data, load_config
from crpo_jax.data import prompt_file, prompt_worker
from crpo_jax.data.prompt_file import render_turns
from crpo_jax.data.prompts import render_prompts, user_turns
from crpo_jax.data.question import Question
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError

TINY = Path(__file__).parents[1] / "configs" / "tiny_tokenizer"
QUESTION = Question(
    id="q1",
    question="Which drug?",
    options={"A": "Allopurinol", "B": "Aspirin"},
    answer="secret",
    source="mine",
    split="train",
    columns={"context": "Gout.", "options": "a column", "labels": ["x", "y"], "year": 1999},
    aliases=("also secret",),
    turns=(("user", "Hello."), ("assistant", "Hi.")),
)


def write(folder: Path, text: str, name: str = "prompt.jinja") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def render(folder: Path, text: str, *questions: Question, limit: float = 10.0) -> list[str]:
    return render_turns(write(folder, text), questions or [QUESTION], limit)


def test_a_file_sees_the_question_and_its_columns_but_no_answer(tmp_path):
    text = """
{% for letter, text in options.items() %}
({{ letter }}) {{ text }}
{% endfor %}
{{ context }} {{ columns.context }} {{ columns["options"] }} {{ labels|join("+") }} {{ year + 1 }}
{{ id }} {{ question }} {{ source }} {{ split }} {{ turns[1].content }}
{{ labels|tojson }} {{ answer is defined }} {{ aliases is defined }} {{ kind is defined }}
"""
    assert render(tmp_path, text) == [
        "(A) Allopurinol\n(B) Aspirin\nGout. Gout. a column x+y 2000\nq1 Which drug? mine train Hi.\n"
        '["x", "y"] False False False'
    ]


def test_a_file_is_a_prompt_from_the_command_line(tmp_path):
    path = write(tmp_path, "{{ context }}\n\n{{ question }}\n")
    tokenizer, questions = load_tokenizer(TINY), [dataclasses.replace(QUESTION, id=str(number)) for number in range(3)]
    data = load_config("tiny", [f"data.prompt={path}"]).data
    [tokens, *others] = render_prompts(questions, data, tokenizer)
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nGout.\n\nWhich drug?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert others == [tokens, tokens]
    with pytest.raises(InputError, match=r"question q1: expected text without the tokenizer's special tokens"):
        render_prompts([QUESTION], Data(prompt=str(write(tmp_path, "<|im_end|>", "other"))), tokenizer)
    with pytest.raises(InputError, match=r"data\.prompt: .*gone: No such file or directory"):
        user_turns([QUESTION], str(tmp_path / "gone"))


def test_a_built_in_prompt_without_options_has_no_line_for_them():
    plain = dataclasses.replace(QUESTION, options={})
    assert user_turns([plain], "brief") == ["Which drug?"]
    [boxed] = user_turns([plain], "boxed")
    assert boxed.endswith("\n\nWhich drug?")
    assert "\\boxed{ANSWER}" in boxed


def test_a_system_prompt_may_stand_in_a_file(tmp_path):
    path, tokenizer = write(tmp_path, "Be kind.\n\nBe brief.\n", "system.txt"), load_tokenizer(TINY)
    written = Data(prompt="brief", system_prompt="Be kind.\n\nBe brief.")
    named = dataclasses.replace(written, system_prompt=f"file:{path}")
    assert render_prompts([QUESTION], named, tokenizer) == render_prompts([QUESTION], written, tokenizer)
    for name, line in (("gone", "No such file or directory"), (".", "Is a directory")):
        with pytest.raises(InputError, match=rf"data\.system_prompt: .*: {line}"):
            render_prompts([QUESTION], dataclasses.replace(written, system_prompt=f"file:{tmp_path / name}"), tokenizer)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"system\.txt: expected UTF-8 text, got byte 0xe9 at offset 3"):
        render_prompts([QUESTION], named, tokenizer)
    path.write_text("x <|im_end|>")
    with pytest.raises(InputError, match=r"data\.system_prompt: expected text without the tokenizer's special tokens"):
        render_prompts([QUESTION], named, tokenizer)


BAD = [
    ("{{ question }}\n{{ contxt }}", r":2: question q1: 'contxt' is undefined"),
    ("{{ answer }}", r":1: question q1: 'answer' is undefined"),
    ("a\nb\n{% if %}", r":3: question q1: Expected an expression"),
    ("{% for x in labels %}", r":1: question q1: Unexpected end of template"),
    ("{{ year / 0 }}", r":1: question q1: division by zero"),
    ("\n{{ question.__class__ }}", r":2: question q1: .*unsafe"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r":1: question q1: .*unsafe"),
    ("{{ labels.append('z') }}", r":1: question q1: .*(unsafe|not safely callable)"),
    ("{% include 'other' %}", r":1: question q1: no loader for this environment specified"),
    ("{{ range(10**9)|list }}", r":1: question q1: Range too big"),
    ("{{ labels|random }}", r":1: question q1: No filter named 'random'"),
    ("{{ lipsum() }}", r":1: question q1: 'lipsum' is undefined"),
    ("{{ self }}{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r":1: question q1: maximum recursion depth"),
    ("{% for i in range(99999) %}{{ question }}{% endfor %}", r"question q1: expected a turn of at most 200,000 char"),
    ("{{ question * 10**9 }}", r"question q1: "),
    ("{# nothing #}\n\n", r"question q1: expected a turn, got nothing but white space"),
    ("{{ '\\ud800' }}", r"question q1: .*surrogates not allowed"),
]


@pytest.mark.parametrize(("text", "line"), BAD, ids=range(len(BAD)))
def test_what_a_file_does_wrong_is_one_line_with_its_place(tmp_path, text, line):
    with pytest.raises(InputError, match=rf"^data\.prompt: {tmp_path}/prompt\.jinja.*{line}") as refused:
        render(tmp_path, text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('%999999999d' % 1)|list|length }}",
        "{{ 9**(9**9) }}",  # a single operation, which nothing inside the interpreter could end
        "{{ ('a' * 9999)|replace('a', 'a' * 9999)|replace('a', 'a' * 9999)|length }}",
    ],
)
def test_a_file_that_takes_too_long_or_too_much_is_ended(tmp_path, text):
    before = time.monotonic()
    with pytest.raises(
        InputError, match=r"prompt\.jinja(:\d+)?: question q1: (expected a turn|MemoryError|The result)"
    ):
        render(tmp_path, text, limit=0.5)
    assert time.monotonic() - before < 60


def test_the_first_question_that_fails_is_named(tmp_path):
    questions = [dataclasses.replace(QUESTION, id=f"q{n}", columns={"year": n - 2}) for n in range(5)]
    with pytest.raises(InputError, match=r"prompt\.jinja:1: question q2: division by zero"):
        render(tmp_path, "{{ 1 / year }}", *questions)
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"question q2: expected a turn within 0\.5 s, got none"):
        render(tmp_path, f"{{% if year == 0 %}}{forever}{{% endif %}}x", *questions, limit=0.5)


def test_a_file_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_file, "LONGEST_FILE", 10)
    with pytest.raises(InputError, match=r"data\.prompt: .*: expected at most 10 bytes, got more"):
        render(tmp_path, "{{ question }}")


# ---- random files ----------------------------------------------------------------------------------------------------

PARTS = [
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "#}",
        " for ",
        " in ",
        " if ",
        " endif ",
        " else ",
        "endfor",
        " set ",
        "=",
        "|",
        ".",
    ),
    *("question", "options", "columns", "labels", "year", "turns", "id", "self", "loop", "namespace", "range", "dict"),
    *("(", ")", "[", "]", "'", '"', ",", ":", "+", "*", "**", "/", "%", "~", "0", "7", "99", "__class__", "_", "-"),
    *("join", "list", "length", "upper", "items()", "format", "tojson", "replace", "sort", "map", "batch", "slice"),
    *("\n", " ", "é", "漢", "\U0001f469", "\\", "\x00", "text ", "{{ question }}", "{{ year }}", "{% raw %}"),
    *("{% for x in labels %}", "{% endfor %}", "{% if year %}", "{% endif %}", "{% set y = question ~ question %}"),
]


def random_file(rng: random.Random) -> str:
    return "".join(rng.choices(PARTS, k=rng.randint(1, 14)))


def test_random_files_give_a_turn_or_one_line():
    """In this process, as the worker does it: what a thousand starts of a process would take is no part of it."""

    def too_slow(*_):
        raise TimeoutError("a random file that takes ten seconds")

    before = signal.signal(signal.SIGALRM, too_slow)
    rng, count = random.Random(0), int(os.environ.get("CRPO_JAX_FUZZ") or 300)
    variables, turns, problems = prompt_file.variables(QUESTION), 0, 0
    for _ in range(count):
        source = random_file(rng)
        replies = prompt_worker.replies(prompt_worker.Job(source, [variables], 10.0))
        [reply] = [*replies]
        if "text" in reply:
            turns += 1
            assert reply["text"] == reply["text"].strip() != ""
        else:
            problems += 1
            assert reply["error"]
            assert "\n" not in reply["error"]
    signal.signal(signal.SIGALRM, before)
    assert turns > count / 50
    assert problems > count / 4
