"""Answers as texts, in one spelling each: case, spacing, articles, punctuation and notation do not tell them apart."""

import re
import unicodedata

from crpo_jax.data.number import LATEX_TEXT, read_number, same_number

# The letter of "hepatitis A virus" and "vitamin A" is no article: within a text an article is lower-case and not last.
ARTICLES = re.compile(r"^(?:[Aa]n?|[Tt]he|AN|THE)\s+(?=\S)|(?<=\s)(?:an?|the)\s+(?=\S)")
SEPARATORS = re.compile(r"(?<=\S)[-_/\u2010-\u2015]|[-_/\u2010-\u2015](?!\d)")  # other punctuation joins what it parts
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
PUNCTUATION = re.compile(r"(?!(?<!\S)-\d)(?:(?<!\d)[^\w\s+]|[^\w\s+](?!\d))")  # but the point of 1.5, -1, HER2+
WORD = re.compile(r"[^\W\d_]\.?[^\W\d_]")  # also of "U.S."
NOTATION = re.compile(r"[\\^=<>{}|]")

LATEX_SPELLINGS = {
    r"\left": "", r"\right": "", r"\!": "", r"\,": "", r"\;": "", r"\:": "", r"\ ": "", "~": "", r"\$": "", r"\%": "",
    "$": "", "%": "", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"^{\circ}": "", r"^\circ": "",
    r"^\degree": "", "°": "", r"\cdot": "*", r"\times": "*", r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq",
    "−": "-",
}  # fmt: skip
LATEX_TOKEN = re.compile(r"\\[A-Za-z]+|\^\{\\circ\}|\^\\circ|\^\\degree|\\.|.", re.DOTALL)
ONE_SYMBOL = re.compile(r"(\\frac|\\sqrt|[_^])([0-9A-Za-z])")
SECOND_SYMBOL = re.compile(r"(\\frac\{[^{}]*\})([0-9A-Za-z])")
SLASHED = re.compile(r"(?<![\w}])(\d+)/(\d+)(?![\w{])")
LEFT_SIDE = re.compile(r"^[A-Za-z](?:=|\\in)")


def same_text(given: str, right: str) -> bool:
    """Whether two texts are one answer: compared as numbers where both are, notation as LaTeX, all else as prose."""
    numbers = read_number(given), read_number(right)
    if numbers[0] and numbers[1]:
        return same_number(numbers[0], numbers[1], tolerance=0)
    given, right = (LATEX_TEXT.sub(r"\1", text.strip().strip("$")).strip() for text in (given, right))
    normalize = normalize_latex if NOTATION.search(right) or not WORD.search(right) else normalize_prose
    return normalize(given) == normalize(right)


def normalize_prose(text: str) -> str:
    """Lower case, without articles and punctuation, with single spaces, nearly as SQuAD (arXiv 1606.05250) and TriviaQA
    (arXiv 1705.03551) compare answers; numbers keep their points and signs."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("\u2212", "-").split())
    text = ARTICLES.sub("", THOUSANDS.sub("", text)).casefold()
    return " ".join(PUNCTUATION.sub("", SEPARATORS.sub(" ", text)).split()) or text


def normalize_latex(text: str) -> str:
    """One spelling, without spaces, sizes, dollars and degrees, much as the grader of MATH (arXiv 2103.03874)."""
    text = LATEX_TOKEN.sub(lambda token: LATEX_SPELLINGS.get(token[0], token[0]), text)
    text = LEFT_SIDE.sub("", SLASHED.sub(r"\\frac{\1}{\2}", "".join(text.split())))
    return SECOND_SYMBOL.sub(r"\1{\2}", ONE_SYMBOL.sub(r"\1{\2}", text)).rstrip(".")
