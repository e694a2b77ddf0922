"""Teacher traces: reasoning and answer separated, and converted into the dx / conclusion format of the cold start.

The conversion by rules is extractive: every sentence of the result is the teacher's own, in the teacher's order; only
headings, tags and the box are added, and the teacher's own tags, boxes and bare answer lines are removed.
"""

import re
from dataclasses import dataclass, replace

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.answer import find_answer, is_right, without_marks, write_answer
from crpo_jax.reward.rules import Score, score_response

MIN_PROSE = 12  # words; a shorter answer is a verdict without its reasons
SECTION_WORDS = 30  # at least: System 1, from the start of the reasoning, and a conclusion from its end
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")
TAGS = re.compile(r"</?(?:dx|conclusion|think|answer)>")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Conversion:
    """A response in the dx / conclusion format with its `crpo` score; or None and the reason."""

    response: str | None
    reason: str
    score: Score | None = None


CUT_OFF = Conversion(None, "the reasoning was cut off")


def split_reasoning(content: str, reasoning: str = "") -> tuple[str, str] | None:
    """Reasoning and answer of a reply, sent apart or as <think> in the text; None if the reasoning was cut off."""
    head, closed, tail = content.rpartition("</think>")
    if closed:
        return (reasoning + "\n\n" + head.replace("<think>", "")).strip(), tail.strip()
    return None if "<think>" in content else (reasoning.strip(), content.strip())


def read_answer(answer: str, question: Question, settings: Reward) -> tuple[str | None, str]:
    """What a teacher's answer settles on, or None and the reason."""
    if question.kind == "choice":
        return find_answer_letter(answer, question)
    found, reason = find_answer(answer, question, settings)
    return found, reason if found is None else ""


def is_right_answer(found: str | None, question: Question, settings: Reward) -> bool:
    """Whether it is right; any is, where nothing says which one would be."""
    return question.kind == "none" or is_right(question, found, settings)


def find_answer_letter(answer: str, question: Question) -> tuple[str | None, str]:
    """The one option that an answer settles on, or None and the reason: two statements that disagree are no answer."""
    options = "".join(question.options)
    plain = answer.replace("*", "")
    end = r"\)?(?=[\s.,:;)]|$)"
    statements = (
        rf"(?i:\banswer|\boption|\bchoice)(?i:\s+is)?\s*:?\s*\(?([{options}]){end}(?=[^\n]{{0,80}}$)",
        rf"(?i:\banswer)(?i:\s+is\s*:?|\s*:)\s*\(?([{options}]){end}",
        rf"\A\W*([{options}])\W*(?:\n|\Z)",
        rf"\A\W*([{options}])[).:]\s",
    )
    letters = {text.strip() for text in BOXED.findall(answer)}
    letters |= {letter for statement in statements for letter in re.findall(statement, plain)}
    if not letters:
        text = plain.strip(" .\n").lower()
        letters = {letter for letter, option in question.options.items() if option.strip(" .").lower() == text}
    if len(letters) != 1:
        return None, "no readable answer" if not letters else f"several answers: {', '.join(sorted(letters))}"
    (letter,) = letters
    return (letter, "") if letter in question.options else (None, f"the answer {letter!r} is no option")


def explain_wrong_answer(answer: str, question: Question, settings: Reward) -> str:
    """Why an answer is not right; empty if it is."""
    found, reason = read_answer(answer, question, settings)
    if is_right_answer(found, question, settings):
        return ""
    return reason or f"the answer is {found}, {question.answer} is right"


def rearrange_trace(question: Question, reasoning: str, answer: str, settings: Reward) -> tuple[str | None, str]:
    """The sentences of a trace with the right answer in the dx / conclusion format, or None and the reason.

    System 1 is the start of the reasoning, System 2 the rest. The conclusion is the prose of the teacher's answer; if
    that is a bare letter, the end of the reasoning moves there.
    """
    reasoning, answer = (plain_text(without_marks(text, settings)) for text in (reasoning, answer))
    body, conclusion = paragraphs(reasoning), answer_prose(answer, question)
    if word_count(conclusion) < MIN_PROSE:
        last, body = take_sentences(body, SECTION_WORDS, from_end=True)
        conclusion = "\n\n".join([*last, *([conclusion] if word_count(conclusion) > 1 else [])])
    impression, analysis = take_sentences(body, SECTION_WORDS)
    if not impression or not analysis:
        return None, "the reasoning is too short to be split into System 1 and System 2"
    first, second = "\n\n".join(impression), "\n\n".join(analysis)
    dx = f"<dx>\n(System 1: Intuitive) {first}\n(System 2: Analytical) {second}\n</dx>"
    end = "" if question.kind == "none" else " " + write_answer(question.answer, settings)
    return f"{dx}\n<conclusion>\n{conclusion}{end}\n</conclusion>", ""


def plain_text(text: str) -> str:
    """Without tags and boxes, and with no `System 1` that would read as a heading."""
    return re.sub(r"System (?=[12]\b)", "system ", TAGS.sub("", BOXED.sub(r"\1", text)))


def answer_prose(answer: str, question: Question) -> str:
    """An answer without the lines that only name an option."""
    if not question.options:
        return answer
    options = "".join(question.options)
    bare = re.compile(rf"(?i:the\s+)?(?i:final\s+|correct\s+|best\s+)?(?i:answer|option)?(?i:\s+is)?\W*[{options}]\W*")
    return "\n\n".join(text for text in paragraphs(answer) if not bare.fullmatch(text.replace("*", "")))


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def word_count(text: str) -> int:
    return len(WORD.findall(text))


def take_sentences(parts: list[str], enough: int, from_end: bool = False) -> tuple[list[str], list[str]]:
    """The first (or last) sentences of some paragraphs, at least `enough` words, and the rest, both in paragraphs."""
    order = -1 if from_end else 1
    taken, rest = [], parts[::order]
    while rest and word_count(" ".join(taken)) < enough:
        sentences, part = SENTENCE_BREAK.split(rest.pop(0))[::order], []
        while sentences and word_count(" ".join([*taken, *part])) < enough:
            part.append(sentences.pop(0))
        taken.append(" ".join(part[::order]))
        if sentences:
            rest.insert(0, " ".join(sentences[::order]))
    return taken[::order], rest[::order]


def validate_response(question: Question, response: str, settings: Reward) -> Conversion:
    """The response unchanged if the `crpo` reward accepts its format and its answer is right."""
    if "<|" in response:
        return Conversion(None, "the trace spells a special token")
    score = score_response(question, response, replace(settings, design="crpo"))
    problems = score.why["format"] + ([score.why["answer"]] if score.accuracy == 0 else [])
    return Conversion(None, "; ".join(problems), score) if problems else Conversion(response, "", score)


def convert_trace(question: Question, reasoning: str, answer: str, settings: Reward) -> Conversion:
    """Converts a trace with the right answer by rules; an answer in the dx / conclusion format stays as it is."""
    formatted = validate_response(question, answer, settings)
    if formatted.response is not None:
        return formatted
    if reason := explain_wrong_answer(answer, question, settings):
        return Conversion(None, reason)
    response, reason = rearrange_trace(question, reasoning, answer, settings)
    return Conversion(None, reason) if response is None else validate_response(question, response, settings)
