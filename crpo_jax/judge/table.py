"""An evaluation's results as text for a terminal."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from crpo_jax.answer.truth import EXACT_MEASURES
from crpo_jax.config import Config
from crpo_jax.judge.measures import MEASURES

SHARE_LABELS = {
    "accuracy": "accuracy",
    "majority": "majority vote",
    "valid": "valid answers",
    "format": "clinical format",
    "cross_reference": "cites its analysis",
    "consistency": "on-language",
}
MAX_SUBJECTS = 12


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def format_interval(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    if estimate is None:
        return "-"
    mean, low, high = (f"{estimate[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def format_summary(summary: Mapping[str, Any], settings: Config) -> str:
    """Every data set's statistics with their 95% intervals, the judges' measures, then accuracy by subject."""
    sets: Mapping[str, Mapping[str, Any]] = summary["data"]
    rows = [["", *sets]]

    def add_row(label: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        rows.append([label, *map(cell, sets.values())])

    add_row("questions x samples", lambda data: f"{data['questions']} x {data['samples']}")
    if any(data.get("dropped") for data in sets.values()):
        add_row("left out, prompt too long", lambda data: str(data.get("dropped", 0)))
    for name, label in share_labels(sets.values()).items():
        add_row(label, lambda data, name=name: format_interval(data.get(name)))
        if name == "majority":
            for at_k in [f"{kind}@{k}" for kind in ("pass", "majority") for k in settings.evaluate.k]:
                if any(at_k in data for data in sets.values()):
                    add_row(at_k, lambda data, at_k=at_k: format_interval(data.get(at_k)))
    if any("reward" in data for data in sets.values()):
        add_row("reward", lambda data: format_interval(data.get("reward"), 2))
    lengths = "{mean:.0f} / {median:.0f} / {p95:.0f} {unit}"
    add_row("length, mean / median / p95", lambda data: lengths.format(**data["length"]))
    add_row("truncated", lambda data: "-" if (share := data["length"]["truncated"]) is None else f"{share:.3f}")
    if any("exact" in data for data in sets.values()):
        for name in EXACT_MEASURES:
            add_row(name.replace("_", " "), lambda data, name=name: format_interval(data.get("exact", {}).get(name), 2))
    for name in dict.fromkeys(name for data in sets.values() for name in data.get("measures", {})):
        add_row(name, lambda data, name=name: format_measure(data.get("measures", {}).get(name)))
    tables = [format_columns(rows)]
    for name, data in sets.items():
        if data.get("judges"):
            tables += format_judges(name, data)
    for name, data in sets.items():
        tables += [format_subjects(f"{name} by {column}", subjects) for column, subjects in data["subjects"].items()]
    notes = ["[low, high]: 95%, over questions." + answers_note(sets.values(), settings)]
    for name, data in sets.items():
        design = data.get("design", "crpo")
        if "reward" not in data:
            notes.append(f"{name}: no reward, for reward.design={design} asks a judge or a function of your own.")
        elif design != "crpo":
            notes.append(f"{name}: format and reward are those of reward.design={design}.")
        if left_out := data.get("k_left_out"):
            numbers, samples = ", ".join(map(str, left_out["k"])), left_out["samples"]
            notes.append(f"{name}: no pass@k and majority@k for k={numbers}: a question has only {samples} samples.")
        for measure, estimate in data.get("measures", {}).items():
            if estimate["failed"]:
                notes.append(f"{name}: {measure} has no value of {estimate['failed']}: {estimate['first_error']}")
    return "\n\n".join([*tables, "\n".join(notes)])


def share_labels(sets: Collection[Mapping[str, Any]]) -> dict[str, str]:
    """The labels of the shares that a data set has."""
    clinical = all(data.get("design", "crpo") == "crpo" for data in sets)
    labels = SHARE_LABELS if clinical else SHARE_LABELS | {"format": "format"}
    return {name: label for name, label in labels.items() if any(name in data for data in sets)}


def answers_note(sets: Collection[Mapping[str, Any]], settings: Config) -> str:
    """What counts as an answer, of the kinds that are there; nothing where no question has a right one."""
    kinds = {kind for data in sets for kind in data.get("kinds", ("choice",))}
    if kinds <= {"none"}:
        return ""
    place, reward = "anywhere", settings.reward
    if settings.evaluate.answer == "tagged":
        place = "in the part its format reserves for it"
        place += "" if kinds <= {"choice", "none"} else ", where the response has one"
    what = "the letter" if kinds <= {"choice", "none"} else "what stands"
    where = {"box": "in the only box"}.get(reward.answer_in, f"in {reward.answer_in}")
    return (
        f" An answer is {what} {where}, {place}; "
        "vote: the most frequent answer, ties to the first; unreadable answers do not vote. "
        "pass@k: a right one among k samples; majority@k: their vote, ties at random."
    )


def format_subjects(title: str, subjects: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[title, "questions", "accuracy"]]
    for subject, data in list(subjects.items())[:MAX_SUBJECTS]:
        rows.append([subject, str(data["questions"]), format_interval(data["accuracy"])])
    if len(subjects) > MAX_SUBJECTS:
        rows.append([f"and {len(subjects) - MAX_SUBJECTS} more in summary.json"])
    return format_columns(rows)


def format_judges(name: str, data: Mapping[str, Any]) -> list[str]:
    """A data set's eight measures by each judge, with the replies that are missing, and how far the judges agree."""
    rows = [[f"{name}, instances per response", *data["judges"]]]
    for measure, description in MEASURES.items():
        label = description.label + ("" if description.more_is_better else " (less is better)")
        rows.append([label, *(format_verdict(verdicts[measure]) for verdicts in data["judges"].values())])
    tables = [format_columns(rows)]
    agreements = {"two judges": data.get("agreement", {})}
    agreements |= {f"{judge} and the truth": table for judge, table in data.get("judges_and_truth", {}).items()}
    keys = ("equal", "within_one", "difference", "spearman")
    for title, by_measure in agreements.items():
        if by_measure:
            rows = [[title, "both", "equal", "within one", "difference", "Spearman"]]
            for measure, values in by_measure.items():
                cells = ("-" if values[key] is None else f"{values[key]:.2f}" for key in keys)
                rows.append([MEASURES[measure].label, str(values["both"]), *cells])
            tables.append(format_columns(rows))
    return tables


def format_measure(estimate: Mapping[str, Any] | None) -> str:
    """A user's measure, with the responses that it failed on."""
    if estimate is None:
        return "-"
    cell = "no value" if estimate["mean"] is None else format_interval(estimate)
    return cell + (f" ({estimate['failed']} failed)" if estimate["failed"] else "")


def format_verdict(verdict: Mapping[str, Any]) -> str:
    cell = "no count" if verdict["mean"] is None else format_interval(verdict, 2)
    losses = [f"{verdict[kind]} {kind}" for kind in ("unparsed", "missing") if verdict[kind]]
    return cell + (f" ({', '.join(losses)})" if losses else "")
