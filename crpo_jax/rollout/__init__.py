"""Generates responses with any model that `crpo_jax.model` has, in training and on its own.

    >>> import jax
    >>> from crpo_jax.rollout import Sampling, load_engine
    >>> sampling = Sampling(temperature=0.8, top_p=0.95, stop_ids=(2, 7))
    >>> engine, weights = load_engine(folder, sampling, max_new_tokens=16, dtype="float32")
    >>> first, second = engine.generate(weights, [[11, 12, 13], [14]], key=jax.random.key(0), group=3, limits=[16, 4])
    >>> [response.sample for response in first]
    [0, 1, 2]
    >>> all(len(response.tokens) == len(response.logprobs) <= 4 for response in second)
    True

`folder` is a Hugging Face folder or hub id; prompts are token ids. A key draws the same tokens on every mesh, with any
`slots`, and in any order or selection of the prompts that keeps their numbers (`ids` of `Engine.generate`).
"""

from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine, Response, RolloutProgress, load_engine

__all__ = ["Engine", "Response", "RolloutProgress", "Sampling", "load_engine"]
