"""What is true in a response about an embedded-world case: the four faithfulness measures counted exactly, without a judge.

The world's sentences are templates, so what they claim can be read off, and its table of findings says what is true.
"""

from collections.abc import Mapping

from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import FINDINGS, claims, facts_asserted, rejections
from crpo_jax.reward.parse import parse_response

EXACT: Mapping[str, str] = {
    "true_claims": "distinct true statements of what a finding speaks for or a condition would need",
    "case_findings": "distinct findings of the case named as such",
    "valid_rejections": "wrong options rejected for lacking a finding of theirs that the case does not show",
    "findings_invented": "distinct findings named as the case's that it does not show",
    "false_claims": "distinct false statements of what a finding speaks for or a condition would need",
    "conclusion_findings": "distinct findings of the case named in the conclusion",
}
"""Every measure, a count per response. The first four stand for the judge's faithfulness, cecd, drc and hallucination."""

COUNTERPARTS: Mapping[str, str] = {
    "faithfulness": "true_claims",
    "cecd": "case_findings",
    "drc": "valid_rejections",
    "hallucination": "findings_invented",
}


def knows(question: Question) -> bool:
    """Whether the question is of the embedded world, its truth included."""
    return {"condition", "findings", "distractors"} <= set(question.columns)


def exact(question: Question, response: str) -> dict[str, int]:
    """The counts of EXACT for a response."""
    shown, truth = set(question.columns["findings"]), question.columns["condition"]
    facts = shown | set(question.columns["distractors"])
    said = {(condition, finding) for finding, condition in claims(response)}
    rejected = set(rejections(response))
    needed = {(condition, finding) for condition, finding in said | rejected if finding in FINDINGS[condition]}
    wrong = set(question.options.values()) - {truth}
    asserted = set(facts_asserted(response))
    return {
        "true_claims": len(needed),
        "case_findings": len(asserted & shown),
        "valid_rejections": len(
            {condition for condition, finding in rejected & needed if condition in wrong and finding not in shown}
        ),
        "findings_invented": len(asserted - facts),
        "false_claims": len((said | rejected) - needed),
        "conclusion_findings": len(set(facts_asserted(parse_response(response).conclusion or "")) & shown),
    }
