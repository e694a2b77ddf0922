"""The arithmetic world: answers that are right, no leak between splits, a teacher as imperfect as it says."""

import hashlib
import json
import re
from collections import Counter
from fractions import Fraction

import pytest

from crpo_jax.config import find_config, load_config
from crpo_jax.data.arithmetic import LARGEST, PROBLEM_SPLITS, TeacherMistakes, problems, split_of, teacher_response
from crpo_jax.data.prompts import encode_response, fit_prompts
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError

COUNT = 3000
WHOLE = re.compile(r"<think>\n(?P<think>.+)\n</think>\n<answer>\n\\boxed\{(?P<answer>\d+)\}\n</answer>", re.DOTALL)
CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
NUMBER = re.compile(r"\d+")


@pytest.fixture(scope="module")
def questions():
    return {split: problems(split, COUNT) for split in PROBLEM_SPLITS}


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def solve(text):
    """The answer of a problem's text, read sentence by sentence, with none of the generator's tables."""
    *sentences, _ = re.split(r"(?<=[.?]) ", text)
    first = list(map(int, NUMBER.findall(sentences[0])))
    total = Fraction(first[0])
    if "more than" in sentences[0]:
        total -= first[1]
    elif "fewer than" in sentences[0]:
        total += first[1]
    for sentence in sentences[1:]:
        numbers = list(map(int, NUMBER.findall(sentence)))
        if "alf of them" in sentence:
            total /= 2
        elif len(numbers) == 2:
            total += numbers[0] * numbers[1]
        elif "takes" in sentence or "loses" in sentence or re.fullmatch(r"\w+ gives \d+ to \w+\.", sentence):
            total -= numbers[0]
        else:
            total += numbers[0]
    return total


def calculations_are_right(text):
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    return all(
        operations[sign](int(left), int(right)) == int(result)
        for left, sign, right, result in CALCULATION.findall(text)
    )


def test_every_answer_is_that_of_the_text(questions):
    for question in (question for split in PROBLEM_SPLITS for question in questions[split]):
        assert solve(question.question) == int(question.answer), question.question
        assert (question.kind, dict(question.options), question.source) == ("number", {}, "arithmetic")
        assert 0 < int(question.answer) <= LARGEST
        person, things = question.columns["person"], question.columns["things"]
        assert question.question.endswith(f" How many {things} does {person} have now?")


def test_answers_cannot_be_guessed(questions):
    counts = Counter(question.answer for question in questions["test"])
    assert len(counts) == LARGEST
    assert counts.most_common(1)[0][1] < 0.07 * COUNT


def test_splits_share_no_events_and_no_text(questions):
    for key in (lambda q: json.dumps(q.columns["events"]), lambda q: q.question):
        train, validation, test = ({key(question) for question in questions[split]} for split in PROBLEM_SPLITS)
        assert not train & test
        assert not train & validation
        assert not validation & test
    for split in PROBLEM_SPLITS:
        assert len({question.question for question in questions[split]}) == COUNT
        assert {split_of(question.columns["events"]) for question in questions[split]} == {split}
        assert [question.id for question in questions[split][:2]] == [f"{split}-000000", f"{split}-000001"]


def test_the_same_on_every_machine_and_a_larger_count_only_adds(questions):
    assert problems("train", 100) == questions["train"][:100]
    assert problems("train", 100, seed=1) != questions["train"][:100]
    rows = [(q.id, q.question, q.answer, q.columns, teacher_response(q, 3)) for q in questions["test"][:200]]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == "7837359d40d1a8db5b7439d00099b15ee2408568c7db5278d9755e6dd5015489"
    assert len({teacher_response(questions["train"][0], seed) for seed in range(40)}) > 3


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("dev", 5, "arithmetic: split: expected one of train, validation, test, got 'dev'"),
        ("test", 0, "arithmetic: count: expected a whole number of at least 1, got 0"),
        ("test", True, "arithmetic: count: expected a whole number of at least 1, got True"),
    ],
)
def test_bad_split_or_count_is_an_input_error(split, count, message):
    with pytest.raises(InputError, match=re.escape(message)):
        problems(split, count)


def test_a_teacher_without_mistakes_is_right_in_every_step(questions):
    for question in questions["validation"][:500]:
        response = teacher_response(question, 7, TeacherMistakes(0, 0, 0, 0))
        assert (match := WHOLE.fullmatch(response)), response
        assert match["answer"] == question.answer
        assert match["think"].endswith(f" {question.answer}.")
        assert calculations_are_right(response)


def test_the_teacher_errs_as_often_as_it_says(questions):
    mistakes, train = TeacherMistakes(), questions["train"]
    traces = [(question, teacher_response(question, 0)) for question in train]

    def misread(kind, **only):
        teacher = TeacherMistakes(**({"comparison": 0, "packs": 0, "slip": 0, "missing_part": 0} | only))
        concerned = [q for q in train if any(name in kind for name, *_ in q.columns["events"])]
        return share(f"\\boxed{{{q.answer}}}" not in teacher_response(q, 0, teacher) for q in concerned)

    accuracy = share(f"<answer>\n\\boxed{{{q.answer}}}\n</answer>" in text for q, text in traces)
    whole = share(WHOLE.fullmatch(text) is not None for _, text in traces)
    slips = [calculations_are_right(match[0]) for _, text in traces for match in CALCULATION.finditer(text)]
    slipped = 1 - share(slips)
    comparison, packs = (
        misread(("more", "fewer"), comparison=mistakes.comparison),
        misread("packs", packs=mistakes.packs),
    )
    print(f"right {accuracy:.3f}, whole {whole:.3f}, misread {comparison:.3f}, {packs:.3f}, slips {slipped:.3f}")
    assert 0.40 <= accuracy <= 0.60
    assert abs(whole - (1 - mistakes.missing_part)) < 0.02
    # less often than drawn: what would lead to less than nothing is left out, and 2 + 2 is 2 * 2
    assert mistakes.comparison - 0.10 < comparison < mistakes.comparison
    assert mistakes.packs - 0.10 < packs < mistakes.packs
    assert abs(slipped - mistakes.slip) < 0.01


def test_digits_are_single_tokens_and_everything_fits():
    settings = load_config(find_config("arithmetic"))
    tokenizer = load_tokenizer(find_config("arithmetic").parent / "arithmetic_tokenizer")
    questions = problems("train", 500)
    fitting = fit_prompts(questions, settings.data, tokenizer)
    responses = [encode_response(teacher_response(question, 0), tokenizer) for question in questions]
    assert not fitting.dropped
    longest = [max(map(len, rows)) for rows in (fitting.prompts, responses)]
    print(f"longest prompt and response: {longest} tokens")
    assert longest[1] <= settings.rollout.max_new_tokens * 0.8
    assert sum(longest) <= settings.sft.max_tokens
    text = "Then 36 - 7 = 29."
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == [
        *("Then", " 3", "6", " -", " 7", " =", " 2", "9", "."),
    ]
    words = {word for question in questions for word in re.findall(r" [A-Za-z]+", question.question)}
    assert {len(tokenizer.encode(word)) for word in words} == {1}
