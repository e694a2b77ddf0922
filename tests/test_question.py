"""Which questions go to which half and which are held out: by their ids alone, and never differently."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpo_jax.data.question import Question, hold_out, select_part
from crpo_jax.errors import InputError


def numbered(count):
    return [Question(f"medqa-train-{number:06d}", "Which?", {"A": "1", "B": "2"}, "A") for number in range(count)]


def test_halves_are_disjoint_complete_and_keep_the_order():
    questions = numbered(10_178)
    first, second = select_part(questions, "first_half"), select_part(questions, "second_half")
    assert select_part(questions, "all") == questions
    assert sorted([*first, *second], key=lambda question: question.id) == questions
    assert not {question.id for question in first} & {question.id for question in second}
    assert abs(len(first) - 5089) < 150, "about 5,000 each, as in the paper"
    assert [question.id for question in first] == sorted(question.id for question in first)
    with pytest.raises(InputError, match=r"data\.part: expected all, first_half or second_half, got 'third'"):
        select_part(questions, "third")


def test_the_halves_never_move():
    """A changed hash would train RL on the cold start's questions of every earlier run."""
    assert [question.id[-1] for question in select_part(numbered(10), "first_half")] == ["2", "7", "8", "9"]


@given(st.permutations(range(40)), st.integers(0, 40))
def test_a_half_depends_on_neither_order_nor_company(order, kept):
    questions = numbered(40)
    whole = {question.id for question in select_part(questions, "first_half")}
    some = [questions[number] for number in order[:kept]]
    assert {question.id for question in select_part(some, "first_half")} == whole & {question.id for question in some}


@given(st.permutations(range(40)), st.floats(0, 0.9))
def test_held_out_is_a_share_that_no_order_changes(order, share):
    questions = numbered(40)
    train, held = hold_out(questions, share)
    assert len(held) == (max(1, round(share * 40)) if share > 0 else 0)
    assert sorted([*train, *held], key=lambda question: question.id) == questions
    assert {question.id for question in hold_out([questions[number] for number in order], share)[1]} == {
        question.id for question in held
    }


def test_held_out_keeps_traces_of_one_question_together_and_never_everything():
    traces = [question for question in numbered(20) for _ in range(3)]
    train, held = hold_out(traces, 0.1)
    assert len(held) == 6
    assert Counter(trace.id for trace in held).most_common()[-1][1] == 3
    assert not {trace.id for trace in train} & {trace.id for trace in held}
    assert hold_out(numbered(1), 0.5) == (numbered(1), [])


def test_held_out_is_independent_of_the_halves():
    half = select_part(numbered(4000), "first_half")
    held = {question.id for question in hold_out(numbered(4000), 0.1)[1]}
    assert abs(len([question for question in half if question.id in held]) - 200) < 50
