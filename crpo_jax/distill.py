"""Teacher traces through any OpenAI-compatible server, and their conversion into the cold start's format; needs no jax.

WORKDIR/traces.jsonl holds every reply, right or wrong, with its reasoning and answer; one that is there is never asked for
again. WORKDIR/converted.jsonl holds the right ones in the dx / conclusion format, which crpo_jax.sft takes as sft.path, and
WORKDIR/rejected.jsonl says of the others why they are not in it. The conversion is a step of its own: --convert does it
again from what is on disk, --traces FILE does it to traces from elsewhere; both ask no server under distill.convert=extract.
The key comes from the environment variable that distill.key_variable names.

Exit code 0; 1 when questions are left without a reply; 2 for bad input.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crpo_jax import cli
from crpo_jax.chat import traces
from crpo_jax.chat.client import Client, GivenUp, Reply, ServerError, ask_all, parameters
from crpo_jax.config import Config
from crpo_jax.data import question as questions
from crpo_jax.data.prompts import instruction, user_turn
from crpo_jax.data.question import OTHER_HALF, Question, halves
from crpo_jax.errors import InputError
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import Stop
from crpo_jax.store.files import DiskFull, replace_rows
from crpo_jax.store.journal import Journal, request_key
from crpo_jax.store.workdir import open_workdir

TEACHER = (
    "Answer the medical multiple-choice question below. Think it through first: what the case shows, and what speaks for and against each "
    "option. Then explain in a short paragraph which findings decide it, and end with the letter of the option, as in \\boxed{LETTER}."
)
REWRITE = (
    "Below are a medical multiple-choice question and a physician's notes on it, which arrive at option {letter}. Write the notes down anew in the "
    "shape that the instruction asks for. Say only what the notes say: add no fact, no finding and no argument of your own, and leave nothing "
    "out that matters to the answer.\n\nInstruction:\n{instruction}\n\nQuestion:\n{question}\n\nNotes:\n{notes}"
)


class Trace(NamedTuple):
    """A teacher's reply to a question: reasoning and answer, or None for both where the reasoning was cut off."""

    question: Question
    attempt: int
    model: str
    reasoning: str | None
    answer: str | None


def teacher_turn(question: Question, settings: Config) -> list[dict[str, str]]:
    if settings.distill.prompt == "crpo":
        return [{"role": "user", "content": user_turn(question, "crpo")}]
    return [{"role": "user", "content": f"{TEACHER}\n\n{user_turn(question, 'brief')}"}]


def rewriting_turn(trace: Trace, letter: str) -> list[dict[str, str]]:
    notes = "\n\n".join(filter(None, (trace.reasoning, trace.answer)))
    asked = REWRITE.format(
        letter=letter, instruction=instruction("crpo"), question=user_turn(trace.question, "brief"), notes=notes
    )
    return [{"role": "user", "content": asked}]


def chosen_questions(settings: Config) -> list[Question]:
    """The half of the training questions that the cold start takes, in the order of the file."""
    data = settings.data
    if data.source == "vignettes":
        from crpo_jax.data.vignettes import vignettes

        found = vignettes(data.split, data.vignettes)
    else:
        found = questions.read(data.source, data.path, data.split)
    found = halves(found, OTHER_HALF[data.part])
    return found[: settings.distill.questions or len(found)]


def fields_of(question: Question) -> dict[str, Any]:
    own = {
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
    }
    return own | {name: value for name, value in (("source", question.source), ("split", question.split)) if value}


def ask_teacher(settings: Config, wanted: Sequence[Question], journal: Journal, progress: Progress, stop: Stop) -> int:
    """Asks for every question without a right answer on disk, attempt by attempt; how many got no reply in the last round."""
    shape, failed = parameters(settings.distill), 0
    right = {row["key"]: bool(row["right"]) for row in journal.rows}
    rounds = settings.distill.attempts
    keys = {
        question.id: [request_key(shape, teacher_turn(question, settings), attempt) for attempt in range(rounds)]
        for question in wanted
    }

    def answered(item: tuple[int, Question], reply: Reply | GivenUp) -> None:
        nonlocal failed
        attempt, question = item
        if isinstance(reply, GivenUp):
            failed += 1
            return progress.keep(f"{question.id}: no reply: {reply.why}")
        key, parts = keys[question.id][attempt], traces.parted(reply.content, reply.reasoning)
        letter = traces.answer_letter(parts[1], question)[0] if parts else None
        told = {
            "key": key,
            "attempt": attempt,
            "teacher": settings.distill.model,
            "reasoning": reply.reasoning,
            "content": reply.content,
        }
        told |= {
            "finish_reason": reply.finish_reason,
            "usage": dict(reply.usage),
            "letter": letter,
            "right": letter == question.answer,
        }
        journal.append_or_wait(fields_of(question) | told, progress.keep)
        right[key] = letter == question.answer
        progress.show(
            len(right), f"try {attempt + 1}/{rounds}  right {sum(right.values()) / len(right):.2f}  no reply {failed}"
        )

    with Client(settings.distill, "distill") as client:
        for attempt in range(rounds):
            left = [
                question
                for question in wanted
                if keys[question.id][attempt] not in right and not any(map(right.get, keys[question.id]))
            ]
            failed = 0
            if stop.noted:
                break
            ask_all(
                client,
                [(attempt, question) for question in left],
                lambda item: teacher_turn(item[1], settings),
                answered,
                lambda: stop.noted,
            )
    return failed


def kept_traces(rows: Iterable[Mapping[str, Any]]) -> list[Trace]:
    found = []
    for row in rows:
        parts = traces.parted(row["content"], row["reasoning"]) or (None, None)
        found.append(
            Trace(questions.from_record(questions.Record(row, "traces.jsonl")), row["attempt"], row["teacher"], *parts)
        )
    return found


def foreign_traces(path: str) -> list[Trace]:
    """Traces of another make: question, options, answer_idx or answer, and `completion` or `reasoning` with `content`."""
    if not Path(path).is_file():
        raise InputError(f"--traces {path}: expected a file, got none there")
    found = []
    for number, record in enumerate(questions.json_records(Path(path))):
        options = record.options("options")
        answer = record.letter("answer_idx" if record.has("answer_idx") else "answer", options)
        source = record.text("source") if record.has("source") else ""
        asked = Question(
            record.identity("id", default=f"trace-{number:06d}"), record.text("question"), options, answer, source
        )
        whole = record.text("completion" if record.has("completion") else "content")
        parts = traces.parted(whole, record.text("reasoning") if record.has("reasoning") else "") or (None, None)
        found.append(Trace(asked, number, record.text("teacher") if record.has("teacher") else "", *parts))
    return found


def by_rules(trace: Trace, settings: Config) -> traces.Converted:
    if trace.reasoning is None or trace.answer is None:
        return traces.Converted(None, "the reasoning was cut off")
    return traces.converted(trace.question, trace.reasoning, trace.answer, settings.reward)


def rewritten(
    found: Sequence[Trace], settings: Config, workdir: Path, progress: Progress, stop: Stop
) -> list[traces.Converted]:
    """The traces with the right answer as the model writes them anew; its replies are kept in rewrites.jsonl."""
    out = [traces.Converted(None, "not rewritten yet")] * len(found)
    shape, wanted = parameters(settings.distill), []
    for index, trace in enumerate(found):
        letter, why = (
            traces.answer_letter(trace.answer, trace.question)
            if trace.answer is not None
            else (None, "the reasoning was cut off")
        )
        if letter is not None and letter == trace.question.answer:
            wanted.append((index, rewriting_turn(trace, letter)))
        else:
            out[index] = traces.Converted(None, why or f"the answer is {letter}, {trace.question.answer} is right")
    with Journal(workdir / "rewrites.jsonl") as journal, Client(settings.distill, "distill") as client:
        kept = {row["key"]: row for row in journal.rows}

        def use(index: int, row: Mapping[str, Any]) -> None:
            parts = traces.parted(row["content"], row["reasoning"])
            short = traces.Converted(None, "the rewriting was cut off")
            out[index] = traces.checked(found[index].question, parts[1], settings.reward) if parts else short

        def answered(item: tuple[int, list[dict[str, str]]], reply: Reply | GivenUp) -> None:
            index, turn = item
            if isinstance(reply, GivenUp):
                out[index] = traces.Converted(None, f"not rewritten yet: {reply.why}")
                return
            row = {
                "key": request_key(shape, turn),
                "id": found[index].question.id,
                "content": reply.content,
                "reasoning": reply.reasoning,
            }
            journal.append_or_wait(row, progress.keep)
            use(index, row)

        left = []
        for index, turn in wanted:
            row = kept.get(request_key(shape, turn))
            if row is None:
                left.append((index, turn))
            else:
                use(index, row)
        ask_all(client, left, lambda item: item[1], answered, lambda: stop.noted)
    return out


def convert(found: Sequence[Trace], settings: Config, workdir: Path, progress: Progress, stop: Stop) -> str:
    """Writes converted.jsonl, one right trace per question, and rejected.jsonl; says what came of them."""
    if settings.distill.convert == "rewrite":
        outcomes = rewritten(found, settings, workdir, progress, stop)
    else:
        outcomes = [by_rules(trace, settings) for trace in found]
    good: dict[str, dict[str, Any]] = {}
    bad = []
    for trace, outcome in zip(found, outcomes, strict=True):
        question = trace.question
        if outcome.response is not None and outcome.score is not None and question.id not in good:
            told = {"response": outcome.response, "teacher": trace.model, "attempt": trace.attempt}
            good[question.id] = fields_of(question) | told | {"cross_reference": outcome.score.cross_reference}
        else:
            why = outcome.why or "another trace of this question is taken"
            bad.append(
                {
                    "id": question.id,
                    "attempt": trace.attempt,
                    "why": why,
                    "reasoning": trace.reasoning,
                    "content": trace.answer,
                }
            )
    replace_rows(workdir / "converted.jsonl", list(good.values()))
    replace_rows(workdir / "rejected.jsonl", bad)
    cites = sum(row["cross_reference"] for row in good.values())
    lines = [
        f"converted {len(good)} of {len(found)} traces: {workdir / 'converted.jsonl'}  (crpo_jax.sft takes it as sft.path)"
    ]
    lines += [f"their conclusions cite their analysis in {cites:.0f}"] if good else []
    lines += [f"left out {len(bad)}: {workdir / 'rejected.jsonl'}"] if bad else []
    lines += [f"  {count:5d}  {why}" for why, count in Counter(row["why"] for row in bad).most_common(5)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("distill", __doc__ or "")
    parser.add_argument("--convert", action="store_true", help="only convert the traces that WORKDIR holds")
    parser.add_argument(
        "--traces",
        metavar="FILE",
        help="only convert the traces of this file: JSON lines with a completion that holds <think>",
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="go on in a workdir that holds the traces of another config"
    )
    args = parser.parse_args(arguments)
    settings = cli.from_arguments(args, model=False)
    workdir = Path(args.workdir or "runs/distill")
    foreign = foreign_traces(args.traces) if args.traces else None
    wanted = [] if args.convert or args.traces else chosen_questions(settings)
    if wanted or settings.distill.convert == "rewrite":
        Client(settings.distill, "distill").__exit__()  # a bad address is found before anything is made
    if args.convert and not (workdir / "traces.jsonl").is_file():
        raise InputError(f"--workdir {workdir}: expected traces.jsonl to convert, got none there")
    failed = 0
    try:
        with (
            open_workdir(workdir, settings, allow_changes=args.allow_changes),
            Stop("waiting for the requests under way, asking nothing new") as stop,
        ):
            progress = Progress(len(wanted))
            if foreign is None:
                with Journal(workdir / "traces.jsonl") as journal:
                    if wanted:
                        progress.keep(
                            f"{len(wanted)} questions for {settings.distill.model}; {len(journal.rows)} replies on disk: {journal.path}"
                        )
                        failed = ask_teacher(settings, wanted, journal, progress, stop)
                with Journal(workdir / "traces.jsonl") as journal:
                    foreign = kept_traces(journal.rows)
            progress.keep(convert(foreign, settings, workdir, progress, stop))
            if stop.noted:
                progress.keep("stopped; the same command goes on from there")
    except (ServerError, DiskFull) as error:
        raise SystemExit(f"crpo_jax.distill: stopped, every reply so far is kept: {error}") from None
    if failed:
        raise SystemExit(f"crpo_jax.distill: {failed} questions without a reply; the same command asks them again")


if __name__ == "__main__":
    cli.run_command("distill", main)
