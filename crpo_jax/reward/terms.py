"""The terms of a text: content words, lightly stemmed, and numbers with their units; and which of them are adjacent.

Terms are lower-cased. Stop words, the words of the prompt's own frame and the words common to any case and any argument
("patient", "presents", "most likely", "suggests") are no terms: repeating them cites nothing. Nor are single letters
and single digits, since they name options and number lists.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

# The words of the `crpo` instruction, and what the paper calls the parts of a response: copying them is neither content
# nor citation. They are frozen: a change of a prompt must not change what responses earn.
_FRAME_WORDS = """
    1 2 analysis analytical answer answers best box boxed candidate candidates case check choice clinical come
    conclusion decide deliberate diagnoses diagnosis dx each ending english exactly experienced fact facts finding
    findings first fits give hypotheses hypothesis immediate impression impressions inside intuitive leads letter
    matter mind multiple nothing option options outside pattern physician presentation question recognition response
    rules sections shape single speaks system tag tested turn use whole work write
"""
_FUNCTION_WORDS = """
    a about above after again all also although am among an and any are aren't as at be because been before being
    below between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down due during
    either else even ever few for from further get gets given had hadn't has hasn't have haven't having he her here
    hers herself him himself his how however i if in instead into is isn't it it's its itself just less let like
    made make makes many may me might more most much must my neither no none nor not now of off often on once one
    only onto or other others our out over own per quite rather same shall she should shouldn't since so some still
    such than that that's the their theirs them themselves then there thereby therefore these they this those though
    through thus to together too toward towards two under unless until up upon us very via was wasn't we well were
    weren't what when where whereas whether which while who whom whose why will with within without won't would
    wouldn't yet you your
"""
_WORDS_OF_ARGUMENT = """
    accordingly account accounts agree agrees appropriate argue argues best better bring brings cause caused causes
    choice choose clear clearly compatible conclude concluded consider considered considering consistent correct
    definitive expect expected explain explained explains explanation fit fits following hence identified indicate
    indicated indicates indicating initial know known leading likely mean means mechanism next note noted notably
    point pointing points possible possibly present probable probably question reason reasoning reject rejected
    represent represents result rule ruled rules see seem seems seen show showed showing shown shows significant
    specific step strongly suggest suggested suggesting suggestive suggests suit suits summary support supported
    supporting supports take taken think thought typical typically underlying unlikely weigh wrong
"""
_WORDS_OF_ANY_CASE = """
    admitted aged ago boy brought care chief clinic come comes complaining complains complaint concern concerned
    current currently denies department describe described describes emergency evaluation exam examination female
    girl history hospital include included includes including information laboratory limits male man management
    medical medication medications men normal notable office old otherwise past patient patients person physical
    physician presentation presented presenting presents previously provider record records referred remainder
    remarkable report reported reports reveal revealed reveals room several similar studies study takes taking today
    unremarkable vital woman women
"""
FRAME = frozenset(_FRAME_WORDS.split())
STOP_WORDS = FRAME.union(_FUNCTION_WORDS.split(), _WORDS_OF_ARGUMENT.split(), _WORDS_OF_ANY_CASE.split())

UNIT_SPELLINGS = {
    "%": "%", "percent": "%", "°": "°", "°c": "°c", "°f": "°f", "c": "°c", "f": "°f", "℃": "°c", "℉": "°f",
    "degrees": "°", "mmhg": "mmhg", "mm": "mm", "cm": "cm", "m": "m", "µm": "um", "kg": "kg", "g": "g", "mg": "mg",
    "µg": "ug", "mcg": "ug", "ug": "ug", "ng": "ng", "pg": "pg", "l": "l", "dl": "dl", "ml": "ml", "fl": "fl",
    "cc": "ml", "mmol": "mmol", "meq": "meq", "iu": "iu", "units": "unit", "unit": "unit", "u": "unit", "lb": "lb",
    "lbs": "lb", "pounds": "lb", "bpm": "/min", "beats": "/min", "breaths": "/min", "ms": "ms", "hz": "hz",
    "seconds": "second", "second": "second", "sec": "second", "minutes": "minute", "minute": "minute",
    "min": "minute", "hours": "hour", "hour": "hour", "hrs": "hour", "hr": "hour", "h": "hour", "days": "day",
    "day": "day", "weeks": "week", "week": "week", "months": "month", "month": "month", "years": "year",
    "year": "year", "yrs": "year", "yr": "year", "packs": "pack", "pack": "pack", "times": "times",
}  # fmt: skip

# Bounded repeats and literals only: no text is scanned twice, and no token is long enough to bloat `term_of`'s cache.
_DIVISORS = "dl|ml|l|µl|ul|mm3|mm³|mm\\^3|min|minute|hr|hour|h|day|d|kg|m2|m²|sec|s|hpf|lpf|week|month|year|cm|g"
_PER = rf"[a-zµ]{{0,6}}/(?:{_DIVISORS})"
_UNIT = "|".join(map(re.escape, sorted(UNIT_SPELLINGS, key=len, reverse=True)))
TOKEN = re.compile(
    r"[a-z]{1,64}+(?![\w'’])"  # nearly every word; the third line matches it too, at a third of the speed
    r"|[.,;:!?()\[\]{}\n]"
    r"|[^\W\d_][^\W_]{0,63}(?:['’][^\W\d_]{1,8})?"
    rf"|\d{{1,20}}(?:[.,/]\d{{1,20}}){{0,4}}(?:[ \-\u00a0\u2009]?(?:{_PER}|mm[ ]hg|{_UNIT})(?![^\W_]))?"
)

BREAK = "|"  # stands for punctuation: the words on its two sides are not adjacent
PUNCTUATION = frozenset(".,;:!?()[]{}\n")


@lru_cache(maxsize=1 << 17)
def term_of(token: str) -> str:
    """The term of one token: "" for a stop word, BREAK for punctuation."""
    if token in PUNCTUATION:
        return BREAK
    if token[0].isdecimal():
        return quantity_of(token)
    word = token.replace("’", "'")
    bare = word.removesuffix("'s")
    return "" if word in STOP_WORDS or bare in STOP_WORDS or len(bare) == 1 else stem(bare)


def quantity_of(token: str) -> str:
    """A number without thousands commas, and its unit in one spelling: "12,000/mm³" and "12000 /mm3" are the same."""
    end = next((at for at, char in enumerate(token) if not (char.isdecimal() or char in ".,/")), len(token))
    if token[:end].endswith("/"):  # the slash of "90/min" belongs to the unit
        end -= 1
    number, unit = token[:end].replace(",", ""), token[end:].strip(" -\u00a0\u2009")
    if not unit:
        return number if len(number) > 1 else ""
    unit = unit.replace(" ", "")
    plain = unit.replace("³", "3").replace("²", "2").replace("^", "").replace("µ", "u")
    return f"{number} {UNIT_SPELLINGS.get(unit, plain)}"


def has_unit(term: str) -> bool:
    return " " in term


def stem(word: str) -> str:
    """Plural, -ing and -ed endings and a final e off, so that "radiates", "radiating" and "radiated" are one term.

    Light on purpose: "-itis", "-osis" and "-ous" stay whole, since a disease is not the organ it is named after.
    """
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif word.endswith(("sses", "xes", "ches", "shes", "zes")):
        word = word[:-2]
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) >= len(ending) + 4:
            word = word[: -len(ending)]
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if len(word) > 4 and word.endswith("e") else word


@dataclass(frozen=True, slots=True)
class Terms:
    """A text's words as written (lower-cased), and term by token: "" for a stop word, BREAK for punctuation."""

    words: list[str]
    by_token: list[str]

    def in_order(self) -> list[str]:
        """The terms in order, with repeats."""
        return [term for term in self.by_token if term and term != BREAK]

    def lines(self) -> str:
        """The terms and BREAKs, one to a line: two terms with at most stop words between them are on adjacent lines."""
        return "\n".join(["", *filter(None, self.by_token), ""])

    def adjacent_pairs(self) -> list[tuple[str, str, bool]]:
        """Adjacent terms in order, and whether a stop word stands between them; punctuation separates terms."""
        pairs, last, apart = [], BREAK, False
        for term in self.by_token:
            if not term:
                apart = True
                continue
            if last != BREAK and term != BREAK:
                pairs.append((last, term, apart))
            last, apart = term, False
        return pairs


def read_terms(text: str) -> Terms:
    # the Greek mu becomes the micro sign: one spelling of micro
    tokens = TOKEN.findall(text.lower().replace("\u03bc", "\u00b5"))
    return Terms([token for token in tokens if token not in PUNCTUATION], [*map(term_of, tokens)])
