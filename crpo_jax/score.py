"""Reward breakdowns of a file of responses; needs no model and no jax.

A line in, JSON: {"id", "question", "options": {"A": ...}, "answer", "response"}, optionally "token_ids"; other keys are
columns for a user's function. A line out, in the same order: {"id", "accuracy", "format", "cross_reference",
"clinical_reasoning", "consistency", "total", "answer_found", "why"}, and "components" where the design names a user's
function or a sum; or {"id", "error", "traceback"} for a response that could not be scored. With --tokenizer consistency
is the share of effective tokens, of "token_ids" where a line has them and else of the response encoded again; without
it, of effective characters, white space aside: why.consistency.by says which.

Exit code 0; 1 when more responses than reward.max_failed_share could not be scored; 2 for bad input.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from crpo_jax.cli import build_parser, load_settings
from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.effective import effective_table, token_ids_of
from crpo_jax.reward.rules import DESIGNS, Score
from crpo_jax.reward.scorer import Batch, Scored, Scorer, ScoringError

BATCH = 256  # lines; a user's function is called with this many
MAX_ID = 2**31 - 1
IN_FLIGHT = 4  # batches read ahead of the one that is written


@dataclass(frozen=True, slots=True)
class Record:
    """One good line: its id as written, its question and response, its tokens where the line or the tokenizer gives them."""

    id: Any
    question: Question
    response: str
    token_ids: np.ndarray | None


class Tokens:
    """The tokenizer of --tokenizer: the effective table, and the token ids of responses that bring none."""

    def __init__(self, folder: str, stops: Sequence[str]) -> None:
        self.path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        if not self.path.is_file():
            raise InputError(f"--tokenizer {folder}: expected a folder with tokenizer.json, got none there")
        vocabulary = token_ids_of(self.path)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.effective = effective_table(self.path, self.vocab_size)
        self.stops = {vocabulary[stop] for stop in stops if stop in vocabulary}

    @cached_property
    def tokenizer(self) -> Any:
        """Loaded where a line has no token ids: it takes longer than all the rest of the start."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.path))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exceptions)
            raise InputError(f"--tokenizer {self.path}: {error}") from None

    def complete(self, records: Sequence[Record]) -> list[np.ndarray]:
        """The token ids of every record, without the one that ended it."""
        texts = [record.response.encode("utf-8", "replace").decode() for record in records if record.token_ids is None]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else ())
        found = [
            np.array(next(encoded).ids, np.int64) if record.token_ids is None else record.token_ids
            for record in records
        ]
        return [ids[:-1] if ids.size and int(ids[-1]) in self.stops else ids for ids in found]


def read_line(line: bytes, vocab_size: int | None) -> Record:
    """A line's record; InputError says what is wrong with it. Bytes that are no UTF-8 become U+FFFD, as tokenizers decode them."""
    try:
        row = json.loads(line.decode("utf-8", "replace").strip())
    except ValueError as error:
        raise InputError(f"not JSON: {getattr(error, 'msg', error)} at column {getattr(error, 'colno', 1)}") from None
    except RecursionError:
        raise InputError("not usable JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {type(row).__name__}")
    for key in ("id", "question", "options", "answer", "response"):
        if key not in row:
            raise InputError(f"{key}: missing")
    for key in ("question", "answer", "response"):
        if not isinstance(row[key], str):
            raise InputError(f"{key}: expected a string, got {shown(row[key])}")
    if not isinstance(row["id"], str | int):
        raise InputError(f"id: expected a string or a whole number, got {shown(row['id'])}")
    options = row["options"]
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        raise InputError(f"options: expected an object of letters and texts, got {shown(options)}")
    for letter in options:
        if not (len(letter) == 1 and "A" <= letter <= "Z"):
            raise InputError(f"options: expected capital letters as keys, got {shown(letter)}")
    if row["answer"] not in options:
        raise InputError(f"answer: expected one of {', '.join(options)}, got {shown(row['answer'])}")
    ids = row.get("token_ids")
    if ids is not None:
        top = f" below {vocab_size}" if vocab_size else ""
        if (
            not isinstance(ids, list)
            or not set(map(type, ids)) <= {int}
            or min(ids, default=0) < 0
            or max(ids, default=0) > MAX_ID
        ):
            raise InputError(f"token_ids: expected a list of token ids{top}, got {shown(ids)}")
        if vocab_size and ids and max(ids) >= vocab_size:
            raise InputError(f"token_ids: expected token ids{top}, got {max(ids)}")
    known = {"id", "question", "options", "answer", "response", "token_ids", "source", "split"}
    question = Question(
        id=str(row["id"]),
        question=row["question"],
        options=options,
        answer=row["answer"],
        source=str(row.get("source", "")),
        split=str(row.get("split", "")),
        columns={key: value for key, value in row.items() if key not in known},
    )
    return Record(row["id"], question, row["response"], None if ids is None else np.array(ids, np.int64))


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def output(record: Record, scored: Scored, components: bool) -> str:
    """A line of the output."""
    if isinstance(scored, Score):
        row = {
            "id": record.id,
            "accuracy": scored.accuracy,
            "format": scored.format,
            "cross_reference": scored.cross_reference,
            "clinical_reasoning": scored.clinical_reasoning,
            "consistency": scored.consistency,
            "total": scored.total,
            "answer_found": scored.answer_found,
            "why": scored.why,
        }
        if components:
            row["components"] = scored.components
    else:
        row = {"id": record.id, "error": scored.error, "traceback": scored.traceback}
    return json.dumps(row, ensure_ascii=False) + "\n"


class RolloutProgress:
    """What the command says at the end, and its exit code."""

    def __init__(self) -> None:
        self.scored, self.failed, self.bad, self.total = 0, 0, 0, 0.0
        self.first_failure = ""

    def add(self, record: Record, scored: Scored) -> None:
        if isinstance(scored, Score):
            self.scored += 1
            self.total += scored.total
        else:
            self.failed += 1
            self.first_failure = (
                self.first_failure or f"the first, {record.id}: {scored.error}\n{scored.traceback}".rstrip()
            )


def run(
    settings: Reward, tokens: Tokens | None, strict: bool, lines: Iterable[bytes], source: str, sink: IO[str]
) -> RolloutProgress:
    """Score every good line; each bad one is named on standard error, and with `strict` the first ends the run."""
    tally, waiting = Tally(), deque[tuple[list[Record], Batch]]()
    components = settings.design not in DESIGNS

    def records() -> Iterator[Record]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield read_line(line, tokens.vocab_size if tokens else None)
            except InputError as error:
                tally.bad += 1
                print(f"{source}:{number}: {error}", file=sys.stderr)
                if strict:
                    return

    # The share of failures that is too many is of the whole file, so it is judged at the end.
    with Scorer(replace(settings, max_failed_share=1.0), tokens.effective if tokens else None) as scorer:

        def write() -> None:
            batch_records, batch = waiting.popleft()
            for record, scored in zip(batch_records, scorer.collect(batch), strict=True):
                tally.add(record, scored)
                sink.write(output(record, scored, components))

        stream = records()
        while chunk := list(islice(stream, BATCH)):
            ids = tokens.complete(chunk) if tokens else None
            waiting.append(
                (
                    chunk,
                    scorer.submit([record.question for record in chunk], [record.response for record in chunk], ids),
                )
            )
            if len(waiting) > IN_FLIGHT:
                write()
        while waiting:
            write()
    return tally


def main(arguments: list[str] | None = None) -> int:
    p = build_parser("score", __doc__ or "")
    p.add_argument("--responses", metavar="FILE", required=True, help="JSON lines; - is standard input")
    p.add_argument(
        "--design", metavar="NAME", help="crpo, grpo, released, module:function or a weighted sum (sets reward.design)"
    )
    p.add_argument("--tokenizer", metavar="DIR", help="a folder with tokenizer.json, for consistency by tokens")
    p.add_argument("--out", metavar="FILE", default="-", help="JSON lines; - is standard output (default)")
    p.add_argument("--strict", action="store_true", help="stop at the first bad line")
    args = p.parse_intermixed_args(arguments)
    try:
        if args.design:
            args.overrides.append(f"reward.design={args.design}")
        config = load_settings(args, model=False)
        Scorer(config.reward)  # checks the design before any file is opened
        tokens = Tokens(args.tokenizer, config.rollout.stop) if args.tokenizer else None
        with ExitStack() as files:
            lines: IO[bytes] = (
                sys.stdin.buffer
                if args.responses == "-"
                else files.enter_context(opened(args.responses, "rb", "--responses"))
            )
            if args.out == "-":
                sink = files.enter_context(open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace"))
            else:
                if args.responses != "-" and Path(args.out).exists() and os.path.samefile(args.responses, args.out):
                    raise InputError(f"--out {args.out}: expected another file than --responses")
                sink = files.enter_context(opened(args.out, "w", "--out"))
            tally = run(
                config.reward, tokens, args.strict, lines, "line" if args.responses == "-" else args.responses, sink
            )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except ScoringError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read standard output has seen enough
        return 1
    except KeyboardInterrupt:
        return 130
    return report(tally, config.reward, tokens is not None)


def opened(path: str, mode: str, flag: str) -> IO[Any]:
    try:
        # A lone surrogate, which JSON can spell and UTF-8 cannot, is written as the JSON escape it came from.
        return open(path, mode) if "b" in mode else open(path, mode, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from None


def report(tally: RolloutProgress, settings: Reward, by_tokens: bool) -> int:
    """One line about the whole on standard error, and the exit code."""
    total = f", mean total {tally.total / tally.scored:.4f}" if tally.scored else ""
    by = "tokens" if by_tokens else "characters (no --tokenizer)"
    counts = f"responses scored {tally.scored}, not scorable {tally.failed}, bad lines {tally.bad}"
    print(f"{settings.design}: {counts}{total}; consistency by {by}", file=sys.stderr)
    if tally.failed:
        print(f"responses that could not be scored: {tally.failed}; {tally.first_failure}", file=sys.stderr)
    if tally.bad:
        return 2
    return int(tally.failed > settings.max_failed_share * (tally.scored + tally.failed))


if __name__ == "__main__":
    sys.exit(main())
