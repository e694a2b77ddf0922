"""The score command: its lines in and out, its exit codes, what it imports and how soon it starts."""

import json
import re
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from chat_templates import FAMILIES
from model_folder import write_tokenizer
from response_table import GOOD, GOUT, ROWS

from crpo_jax.config import Reward
from crpo_jax.reward.effective import read_vocabulary
from crpo_jax.reward.rules import score_response

command = import_module("crpo_jax.score")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny_tokenizer"
KEYS = [
    "id",
    "accuracy",
    "format",
    "cross_reference",
    "clinical_reasoning",
    "consistency",
    "total",
    "answer_found",
    "why",
]


def line(response: str = GOOD, **changed: object) -> dict[str, object]:
    row = {"id": "q1", "question": GOUT.question, "options": dict(GOUT.options), "answer": "C", "response": response}
    return {key: value for key, value in (row | changed).items() if value is not ...}


def written(path: Path, rows: list[object]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def run(tmp_path: Path, rows: list[object], *flags: str) -> tuple[int, list[dict[str, object]]]:
    out = tmp_path / "out.jsonl"
    code = command.main(
        ["--responses", written(tmp_path / "in.jsonl", rows), "--out", str(out), "reward.workers=0", *flags]
    )
    return code, [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def test_a_line_out_for_a_line_in_through_two_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[object] = [line(row[2], id=number) for number, row in enumerate(ROWS)]
    code, found = run(tmp_path, rows, "--design", "crpo", "reward.workers=2")
    assert code == 0
    assert [list(row) for row in found] == [KEYS] * len(ROWS)
    for number, row in enumerate(found):
        expected = score_response(GOUT, ROWS[number][2], Reward())
        assert row == {"id": number} | {key: getattr(expected, key) for key in KEYS[1:]}
    assert "consistency by characters (no --tokenizer)" in capsys.readouterr().err


def test_tokens_decide_consistency_where_a_tokenizer_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(
        tmp_path,
        [line("gout 痛风"), line("x", token_ids=[65, 66, 200, 1279]), line("x", token_ids=[])],
        "--tokenizer",
        str(TINY),
    )
    assert code == 0
    assert "consistency by tokens" in capsys.readouterr().err
    by = [row["why"]["consistency"] for row in found]  # pyright: ignore[reportIndexIssue]
    assert [one["by"] for one in by] == ["tokens"] * 3
    assert 0 < by[0]["effective"] < by[0]["of"]
    assert by[1]["of"] == 3, "the end-of-turn token is not counted"
    assert by[2] == {"by": "tokens", "effective": 0, "of": 0}
    _, found = run(tmp_path, [line("x", token_ids=[65])])
    assert found[0]["why"]["consistency"]["by"] == "characters"  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            "{",
            "expected one JSON object a line, got Expecting property name enclosed in double quotes at column 2 in '{'",
        ),
        ("[1]", "expected a JSON object, got [1]"),
        ("[" * 100_000, "expected one JSON object a line, got JSON that is nested too deeply in '[[["),
        (line(id=...), "id: expected a field of this name, got question, options, answer, response"),
        (line(response=...), "response: expected a field of this name, got id, question, options, answer"),
        (line(response=None), "response: expected a text, got None"),
        (line(question=7), "question: expected a text, got 7"),
        (line(id=[1]), "id: expected a text or a whole number, got [1]"),
        (line(options={}), "options: expected an object of texts by letter, got {}"),
        (line(options=["a"]), "options: expected an object of texts by letter, got ['a']"),
        (line(options={"a": "x"}), "options: expected capital letters as keys, got 'a'"),
        (line(answer="E"), "answer: expected a letter among A, B, C, D, got 'E'"),
        (line(token_ids=[1.5]), "token_ids: expected a list of token ids, got [1.5]"),
        (line(token_ids=[-1]), "token_ids: expected a list of token ids, got [-1]"),
        (line(token_ids=[2**80]), "token_ids: expected a list of token ids, got [1208925819614629174706176]"),
        (line(token_ids=[True]), "token_ids: expected a list of token ids, got [True]"),
    ],
)
def test_a_bad_line_is_named_and_the_good_ones_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: object, reason: str
) -> None:
    rows = [line(id=1), "", bad, line(id=2)]
    code, found = run(tmp_path, rows)
    assert (code, [row["id"] for row in found]) == (2, [1, 2])
    assert f"in.jsonl:3: {reason}" in capsys.readouterr().err
    code, found = run(tmp_path, rows, "--strict")
    assert (code, [row["id"] for row in found]) == (2, [1]), "strict: the first bad line ends it"


@pytest.mark.parametrize("name", ["gemma3", "llama3.1"])
def test_the_token_that_ended_a_response_is_none_of_its_text(name: str, tmp_path: Path) -> None:
    """By the folder's chat template and generation_config.json; any special token where it has no template."""
    folder = write_tokenizer(tmp_path / name, name)
    tokenizer, ids = command.ResponseTokenizer(str(folder), ()), read_vocabulary(folder / "tokenizer.json")
    text, other = ids["a"], ids[FAMILIES[name].tokens[0]]
    for token in FAMILIES[name].stops:
        assert tokenizer.without_stop(np.array([text, ids[token]])).tolist() == [text]
        assert tokenizer.without_stop(np.array([ids[token], text])).tolist() == [ids[token], text]
    assert tokenizer.without_stop(np.array([text, other])).tolist() == [text, other]
    assert tokenizer.without_stop(np.array([], np.int64)).tolist() == []
    assert command.ResponseTokenizer(str(folder), ("a",)).without_stop(np.array([other, text])).tolist() == [other]
    (folder / "tokenizer_config.json").write_text("{}")
    assert command.ResponseTokenizer(str(folder), ()).without_stop(np.array([text, other])).tolist() == [text]


def test_token_ids_beyond_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run(tmp_path, [line(token_ids=[1280])], "--tokenizer", str(TINY))
    assert code == 2
    assert "token_ids: expected token ids below 1280, got 1280" in capsys.readouterr().err


def test_text_that_is_hard_to_write(tmp_path: Path) -> None:
    """Invalid UTF-8 and lone surrogates are scored, and come out as valid JSON."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    surrogate = json.dumps(line("\\boxed{\ud800}", id="a"))
    path.write_bytes(
        surrogate.encode() + b"\n" + json.dumps(line("R", id="b")).encode().replace(b'"R"', b'"\xff\xfe ok"') + b"\n"
    )
    assert (
        command.main(["--responses", str(path), "--out", str(out), "reward.workers=0", "--tokenizer", str(TINY)]) == 0
    )
    found = [json.loads(text) for text in out.read_bytes().splitlines()]
    assert [row["id"] for row in found] == ["a", "b"]
    assert command.main(["--responses", str(path), "--out", str(out), "reward.workers=0"]) == 0
    assert json.loads(out.read_bytes().splitlines()[1])["why"]["consistency"] == {
        "by": "characters",
        "effective": 2,
        "of": 4,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--responses", "absent.jsonl"], "--responses absent.jsonl: No such file or directory"),
        (
            ["--responses", "-", "--design", "cpro"],
            "reward.design: expected crpo, grpo, released or module:function, got 'cpro' in 'cpro'",
        ),
        (["--responses", "-", "--tokenizer", "absent"], "--tokenizer absent: expected a folder with tokenizer.json"),
        (["--responses", "-", "--config", "absent.yaml"], "--config absent.yaml: No such file or directory"),
        (["--responses", "-", "reward.kk=1"], "reward.kk: unknown key"),
        (["--responses", "-", "--out", "absent/out.jsonl"], "--out absent/out.jsonl: No such file or directory"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert command.main(flags) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_responses_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "in.jsonl", [line()])
    assert command.main(["--responses", path, "--out", path]) == 2
    assert "expected another file than --responses" in capsys.readouterr().err
    assert Path(path).read_text()


def test_a_config_with_reward_settings_alone_is_enough(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("reward:\n  design: grpo\n  k: 3\n  tags: [dx, conclusion]\n")
    _, found = run(tmp_path, [line()], "--config", str(config))
    assert found[0]["total"] == 4.0


USERS = '''
def brevity(prompts, completions, answer, **columns):
    """Rewards short completions; TRL's convention."""
    if "raise" in completions[0]:
        raise ValueError("no")
    return [1.0 if len(text) < 100 else 0.0 for text in completions]
'''


def test_a_users_function_and_its_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "users_rewards.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    design = ("--design", "crpo*1+users_rewards:brevity*0.5", "reward.workers=1")
    code, found = run(tmp_path, [line(), line("short")], *design)
    assert code == 0
    assert [row["components"] for row in found] == [
        {"crpo": 12.0, "users_rewards:brevity": 0.0},
        {"crpo": 0.5, "users_rewards:brevity": 1.0},
    ]
    assert [row["total"] for row in found] == [12.0, 1.0]
    code, found = run(tmp_path, [line("raise", id="bad"), line()], *design)
    assert code == 1, "more than reward.max_failed_share"
    assert list(found[0]) == ["id", "error", "traceback"]
    assert "total" in found[1]
    assert (
        "responses that could not be scored: 1; the first, bad: users_rewards:brevity: ValueError: no"
        in capsys.readouterr().err
    )
    code, _ = run(tmp_path, [line("raise", id="bad"), line()], *design, "reward.max_failed_share=0.5")
    assert code == 0


def started(*flags: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags], input=text, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_standard_input_and_output() -> None:
    done = started("-m", "crpo_jax.score", "--responses", "-", text=json.dumps(line("über")) + "\n{\n")
    assert done.returncode == 2
    assert json.loads(done.stdout)["id"] == "q1"
    assert "line:2: expected one JSON object a line, got Expecting" in done.stderr


def test_it_imports_no_jax() -> None:
    done = started("-X", "importtime", "-m", "crpo_jax.score", "--responses", "-", text=json.dumps(line()) + "\n")
    assert done.returncode == 0
    modules = {
        match[1].partition(".")[0]
        for match in re.finditer(r"^import time:[^|]*\|[^|]*\|\s*(\S+)", done.stderr, re.MULTILINE)
    }
    assert "numpy" in modules, "the list is being read"
    assert not modules & {"jax", "jaxlib", "flax", "transformers", "tokenizers", "torch", "datasets", "grain"}


def test_it_starts_in_under_a_second() -> None:
    """Of processor time, which other work on the machine does not lengthen much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert started("-m", "crpo_jax.score", "--responses", "-").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_the_tokenizer_needs_no_transformers_either() -> None:
    done = started(
        "-X",
        "importtime",
        "-m",
        "crpo_jax.score",
        "--responses",
        "-",
        "--tokenizer",
        str(TINY),
        text=json.dumps(line()) + "\n",
    )
    assert done.returncode == 0
    assert "tokenizers" in done.stderr
    assert not re.search(r"\|\s*(jax|transformers|torch)$", done.stderr, re.MULTILINE)
