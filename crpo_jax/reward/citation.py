"""Whether a conclusion cross-references its analysis: the rule the paper leaves open, decided by words alone.

It holds when all five parts hold, each of them with its numbers in the settings:
1. enough distinct terms are in conclusion and dx alike, some of them in System 2; words of the options do not count;
2. a case fact is cited whole: adjacent terms that are not the mere name of a measurement, or a number with its unit, in
   question, dx and conclusion alike;
3. the cited terms are a fair share of the conclusion's terms, so that unrelated prose with a few hits is no citation;
4. the conclusion does not repeat itself;
5. it is no copy: few of its word n-grams are verbatim in dx. A conclusion shorter than an n-gram is one n-gram.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crpo_jax.config import CrossReference
from crpo_jax.data.question import Question
from crpo_jax.reward.terms import Terms, has_unit, read_terms

MAX_CHARS = 100_000  # of dx and conclusion together; beyond any response length, and it keeps the worst case quick

# Names of measurements that most cases have, as pairs of terms. Without its value such a name is no finding: "blood
# pressure" is in four of ten MedQA questions, and a policy could cite it in every conclusion.
_MEASUREMENT_NAMES = """
    blood pressure, respiratory rate, heart rate, oxygen saturation, pulse oximetry, body mass, mass index, chest x-ray,
    leukocyte count, platelet count, blood count, complete blood, blood cell, red blood, white blood, cell count,
    corpuscular volume, mean corpuscular, hemoglobin concentration, urea nitrogen, blood urea, ct scan, family history,
    serum creatinine, alkaline phosphatase, lung auscultation, room air, mental status, bowel sounds, breath sounds
"""
MEASUREMENTS = frozenset(tuple(read_terms(name).in_order()) for name in _MEASUREMENT_NAMES.split(","))


@dataclass(frozen=True, slots=True)
class Case:
    """What a question offers to cite, and the terms of its options, which do not count."""

    pairs: frozenset[tuple[str, str, bool]]
    quantities: frozenset[str]
    option_terms: frozenset[str]


@lru_cache(maxsize=4096)
def read_case(text: str, options: tuple[str, ...]) -> Case:
    terms = read_terms(text)
    option_terms = frozenset(term for option in options for term in read_terms(option).in_order())
    pairs = frozenset(
        pair
        for pair in terms.adjacent_pairs()
        if pair[0] != pair[1] and not option_terms.intersection(pair[:2]) and pair[:2] not in MEASUREMENTS
    )
    quantities = frozenset(term for term in terms.in_order() if has_unit(term) and term not in option_terms)
    return Case(pairs, quantities, option_terms)


def case_facts(case: Case, system1: Terms, system2: Terms, conclusion: Terms) -> list[str]:
    """The case facts that the conclusion cites whole, each at its full length, in the conclusion's order.

    Words are adjacent in the conclusion as they are in the question: "tophi on the ear" is not cited by the word list
    "tophi ear", but by "tophi of the ear". In dx either will do.
    """
    facts: list[list[str]] = []
    dx = system1.lines() + system2.lines()
    extends = False  # whether the next pair can extend the last fact
    for pair in conclusion.adjacent_pairs():
        first, second, _ = pair
        if pair not in case.pairs or f"\n{first}\n{second}\n" not in dx:
            extends = False
            continue
        if extends and facts[-1][-1] == first:
            facts[-1].append(second)
        else:
            facts.append([first, second])
        extends = True
    others_in_dx = {*system1.by_token, *system2.by_token} - {term for fact in facts for term in fact}
    numbers = [term for term in conclusion.by_token if term in case.quantities and term in others_in_dx]
    return list(dict.fromkeys([*(" ".join(fact) for fact in facts), *numbers]))


def copied_share(conclusion: list[str], dx: list[str], n: int) -> float:
    """The share of the conclusion's word n-grams that are verbatim in dx."""
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
    first, second, last = read_terms(system1), read_terms(system2), read_terms(conclusion)
    case = read_case(question.question, tuple(question.options.values()))
    terms, in_system2 = last.in_order(), set(second.by_token)
    distinct = set(terms)
    cited = (distinct & in_system2.union(first.by_token)) - case.option_terms
    cited_in_system2 = cited & in_system2
    facts = case_facts(case, first, second, last)
    cited_share = len(cited) / len(distinct) if distinct else 0.0
    distinct_share = len(distinct) / len(terms) if terms else 0.0
    copied = copied_share(last.words, first.words + second.words, settings.copy_ngram)

    s, failed = settings, []
    if len(cited) < s.min_terms:
        failed.append(f"{len(cited)} cited terms, {s.min_terms} needed")
    if len(cited_in_system2) < s.min_system2_terms:
        failed.append(f"{len(cited_in_system2)} cited terms from System 2, {s.min_system2_terms} needed")
    if len(facts) < s.min_case_facts:
        failed.append(f"{len(facts)} whole case facts, {s.min_case_facts} needed")
    if cited_share < s.min_cited_share:
        failed.append(f"cited terms are {cited_share:.2f} of the conclusion's, {s.min_cited_share:.2f} needed")
    if distinct_share < s.min_distinct_share:
        failed.append(f"distinct terms are {distinct_share:.2f} of all, {s.min_distinct_share:.2f} needed")
    if copied > s.max_copied_share:
        failed.append(
            f"{copied:.2f} of the word {s.copy_ngram}-grams are copied from dx, {s.max_copied_share:.2f} allowed"
        )
    why = {
        "cited": sorted(cited),
        "cited_from_system2": sorted(cited_in_system2),
        "case_facts": facts,
        "cited_share": round(cited_share, 4),
        "distinct_share": round(distinct_share, 4),
        "repeats": len(terms) - len(distinct),
        "copied_share": round(copied, 4),
        "failed": failed,
    }
    return not failed, why
