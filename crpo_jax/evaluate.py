"""How good responses are: accuracy, majority vote, formats, the eight judge measures; and a report on several models.

  --model FOLDER --data NAME_OR_FILE ...   a model answers data sets; if stopped, the same command resumes
  --responses FILE ...                     someone else's responses, JSON lines as crpo_jax.score reads them
  --workdir DIR alone                      the responses in DIR, to be judged or summarized again
  --report NAME=DIR ...                    the paper's table and figures over workdirs of evaluations, or of training
                                           runs with their held-out questions, into WORKDIR/report

All but the first need no model and no jax. A data set is any data.source (from the hub, or from NAME=PATH), a file of
questions of your own, whose columns data.columns.* name, file=FOLDER or hub=ID. WORKDIR/responses/NAME.jsonl holds the
responses as they are generated, WORKDIR/summary.json their statistics, WORKDIR/questions/NAME.jsonl those of each
question. With judge.base_url and judge.model set, a judge counts the eight measures; WORKDIR/judge holds its replies,
and none is requested twice. judge.second.* names a second judge and adds its agreement with the first.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_jax import cli, config
from crpo_jax.answer.measures import Measures, open_measures
from crpo_jax.answer.records import Answer, read_answers, read_dropped, read_summary
from crpo_jax.answer.statistics import summarize
from crpo_jax.config import Config, Endpoint
from crpo_jax.data.files import HUB_DATASETS
from crpo_jax.data.question import Question
from crpo_jax.data.readers import OWN_SOURCES, read_questions
from crpo_jax.data.worlds import WORLDS, generate_questions
from crpo_jax.disk import make_folder, replace_file
from crpo_jax.errors import Fault, InputError
from crpo_jax.judge import measures
from crpo_jax.judge.methods import questions_path
from crpo_jax.judge.report import write_report
from crpo_jax.judge.table import format_summary
from crpo_jax.page.html import keep_page, page_path
from crpo_jax.reward.effective import find_effective_table
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import StopRequested, StopSignal
from crpo_jax.store.files import read_rows, replace_rows, writing
from crpo_jax.store.workdir import open_workdir

EVALUATION_SPLITS = {"medmcqa": "validation", "pubmedqa": "train"}
"""Of data sets whose test split hides the answers or is not there; all others: data.eval_split."""


def evaluate(
    settings: Config,
    workdir: Path,
    data_sets: Mapping[str, Sequence[Question]],
    response_files: Sequence[str] = (),
    *,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """The content of summary.json: of responses that settings.model gives to the data sets, of the files, or of those
    that `workdir` holds. Raises StopRequested where a signal ended the sampling."""
    foreign = {Path(path).stem: read_answers(path) for path in response_files}
    if len(foreign) < len(response_files):
        raise InputError("--responses: expected files of different names")
    folder = workdir / "responses"
    if not data_sets and not foreign and not any(folder.glob("*.jsonl")):
        expected = f"expected responses to evaluate in {folder}, got none"
        raise InputError(f"--workdir {workdir}: {expected}; use --model and --data, or --responses")
    with (
        open_measures(settings) as measures_of_user,  # before anything is sampled
        open_workdir(workdir, settings, allow_changes=allow_changes),
        StopSignal("finishing this wave of responses, keeping it, then stopping") as stop,
    ):
        if data_sets:
            generate_responses(settings, data_sets, folder, stop)
        if foreign:
            copy_responses(response_files, folder)
        answers = foreign or {path.stem: read_answers(path, "--workdir") for path in sorted(folder.glob("*.jsonl"))}
        summary = summarize_and_judge(answers, settings, workdir, measures_of_user, stop)
        keep_page(workdir, lambda line: print(line, file=sys.stderr))
        return summary


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.report:
        return print(write_report(args.report, Path(args.workdir or "runs") / "report"))
    workdir = Path(args.workdir or "runs/evaluate")
    previous = workdir / "config.yaml"
    default = previous if previous.is_file() else default_config(args.model or "")
    settings = cli.load_settings(args, default, model=False)
    if default not in (None, previous) and not args.config:
        print(f"no --config given: {default.name}, for model.path={args.model}", file=sys.stderr)
    if args.model:
        config.check_config(settings)
    data_sets = load_data_sets(args.data, settings)
    try:
        with device_faults() if data_sets else contextlib.nullcontext():
            summary = evaluate(settings, workdir, data_sets, args.responses, allow_changes=args.allow_changes)
    except StopRequested:
        return print("stopped; the same command resumes from there", file=sys.stderr)
    except Fault as error:
        raise SystemExit(f"crpo_jax.evaluate: stopped, everything so far is on disk: {error}") from None
    print(format_summary(summary, settings))
    print(f"responses {page_path(workdir)}", file=sys.stderr)


def default_config(model: str) -> Path | None:
    """An embedded world's config for a model of that world, and no file but the declared defaults for all others."""
    return config.embedded_config(model)


def device_faults() -> contextlib.AbstractContextManager[None]:
    from crpo_jax.runtime.faults import faults_end_in_one_line  # imports jax, which only a model needs

    return faults_end_in_one_line("crpo_jax.evaluate")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("evaluate", __doc__ or "", default_config)
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder or hub id (sets model.path)")
    lists = {
        "--data": ("NAME_OR_FILE", "data sets for the model to answer"),
        "--responses": ("FILE", "responses to evaluate instead of a model's"),
        "--report": ("NAME=DIR", "workdirs of evaluations or training runs; a repeated name adds a seed"),
    }
    for flag, (metavar, text) in lists.items():
        parser.add_argument(flag, metavar=metavar, nargs="+", action="extend", default=[], help=text)
    parser.add_argument(
        "--allow-changes", action="store_true", help="continue in a workdir with the responses of another config"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.report and (args.model or args.data or args.responses or args.overrides):
        raise InputError("--report: expected NAME=DIR and --workdir alone")
    for values in (args.data, args.responses):  # settings after the last data set belong to the settings
        args.overrides += [value for value in values if config.find_setting(value.split("=")[0])]
        values[:] = [value for value in values if value not in args.overrides]
    if bool(args.model) != bool(args.data) or (args.model and args.responses):
        raise InputError("expected --model with --data, or --responses, or --workdir alone")
    if args.model:
        args.overrides.append(f"model.path={args.model}")
    return args


def load_data_sets(specifications: Sequence[str], settings: Config) -> dict[str, list[Question]]:
    """The questions of every --data by name: NAME, NAME=PATH, or a file, whose stem becomes the name."""
    data, limit = settings.data, settings.evaluate.questions
    sets: dict[str, list[Question]] = {}
    for text in specifications:
        name, equals, path = text.partition("=")
        if name in WORLDS and not equals:
            changed = dataclasses.replace(data, source=name, eval_questions=limit or data.eval_questions)
            data_set = generate_questions(changed, data.eval_split)
        elif name in HUB_DATASETS:
            own = data if data.source == name else None
            data_set = read_questions(name, path, EVALUATION_SPLITS.get(name, data.eval_split), own)
        elif name in OWN_SOURCES or (not equals and Path(text).is_file()):
            source, path = (name, path) if equals else ("file", text)
            own = data if data.source in OWN_SOURCES else None
            name, data_set = Path(path).stem, read_questions(source, path, data.eval_split, own)
        else:
            known = ", ".join((*WORLDS, *HUB_DATASETS))
            raise InputError(
                f"--data {text}: expected {known}, one of them as NAME=PATH, a file of questions, file=FOLDER or hub=ID"
            )
        if name in sets:
            raise InputError(f"--data: expected data sets of different names, got {name} twice")
        sets[name] = data_set[: limit or len(data_set)]
    return sets


def generate_responses(
    settings: Config, sets: Mapping[str, Sequence[Question]], folder: Path, stop: StopSignal
) -> None:
    """Generates the responses of settings.model into `folder`; raises StopRequested at the end of a wave if asked to
    stop."""
    from crpo_jax.answer.datasets import answer_data_sets
    from crpo_jax.parallel.processes import self_test

    self_test()
    answer_data_sets(settings, sets, folder, stop)


def copy_responses(paths: Sequence[str], folder: Path) -> None:
    """Copies --responses into the workdir, so that they can be judged and reported later; never overwrites others."""
    for path in map(Path, paths):
        copy = folder / f"{path.stem}.jsonl"
        if copy.exists() and copy.read_bytes() != path.read_bytes():
            raise InputError(f"--responses {path}: expected the responses in {copy}, got others; use another --workdir")
        with writing(copy, hint=""):
            make_folder(folder)
            replace_file(copy, path.read_bytes())


def summarize_and_judge(
    answers: Mapping[str, Sequence[Answer]],
    settings: Config,
    workdir: Path,
    measures_of_user: Measures,
    stop: StopSignal,
) -> dict[str, Any]:
    """The contents of summary.json: written with the judges' previous results before they are asked, and afterwards."""
    path = workdir / "summary.json"
    previous = read_summary(path)["data"] if path.exists() else {}
    dropped = read_dropped(workdir / "responses")
    effective = find_effective_table(settings)
    sets = {}
    for name, responses in answers.items():
        sets[name], rows = summarize(responses, settings, effective, measures_of_user)
        sets[name]["dropped"] = len(dropped.get(name, {}))
        judged = {key: previous.get(name, {}).get(key) for key in ("judges", "agreement", "judges_and_truth")}
        sets[name] |= {key: value for key, value in judged.items() if value is not None}
        write_questions(workdir, name, rows)
    summary = {"model": settings.model.path, "data": sets}
    write_summary(path, summary)
    for name, (results, judged_by) in run_judges(answers, settings, workdir, stop).items():
        sets[name] |= results
        write_questions(workdir, name, list(read_rows(questions_path(workdir, name))), judged_by)
    write_summary(path, summary)
    return summary


def write_questions(
    workdir: Path, name: str, rows: Sequence[dict[str, Any]], judged_by: Mapping[str, Any] | None = None
) -> None:
    """Each question's own means, with the counts of `judged_by`, or those of judges who were asked earlier."""
    path = questions_path(workdir, name)
    if judged_by is None:
        judged_by = {row["id"]: row["judges"] for row in read_rows(path) if "judges" in row}
    with writing(path, hint=""):
        make_folder(path.parent)
    replace_rows(path, (row | {"judges": judged_by[row["id"]]} if row["id"] in judged_by else row for row in rows))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    with writing(path, hint=""):
        replace_file(path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def run_judges(
    answers: Mapping[str, Sequence[Answer]], settings: Config, workdir: Path, stop: StopSignal
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The judges' part of every data set's summary, and their counts by question; empty if no judge is set."""
    judge = settings.judge
    if not judge.base_url and not judge.model:
        return {}
    endpoints: dict[str, Endpoint] = {"judge": judge}
    if judge.second.model:
        endpoints["judge.second"] = dataclasses.replace(judge.second, base_url=judge.second.base_url or judge.base_url)
    selected = {
        name: measures.select_responses(responses, judge.samples, judge.questions)
        for name, responses in answers.items()
    }
    verdicts: dict[str, measures.Verdicts] = {}
    for section, endpoint in endpoints.items():
        model, count = endpoint.model, sum(map(len, selected.values()))
        progress = Progress(len(measures.MEASURES) * count)
        progress.write(f"{model} judges {count} responses by {len(measures.MEASURES)} measures")

        def show(replies: int, given_up: int, progress: Progress = progress, model: str = model) -> None:
            progress.update(replies, f"{model}  no reply {given_up}")

        path = workdir / "judge" / f"{section}.jsonl"
        label = model if model not in verdicts else f"{model} again"
        with progress:
            verdicts[label] = measures.judge_responses(
                selected, endpoint, section, path, progress.write, show, lambda: stop.received
            )
    return {
        name: (
            measures.summarize_verdicts(verdicts, name, responses),
            measures.verdict_rows(verdicts, name, responses),
        )
        for name, responses in selected.items()
    }


if __name__ == "__main__":
    cli.run_command("evaluate", main)
