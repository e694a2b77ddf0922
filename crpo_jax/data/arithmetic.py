"""The second embedded world: word problems whose answer is a number, and a teacher that is wrong on purpose. No jax.

A problem says how many things somebody has at first and what happens then, and asks how many there are now. The numbers
and the order of events decide the split, so a held-out problem is never a reworded training one. All draws come from
`random.Random` with string seeds: the same on every machine and Python.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add, floordiv, mul, sub
from random import Random

from crpo_jax.data.question import Question, hash_fraction
from crpo_jax.errors import InputError

PROBLEM_SPLITS = ("train", "validation", "test")

LARGEST = 30
"""No number in a problem or in its right solution is larger."""

Event = tuple[str, int, int]
"""What happens, as its name in OPENINGS or LATER, and the two numbers of its sentence; 0 for one that it lacks."""

PEOPLE = (
    *("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo"),
    *("Iris", "Jack", "Kim", "Leo", "Mia", "Noah", "Paul"),
)
THINGS = (
    *("apples", "beads", "books", "cards", "coins", "eggs", "keys"),
    *("marbles", "nuts", "pens", "shells", "stamps", "stones"),
)
OPENINGS = {
    "stated": ("{a} has {m} {things}.", "{a} starts with {m} {things}.", "In the morning {a} counts {m} {things}."),
    "more": ("{b} has {m} {things}, {n} more than {a}.", "With {m} {things}, {b} has {n} more than {a}."),
    "fewer": ("{b} has {m} {things}, {n} fewer than {a}.", "With {m} {things}, {b} has {n} fewer than {a}."),
}
LATER = {
    "gain": ("{a} finds {m} more.", "Then {c} gives {m} to {a}.", "{a} wins another {m} in a game."),
    "loss": ("{a} gives {m} to {c}.", "{a} loses {m} on the way home.", "Then {c} takes {m} of them."),
    "packs": ("{a} buys {m} bags of {n}.", "{c} brings {m} boxes with {n} in each.", "{a} opens {m} packs of {n}."),
    "half": ("{a} sells half of them.", "{a} hands half of them to {c}.", "Half of them break."),
}
CALCULATIONS: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul, "/": floordiv}

ASK = "How many {things} does {a} have now?"


@dataclass(frozen=True)
class TeacherMistakes:
    """How often the teacher errs, each kind of error drawn independently; RL can learn what the teacher does not teach.

    Where a mistake would lead to less than nothing, or to half of an odd number, the teacher notices and makes none in
    this response.
    """

    comparison: float = 0.45  # of the problems that open with one: adds for "more than", subtracts for "fewer than"
    packs: float = 0.4  # of the bags: adds their number and what is in each, instead of multiplying
    slip: float = 0.02  # of the calculations: the result is one or ten off
    missing_part: float = 0.12  # of the responses: lacks one of MISSING_PARTS


TEACHER_MISTAKES = TeacherMistakes()

MISSING_PARTS = ("think end", "answer tags", "answer end", "box")


# ---- problems --------------------------------------------------------------------------------------------------------


def problems(split: str, count: int, seed: int = 0) -> list[Question]:
    """The first `count` problems of a split, no two alike; a larger count only adds at the end.

    `columns` holds what the text says: person, things, events.
    """
    if split not in PROBLEM_SPLITS:
        raise InputError(f"arithmetic: split: expected one of {', '.join(PROBLEM_SPLITS)}, got {split!r}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"arithmetic: count: expected a whole number of at least 1, got {count!r}")
    rng, questions, seen = Random(f"arithmetic {split} {seed}"), [], set[str]()
    while len(questions) < count:
        events = _draw_events(rng)
        text, person, things = _tell(rng, events)
        if split_of(events) != split or text in seen:
            continue
        seen.add(text)
        questions.append(
            Question(
                id=f"{split}-{len(questions):06d}",
                question=text,
                options={},
                answer=str(_solve(events)[-1][1]),
                source="arithmetic",
                split=split,
                columns={"person": person, "things": things, "events": [list(event) for event in events]},
                kind="number",
            )
        )
    return questions


def split_of(events: Sequence[Event]) -> str:
    """The split of all problems with these events, whoever they happen to: 8, 1 and 1 tenths."""
    tenth = int(10 * hash_fraction("arithmetic", repr(list(map(tuple, events)))))
    return PROBLEM_SPLITS[max(0, tenth - 7)]


def _draw_events(rng: Random) -> list[Event]:
    """An opening and two later events of different kinds, with no number above LARGEST."""
    while True:
        kind, m, n = rng.choice(list(OPENINGS)), rng.randint(6, 24), rng.randint(2, 9)
        events = [(kind, m, n if kind != "stated" else 0)]
        for later in rng.sample(list(LATER), 2):
            if later == "packs":
                events.append((later, rng.randint(2, 5), rng.randint(2, 5)))
            else:
                events.append((later, 0 if later == "half" else rng.randint(2, 9), 0))
        steps = _solve(events)
        if steps and all(0 < result <= LARGEST for _, result in steps):
            return events


def _tell(rng: Random, events: Sequence[Event]) -> tuple[str, str, str]:
    """A problem's text, whom it is about, and the things that are counted."""
    (a, b, c), things = rng.sample(PEOPLE, 3), rng.choice(THINGS)
    sentences = [
        rng.choice((OPENINGS | LATER)[kind]).format(a=a, b=b, c=c, m=m, n=n, things=things) for kind, m, n in events
    ]
    return " ".join([*sentences, ASK.format(a=a, things=things)]), a, things


# ---- solutions -------------------------------------------------------------------------------------------------------


def _solve(
    events: Sequence[Event], rng: Random | None = None, mistakes: TeacherMistakes = TEACHER_MISTAKES
) -> list[tuple[str, int]]:
    """The steps to the number asked for, as calculations and their results: right without `rng`, with it as wrong as
    `mistakes` says; empty where one would give no whole number of at least 0."""
    kind, x, n = events[0]
    steps: list[tuple[str, int]] = [] if kind != "stated" else [(str(x), x)]

    def errs(rate: float) -> bool:
        return rng is not None and rng.random() < rate

    def calculate(left: int, sign: str, right: int) -> int:
        result = CALCULATIONS[sign](left, right)
        if rng is not None and errs(mistakes.slip):
            result += rng.choice((-10, -1, 1, 10))
        steps.append((f"{left} {sign} {right} = {result}", result))
        return result

    if kind != "stated":
        x = calculate(x, "-" if (kind == "more") != errs(mistakes.comparison) else "+", n)
    for kind, m, n in events[1:]:
        if kind == "half":
            if x % 2:
                return []
            x = calculate(x, "/", 2)
        elif kind == "packs":
            x = calculate(x, "+", calculate(m, "+" if errs(mistakes.packs) else "*", n))
        else:
            x = calculate(x, "+" if kind == "gain" else "-", m)
    return steps if all(result >= 0 for _, result in steps) else []


def teacher_response(question: Question, seed: int, mistakes: TeacherMistakes = TEACHER_MISTAKES) -> str:
    """The teacher's calculations and answer, with the errors of `mistakes`; the same for the same question and seed."""
    rng, columns = Random(f"arithmetic teacher {seed} {question.id}"), question.columns
    events = [tuple(event) for event in columns["events"]]
    steps = _solve(events, rng, mistakes) or _solve(events)
    missing = rng.choice(MISSING_PARTS) if rng.random() < mistakes.missing_part else ""
    result = steps[-1][1]
    lines = [
        "<think>",
        f"{columns['person']} has {steps[0][0]}.",
        *(f"Then {calculation}." for calculation, _ in steps[1:]),
        *(["</think>"] if missing != "think end" else []),
        *(["<answer>"] if missing != "answer tags" else []),
        f"The answer is {result}." if missing == "box" else f"\\boxed{{{result}}}",
        *(["</answer>"] if missing not in ("answer tags", "answer end") else []),
    ]
    return "\n".join(lines)
