"""What counting says of a data set's responses: accuracy, votes, formats, lengths, each with its interval; no jax.

A share of responses has a 95% interval over questions: Wilson's, with as many independent answers as the variance
between questions implies (at least one per question, at most one per response). So several samples of one question
narrow it only as far as they differ, and a share of 0 or 1 still has a width.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from crpo_jax.answer.attempts import majority_at_k, majority_vote, pass_at_k, vote_of
from crpo_jax.answer.measures import Measures, measure_answers
from crpo_jax.answer.records import Answer, question_digest
from crpo_jax.answer.truth import EXACT_MEASURES, count_exactly, has_truth
from crpo_jax.config import Config
from crpo_jax.data.question import Question
from crpo_jax.reward.answer import PatternTimeout, find_answer, is_right
from crpo_jax.reward.design import built_in_part, design_of_evaluations
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.parse import parse_response
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer

Z = 1.959964  # of a 95% interval
FORMATS = (("dx", "conclusion"), ("think", "answer"))


def extract_answer(answer: Answer, settings: Config) -> str | None:
    """A response's answer, which must stand where evaluate.answer asks; None where there is no readable one.

    A letter in a box needs a section of its own, unless it may stand anywhere. Other answers, and what reward.answer_in
    says of other places, do not, but must be in such a section where there is one.
    """
    question, reward = answer.question, settings.reward
    formats = (*FORMATS, reward.tags) if len(reward.tags) == 2 else FORMATS
    try:
        for tags in dict.fromkeys(formats if settings.evaluate.answer == "tagged" else ()):
            parsed = parse_response(answer.response, tags, systems=False)
            if parsed.conclusion is not None:
                return find_answer(answer.response, question, reward, parsed, tags[1])[0]
        if settings.evaluate.answer == "tagged" and question.kind == "choice" and reward.answer_in == "box":
            return None
        return find_answer(answer.response, question, reward)[0]
    except PatternTimeout:
        return None


def estimate_share(by_question: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval of numbers in [0, 1], grouped by question; every question weighs the same."""
    means = np.array([np.mean(values) for values in by_question])
    questions, responses = len(by_question), sum(map(len, by_question))
    mean = float(means.mean())
    variance = float(means.var(ddof=1)) / questions if questions > 1 else 0.0
    n = questions
    if 0 < mean < 1:
        n = responses if variance == 0 else min(max(mean * (1 - mean) / variance, questions), responses)
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    # Rounding may put an end of the interval on the wrong side of a mean of 0 or 1.
    return {"mean": mean, "low": min(mean, max(0.0, middle - half)), "high": max(mean, min(1.0, middle + half))}


def estimate_count(by_question: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval of counts, by the normal approximation over questions."""
    means = np.array([np.mean(values) for values in by_question])
    half = Z * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    mean = float(means.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def group_by_question(answers: Sequence[Answer]) -> list[list[int]]:
    """The indices of each question's responses, samples in order."""
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        groups.setdefault(answer.question.id, []).append(index)
    return [sorted(group, key=lambda index: answers[index].sample) for group in groups.values()]


def score_answers(
    answers: Sequence[Answer], design: str, settings: Config, effective: np.ndarray | None
) -> tuple[list[Scored], str]:
    """Scores under a design; and whether consistency is by tokens or characters."""
    by_tokens = effective is not None and all(answer.token_ids is not None for answer in answers)
    ids = [answer.token_ids or [] for answer in answers] if by_tokens else None
    reward = replace(settings.reward, design=design, max_failed_share=1.0)
    with Scorer(reward, effective if by_tokens else None) as scorer:
        scores = scorer.score([answer.question for answer in answers], [answer.response for answer in answers], ids)
    return scores, "tokens" if by_tokens else "characters"


def summarize(
    answers: Sequence[Answer],
    settings: Config,
    effective: np.ndarray | None = None,
    measures: Measures | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A data set's entry in summary.json, and each question's own means, by which models are compared; plain values."""
    groups = group_by_question(answers)
    questions = [answers[group[0]].question for group in groups]
    design = design_of_evaluations(settings.reward, questions)
    built_in = built_in_part(design)  # a judge or a function is asked by runs alone
    scores, consistency_by = score_answers(answers, built_in or "consistency", settings, effective)
    scored = {index: score for index, score in enumerate(scores) if isinstance(score, Score)}

    def reward_part(name: str) -> list[list[float]]:
        values = {index: getattr(score, name) for index, score in scored.items()}
        return [[float(value) for index in group if (value := values.get(index)) is not None] for group in groups]

    shares, right = answer_shares(answers, groups, settings)
    rewards = reward_part("total") if built_in == design else []
    parts = {name: reward_part(name) for name in ("format", "cross_reference", "consistency")}
    parts = {name: values for name, values in parts.items() if any(values)}
    exact: dict[str, list[list[float]]] = {}
    if all(has_truth(answers[group[0]].question) for group in groups):
        counts = [count_exactly(answer.question, answer.response) for answer in answers]
        exact = {name: [[float(counts[i][name]) for i in group] for group in groups] for name in EXACT_MEASURES}
    measured = measure_answers(measures or {}, answers)
    own = {name: measure_values(results, name, groups) for name, results in measured.items()}

    fewest = min(map(len, groups))
    summary: dict[str, Any] = {
        "questions": len(groups),
        "kinds": dict(Counter(question.kind for question in questions)),
        "samples": max(map(len, groups)),
        "responses": len(answers),
        **{name: estimate_share(list(filter(None, values))) for name, values in shares.items()},
        "unscored": len(answers) - len(scored),
        **{name: estimate_share(list(filter(None, values))) for name, values in parts.items()},
    }
    if left_out := [k for k in settings.evaluate.k if k > fewest]:
        summary["k_left_out"] = {"k": left_out, "samples": fewest}
    if scored:
        summary |= {"consistency_by": consistency_by, "design": design}
    if any(rewards):
        summary["reward"] = estimate_count(list(filter(None, rewards)))
    summary["length"] = summarize_lengths(answers)
    summary["subjects"] = summarize_subjects(answers, groups, right, settings)
    if exact:
        summary["exact"] = {name: estimate_count(values) for name, values in exact.items()}
    if own:
        summary["measures"] = {name: summarize_measure(measured[name], values) for name, values in own.items()}
    tables = {"exact": exact, "measures": own}
    totals = {"reward": rewards} if rewards else {}
    return summary, question_rows(questions, {**shares, **parts, **totals}, tables)


def answer_shares(
    answers: Sequence[Answer], groups: Sequence[Sequence[int]], settings: Config
) -> tuple[dict[str, list[list[float]]], list[bool]]:
    """By name the shares that follow from the answers, a list per question, which is empty where the question has no
    right answer; and whether each response is right. Nothing where no question has a right answer."""
    found = [extract_answer(answer, settings) for answer in answers]
    pairs = list(zip(answers, found, strict=True))
    right = [is_right(answer.question, text, settings.reward) for answer, text in pairs]
    votes = [vote_of(answer.question, text, settings.reward) for answer, text in pairs]
    judged = [list(group) if answers[group[0]].question.kind != "none" else [] for group in groups]
    if not any(judged):
        return {}, right
    shares: dict[str, list[list[float]]] = {
        "accuracy": [[float(right[index]) for index in group] for group in judged],
        "valid": [[float(found[index] is not None) for index in group] for group in judged],
        "majority": [
            [float(majority_vote([votes[i] for i in group]) == answers[group[0]].question.answer)] if group else []
            for group in judged
        ],
    }
    for k in sorted({k for k in settings.evaluate.k if k <= min(map(len, groups))}):
        shares[f"pass@{k}"] = [
            [pass_at_k(sum(right[i] for i in group), len(group), k)] * (len(group) // k) for group in judged
        ]
        shares[f"majority@{k}"] = [
            [majority_at_k([votes[i] for i in group], answers[group[0]].question.answer, k)] * (len(group) // k)
            if group
            else []
            for group in judged
        ]
    return shares, right


def measure_values(results: Sequence[Scored], name: str, groups: Sequence[Sequence[int]]) -> list[list[float]]:
    """A measure's values by question, without responses that it failed on or does not apply to."""
    values = [result.components[name] if isinstance(result, Score) else None for result in results]
    return [[value for index in group if (value := values[index]) is not None] for group in groups]


def summarize_measure(results: Sequence[Scored], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A measure's mean and interval over questions, and of how many responses it is or failed."""
    measured = [group for group in values if group]
    estimate = estimate_count(measured) if measured else {"mean": None, "low": None, "high": None}
    failures = [result for result in results if isinstance(result, Failure)]
    first = {"first_error": failures[0].error} if failures else {}
    return estimate | {"measured": sum(map(len, measured)), "failed": len(failures)} | first


def question_rows(
    questions: Sequence[Question],
    values: Mapping[str, Sequence[Sequence[float]]],
    tables: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> list[dict[str, Any]]:
    """A line per question with its mean of every measure, those of `tables` apart; without what it has no value of."""

    def means(table: Mapping[str, Sequence[Sequence[float]]], place: int) -> dict[str, float]:
        return {name: statistics.fmean(groups[place]) for name, groups in table.items() if groups[place]}

    rows = []
    for place, question in enumerate(questions):
        row = {"id": question.id, "digest": question_digest(question)} | means(values, place)
        rows.append(row | {name: means(table, place) for name, table in tables.items() if table})
    return rows


def summarize_lengths(answers: Sequence[Answer]) -> dict[str, Any]:
    """Lengths in tokens if the file has them, else in words; and the share of truncated responses."""
    sizes, unit = [answer.tokens for answer in answers if answer.tokens is not None], "tokens"
    if len(sizes) < len(answers):
        sizes, unit = [len(answer.response.split()) for answer in answers], "words"
    truncated = [not answer.stopped for answer in answers if answer.stopped is not None]
    return {
        "unit": unit,
        "mean": statistics.fmean(sizes),
        "median": statistics.median(sizes),
        "p95": float(np.quantile(sizes, 0.95)),
        "truncated": statistics.fmean(truncated) if truncated else None,
    }


def summarize_subjects(
    answers: Sequence[Answer], groups: Sequence[Sequence[int]], right: Sequence[bool], settings: Config
) -> dict[str, Any]:
    """Accuracy by each column of evaluate.subjects that the questions have, the largest subjects first."""
    tables: dict[str, Any] = {}
    for column in settings.evaluate.subjects:
        subjects: dict[str, list[list[float]]] = {}
        for group in groups:
            subject = answers[group[0]].question.columns.get(column)
            if subject is not None and answers[group[0]].question.kind != "none":
                subjects.setdefault(str(subject), []).append([float(right[index]) for index in group])
        if subjects:
            ranked = sorted(subjects.items(), key=lambda item: (-len(item[1]), item[0]))
            tables[column] = {
                subject: {"questions": len(rows), "accuracy": estimate_share(rows)} for subject, rows in ranked
            }
    return tables
