"""Checks how a token is drawn from a vocabulary of 151,936, the size of Qwen2.5's.

    python scripts/check_sampler.py words [--step 256]
    python scripts/check_sampler.py filters
    python scripts/check_sampler.py cost [--rows 16]

`words` finds what each of the 2^32 random words of each level draws, and so the exact probability of every token, and
compares it with the softmax over what top-p keeps. It relies on an index that does not fall as its word grows. That is
tried at the first level with every 256th word, as many as float32 has uniform numbers; --step 1 takes an hour a line.
`filters` compares what top-k and top-p keep with transformers' warpers in float64 (needs torch).
`cost` prints the FLOPs and bytes of the compiled draw and its time; a loop's body counts once.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax.model.decode import Shard
from crpo_jax.rollout.draw import Sampling, block_sums, block_widths, choose, draw_tokens, filter_mass, row_keys

VOCABULARY = 151_936
WORDS = 2**32
CHUNK = 2**22  # words tried together
WHOLE = Shard(None)

choices = jax.jit(choose)


def distributions(vocabulary: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 logits, from nearly uniform to nearly one-hot."""
    random = np.random.default_rng(0)
    for name, spread in (("flat", 0.05), ("medium", 2.0), ("sharp", 6.0)):
        yield name, (random.normal(size=vocabulary) * spread).astype(np.float32)
    peaks = (random.normal(size=vocabulary) * 2).astype(np.float32)
    peaks[:5] += 12
    peaks[-5:] += 11
    yield "peaks", peaks
    certain = (random.normal(size=vocabulary) * 0.1).astype(np.float32)
    certain[vocabulary // 2] = 36
    yield "certain", certain  # the first token has p = 2e-16, all others together 4e-11


def filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The mass [v] from which a token is drawn: exp(logits - max), 0 for what top-k and top-p remove."""
    width = block_widths(len(logits))[0]
    program = jax.jit(lambda x: filter_mass(jnp.exp(x - jnp.max(x)), x, sampling, width, WHOLE))
    return np.asarray(program(jnp.asarray(logits)[None])[0])


# --- words ------------------------------------------------------------------------------------------------------------


def count_words(mass: np.ndarray) -> np.ndarray:
    """How many of all words choose each index, [rows, n], for masses [rows, n].

    Bisects for the first word whose index is at least j, so it relies on indices that do not fall as words grow.
    """
    rows, n = mass.shape
    repeated, index = jnp.asarray(np.repeat(mass, n, axis=0)), np.tile(np.arange(n), rows)
    low, high = np.zeros(rows * n, np.int64), np.full(rows * n, WORDS)
    for _ in range(32):
        middle = (low + high) // 2
        reached = np.asarray(choices(repeated, jnp.asarray(middle.astype(np.uint32)))) >= index
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    last = np.asarray(choices(repeated, jnp.asarray(np.minimum(low, WORDS - 1).astype(np.uint32)))) >= index
    first = np.where(last, low, WORDS).reshape(rows, n)
    return np.diff(first, axis=1, append=WORDS)


def token_probabilities(mass: np.ndarray) -> tuple[np.ndarray, float]:
    """The probability [v] of every token: at each level the share of the words that lead to it.

    Also the probability of an index behind the end of a block, which must be 0.
    """
    parts, tokens, probabilities = mass[None], np.arange(len(mass))[None], np.ones(1)
    for width in block_widths(len(mass)):
        behind = ((0, 0), (0, -parts.shape[1] % width))
        parts, tokens = np.pad(parts, behind), np.pad(tokens, behind, constant_values=-1)
        sums = np.asarray(block_sums(jnp.asarray(parts), width, WHOLE))
        counts = np.zeros(sums.shape)
        reachable = probabilities > 0
        counts[reachable] = count_words(sums[reachable])
        probabilities = (probabilities[:, None] * counts / WORDS).reshape(-1)
        parts, tokens = parts.reshape(-1, width), tokens.reshape(-1, width)
    of_token = np.zeros(len(mass))
    real = tokens[:, 0] >= 0
    of_token[tokens[real, 0]] = probabilities[real]
    return of_token, float(probabilities[~real].sum())


def words_in_order(mass: np.ndarray, step: int) -> bool:
    """Whether no word, of every `step`th of them all, chooses a smaller index from masses [n] than those before it."""

    @jax.jit
    def in_order(start: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array]:
        words = start + step * jnp.arange(CHUNK, dtype=jnp.uint32)
        index = jax.vmap(lambda word: choose(jnp.asarray(mass)[None], word[None])[0])(words)
        return jnp.all(index[1:] >= index[:-1]) & (index[0] >= lowest), index[-1]

    last, holds = jnp.int32(0), True
    for start in range(0, WORDS, CHUNK * step):
        ordered, last = in_order(jnp.uint32(start), last)
        holds = holds and bool(ordered)
    return holds


def words(step: int) -> None:
    for (name, logits), top_p in ((pair, top_p) for pair in distributions(VOCABULARY) for top_p in (1.0, 0.95)):
        mass = filtered(logits, Sampling(top_p=top_p))
        drawn, behind = token_probabilities(mass)
        softmax = mass / mass.sum(dtype=np.float64)
        sums = np.asarray(block_sums(jnp.asarray(mass)[None], block_widths(VOCABULARY)[0], WHOLE)[0])
        rare, common = softmax < 1e-12, softmax > 1e-6
        error = np.abs(drawn[common] / softmax[common] - 1)
        print(
            f"{name}, top-p {top_p}: {np.count_nonzero(mass)} tokens of mass > 0; "
            f"mass 0 drawn with probability {drawn[mass == 0].sum() + behind:g}, "
            f"p < 1e-12 at most {drawn[rare].max(initial=0):.2g}; "
            f"relative error of p > 1e-6: median {np.median(error):.1g}, max {error.max():.1g}; "
            f"total variation {np.abs(drawn - softmax).sum() / 2:.1g}; words in order: {words_in_order(sums, step)}",
            flush=True,
        )


# --- filters ----------------------------------------------------------------------------------------------------------


def hard_logits(vocabulary: int) -> dict[str, np.ndarray]:
    """Names and float32 logits at which a threshold search can go wrong."""
    random = np.random.default_rng(1)
    normal = (random.normal(size=vocabulary) * 3).astype(np.float32)
    gaps = np.arange(0, -3 * vocabulary, -3, dtype=np.float32)  # from the 30th on, p < 1e-38
    masked = np.where(np.arange(vocabulary) % (vocabulary // 30) == 7, normal, np.float32(-np.inf))
    hot = np.full(vocabulary, -np.inf, np.float32)
    hot[vocabulary // 3] = 2.5
    close = normal * np.float32(1e-8)  # differences that exp in float32 does not see
    return {
        "normal": normal,
        "ties": np.round(normal * 2) / 2,
        "gaps of 3": random.permutation(gaps),
        "one far ahead": np.where(normal == normal.max(), normal + 60, normal),
        "-inf but for 31": masked,
        "one-hot": hot,
        "almost equal": close,
        "all equal": np.zeros(vocabulary, np.float32),
        "both zeros": np.where(normal > 0, np.float32(-0.0), np.float32(0.0)),
    }


def compare_kept(logits: np.ndarray, sampling: Sampling) -> dict[str, int]:
    """Tokens that may be drawn, here and with transformers' warpers in float64, and those of one side alone.

    Of equal probabilities at its threshold transformers' top-p keeps those that its sort leaves last; here, where
    float32 decides what is equal, all of them stay.
    """
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(logits, dtype=torch.float64)[None]
    ids = torch.LongTensor([[0]])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    mass = np.asarray(jnp.exp(jnp.asarray(logits) - logits.max()))
    ours, theirs = filtered(logits, sampling) > 0, np.isfinite(scores[0].numpy()) & (mass > 0)
    tie = ours & ~theirs & (mass == mass[theirs].min())
    return {
        "here": int(ours.sum()),
        "transformers": int(theirs.sum()),
        "ties only here": int(tie.sum()),
        "others only here": int((ours & ~theirs & ~tie).sum()),
        "only transformers": int((theirs & ~ours).sum()),
    }


def filters() -> None:
    settings = [Sampling(top_k=k) for k in (1, 5, 50, 5000)]
    settings += [Sampling(top_p=p) for p in (1e-9, 0.5, 0.95, 1 - 1e-6, 1 - 1e-12)]
    settings += [Sampling(top_p=0.95, top_k=50)]
    for name, logits in hard_logits(VOCABULARY).items():
        for sampling in settings:
            counts = ", ".join(f"{count} {what}" for what, count in compare_kept(logits, sampling).items())
            print(f"{name}, top-k {sampling.top_k}, top-p {sampling.top_p:.12g}: {counts}", flush=True)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int) -> None:
    logits = jnp.float32(np.random.default_rng(0).normal(size=(rows, VOCABULARY)) * 3)
    for sampling in (Sampling(), Sampling(0.6), Sampling(0.8, 0.95), Sampling(1.0, top_k=50), Sampling(0.0)):

        @jax.jit
        def draw(x: jax.Array, numbers: jax.Array, sampling: Sampling = sampling) -> tuple[jax.Array, jax.Array]:
            keys = row_keys(jax.random.key(0), numbers, numbers)
            return draw_tokens(x, keys, numbers, sampling, WHOLE, VOCABULARY)

        program, seconds = draw.lower(logits, jnp.arange(rows)).compile(), []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(program(logits, jnp.arange(rows)))
            seconds.append(time.perf_counter() - began)
        analysis = program.cost_analysis() or {}
        print(
            f"temperature {sampling.temperature}, top-p {sampling.top_p}, top-k {sampling.top_k}: "
            f"{analysis['flops']:.4g} FLOPs, {analysis['bytes accessed']:.4g} bytes, "
            f"{statistics.median(seconds) * 1000:.2f} ms",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("words").add_argument("--step", type=int, default=256, help="a power of two up to 1024")
    commands.add_parser("filters")
    commands.add_parser("cost").add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    if args.command == "words":
        words(args.step)
    elif args.command == "filters":
        filters()
    else:
        cost(args.rows)


if __name__ == "__main__":
    main()
