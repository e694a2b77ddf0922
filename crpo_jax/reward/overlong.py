"""DAPO's soft overlong punishment: less reward for a response that comes close to the longest allowed."""

from dataclasses import replace

from crpo_jax.config import Reward
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.rules import Score

OVERLONG = "overlong"
"""Its name among the components of a score."""


def overlong_punishment(tokens: int, longest: int, share: float) -> float:
    """Equation 13 of arXiv 2503.14476: 0 up to `longest` - cache tokens, then linear, -1 from `longest` tokens on.

    `tokens` are the response's with its stop token, and cache is `share` of `longest`.
    """
    cache = share * longest
    return max(-1.0, min(0.0, (longest - cache - tokens) / cache))


def punish_overlong(scored: Score | Failure, tokens: int, longest: int, settings: Reward) -> Score | Failure:
    """The score with the punishment as a component of its own, weighted by reward.overlong; unchanged where that is
    0."""
    if not settings.overlong or isinstance(scored, Failure):
        return scored
    punishment = overlong_punishment(tokens, longest, settings.overlong_share)
    weights = scored.why.get("weights", dict.fromkeys(scored.components, 1.0)) | {OVERLONG: settings.overlong}
    return replace(
        scored,
        total=scored.total + settings.overlong * punishment,
        components=scored.components | {OVERLONG: punishment},
        why=scored.why | {"weights": weights},
    )
