"""Whether a conclusion cross-references its analysis: the rule the paper leaves open, decided by words alone.

It holds when all five parts hold, each of them with its numbers in the settings:
1. enough distinct terms stand in conclusion and dx alike, some of them in System 2; words of the options do not count;
2. a case fact is cited whole: terms side by side, or a number with its unit, in question, dx and conclusion alike;
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
from crpo_jax.reward.terms import BREAK, Terms

MAX_CHARS = 100_000  # of dx and conclusion together; beyond any response length, and it keeps the worst case quick


@dataclass(frozen=True, slots=True)
class Case:
    """What a question gives to cite, and what its options put out of bounds."""

    pairs: frozenset[tuple[str, str]]
    quantities: frozenset[str]
    option_terms: frozenset[str]


def case(question: Question) -> Case:
    return read_case(question.question, tuple(question.options.values()))


@lru_cache(maxsize=4096)
def read_case(text: str, options: tuple[str, ...]) -> Case:
    found, excluded = terms.read(text), frozenset().union(*(terms.read(option).distinct() for option in options))
    pairs = frozenset(pair for pair in found.pairs() if pair[0] != pair[1] and not excluded.intersection(pair) and BREAK not in pair)
    quantities = frozenset(term for term in found.distinct() if terms.has_unit(term) and term not in excluded)
    return Case(pairs, quantities, excluded)


def case_facts(case: Case, system1: Terms, system2: Terms, conclusion: Terms) -> list[str]:
    """The case facts that the conclusion cites whole, each as long as it goes, in the conclusion's order."""
    pairs = (case.pairs & conclusion.pairs()) & (system1.pairs() | system2.pairs())
    quantities = case.quantities.intersection(conclusion.sequence).intersection([*system1.sequence, *system2.sequence])
    facts, run = [], []
    for term, following in zip(conclusion.sequence, [*conclusion.sequence[1:], BREAK], strict=True):
        if (term, following) in pairs:
            run = run or [term]
            run.append(following)
            continue
        if run:
            facts.append(" ".join(run))
        elif term in quantities:
            facts.append(term)
        run = []
    return list(dict.fromkeys(facts))


def copied_share(conclusion: list[str], dx: list[str], n: int) -> float:
    """The share of the conclusion's word n-grams that stand verbatim in dx."""
    n = min(n, len(conclusion))
    if n == 0:
        return 0.0
    grams = list(zip(*(conclusion[start:] for start in range(n)), strict=False))
    known = set(zip(*(dx[start:] for start in range(n)), strict=False))
    return sum(gram in known for gram in grams) / len(grams)


def cross_reference(question: Question, system1: str, system2: str, conclusion: str, settings: CrossReference) -> tuple[bool, Mapping[str, Any]]:
    """Whether `conclusion` (its box cut out) cites dx = `system1` + `system2`, and every part of that decision."""
    if len(system1) + len(system2) + len(conclusion) > MAX_CHARS:
        return False, {"failed": [f"dx and conclusion are longer than {MAX_CHARS} characters together: not read"]}
    first, second, cites = terms.read(system1), terms.read(system2), terms.read(conclusion)
    facts_of = case(question)
    distinct, in_system2 = cites.distinct(), second.distinct()
    cited = (distinct & (first.distinct() | in_system2)) - facts_of.option_terms
    cited_in_system2 = cited & in_system2
    facts = case_facts(facts_of, first, second, cites)
    total = sum(term != BREAK for term in cites.sequence)
    cited_share = len(cited) / len(distinct) if distinct else 0.0
    distinct_share = len(distinct) / total if total else 0.0
    copied = copied_share(cites.words, first.words + second.words, settings.copy_ngram)

    s = settings
    failed = [
        reason
        for wrong, reason in (
            (len(cited) < s.min_terms, f"{len(cited)} cited terms, {s.min_terms} needed"),
            (len(cited_in_system2) < s.min_system2_terms, f"{len(cited_in_system2)} cited terms from System 2, {s.min_system2_terms} needed"),
            (len(facts) < s.min_case_facts, f"{len(facts)} whole case facts, {s.min_case_facts} needed"),
            (cited_share < s.min_cited_share, f"cited terms are {cited_share:.2f} of the conclusion's, {s.min_cited_share:.2f} needed"),
            (distinct_share < s.min_distinct_share, f"distinct terms are {distinct_share:.2f} of all, {s.min_distinct_share:.2f} needed"),
            (copied > s.max_copied_share, f"{copied:.2f} of the word {s.copy_ngram}-grams are copied from dx, {s.max_copied_share:.2f} allowed"),
        )
        if wrong
    ]
    why = {
        "cited": sorted(cited),
        "cited_from_system2": sorted(cited_in_system2),
        "case_facts": facts,
        "cited_share": round(cited_share, 4),
        "distinct_share": round(distinct_share, 4),
        "repeats": total - len(distinct),
        "copied_share": round(copied, 4),
        "failed": failed,
    }
    return not failed, why
