"""What several attempts at a question are worth: pass@k and majority@k, exact for any number of samples.

Both are expectations over k of a question's n samples, drawn without order. So they use all samples, and for k = 1 both
are the accuracy.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb

from crpo_jax.config import Reward
from crpo_jax.data.number import read_number
from crpo_jax.data.question import Question
from crpo_jax.reward.answer import is_right
from crpo_jax.reward.answer_text import normalize_prose


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The probability that one of k samples is right: the unbiased estimator of Chen et al. (arXiv 2107.03374,
    equation 1)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def vote_of(question: Question, answer: str | None, settings: Reward) -> str | None:
    """What an answer votes for: the right answer in all its spellings is one, and so is a wrong one in most of them."""
    if answer is None or question.kind == "choice":
        return answer
    if is_right(question, answer, settings):
        return question.answer
    number = read_number(answer) if question.kind == "number" else None
    return f"{number.value} {number.unit}".strip() if number else normalize_prose(answer)


def majority_vote(votes: Sequence[str | None]) -> str | None:
    """The most frequent answer, ties to the first; an unreadable answer has no vote."""
    counts = Counter(vote for vote in votes if vote is not None)
    return max(counts, key=lambda vote: counts[vote], default=None)  # a Counter keeps the order of arrival


def majority_at_k(votes: Sequence[str | None], right: str, k: int) -> float:
    """The probability that the most frequent answer of k samples is the right one.

    Of equally frequent answers each wins with the same probability, as the first of a random order does.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    wrong = tuple(sorted(count for vote, count in counts.items() if vote != right))
    return expected_majority(counts[right], wrong, len(votes) - counts.total(), k)


@lru_cache(maxsize=65536)
def expected_majority(right: int, wrong: tuple[int, ...], unreadable: int, k: int) -> float:
    """`majority_at_k` by the numbers of right, of equal wrong, and of unreadable answers.

    The ways to draw k samples are summed over the number of right ones among them: of the wrong answers that are
    frequent enough to rival these none may stand in the draw more often, and the others may be drawn in any way.
    """
    ways = Fraction(0)
    for drawn_right in range(1, min(right, k) + 1):
        rest, free = k - drawn_right, unreadable + sum(count for count in wrong if count < drawn_right)
        draws = {(0, 0): 1}  # the number of ways by how many rivals tie and how many samples they have
        for count in (count for count in wrong if count >= drawn_right):
            longer: Counter[tuple[int, int]] = Counter()
            for (ties, drawn), number in draws.items():
                for more in range(min(drawn_right, rest - drawn) + 1):
                    longer[ties + (more == drawn_right), drawn + more] += number * comb(count, more)
            draws = dict(longer)
        for (ties, drawn), number in draws.items():
            ways += Fraction(comb(right, drawn_right) * number * comb(free, rest - drawn), ties + 1)
    return float(ways / comb(right + sum(wrong) + unreadable, k))
