"""Numbers as people write them, and when two of them are one answer."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpo_jax.data.number import LONGEST_NUMBER, read_number, same_number

VALUES = [
    ("18", 18), ("-5", -5), ("−5", -5), ("+5", 5), ("- 5", -5), ("18.", 18), (".5", Fraction(1, 2)), ("007", 7),
    ("1,234,567", 1234567), ("-1,234.50", Fraction(-2469, 2)), ("1 000 000", 1000000), ("1\u202f000", 1000),
    (r"1{,}000", 1000), (r"1\,000", 1000), ("１２", 12),
    ("$18", 18), ("$ 1,200.00", 1200), ("US$5", 5), ("€5", 5), ("5 €", 5), (r"\$18", 18), ("$18$", 18), ("-$5", -5),
    ("50%", 50), (r"50\%", 50), ("50 percent", 50),
    ("1/2", Fraction(1, 2)), ("-3/4", Fraction(-3, 4)), (r"\frac{1}{2}", Fraction(1, 2)), (r"\dfrac12", Fraction(1, 2)),
    (r"-\frac{3}{4}", Fraction(-3, 4)), (r"\frac{-3}{4}", Fraction(-3, 4)), ("½", Fraction(1, 2)),
    ("2 1/2", Fraction(5, 2)), ("-2 1/2", Fraction(-5, 2)), (r"2\frac{1}{2}", Fraction(5, 2)), ("2½", Fraction(5, 2)),
    ("1e3", 1000), ("1.5E-3", Fraction(3, 2000)), ("1.5 x 10^3", 1500), ("1.5×10⁻³", Fraction(3, 2000)),
    (r"1.5 \times 10^{3}", 1500), ("10^5", 100000), ("10⁵", 100000), ("-10^2", -100), ("2*10**3", 2000),
    ("5 mg", 5), ("5mg", 5), (r"5\text{ mg}", 5), (r"12\text{ cm}^2", 12), ("45^\\circ", 45), ("37 °C", 37),
    ("1.5 million", 1500000), ("$2 million dollars", 2000000), ("18 apples", 18), ("3 eggs per day", 3), ("x = 5", 5),
]  # fmt: skip

NO_NUMBERS = [
    "", " ", "$", "%", "mg", "nan", "inf", "-inf", "Infinity", "NaN", "1/0", "0/0", "1e401", "1e99999", "10^9999999",
    "9" * (LONGEST_NUMBER + 1), "1,23", "12,34,5", "1,000,00", "12,5", "1.2.3", "--5", "5x", "18 or 19", "18-20",
    "3:30", "1/2/3", "(5", "5)", "٣", "0x10", "1_000", "five", "about 5", "5 6", "$5 €", "1e", "2^10", r"2\pi",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values(text, value):
    number = read_number(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_texts_that_are_no_numbers(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("given", "right", "tolerance", "same"),
    [
        ("1500 mg", "1.5 g", 0, True),
        ("1.5 g", "1.5 mg", 0, False),
        ("5", "5 mg", 0, True),
        ("5 mg", "5", 0, True),
        ("5 mg/dl", "50 mg/L", 0, True),
        ("90 minutes", "1.5 hours", 0, True),
        ("5 apples", "5 apple", 0, True),
        ("5 apples", "5 pears", 0, False),
        ("$5", "5 dollars", 0, True),
        ("50 cents", "$0.50", 0, True),
        ("$5", "€5", 0, False),
        ("50%", "0.5", 0, True),
        ("50%", "50", 0, True),
        ("0.5", "50%", 0, True),
        ("50%", "5", 0, False),
        ("0.5%", "50%", 0, False),
        ("37 °C", "37 °F", 0, False),
        ("0.333", "1/3", 0, False),
        ("0.333", "1/3", 0.01, True),
        ("0.329", "1/3", 0.01, False),
        ("101", "100", 0.01, True),
        ("101.01", "100", 0.01, False),
        ("0", "0", 0, True),
        ("1e-300", "0", 0.5, False),
        ("10000001", "10000000", 0, False),
    ],
)
def test_equal_numbers(given, right, tolerance, same):
    first, second = read_number(given), read_number(right)
    assert first is not None
    assert second is not None
    assert same_number(first, second, tolerance) == same


@given(st.text(alphabet="0123456789.,/ -+eEx×^{}\\frac$%°½²mg", max_size=40) | st.text(max_size=40))
def test_any_text_is_a_number_or_none(text):
    number = read_number(text)
    assert number is None or same_number(number, number, 0)


@given(st.integers(-(10**30), 10**30), st.integers(0, 6))
def test_written_numbers_read_back_the_same(whole, places):
    number = read_number(f"{whole:,}.{'5' * places}")
    assert number is not None
    sign = -1 if str(whole).startswith("-") else 1
    assert number.value == whole + sign * Fraction(int("0" + "5" * places), 10**places)
