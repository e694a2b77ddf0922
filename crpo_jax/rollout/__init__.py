"""Sampling from Qwen2 and Qwen2.5, in training and on its own.

    >>> import jax
    >>> from crpo_jax.rollout import Sampling, load
    >>> how = Sampling(temperature=0.8, top_p=0.95, stop_ids=(2, 7))
    >>> engine, weights = load(folder, how, max_new_tokens=16, dtype="float32")
    >>> first, second = engine.generate(weights, [[11, 12, 13], [14]], key=jax.random.key(0), group=3, limits=[16, 4])
    >>> [response.sample for response in first]
    [0, 1, 2]
    >>> all(len(response.tokens) == len(response.logprobs) <= 4 for response in second)
    True

`folder` is a Hugging Face folder or a hub id. Prompts are token ids. The same key gives the same tokens, whatever the mesh, the
slots and the company; `ids` number the prompts where a call holds only some of them. `Engine.generate` says the rest.
"""

from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine, Response, Tally, load

__all__ = ["Engine", "Response", "Sampling", "Tally", "load"]
