"""pass@k and majority@k against enumeration of every draw."""

import statistics
from collections import Counter
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.answer.attempts import majority_at_k, majority_vote, pass_at_k, vote_of
from crpo_jax.config import Reward
from crpo_jax.data.question import Question

VOTES = st.lists(st.sampled_from(["A", "B", "C", "D", None]), min_size=1, max_size=9)


def expected_vote(votes: tuple[str | None, ...]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    best = [vote for vote, count in counts.items() if count == max(counts.values())]
    return ("A" in best) / len(best) if best else 0.0


@given(VOTES, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_both_are_means_over_all_draws(votes, k):
    k = min(k, len(votes))
    draws = list(combinations(votes, k))
    some_right = statistics.fmean("A" in draw for draw in draws)
    assert pass_at_k(votes.count("A"), len(votes), k) == pytest.approx(some_right, abs=1e-12)
    assert majority_at_k(votes, "A", k) == pytest.approx(statistics.fmean(map(expected_vote, draws)), abs=1e-12)


def test_ties_at_random_are_ties_to_the_first_of_a_random_order():
    for votes in (["A", "B"], ["A", "B", "B", "A"], ["A", "B", "C", None], ["B", "A", "B", "C", "C"]):
        orders = list(permutations(votes))
        first = statistics.fmean(majority_vote(order) == "A" for order in orders)
        assert majority_at_k(votes, "A", len(votes)) == pytest.approx(first, abs=1e-12)


def test_hand_worked_values():
    assert pass_at_k(1, 4, 2) == 0.5
    assert pass_at_k(0, 4, 4) == 0.0
    assert pass_at_k(4, 4, 1) == 1.0
    assert majority_at_k(["A", "A", "B"], "A", 3) == 1.0
    assert majority_at_k(["A", "B", None], "A", 2) == pytest.approx((0.5 + 1 + 0) / 3)
    assert majority_at_k([None, None], "A", 1) == 0.0


def test_many_samples_of_many_answers_are_exact_too():
    votes = ["A"] * 20 + [str(n) for n in range(40)] + [None] * 4
    assert 0.98 < majority_at_k(votes, "A", 32) < 1
    assert majority_at_k(votes, "A", 1) == pytest.approx(20 / 64)


@pytest.mark.parametrize(
    ("kind", "answer", "aliases", "groups"),
    [
        ("choice", "A", (), [["A"], ["B"], [None]]),
        ("number", "1200", (), [["1200", "1,200", "1200.0"], ["13", "13.0"], ["14"], [None]]),
        ("text", "acute gout", ("podagra",), [["the acute gout", "Podagra"], ["flu", "Flu."]]),
    ],
)
def test_spellings_of_an_answer_vote_together(kind, answer, aliases, groups):
    question = Question("q", "?", {"A": "x", "B": "y"} if kind == "choice" else {}, answer, kind=kind, aliases=aliases)
    votes = [{vote_of(question, text, Reward()) for text in group} for group in groups]
    assert [len(group) for group in votes] == [1] * len(groups)
    assert len(set.union(*votes)) == len(groups)
    assert votes[0] == {answer}
