"""Batches: every epoch has every question once, and a step's batch needs nothing but the step."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.config import Data
from crpo_jax.data.batches import Batches, load_questions
from crpo_jax.data.question import Question
from crpo_jax.data.readers import read_questions
from crpo_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def numbered(count):
    return [Question(f"q{number}", "Which?", {"A": "1", "B": "2"}, "A") for number in range(count)]


def ids(batch):
    return [question.id for question in batch]


sizes = st.integers(1, 40)
seeds = st.integers(-(2**70), 2**70)


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 12), seeds)
def test_every_epoch_visits_every_question_once(count, prompts_per_step, seed):
    batches = Batches(numbered(count), prompts_per_step, seed)
    seen = [identity for step in range(batches.steps(3)) for identity in ids(batches.batch(step))]
    assert len(seen) - prompts_per_step < 3 * count <= len(seen)
    for epoch in range(3):
        assert Counter(seen[epoch * count : (epoch + 1) * count]) == Counter(
            question.id for question in numbered(count)
        )


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 12), seeds, st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
def test_a_batch_follows_from_the_step_alone(count, prompts_per_step, seed, steps):
    """A resumed run starts at step s; the run before it had all earlier steps, here in any order and twice."""
    used = Batches(numbered(count), prompts_per_step, seed)
    for step in [*steps, *steps]:
        assert used.batch(step) == Batches(numbered(count), prompts_per_step, seed).batch(step)


def test_epochs_and_seeds_are_shuffled_differently():
    batches = Batches(numbered(100), 100, 0)
    assert ids(batches.batch(0)) != ids(batches.batch(1))
    orders = {tuple(ids(Batches(numbered(100), 100, seed).batch(0))) for seed in (0, 1, -1, 2**32, 2**64)}
    assert len(orders) == 5, "seeds that agree in their low 32 bits included"


def test_the_order_never_changes():
    """Another order would make a resumed run train on other questions than the run it continues."""
    assert [identity for step in range(3) for identity in ids(Batches(numbered(5), 2, 7).batch(step))] == [
        "q1",
        "q2",
        "q3",
        "q4",
        "q0",
        "q1",
    ]


def test_the_last_partial_batch_goes_on_in_the_next_epoch():
    """A loader that drops it or ends there never sees some questions, or stops a run untrained."""
    batches = Batches(numbered(10), 4, 0)
    assert [batches.steps(epochs) for epochs in (1, 2, 20)] == [3, 5, 50]
    seen = [identity for step in range(5) for identity in ids(batches.batch(step))]
    assert Counter(seen) == Counter({f"q{number}": 2 for number in range(10)})


def test_fewer_questions_than_a_batch_wrap_around():
    batches = Batches(numbered(3), 8, 0)
    counts = Counter(ids(batches.batch(0)))
    assert sum(counts.values()) == 8
    assert set(counts.values()) == {2, 3}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((numbered(3), 0, 0), "crpo.prompts_per_step: expected at least 1, got 0"),
        (([], 4, 0), "data: expected at least one question to train on, got none"),
    ],
)
def test_what_cannot_be_batched(arguments, expected):
    with pytest.raises(InputError) as caught:
        Batches(*arguments)
    assert str(caught.value) == expected


# ---- the questions of a config ---------------------------------------------------------------------------------------


def own(path, prefix, count):
    records = [
        {"id": f"{prefix}{number}", "question": "Which?", "options": {"A": "1", "B": "2"}, "answer": "A"}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_part_is_taken_of_the_training_split_only(tmp_path):
    own(tmp_path / "train.jsonl", "t", 40)
    own(tmp_path / "test.jsonl", "e", 30)
    parts = {
        part: load_questions(Data(source="jsonl", path=str(tmp_path), part=part), "train")
        for part in ("all", "first_half", "second_half")
    }
    assert len(parts["all"]) == 40
    assert sorted(question.id for part in ("first_half", "second_half") for question in parts[part]) == sorted(
        question.id for question in parts["all"]
    )
    assert len(load_questions(Data(source="jsonl", path=str(tmp_path)), "test")) == 30


def test_evaluation_has_a_path_of_its_own(tmp_path):
    train, test = own(tmp_path / "a.jsonl", "t", 4), own(tmp_path / "b.jsonl", "e", 3)
    data = Data(source="jsonl", path=train, eval_path=test, part="all")
    assert [len(load_questions(data, split)) for split in ("train", "test")] == [4, 3]


def test_no_run_reports_on_the_file_it_trains_on(tmp_path):
    train = own(tmp_path / "a.jsonl", "t", 4)
    with pytest.raises(
        InputError,
        match=r"data\.eval_path: expected a file or folder of its own for split test, got none beside the single file",
    ):
        load_questions(Data(source="jsonl", path=train), "test")
    with pytest.raises(InputError, match=r"data\.eval_path: expected a file or folder of its own .* for both"):
        load_questions(Data(source="jsonl", path=train, eval_path=train), "test")
    with pytest.raises(
        InputError, match=r"data\.eval_split: expected another split than data\.split, got 'test' for both"
    ):
        load_questions(Data(source="jsonl", path=train, split="test"), "test")
    with pytest.raises(InputError, match=r"split: expected data\.split=train or data\.eval_split=test, got 'dev'"):
        load_questions(Data(source="jsonl", path=train), "dev")


def test_vignettes_are_made_in_the_asked_number_and_halved_for_training():
    data = Data(source="vignettes", vignettes=50, eval_questions=20, part="all")
    assert [len(load_questions(data, split)) for split in ("train", "test")] == [50, 20]
    first, second = (
        load_questions(Data(source="vignettes", vignettes=50, part=part), "train")
        for part in ("first_half", "second_half")
    )
    assert len(first) + len(second) == 50
    assert not {question.id for question in first} & {question.id for question in second}


def test_published_questions_of_both_splits_are_disjoint():
    folder = SHARED / "medqa"
    if not folder.exists():
        pytest.skip("the published data is not here: shared/data/medqa")
    data = Data(path=str(folder), split="dev", part="all")
    train, test = load_questions(data, "dev"), load_questions(data, "test")
    assert (len(train), len(test)) == (1272, 1273)
    assert not {question.id for question in train} & {question.id for question in test}
    assert test == read_questions("medqa", str(folder), "test")
    batch = Batches(train, 512, 0).batch(2)
    assert len({question.id for question in batch}) > 400
