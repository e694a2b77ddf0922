"""The paper's Table 1 and figures 1, 3, 4, 5 and 6 over evaluated models: report/index.html, PNGs and a terminal table.

A method evaluated with several seeds has means over seeds with their standard deviation.
"""

import base64
import html
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crpo_jax.answer.records import Answer, read_answers
from crpo_jax.answer.truth import EXACT_MEASURES
from crpo_jax.config import Reward
from crpo_jax.disk import make_folder, replace_file
from crpo_jax.errors import InputError
from crpo_jax.judge.measures import MEASURES
from crpo_jax.judge.methods import Column, Method, data_set_names, find_best, read_methods
from crpo_jax.judge.table import format_columns
from crpo_jax.reward import terms
from crpo_jax.reward.rules import Score, score_response
from crpo_jax.store.files import writing

MAX_CASES = 3  # questions shown side by side
SMOOTHING = 5  # steps of training metrics averaged into one point


# ---- the table -------------------------------------------------------------------------------------------------------


def table_columns(methods: Sequence[Method], data: str) -> list[Column]:
    """The paper's columns if a judge has counted, the exact ones if the truth is known, then the other statistics."""
    results = [result for method in methods for result in method.results(data)]
    judges = list(dict.fromkeys(judge for result in results for judge in result.get("judges", {})))
    columns = []
    for judge in judges:
        for name, measure in MEASURES.items():
            label = measure.label if len(judges) == 1 else f"{measure.label} ({judge})"
            columns.append(Column(label, ("judges", judge, name), more_is_better=measure.more_is_better))
    if any("exact" in result for result in results):
        for name in EXACT_MEASURES:
            more_is_better = name not in ("findings_invented", "false_claims")
            columns.append(Column(name.replace("_", " "), ("exact", name), more_is_better=more_is_better))
    shares = {
        "accuracy": "accuracy %",
        "majority": "vote %",
        "valid": "valid %",
        "format": "format %",
        "cross_reference": "cites %",
    }
    columns += [Column(label, (name,), digits=1, scale=100) for name, label in shares.items()]
    units = sorted({result["length"]["unit"] for result in results})
    return columns + [Column(f"length, {unit}", ("length",), 0, more_is_better=None, unit=unit) for unit in units]


def format_cell(method: Method, data: str, column: Column) -> str:
    values = column.values(method, data)
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{column.digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{column.digits}f}{spread}"


def format_methods(methods: Sequence[Method]) -> str:
    """Table 1 for a terminal: a block per data set, narrow because each method is a column; a star marks the best."""
    blocks = []
    for data in data_set_names(methods):
        rows = [[data, *(method.name for method in methods)]]
        for column in table_columns(methods, data):
            best = find_best(methods, data, column)
            cells = (format_cell(method, data, column) + (" *" if method.name in best else "  ") for method in methods)
            rows.append([column.title, *cells])
        blocks.append(format_columns(rows))
    seeds = max(len(method.seeds) for method in methods)
    notes = ["*: best, or not to be told from it (95%, paired by question); none where no method can be told apart."]
    notes += [f"±: standard deviation over up to {seeds} seeds."] if seeds > 1 else []
    notes += [seed.note for method in methods for seed in method.seeds if seed.note]
    return "\n\n".join([*blocks, "\n".join(notes)])


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw_figures(methods: Sequence[Method], folder: Path) -> dict[str, str]:
    """Draws every figure that has data into `folder`; file names by caption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    colours = {method.name: plt.get_cmap("tab10")(number % 10) for number, method in enumerate(methods)}
    caption = "Accuracy and majority vote by method (figures 3 and 4)"
    figures = {caption: ("accuracy.png", draw_accuracy(plt, methods, colours))}
    for data in data_set_names(methods):
        columns = [column for column in table_columns(methods, data) if column.keys[0] in ("judges", "exact")]
        if columns:
            caption = f"Reasoning by method, instances per response: {data} (figure 1)"
            figures[caption] = (f"reasoning_{data}.png", draw_reasoning(plt, methods, colours, data, columns))
    if any(seed.metrics for method in methods for seed in method.seeds):
        caption = (
            "Response length and every part of the reward against the step (figure 5). Lines: training batches, scored "
            "by the run's own design; dots: held-out questions, all scored by the crpo design."
        )
        figures[caption] = ("training.png", draw_training(plt, methods, colours))
    for file, figure in figures.values():
        figure.savefig(folder / file, dpi=130)
        plt.close(figure)
    return {caption: file for caption, (file, _) in figures.items()}


def draw_bars(axis: Any, methods: Sequence[Method], colours: Mapping[str, Any], data: str, column: Column) -> None:
    """A bar per method with its whisker: the range over seeds, or the 95% interval of a single one."""
    for place, method in enumerate(methods):
        values = column.values(method, data)
        if not values:
            continue
        mean, low, high = statistics.fmean(values), min(values), max(values)
        if len(values) == 1:
            estimate = next(filter(None, map(column.estimate, method.results(data))))
            low, high = (column.scale * estimate.get(end, estimate["mean"]) for end in ("low", "high"))
        axis.bar(place, mean, color=colours[method.name], width=0.75, label=method.name)
        whisker = [[max(mean - low, 0)], [max(high - mean, 0)]]
        axis.errorbar(place, mean, whisker, color="black", capsize=2, linewidth=0.9)
        style = {"ha": "center", "va": "bottom", "fontsize": 7.5, "xytext": (0, 2), "textcoords": "offset points"}
        axis.annotate(f"{mean:.{column.digits}f}", (place, max(high, mean)), **style)
    axis.set_xticks([])
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.12)
    axis.set_ylim(0, max(axis.get_ylim()[1], 0.1))


def draw_accuracy(plt: Any, methods: Sequence[Method], colours: Mapping[str, Any]) -> Any:
    sets = data_set_names(methods)
    figure, axes = plt.subplots(len(sets), 2, figsize=(8, 2.6 * len(sets) + 0.6), squeeze=False, layout="constrained")
    for row, data in zip(axes, sets, strict=True):
        columns = {column.keys: column for column in table_columns(methods, data)}
        for axis, (key, title) in zip(row, {"accuracy": "accuracy", "majority": "majority vote"}.items(), strict=True):
            draw_bars(axis, methods, colours, data, columns[key,])
            axis.set(title=f"{data}: {title}", ylabel="%")
    add_legend(figure, axes[0, 0])
    return figure


def draw_reasoning(
    plt: Any, methods: Sequence[Method], colours: Mapping[str, Any], data: str, columns: Sequence[Column]
) -> Any:
    figure, axes = make_panels(plt, len(columns), 4, 2.3)
    for axis, column in zip(axes.flat, columns, strict=False):
        draw_bars(axis, methods, colours, data, column)
        axis.set_title(column.title, fontsize=9)
    add_legend(figure, axes[0, 0])
    return figure


def make_panels(plt: Any, count: int, width: int, height: float) -> tuple[Any, Any]:
    """A figure of `count` panels, `width` in a row; the rest of the last row is hidden."""
    rows = -(-count // width)
    figure, axes = plt.subplots(rows, width, figsize=(10, height * rows + 0.6), squeeze=False, layout="constrained")
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, axes


def add_legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)


def draw_training(plt: Any, methods: Sequence[Method], colours: Mapping[str, Any]) -> Any:
    """A panel per quantity, a line per method: the mean over seeds, its band their range."""
    logged = {name for method in methods for seed in method.seeds for step in seed.metrics for name in step}
    parts = ("mean", "accuracy", "format", "cross_reference", "consistency")
    names = [name for name in ("response/length", *(f"reward/{part}" for part in parts)) if name in logged]
    names += sorted(name for name in logged if name.startswith("reward/component/"))
    figure, axes = make_panels(plt, len(names), 3, 2.6)
    for axis, name in zip(axes.flat, names, strict=False):
        held_out = f"eval/{name.split('/', 1)[1]}"
        for method in methods:
            style = {"color": colours[method.name], "label": method.name, "linewidth": 1.3}
            for steps, values in align_seeds([smooth(read_curve(seed.metrics, name)) for seed in method.seeds]):
                axis.plot(steps, list(map(statistics.fmean, values)), **style)
                low, high = list(map(min, values)), list(map(max, values))
                axis.fill_between(steps, low, high, color=colours[method.name], alpha=0.15, linewidth=0)
            for steps, values in align_seeds([read_curve(seed.metrics, held_out) for seed in method.seeds]):
                axis.plot(steps, list(map(statistics.fmean, values)), "o", color=colours[method.name], markersize=4)
        axis.set(title=name, xlabel="RL step", ylabel="tokens" if name == "response/length" else "")
    add_legend(figure, axes[0, 0])
    return figure


def read_curve(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(step["step"], step[name]) for step in log if step.get(name) is not None]


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each point the mean of the last SMOOTHING."""
    values = [value for _, value in curve]
    return [(step, statistics.fmean(values[max(0, n + 1 - SMOOTHING) : n + 1])) for n, (step, _) in enumerate(curve)]


def align_seeds(curves: Sequence[Sequence[tuple[int, float]]]) -> Iterator[tuple[list[int], list[list[float]]]]:
    """The steps that the curves of all seeds have, with their values; nothing if there is no curve."""
    seeds = [dict(curve) for curve in curves if curve]
    if seeds:
        steps = sorted(set.intersection(*map(set, seeds)))
        yield steps, [[seed[step] for seed in seeds] for step in steps]


# ---- case studies ----------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A method's response to a question and its score under the `crpo` design."""

    method: str
    answer: Answer
    score: Score


def select_cases(methods: Sequence[Method]) -> list[tuple[str, list[Sample]]]:
    """The questions on which the last method's score exceeds that of the one before it most (figure 6)."""
    if len(methods) < 2:
        return []
    pair, cases = methods[-2:], []
    for data in data_set_names(methods):
        files = [method.seeds[0].responses[data] for method in pair if data in method.seeds[0].responses]
        if len(files) < 2:
            continue
        firsts = [{a.question.id: a for a in read_answers(file) if a.sample == 0} for file in files]
        for identity in firsts[0].keys() & firsts[1].keys():
            samples = [
                Sample(method.name, answer, score_response(answer.question, answer.response, Reward()))
                for method, answer in zip(pair, (first[identity] for first in firsts), strict=True)
            ]
            before, after = (sample.score for sample in samples)
            rank = (before.total - after.total, -(after.cross_reference or 0.0), data, identity)
            cases.append((rank, data, samples))
    cases.sort(key=lambda case: case[0])
    return [(data, samples) for _, data, samples in cases[:MAX_CASES]]


def mark_citations(text: str, cited: set[str]) -> str:
    """HTML of a response: everything escaped, words whose term is cited marked."""
    parts, end = [], 0
    for match in terms.TOKEN.finditer(lower_in_place(text)):
        if terms.term_of(match[0]) in cited:
            before, word, end = text[end : match.start()], text[match.start() : match.end()], match.end()
            parts.append(f"{html.escape(before)}<mark>{html.escape(word)}</mark>")
    return "".join([*parts, html.escape(text[end:])])


def lower_in_place(text: str) -> str:
    """Lower case with the micro sign that terms have, and every character at its index in the text."""
    lower = "".join(low if len(low := character.lower()) == 1 else character for character in text)
    return lower.replace("\u03bc", "\u00b5")


def case_html(data: str, samples: Sequence[Sample]) -> str:
    question = samples[0].answer.question
    options = "".join(f"<li>{html.escape(f'{letter}) {text}')}</li>" for letter, text in question.options.items())
    sides = []
    for method, answer, score in samples:
        why = score.why.get("cross_reference") or {}
        cites = "the conclusion cites its analysis" if score.cross_reference else "no citation"
        reasons = "; ".join([*score.why["format"], *why.get("failed", [])])
        right = "" if score.accuracy is None else ", right" if score.accuracy else ", wrong"
        verdict = f"answer {score.answer_found}{right}; reward {score.total:.2f}; "
        verdict = html.escape(verdict + cites + (f": {reasons}" if reasons else ""))
        body = mark_citations(answer.response, set(why.get("cited", ())))
        sides.append(f"<div><h4>{html.escape(method)}</h4><p class=verdict>{verdict}</p><pre>{body}</pre></div>")
    title, text, right = (html.escape(part) for part in (f"{data}: {question.id}", question.question, question.answer))
    head = f"<h3>{title}</h3><p>{text}</p><ul>{options}</ul><p>Right: {right}</p>"
    return f"<section>{head}<div class=sides>{''.join(sides)}</div></section>"


# ---- the page --------------------------------------------------------------------------------------------------------

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


def table_html(methods: Sequence[Method], data: str) -> str:
    columns = table_columns(methods, data)
    best = [find_best(methods, data, column) for column in columns]
    rows = ["<th>method</th>" + "".join(f"<th>{html.escape(column.title)}</th>" for column in columns)]
    for method in methods:
        cells = "".join(
            f"<td{' class=best' if method.name in names else ''}>{format_cell(method, data, column)}</td>"
            for column, names in zip(columns, best, strict=True)
        )
        rows.append(f"<td>{html.escape(method.name)}</td>{cells}")
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h3>{html.escape(data)}</h3><div class=wide><table>{table}</table></div>"


def list_notes(methods: Sequence[Method]) -> list[str]:
    """What a reader must know to trust the numbers: sizes, intervals, judges, and what could not be read."""
    notes = [
        "Bold: best of its column, and whatever cannot be told from the best: their difference, paired by question and "
        "with the spread over seeds, is within its 95% interval. Nothing is bold where no method can be told apart. "
        "↓: less is better. Whiskers: range over seeds, or the 95% interval over questions of a single one.",
        *(seed.note for method in methods for seed in method.seeds if seed.note),
    ]
    for data in data_set_names(methods):
        results = [(method.name, result) for method in methods for result in method.results(data)]
        sizes = sorted({f"{result['questions']} questions x {result['samples']} samples" for _, result in results})
        notes.append(f"{data}: {', '.join(sizes)}.")
        dropped = sorted({f"{result['dropped']} ({name})" for name, result in results if result.get("dropped")})
        if dropped:
            notes.append(f"{data}: questions left out because their prompt is too long: {', '.join(dropped)}.")
        for judge in dict.fromkeys(judge for _, result in results for judge in result.get("judges", {})):
            tables = [result["judges"][judge] for _, result in results if judge in result.get("judges", {})]
            judged, unparsed, missing = (
                sum(verdict[kind] for table in tables for verdict in table.values())
                for kind in ("judged", "unparsed", "missing")
            )
            notes.append(f"{data}: judge {judge}: {judged} counts, {unparsed} replies unparsed, {missing} missing.")
        judges = [result.get("agreement", {}) for _, result in results]
        truth = [table for _, result in results for table in result.get("judges_and_truth", {}).values()]
        for title, tables in (("two judges", judges), ("judge and truth", truth)):
            pairs = [pair for table in tables for pair in table.values() if pair["both"]]
            both = sum(pair["both"] for pair in pairs)
            if both:
                equal = sum(pair["equal"] * pair["both"] for pair in pairs) / both
                within = sum(pair["within_one"] * pair["both"] for pair in pairs) / both
                notes.append(f"{data}: {title} agree on {equal:.0%} of {both} counts, within one on {within:.0%}.")
    return notes


def page_html(methods: Sequence[Method], figures: Mapping[str, str], folder: Path) -> str:
    """The whole report as one HTML text that fetches nothing; what models wrote is escaped."""
    images = []
    for caption, file in figures.items():
        source = "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()
        text = html.escape(caption)
        images.append(f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    tables = "".join(table_html(methods, data) for data in data_set_names(methods))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in list_notes(methods))
    cases = "".join(case_html(data, samples) for data, samples in select_cases(methods))
    if cases:
        explanation = "Marked: terms that the conclusion cites from its analysis."
        cases = f"<h2>Case studies (figure 6)</h2><p>{explanation}</p>{cases}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<title>CRPO: evaluation</title><style>{STYLE}</style></head><body><h1>Evaluation</h1>"
        f"<h2>Accuracy and reasoning by method (Table 1)</h2>{tables}{notes}<h2>Figures</h2>{''.join(images)}{cases}"
        "</body></html>\n"
    )


def write_report(specifications: Sequence[str], folder: Path) -> str:
    """Writes the report on NAME=FOLDER methods into `folder`; the terminal's table, and the page's path."""
    if (folder.parent / "config.yaml").exists():
        page = folder / "index.html"
        raise InputError(f"--workdir {folder.parent}: expected another folder than a run's, which has its own {page}")
    methods = read_methods(specifications)
    with writing(folder, InputError, hint=""):
        make_folder(folder, parents=True)
        page = page_html(methods, draw_figures(methods, folder), folder)
        replace_file(folder / "index.html", page.encode("utf-8", "replace"))
    return f"{format_methods(methods)}\n\nreport  {folder / 'index.html'}"
