"""Teacher traces: reasoning and answer told apart, and converted into the dx / conclusion format of the cold start.

The conversion by rules is extractive: every sentence of the result is the teacher's own, in the teacher's order; only the
headings, the tags and the box are added, and tags, boxes and bare answer lines of the teacher's are taken out.
"""

import re
from dataclasses import dataclass, replace

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.rules import Score, score_response

MIN_PROSE = 12  # words; an answer with fewer is a verdict without its reasons
PART = 30  # words, and on to the end of the sentence, that System 1 takes of the opening, and the conclusion of the closing
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")
TAGS = re.compile(r"</?(?:dx|conclusion|think|answer)>")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Converted:
    """A response in the dx / conclusion format with its score under `crpo`; or None, and why there is none."""

    response: str | None
    why: str
    score: Score | None = None


def parted(content: str, reasoning: str = "") -> tuple[str, str] | None:
    """Reasoning and answer of a reply, whether the server parts them or the text holds <think>; None where the reasoning was cut off."""
    head, closed, tail = content.rpartition("</think>")
    if closed:
        return (reasoning + "\n\n" + head.replace("<think>", "")).strip(), tail.strip()
    return None if "<think>" in content else (reasoning.strip(), content.strip())


def answer_letter(answer: str, question: Question) -> tuple[str | None, str]:
    """The one option that an answer settles on, and why there is none: two statements that disagree are no answer."""
    letters = "".join(question.options)
    found = {text.strip() for text in BOXED.findall(answer)}
    plain = answer.replace("*", "")
    found |= set(
        re.findall(
            rf"(?i:\banswer|\boption|\bchoice)(?i:\s+is)?\s*:?\s*\(?([{letters}])\)?(?=[\s.,:;)]|$)(?=[^\n]{{0,80}}$)",
            plain,
        )
    )
    found |= set(re.findall(rf"(?i:\banswer)(?i:\s+is\s*:?|\s*:)\s*\(?([{letters}])\)?(?=[\s.,:;)]|$)", plain))
    found |= set(re.findall(rf"\A\W*([{letters}])\W*(?:\n|\Z)", plain))
    found |= set(re.findall(rf"\A\W*([{letters}])[).:]\s", plain))
    if not found:
        said = plain.strip(" .\n").lower()
        found = {letter for letter, text in question.options.items() if text.strip(" .").lower() == said}
    if len(found) != 1:
        return None, "no readable answer" if not found else f"several answers: {', '.join(sorted(found))}"
    (letter,) = found
    return (letter, "") if letter in question.options else (None, f"the answer {letter!r} is no option")


def extracted(question: Question, reasoning: str, answer: str, letter: str) -> tuple[str | None, str]:
    """The trace in the dx / conclusion format, by rules; None, and why, where it is too short to be parted.

    The conclusion is the prose of the teacher's answer; where that is a bare letter, it is the closing of the reasoning,
    moved, not copied. System 1 is the opening of the reasoning, System 2 the rest.
    """
    body, conclusion = paragraphs(plain_text(reasoning)), prose(plain_text(answer), question)
    if words(conclusion) < MIN_PROSE:
        last, body = closing(body, PART)
        conclusion = "\n\n".join([*last, *([conclusion] if words(conclusion) > 1 else [])])
    impression, analysis = opening(body, PART)
    if not impression or not analysis:
        return None, "the reasoning is too short to be parted into System 1 and System 2"
    first, second = "\n\n".join(impression), "\n\n".join(analysis)
    dx = f"<dx>\n(System 1: Intuitive) {first}\n(System 2: Analytical) {second}\n</dx>"
    return f"{dx}\n<conclusion>\n{conclusion} \\boxed{{{letter}}}\n</conclusion>", ""


def plain_text(text: str) -> str:
    """Without tags and boxes, and with no `System 1` that would read as a heading."""
    return re.sub(r"System (?=[12]\b)", "system ", TAGS.sub("", BOXED.sub(r"\1", text)))


def prose(answer: str, question: Question) -> str:
    """An answer without the lines that only name an option."""
    letters = "".join(question.options)
    bare = re.compile(rf"(?i:the\s+)?(?i:final\s+|correct\s+|best\s+)?(?i:answer|option)?(?i:\s+is)?\W*[{letters}]\W*")
    return "\n\n".join(text for text in paragraphs(answer) if not bare.fullmatch(text.replace("*", "")))


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def words(text: str) -> int:
    return len(WORD.findall(text))


def opening(parts: list[str], enough: int) -> tuple[list[str], list[str]]:
    """The first sentences of some paragraphs up to `enough` words, and the rest, both in paragraphs."""
    taken, rest = [], list(parts)
    while rest and words(" ".join(taken)) < enough:
        sentences, kept = SENTENCE.split(rest.pop(0)), []
        while sentences and words(" ".join([*taken, *kept])) < enough:
            kept.append(sentences.pop(0))
        taken.append(" ".join(kept))
        if sentences:
            rest.insert(0, " ".join(sentences))
    return taken, rest


def closing(parts: list[str], enough: int) -> tuple[list[str], list[str]]:
    """The last sentences of some paragraphs, at least `enough` words of them, and what stands before."""
    taken, rest = [], list(parts)
    while rest and words(" ".join(taken)) < enough:
        sentences, kept = SENTENCE.split(rest.pop()), []
        while sentences and words(" ".join([*taken, *kept])) < enough:
            kept.insert(0, sentences.pop())
        taken.insert(0, " ".join(kept))
        if sentences:
            rest.append(" ".join(sentences))
    return taken, rest


def checked(question: Question, response: str, settings: Reward) -> Converted:
    """A response as it stands, where the `crpo` reward finds the format and the right answer in it."""
    if "<|" in response:
        return Converted(None, "the trace spells a special token")
    score = score_response(question, response, replace(settings, design="crpo"))
    problems = score.why["format"] + ([] if score.accuracy else [score.why["answer"]])
    return Converted(None, "; ".join(problems), score) if problems else Converted(response, "", score)


def converted(question: Question, reasoning: str, answer: str, settings: Reward) -> Converted:
    """A trace by rules; one that has the format already stays as it is. Wrong answers are left out."""
    already = checked(question, answer, settings)
    if already.response is not None:
        return already
    letter, why = answer_letter(answer, question)
    if letter is None:
        return Converted(None, why)
    if letter != question.answer:
        return Converted(None, f"the answer is {letter}, {question.answer} is right")
    response, why = extracted(question, reasoning, answer, letter)
    return Converted(None, why) if response is None else checked(question, response, settings)
