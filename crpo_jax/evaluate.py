"""How good responses are: accuracy, majority vote, formats, the eight judge measures; and the report over several models.

  --model FOLDER --data NAME_OR_FILE ...   a model answers data sets; stopped, the same command goes on
  --responses FILE ...                     someone's responses, JSON lines as crpo_jax.score reads them; no model, no jax
  --workdir DIR alone                      the responses that DIR holds, to be judged or counted anew; no model, no jax
  --report NAME=DIR ...                    the paper's table and figures over evaluated workdirs, into WORKDIR/report

A data set is medqa, medmcqa, medxpertqa or vignettes (from the hub, or from NAME=PATH), or a file in the project's own
format. WORKDIR/responses/NAME.jsonl keeps the responses while they are drawn, WORKDIR/summary.json what they amount to.
With judge.base_url and judge.model set, a judge counts the eight measures; its replies are kept in WORKDIR/judge, and none
is asked for twice. judge.second.* names a second judge, whose agreement with the first is told.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_jax import cli, config
from crpo_jax.answer import records
from crpo_jax.answer.records import Answer
from crpo_jax.chat.client import ServerError
from crpo_jax.config import Config, Endpoint
from crpo_jax.data import question as questions
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.judge import measures, report, table
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import Stop, Stopped
from crpo_jax.store.files import DiskFull
from crpo_jax.store.workdir import open_workdir

SPLITS = {"medmcqa": "validation"}  # its test split hides the answers; elsewhere data.eval_split


def data_sets(specifications: Sequence[str], settings: Config) -> dict[str, list[Question]]:
    """The questions of every --data by name: NAME, NAME=PATH, or a file whose stem becomes the name."""
    sets: dict[str, list[Question]] = {}
    for text in specifications:
        name, equals, path = text.partition("=")
        if name == "vignettes" and not equals:
            from crpo_jax.data.vignettes import vignettes

            found = vignettes(
                settings.data.eval_split,
                settings.evaluate.questions or settings.data.eval_questions or settings.data.vignettes,
            )
        elif name in questions.HUB:
            found = questions.read(name, path, SPLITS.get(name, settings.data.eval_split))
        elif not equals and Path(text).is_file():
            name, found = Path(text).stem, questions.read("jsonl", text, settings.data.eval_split)
        else:
            known = ", ".join(("vignettes", *questions.HUB))
            raise InputError(f"--data {text}: expected {known}, one of them as NAME=PATH, or a file of questions")
        if name in sets:
            raise InputError(f"--data: expected data sets of different names, got {name} twice")
        sets[name] = found[: settings.evaluate.questions or len(found)]
    return sets


def effective_tokens(settings: Config) -> Any:
    """The table of effective tokens of tokenizer.path or the model's folder, None where neither is on this machine."""
    from crpo_jax.reward.effective import effective_table, token_ids_of

    for path in (settings.tokenizer.path, settings.model.path):
        file = Path(path).expanduser() / "tokenizer.json"
        file = file if file.is_file() else config.config_folder().parent / path / "tokenizer.json"
        if path and file.is_file():
            return effective_table(file, max(token_ids_of(file).values()) + 1)
    return None


def keep_given(paths: Sequence[str], folder: Path) -> None:
    """Copies given responses beside the summary, so that they can be judged and reported on later; others of that name stay."""
    for path in map(Path, paths):
        kept = folder / f"{path.stem}.jsonl"
        if kept.exists() and kept.read_bytes() != path.read_bytes():
            raise InputError(
                f"--responses {path}: expected the responses that {kept} holds already, got others; take another --workdir"
            )
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)


def write_json(path: Path, value: Any) -> None:
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise SystemExit(f"crpo_jax.evaluate: {path}: cannot write: {error.strerror}") from None


def judges(
    found: Mapping[str, Sequence[Answer]], settings: Config, workdir: Path, stop: Stop
) -> dict[str, dict[str, Any]]:
    """By data set: each judge's means, the agreement of two, and of each with the truth where it is known; empty where no judge is named."""
    judge = settings.judge
    if not judge.base_url and not judge.model:
        return {}
    endpoints: dict[str, Endpoint] = {"judge": judge}
    if judge.second.model:
        endpoints["judge.second"] = dataclasses.replace(judge.second, base_url=judge.second.base_url or judge.base_url)
    picked = {name: measures.chosen(responses, judge.samples, judge.questions) for name, responses in found.items()}
    verdicts: dict[str, measures.Verdicts] = {}
    for section, endpoint in endpoints.items():
        progress = Progress(8 * sum(map(len, picked.values())))
        progress.keep(
            f"{endpoint.model} judges {sum(map(len, picked.values()))} responses by {len(measures.MEASURES)} measures"
        )
        path = workdir / "judge" / f"{section}.jsonl"

        def show(
            done: int, wanted: int, failed: int, progress: Progress = progress, model: str = endpoint.model
        ) -> None:
            progress.show(done, f"{model}  no reply {failed}")

        label = endpoint.model if endpoint.model not in verdicts else f"{endpoint.model} again"
        verdicts[label] = measures.judged(picked, endpoint, section, path, progress.keep, show, lambda: stop.noted)
    told: dict[str, dict[str, Any]] = {}
    for name, responses in picked.items():
        told[name] = {"judges": {label: measures.means(one, name, responses) for label, one in verdicts.items()}}
        if len(verdicts) == 2:
            first, second = verdicts.values()
            pairs = {
                measure: (first.counts[name][measure], second.counts[name][measure]) for measure in measures.MEASURES
            }
            told[name]["agreement"] = {measure: measures.agreement(*pair) for measure, pair in pairs.items()}
        told[name]["judges_and_truth"] = {
            label: measures.against_truth(one, name, responses) for label, one in verdicts.items()
        }
    return told


def measured(
    found: Mapping[str, Sequence[Answer]], settings: Config, workdir: Path, dropped: Mapping[str, Any], stop: Stop
) -> dict[str, Any]:
    """The summary of every data set, judged where a judge is named; kept in summary.json, before the judge is asked and after."""
    effective, path = effective_tokens(settings), workdir / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8"))["data"] if path.is_file() else {}
    kept = {
        name: {key: one[key] for key in ("judges", "agreement", "judges_and_truth") if key in one}
        for name, one in before.items()
    }
    sets = {}
    for name, responses in found.items():
        sets[name] = (
            records.summary(responses, settings, effective)
            | {"dropped": len(dropped.get(name, {}))}
            | kept.get(name, {})
        )
    summary = {"model": settings.model.path, "data": sets}
    write_json(path, summary)
    for name, told in judges(found, settings, workdir, stop).items():
        sets[name] |= told
    write_json(path, summary)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("evaluate", __doc__ or "")
    parser.add_argument("--model", metavar="FOLDER", help="a Hugging Face folder or hub id (sets model.path)")
    parser.add_argument(
        "--data", metavar="NAME_OR_FILE", nargs="+", action="extend", default=[], help="data sets to answer"
    )
    parser.add_argument(
        "--responses", metavar="FILE", nargs="+", action="extend", default=[], help="responses to evaluate instead"
    )
    parser.add_argument(
        "--report",
        metavar="NAME=DIR",
        nargs="+",
        action="extend",
        default=[],
        help="evaluated workdirs; a name again is a seed",
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on in a workdir that holds the responses of another config"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.report:
        if args.model or args.data or args.responses or args.overrides:
            raise InputError("--report: expected NAME=DIR and --workdir alone")
        return print(report.write(args.report, Path(args.workdir or "runs") / "report"))
    for word in [word for word in args.data + args.responses if word.split("=")[0] in config.leaves()]:
        (args.data if word in args.data else args.responses).remove(word)  # a setting after the last data set
        args.overrides.append(word)
    workdir = Path(args.workdir or "runs/evaluate")
    if bool(args.model) != bool(args.data) or (args.model and args.responses):
        raise InputError("expected --model with --data, or --responses, or --workdir alone")
    if args.model:
        args.overrides.append(f"model.path={args.model}")
    kept = workdir / "config.yaml"
    settings = cli.from_arguments(args, kept if kept.is_file() else None, model=False)
    if args.model:
        config.check(settings)
    sets = data_sets(args.data, settings)
    given = {Path(path).stem: records.read_answers(path) for path in args.responses}
    if len(given) < len(args.responses):
        raise InputError("--responses: expected files of different names")
    folder = workdir / "responses"
    if not sets and not given and not sorted(folder.glob("*.jsonl")):
        raise InputError(
            f"--workdir {workdir}: expected responses to evaluate in {folder}, got none; give --model and --data, or --responses"
        )
    with (
        open_workdir(workdir, settings, allow_changes=args.allow_changes),
        Stop("finishing this wave of responses, keeping it, then stopping") as stop,
    ):
        if sets:
            from crpo_jax.answer.datasets import examine
            from crpo_jax.parallel.processes import self_test
            from crpo_jax.runtime.limits import one_line

            self_test()
            try:
                with one_line("crpo_jax.evaluate"):
                    examine(settings, sets, folder, stop)
            except Stopped:
                return print("stopped; the same command goes on from there", file=sys.stderr)
        if given:
            keep_given(args.responses, folder)
        found = given or {path.stem: records.read_answers(path, "--workdir") for path in sorted(folder.glob("*.jsonl"))}
        dropped = (
            json.loads((folder / "dropped.json").read_text(encoding="utf-8"))
            if (folder / "dropped.json").is_file()
            else {}
        )
        try:
            summary = measured(found, settings, workdir, dropped, stop)
        except (ServerError, DiskFull) as error:
            raise SystemExit(f"crpo_jax.evaluate: stopped, every reply of the judge so far is kept: {error}") from None
    print(table.of_summary(summary, settings))


if __name__ == "__main__":
    cli.run_command("evaluate", main)
