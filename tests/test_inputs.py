"""What a run trains on: which half, what is set aside, what is too long, and the lines that say so."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crpo_jax.config import Config, Data, dump_config, find_config, load_config, replaced
from crpo_jax.data.prompts import render_prompts
from crpo_jax.data.question import Question, select_part
from crpo_jax.data.readers import questions_from
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError
from crpo_jax.runtime.inputs import open_questions, open_traces, resolve_part
from crpo_jax.runtime.report import set_aside_line
from crpo_jax.store.workdir import write_traced

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
TOKENIZER = load_tokenizer(TINY.parent / "tiny_tokenizer")
OWN = questions_from(
    [{"question": f"Which of {n}?", "options": {"A": "gout", "B": "flu"}, "answer": "A"} for n in range(40)]
)


def runtime(settings: Config) -> Any:
    """As much of one as reads questions."""
    tokenizer = load_tokenizer(settings.tokenizer.path) if settings.tokenizer.path else TOKENIZER
    return SimpleNamespace(settings=settings, vocabulary=SimpleNamespace(tokenizer=tokenizer))


def written(path: Path, questions: list[Question], **columns: str) -> str:
    rows = ({"id": q.id, "question": q.question, "options": dict(q.options), "answer": q.answer} for q in questions)
    path.write_text("".join(json.dumps(row | columns) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def own(tmp_path: Path) -> Config:
    """A user's questions, and a user's model."""
    paths = {"data.path": written(tmp_path / "train.jsonl", OWN), "data.eval_path": written(tmp_path / "t.jsonl", OWN)}
    return replaced(load_config(TINY), {"data.source": "jsonl", "model.path": str(tmp_path / "model"), **paths})


# ---- which half ------------------------------------------------------------------------------------------------------


def test_ones_own_questions_are_all_trained_on(own: Config):
    """They were halved for a cold start that there was none of."""
    opened = open_questions(runtime(own))
    assert (len(opened.training.questions), opened.set_aside) == (40, 0)


@pytest.mark.parametrize(("world", "count"), [("tiny", "data.vignettes"), ("arithmetic", "data.problems")])
def test_a_cold_start_of_the_same_run_leaves_the_second_half(world: str, count: str):
    tiny = replaced(load_config(find_config(world)), {count: 100, "data.eval_questions": 4, "sft.held_out": 0.0})
    opened, traces = open_questions(runtime(tiny)), open_traces(runtime(tiny))
    assert {question.source for question in opened.held_out.questions} == {tiny.data.source}
    assert len(opened.held_out.questions) == 4
    assert len(opened.training.questions) + opened.set_aside == 100
    assert 30 < opened.set_aside == len(traces.train) + traces.dropped
    whole = open_questions(runtime(replaced(tiny, {"data.part": "all"})))
    assert (len(whole.training.questions), whole.set_aside) == (100, 0)
    half = open_questions(runtime(replaced(tiny, {"data.part": "second_half"})))
    assert half.training == opened.training


def test_traces_of_a_user_set_aside_the_half_that_they_are_about(own: Config, tmp_path: Path):
    first = select_part(OWN, "first_half")
    of_first = written(tmp_path / "traces.jsonl", first[:3], response="<dx>")
    cold = replaced(own, {"model.path": "", "sft.path": of_first})
    assert resolve_part(cold, OWN) == "second_half"
    opened = open_questions(runtime(cold))
    assert opened.set_aside == len(first)
    others = [Question("other", "Where?", {"A": "here", "B": "there"}, "A")]
    elsewhere = replaced(cold, {"sft.path": written(tmp_path / "others.jsonl", others, response="<dx>")})
    assert resolve_part(elsewhere, OWN) == "all"


@pytest.mark.parametrize("place", ["config.yaml", "sft/config.yaml"])
def test_a_model_from_a_cold_start_knows_what_it_was_tuned_on(place: str, tmp_path: Path):
    """runs/NAME/coldstart, of crpo_jax.sft or of another run's beginning."""
    tiny = load_config(TINY)
    start = replaced(tiny, {"model.path": str(tmp_path / "coldstart")})
    assert resolve_part(start, OWN) == "all", "nobody knows of a cold start"
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(dump_config(tiny))
    assert resolve_part(start, OWN) == "second_half"
    assert resolve_part(replaced(start, {"data.source": "medqa"}), OWN) == "all", "other questions"
    assert resolve_part(replaced(start, {"model.path": str(tmp_path / "policy")}), OWN) == "all", "another model"
    (tmp_path / place).write_text(dump_config(replaced(tiny, {"data.part": "first_half"})))
    assert resolve_part(start, OWN) == "first_half", "the half that its own run trains on"


def test_a_cold_start_records_the_questions_of_its_traces(own: Config, tmp_path: Path):
    """Traces given in Python are in no file, and sft.path may be gone: the half was set aside all the same, or none."""
    others = [Question(n, "Where?", {"A": "here", "B": "there"}, "A", columns={"response": "A"}) for n in "xy"]
    start = replaced(own, {"model.path": str(tmp_path / "coldstart")})
    (tmp_path / "config.yaml").write_text(dump_config(replaced(own, {"model.path": ""})))
    assert resolve_part(start, OWN) == "second_half", "nothing recorded: the same source"
    write_traced(tmp_path, open_traces(runtime(own), others).questions)
    assert resolve_part(start, OWN) == "all"
    write_traced(tmp_path, [OWN[1].id, select_part(OWN, "first_half")[0].id])
    assert resolve_part(start, OWN) == "second_half"

    run = replaced(own, {"model.path": "", "sft.path": str(tmp_path / "gone.jsonl")})
    assert resolve_part(run, OWN, tmp_path / "run") == "second_half", "nobody knows"
    (tmp_path / "run" / "sft").mkdir(parents=True)
    write_traced(tmp_path / "run" / "sft", ["other"])
    assert resolve_part(run, OWN, tmp_path / "run") == "all"
    (tmp_path / "traced.json").write_text('{"questions": 3}')
    with pytest.raises(InputError, match=r"questions: expected a list of ids, got 3; say data.part=first_half"):
        resolve_part(start, OWN)


def test_what_is_set_aside_is_said_with_the_reason():
    tiny = load_config(TINY)
    assert set_aside_line(tiny, 4102) == (
        "  set aside  4,102 questions, those of the half that the cold start was fine-tuned on "
        "(data.part=auto; all: none)"
    )
    half = replaced(tiny, {"data.part": "first_half"})
    assert set_aside_line(half, 9) == "  set aside  9 questions, the other half (data.part=first_half; all: none)"


# ---- too long --------------------------------------------------------------------------------------------------------


def long_questions(count: int) -> list[Question]:
    return [Question(f"long{n}", "pain " * 200, {"A": "gout", "B": "flu"}, "A") for n in range(count)]


def test_a_run_that_would_drop_more_than_a_tenth_says_which_setting_to_change(own: Config):
    """Of 1,272 questions 4 were left, and the run went on with them to the end."""
    few, many = [*OWN, *long_questions(4)], [*OWN, *long_questions(5)]
    assert len(open_questions(runtime(own), few, OWN).training.dropped) == 4
    length = len(render_prompts(long_questions(1), Data(prompt="brief", system_prompt=""), TOKENIZER)[0])
    line = (
        rf"data\.max_prompt_tokens: expected room for at least 90% of the training questions, got 160: 5 of 45 are "
        rf"longer, up to {length} tokens; data\.max_prompt_tokens={length} keeps all; raise data\.max_dropped_share "
    )
    with pytest.raises(InputError, match=line):
        open_questions(runtime(own), many, OWN)
    with pytest.raises(InputError, match=r"at least 90% of the held-out questions, got 160: 5 of 45"):
        open_questions(runtime(own), OWN, many)
    keeps_all = replaced(own, {"data.max_prompt_tokens": length})
    assert open_questions(runtime(keeps_all), many, many).training.dropped == {}
    goes_on = replaced(own, {"data.max_dropped_share": 0.2})
    assert len(open_questions(runtime(goes_on), many, many).training.dropped) == 5


def test_a_cold_start_that_would_drop_more_than_a_tenth_of_its_traces_says_so_too(own: Config, tmp_path: Path):
    path = written(tmp_path / "traces.jsonl", [*OWN, *long_questions(5)], response="<dx> gout </dx>")
    with pytest.raises(
        InputError, match=r"sft\.max_tokens: expected room for at least 90% of the traces, got 64: 5 of 45"
    ):
        open_traces(runtime(replaced(own, {"sft.path": path, "sft.max_tokens": 64})))
