"""The parts of a reward, each with its points and the reasons that `why` gives, for a person to read."""

import json
import math
from collections.abc import Mapping
from typing import Any

from crpo_jax.config import Reward

BUILT_IN = {
    "crpo": ("accuracy", "format", "cross_reference", "consistency"),
    "grpo": ("accuracy", "format"),
    "released": ("accuracy", "format", "summary", "consistency"),
}
EXPLAINED = ("answer", "format", "cross_reference", "consistency", "summary", "weights")
"""What parts of `why` have a sentence of their own; all others are shown as they are."""

SAME: dict[str, str] = {"citation": "cross_reference"}
"""Components by the names that the parts of a score have."""

MAX_REASON = 2000  # characters of one reason


def reward_parts(row: Mapping[str, Any], design: str, settings: Reward) -> list[dict[str, Any]]:
    """Name, value, points in the total and reasons of every part; points are None for a part that earns nothing, and
    for all of them where they do not add up to the total."""
    why = reasons_of(row)
    weights = why.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    points = {} if weights else built_in_points(row, why, design, settings)
    if points and not math.isclose(sum(points.values()), number(row.get("total")) or 0.0, abs_tol=1e-3):
        points = {}
    parts = {
        name: part(name, row.get(name), points.get(name), reasons)
        for name, reasons in built_in_reasons(why).items()
        if number(row.get(name)) is not None
    }
    if "summary" in points:
        parts["summary"] = part("summary", float(bool(why.get("summary"))), points["summary"], [])
    components = row.get("components")
    for name, value in components.items() if isinstance(components, Mapping) and weights else ():
        same = SAME.get(str(name), str(name))
        own = parts.setdefault(same, part(same, value, None, []))
        weight, value = number(weights.get(name)), number(value)
        if value is None or weight is None:
            own["why"].append("without a number: not part of the total")
        else:
            own["points"] = number(value * weight)
            own["why"].append(f"{value:g} × weight {weight:g}")
    for name, value in why.items():
        if name not in EXPLAINED:
            parts.setdefault(name, part(name, None, None, []))["why"].append(as_text(value)[:MAX_REASON])
    return list(parts.values())


def reasons_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `why` of a row; empty where it has none."""
    why = row.get("why")
    return why if isinstance(why, Mapping) else {}


def part(name: str, value: Any, points: float | None, reasons: list[str]) -> dict[str, Any]:
    reasons = [reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} …" for reason in reasons]
    return {"name": name, "value": number(value), "points": number(points), "why": reasons}


def built_in_points(row: Mapping[str, Any], why: Mapping[str, Any], design: str, settings: Reward) -> dict[str, float]:
    """What each part of a built-in design adds to the total."""
    of_one = {
        "accuracy": settings.k,
        "format": settings.format,
        "cross_reference": settings.citation,
        "summary": settings.citation,
        "consistency": settings.consistency,
    }
    values = {name: number(row.get(name)) or 0.0 for name in of_one} | {"summary": float(bool(why.get("summary")))}
    return {name: of_one[name] * values[name] for name in BUILT_IN.get(design, ())}


def built_in_reasons(why: Mapping[str, Any]) -> dict[str, list[str]]:
    """Why the parts of a built-in design are what they are."""
    problems, share = why.get("format"), why.get("consistency")
    reasons = {"accuracy": [as_text(why["answer"])] if why.get("answer") else []}
    reasons["format"] = [as_text(problem) for problem in problems] if isinstance(problems, list) else []
    reasons["format"] = reasons["format"] or ["kept"]
    reasons["cross_reference"] = citation_reasons(why.get("cross_reference"))
    reasons["consistency"] = []
    if isinstance(share, Mapping) and {"effective", "of", "by"} <= share.keys():
        count = f"{share['effective']} of {share['of']} {share['by']}"
        reasons["consistency"] = [f"{count} are in scripts of English prose"]
    return reasons


def citation_reasons(citation: Any) -> list[str]:
    if not isinstance(citation, Mapping):
        return ["not read, since the format is not right"]
    failed = citation.get("failed")
    reasons = [as_text(reason) for reason in failed] if isinstance(failed, list) else []
    lists = (citation.get("case_facts"), citation.get("cited"))
    facts, cited = (len(each) if isinstance(each, list) else 0 for each in lists)
    if facts or cited:
        reasons.append(f"marked in the texts: {facts} whole case facts, {cited} cited terms")
    return reasons


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def number(value: Any) -> float | None:
    """The value as a finite number with the digits that a page shows; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), 5)
