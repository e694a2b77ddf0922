"""Teacher traces through any OpenAI-compatible server, converted into the format of the cold start; needs no jax.

WORKDIR/traces.jsonl holds every reply, right or wrong, with its reasoning and answer; none of them is requested again.
WORKDIR/converted.jsonl holds the right ones in the dx / conclusion format, which crpo_jax.sft reads as sft.path, and
WORKDIR/rejected.jsonl the others, each with the reason. Conversion is a separate step: --convert repeats it for
WORKDIR/traces.jsonl, --traces FILE applies it to other traces; both need no server unless distill.convert=rewrite.
The key comes from the environment variable that distill.key_variable names.

Exit code 0; 1 if questions are left without a reply; 2 for bad input.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from crpo_jax import cli
from crpo_jax.answer.records import question_to_row
from crpo_jax.chat.client import Client, GivenUp, Reply, ask_all, request_parameters
from crpo_jax.config import Config
from crpo_jax.data.files import json_records
from crpo_jax.data.prompts import instruction, user_turn
from crpo_jax.data.question import OTHER_HALF, Question, select_part
from crpo_jax.data.readers import question_of, read_questions
from crpo_jax.data.record import Record
from crpo_jax.data.worlds import WORLDS, generate_questions
from crpo_jax.errors import Fault, InputError
from crpo_jax.reward.answer import write_answer
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import StopSignal
from crpo_jax.store.files import replace_rows
from crpo_jax.store.journal import Journal, request_key
from crpo_jax.store.workdir import open_workdir
from crpo_jax.traces import (
    CUT_OFF,
    Conversion,
    convert_trace,
    explain_wrong_answer,
    is_right_answer,
    read_answer,
    split_reasoning,
    validate_response,
)

TEACHER = (
    "Answer the medical multiple-choice question below. Think it through first: what the case shows, and what speaks "
    "for and against each option. Then explain in a short paragraph which findings decide it, and end with the letter "
    "of the option, as in \\boxed{LETTER}."
)
OPEN_TEACHER = (
    "Answer the question below. Think it through first. Then explain in a short paragraph what decides it{end}."
)
REWRITE = (
    "Below are {question_kind} and a physician's notes on it, which arrive at {answer}. "
    "Write the notes down anew in the shape that the instruction asks for. Say only what the notes say: add no fact, "
    "no finding and no argument of your own, and leave nothing out that matters to the answer.\n\n"
    "Instruction:\n{instruction}\n\nQuestion:\n{question}\n\nNotes:\n{notes}"
)

TRACE_FIELDS = {"key": str, "right": bool, "attempt": int, "teacher": str, "content": str, "reasoning": str}


class Trace(NamedTuple):
    """A teacher's reply to a question; reasoning and answer are None if the reasoning was cut off."""

    question: Question
    attempt: int
    model: str
    reasoning: str | None
    answer: str | None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.build_parser("distill", __doc__ or "")
    parser.add_argument("--convert", action="store_true", help="only convert the traces in WORKDIR")
    parser.add_argument(
        "--traces", metavar="FILE", help="only convert the traces in FILE: JSON lines whose completion holds <think>"
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="continue in a workdir with the traces of another config"
    )
    args = parser.parse_args(arguments)
    settings = cli.load_settings(args, model=False)
    workdir = Path(args.workdir or "runs/distill")
    foreign = read_foreign_traces(args.traces) if args.traces else None
    selected = [] if args.convert or args.traces else select_questions(settings)
    if selected or settings.distill.convert == "rewrite":
        with Client(settings.distill, "distill"):
            pass  # a bad address is reported before anything is written
    if args.convert and not (workdir / "traces.jsonl").is_file():
        raise InputError(f"--workdir {workdir}: expected traces.jsonl to convert, got none there")
    given_up = 0
    try:
        with (
            open_workdir(workdir, settings, allow_changes=args.allow_changes),
            StopSignal("waiting for the requests in flight, sending no new ones") as stop,
            Progress(len(selected)) as progress,
        ):
            if selected:
                given_up = ask_teacher(selected, settings, workdir, progress, stop)
            traces = read_traces(workdir) if foreign is None else foreign
            progress.write(convert_traces(traces, settings, workdir, progress, stop))
            if stop.received:
                progress.write("stopped; the same command resumes from there")
    except Fault as error:
        raise SystemExit(f"crpo_jax.distill: stopped, every reply so far is on disk: {error}") from None
    if given_up:
        raise SystemExit(f"crpo_jax.distill: {given_up} questions without a reply; the same command sends them again")


def select_questions(settings: Config) -> list[Question]:
    """The half of the training questions that is for the cold start, in the order of the file."""
    data = settings.data
    if data.source in WORLDS:
        selected = generate_questions(data, data.split)
    else:
        selected = read_questions(data.source, data.path, data.split, data)
    selected = select_part(selected, OTHER_HALF[data.part])
    return selected[: settings.distill.questions or len(selected)]


def build_teacher_turn(question: Question, settings: Config) -> list[dict[str, str]]:
    if settings.distill.prompt == "crpo":
        return [{"role": "user", "content": user_turn(question, "crpo")}]
    teacher = TEACHER
    if question.kind != "choice":
        form = write_answer("ANSWER", settings.reward).strip()
        teacher = OPEN_TEACHER.format(
            end="" if question.kind == "none" else f", and end with the answer alone, as in {form}"
        )
    return [{"role": "user", "content": f"{teacher}\n\n{user_turn(question, 'brief')}"}]


def ask_teacher(
    selected: Sequence[Question], settings: Config, workdir: Path, progress: Progress, stop: StopSignal
) -> int:
    """Requests a trace of every question without a right answer on disk, attempt by attempt.

    Returns how many requests of the last attempt were given up.
    """
    attempts, given_up = settings.distill.attempts, 0
    turns = {question.id: build_teacher_turn(question, settings) for question in selected}
    parameters = request_parameters(settings.distill)
    keys = {identity: [request_key(parameters, turn, n) for n in range(attempts)] for identity, turn in turns.items()}
    with Journal(workdir / "traces.jsonl", TRACE_FIELDS) as journal, Client(settings.distill, "distill") as client:
        right = {row["key"]: bool(row["right"]) for row in journal.rows}
        replies = f"{len(journal.rows)} replies on disk: {journal.path}"
        progress.write(f"{len(selected)} questions for {settings.distill.model}; {replies}")

        def on_reply(request: tuple[Question, int], reply: Reply | GivenUp) -> None:
            nonlocal given_up
            question, attempt = request
            if isinstance(reply, GivenUp):
                given_up += 1
                return progress.write(f"{question.id}: no reply: {reply.reason}")
            row = trace_to_row(question, attempt, keys[question.id][attempt], reply, settings)
            journal.append_or_wait(row, progress.write)
            right[row["key"]] = row["right"]
            accuracy = sum(right.values()) / len(right)
            line = f"attempt {attempt + 1}/{attempts}  right {accuracy:.2f}  no reply {given_up}"
            progress.update(len(right), line)

        for attempt in range(attempts):
            if stop.received:
                break
            given_up = 0
            requests = [
                (question, attempt)
                for question in selected
                if keys[question.id][attempt] not in right and not any(map(right.get, keys[question.id]))
            ]
            ask_all(client, requests, lambda request: turns[request[0].id], on_reply, lambda: stop.received)
    return given_up


def trace_to_row(question: Question, attempt: int, key: str, reply: Reply, settings: Config) -> dict[str, Any]:
    parts = split_reasoning(reply.content, reply.reasoning)
    found = read_answer(parts[1], question, settings.reward)[0] if parts else None
    return question_to_row(question) | {
        "key": key,
        "attempt": attempt,
        "teacher": settings.distill.model,
        "reasoning": reply.reasoning,
        "content": reply.content,
        "finish_reason": reply.finish_reason,
        "usage": dict(reply.usage),
        "letter" if question.kind == "choice" else "answer_found": found,
        "right": parts is not None and is_right_answer(found, question, settings.reward),
    }


def read_traces(workdir: Path) -> list[Trace]:
    traces = []
    with Journal(workdir / "traces.jsonl", TRACE_FIELDS) as journal:
        for row in journal.rows:
            question = question_of(Record(row, "traces.jsonl"))
            parts = split_reasoning(row["content"], row["reasoning"]) or (None, None)
            traces.append(Trace(question, row["attempt"], row["teacher"], *parts))
    return traces


def read_foreign_traces(path: str) -> list[Trace]:
    """Someone else's traces: questions of one's own, or MedQA's; `completion`, or `content` and `reasoning`."""
    if not Path(path).is_file():
        raise InputError(f"--traces {path}: expected a file, got none there")
    traces = []
    for number, record in enumerate(json_records(Path(path))):
        if record.has("answer_idx"):
            record = replace(record, fields={**record.fields, "answer": record.fields["answer_idx"]})
        source, reasoning, teacher = (
            record.text(name) if record.has(name) else "" for name in ("source", "reasoning", "teacher")
        )
        identity = record.identity("id", default=f"trace-{number:06d}")
        question = replace(question_of(record), id=identity, source=source, split="", columns={})
        content = record.text("completion" if record.has("completion") else "content")
        traces.append(Trace(question, number, teacher, *(split_reasoning(content, reasoning) or (None, None))))
    return traces


def convert_traces(
    traces: Sequence[Trace], settings: Config, workdir: Path, progress: Progress, stop: StopSignal
) -> str:
    """Writes converted.jsonl, with one right trace per question, and rejected.jsonl; returns what to report."""
    if settings.distill.convert == "rewrite":
        conversions = rewrite_traces(traces, settings, workdir, progress, stop)
    else:
        conversions = [
            CUT_OFF
            if trace.reasoning is None or trace.answer is None
            else convert_trace(trace.question, trace.reasoning, trace.answer, settings.reward)
            for trace in traces
        ]
    converted: dict[str, dict[str, Any]] = {}
    rejected = []
    for trace, conversion in zip(traces, conversions, strict=True):
        identity = trace.question.id
        if conversion.response is not None and conversion.score is not None and identity not in converted:
            row = {"response": conversion.response, "teacher": trace.model, "attempt": trace.attempt}
            row["cross_reference"] = conversion.score.cross_reference
            converted[identity] = question_to_row(trace.question) | row
        else:
            reason = conversion.reason or "another trace of this question is taken"
            row = {"id": identity, "attempt": trace.attempt, "why": reason}
            rejected.append(row | {"reasoning": trace.reasoning, "content": trace.answer})
    replace_rows(workdir / "converted.jsonl", list(converted.values()))
    replace_rows(workdir / "rejected.jsonl", rejected)
    path = workdir / "converted.jsonl"
    lines = [f"converted {len(converted)} of {len(traces)} traces: {path}  (crpo_jax.sft reads it as sft.path)"]
    if converted:
        cites = sum(row["cross_reference"] for row in converted.values())
        lines.append(f"the conclusion cites the analysis in {cites:.0f} of them")
    if rejected:
        lines.append(f"rejected {len(rejected)}: {workdir / 'rejected.jsonl'}")
        reasons = Counter(row["why"] for row in rejected)
        lines += [f"  {count:5d}  {reason}" for reason, count in reasons.most_common(5)]
    return "\n".join(lines)


def build_rewriting_turn(trace: Trace) -> list[dict[str, str]]:
    question = trace.question
    text = REWRITE.format(
        question_kind="a medical multiple-choice question" if question.kind == "choice" else "a question",
        answer=f"option {question.answer}" if question.kind == "choice" else f"the answer {question.answer}",
        instruction=instruction("crpo"),
        question=user_turn(question, "brief"),
        notes="\n\n".join(filter(None, (trace.reasoning, trace.answer))),
    )
    return [{"role": "user", "content": text}]


def rewrite_traces(
    traces: Sequence[Trace], settings: Config, workdir: Path, progress: Progress, stop: StopSignal
) -> list[Conversion]:
    """The model's own rewriting of every trace with the right answer; rewrites.jsonl keeps its replies."""
    conversions: list[Conversion] = []
    turns: dict[int, list[dict[str, str]]] = {}
    for index, trace in enumerate(traces):
        if trace.answer is None:
            conversions.append(CUT_OFF)
            continue
        reason = explain_wrong_answer(trace.answer, trace.question, settings.reward)
        if not reason:
            turns[index] = build_rewriting_turn(trace)
        conversions.append(Conversion(None, reason or "not rewritten yet"))
    parameters = request_parameters(settings.distill)
    keys = {index: request_key(parameters, turn) for index, turn in turns.items()}
    fields = {"key": str, "content": str, "reasoning": str}
    with Journal(workdir / "rewrites.jsonl", fields) as journal, Client(settings.distill, "distill") as client:
        rows: dict[str, Mapping[str, Any]] = {row["key"]: row for row in journal.rows}

        def on_reply(index: int, reply: Reply | GivenUp) -> None:
            if isinstance(reply, GivenUp):
                conversions[index] = Conversion(None, f"not rewritten yet: {reply.reason}")
            else:
                row = {"key": keys[index], "id": traces[index].question.id}
                rows[keys[index]] = row | {"content": reply.content, "reasoning": reply.reasoning}
                journal.append_or_wait(rows[keys[index]], progress.write)

        unanswered = [index for index in turns if keys[index] not in rows]
        ask_all(client, unanswered, turns.__getitem__, on_reply, lambda: stop.received)
    for index in turns:
        if row := rows.get(keys[index]):
            parts = split_reasoning(row["content"], row["reasoning"])
            conversions[index] = (
                validate_response(traces[index].question, parts[1], settings.reward)
                if parts
                else Conversion(None, "the rewriting was cut off")
            )
    return conversions


if __name__ == "__main__":
    cli.run_command("distill", main)
