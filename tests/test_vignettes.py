"""The embedded world: no leak between splits, a truth that is one, and a teacher as imperfect as it says."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from crpo_jax.data.vignettes import (
    CONDITIONS,
    DISTRACTORS,
    DRIFT,
    FINDINGS,
    MISTAKEN,
    VIGNETTE_SPLITS,
    TeacherNoise,
    rejections,
    teacher_response,
    vignettes,
)
from crpo_jax.errors import InputError

TRACES = 4000
FOUR_PARTS = re.compile(
    r"<dx>\n\(System 1: Intuitive\) (?P<system1>.+)\n\(System 2: Analytical\) (?P<system2>(?:.+\n)+)</dx>\n"
    r"<conclusion>\n(?P<conclusion>.+)\n</conclusion>"
)
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are at because best both by diagnosis for given here i in is it makes mean most no of on or so the "
        "this to with",
    )
)


@pytest.fixture(scope="module")
def questions():
    return {split: vignettes(split, TRACES) for split in VIGNETTE_SPLITS}


@pytest.fixture(scope="module")
def traces(questions):
    return [(question, teacher_response(question, 0)) for question in questions["train"]]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


def words(text):
    """Lower-cased words, a number and its unit being one."""
    return re.findall(r"\d[\d.]*(?:\s?[%°µ]?[a-z/]*(?<=[a-z%]))?|[^\W\d_][\w-]*", text.lower())


def whole_facts(text, fact):
    return bool(re.search(r"(?<!\w)" + re.escape(fact.lower()) + r"(?!\w)", text.lower()))


def cites(question, response):
    """The cross-reference rule of the `crpo` reward, read plainly: an independent check of what the teacher writes."""
    parts = FOUR_PARTS.fullmatch(response)
    if parts is None:
        return False
    conclusion = re.sub(r"\\boxed\{.*?\}", "", parts["conclusion"])
    system1, system2 = words(parts["system1"]), words(parts["system2"])
    terms = [word for word in words(conclusion) if word not in STOP_WORDS]
    option_words = {word for option in question.options.values() for word in words(option)}
    cited = (set(terms) & {*system1, *system2}) - option_words
    facts = [*question.columns["findings"], *question.columns["distractors"]]
    grams = [" ".join(words(conclusion)[i : i + 8]) for i in range(len(words(conclusion)) - 7)]
    copied = [gram in " ".join([*system1, *system2]) for gram in grams]
    return (
        len(cited) >= 3
        and bool(cited & set(system2))
        and any(
            whole_facts(conclusion, fact) and whole_facts(parts["system1"] + parts["system2"], fact) for fact in facts
        )
        and len(cited) >= len(set(terms)) / 3
        and len(set(terms)) >= 0.7 * len(terms)
        and sum(copied) <= 0.5 * len(copied)
    )


def test_world_has_six_clusters_of_four_with_findings_of_their_own():
    assert set(Counter(condition.cluster for condition in CONDITIONS.values()).values()) == {4}
    assert len(CONDITIONS) == 24
    findings = [finding for own in FINDINGS.values() for finding in own]
    assert len(findings) == 24 * 6 == len({finding.lower() for finding in findings})
    facts = [*findings, *DISTRACTORS]
    assert not [(a, b) for a in facts for b in facts if a != b and a.lower() in b.lower()]
    assert set(MISTAKEN) < set(CONDITIONS)
    assert len(MISTAKEN) == 8
    assert all(
        CONDITIONS[name].cluster == CONDITIONS[other].cluster and name != other for name, other in MISTAKEN.items()
    )


def test_findings_can_be_cited_whole_and_name_no_condition():
    name_words = {word for name in CONDITIONS for word in words(name)}
    for finding in (finding for own in FINDINGS.values() for finding in own):
        found = words(finding)
        assert not set(found) & (STOP_WORDS | name_words), finding
        assert len(found) >= 2, finding


def test_splits_share_no_combination_of_findings_and_no_text(questions):
    for key in (lambda q: (q.columns["condition"], *sorted(q.columns["findings"])), lambda q: q.question):
        seen = {split: {key(question) for question in questions[split]} for split in VIGNETTE_SPLITS}
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]
    # Of the 50 combinations of a condition 5 and 5 are held out: those all occur, and nearly all 40 for training.
    combinations = {
        split: {(q.columns["condition"], *sorted(q.columns["findings"])) for q in questions[split]}
        for split in VIGNETTE_SPLITS
    }
    assert len(combinations["validation"]) == len(combinations["test"]) == 24 * 5
    assert 24 * 38 < len(combinations["train"]) <= 24 * 40
    shown = {finding for question in questions["train"] for finding in question.columns["findings"]}
    assert shown == {finding for own in FINDINGS.values() for finding in own}


def test_vignettes_are_distinct_and_hold_the_answer_once(questions):
    for split in VIGNETTE_SPLITS:
        assert len({(question.question, *question.options.values()) for question in questions[split]}) == TRACES
        assert [question.id for question in questions[split][:2]] == [f"{split}-000000", f"{split}-000001"]
        for question in questions[split]:
            truth = question.columns
            assert list(question.options) == list("ABCD")
            assert list(question.options.values()).count(truth["condition"]) == 1 == len(set(question.options)) - 3
            assert question.options[question.answer] == truth["condition"]
            assert len(set(question.options.values())) == 4
            assert all(fact in question.question for fact in (*truth["findings"], *truth["distractors"]))
            assert set(truth["findings"]) <= set(FINDINGS[truth["condition"]])
            assert 2 <= len(truth["findings"]) <= 4
            assert 1 <= len(truth["distractors"]) <= 2
            assert f"{truth['sex']} aged {truth['age']}" in question.question
            low, high = CONDITIONS[truth["condition"]].ages
            assert low <= truth["age"] <= high


def test_letters_and_conditions_are_uniform(questions):
    for split in VIGNETTE_SPLITS:
        for values, kinds, limit in (
            ([question.answer for question in questions[split]], 4, 16.3),  # the chi-square bounds of p = 0.001
            ([question.columns["condition"] for question in questions[split]], 24, 49.7),
        ):
            expected = TRACES / kinds
            counts = Counter(values)
            assert len(counts) == kinds
            assert sum((count - expected) ** 2 / expected for count in counts.values()) < limit


def test_options_are_mostly_of_the_cluster(questions):
    mates = [
        sum(CONDITIONS[name].cluster == CONDITIONS[q.columns["condition"]].cluster for name in q.options.values()) - 1
        for q in questions["train"]
    ]
    assert set(mates) == {2, 3}
    assert 0.55 < share(count == 3 for count in mates) < 0.65


def test_the_same_everywhere_and_a_larger_count_only_adds(questions):
    assert vignettes("train", 300) == questions["train"][:300]
    assert vignettes("train", 300, seed=1) != questions["train"][:300]
    question = questions["train"][0]
    assert teacher_response(question, 0) == teacher_response(question, 0)
    assert len({teacher_response(question, seed) for seed in range(20)}) > 15
    # Python salts hash() per process: a world that leaned on it or on the order of a set would differ in the next one.
    code = (
        "from crpo_jax.data.vignettes import teacher_response, vignettes; qs = vignettes('test', 50); "
        "print([(q.id, q.question, sorted(q.options.items()), teacher_response(q, 3)) for q in qs])"
    )
    here = [(q.id, q.question, sorted(q.options.items()), teacher_response(q, 3)) for q in questions["test"][:50]]
    there = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert there.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("split", "count", "message"),
    [
        ("dev", 5, "split: expected one of train, validation, test, got 'dev'"),
        ("test", 0, "count: expected a whole number of at least 1, got 0"),
        ("test", 2.5, "count: expected a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_split_or_count_is_an_input_error(split, count, message):
    with pytest.raises(InputError, match=re.escape(message)):
        vignettes(split, count)


def test_teacher_errs_as_often_as_its_noise_says(traces):
    noise = TeacherNoise()
    boxed = [(q, match[1]) for q, text in traces if (match := re.search(r"\\boxed\{(\w)\}", text))]
    mistaken = share(q.answer != letter for q, letter in boxed if q.columns["condition"] in MISTAKEN)
    others = share(q.answer != letter for q, letter in boxed if q.columns["condition"] not in MISTAKEN)
    accuracy = share(q.answer == letter for q, letter in boxed)
    complete = share(FOUR_PARTS.fullmatch(text) is not None for _, text in traces)
    boxless = share("boxed" not in text for _, text in traces)
    drift = share(any(clause in text for clause in DRIFT) for _, text in traces)
    cited = share(cites(q, text) for q, text in traces if FOUR_PARTS.fullmatch(text))
    rejected = [(q, *pair) for q, text in traces for pair in rejections(text)]
    invalid = share(finding not in FINDINGS[name] or finding in q.columns["findings"] for q, name, finding in rejected)
    scored = share(
        (match := re.search(r"<conclusion>.*\\boxed\{(\w)\}", text, re.DOTALL)) is not None and match[1] == q.answer
        for q, text in traces
    )
    print(
        f"accuracy {accuracy:.3f} (as the reward reads it {scored:.3f}), "
        f"mistaken {mistaken:.3f}, others wrong {others:.3f}, complete {complete:.3f}, "
        f"boxless {boxless:.3f}, cites {cited:.3f} of the complete, drift {drift:.3f}, "
        f"invalid rejections {invalid:.3f} of {len(rejected)}"
    )
    assert 0.72 <= accuracy <= 0.78
    assert abs(mistaken - noise.systematic) < 0.04
    assert abs(others - noise.random_wrong) < 0.02
    assert abs(complete - (1 - noise.missing_part * 5 / 6)) < 0.03  # a missing box leaves the four parts
    assert abs(boxless - noise.missing_part / 6) < 0.015
    assert abs(drift - noise.drift) < 0.02
    assert abs(cited - noise.cites) < 0.03
    assert abs(invalid - noise.invalid_rejection) < 0.03
    assert len(rejected) > 2.7 * TRACES


def test_a_teacher_without_noise_is_right_whole_and_citing(questions):
    perfect = TeacherNoise(
        systematic=0,
        random_wrong=0,
        missing_part=0,
        cites=1,
        cites_a_word=0,
        cites_twice=0,
        drift=0,
        invalid_rejection=0,
    )
    for question in questions["validation"][:500]:
        text = teacher_response(question, 7, perfect)
        assert cites(question, text), text
        assert text.endswith(f"\\boxed{{{question.answer}}}\n</conclusion>")
        assert all(
            finding in FINDINGS[name] and finding not in question.columns["findings"]
            for name, finding in rejections(text)
        )
        assert len(rejections(text)) in (2, 3)


def test_the_teacher_argues_for_what_it_boxes(traces):
    for question, text in traces:
        parts = FOUR_PARTS.fullmatch(text)
        if parts is None or "boxed" not in text or any(clause in text for clause in DRIFT):
            continue
        argued = question.options[text.split("boxed{")[1][0]]
        assert argued in parts["system1"]
        assert argued in parts["conclusion"]
        assert re.search(rf"{argued} (fits best)", parts["system2"]), text
        assert argued not in {name for name, _ in rejections(text)}
