"""The embedded world: short clinical vignettes whose truth is known, and a teacher that is wrong on purpose. No jax.

A vignette lists some findings of one condition among neutral facts and asks for the diagnosis among conditions that are
easily confused with it. The combination of findings decides the split, so a held-out vignette is never a reworded
training one. All draws come from `random.Random` with string seeds: the same on every machine and Python.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from random import Random

from crpo_jax.data.conditions import CONDITIONS, DISTRACTORS, FINDINGS
from crpo_jax.data.question import LETTERS, Question
from crpo_jax.errors import InputError

VIGNETTE_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TeacherNoise:
    """How often the teacher errs, each kind of error drawn independently; RL can learn what the teacher does not teach.

    Every rate is a share of responses, except `invalid_rejection`, a share of rejected options.
    """

    systematic: float = 0.6  # of the conditions in MISTAKEN: argues throughout for the neighbour
    random_wrong: float = 0.08  # of the others: argues throughout for any wrong option
    missing_part: float = 0.22  # lacks one of MISSING_PARTS
    cites: float = 0.24  # the conclusion names two whole findings
    cites_a_word: float = 0.20  # the conclusion names one word of a finding
    cites_twice: float = 0.03  # the conclusion names one finding two times; all other conclusions name none
    drift: float = 0.12  # one clause is in another script
    invalid_rejection: float = 0.25  # an option is rejected for lacking a finding that belongs to another condition


TEACHER_NOISE = TeacherNoise()

# The conditions that the teacher systematically mistakes, a third of all, each for a neighbour in its own cluster.
MISTAKEN: Mapping[str, str] = {
    "pseudogout": "gout",
    "septic arthritis": "pseudogout",
    "Hashimoto thyroiditis": "Graves disease",
    "cholecystitis": "pancreatitis",
    "pericarditis": "myocardial infarction",
    "aortic dissection": "myocardial infarction",
    "ALS": "myasthenia gravis",
    "beta thalassemia": "iron deficiency",
}

MISSING_PARTS = ("system 1", "system 2", "conclusion tags", "dx end", "clean end", "box")

CLUSTER_ONLY_SHARE = 0.6  # of the option sets; the others have one option from another cluster

_QUESTIONS = (
    "A {person} has {facts}. {ask}",
    "A {person} presents with {facts}. {ask}",
    "Seen today is a {person} with {facts}. {ask}",
    "A {person} has {first}. Also noted: {rest}. {ask}",
    "A {person} comes with {first}. The record adds {rest}. {ask}",
)
_ASK = "What is the most likely diagnosis?"

_IMPRESSIONS = ("A {person}, so {thought}.", "Looking at a {person}, {thought}.", "For a {person}, {thought}.")
_THOUGHTS = ("{finding} may mean {x} or {y}", "{finding} brings up {x} or {y}", "given {finding}, think of {x} or {y}")
# What each finding speaks for, in a sentence of its own, finding first: so a small model can learn them one by one.
_EVIDENCE = "{finding} can mean {x}"
# Every option, with its letter and in order: small models fail to choose which options to test, or to look up a letter.
_REJECTION = "{x} would need {finding}"
_VERDICT = "{x} fits best"
# A single template: a small model taught three of them names one finding twice as often as two findings.
_CITING = "Both {a} and {b} point to {x}."
# Few words besides the finding, so that saying it twice reads as the repetition it is.
_CITING_TWICE = ("Both {a} and {a} point to {x}.", "With {a} and {a}, it is {x}.", "So {a} and {a} mean {x}.")
_CITING_A_WORD = ("The {word} makes {x} most likely.", "Because of the {word}, it is {x}.", "So {x}, given the {word}.")
_CITING_NONE = ("The best answer is {x}.", "So {x} is most likely.", "This must be {x}.", "The diagnosis here is {x}.")
_AFTERWORDS = ("I hope this helps.", "Please see a doctor.", "Let me know.")
DRIFT = ("вероятно да", "это возможно", "可能如此", "需要检查")


@cache
def _combinations(split: str) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """By condition, the combinations of its findings that belong to a split: ranked by a hash, 8, 1 and 1 tenths."""
    of_split = {}
    for name, findings in FINDINGS.items():
        sets = [chosen for size in (2, 3, 4) for chosen in combinations(findings, size)]
        sets.sort(key=lambda chosen: hashlib.sha256("|".join((name, *sorted(chosen))).encode()).digest())
        tenth = len(sets) // 10
        bounds = {"train": (0, -2 * tenth), "validation": (-2 * tenth, -tenth), "test": (-tenth, None)}
        of_split[name] = tuple(sets[slice(*bounds[split])])
    return of_split


def _enumerate_facts(facts: Sequence[str]) -> str:
    return facts[0] if len(facts) == 1 else ", ".join(facts[:-1]) + " and " + facts[-1]


def _person(sex: str, age: int) -> str:
    return f"{sex} aged {age}"


@cache
def _mates_and_strangers(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The other conditions of a condition's cluster, and those of all other clusters."""
    home = CONDITIONS[name].cluster
    mates = tuple(other for other, condition in CONDITIONS.items() if condition.cluster == home and other != name)
    return mates, tuple(other for other, condition in CONDITIONS.items() if condition.cluster != home)


def _draw_options(rng: Random, name: str) -> list[str]:
    mates, strangers = _mates_and_strangers(name)
    wrong = list(mates) if rng.random() < CLUSTER_ONLY_SHARE else [*rng.sample(mates, 2), rng.choice(strangers)]
    options = [name, *wrong]
    rng.shuffle(options)
    return options


def vignettes(split: str, count: int, seed: int = 0) -> list[Question]:
    """The first `count` vignettes of a split, no two alike in text and options; a larger count only adds at the end.

    `columns` holds the truth: condition, findings (in the order of the text), distractors, age, sex.
    """
    if split not in VIGNETTE_SPLITS:
        raise InputError(f"vignettes: split: expected one of {', '.join(VIGNETTE_SPLITS)}, got {split!r}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"vignettes: count: expected a whole number of at least 1, got {count!r}")
    rng, sets, names = Random(f"vignettes {split} {seed}"), _combinations(split), list(CONDITIONS)
    seen: set[tuple[str, ...]] = set()
    questions: list[Question] = []
    while len(questions) < count:
        name = rng.choice(names)
        condition = CONDITIONS[name]
        age = rng.randint(*condition.ages)
        sex = "woman" if rng.random() < condition.women else "man"
        findings = rng.choice(sets[name])
        distractors = rng.sample(DISTRACTORS, rng.randint(1, 2))
        facts = [*findings, *distractors]
        rng.shuffle(facts)
        cut = rng.randint(1, len(facts) - 1)
        text = rng.choice(_QUESTIONS).format(
            person=_person(sex, age),
            facts=_enumerate_facts(facts),
            first=_enumerate_facts(facts[:cut]),
            rest=_enumerate_facts(facts[cut:]),
            ask=_ASK,
        )
        options = _draw_options(rng, name)
        if (text, *options) in seen:
            continue
        seen.add((text, *options))
        questions.append(
            Question(
                id=f"{split}-{len(questions):06d}",
                question=text,
                options=dict(zip(LETTERS, options, strict=False)),
                answer=LETTERS[options.index(name)],
                source="vignettes",
                split=split,
                columns={
                    "condition": name,
                    "findings": [fact for fact in facts if fact in findings],
                    "distractors": [fact for fact in facts if fact in distractors],
                    "age": age,
                    "sex": sex,
                },
            )
        )
    return questions


def _draw_argued_condition(rng: Random, question: Question, noise: TeacherNoise) -> str:
    """The condition the teacher argues for; a mistaken one is replaced by its neighbour, or the next mate on offer."""
    truth = question.columns["condition"]
    offered = set(question.options.values()) - {truth}
    if truth in MISTAKEN:
        confusable = (MISTAKEN[truth], *_mates_and_strangers(truth)[0])
        return next(name for name in confusable if name in offered) if rng.random() < noise.systematic else truth
    return rng.choice(sorted(offered)) if rng.random() < noise.random_wrong else truth


def _draw_rejection(rng: Random, name: str, question: Question, noise: TeacherNoise) -> str:
    """An option rejected for lacking a finding: one of its own that is not in the case or, invalidly, another's."""
    owner = name
    if rng.random() < noise.invalid_rejection:
        owner = rng.choice([other for other in _mates_and_strangers(name)[0] if other != question.columns["condition"]])
    missing = rng.choice([finding for finding in FINDINGS[owner] if finding not in question.columns["findings"]])
    return _REJECTION.format(x=name, finding=missing)


def _draw_conclusion(rng: Random, argued: str, findings: Sequence[str], noise: TeacherNoise) -> str:
    draw, (a, b) = rng.random(), findings[:2]  # in the order of the text, which a small model can copy
    if draw < noise.cites:
        return _CITING.format(a=a, b=b, x=argued)
    draw -= noise.cites
    if draw < noise.cites_a_word:
        return rng.choice(_CITING_A_WORD).format(word=max(re.findall(r"[^\W\d_]+", a), key=len), x=argued)
    draw -= noise.cites_a_word
    if draw < noise.cites_twice:
        return rng.choice(_CITING_TWICE).format(a=a, x=argued)
    return rng.choice(_CITING_NONE).format(x=argued)


def teacher_response(question: Question, seed: int, noise: TeacherNoise = TEACHER_NOISE) -> str:
    """A templated trace of clinical reasoning with the errors of `noise`; the same for the same question and seed."""
    rng, truth = Random(f"teacher {seed} {question.id}"), question.columns
    findings, person = truth["findings"], _person(truth["sex"], truth["age"])
    argued = _draw_argued_condition(rng, question, noise)
    letter = next(letter for letter, name in question.options.items() if name == argued)
    others = [name for name in question.options.values() if name != argued]
    rng.shuffle(others)

    x, y = rng.sample([argued, others[0]], 2)
    thought = rng.choice(_THOUGHTS).format(finding=rng.choice(findings), x=x, y=y)
    clauses = [
        _VERDICT.format(x=name) if name == argued else _draw_rejection(rng, name, question, noise)
        for name in question.options.values()
    ]
    clauses.append(thought)
    if rng.random() < noise.drift:
        clauses[rng.randrange(len(clauses))] = rng.choice(DRIFT)
    evidence = [_EVIDENCE.format(finding=finding, x=argued) for finding in findings]
    system1 = "(System 1: Intuitive) " + rng.choice(_IMPRESSIONS).format(person=person, thought=clauses.pop())
    lines = [f"{option}) {clause}" for option, clause in zip(question.options, clauses, strict=True)]
    system2 = "(System 2: Analytical) " + "; ".join(evidence) + ".\n" + "\n".join(lines)
    conclusion, box = _draw_conclusion(rng, argued, findings, noise), f" \\boxed{{{letter}}}"

    missing = rng.choice(MISSING_PARTS) if rng.random() < noise.missing_part else ""
    lines = [
        "<dx>",
        *([system1] if missing != "system 1" else []),
        *([system2] if missing != "system 2" else []),
        *(["</dx>"] if missing != "dx end" else []),
        *(["<conclusion>"] if missing != "conclusion tags" else []),
        conclusion + (box if missing != "box" else ""),
        *(["</conclusion>"] if missing != "conclusion tags" else []),
        *([rng.choice(_AFTERWORDS)] if missing == "clean end" else []),
    ]
    return "\n".join(lines)


_FINDING_NAMES = tuple(finding for findings in FINDINGS.values() for finding in findings)


def _any_of(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){expression}(?!\w)")


_NAMED = {
    "x": f"(?P<x>{_any_of(sorted(CONDITIONS, key=len, reverse=True))})",
    "finding": f"(?P<finding>{_any_of(_FINDING_NAMES)})",
}
_REJECTION_PATTERN = _pattern(_REJECTION.format(**_NAMED))
_CLAIM_PATTERN = _pattern(_EVIDENCE.format(**_NAMED))
_FACT_PATTERN = _pattern(f"(?:{_any_of(sorted((*DISTRACTORS, *_FINDING_NAMES), key=len, reverse=True))})")


def rejections(response: str) -> list[tuple[str, str]]:
    """Every (condition, finding) of a response's sentences that reject a condition for lacking a finding.

    One is valid when the finding is in FINDINGS[condition] and not among the findings of the vignette.
    """
    return [(match["x"], match["finding"]) for match in _REJECTION_PATTERN.finditer(response)]


def claims(response: str) -> list[tuple[str, str]]:
    """Every (finding, condition) of a response's sentences on what a finding speaks for.

    A claim is true when the finding is in FINDINGS[condition].
    """
    return [(match["finding"], match["x"]) for match in _CLAIM_PATTERN.finditer(response)]


def facts_asserted(text: str) -> list[str]:
    """Every finding and distractor that a text names as a fact of the case; those that an option lacks are not."""
    return _FACT_PATTERN.findall(_REJECTION_PATTERN.sub(" ", text))
