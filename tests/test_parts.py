"""The parts of a design: each value by hand, and that a sum of them is the sum of its parts."""

import math
import re

import pytest
from response_table import GOOD, GOUT, ROWS

from crpo_jax.answer.evaluation import reward_means
from crpo_jax.config import Reward, load_config
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.parse import split_tags
from crpo_jax.reward.rules import Score, score_response
from crpo_jax.reward.scorer import Scorer, score_row

TAGGED = "<think>Urate crystals after tophi on the ear.</think>\n<answer>It is \\boxed{C}</answer>"


def score(design: str, response: str, ids: list[int] | None = None, **settings) -> Score:
    with Scorer(Reward(design=design, workers=0, **settings)) as scorer:
        (scored,) = scorer.score([GOUT], [response], None if ids is None else [ids])
    assert isinstance(scored, Score)
    return scored


def test_every_part_stands_by_name_before_its_weight():
    scored = score("accuracy*10+format+citation*0.5+consistency*0.5+length*3", TAGGED, [1] * 6, target_length=4)
    assert scored.components == {"accuracy": 1, "format": 1, "citation": 0, "consistency": 1, "length": -0.5}
    assert scored.total == 10 + 1 + 0 + 0.5 - 1.5
    assert (scored.accuracy, scored.format, scored.consistency, scored.answer_found) == (1, 1, 1, "C")
    assert score_row(scored)["components"] == scored.components
    assert scored.why["length"] == {"tokens": 6}


@pytest.mark.parametrize(
    ("tags", "response", "problems"),
    [
        (("think", "answer"), TAGGED, []),
        (("think", "answer"), TAGGED.replace("It is", "").replace("\\boxed{C}", " "), ["answer is empty"]),
        (("think", "answer"), TAGGED + " more", ["text after </answer>"]),
        (("a", "b", "c"), "<a>1</a><b>2</b> <c>3</c>", []),
        (("a", "b", "c"), "<a>1</a>x<b>2</b>y<c>3</c>", ["text between </a> and <b>", "text between </b> and <c>"]),
        (
            ("a", "b", "c"),
            "<a>1</a><c>3</c><b>2</b>",
            ["the tags are out of order: expected <a> </a> <b> </b> <c> </c>"],
        ),
        (("out",), "<out>1</out><out>", ["<out> stands 2 times"]),
        (("out",), "", ["no <out>", "no </out>"]),
    ],
)
def test_any_tagged_format(tags, response, problems):
    scored = score("format", response, tags=tags)
    assert (scored.format, scored.why["format"]) == (float(not problems), problems)


def test_what_a_design_does_not_measure_has_no_value():
    """A run with numbers as answers logged and tabulated a format and citations of 0."""
    scored = score("accuracy", TAGGED)
    assert (scored.accuracy, scored.format, scored.cross_reference, scored.consistency) == (1, None, None, 1)
    assert reward_means([scored]) == pytest.approx(
        {
            "reward/mean": 1,
            "reward/accuracy": 1,
            "reward/format": math.nan,
            "reward/cross_reference": math.nan,
            "reward/consistency": 1,
            "reward/failed": 0,
        },
        nan_ok=True,
    )


def test_accuracy_does_not_apply_where_there_is_no_right_answer():
    question = Question("q", "How are you?", {}, "", kind="none")
    with Scorer(Reward(design="accuracy*10+format", workers=0)) as scorer:
        (scored,) = scorer.score([question], [TAGGED])
    assert isinstance(scored, Score)
    assert (scored.accuracy, scored.components, scored.total) == (None, {"accuracy": None, "format": 1}, 1)
    assert math.isnan(reward_means([scored])["reward/accuracy"])
    assert math.isnan(reward_means([scored])["reward/component/accuracy"])


def test_accuracy_alone_is_refused_where_there_is_no_right_answer():
    """A whole run was trained on rewards of 0."""
    question = Question("q7", "How are you?", {}, "", kind="none")
    Scorer(Reward(design="accuracy", workers=0)).check_questions([GOUT])
    Scorer(Reward(design="accuracy+format", workers=0)).check_questions([GOUT, question])
    with pytest.raises(
        InputError, match="expected more than accuracy for questions without a right answer, such as q7"
    ):
        Scorer(Reward(design="accuracy", workers=0)).check_questions([GOUT, question])


def test_two_tags_are_judged_as_by_the_grpo_design():
    settings = Reward(design="grpo", tags=("dx", "conclusion"))
    for _, _, response, *_ in ROWS:
        whole, (texts, _) = score_response(GOUT, response, settings), split_tags(response, settings.tags)
        assert score("format", response, tags=settings.tags).format == whole.format, response
        assert texts is None or len(texts) == 2


def test_the_citation_is_the_clinical_rule_without_its_headings():
    assert score("citation", GOOD, tags=("dx", "conclusion")).components == {"citation": 1.0}
    general = re.sub(r"\(?System [12][^)\n]*\)?", "", GOOD)
    assert score("citation", general, tags=("dx", "conclusion")).components == {"citation": 1.0}
    assert score("citation", GOOD).why["cross_reference"] == {"failed": ["the tagged parts cannot be told apart"]}


@pytest.mark.parametrize(("tokens", "value"), [(0, 0), (100, 0), (101, -0.01), (150, -0.5), (200, -1), (5000, -1)])
def test_the_length_against_hand_worked_values(tokens, value):
    assert score("length", "x", [1] * tokens, target_length=100).total == pytest.approx(value, abs=1e-12)


def test_a_length_without_tokens_does_not_apply():
    scored = score("accuracy+length", TAGGED)
    assert (scored.components, scored.total) == ({"accuracy": 1, "length": None}, 1)
    assert scored.why["length"] == "the tokens are unknown"


def test_beside_a_whole_design_the_design_describes():
    alone, both = score("crpo", GOOD), score("length*2+crpo", GOOD, [1] * 6, target_length=4)
    assert (both.why["cross_reference"], both.format) == (alone.why["cross_reference"], alone.format)
    assert both.components == {"length": -0.5, "crpo": alone.total}
    assert both.total == alone.total - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_processes_score_parts_too(workers):
    with Scorer(Reward(design="accuracy+consistency", workers=workers)) as scorer:
        totals = [scored.total for scored in scorer.score([GOUT] * 2, [TAGGED, ""]) if isinstance(scored, Score)]
    assert totals == [2.0, 0.0]


def test_a_function_given_as_an_object_is_meant_by_its_name():
    with Scorer(Reward(design="length", workers=0), functions={"length": lambda completions, **_: [7.0]}) as scorer:
        (scored,) = scorer.score([GOUT], ["x"])
    assert isinstance(scored, Score)
    assert scored.components == {"length": 7.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"design": "acuracy*10"}, "the parts may also be accuracy, .*; did you mean accuracy\\?"),
        ({"design": "format", "tags": ()}, r"reward.tags: expected at least 1 different tag names, got \[\]"),
        ({"design": "format", "tags": ("a", "a")}, r"reward.tags: expected different tag names, got \['a', 'a'\]"),
        ({"design": "format", "tags": ("a b",)}, "reward.tags: expected different tag names"),
        ({"design": "citation", "tags": ("a",)}, "reward.tags: expected at least 2 different tag names"),
    ],
)
def test_bad_parts_are_named_at_once(settings, expected):
    with pytest.raises(InputError, match=expected):
        Scorer(Reward(**settings))


def test_settings_of_earlier_runs_have_the_tags_under_their_old_name(tmp_path):
    (tmp_path / "old.yaml").write_text("reward: {grpo_tags: [dx, conclusion]}\n")
    assert load_config(tmp_path / "old.yaml", model=False).reward.tags == ("dx", "conclusion")
    assert load_config(None, ["reward.grpo_tags=[a, b]"], model=False).reward.tags == ("a", "b")
