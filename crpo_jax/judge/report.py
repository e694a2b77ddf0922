"""The paper's Table 1 and figures 1, 3, 4, 5 and 6 over evaluated models: report/index.html in one file, PNGs, and a terminal's table.

A row of the table is a method; evaluated with several seeds, its cells are means over seeds with their standard deviation.
"""

import base64
import html
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_jax.answer.records import Answer, read_answers
from crpo_jax.answer.truth import EXACT
from crpo_jax.config import Reward
from crpo_jax.errors import InputError
from crpo_jax.judge.measures import MEASURES
from crpo_jax.judge.table import aligned
from crpo_jax.reward import rules, terms
from crpo_jax.reward.rules import Score
from crpo_jax.store.files import read_rows

CASES = 3  # questions shown side by side
SMOOTHED = 5  # steps of training metrics averaged into one point


@dataclass(frozen=True)
class Row:
    """A method: for every seed its summary.json, its training metrics where there are any, and its responses by data set."""

    name: str
    summaries: Sequence[Mapping[str, Any]]
    metrics: Sequence[Sequence[Mapping[str, Any]]]
    responses: Sequence[Mapping[str, Path]]


@dataclass(frozen=True)
class Column:
    """A column of the table: how its value is found in a data set's summary, and how it is shown."""

    head: str
    value: Callable[[Mapping[str, Any]], Mapping[str, float] | None]
    digits: int = 2
    scale: float = 1.0
    more_is_better: bool | None = True  # None: neither


def rows_of(specifications: Sequence[str]) -> list[Row]:
    """The rows of NAME=FOLDER, in the order given; a name given again adds a seed.

    A folder is an evaluation's, or that of a run which holds it as `evaluation`.
    """
    found: dict[str, list[Path]] = {}
    for text in specifications:
        name, equals, path = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--report {text}: expected NAME=FOLDER")
        folder = Path(path)
        folder = folder if (folder / "summary.json").is_file() else folder / "evaluation"
        if not (folder / "summary.json").is_file():
            raise InputError(
                f"--report {text}: expected the workdir of a finished evaluation, got no summary.json in it"
            )
        found.setdefault(name.strip(), []).append(folder)
    return [row_of(name, folders) for name, folders in found.items()]


def row_of(name: str, folders: Sequence[Path]) -> Row:
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    logs = [
        next((path for path in (folder / "metrics.jsonl", folder.parent / "metrics.jsonl") if path.is_file()), None)
        for folder in folders
    ]
    metrics = [list(read_rows(log)) if log else [] for log in logs]
    responses = [{path.stem: path for path in sorted((folder / "responses").glob("*.jsonl"))} for folder in folders]
    return Row(name, summaries, metrics, responses)


def data_sets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for summary in row.summaries for name in summary["data"]))


# ---- the table ----------------------------------------------------------------------------------------------------------


def columns(rows: Sequence[Row], data: str) -> list[Column]:
    """The paper's columns where a judge has counted, the exact ones where the world knows them, then what counting gives."""
    sets = [summary["data"][data] for row in rows for summary in row.summaries if data in summary["data"]]
    judges = list(dict.fromkeys(judge for one in sets for judge in one.get("judges", {})))
    found = []
    for judge in judges:
        for measure, what in MEASURES.items():
            head = what.label if len(judges) == 1 else f"{what.label} ({judge})"
            head += "" if what.more_is_better else "↓"
            found.append(
                Column(
                    head,
                    lambda one, j=judge, m=measure: given(one.get("judges", {}).get(j, {}).get(m)),
                    2,
                    1,
                    what.more_is_better,
                )
            )
    if any("exact" in one for one in sets):
        for name in EXACT:
            worse = name in ("findings_invented", "false_claims")
            head = name.replace("_", " ") + ("↓" if worse else "")
            found.append(Column(head, lambda one, n=name: given(one.get("exact", {}).get(n)), 2, 1, not worse))
    shares = {
        "accuracy": "accuracy %",
        "majority": "vote %",
        "valid": "valid %",
        "format": "format %",
        "cross_reference": "cites %",
    }
    found += [Column(head, lambda one, n=name: given(one.get(n)), 1, 100) for name, head in shares.items()]
    found.append(Column("length", lambda one: {"mean": one["length"]["mean"]}, 0, 1, None))
    return found


def given(value: Mapping[str, float] | None) -> Mapping[str, float] | None:
    return value if value and value.get("mean") is not None else None


def values(row: Row, data: str, column: Column) -> list[float]:
    """The column's value for every seed that has one, in the column's unit."""
    found = [column.value(summary["data"][data]) for summary in row.summaries if data in summary["data"]]
    return [column.scale * one["mean"] for one in found if one is not None]


def cell(row: Row, data: str, column: Column) -> str:
    numbers = values(row, data, column)
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.{column.digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{column.digits}f}{spread}"


def best(rows: Sequence[Row], data: str, column: Column) -> set[str]:
    """The rows whose shown value is the best of the column; none where all are equal."""
    means = {
        row.name: round(statistics.fmean(values(row, data, column)), column.digits)
        for row in rows
        if values(row, data, column)
    }
    if column.more_is_better is None or len(set(means.values())) < 2:
        return set()
    top = (max if column.more_is_better else min)(means.values())
    return {name for name, value in means.items() if value == top}


def printed(rows: Sequence[Row]) -> str:
    """Table 1 for a terminal, a block per data set, a method per column so that it stays narrow; a star marks the best."""
    parts = []
    for data in data_sets(rows):
        lines = [[data, *(row.name for row in rows)]]
        for column in columns(rows, data):
            top = best(rows, data, column)
            lines.append(
                [column.head, *(cell(row, data, column) + (" *" if row.name in top else "  ") for row in rows)]
            )
        parts.append(aligned(lines))
    seeds = max(len(row.summaries) for row in rows)
    note = f"*: best. ±: standard deviation over up to {seeds} seeds." if seeds > 1 else "*: best."
    return "\n\n".join([*parts, note])


# ---- figures ------------------------------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Draws every figure there is data for into `folder`; its file by its caption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    colours = {row.name: plt.get_cmap("tab10")(number % 10) for number, row in enumerate(rows)}
    drawn = {
        "Accuracy and majority vote by method (figures 3 and 4)": ("accuracy.png", accuracy_bars(plt, rows, colours))
    }
    for data in data_sets(rows):
        measured = [column for column in columns(rows, data) if "%" not in column.head and column.head != "length"]
        if measured:
            caption = f"Reasoning by method, instances per response: {data} (figure 1)"
            drawn[caption] = (f"reasoning_{data}.png", small_bars(plt, rows, colours, data, measured))
    if any(any(log) for row in rows for log in row.metrics):
        caption = "Response length and every part of the reward against the step (figure 5). Lines: training batches, scored by the run's own design; "
        caption += "dots: held-out questions, all scored by the crpo design."
        drawn[caption] = ("training.png", training_curves(plt, rows, colours))
    for file, figure in drawn.values():
        figure.savefig(folder / file, dpi=130)
        plt.close(figure)
    return {caption: file for caption, (file, _) in drawn.items()}


def bars(axis: Any, rows: Sequence[Row], colours: Mapping[str, Any], data: str, column: Column) -> None:
    """A bar per method with its whisker: the range over seeds, or the 95% interval of a single one."""
    for place, row in enumerate(rows):
        numbers = values(row, data, column)
        if not numbers:
            continue
        mean, (low, high) = statistics.fmean(numbers), (min(numbers), max(numbers))
        if len(numbers) == 1:
            one = next(
                found
                for summary in row.summaries
                if data in summary["data"] and (found := column.value(summary["data"][data]))
            )
            low, high = (column.scale * one.get(end, one["mean"]) for end in ("low", "high"))
        axis.bar(place, mean, color=colours[row.name], width=0.75, label=row.name)
        axis.errorbar(
            place, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], color="black", capsize=2, linewidth=0.9
        )
        axis.annotate(
            f"{mean:.{column.digits}f}",
            (place, max(high, mean)),
            ha="center",
            va="bottom",
            fontsize=7.5,
            xytext=(0, 2),
            textcoords="offset points",
        )
    axis.set_xticks([])
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.12)
    axis.set_ylim(0, max(axis.get_ylim()[1], 0.1))


def accuracy_bars(plt: Any, rows: Sequence[Row], colours: Mapping[str, Any]) -> Any:
    sets = data_sets(rows)
    figure, axes = plt.subplots(len(sets), 2, figsize=(8, 2.6 * len(sets) + 0.6), squeeze=False, layout="constrained")
    for line, data in zip(axes, sets, strict=True):
        for axis, head in zip(line, ("accuracy %", "vote %"), strict=True):
            bars(axis, rows, colours, data, next(column for column in columns(rows, data) if column.head == head))
            axis.set(title=f"{data}: {head.replace(' %', '').replace('vote', 'majority vote')}", ylabel="%")
    legend(figure, axes[0, 0])
    return figure


def small_bars(plt: Any, rows: Sequence[Row], colours: Mapping[str, Any], data: str, measured: Sequence[Column]) -> Any:
    lines = -(-len(measured) // 4)
    figure, axes = plt.subplots(lines, 4, figsize=(10, 2.3 * lines + 0.6), squeeze=False, layout="constrained")
    for axis, column in zip(axes.flat, measured, strict=False):
        bars(axis, rows, colours, data, column)
        axis.set_title(column.head, fontsize=9)
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_visible(False)
    legend(figure, axes[0, 0])
    return figure


def legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)


def training_curves(plt: Any, rows: Sequence[Row], colours: Mapping[str, Any]) -> Any:
    """A panel per quantity, a line per method: the mean over seeds, its band their range."""
    logged = {name for row in rows for log in row.metrics for step in log for name in step}
    names = [
        "response/length",
        "reward/mean",
        "reward/accuracy",
        "reward/format",
        "reward/cross_reference",
        "reward/consistency",
    ]
    names = [
        name
        for name in [*names, *sorted(name for name in logged if name.startswith("reward/component/"))]
        if name in logged
    ]
    lines = -(-len(names) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(10, 2.6 * lines + 0.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        held_out = f"eval/{name.split('/', 1)[1]}"
        for row in rows:
            for steps, of in together([smooth(points(log, name)) for log in row.metrics]):
                axis.plot(
                    steps, list(map(statistics.fmean, of)), color=colours[row.name], label=row.name, linewidth=1.3
                )
                axis.fill_between(
                    steps, list(map(min, of)), list(map(max, of)), color=colours[row.name], alpha=0.15, linewidth=0
                )
            for steps, of in together([points(log, held_out) for log in row.metrics]):
                axis.plot(steps, list(map(statistics.fmean, of)), "o", color=colours[row.name], markersize=4)
        axis.set(title=name, xlabel="RL step", ylabel="tokens" if name == "response/length" else "")
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    legend(figure, axes[0, 0])
    return figure


def points(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(step["step"], step[name]) for step in log if step.get(name) is not None]


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each point the mean of the last SMOOTHED."""
    return [
        (step, statistics.fmean(value for _, value in curve[max(0, n - SMOOTHED + 1) : n + 1]))
        for n, (step, _) in enumerate(curve)
    ]


def together(curves: Sequence[Sequence[tuple[int, float]]]) -> Iterator[tuple[list[int], list[list[float]]]]:
    """The steps that all seeds' curves have, with their values; nothing where there is no curve."""
    found = [dict(curve) for curve in curves if curve]
    if found:
        steps = sorted(set.intersection(*map(set, found)))
        yield steps, [[curve[step] for curve in found] for step in steps]


# ---- case studies -------------------------------------------------------------------------------------------------------


def cases(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Answer, Score]]]]:
    """Questions on which the last method and the one before it differ most, each with one response of either (figure 6)."""
    if len(rows) < 2:
        return []
    pair, found = rows[-2:], []
    for data in data_sets(rows):
        files = [row.responses[0].get(data) for row in pair]
        if None in files:
            continue
        firsts = [{one.question.id: one for one in read_answers(file) if one.sample == 0} for file in files if file]
        for identity in firsts[0].keys() & firsts[1].keys():
            told = [(row.name, first[identity]) for row, first in zip(pair, firsts, strict=True)]
            scored = [(name, one, rules.crpo(one.question, one.response, Reward(), None, None)) for name, one in told]
            found.append(
                (scored[1][2].total - scored[0][2].total, scored[1][2].cross_reference, data, identity, scored)
            )
    found.sort(key=lambda case: (-case[0], -case[1], case[2], case[3]))
    return [(data, scored) for _, _, data, _, scored in found[:CASES]]


def marked(text: str, cited: set[str]) -> str:
    """HTML of a response: everything escaped, words whose term is cited marked."""
    out, at = [], 0
    for match in terms.TOKEN.finditer(lowered(text)):
        if terms.term(match[0]) in cited:
            out += [
                html.escape(text[at : match.start()]),
                "<mark>",
                html.escape(text[match.start() : match.end()]),
                "</mark>",
            ]
            at = match.end()
    return "".join([*out, html.escape(text[at:])])


def lowered(text: str) -> str:
    """Lower-cased character by character, as `terms.read` has it, but never longer or shorter than the text."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text).replace(
        "\u03bc", "\u00b5"
    )


def case_html(data: str, told: Sequence[tuple[str, Answer, Score]]) -> str:
    question = told[0][1].question
    options = "".join(
        f"<li>{html.escape(letter)}) {html.escape(text)}</li>" for letter, text in question.options.items()
    )
    sides = []
    for name, answer, score in told:
        why = score.why.get("cross_reference") or {}
        verdict = f"answer {html.escape(str(score.answer_found))}, {'right' if score.accuracy else 'wrong'}; reward {score.total:.2f}; "
        verdict += "the conclusion cites its analysis" if score.cross_reference else "no citation"
        reasons = [*score.why["format"], *why.get("failed", [])]
        verdict += f": {html.escape('; '.join(reasons))}" if reasons else ""
        body = marked(answer.response, set(why.get("cited", ())))
        sides.append(f"<div><h4>{html.escape(name)}</h4><p class=verdict>{verdict}</p><pre>{body}</pre></div>")
    asked = f"<p>{html.escape(question.question)}</p><ul>{options}</ul><p>Right: {html.escape(question.answer)}</p>"
    return f"<section><h3>{html.escape(data)}: {html.escape(question.id)}</h3>{asked}<div class=sides>{''.join(sides)}</div></section>"


# ---- the page -----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #1b1f24; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0 1.5em; } .wide { overflow-x: auto; }
th, td { padding: .3em .6em; text-align: right; border-bottom: 1px solid #d9dee3; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; } td.best { font-weight: 700; }
img { max-width: 100%; } figure { margin: 1.5em 0; } figcaption { color: #57606a; font-size: 13px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: .8em; font-size: 13px; }
mark { background: #ffe58a; } ul { list-style: none; padding-left: 1em; } .verdict { color: #57606a; font-size: 13px; }
"""


def table_html(rows: Sequence[Row], data: str) -> str:
    shown = columns(rows, data)
    heads = "".join(f"<th>{html.escape(column.head)}</th>" for column in shown)
    lines = []
    for row in rows:
        cells = "".join(
            f"<td{' class=best' if row.name in best(rows, data, column) else ''}>{cell(row, data, column)}</td>"
            for column in shown
        )
        lines.append(f"<tr><td>{html.escape(row.name)}</td>{cells}</tr>")
    return f"<h3>{html.escape(data)}</h3><div class=wide><table><tr><th>method</th>{heads}</tr>{''.join(lines)}</table></div>"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to trust the numbers: sizes, intervals, judges, and what could not be read."""
    said = [
        "Bold: best of its column. ↓: less is better. Whiskers: range over seeds, or the 95% interval over questions of a single one."
    ]
    for data in data_sets(rows):
        sets = [
            (row.name, summary["data"][data]) for row in rows for summary in row.summaries if data in summary["data"]
        ]
        sizes = sorted({f"{one['questions']} questions x {one['samples']} samples" for _, one in sets})
        said.append(f"{data}: {', '.join(sizes)}.")
        dropped = sorted({f"{one['dropped']} ({name})" for name, one in sets if one.get("dropped")})
        said += (
            [f"{data}: questions left out because their prompt is too long: {', '.join(dropped)}."] if dropped else []
        )
        for judge in dict.fromkeys(judge for _, one in sets for judge in one.get("judges", {})):
            told = [one["judges"][judge] for _, one in sets if judge in one.get("judges", {})]
            numbers = {
                kind: sum(measure[kind] for one in told for measure in one.values())
                for kind in ("judged", "unparsed", "missing")
            }
            said.append(
                f"{data}: judge {judge}: {numbers['judged']} counts, {numbers['unparsed']} replies unparsed, {numbers['missing']} missing."
            )
        for title, key in (("two judges", "agreement"), ("judge and truth", "judges_and_truth")):
            pairs = [
                pair
                for _, one in sets
                for pair in (one.get(key, {}).values() if key == "agreement" else joined(one.get(key, {})))
            ]
            both = sum(pair["both"] for pair in pairs)
            if both:
                within = sum(pair["within_one"] * pair["both"] for pair in pairs if pair["both"]) / both
                equal = sum(pair["equal"] * pair["both"] for pair in pairs if pair["both"]) / both
                said.append(f"{data}: {title} agree on {equal:.0%} of {both} counts, within one on {within:.0%}.")
    return said


def joined(tables: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [pair for table in tables.values() for pair in table.values()]


def page(rows: Sequence[Row], drawn: Mapping[str, str], folder: Path) -> str:
    """The whole report as one HTML text; nothing in it is fetched, and text of models is text."""
    images = []
    for caption, file in drawn.items():
        data = base64.b64encode((folder / file).read_bytes()).decode()
        told = html.escape(caption)
        images.append(
            f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'
        )
    tables = "".join(table_html(rows, data) for data in data_sets(rows))
    studies = "".join(case_html(data, told) for data, told in cases(rows))
    listed = "".join(f"<p>{html.escape(note)}</p>" for note in notes(rows))
    studies = (
        f"<h2>Case studies (figure 6)</h2><p>Marked: terms that the conclusion cites from its analysis.</p>{studies}"
        if studies
        else ""
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>CRPO: evaluation</title><style>{STYLE}</style></head><body><h1>Evaluation</h1>"
        f"<h2>Accuracy and reasoning by method (Table 1)</h2>{tables}{listed}<h2>Figures</h2>{''.join(images)}{studies}</body></html>\n"
    )


def write(specifications: Sequence[str], folder: Path) -> str:
    """Makes report/ of NAME=FOLDER rows in `folder`; the terminal's table, and where the page lies."""
    rows = rows_of(specifications)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text(
            page(rows, figures(rows, folder), folder), encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise InputError(f"{folder}: cannot write: {error.strerror}") from None
    return f"{printed(rows)}\n\nreport  {folder / 'index.html'}"
