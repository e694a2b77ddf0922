"""How fast rewards are: responses per second through the score command, and the time of the worst 1 MB responses.

    python scripts/bench_score.py [--responses 10000] [--workers 2] [--tokenizer DIR]

Responses have about 600 tokens of Qwen2.5 each: a teacher's response to a vignette, its System 2 part extended. With
--tokenizer they have their token ids, and the table of effective tokens decides consistency.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from crpo_jax.config import Reward
from crpo_jax.data.vignettes import TeacherNoise, teacher_response, vignettes
from crpo_jax.reward.rules import DESIGNS, score_response

MEGABYTE = 1_000_000
CHARACTERS = 2550  # about 600 tokens: this text has 4.25 characters to a token


def long_responses(count: int) -> Iterator[dict[str, object]]:
    """Five responses to a question, as in training, each with other questions' analyses put into its System 2 part."""
    questions = vignettes("train", (count + 4) // 5)
    rng = Random("bench score")
    noise = TeacherNoise(missing_part=0.0, cites=1.0)  # all have the right format, so that every rule has work to do
    for index in range(count):
        question = questions[index // 5]
        response = teacher_response(question, index, noise)
        while len(response) < CHARACTERS:
            other = teacher_response(rng.choice(questions), index, noise)
            analysis = other.partition("(System 2: Analytical)")[2].partition("</dx>")[0].strip()
            response = response.replace("</dx>", analysis + "\n</dx>")
        yield {
            "id": f"{question.id}-{index}",
            "question": question.question,
            "options": dict(question.options),
            "answer": question.answer,
            "response": response,
        }


def wrapped(dx: str, conclusion: str) -> str:
    dx = f"<dx>(System 1: Intuitive) Gout comes to mind.\n(System 2: Analytical) {dx}</dx>"
    return f"{dx}<conclusion>{conclusion} \\boxed{{A}}</conclusion>"


def adversarial(size: int) -> dict[str, str]:
    """Responses of about `size` characters that cost a careless parser dearly."""

    def fill(piece: str) -> str:
        return piece * (size // len(piece))

    return {
        "<dx> repeated": fill("<dx>"),
        "all four tags repeated": fill("<dx></dx><conclusion></conclusion>"),
        "one letter": fill("a"),
        "one space": fill(" "),
        "unclosed boxes": fill("\\boxed{"),
        "unclosed braces": "\\boxed" + fill("{"),
        "closing braces": fill("}"),
        "boxes over lines": fill("\\boxed{\n"),
        "less-than signs": fill("<"),
        "invalid UTF-8, replaced": fill("\ufffd"),
        "invalid UTF-8, surrogates": fill("\udcff"),
        "Chinese": fill("医"),
        "zero-width": fill("\u200b"),
        "System 1 repeated in dx": wrapped(fill("System 1 "), "tophi on the ear"),
        "headings repeated in dx": wrapped(fill("(System 1:"), "tophi on the ear"),
        "format with one letter": wrapped(fill("a"), "tophi on the ear"),
        "format with short words": wrapped(fill("ab "), fill("cd ")),
        "format with numbers": wrapped(fill("1,"), fill("1.")),
        "format with new words": wrapped(" ".join(f"{n:x}z" for n in range(size // 7)), "tophi on the ear"),
        "think and answer unclosed": "<think>" + fill("</think> ") + "</answer>",
        "answer with boxes": "<think>a</think><answer>" + fill("\\boxed{\n") + "}</answer>",
    }


def end_to_end(count: int, workers: int, tokenizer: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "responses.jsonl", Path(folder) / "scores.jsonl"
        rows = list(long_responses(count))
        if tokenizer:
            from tokenizers import Tokenizer

            encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
            encodings = encoder.encode_batch([str(row["response"]) for row in rows], add_special_tokens=False)
            for row, encoding in zip(rows, encodings, strict=True):
                row["token_ids"] = encoding.ids
            print(f"tokens a response: {sum(len(row['token_ids']) for row in rows) / count:.0f}")  # pyright: ignore[reportArgumentType]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        characters = sum(len(str(row["response"])) for row in rows) / count
        command = [sys.executable, "-m", "crpo_jax.score", "--responses", str(path), "--out", str(out)]
        command += [f"reward.workers={workers}", *(["--tokenizer", tokenizer] if tokenizer else [])]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True)
        took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        with open(out, encoding="utf-8") as lines:
            scored = sum(1 for _ in lines)
    by = "tokens" if tokenizer else "characters"
    print(
        f"{scored} responses of {characters:.0f} characters, {workers} workers, consistency by {by}: "
        f"{took:.2f} s, {scored / took:.0f} a second"
    )
    print(
        f"processor time {cpu:.2f} s in all, {1e6 * cpu / scored:.0f} microseconds a response; "
        "compare it where other work shares the machine"
    )


def worst_cases() -> None:
    question = vignettes("train", 1)[0]
    score_response(question, "warm", Reward())
    print(f"\n{'1 MB of':28}" + "".join(f"{design:>12}" for design in DESIGNS) + "   milliseconds")
    for name, response in adversarial(MEGABYTE).items():
        took = []
        for design in DESIGNS:
            start = time.perf_counter()
            score_response(question, response, Reward(design=design))
            took.append(1000 * (time.perf_counter() - start))
        print(f"{name:28}" + "".join(f"{value:12.1f}" for value in took))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--responses", type=int, default=10_000)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--tokenizer", metavar="DIR")
    args = p.parse_args()
    end_to_end(args.responses, args.workers, args.tokenizer)
    worst_cases()


if __name__ == "__main__":
    main()
