"""Whether a conclusion cross-references its analysis: the rule the paper leaves open, decided by words alone.

It holds when all five parts hold, each of them with its numbers in the settings:
1. enough distinct terms stand in conclusion and dx alike, some of them in System 2; words of the options do not count;
2. a case fact is cited whole: terms side by side that are no mere name of a measurement, or a number with its unit, in
   question, dx and conclusion alike;
3. the cited terms are a fair share of the conclusion's terms, so that unrelated prose with a few hits is no citation;
4. the conclusion does not repeat itself;
5. it is no copy: few of its word n-grams stand verbatim in dx. A conclusion shorter than an n-gram is one n-gram.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crpo_jax.config import CrossReference
from crpo_jax.data.question import Question
from crpo_jax.reward import terms
from crpo_jax.reward.terms import Terms

MAX_CHARS = 100_000  # of dx and conclusion together; beyond any response length, and it keeps the worst case quick

# Names of measurements that most cases have, as pairs of terms. Without its value such a name is no finding: "blood
# pressure" stands in four of ten MedQA questions, and a policy could cite it in every conclusion.
MEASUREMENTS = frozenset(
    tuple(terms.read(name).all())
    for name in (
        *(
            "blood pressure",
            "respiratory rate",
            "heart rate",
            "oxygen saturation",
            "pulse oximetry",
            "body mass",
            "mass index",
            "chest x-ray",
        ),
        *(
            "leukocyte count",
            "platelet count",
            "blood count",
            "complete blood",
            "blood cell",
            "red blood",
            "white blood",
            "cell count",
        ),
        *(
            "corpuscular volume",
            "mean corpuscular",
            "hemoglobin concentration",
            "urea nitrogen",
            "blood urea",
            "ct scan",
            "family history",
        ),
        *(
            "serum creatinine",
            "alkaline phosphatase",
            "lung auscultation",
            "room air",
            "mental status",
            "bowel sounds",
            "breath sounds",
        ),
    )
)


@dataclass(frozen=True, slots=True)
class Case:
    """What a question gives to cite, and what its options put out of bounds."""

    neighbours: frozenset[tuple[str, str, bool]]
    quantities: frozenset[str]
    option_terms: frozenset[str]


def case(question: Question) -> Case:
    return read_case(question.question, tuple(question.options.values()))


@lru_cache(maxsize=4096)
def read_case(text: str, options: tuple[str, ...]) -> Case:
    found, excluded = terms.read(text), frozenset(term for option in options for term in terms.read(option).all())
    neighbours = frozenset(
        item
        for item in found.neighbours()
        if item[0] != item[1] and not excluded.intersection(item[:2]) and item[:2] not in MEASUREMENTS
    )
    quantities = frozenset(term for term in found.all() if terms.has_unit(term) and term not in excluded)
    return Case(neighbours, quantities, excluded)


def case_facts(case: Case, system1: Terms, system2: Terms, conclusion: Terms) -> list[str]:
    """The case facts that the conclusion cites whole, each as long as it goes, in the conclusion's order.

    Words stand side by side in the conclusion as they do in the question: "tophi on the ear" is not cited by the word
    list "tophi ear", but by "tophi of the ear". In dx either will do.
    """
    facts: list[list[str]] = []
    dx = system1.passed_over() + system2.passed_over()
    open_ended = False  # the last fact may go on with the next pair
    for item in conclusion.neighbours():
        first, second, _ = item
        if item not in case.neighbours or f"\n{first}\n{second}\n" not in dx:
            open_ended = False
            continue
        if open_ended and facts[-1][-1] == first:
            facts[-1].append(second)
        else:
            facts.append([first, second])
        open_ended = True
    whole = {term for fact in facts for term in fact}
    dx_terms = {*system1.by_token, *system2.by_token}
    numbers = [
        term
        for term in dict.fromkeys(conclusion.by_token)
        if term in case.quantities and term in dx_terms and term not in whole
    ]
    return list(dict.fromkeys([*(" ".join(fact) for fact in facts), *numbers]))


def copied_share(conclusion: list[str], dx: list[str], n: int) -> float:
    """The share of the conclusion's word n-grams that stand verbatim in dx."""
    n = min(n, len(conclusion))
    if n == 0:
        return 0.0
    grams = list(zip(*(conclusion[start:] for start in range(n)), strict=False))
    known = set(zip(*(dx[start:] for start in range(n)), strict=False))
    return sum(gram in known for gram in grams) / len(grams)


def cross_reference(
    question: Question, system1: str, system2: str, conclusion: str, settings: CrossReference
) -> tuple[bool, Mapping[str, Any]]:
    """Whether `conclusion` (its box cut out) cites dx = `system1` + `system2`, and every part of that decision."""
    if len(system1) + len(system2) + len(conclusion) > MAX_CHARS:
        return False, {"failed": [f"dx and conclusion are longer than {MAX_CHARS} characters together: not read"]}
    first, second, cites = terms.read(system1), terms.read(system2), terms.read(conclusion)
    facts_of = case(question)
    every, in_system2 = cites.all(), set(second.by_token)
    distinct = set(every)
    cited = (distinct & in_system2.union(first.by_token)) - facts_of.option_terms
    cited_in_system2 = cited & in_system2
    facts = case_facts(facts_of, first, second, cites)
    cited_share = len(cited) / len(distinct) if distinct else 0.0
    distinct_share = len(distinct) / len(every) if every else 0.0
    copied = copied_share(cites.words, first.words + second.words, settings.copy_ngram)

    s = settings
    failed = [
        reason
        for wrong, reason in (
            (len(cited) < s.min_terms, f"{len(cited)} cited terms, {s.min_terms} needed"),
            (
                len(cited_in_system2) < s.min_system2_terms,
                f"{len(cited_in_system2)} cited terms from System 2, {s.min_system2_terms} needed",
            ),
            (len(facts) < s.min_case_facts, f"{len(facts)} whole case facts, {s.min_case_facts} needed"),
            (
                cited_share < s.min_cited_share,
                f"cited terms are {cited_share:.2f} of the conclusion's, {s.min_cited_share:.2f} needed",
            ),
            (
                distinct_share < s.min_distinct_share,
                f"distinct terms are {distinct_share:.2f} of all, {s.min_distinct_share:.2f} needed",
            ),
            (
                copied > s.max_copied_share,
                f"{copied:.2f} of the word {s.copy_ngram}-grams are copied from dx, {s.max_copied_share:.2f} allowed",
            ),
        )
        if wrong
    ]
    why = {
        "cited": sorted(cited),
        "cited_from_system2": sorted(cited_in_system2),
        "case_facts": facts,
        "cited_share": round(cited_share, 4),
        "distinct_share": round(distinct_share, 4),
        "repeats": len(every) - len(distinct),
        "copied_share": round(copied, 4),
        "failed": failed,
    }
    return not failed, why
