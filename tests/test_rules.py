"""The reward rules: the table of responses, the properties, the weights, and time."""

import json
import re
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from response_table import CITES, CONSISTENCY, GOOD, GOUT, ROWS, concluding

from crpo_jax.config import CrossReference, Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.citation import copied_share
from crpo_jax.reward.rules import DESIGNS, score_response
from crpo_jax.reward.terms import FRAME, STOP_WORDS, TOKEN, read_terms


@pytest.mark.parametrize(
    ("reason", "design", "response", "accuracy", "formed", "cited", "why"),
    ROWS,
    ids=[f"{row[1]}: {row[0]}" for row in ROWS],
)
def test_table(reason: str, design: str, response: str, accuracy: float, formed: float, cited: float, why: str) -> None:
    found = score_response(GOUT, response, Reward(design=design))
    measured = cited if design == "crpo" else None  # no other whole design looks for citations
    assert (found.accuracy, found.format, found.cross_reference) == (accuracy, formed, measured), (
        f"{reason}: {found.why}"
    )
    explanation = (
        found.why["answer"]
        + "".join(found.why["format"])
        + "".join((found.why["cross_reference"] or {}).get("failed", ()))
    )
    assert why in explanation, explanation
    assert bool(found.why["format"]) == (not formed), "a lost format is explained, and only a lost one"
    assert design != "crpo" or bool((found.why["cross_reference"] or {"failed": ["no format"]})["failed"]) == (
        not cited
    )
    json.dumps(found.why)


def test_the_table_is_large_enough_and_without_doubles() -> None:
    assert len(ROWS) >= 120
    assert len({(design, response) for _, design, response, *_ in ROWS}) == len(ROWS)
    assert len({(design, reason) for reason, design, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("reason", "response", "count", "of"), CONSISTENCY, ids=[row[0] for row in CONSISTENCY])
def test_consistency_by_characters(reason: str, response: str, count: int, of: int) -> None:
    found = score_response(GOUT, response, Reward())
    assert found.why["consistency"] == {"by": "characters", "effective": count, "of": of}
    assert found.consistency == (count / of if of else 0.0)


def test_total_is_the_papers_sum() -> None:
    found = score_response(GOUT, GOOD, Reward())
    assert (found.clinical_reasoning, found.consistency, found.total) == (1.5, 1.0, 12.0)
    assert found.components == {"crpo": 12.0}
    assert found.answer_found == "C"
    assert score_response(GOUT, GOOD, Reward(k=3, format=2, citation=0.25, consistency=4)).total == 3 + 2 + 0.25 + 4
    assert score_response(GOUT, concluding("So it is gout. \\boxed{C}"), Reward()).total == 11.5
    assert score_response(GOUT, GOOD + "x", Reward()).total == 10.5


def test_grpo_leaves_consistency_out_of_the_total_and_takes_other_tags() -> None:
    settings = Reward(design="grpo", tags=("dx", "conclusion"))
    found = score_response(GOUT, GOOD.replace("big toe.", "big toe. 可能"), settings)
    assert (found.accuracy, found.format, found.cross_reference, found.total) == (1, 1, None, 11)
    assert found.consistency < 1
    assert score_response(GOUT, "<dx>Gout.</dx><conclusion>\\boxed{C}</conclusion>", settings).format == 1, (
        "no System 1 and 2 asked for"
    )


def test_released_adds_up_as_published() -> None:
    settings = Reward(design="released")
    assert score_response(GOUT, "<think>a</think><answer>Gout. \\boxed{C}</answer>", settings).total == 10 + 1.5 + 0.5
    assert score_response(GOUT, "<think>a</think><answer>\\boxed{C}</answer>", settings).total == 10 + 1 + 0.5, (
        "no text besides the box"
    )
    assert score_response(GOUT, "<think>a</think><answer>Gout.</answer>", settings).total == 0 + 1 + 0.5, (
        "no box in the answer, no summary"
    )
    assert score_response(GOUT, "aé", settings).consistency == 0.5
    assert score_response(GOUT, "a\tb", settings).consistency == 2 / 3, "a tab is not on their list"
    assert score_response(GOUT, "", settings).total == 0
    assert score_response(GOUT, "\\boxed{C} \\boxed{C}", settings).total == -20 + 0.5
    titled = "## Thinking \\boxed{A} ## Final Response <think>a</think><answer>Gout. \\boxed{C}</answer>"
    assert score_response(GOUT, titled, settings).total == 12, "only what follows the title counts"


def test_unknown_design_is_named() -> None:
    with pytest.raises(InputError, match=r"reward.design: expected one of crpo, grpo, released, got 'ppo'"):
        score_response(GOUT, GOOD, Reward(design="ppo"))


def test_why_shows_the_parts_of_the_citation() -> None:
    why = score_response(GOUT, GOOD, Reward()).why["cross_reference"]
    assert why["cited"] == ["9.1 mg/dl", "acid", "crystal", "ear", "needl", "serum", "shap", "tophi", "uric"]
    assert why["case_facts"] == ["tophi ear", "needl shap crystal", "serum uric acid 9.1 mg/dl"]
    assert (why["cited_share"], why["distinct_share"], why["repeats"]) == (1.0, 1.0, 0)
    assert why["copied_share"] == 0.0
    assert why["failed"] == []


def test_a_measurement_is_a_finding_with_its_value_only() -> None:
    question = replace(
        GOUT,
        question="A 55-year-old man has a blood pressure of 170/95 mm Hg, headache and blurred vision. "
        "What is the diagnosis?",
    )
    dx = "<dx>(System 1: Intuitive) Think of pressure on the eye.\n"
    dx += "(System 2: Analytical) Blood pressure is 170/95 mmHg, with headache.</dx>"
    for conclusion, facts in (
        ("His blood pressure and the headache matter most.", []),
        ("His blood pressure of 170/95 mmHg and the headache matter most.", ["pressur 170/95 mmhg"]),
    ):
        found = score_response(question, f"{dx}<conclusion>{conclusion} \\boxed{{C}}</conclusion>", Reward())
        assert found.why["cross_reference"]["case_facts"] == facts
        assert found.cross_reference == bool(facts)


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({"min_terms": 9}, True),
        ({"min_terms": 10}, False),
        ({"min_system2_terms": 9}, True),
        ({"min_system2_terms": 10}, False),
        ({"min_case_facts": 3}, True),
        ({"min_case_facts": 4}, False),
        ({"min_cited_share": 1.0}, True),
        ({"min_distinct_share": 1.0}, True),
        ({"max_copied_share": 0.0}, True),
        ({"copy_ngram": 1, "max_copied_share": 0.5}, False),
    ],
)
def test_every_number_of_the_citation_is_a_setting(changed: dict[str, float], holds: bool) -> None:
    assert (
        score_response(GOUT, GOOD, Reward(cross_reference=replace(CrossReference(), **changed))).cross_reference
        == holds
    )


def test_copied_share_counts_ngrams() -> None:
    words = list("abcdef")
    assert copied_share(words, words, 3) == 1.0
    assert copied_share(words, list("abcxdef"), 3) == 0.5
    assert copied_share(words, words, 8) == 1.0, "shorter than an n-gram: one n-gram"
    assert copied_share(words, words[::-1], 2) == 0.0
    assert copied_share([], words, 8) == 0.0


@pytest.mark.parametrize(
    ("texts", "term"),
    [
        (("radiates", "radiating", "radiated", "Radiate"), "radiat"),
        (("biopsies", "biopsy"), "biopsy"),
        (("masses", "mass"), "mass"),
        (("swelling", "swellings"), "swell"),
        (("stopped", "stopping"), "stop"),
        (("patient's", "the", "a", "C", "7", "diagnosis"), ""),
        (("arthritis",), "arthritis"),
        (("thrombus",), "thrombus"),
        (("9.1 mg/dL", "9.1mg/dl", "9.1-mg/dL"), "9.1 mg/dl"),
        (("38.2 °C", "38.2°C", "38.2 ℃"), "38.2 °c"),
        (("12,000/mm3", "12000 /mm³"), "12000 /mm3"),
        (("120/80 mm Hg", "120/80 mmHg"), "120/80 mmhg"),
        (("5 µg", "5 μg", "5 mcg"), "5 ug"),
        (("55-year", "55 years", "55 yr"), "55 year"),
        (("90/min", "90 beats", "90 bpm"), "90 /min"),
        (("45%", "45 %", "45 percent"), "45 %"),
        (("1,500",), "1500"),
        (("HbA1c",), "hba1c"),
    ],
)
def test_terms(texts: tuple[str, ...], term: str) -> None:
    for text in texts:
        assert read_terms(text).in_order() == ([term] if term else []), text


def test_the_instructions_words_are_stop_words() -> None:
    """A response that repeats the prompt has cited nothing."""
    assert {"clinical", "system", "findings", "deliberate", "boxed"} <= FRAME <= STOP_WORDS


PLAIN_WORD = re.compile(r"[^\W\d_][^\W_]{0,63}(?:['’][^\W\d_]{1,8})?")


@given(st.text(st.one_of(st.sampled_from("abcxyz019'’_- .é痛µ"), st.characters())))
def test_the_fast_reading_of_words_changes_none(text: str) -> None:
    words = [token for token in TOKEN.findall(text) if token[0].isalpha()]
    plain = TOKEN.pattern.partition("|")[2]
    assert words == [token for token in re.findall(plain, text) if token[0].isalpha()]
    assert all(PLAIN_WORD.fullmatch(word) for word in words)


# Text in which tags, boxes and headings meet often, besides any text at all.
PIECES = st.sampled_from(
    [
        *(
            "<dx>",
            "</dx>",
            "<conclusion>",
            "</conclusion>",
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "\\boxed{",
            "\\boxed{C}",
            "}",
            "{",
            "\n",
            " ",
        ),
        *(
            "(System 1: Intuitive)",
            "(System 2: Analytical)",
            CITES,
            "tophi on the ear",
            "9.1 mg/dL",
            "C",
            "痛风",
            "\u200b",
            "\ud800",
            "\x00",
        ),
    ]
)
RESPONSES = st.one_of(
    st.text(st.characters()), st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=40).map("".join)
)
TEXTS = st.one_of(st.just(GOUT.question), st.text(max_size=80))
LETTERS = "ABCDEFGHIJ"


@st.composite
def questions(draw: st.DrawFn) -> Question:
    texts = draw(st.lists(st.text(max_size=20), min_size=2, max_size=10))
    options = dict(zip(LETTERS, texts, strict=False))
    return Question("any", draw(TEXTS), options, draw(st.sampled_from(sorted(options))))


@settings(max_examples=300, deadline=None)
@given(questions(), RESPONSES, st.sampled_from(sorted(DESIGNS)))
def test_no_rule_raises_and_the_reward_is_bounded(question: Question, response: str, design: str) -> None:
    config = Reward(design=design)
    found = score_response(question, response, config)
    assert 0 <= found.consistency <= 1
    assert found.format in (0, 1)
    assert (found.cross_reference or 0) <= found.format
    assert found.answer_found is None or found.answer_found in response
    assert found.total <= config.k + 2
    if design != "released":
        assert found.total >= 0
        assert found.accuracy == (found.answer_found == question.answer)
    json.loads(json.dumps(found.why))


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(RESPONSES, st.sampled_from([row[2] for row in ROWS])),
    st.text(" \t\r\n\u00a0", max_size=5),
    st.text(" \n", max_size=5),
)
def test_surrounding_white_space_changes_nothing(response: str, before: str, after: str) -> None:
    for design in DESIGNS:
        config = Reward(design=design)
        assert score_response(GOUT, before + response + after, config) == score_response(GOUT, response, config)


AROUND = st.sampled_from(
    [
        GOOD,
        GOOD + " Done.",
        GOOD.replace("</dx>", ""),
        concluding("So it is option C: gout. \\boxed{C}"),
        concluding("\\boxed{C} \\boxed{C}"),
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.permutations("ABCD"), st.sampled_from("ABCD"), AROUND)
def test_permuted_letters_change_nothing(letters: list[str], chosen: str, response: str) -> None:
    """The option texts get other letters; the answer and the response's box move with their texts."""
    moved = dict(zip("ABCD", letters, strict=True))
    permuted = replace(
        GOUT, options={moved[letter]: text for letter, text in sorted(GOUT.options.items())}, answer=moved["C"]
    )
    before = score_response(GOUT, response.replace("{C}", f"{{{chosen}}}"), Reward())
    after = score_response(permuted, response.replace("{C}", f"{{{moved[chosen]}}}"), Reward())
    assert replace(after, answer_found=before.answer_found, why={}) == replace(before, why={})
    assert after.answer_found == (None if before.answer_found is None else moved[chosen])
    assert after.why["cross_reference"] == before.why["cross_reference"]
