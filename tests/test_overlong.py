"""The soft overlong punishment: DAPO's equation 13, as one more component of a score of any design."""

import pytest

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.overlong import overlong_punishment, punish_overlong
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scorer

QUESTION = Question(id="q", question="Which?", options={"A": "one", "B": "two"}, answer="A")
RESPONSE = "the box is \\boxed{A}"


@pytest.mark.parametrize(
    ("tokens", "punishment"),
    [(1, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (30000, -1.0)],
)
def test_equation_13_with_the_papers_lengths(tokens: int, punishment: float):
    """16,384 tokens are expected, and 4,096 more are the cache."""
    assert overlong_punishment(tokens, 20480, 0.2) == punishment


def test_every_length_against_the_three_cases_of_the_equation():
    longest, cache = 160, 32
    for tokens in range(longest + 20):
        if tokens <= longest - cache:
            expected = 0.0
        elif tokens <= longest:
            expected = ((longest - cache) - tokens) / cache
        else:
            expected = -1.0
        assert overlong_punishment(tokens, longest, 0.2) == pytest.approx(expected, abs=1e-15), tokens


def scored(settings: Reward, **functions) -> Score:
    with Scorer(settings, functions=functions) as scorer:
        (score,) = scorer.score([QUESTION], [RESPONSE])
    assert isinstance(score, Score)
    return score


def test_it_is_a_component_of_its_own():
    settings = Reward(design="grpo", workers=0, overlong=3.0, overlong_share=0.5)
    before = scored(settings)
    after = punish_overlong(before, 75, 100, settings)
    assert isinstance(after, Score)
    assert after.total == before.total - 1.5
    assert after.components == {"grpo": before.total, "overlong": -0.5}
    assert after.why["weights"] == {"grpo": 1.0, "overlong": 3.0}
    assert (after.accuracy, after.format, after.answer_found) == (before.accuracy, before.format, before.answer_found)


def test_it_joins_a_weighted_sum():
    settings = Reward(design="crpo*0.5+brief*2", workers=0, overlong=1.0)
    before = scored(settings, brief=lambda completions, **_: [7.0])
    after = punish_overlong(before, 100, 100, settings)
    assert isinstance(after, Score)
    assert after.components == {**before.components, "overlong": -1.0}
    assert after.why["weights"] == {"crpo": 0.5, "brief": 2.0, "overlong": 1.0}
    assert (
        after.total
        == before.total - 1
        == sum(after.why["weights"][name] * after.components[name] for name in after.components)
    )


def test_off_changes_nothing_and_a_failure_stays_one():
    settings = Reward(workers=0)
    before, failure = scored(settings), Failure("gone")
    assert punish_overlong(before, 100, 100, settings) is before
    assert punish_overlong(failure, 100, 100, Reward(overlong=1.0)) is failure


def test_a_function_cannot_take_its_name():
    """Its values would replace the punishment's among the components."""
    functions = {"overlong": lambda completions, **_: [0.0]}
    with pytest.raises(InputError, match=r"expected other names than those of built-in rewards, got overlong"):
        Scorer(Reward(design="overlong", workers=0, overlong=1.0), functions=functions)
    assert Scorer(Reward(design="overlong", workers=0), functions=functions).function_names == ("overlong",)
