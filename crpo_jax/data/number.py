"""Numbers as people write them: commas, currency, percent, fractions, scientific notation, units, LaTeX. No jax.

Values are exact fractions. A text longer than LONGEST_NUMBER or with an exponent beyond LARGEST_EXPONENT is no number,
so that no text can cost more than microseconds.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST_NUMBER = 200  # characters
LARGEST_EXPONENT = 400

MULTIPLIERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
PREFIXES = {"k": ("kilo", 3), "": ("", 0), "d": ("deci", -1), "c": ("centi", -2), "m": ("milli", -3)}
PREFIXES |= {"u": ("micro", -6), "n": ("nano", -9), "p": ("pico", -12), "f": ("femto", -15)}
SCALED = {"g": ("gram", "gramme"), "l": ("liter", "litre"), "m": ("meter", "metre"), "mol": ("mole",), "eq": ()}
UNITS: dict[str, tuple[str, Fraction]] = {
    prefix + symbol: (symbol, Fraction(10) ** power) for symbol in SCALED for prefix, (_, power) in PREFIXES.items()
}
UNITS |= {
    long + name: (symbol, Fraction(10) ** power)
    for symbol, names in SCALED.items()
    for name in names
    for long, power in PREFIXES.values()
}
UNITS |= {"mcg": UNITS["ug"], "cc": UNITS["ml"], "pa": ("pa", Fraction(1)), "kpa": ("pa", Fraction(1000))}
UNITS |= {
    spelling: ("second", Fraction(seconds))
    for spellings, seconds in {
        "s sec second": 1, "min minute": 60, "h hr hour": 3600, "d day": 86_400, "wk week": 604_800,
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
UNITS |= {
    spelling: (unit, Fraction(1))
    for unit, spellings in {
        "month": "month mo", "year": "year yr", "mmhg": "mmhg", "degree": "degree °", "celsius": "°c celsius c",
        "fahrenheit": "°f fahrenheit f", "kelvin": "k kelvin", "dollar": "dollar usd", "euro": "euro eur",
        "pound sterling": "gbp", "lb": "lb pound", "iu": "iu", "unit": "unit u", "hz": "hz", "bpm": "bpm",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip
UNITS["cent"] = ("dollar", Fraction(1, 100))
"""By spelling, in the singular and in lower case: the base unit, and how many of it one is."""

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?!\d)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_POWER = r"\s?(?:\^|\*\*)\s?\(?(?P<power>[-+]?\d{1,4})\)?"
_CURRENCY = r"(?P<currency>(?:US|CA|AU)?[$€£¥₹])?\s?"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?{_CURRENCY}(?:"
    rf"(?P<wholes>\d+)\s(?P<part>\d+)\s?/\s?(?P<parts>\d+)"
    rf"|(?P<top>[-+]?{_DECIMAL})\s?/\s?(?P<bottom>[-+]?{_DECIMAL})"
    rf"|(?P<mantissa>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d{{1,4}})(?!\d)|\s?[x×*]\s?10{_POWER})?"
    rf")(?![\d,])\s?(?P<rest>[^\d].*)?",
    re.ASCII | re.DOTALL,
)
POWER_OF_TEN = re.compile(rf"([-+]?)10{_POWER}", re.ASCII)
UNIT_WORD = re.compile(r"(°?[^\W\d_]{0,30}|%)\^?([23])?\.?")
LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]+)\}|(\d))\s?(?:\{([^{}]+)\}|(\d))")
LATEX_SPACE = re.compile(r"\\[,;: ]|~")
LEFT_SIDE = re.compile(r"^\s*[A-Za-z]\s*=\s*")  # of "x = 5"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


@dataclass(frozen=True)
class Number:
    """A number as written, and its unit: `scale` of the base unit `unit`, "" for none."""

    value: Fraction
    unit: str = ""
    scale: Fraction = Fraction(1)


PERCENT = ("%", Fraction(1, 100))


def read_number(text: str) -> Number | None:
    """The number that the whole text is, with at most a unit after it; None for any other text."""
    if len(text) > LONGEST_NUMBER:
        return None
    plain = plain_notation(text)
    match = NUMBER.fullmatch(plain)
    if power := POWER_OF_TEN.fullmatch(plain):
        value = power_of_ten(power["power"])
        return None if value is None else Number(-value if power[1] == "-" else value)
    value = value_of(match) if match else None
    if match is None or value is None:
        return None
    unit, scale = CURRENCIES.get((match["currency"] or "")[-1:], ""), Fraction(1)
    if rest := (match["rest"] or "").strip().rstrip("."):
        word, _, after = rest.partition(" ")
        if word.lower() in MULTIPLIERS:
            value, rest = value * MULTIPLIERS[word.lower()], after.strip()
    if rest:
        named = read_unit(rest)
        if named is None or (unit and named[0] != unit):
            return None
        unit, scale = named
    return Number(value, unit, scale)


def plain_notation(text: str) -> str:
    """The text without LaTeX, and with ASCII for other spellings of digits, fractions, powers, minus and spaces."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    text = LEFT_SIDE.sub("", text.removeprefix(r"\(").removesuffix(r"\)"))
    text = LATEX_TEXT.sub(r" \1 ", text.replace(r"\!", "").replace("{,}", ",")).replace(" ^", "^")
    text = LATEX_SPACE.sub(" ", text.replace(r"\$", "$").replace(r"\%", "%"))
    text = LATEX_FRACTION.sub(lambda parts: f" {parts[1] or parts[2]}/{parts[3] or parts[4]} ", text)
    text = re.sub(r"\\times|\\cdot", "×", re.sub(r"\^\{([-+\d]+)\}", r"^\1", text))
    text = re.sub(r"\^?\{?\\(?:circ|degree)\}?", "°", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda power: "^" + power[0].translate(SUPERSCRIPTS), text)
    text = "".join(f" {spelled} " if "⁄" in (spelled := unicodedata.normalize("NFKC", char)) else char for char in text)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("µ", "u").replace("μ", "u")
    return re.sub(r"^([-+]) +", r"\1", " ".join(re.sub("[−–‐‑]", "-", text).split()))


def value_of(match: re.Match[str]) -> Fraction | None:
    def decimal(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))

    sign = -1 if match["sign"] == "-" else 1
    top, bottom = match["top"], match["bottom"]
    if match["wholes"]:
        bottom, top = match["parts"], str(int(match["wholes"]) * int(match["parts"]) + int(match["part"]))
    if bottom:
        return sign * decimal(top) / decimal(bottom) if decimal(bottom) else None
    power = power_of_ten(match["exponent"] or match["power"] or "0")
    return None if power is None else sign * decimal(match["mantissa"]) * power


def power_of_ten(exponent: str) -> Fraction | None:
    return Fraction(10) ** int(exponent) if abs(int(exponent)) <= LARGEST_EXPONENT else None


def read_unit(text: str) -> tuple[str, Fraction] | None:
    """The base unit that a text names, and its scale; None where it names no unit.

    A word that is not in UNITS is a unit of its own ("18 apples") if it has three letters or more: shorter ones are
    variables ("5x") or begin another statement ("18 or 19").
    """
    if text in CURRENCIES:
        return CURRENCIES[text], Fraction(1)
    text = re.sub(r"\s*(?:\bper\b|/)\s*", "/", text.lower())
    if text in ("%", "percent", "per cent", "/cent"):
        return PERCENT
    bases, scale = [], Fraction(1)
    for place, part in enumerate(text.split("/")):
        words = []
        for word in part.replace("-", " ").split():
            match = UNIT_WORD.fullmatch(word)
            if match is None:
                return None
            name = match[1] if match[1] in UNITS else match[1].removesuffix("s")
            base, factor = UNITS.get(name, (name, Fraction(1)))
            if name not in UNITS and len(match[1]) < 3 and not (match[1] == "of" and words):
                return None
            power = int(match[2] or 1)
            scale *= factor ** (power if place == 0 else -power)
            words.append(base + (match[2] or ""))
        bases.append(" ".join(words))
    return ("/".join(bases), scale) if any(bases) else None


def same_number(given: Number, right: Number, tolerance: float) -> bool:
    """Whether two numbers differ by at most `tolerance` times the right one.

    Units are compared where both have one, 1.5 g with 1500 mg as well; where one has none they do not count. Where only
    one is a percentage, it may be meant either way: 50% is 50 and 0.5.
    """
    if given.unit and right.unit:
        if given.unit != right.unit:
            return False
        return is_close(given.value * given.scale, right.value * right.scale, tolerance)
    close = is_close(given.value, right.value, tolerance)
    if "%" in (given.unit, right.unit):
        close |= is_close(given.value * given.scale, right.value * right.scale, tolerance)
    return close


def is_close(given: Fraction, right: Fraction, tolerance: float) -> bool:
    return abs(given - right) <= Fraction(tolerance) * abs(right)
