"""What is true in a response to an embedded-world case: the faithfulness measures counted exactly, without a judge.

The world's sentences are templates, so a response's claims can be read off, and its table of findings says which are
true.
"""

from collections.abc import Mapping

from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import FINDINGS, claims, facts_asserted, rejections
from crpo_jax.reward.parse import parse_response

EXACT_MEASURES: Mapping[str, str] = {
    "true_claims": "distinct true statements of what a finding speaks for or a condition would need",
    "case_findings": "distinct findings of the case named as such",
    "valid_rejections": "wrong options rejected for lacking a finding of theirs that the case does not show",
    "findings_invented": "distinct findings named as the case's that it does not show",
    "false_claims": "distinct false statements of what a finding speaks for or a condition would need",
    "conclusion_findings": "distinct findings of the case named in the conclusion",
}
"""What each counts in a response."""

COUNTERPARTS: Mapping[str, str] = {
    "faithfulness": "true_claims",
    "cecd": "case_findings",
    "drc": "valid_rejections",
    "hallucination": "findings_invented",
}
"""The exact measure of what a judge estimates by its own."""


def has_truth(question: Question) -> bool:
    """Whether the question is of the embedded world, with the columns that hold its truth."""
    return {"condition", "findings", "distractors"} <= set(question.columns)


def count_exactly(question: Question, response: str) -> dict[str, int]:
    """EXACT_MEASURES of a response."""
    findings, condition = set(question.columns["findings"]), question.columns["condition"]
    claimed = {(name, finding) for finding, name in claims(response)}
    rejected = set(rejections(response))
    true = {(name, finding) for name, finding in claimed | rejected if finding in FINDINGS[name]}
    wrong_options = set(question.options.values()) - {condition}
    valid = {name for name, finding in rejected & true if name in wrong_options and finding not in findings}
    asserted = set(facts_asserted(response))
    return {
        "true_claims": len(true),
        "case_findings": len(asserted & findings),
        "valid_rejections": len(valid),
        "findings_invented": len(asserted - findings - set(question.columns["distractors"])),
        "false_claims": len((claimed | rejected) - true),
        "conclusion_findings": len(set(facts_asserted(parse_response(response).conclusion or "")) & findings),
    }
