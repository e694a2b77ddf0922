"""Reward breakdowns of a file of responses; needs no model and no jax.

Each input line is JSON: {"id", "question", "options": {"A": ...}, "answer", "response"}, optionally "token_ids"; a
question without options has a number or a text as its answer, a list of texts, or none; other keys are columns for a
user's function. The samples.jsonl of a run is such a file. Each output line, in the same order,
is {"id", "accuracy", "format", "cross_reference", "clinical_reasoning", "consistency", "total", "answer_found", "why"},
and "components" where the design names a user's function or a sum; or {"id", "error", "traceback"} for a response that
could not be scored. With --tokenizer consistency is the share of effective tokens, of "token_ids" where a line has them
and otherwise of the response encoded again; without it, of effective characters, white space aside: why.consistency.by
says which. With --workdir the replies of a judge are kept there, and none is asked for again.

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

from crpo_jax.answer.records import sample_columns
from crpo_jax.cli import build_parser, load_settings, path_of
from crpo_jax.config import Reward
from crpo_jax.data.chat_template import stop_ids
from crpo_jax.data.files import parse_line
from crpo_jax.data.question import LETTERS, Question
from crpo_jax.data.readers import QUESTION_FIELDS, answer_kind, question_of
from crpo_jax.data.record import Record
from crpo_jax.disk import make_folder
from crpo_jax.errors import InputError
from crpo_jax.reward.effective import effective_table, read_tokenizer, read_vocabulary
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer, ScoringBatch, ScoringError, score_row

BATCH_LINES = 256  # a user's function is called with this many responses
BATCHES_AHEAD = 4  # read before the first of them is written
MAX_TOKEN_ID = 2**31 - 1
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class ResponseLine:
    """A valid line: its id as written, the question, the response, and the token ids where the line has them."""

    id: Any
    question: Question
    response: str
    token_ids: np.ndarray | None


class ResponseTokenizer:
    """The tokenizer of --tokenizer: the effective table, and the token ids of responses that come without."""

    def __init__(self, folder: str, stops: Sequence[str]) -> None:
        self.path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        if not self.path.is_file():
            raise InputError(f"--tokenizer {folder}: expected a folder with tokenizer.json, got none there")
        vocabulary, added = read_vocabulary(self.path), read_tokenizer(self.path).added
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        self.effective = effective_table(self.path, self.vocab_size)
        self.given = {vocabulary[stop] for stop in stops if stop in vocabulary}
        self.added = added

    @cached_property
    def stops(self) -> set[int]:
        """The ids that end a response: of rollout.stop, or else what the folder's chat template and settings say; with
        no chat template those of all special tokens."""
        folder = self.path.parent
        settings = folder / "tokenizer_config.json"
        templates = (settings.is_file() and b'"chat_template"' in settings.read_bytes(), (folder / TEMPLATE).is_file())
        if self.given or self.path.name != "tokenizer.json" or not any(templates):
            return self.given or {index for index, token in self.added.items() if token.get("special")}
        from crpo_jax.data.tokenizer import load_tokenizer

        return set(stop_ids(load_tokenizer(folder), (), [folder]))

    def without_stop(self, ids: np.ndarray) -> np.ndarray:
        """The ids without the one that ended the response; which tokens do that is only asked where one may have."""
        last = int(ids[-1]) if ids.size else None
        return ids[:-1] if (last in self.added or last in self.given) and last in self.stops else ids

    @cached_property
    def encoder(self) -> Any:
        """Loaded only where a line has no token ids: that takes longer than the rest of the start."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.path))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exceptions)
            raise InputError(f"--tokenizer {self.path}: {error}") from None

    def token_ids(self, lines: Sequence[ResponseLine]) -> list[np.ndarray]:
        """The token ids of every response, without the one that ended it."""
        texts = [line.response.encode("utf-8", "replace").decode() for line in lines if line.token_ids is None]
        encoded = iter(self.encoder.encode_batch_fast(texts, add_special_tokens=False) if texts else ())
        of_line = [
            np.array(next(encoded).ids, np.int64) if line.token_ids is None else line.token_ids for line in lines
        ]
        return [self.without_stop(ids) for ids in of_line]


def read_response(record: Record, vocab_size: int | None) -> ResponseLine:
    """A line's record; options are validated less strictly than those of questions to train on: any letters, any
    text."""
    identity = record.value("id")
    if not isinstance(identity, str | int):
        record.fail("id", "a text or a whole number", identity)
    question = read_question(record, str(identity))
    ids = record.fields.get("token_ids")
    if ids is not None:
        below, whole = (
            f" below {vocab_size}" if vocab_size else "",
            isinstance(ids, list) and set(map(type, ids)) <= {int},
        )
        if not whole or min(ids, default=0) < 0 or max(ids, default=0) > MAX_TOKEN_ID:
            record.fail("token_ids", f"a list of token ids{below}", ids)
        if vocab_size and max(ids, default=0) >= vocab_size:
            record.fail("token_ids", f"token ids{below}", max(ids))
        ids = np.array(ids, np.int64)
    return ResponseLine(identity, question, record.string("response"), ids)


def read_question(record: Record, identity: str) -> Question:
    columns = record.columns(*QUESTION_FIELDS, "response", "token_ids", *sample_columns(record))
    source, split = (str(record.fields.get(name, "")) for name in ("source", "split"))
    if answer_kind(record) != "choice":
        return replace(question_of(record), id=identity, source=source, split=split, columns=columns)
    options = record.value("options")
    if not isinstance(options, dict) or not options or not all(isinstance(text, str) for text in options.values()):
        record.fail("options", "an object of texts by letter", options)
    if unknown := [letter for letter in options if len(letter) != 1 or letter not in LETTERS]:
        record.fail("options", "capital letters as keys", unknown[0])
    answer = record.letter("answer", options)
    return Question(identity, record.string("question"), options, answer, source, split, columns)


class Totals:
    """Counts for the line at the end and the exit code."""

    def __init__(self) -> None:
        self.scored, self.failed, self.bad, self.total = 0, 0, 0, 0.0
        self.first_failure = ""

    def add(self, line: ResponseLine, scored: Scored) -> None:
        if isinstance(scored, Score):
            self.scored += 1
            self.total += scored.total
            return
        self.failed += 1
        if not self.first_failure:
            self.first_failure = f"the first, {line.id}: {scored.error}"


def score_lines(
    scorer: Scorer,
    tokenizer: ResponseTokenizer | None,
    strict: bool,
    lines: Iterable[bytes],
    source: str,
    sink: IO[str],
) -> Totals:
    """Score every valid line; each bad one is named on standard error, and with `strict` the first ends the run."""
    totals, pending = Totals(), deque[tuple[list[ResponseLine], ScoringBatch]]()

    def valid_lines() -> Iterator[ResponseLine]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # bytes that are not UTF-8 become U+FFFD, as tokenizers decode them
                record = parse_line(line.decode("utf-8", "replace").strip(), f"{source}:{number}")
                yield read_response(record, tokenizer.vocab_size if tokenizer else None)
            except InputError as error:
                totals.bad += 1
                print(error, file=sys.stderr)
                if strict:
                    return

    def write_batch() -> None:
        batch_lines, batch = pending.popleft()
        for line, scored in zip(batch_lines, scorer.collect(batch), strict=True):
            totals.add(line, scored)
            sink.write(json.dumps({"id": line.id} | score_row(scored), ensure_ascii=False) + "\n")

    stream = valid_lines()
    while chunk := list(islice(stream, BATCH_LINES)):
        ids = tokenizer.token_ids(chunk) if tokenizer else None
        batch = scorer.submit([line.question for line in chunk], [line.response for line in chunk], ids)
        pending.append((chunk, batch))
        if len(pending) > BATCHES_AHEAD:
            write_batch()
    while pending:
        write_batch()
    return totals


def main(arguments: list[str] | None = None) -> int:
    p = build_parser("score", __doc__ or "")
    p.add_argument("--responses", metavar="FILE", required=True, help="JSON lines; - is standard input")
    p.add_argument(
        "--design", metavar="NAME", help="a design, a part, module:function or a weighted sum (sets reward.design)"
    )
    p.add_argument("--tokenizer", metavar="DIR", help="a folder with tokenizer.json, for consistency by tokens")
    p.add_argument(
        "--out", metavar="FILE", type=path_of("--out"), default="-", help="JSON lines; - is standard output (default)"
    )
    p.add_argument("--strict", action="store_true", help="stop at the first bad line")
    try:
        args = p.parse_args(arguments)
        if args.design:
            args.overrides.append(f"reward.design={args.design}")
        config = load_settings(args, model=False)
        tokenizer = ResponseTokenizer(args.tokenizer, config.rollout.stop) if args.tokenizer else None
        # The share of failures that is too many is of the whole file, so it is judged at the end.
        settings = replace(config.reward, max_failed_share=1.0)
        with ExitStack() as files:
            # First of all, so that a function that cannot be loaded is found before any file is opened.
            scorer = files.enter_context(Scorer(settings, tokenizer.effective if tokenizer else None))
            if args.workdir and scorer.judge:
                make_folder(Path(args.workdir), parents=True)
                scorer.keep_replies(Path(args.workdir))
            lines, source = sys.stdin.buffer, "line"
            if args.responses != "-":
                lines, source = files.enter_context(open_file(args.responses, "rb", "--responses")), args.responses
            if args.out == "-":
                sink = files.enter_context(open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace"))
            else:
                if args.responses != "-" and Path(args.out).exists() and os.path.samefile(args.responses, args.out):
                    raise InputError(f"--out {args.out}: expected another file than --responses")
                sink = files.enter_context(open_file(args.out, "w", "--out"))
            totals = score_lines(scorer, tokenizer, args.strict, lines, source, sink)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except ScoringError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of standard output has closed it
        return 1
    except KeyboardInterrupt:
        return 130
    return report_totals(totals, config.reward, tokenizer is not None)


def open_file(path: str, mode: str, flag: str) -> IO[Any]:
    try:
        # A lone surrogate, which JSON can spell and UTF-8 cannot, is written as the JSON escape it came from.
        return open(path, mode) if "b" in mode else open(path, mode, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{flag} {path}: {error.strerror}") from None


def report_totals(totals: Totals, settings: Reward, by_tokens: bool) -> int:
    """Print one line about the whole file to standard error; the exit code."""
    total = f", mean total {totals.total / totals.scored:.4f}" if totals.scored else ""
    by = "tokens" if by_tokens else "characters (no --tokenizer)"
    counts = f"responses scored {totals.scored}, not scorable {totals.failed}, bad lines {totals.bad}"
    print(f"{settings.design}: {counts}{total}; consistency by {by}", file=sys.stderr)
    if totals.failed:
        print(f"responses that could not be scored: {totals.failed}; {totals.first_failure}", file=sys.stderr)
    if totals.bad:
        return 2
    return int(totals.failed > settings.max_failed_share * (totals.scored + totals.failed))


if __name__ == "__main__":
    sys.exit(main())
