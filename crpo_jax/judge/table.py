"""What a person reads of an evaluation on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from crpo_jax.answer.truth import EXACT
from crpo_jax.config import Config
from crpo_jax.judge.measures import MEASURES

SHARES = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "valid": "valid answers",
    "format": "clinical format",
    "cross_reference": "cites its analysis",
    "consistency": "on-language",
}
SUBJECTS_SHOWN = 12


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def interval(value: Mapping[str, float] | None, digits: int = 3) -> str:
    return (
        "-" if value is None else f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    )


def of_summary(summary: Mapping[str, Any], settings: Config) -> str:
    """Every data set's measures with their 95% intervals, then accuracy by subject."""
    sets: Mapping[str, Mapping[str, Any]] = summary["data"]
    rows = [["", *sets]]
    rows.append(["questions x samples", *(f"{one['questions']} x {one['samples']}" for one in sets.values())])
    if any(one.get("dropped") for one in sets.values()):
        rows.append(["left out, prompt too long", *(str(one.get("dropped", 0)) for one in sets.values())])
    rows += [[label, *(interval(one.get(name)) for one in sets.values())] for name, label in SHARES.items()]
    rows.append(["reward", *(interval(one.get("reward"), 2) for one in sets.values())])
    rows.append(["length, mean / median / p95", *(length(one["length"]) for one in sets.values())])
    truncated = [one["length"]["truncated"] for one in sets.values()]
    rows.append(["truncated", *("-" if share is None else f"{share:.3f}" for share in truncated)])
    if any("exact" in one for one in sets.values()):
        rows += [
            [name.replace("_", " "), *(interval(one.get("exact", {}).get(name), 2) for one in sets.values())]
            for name in EXACT
        ]
    parts = [aligned(rows), *(judged(name, one) for name, one in sets.items() if one.get("judges"))]
    for name, one in sets.items():
        for column, subjects in one["subjects"].items():
            shown = list(subjects.items())[:SUBJECTS_SHOWN]
            more = [[f"and {len(subjects) - len(shown)} more in summary.json"]] if len(subjects) > len(shown) else []
            lines = [[f"{name} by {column}", "questions", "accuracy"]]
            lines += [[value, str(subject["questions"]), interval(subject["accuracy"])] for value, subject in shown]
            parts.append(aligned(lines + more))
    where = "in the part that its format gives it" if settings.evaluate.answer == "tagged" else "wherever it stands"
    parts.append(
        "[low, high]: 95%, over questions. An answer is the letter in the only box, "
        f"{where}; vote: most frequent letter, ties to the one given first, no readable answer no vote."
    )
    return "\n\n".join(parts)


def judged(name: str, one: Mapping[str, Any]) -> str:
    """A data set's eight measures by each judge, with what could not be read, and how far the judges agree."""
    rows = [[f"{name}, instances per response", *one["judges"]]]
    for measure, what in MEASURES.items():
        cells = []
        for told in one["judges"].values():
            cell, value = "no count" if told[measure]["mean"] is None else interval(told[measure], 2), told[measure]
            lost = [f"{value[kind]} {kind}" for kind in ("unparsed", "missing") if value[kind]]
            cells.append(cell + (f" ({', '.join(lost)})" if lost else ""))
        rows.append([what.label + ("" if what.more_is_better else " (less is better)"), *cells])
    parts = [aligned(rows)]
    compared = {"two judges": one.get("agreement", {})}
    compared |= {f"{judge} and the truth": told for judge, told in one.get("judges_and_truth", {}).items()}
    for title, told in compared.items():
        if told:
            lines = [[title, "both", "equal", "within one", "difference", "Spearman"]]
            keys = ("equal", "within_one", "difference", "spearman")
            lines += [
                [MEASURES[m].label, str(v["both"]), *("-" if v[key] is None else f"{v[key]:.2f}" for key in keys)]
                for m, v in told.items()
            ]
            parts.append(aligned(lines))
    return "\n\n".join(parts)


def length(one: Mapping[str, Any]) -> str:
    return f"{one['mean']:.0f} / {one['median']:.0f} / {one['p95']:.0f} {one['unit']}"
